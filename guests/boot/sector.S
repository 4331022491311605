/* The boot sector: 512 bytes that a BIOS loads at 0000:7C00 and enters in real mode with the drive in DL. Says hello
   through the BIOS and on COM1, and loads the rest of the image behind itself by INT 13h. */
#include "boot.h"

        .code16
        .section .sector, "ax"
        .globl  start
        .type   start, @function
start:
        ljmp    $0, $1f                 /* some BIOSes enter at 07C0:0000 */
1:      xorw    %ax, %ax
        movw    %ax, %ds
        movw    %ax, %es
        movw    %ax, %ss                /* no interrupt comes between this and the next instruction */
        movw    $start, %sp
        cld
        sti
        movb    %dl, drive

        /* COM1: 115200 baud, 8 data bits, no parity, no interrupts. */
        movw    $COM1 + 3, %dx
        movb    $0x80, %al
        outb    %al, %dx
        movw    $COM1, %dx
        movb    $1, %al
        outb    %al, %dx
        incw    %dx
        movb    $0, %al
        outb    %al, %dx
        movw    $COM1 + 3, %dx
        movb    $0x03, %al
        outb    %al, %dx

        movw    $hello, %si
        call    print
        movb    drive, %al
        call    print_byte

        /* Read the sectors after this one: cylinder 0, head 0, sector 2 and on; three times, for the sake of floppies,
           whose first reads may fail while the motor starts. */
        movw    $3, %di
2:      movw    $(0x0200 + rest_sectors), %ax
        movw    $rest, %bx
        movw    $0x0002, %cx
        movb    $0, %dh
        movb    drive, %dl
        int     $0x13
        jnc     rest
        movb    $0, %ah                 /* reset the drive */
        int     $0x13
        decw    %di
        jnz     2b
        movw    $unreadable, %si
        call    print
3:      hlt
        jmp     3b
        .size   start, . - start

/* Print the text at SI up to its zero byte. Changes AX, SI. */
        .globl  print
        .type   print, @function
1:      call    print_character
print:
        lodsb
        testb   %al, %al
        jnz     1b
        ret
        .size   print, . - print

/* Print the low byte, word or double word of EAX in hexadecimal. Changes EAX. */
        .globl  print_byte, print_word, print_long
        .type   print_long, @function
print_long:
        pushl   %eax
        shrl    $16, %eax
        call    print_word
        popl    %eax
        .type   print_word, @function
print_word:
        pushw   %ax
        movb    %ah, %al
        call    print_byte
        popw    %ax
        .type   print_byte, @function
print_byte:
        pushw   %ax
        shrb    $4, %al
        call    print_digit
        popw    %ax
        andb    $0x0F, %al
print_digit:
        addb    $'0', %al
        cmpb    $'9', %al
        jbe     print_character
        addb    $('a' - '9' - 1), %al
        .size   print_long, . - print_long

/* Print the character AL on the screen by INT 10h and on COM1. Changes nothing. */
        .globl  print_character
        .type   print_character, @function
print_character:
        pushal
        movb    $0x0E, %ah              /* teletype output on page 0 */
        movw    $0x0007, %bx
        int     $0x10
        movb    %al, %ah
        movw    $COM1 + 5, %dx
1:      inb     %dx, %al
        testb   $0x20, %al              /* can send */
        jz      1b
        movb    %ah, %al
        movw    $COM1, %dx
        outb    %al, %dx
        popal
        ret
        .size   print_character, . - print_character

hello:  .asciz  "trapgate boot guest\r\ndrive "
unreadable:
        .asciz  "\r\ncannot read the disk\r\n"
        .globl  drive
drive:  .byte   0

        .org    510
        .word   0xAA55
