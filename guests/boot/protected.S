/* The end of the boot guest, in protected mode, where no BIOS can help: reload the segments, say so on COM1 and in the
   screen's memory, and turn the machine off. */
#include "boot.h"

#define SCREEN 0xB8000
#define ROW_BYTES 160

        .code32
        .section .protected, "ax"
        .globl  protected
        .type   protected, @function
protected:
        movl    $DATA32, %eax
        movl    %eax, %ds
        movl    %eax, %es
        movl    %eax, %ss
        movl    $PROTECTED_STACK, %esp
        movl    $text, %esi
        movl    $(SCREEN + 24 * ROW_BYTES), %edi
        movb    $0x1F, %ah              /* white on blue */
1:      lodsb
        testb   %al, %al
        jz      2f
        call    send
        stosw
        jmp     1b
2:      movb    $'\r', %al
        call    send
        movb    $'\n', %al
        call    send

        movw    $0x604, %dx             /* ACPI state S5, where QEMU has it */
        movw    $0x2000, %ax
        outw    %ax, %dx
3:      hlt
        jmp     3b
        .size   protected, . - protected

/* Send AL on COM1. Changes EDX. */
        .type   send, @function
send:
        pushl   %eax
        movl    $(COM1 + 5), %edx
1:      inb     %dx, %al
        testb   $0x20, %al
        jz      1b
        popl    %eax
        movl    $COM1, %edx
        outb    %al, %dx
        ret
        .size   send, . - send

text:   .asciz  "protected mode"
        .section .note.GNU-stack, "", @progbits
