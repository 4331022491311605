/* The bench guest's beginning: multiboot header, stack, main. */
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
        call    guest_main
1:      cli
        hlt
        jmp     1b
        .cfi_endproc
        .size   start, . - start

        .bss
        .balign 16
        .skip   16384
stack_top:
        .section .note.GNU-stack, "", @progbits
