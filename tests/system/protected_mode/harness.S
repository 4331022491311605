/* The guest that runs protected-mode cases: for each it builds an arena of tables and stacks, enters the case's code, and
   prints what the exception or interrupt that ended it found. Layout and records are described in arena.py and harness.py. */

        .set    DATA, 0x10
        .set    HARNESS_STACK, 0x18000
        .set    BLOB, 0x200000

        /* A case record, in bytes from its start. */
        .set    R_LENGTH, 0
        .set    R_KIND, 4
        .set    R_CR0, 8
        .set    R_CR3, 12
        .set    R_CR4, 16
        .set    R_LDTR, 20
        .set    R_EAX, 24
        .set    R_ECX, 28
        .set    R_EDX, 32
        .set    R_EBX, 36
        .set    R_ESP, 40
        .set    R_SS, 44
        .set    R_EBP, 48
        .set    R_ESI, 52
        .set    R_EDI, 56
        .set    R_EIP, 60
        .set    R_CS, 64
        .set    R_EFLAGS, 68
        .set    R_ES, 72
        .set    R_DS, 76
        .set    R_FS, 80
        .set    R_GS, 84
        .set    R_PATCHES, 88
        .set    R_DUMPS, 92
        .set    R_BYTES, 96

        .code32
        .text
        .globl  _start
_start: jmp     start

        /* Entry points of the vectors, 16 bytes apart. The arena's IDT points here. */
        .org    0x1000
stubs:
        .set    vector, 0
        .rept   64
        .balign 16
        pushl   $vector
        jmp     common
        .set    vector, vector + 1
        .endr
        .balign 16

common: pushl   %eax
        movl    %ds, %eax
        pushl   %eax
        movl    $DATA, %eax
        movl    %eax, %ds
        movl    %ecx, o_ecx
        movl    %edx, o_edx
        movl    %ebx, o_ebx
        movl    %ebp, o_ebp
        movl    %esi, o_esi
        movl    %edi, o_edi
        popl    %eax
        movl    %eax, o_ds
        popl    %eax
        movl    %eax, o_eax
        popl    %eax
        movl    %eax, o_vector
        movl    %esp, o_esp
        movl    %ss, %eax
        movl    %eax, o_ss
        lss     harness_stack, %esp
        pushfl
        popl    %eax
        movl    %eax, o_eflags
        pushl   $2                      /* NT first, or IRET were a task switch */
        popfl
        pushl   $2                      /* then by IRET, for POPF leaves VIF and VIP alone */
        pushl   $8
        pushl   $1f
        iretl
1:      movl    %es, %eax
        movl    %eax, o_es
        movl    %fs, %eax
        movl    %eax, o_fs
        movl    %gs, %eax
        movl    %eax, o_gs
        xorl    %eax, %eax
        strw    %ax
        movl    %eax, o_tr
        sldtw   %ax
        movl    %eax, o_ldtr
        movl    %cr0, %eax
        movl    %eax, o_cr0
        movl    %cr2, %eax
        movl    %eax, o_cr2
        movl    %cr3, %eax
        movl    %eax, o_cr3
        movl    %cr4, %eax
        movl    %eax, o_cr4
        movl    %dr7, %eax
        movl    %eax, o_dr7
        movl    $0x400, %eax
        movl    %eax, %dr7
        movl    %dr6, %eax
        movl    %eax, o_dr6
        movl    $DATA, %eax
        movl    %eax, %es
        movl    $0x11, %eax
        movl    %eax, %cr0
        xorl    %eax, %eax
        movl    %eax, %cr3
        movl    %eax, %cr4
        movl    %eax, %cr2
        lgdt    gdt_pointer
        lidt    idt_pointer
        ljmp    $8, $1f
1:      cld

        /* The differences of the arena, as offset and new value. */
        movl    $output_end, %edi
        movl    $ARENA, %esi
        movl    $shadow, %ebx
        movl    $ARENA_DWORDS, %ecx
2:      xchgl   %edi, %ebx
        repe cmpsl
        xchgl   %edi, %ebx
        je      3f
        leal    -4-ARENA(%esi), %eax
        stosl
        movl    -4(%esi), %eax
        stosl
        testl   %ecx, %ecx
        jnz     2b
3:      movl    %edi, %eax
        subl    $output_end, %eax
        shrl    $3, %eax
        movl    %eax, o_differences

        /* What the case wants to see besides. */
        movl    dumps, %ebx
        movl    case + R_DUMPS, %edx
4:      testl   %edx, %edx
        jz      5f
        movl    (%ebx), %esi
        movl    4(%ebx), %ecx
        rep movsl
        addl    $8, %ebx
        decl    %edx
        jmp     4b
5:      movl    $output, %esi
        movl    %edi, %ecx
        subl    %esi, %ecx
        movl    %ecx, %eax
        movl    %eax, o_bytes
        movl    $0xE9, %edx
        rep outsb
        movl    next, %esi
        jmp     run

start:  lss     harness_stack, %esp
        movl    $BLOB, %esi

        /* The arena's first contents come before the cases. */
        movl    %esi, template
        addl    $(ARENA_DWORDS * 4), %esi
        lgdt    gdt_pointer
        lidt    idt_pointer

run:    cld
        movl    R_LENGTH(%esi), %eax
        testl   %eax, %eax
        jz      finish
        addl    %esi, %eax
        movl    %eax, next
        movl    $case, %edi
        movl    $(R_BYTES / 4), %ecx
        rep movsl
        pushl   %esi
        movl    template, %esi
        movl    $ARENA, %edi
        movl    $ARENA_DWORDS, %ecx
        rep movsl
        movl    $CODE, %edi             /* nothing stays of the last case's code */
        movl    $0xCCCCCCCC, %eax
        movl    $(CODE_BYTES / 4), %ecx
        rep stosl
        popl    %esi
        movl    case + R_PATCHES, %edx
1:      testl   %edx, %edx
        jz      2f
        movl    (%esi), %edi
        movl    4(%esi), %ecx
        addl    $8, %esi
        rep movsb
        addl    $3, %esi
        andl    $~3, %esi
        decl    %edx
        jmp     1b
2:      movl    %esi, dumps
        incl    o_number

        movl    $TSS_MAIN, %eax
        ltr     %ax
        movl    case + R_LDTR, %eax
        lldt    %ax
        movl    $ARENA, %esi
        movl    $shadow, %edi
        movl    $ARENA_DWORDS, %ecx
        rep movsl
        movl    $0xFFFF0FF0, %eax
        movl    %eax, %dr6

        movl    case + R_CR4, %eax
        movl    %eax, %cr4
        movl    case + R_CR3, %eax
        movl    %eax, %cr3
        movl    case + R_CR0, %eax
        movl    %eax, %cr0
        jmp     3f
3:      movl    case + R_KIND, %eax
        cmpl    $1, %eax
        jb      jump
        ja      virtual

        /* By IRET to an outer level. */
        call    push_frame
        movl    case + R_ES, %eax
        movl    %eax, %es
        movl    case + R_FS, %eax
        movl    %eax, %fs
        movl    case + R_GS, %eax
        movl    %eax, %gs
        movl    case + R_DS, %eax
        movl    %eax, %ds
        jmp     1f
virtual:
        call    push_frame
1:      movl    %ss:case + R_EAX, %eax
        movl    %ss:case + R_ECX, %ecx
        movl    %ss:case + R_EDX, %edx
        movl    %ss:case + R_EBX, %ebx
        movl    %ss:case + R_EBP, %ebp
        movl    %ss:case + R_ESI, %esi
        movl    %ss:case + R_EDI, %edi
        .globl  do_iret
do_iret:
        iretl

push_frame:
        popl    %eax
        pushl   case + R_GS
        pushl   case + R_FS
        pushl   case + R_DS
        pushl   case + R_ES
        pushl   case + R_SS
        pushl   case + R_ESP
        pushl   case + R_EFLAGS
        pushl   case + R_CS
        pushl   case + R_EIP
        jmp     *%eax

        /* At level 0, by a far jump. */
jump:   pushl   case + R_EFLAGS
        pushl   $8
        pushl   $1f
        iretl
1:      movl    case + R_ECX, %ecx
        movl    case + R_EDX, %edx
        movl    case + R_EBX, %ebx
        movl    case + R_EBP, %ebp
        movl    case + R_ESI, %esi
        movl    case + R_EDI, %edi
        movl    case + R_ES, %eax
        movl    %eax, %es
        movl    case + R_FS, %eax
        movl    %eax, %fs
        movl    case + R_GS, %eax
        movl    %eax, %gs
        movl    case + R_DS, %eax
        movl    %eax, %ds
        movl    %cs:case + R_EAX, %eax
        lss     %cs:case + R_ESP, %esp
        ljmp    *%cs:case + R_EIP

finish: xorl    %eax, %eax
        .rept   4                       /* a record without length is the end */
        outb    %al, $0xE9
        .endr
        outb    %al, $0xF4
        movl    $goodbye, %esi          /* the same for Bochs */
        movl    $8, %ecx
        movl    $0x8900, %edx
        rep outsb
4:      hlt
        jmp     4b
goodbye: .ascii "Shutdown"

        /* Apart from the code, so that no write comes near it. */
        .balign 4096
harness_stack:
        .long   HARNESS_STACK, DATA
gdt_pointer:
        .word   GDT_LIMIT
        .long   ARENA
        .balign 4
idt_pointer:
        .word   IDT_LIMIT
        .long   ARENA + IDT_OFFSET
        .balign 4
template:
        .long   0
next:   .long   0
dumps:  .long   0
case:   .skip   R_BYTES

        /* A record of output. */
output:
o_bytes: .long  0
o_number: .long 0
o_vector: .long 0
o_eax:  .long   0
o_ecx:  .long   0
o_edx:  .long   0
o_ebx:  .long   0
o_esp:  .long   0
o_ebp:  .long   0
o_esi:  .long   0
o_edi:  .long   0
o_es:   .long   0
o_ss:   .long   0
o_ds:   .long   0
o_fs:   .long   0
o_gs:   .long   0
o_ldtr: .long   0
o_tr:   .long   0
o_eflags: .long 0
o_cr0:  .long   0
o_cr2:  .long   0
o_cr3:  .long   0
o_cr4:  .long   0
o_dr6:  .long   0
o_dr7:  .long   0
o_differences: .long 0
output_end:
        .skip   ARENA_DWORDS * 8 + 4096
shadow: .skip   ARENA_DWORDS * 4
