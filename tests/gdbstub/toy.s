# What the toy machine runs: counts in memory, calls a function, and has one of each way to stop.
        .globl  _start, tick, bump, greeting, counter, loop, trap_here, leave, idle
        .text
_start:
        movl    $0, %eax
        movl    $0x8000, %esp
loop:
        call    tick
        jmp     loop

        .type   tick, @function
tick:
        pushl   %ebp
        movl    %esp, %ebp
        incl    %eax
        movl    %eax, counter
        call    bump
        popl    %ebp
        ret
        .size   tick, . - tick

        .type   bump, @function
bump:
        pushl   %ebp
        movl    %esp, %ebp
        incl    %ecx
        popl    %ebp
        ret
        .size   bump, . - bump

trap_here:
        ud2
        nop
        jmp     loop
leave:
        outb    %al, $0xf4
        nop
idle:
        hlt
        jmp     idle

        .data
counter:
        .long   0
greeting:
        .asciz  "hello, debugger"
