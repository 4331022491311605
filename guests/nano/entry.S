/* The nanobenchmarks' beginning, handlers and loops that C cannot express. */
#include "nano.h"

        .cfi_sections .debug_frame
        .section .multiboot, "ax"
        .balign 4
        .long   0x1BADB002, 0, -0x1BADB002
        .text
        .globl  start
        .type   start, @function
start:
        .cfi_startproc
        .cfi_undefined eip
        movl    $stack_top, %esp
        xorl    %ebp, %ebp
        pushl   %ebx
        call    nano_main
1:      cli
        hlt
        jmp     1b
        .cfi_endproc
        .size   start, . - start

        .macro  FUNCTION name
        .balign 16
        .globl  \name
        .type   \name, @function
\name:
        .endm

/* Handlers. */

/* #DE in loop_divide: go on behind the DIV, which has two bytes. */
FUNCTION divide_error_entry
        incl    divide_errors
        addl    $2, (%esp)
        iret

/* #PF: mark the page as present and try again. */
FUNCTION page_fault_entry
        pushl   %eax
        movl    missing_entry, %eax
        orl     $1, (%eax)
        incl    page_faults
        popl    %eax
        addl    $4, %esp
        iret

FUNCTION system_call_entry
        incl    system_calls
        iret

/* SYSENTER with the return address in EDX and the caller's stack in ECX. */
FUNCTION fast_call_entry
        incl    system_calls
        sysexit

/* INT 81h ends run_in_user: back onto the stack of its caller. */
FUNCTION leave_user_entry
        movl    $KERNEL_DATA, %eax
        movl    %eax, %ds
        movl    %eax, %es
        movl    kernel_esp, %esp
        popl    %edi
        popl    %esi
        popl    %ebx
        popl    %ebp
        ret

/* void run_in_user(void (*function)(uint32_t), uint32_t count) */
FUNCTION run_in_user
        movl    4(%esp), %ecx
        movl    8(%esp), %edx
        pushl   %ebp
        pushl   %ebx
        pushl   %esi
        pushl   %edi
        movl    %esp, kernel_esp
        movl    %edx, user_stack_top - 4
        movl    $USER_DATA, %eax
        movl    %eax, %ds
        movl    %eax, %es
        pushl   $USER_DATA
        pushl   $(user_stack_top - 8)
        pushl   $2
        pushl   $USER_CODE
        pushl   %ecx
        iret

/* What runs in ring 3: the count is at 4(%esp). */

FUNCTION user_empty
        movl    4(%esp), %ebx
1:      decl    %ebx
        jnz     1b
        int     $0x81

FUNCTION user_system_calls
        movl    4(%esp), %ebx
1:      int     $0x80
        decl    %ebx
        jnz     1b
        int     $0x81

FUNCTION user_fast_calls
        movl    4(%esp), %ebx
1:      movl    %esp, %ecx
        movl    $2f, %edx
        sysenter
2:      decl    %ebx
        jnz     1b
        int     $0x81

/* Loops in ring 0. */

FUNCTION loop_call_return
        movl    4(%esp), %ecx
1:      call    2f
        decl    %ecx
        jnz     1b
        ret
        .balign 16
2:      ret

/* Calls of one function from CALL_SITES places, in an order that only the whole of a long sequence repeats. */
FUNCTION loop_call_sites
        movl    4(%esp), %ecx
        movl    $1, %eax
next_site:
        imull   $1664525, %eax, %eax
        addl    $1013904223, %eax
        movl    %eax, %edx
        shrl    $24, %edx
        jmp     *sites(, %edx, 4)
        .macro  SITE
        call    site_callee
        decl    %ecx
        jnz     next_site
        ret
        .section .rodata
        .long   1b
        .text
        .endm
        .section .rodata
        .balign 4
sites:
        .text
        .rept   CALL_SITES
1:      SITE
        .endr
        .balign 16
site_callee:
        ret

FUNCTION loop_interrupt_returns
        movl    4(%esp), %ecx
1:      pushfl
        pushl   $KERNEL_CODE
        pushl   $2f
        iret
2:      decl    %ecx
        jnz     1b
        ret

FUNCTION loop_divide
        movl    4(%esp), %ecx
        pushl   %ebx
        xorl    %ebx, %ebx
1:      divl    %ebx
        decl    %ecx
        jnz     1b
        popl    %ebx
        ret

/* uint32_t loop_patched(uint32_t count): the sum of what an instruction loads that is patched before each time. */
        .section .patched, "awx"
FUNCTION loop_patched
        movl    4(%esp), %ecx
        xorl    %eax, %eax
1:      movl    %ecx, patch + 1
        jmp     patch
patch:
        movl    $0x12345678, %edx
        addl    %edx, %eax
        decl    %ecx
        jnz     1b
        ret
        .text

/* void switch_process(uint32_t *saved_esp, uint32_t new_esp, uint32_t new_cr3) */
FUNCTION switch_process
        movl    4(%esp), %eax
        movl    8(%esp), %edx
        movl    12(%esp), %ecx
        pushl   %ebp
        pushl   %ebx
        pushl   %esi
        pushl   %edi
        movl    %esp, (%eax)
        movl    %edx, %esp
        movl    %ecx, %cr3
        popl    %edi
        popl    %esi
        popl    %ebx
        popl    %ebp
        ret

/* Whatever else the CPU enters here: give up with status 1. */
FUNCTION unexpected_entry
        movb    $0, %al
        outb    %al, $0xF4
1:      cli
        hlt
        jmp     1b

        .bss
        .balign 16
        .skip   16384
stack_top:
        .globl  interrupt_stack_top
        .skip   4096
interrupt_stack_top:
        .skip   4096
user_stack_top:
kernel_esp:
        .skip   4
        .section .note.GNU-stack, "", @progbits
