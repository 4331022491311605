/* From the boot loader to kernel_main: multiboot header, page tables, the jump to the upper half. The header and the
   code before that jump are linked at their physical addresses, since paging is off. */
#include "layout.h"

#define MULTIBOOT_MAGIC 0x1BADB002
#define MULTIBOOT_FLAGS 0x00000003 /* align modules to pages, tell memory sizes */
#define PHYSICAL(symbol) (symbol - KERNEL_BASE)

        .section .multiboot, "a"
        .balign 4
        .long   MULTIBOOT_MAGIC
        .long   MULTIBOOT_FLAGS
        .long   -(MULTIBOOT_MAGIC + MULTIBOOT_FLAGS)

/* Entered by the loader in 32-bit protected mode: flat segments, paging and interrupts off, EAX the magic number of
   multiboot loaders, EBX the physical address of its information. No stack, no GDT that could be relied upon. */
        .section .boot, "ax"
        .globl  start
        .type   start, @function
start:
        /* Fill the page tables that map the first DIRECT_BYTES of physical memory, writable. ECX counts pages. */
        movl    $PHYSICAL(direct_tables), %edi
        movl    $(PAGE_PRESENT | PAGE_WRITE), %edx
        movl    $(DIRECT_BYTES / PAGE_BYTES), %ecx
1:      movl    %edx, (%edi)
        addl    $4, %edi
        addl    $PAGE_BYTES, %edx
        loop    1b

        /* Enter the tables into the directory twice: at KERNEL_BASE for good, at 0 for the next few instructions,
           which still run at their physical addresses when paging starts. */
        movl    $PHYSICAL(kernel_directory), %edi
        movl    $(PHYSICAL(direct_tables) + PAGE_PRESENT + PAGE_WRITE), %edx
        movl    $(DIRECT_BYTES >> 22), %ecx
2:      movl    %edx, (%edi)
        movl    %edx, (KERNEL_BASE >> 20)(%edi)
        addl    $4, %edi
        addl    $PAGE_BYTES, %edx
        loop    2b

        movl    $PHYSICAL(kernel_directory), %edx
        movl    %edx, %cr3
        movl    %cr0, %edx
        orl     $(CR0_PG | CR0_WP | CR0_EM), %edx
        movl    %edx, %cr0
        movl    $start_high, %edx
        jmp     *%edx
        .size   start, . - start

        .text
        .type   start_high, @function
start_high:
        .cfi_sections .debug_frame
        .cfi_startproc
        .cfi_undefined eip
        movl    $(boot_stack + PAGE_BYTES), %esp
        xorl    %ebp, %ebp
        /* Zero is where null pointers point: from here on nothing is mapped in the user half. */
        movl    $(DIRECT_BYTES >> 22), %ecx
        movl    $kernel_directory, %edi
3:      movl    $0, -4(%edi,%ecx,4)
        loop    3b
        movl    %cr3, %edx
        movl    %edx, %cr3
        pushl   %ebx
        pushl   %eax
        call    kernel_main
4:      hlt
        jmp     4b
        .cfi_endproc
        .size   start_high, . - start_high

        .section .bss.pages, "aw", @nobits
        .balign PAGE_BYTES
        .globl  kernel_directory, direct_tables
        .type   kernel_directory, @object
        .size   kernel_directory, PAGE_BYTES
kernel_directory:
        .skip   PAGE_BYTES
        .type   direct_tables, @object
        .size   direct_tables, DIRECT_BYTES / 1024
direct_tables:
        .skip   DIRECT_BYTES / 1024
        .type   boot_stack, @object
        .size   boot_stack, PAGE_BYTES
boot_stack:
        .skip   PAGE_BYTES
        .section .note.GNU-stack, "", @progbits
