/* Instructions that debuggers and engines step over wrongly, each under a name: a test breaks at the name, steps, and
   knows where it must be. Nothing else happens, so a run is the same instructions each time. */
#include "tiny.h"

        MULTIBOOT
        LOAD_GDT
        LOAD_IDT 256
        SET_GATE 32, line0
        SET_GATE 128, service
        movb    $0x11, %al              /* the timer's line at vector 32, and masked for now */
        outb    %al, $0x20
        movb    $32, %al
        outb    %al, $0x21
        movb    $4, %al
        outb    %al, $0x21
        movb    $1, %al
        outb    %al, $0x21
        movb    $0xFF, %al
        outb    %al, $0x21

/* Plain instructions, and a call. */
        .globl  step_plain
step_plain:
        movl    $5, %eax
        addl    $7, %eax
        call    leaf
        .globl  step_after_call
step_after_call:
        nop

/* REP: each iteration is a step, EIP stays until the last. */
        movl    $source, %esi
        movl    $destination, %edi
        movl    $5, %ecx
        .globl  step_rep
step_rep:
        rep     movsb
        .globl  step_after_rep
step_after_rep:
        xorl    %ecx, %ecx
        .globl  step_rep_zero
step_rep_zero:
        rep     movsb
        .globl  step_after_rep_zero
step_after_rep_zero:
        nop

/* A software interrupt: one step goes to the first instruction of its handler, not past it. */
        .globl  step_int
step_int:
        int     $0x80
        .globl  step_after_int
step_after_int:
        nop

/* POPF that changes DF, ID and the arithmetic flags, and back. */
        pushfl
        pushfl
        orl     $0x00200CD5, (%esp)     /* ID, OF, DF, SF, ZF, AF, PF, CF */
        .globl  step_popf
step_popf:
        popfl
        .globl  step_after_popf
step_after_popf:
        popfl

/* MOV SS: no interrupt, and no single-step trap, between it and the next instruction. */
        movl    $DATA, %eax
        .globl  step_mov_ss
step_mov_ss:
        movl    %eax, %ss
        movl    $STACK, %esp
        .globl  step_after_mov_ss
step_after_mov_ss:
        nop

/* STI lets interrupts in one instruction late, here into HLT: the timer interrupt ends it. */
        movb    $0x30, %al              /* channel 0, both bytes, mode 0: one interrupt */
        outb    %al, $0x43
        movb    $0xE8, %al              /* after 1000 counts */
        outb    %al, $0x40
        movb    $0x03, %al
        outb    %al, $0x40
        movb    $0xFE, %al
        outb    %al, $0x21
        .globl  step_sti
step_sti:
        sti
        .globl  step_hlt
step_hlt:
        hlt
        .globl  step_after_hlt
step_after_hlt:
        cli

/* LOOP to itself: three steps at one address. */
        movl    $3, %ecx
        .globl  step_loop
step_loop:
        loop    step_loop
        .globl  step_after_loop
step_after_loop:
        nop

/* INT3 in the guest is the guest's, gate or not; here there is one that counts. */
        SET_GATE 3, breakpoint
        .globl  step_int3
step_int3:
        int3
        .globl  step_after_int3
step_after_int3:
        PRINT   "stepper\r\n"
        movl    counted, %eax
        EXIT    %al

        .globl  leaf
        .type   leaf, @function
leaf:   incl    %eax
        ret

/* INT 80h, INT3 and line 0: each adds to `counted` a power of 16. */
        .globl  service
        .type   service, @function
service:
        addl    $0x01, counted
        iret
        .globl  breakpoint
        .type   breakpoint, @function
breakpoint:
        addl    $0x10, counted
        iret
        .globl  line0
        .type   line0, @function
line0:
        addl    $0x04, counted
        pushl   %eax
        movb    $0x20, %al
        outb    %al, $0x20
        popl    %eax
        iret
        END
        .data
source: .ascii  "bytes"
        .globl  destination
destination:
        .skip   8
        .globl  counted
counted:
        .long   0                       /* ends at 0x15 */
