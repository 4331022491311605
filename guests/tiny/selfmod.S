/* Code that changes code, in the ways that an execution engine which caches decoded instructions may miss. Prints a
   letter for each way that worked, and leaves with status 0, or with the number of the way that did not. Pentium and
   later see a change at the next instruction if it was made through the same linear address; a jump is enough otherwise
   (SDM Vol. 3A, "Handling Self- and Cross-Modifying Code"), and there is one wherever that is needed. */
#include "tiny.h"

#define ROUNDS 50

        MULTIBOOT
        movl    $1, %ebp                /* the way that is being tried */

/* a: the immediate of the next instruction. */
        movl    $0x11111111, %eax
        movl    $0x22222222, next_immediate + 1
next_immediate:
        movl    $0x33333333, %eax
        cmpl    $0x22222222, %eax
        jne     failed
        PRINT   "a"
        incl    %ebp

/* b: an instruction that has already run in the same loop; each round adds another number. */
        xorl    %ecx, %ecx
        xorl    %ebx, %ebx
        .globl  patched_loop
patched_loop:
        addl    $0, %ebx
        incl    %ecx
        movb    %cl, patched_loop + 2   /* of 83 C3 ib */
        cmpl    $ROUNDS, %ecx
        jb      patched_loop
        cmpl    $(ROUNDS * (ROUNDS - 1) / 2), %ebx
        jne     failed
        PRINT   "b"
        incl    %ebp

/* c: a procedure on another page, written there by REP MOVSB, called, replaced by a shorter one, called again. */
        movl    $first, %esi
        movl    $first_end - first, %ecx
        call    install
        call    arena
        cmpl    $1, %eax
        jne     failed
        movl    $second, %esi
        movl    $second_end - second, %ecx
        call    install
        call    arena
        cmpl    $2, %eax
        jne     failed
        PRINT   "c"
        incl    %ebp

/* d: the same by a word store across the boundary of two pages, into an instruction that straddles it. */
        movw    $0xB866, straddling     /* movw $imm16, %ax */
        movw    $0x1234, straddling + 2
        movb    $0xC3, straddling + 4
        call    straddling
        cmpw    $0x1234, %ax
        jne     failed
        movw    $0x5678, straddling + 2
        call    straddling
        cmpw    $0x5678, %ax
        jne     failed
        PRINT   "d"
        incl    %ebp

/* e: a jump whose target is turned around while the loop goes through it. */
        movl    $10, %ecx
        xorl    %ebx, %ebx
turn:   .byte   0xEB                    /* jmp rel8 */
turn_target:
        .byte   even - turn_target - 1
odd:    addl    $100, %ebx
        movb    $(even - turn_target - 1), turn_target
        jmp     turned
even:   incl    %ebx
        movb    $(odd - turn_target - 1), turn_target
turned: decl    %ecx
        jnz     turn
        cmpl    $505, %ebx
        jne     failed
        PRINT   "e"

        PRINT   " selfmod\r\n"
        EXIT    $0
failed:
        PRINT   " failed\r\n"
        movl    %ebp, %ebx
        EXIT    %bl

/* Copy ECX bytes at ESI to `arena`. */
        .type   install, @function
install:
        movl    $arena, %edi
        rep     movsb
        ret

first:  movl    $1, %eax
        ret
first_end:
second: xorl    %eax, %eax
        incl    %eax
        incl    %eax
        ret
second_end:
        END
        .bss
        .balign 4096
        .globl  arena
arena:  .skip   4096 + 4093
straddling:
        .skip   4096
