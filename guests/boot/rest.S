/* The rest of the boot guest, in real mode: asks the BIOS about disk and memory, opens the A20 gate, and enters protected
   mode. Loaded at 0000:7E00 by the boot sector. */
#include "boot.h"

        .code16
        .section .rest, "ax"
        .globl  rest
        .type   rest, @function
rest:
        movw    $by_chs, %si
        call    print

        /* Geometry: CL bits 5:0 sectors a track, DH the highest head. */
        movb    $0x08, %ah
        movb    drive, %dl
        pushw   %es
        xorw    %di, %di
        int     $0x13
        popw    %es
        jc      1f
        movw    $heads, %si
        call    print
        movb    %dh, %al
        incb    %al
        call    print_byte
        movw    $sectors, %si
        call    print
        movb    %cl, %al
        andb    $0x3F, %al
        call    print_byte
1:
        call    compare_by_lba

        movw    $base_memory, %si
        call    print
        int     $0x12
        call    print_word
        call    print_memory_map
        call    open_a20

        movw    $entering, %si
        call    print
        cli
        lgdt    gdt_register
        movl    %cr0, %eax
        orl     $CR0_PE, %eax
        movl    %eax, %cr0
        ljmpl   $CODE32, $protected
        .size   rest, . - rest

/* Read the sectors of this code once more, by block address, and say whether they are the same. */
        .type   compare_by_lba, @function
compare_by_lba:
        movb    $0x41, %ah              /* are the extensions there? */
        movw    $0x55AA, %bx
        movb    drive, %dl
        int     $0x13
        jc      1f
        cmpw    $0xAA55, %bx
        jne     1f
        movb    $0x42, %ah
        movb    drive, %dl
        movw    $address_packet, %si
        int     $0x13
        jc      1f
        movw    $rest, %si
        movw    $COPY, %di
        movw    $rest_bytes, %cx
        repe    cmpsb
        movw    $lba_same, %si
        je      2f
        movw    $lba_different, %si
        jmp     2f
1:      movw    $lba_missing, %si
2:      jmp     print
        .size   compare_by_lba, . - compare_by_lba

/* Print the memory map that INT 15h, AX=E820h tells, a line for each range. */
        .type   print_memory_map, @function
print_memory_map:
        xorl    %ebx, %ebx              /* the BIOS's place in its list */
1:      movl    $0xE820, %eax
        movl    $0x534D4150, %edx       /* "SMAP" */
        movl    $20, %ecx
        movw    $RECORD, %di
        int     $0x15
        jc      2f
        cmpl    $0x534D4150, %eax
        jne     2f
        movw    $range, %si
        call    print
        movl    RECORD + 4, %eax
        call    print_long
        movl    RECORD, %eax
        call    print_long
        movw    $range_length, %si
        call    print
        movl    RECORD + 12, %eax
        call    print_long
        movl    RECORD + 8, %eax
        call    print_long
        movw    $range_type, %si
        call    print
        movb    RECORD + 16, %al
        call    print_byte
        testl   %ebx, %ebx
        jnz     1b
2:      ret
        .size   print_memory_map, . - print_memory_map

/* Open the A20 gate and look whether it is: with it closed, FFFF:0510 is 0000:0500. */
        .type   open_a20, @function
open_a20:
        movw    $0x2401, %ax
        int     $0x15
        movw    $a20_closed, %si
        pushw   %es
        movw    $0xFFFF, %ax
        movw    %ax, %es
        movw    $0x1234, 0x0500
        movw    $0x4321, %es:0x0510
        cmpw    $0x1234, 0x0500
        popw    %es
        jne     1f
        movw    $a20_open, %si
1:      jmp     print
        .size   open_a20, . - open_a20

        .balign 4
address_packet:                         /* for INT 13h, AH=42h */
        .byte   16, 0
        .word   rest_sectors
        .word   COPY, 0
        .quad   1

        .balign 8
gdt:    .quad   0
        .quad   0x00CF9A000000FFFF      /* flat code, 32 bits */
        .quad   0x00CF92000000FFFF      /* flat data */
gdt_register:
        .word   gdt_register - gdt - 1
        .long   gdt

by_chs: .asciz  "\r\nchs: read\r\n"
heads:  .asciz  "heads "
sectors:
        .asciz  " sectors "
lba_same:
        .asciz  "\r\nlba: same\r\n"
lba_different:
        .asciz  "\r\nlba: different\r\n"
lba_missing:
        .asciz  "\r\nlba: not supported\r\n"
base_memory:
        .asciz  "base memory KiB "
range:  .asciz  "\r\ne820 "
range_length:
        .asciz  " + "
range_type:
        .asciz  " type "
a20_open:
        .asciz  "\r\na20: open"
a20_closed:
        .asciz  "\r\na20: closed"
entering:
        .asciz  "\r\nentering protected mode\r\n"
