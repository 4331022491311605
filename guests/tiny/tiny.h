/* What the tiny guests share: the multiboot header, where they print, and how they end. Each is one file and one ELF
   image, loaded at 1 MiB and entered at `start` in flat 32-bit mode with interrupts off. */
#define COM1 0x3F8
#define DEBUG_EXIT 0xF4
#define CODE 0x08
#define DATA 0x10
#define STACK 0x00090000

/* The header, and `start`, at which the guest goes on. */
        .macro  MULTIBOOT
        .cfi_sections .debug_frame
        .text
        .balign 4
        .long   0x1BADB002, 0, -0x1BADB002
        .globl  start
        .type   start, @function
start:
        .cfi_startproc
        .cfi_undefined eip
        movl    $STACK, %esp
        .endm

/* The end of `start`, and the procedures below. */
        .macro  END
        .cfi_endproc
        .size   start, . - start

/* Print the text at ESI on COM1. Changes EAX, EDX, ESI. */
        .type   print, @function
print:
        .cfi_startproc
        movw    $(COM1 + 5), %dx
1:      inb     %dx, %al
        testb   $0x20, %al
        jz      1b
        movw    $COM1, %dx
        lodsb
        testb   %al, %al
        jz      2f
        outb    %al, %dx
        jmp     print
2:      ret
        .cfi_endproc
        .size   print, . - print
        .section .note.GNU-stack, "", @progbits
        .text
        .endm

/* Print a text given here. Changes EAX, EDX, ESI. */
        .macro  PRINT text
        .pushsection .rodata
7771:   .asciz  "\text"
        .popsection
        movl    $7771b, %esi
        call    print
        .endm

/* Leave with `status`, which QEMU turns into an exit status of 2 * status + 1; halt if there is no such device. */
        .macro  EXIT status
        movb    \status, %al
        outb    %al, $DEBUG_EXIT
7772:   cli
        hlt
        jmp     7772b
        .endm

/* Load a GDT of flat code and data, and all segment registers; needed by who loads an IDT. Changes EAX. */
        .macro  LOAD_GDT
        .pushsection .data
        .balign 8
gdt:    .quad   0, 0x00CF9A000000FFFF, 0x00CF92000000FFFF
gdt_register:
        .word   gdt_register - gdt - 1
        .long   gdt
        .popsection
        lgdt    gdt_register
        ljmp    $CODE, $7773f
7773:   movl    $DATA, %eax
        movl    %eax, %ds
        movl    %eax, %es
        movl    %eax, %fs
        movl    %eax, %gs
        movl    %eax, %ss
        .endm

/* Load an IDT of `gates` interrupt gates, none of them present. (A gate of zeros would have no valid type, which is found
   first: #GP instead of #NP.) */
        .macro  LOAD_IDT gates
        .pushsection .data
        .balign 8
idt:    .rept   \gates
        .long   0, 0x00000E00
        .endr
idt_register:
        .word   8 * \gates - 1
        .long   idt
        .popsection
        lidt    idt_register
        .endm

/* Let the IDT's gate `vector` be an interrupt gate to `handler`. Changes EAX. */
        .macro  SET_GATE vector, handler
        movl    $\handler, %eax
        movw    %ax, idt + 8 * \vector
        movw    $CODE, idt + 8 * \vector + 2
        movw    $0x8E00, idt + 8 * \vector + 4
        shrl    $16, %eax
        movw    %ax, idt + 8 * \vector + 6
        .endm
