/* The library that all programs share, first part: how a program begins and how it enters the kernel. */
#include "../system_calls.h"

        .cfi_sections .debug_frame
        .text

/* Every task begins here, at the library's first byte, with EBX at its main function. */
        .globl  user_start
        .type   user_start, @function
user_start:
        .cfi_startproc
        .cfi_undefined eip
        xorl    %ebp, %ebp
        call    *%ebx
        movl    $SYS_EXIT, %eax
        xorl    %ebx, %ebx
        int     $0x80
        .cfi_endproc
        .size   user_start, . - user_start

/* Save what C functions must keep, and take the arguments into the registers where the kernel wants them. */
        .macro  TAKE_ARGUMENTS
        .irp    register, ebx, esi, edi
        pushl   %\register
        .cfi_adjust_cfa_offset 4
        .cfi_rel_offset \register, 0
        .endr
        movl    16(%esp), %eax
        movl    20(%esp), %ebx
        movl    24(%esp), %esi
        movl    28(%esp), %edi
        .endm

        .macro  RESTORE_AND_RETURN
        .irp    register, edi, esi, ebx
        popl    %\register
        .cfi_adjust_cfa_offset -4
        .cfi_restore \register
        .endr
        ret
        .endm

/* int system_call(int number, first, second, third): by interrupt. */
        .globl  system_call
        .type   system_call, @function
system_call:
        .cfi_startproc
        TAKE_ARGUMENTS
        int     $0x80
        RESTORE_AND_RETURN
        .cfi_endproc
        .size   system_call, . - system_call

/* int fast_system_call(int number, first, second, third): by SYSENTER if the CPU has it. */
        .globl  fast_system_call
        .type   fast_system_call, @function
fast_system_call:
        .cfi_startproc
        cmpb    $0, sysenter_available
        je      system_call
        TAKE_ARGUMENTS
        movl    $1f, %edx
        movl    %esp, %ecx
        sysenter
1:      RESTORE_AND_RETURN
        .cfi_endproc
        .size   fast_system_call, . - fast_system_call

        .section .rodata
        .globl  sysenter_available
        .type   sysenter_available, @object
sysenter_available:             /* tasks_init writes it */
        .byte   0
        .size   sysenter_available, 1
        .section .note.GNU-stack, "", @progbits
