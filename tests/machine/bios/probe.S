# A boot sector that makes the BIOS calls of a table in the sectors behind it, and writes what comes back, the registers
# and some memory, to the debug console (port E9h). It ends the run through isa-debug-exit.
#
# Entry: vector, FLAGS, EAX EBX ECX EDX ESI EDI EBP, DS ES, what to dump: offset, segment, length; 42 bytes.
        .set    TABLE, 0x8000
        .set    SECTORS, 16
        .set    ENTRY_BYTES, 42
        .globl  _start
_start:
        cli
        movb    %dl, %cs:drive
        pushal                          # the registers at entry, as the first record
        pushw   %ds
        pushw   %es
        pushw   %ss
        xorw    %ax, %ax
        movw    %ax, %ds
        movw    %ax, %es
        cld
        movw    $0xE9, %dx
        movw    %sp, %si
        movw    $38, %cx
        ss rep outsb
        movw    %ax, %ss
        movw    $0x7A00, %sp
        sti
        movw    $(0x200 + SECTORS), %ax
        movw    $TABLE, %bx
        movw    $2, %cx
        xorb    %dh, %dh
        movb    drive, %dl
        int     $0x13
        jc      end
        movw    $TABLE, %si
next:
        movw    (%si), %ax
        cmpw    $0xFFFF, %ax
        je      end
        movb    %al, vector
        movw    %si, entry
        movw    2(%si), %ax
        orw     $0x200, %ax
        movw    %ax, flags
        movl    4(%si), %eax
        movl    8(%si), %ebx
        movl    12(%si), %ecx
        movl    16(%si), %edx
        movl    24(%si), %edi
        movl    28(%si), %ebp
        movw    34(%si), %es
        pushl   20(%si)
        movw    32(%si), %ds
        popl    %esi
        pushw   %cs:flags
        popfw
        .byte   0xCD
vector: .byte   0
        cli
        pushfw
        pushw   %es
        pushw   %ds
        pushal
        xorw    %ax, %ax
        movw    %ax, %ds
        movw    %ax, %es
        cld
        movw    $0xE9, %dx
        movw    %sp, %si
        movw    $38, %cx
        rep outsb
        addw    $38, %sp
        movw    entry, %bx
        movw    40(%bx), %cx
        movw    36(%bx), %si
        movw    38(%bx), %ds
        rep outsb
        movw    %cx, %ds
        sti
        leaw    ENTRY_BYTES(%bx), %si
        jmp     next
end:
        movw    $0xF4, %dx
        xorl    %eax, %eax
        outl    %eax, %dx
1:      hlt
        jmp     1b
entry:  .word   0
flags:  .word   0
drive:  .byte   0
