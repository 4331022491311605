/* The beginning, every way into and out of the kernel, and the switch between two processes. */
#include "layout.h"

#define FRAME_VECTOR 40 /* of struct frame */

        .cfi_sections .debug_frame
        .section .multiboot, "ax"
        .balign 4
        .long   0x1BADB002, 2, -0x1BADB004
        .text
        .globl  start
        .type   start, @function
start:
        .cfi_startproc
        .cfi_undefined eip
        movl    $stack_top, %esp
        xorl    %ebp, %ebp
        pushl   %ebx
        call    kernel_main
1:      cli
        hlt
        jmp     1b
        .cfi_endproc
        .size   start, . - start

/* The entry of each vector: adds an error code if the CPU pushes none, then the vector. */
        .macro  VECTOR number, error=0
vector_\number:
        .if     \error == 0
        pushl   $0
        .endif
        pushl   $\number
        jmp     trap_entry
        .pushsection .rodata
        .long   vector_\number
        .popsection
        .endm

        .section .rodata
        .balign 4
        .globl  vector_table
vector_table:
        .text
        .irp    number, 0, 1, 2, 3, 4, 5, 6, 7
        VECTOR  \number
        .endr
        VECTOR  8, error=1
        VECTOR  9
        .irp    number, 10, 11, 12, 13, 14
        VECTOR  \number, error=1
        .endr
        VECTOR  15
        VECTOR  16
        VECTOR  17, error=1
        .irp    number, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31
        VECTOR  \number
        .endr
        .irp    number, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47
        VECTOR  \number
        .endr
        VECTOR  0x80

/* Complete the frame, call trap(frame), and resume what was interrupted. */
        .type   trap_entry, @function
trap_entry:
        pushl   %ds
        pushl   %es
        pushal
        cld
        movl    $KERNEL_DATA, %eax
        movl    %eax, %ds
        movl    %eax, %es
        pushl   %esp
        call    trap
        addl    $4, %esp
/* New processes begin here, with ESP at a frame. */
        .globl  trap_return
trap_return:
        cmpl    $SYSENTER_VECTOR, FRAME_VECTOR(%esp)
        popal
        popl    %es
        popl    %ds
        je      1f
        addl    $8, %esp
        iretl
/* Back to who used SYSENTER. STI acts one instruction late, in ring 3. */
1:      movl    8(%esp), %edx
        movl    20(%esp), %ecx
        sti
        sysexit
        .size   trap_entry, . - trap_entry

/* SYSENTER comes here with ESP at the ring 0 stack pointer in the task state segment. */
        .globl  sysenter_entry
        .type   sysenter_entry, @function
sysenter_entry:
        movl    (%esp), %esp
        pushl   $USER_DATA
        pushl   %ecx
        pushfl
        orl     $EFLAGS_IF, (%esp)
        pushl   $USER_CODE
        pushl   %edx
        pushl   $0
        pushl   $SYSENTER_VECTOR
        jmp     trap_entry
        .size   sysenter_entry, . - sysenter_entry

/* void switch_context(uint32_t *saved_esp, uint32_t new_esp): to the kernel stack of another process, which did the same
   before. */
        .globl  switch_context
        .type   switch_context, @function
switch_context:
        movl    4(%esp), %eax
        movl    8(%esp), %edx
        pushl   %ebp
        pushl   %ebx
        pushl   %esi
        pushl   %edi
        movl    %esp, (%eax)
        movl    %edx, %esp
        popl    %edi
        popl    %esi
        popl    %ebx
        popl    %ebp
        ret
        .size   switch_context, . - switch_context

        .bss
        .balign 4096
        .skip   8192
stack_top:
        .section .note.GNU-stack, "", @progbits
