/* Ten timer interrupts, each waited for by HLT: the timer runs at 1000 Hz on line 0, moved to vector 32. Prints a dot
   for each and leaves with the number of interrupts. */
#include "tiny.h"

#define TICKS 10
#define DIVISOR 1193

        MULTIBOOT
        LOAD_GDT
        LOAD_IDT 48
        SET_GATE 32, tick

        .irp    init, 0x11, 0x20, 0x04, 0x01 /* ICW1 to ICW4 of the first controller */
        movb    $\init, %al
        .if     \init == 0x11
        outb    %al, $0x20
        .else
        outb    %al, $0x21
        .endif
        .endr
        movb    $0xFE, %al              /* the timer only */
        outb    %al, $0x21
        movb    $0x34, %al              /* channel 0, both bytes, mode 2 */
        outb    %al, $0x43
        movb    $(DIVISOR & 0xFF), %al
        outb    %al, $0x40
        movb    $(DIVISOR >> 8), %al
        outb    %al, $0x40

        xorl    %ebx, %ebx
        .globl  wait
wait:
        sti
        hlt
        cli
        PRINT   "."
        cmpl    $TICKS, %ebx
        jb      wait
        PRINT   "\r\n"
        EXIT    %bl

/* Line 0: count in EBX. */
        .globl  tick
        .type   tick, @function
tick:
        incl    %ebx
        pushl   %eax
        movb    $0x20, %al              /* end of interrupt */
        outb    %al, $0x20
        popl    %eax
        iret
        END
