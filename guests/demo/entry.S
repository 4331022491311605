/* Every way into and out of the kernel: interrupt vectors, SYSENTER, the switch between two tasks, and loads and
   stores that survive a page fault. The .cfi directives describe each step to a debugger, which can then show the
   stack from a kernel function through the interrupt to the code of ring 3. */
#include "layout.h"

        .cfi_sections .debug_frame
        .text

#define FRAME_VECTOR 48 /* of struct trap_frame */

/* Numbers of registers, rules and operators in DWARF's call frame information. */
#define CFI_ESP 4
#define CFI_EIP 8
#define CFI_EFLAGS 9
#define CFI_ES 40
#define CFI_CS 41
#define CFI_SS 42
#define CFI_DS 43
#define CFI_FS 44
#define CFI_GS 45
#define CFA_def_cfa_expression 0x0f
#define CFA_expression 0x10
#define CFA_val_expression 0x16
#define OP_deref 0x06
#define OP_const1u 0x08
#define OP_dup 0x12
#define OP_and 0x1a
#define OP_minus 0x1c
#define OP_plus 0x22
#define OP_bra 0x28
#define OP_eq 0x29
#define OP_skip 0x2f
#define OP_lit(n) (0x30 + (n))
#define OP_breg_esp 0x74
#define OP_bregx 0x92
#define SLEB(n) ((n) & 0x7f) + 0x80, (n) >> 7 /* 0 to 8191, in two bytes */

/* Describe two kinds of place. Both have EIP, CS and EFLAGS of the interrupted code on the stack, and if that ran in
   ring 3 (CS says so) its ESP and SS after them; if it ran in ring 0, its ESP was the address above EFLAGS.

   The first kind, AT_INTERRUPT, is where no register has changed yet, or none differs any more. It looks like a function
   that the interrupted code called, with the CFA on the stack of that code; `offset` is that of EIP from ESP. */
        .macro  AT_INTERRUPT offset
        /* CFA = (*(esp + offset + 4) & 3) == 0 ? esp + offset + 12 : *(esp + offset + 12); the caller's ESP is the CFA */
        .cfi_escape CFA_def_cfa_expression, 15, OP_breg_esp, SLEB(\offset + 12), \
                OP_breg_esp, SLEB(\offset + 4), OP_deref, OP_lit(3), OP_and, OP_lit(0), OP_eq, OP_bra, 1, 0, \
                OP_deref
        .cfi_escape CFA_expression, CFI_EIP, 3, OP_breg_esp, SLEB(\offset)
        .cfi_escape CFA_expression, CFI_CS, 3, OP_breg_esp, SLEB(\offset + 4)
        .cfi_escape CFA_expression, CFI_EFLAGS, 3, OP_breg_esp, SLEB(\offset + 8)
        /* ss = (*(esp + offset + 4) & 3) == 0 ? ss : *(esp + offset + 16) */
        .cfi_escape CFA_val_expression, CFI_SS, 21, \
                OP_breg_esp, SLEB(\offset + 4), OP_deref, OP_lit(3), OP_and, OP_lit(0), OP_eq, OP_bra, 7, 0, \
                OP_breg_esp, SLEB(\offset + 16), OP_deref, OP_skip, 3, 0, \
                OP_bregx, CFI_SS, 0
        .endm

/* The second kind is where the registers are in a struct trap_frame at ESP + `extra` and the kernel's C code is called.
   It is marked as what DWARF calls a signal frame: one that may be on another stack than its caller. The CFA is the
   address above EFLAGS. */
        .macro  BEGIN_SAVED extra
        .cfi_startproc simple
        .cfi_signal_frame
        .cfi_def_cfa esp, 68 + \extra
        .cfi_offset CFI_EFLAGS, -4
        .cfi_offset CFI_CS, -8
        .cfi_offset CFI_EIP, -12
        .cfi_offset CFI_DS, -24
        .cfi_offset CFI_ES, -28
        .cfi_offset CFI_FS, -32
        .cfi_offset CFI_GS, -36
        .cfi_offset eax, -40
        .cfi_offset ecx, -44
        .cfi_offset edx, -48
        .cfi_offset ebx, -52
        .cfi_offset ebp, -60
        .cfi_offset esi, -64
        .cfi_offset edi, -68
        /* esp = (*(CFA - 8) & 3) == 0 ? CFA : *CFA */
        .cfi_escape CFA_val_expression, CFI_ESP, 12, \
                OP_dup, OP_lit(8), OP_minus, OP_deref, OP_lit(3), OP_and, OP_lit(0), OP_eq, OP_bra, 1, 0, \
                OP_deref
        /* ss = (*(CFA - 8) & 3) == 0 ? ss : *(CFA + 4) */
        .cfi_escape CFA_val_expression, CFI_SS, 20, \
                OP_dup, OP_lit(8), OP_minus, OP_deref, OP_lit(3), OP_and, OP_lit(0), OP_eq, OP_bra, 6, 0, \
                OP_lit(4), OP_plus, OP_deref, OP_skip, 3, 0, \
                OP_bregx, CFI_SS, 0
        .endm

/* vector_N: the entry of interrupt N. Adds an error code if the CPU pushes none (`error` is 0), then the vector. */
        .macro  VECTOR number, error=0
        .type   vector_\number, @function
vector_\number:
        .cfi_startproc simple
        .if     \error
        AT_INTERRUPT 4
        .else
        AT_INTERRUPT 0
        pushl   $0
        AT_INTERRUPT 4
        .endif
        pushl   $\number
        AT_INTERRUPT 8
        jmp     trap_entry
        .cfi_endproc
        .size   vector_\number, . - vector_\number
        .pushsection .rodata
        .long   vector_\number
        .popsection
        .endm

/* The entries by vector, for traps_init: exceptions 0 to 31, interrupt lines 32 to 47, system calls. */
        .section .rodata
        .balign 4
        .globl  vector_table
        .type   vector_table, @object
vector_table:
        .text
        .irp    number, 0, 1, 2, 3, 4, 5, 6, 7
        VECTOR  \number
        .endr
        VECTOR  8, error=1
        VECTOR  9
        .irp    number, 10, 11, 12, 13, 14
        VECTOR  \number, error=1
        .endr
        VECTOR  15
        VECTOR  16
        VECTOR  17, error=1
        .irp    number, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31
        VECTOR  \number
        .endr
        .irp    number, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47
        VECTOR  \number
        .endr

/* System calls by `int $0x80`: like the VECTORs, but written out, so that a debugger shows each line. */
        .type   vector_128, @function
vector_128:
        .cfi_startproc simple
        AT_INTERRUPT 0
        pushl   $0
        AT_INTERRUPT 4
        pushl   $SYSTEM_CALL_VECTOR
        AT_INTERRUPT 8
        jmp     trap_entry
        .cfi_endproc
        .size   vector_128, . - vector_128

        .section .rodata
        .long   vector_128
        .size   vector_table, . - vector_table
        .text

/* Every entry goes on here, with vector and error code pushed: complete the trap frame, call trap(frame), and resume
   what was interrupted. */
        .type   trap_entry, @function
trap_entry:
        .cfi_startproc simple
        AT_INTERRUPT 8
        pushl   %ds
        AT_INTERRUPT 12
        pushl   %es
        AT_INTERRUPT 16
        pushl   %fs
        AT_INTERRUPT 20
        pushl   %gs
        AT_INTERRUPT 24
        pushal
        AT_INTERRUPT 56
        cld
        .cfi_endproc
        BEGIN_SAVED 0
        movl    $KERNEL_DATA, %eax
        movl    %eax, %ds
        movl    %eax, %es
        pushl   %esp
        .cfi_adjust_cfa_offset 4
        call    trap
        addl    $4, %esp
        .cfi_adjust_cfa_offset -4
/* New tasks begin here, with ESP at a trap frame made by task_create_user. */
        .globl  trap_return
trap_return:
        cmpl    $SYSENTER_VECTOR, FRAME_VECTOR(%esp)
        je      sysenter_return
        popal
        .cfi_endproc
        .cfi_startproc simple
        AT_INTERRUPT 24
        popl    %gs
        AT_INTERRUPT 20
        popl    %fs
        AT_INTERRUPT 16
        popl    %es
        AT_INTERRUPT 12
        popl    %ds
        AT_INTERRUPT 8
        addl    $8, %esp
        AT_INTERRUPT 0
        iretl
        .cfi_endproc
        .size   trap_entry, . - trap_entry

/* SYSENTER comes here with interrupts off and ESP at the ring 0 stack pointer in the task state segment; by our
   convention EDX holds the caller's EIP and ECX its ESP. Builds the frame that `int $0x80` would have built. */
        .globl  sysenter_entry
        .type   sysenter_entry, @function
sysenter_entry:
        .cfi_startproc simple
        .cfi_def_cfa ecx, 0
        .cfi_register CFI_EIP, edx
        .cfi_escape CFA_val_expression, CFI_CS, 2, OP_const1u, USER_CODE
        .cfi_escape CFA_val_expression, CFI_SS, 2, OP_const1u, USER_DATA
        movl    (%esp), %esp
        pushl   $USER_DATA
        pushl   %ecx
        pushfl
        orl     $EFLAGS_IF, (%esp)
        pushl   $USER_CODE
        pushl   %edx
        AT_INTERRUPT 0
        pushl   $0
        AT_INTERRUPT 4
        pushl   $SYSENTER_VECTOR
        AT_INTERRUPT 8
        jmp     trap_entry
        .cfi_endproc
        .size   sysenter_entry, . - sysenter_entry

/* Back to who used SYSENTER: SYSEXIT takes EIP from EDX and ESP from ECX. STI acts one instruction late, in ring 3. */
        .type   sysenter_return, @function
sysenter_return:
        BEGIN_SAVED 0
        popal
        .cfi_endproc
        .cfi_startproc simple
        AT_INTERRUPT 24
        popl    %gs
        AT_INTERRUPT 20
        popl    %fs
        AT_INTERRUPT 16
        popl    %es
        AT_INTERRUPT 12
        popl    %ds
        AT_INTERRUPT 8
        addl    $8, %esp
        AT_INTERRUPT 0
        movl    (%esp), %edx
        movl    12(%esp), %ecx
        sti
        sysexit
        .cfi_endproc
        .size   sysenter_return, . - sysenter_return

/* void switch_context(uint32_t *save_esp, uint32_t esp): leave this kernel stack for the one at `esp`, where another
   task did the same before; store where this one was left at `save_esp`. Interrupts must be off. */
        .globl  switch_context
        .type   switch_context, @function
switch_context:
        .cfi_startproc
        movl    4(%esp), %eax
        movl    8(%esp), %edx
        pushl   %ebp
        .cfi_adjust_cfa_offset 4
        .cfi_rel_offset ebp, 0
        pushl   %ebx
        .cfi_adjust_cfa_offset 4
        .cfi_rel_offset ebx, 0
        pushl   %esi
        .cfi_adjust_cfa_offset 4
        .cfi_rel_offset esi, 0
        pushl   %edi
        .cfi_adjust_cfa_offset 4
        .cfi_rel_offset edi, 0
        movl    %esp, (%eax)
        movl    %edx, %esp
        popl    %edi
        .cfi_adjust_cfa_offset -4
        .cfi_restore edi
        popl    %esi
        .cfi_adjust_cfa_offset -4
        .cfi_restore esi
        popl    %ebx
        .cfi_adjust_cfa_offset -4
        .cfi_restore ebx
        popl    %ebp
        .cfi_adjust_cfa_offset -4
        .cfi_restore ebp
        ret
        .cfi_endproc
        .size   switch_context, . - switch_context

/* Where a new kernel thread begins: EBX is its function. */
        .globl  thread_begin
        .type   thread_begin, @function
thread_begin:
        .cfi_startproc
        .cfi_undefined eip
        sti
        call    *%ebx
        pushl   $0
        .cfi_adjust_cfa_offset 4
        call    task_exit
        .cfi_endproc
        .size   thread_begin, . - thread_begin

/* bool try_load(uint32_t linear, uint8_t *value): read a byte that may not be there; false if that faults. The pair
   of addresses in .fixups tells page_fault where to go on. */
        .globl  try_load
        .type   try_load, @function
try_load:
        .cfi_startproc
        movl    4(%esp), %edx
try_load_access:
        movb    (%edx), %al
        movl    8(%esp), %edx
        movb    %al, (%edx)
        movl    $1, %eax
        ret
try_failed:
        xorl    %eax, %eax
        ret
        .cfi_endproc
        .size   try_load, . - try_load

/* bool try_store(uint32_t linear, uint8_t value): write a byte, false if that faults. */
        .globl  try_store
        .type   try_store, @function
try_store:
        .cfi_startproc
        movl    4(%esp), %edx
        movb    8(%esp), %al
try_store_access:
        movb    %al, (%edx)
        movl    $1, %eax
        ret
        .cfi_endproc
        .size   try_store, . - try_store

        .section .fixups, "a"
        .long   try_load_access, try_failed
        .long   try_store_access, try_failed
        .text

/* void triple_fault(void): reset the machine. With no IDT the breakpoint cannot be delivered, nor the general
   protection fault that follows from it, nor the double fault that follows from that. */
        .globl  triple_fault
        .type   triple_fault, @function
triple_fault:
        .cfi_startproc
        lidt    null_idt
        int3
1:      hlt
        jmp     1b
        .cfi_endproc
        .size   triple_fault, . - triple_fault

/* void overflow_stack(void): push with ESP where nothing is mapped. The page fault cannot be delivered on that stack
   either, which makes it a double fault; it arrives by a task gate, on a stack of its own. */
        .globl  overflow_stack
        .type   overflow_stack, @function
overflow_stack:
        .cfi_startproc
        movl    $PAGE_BYTES, %esp
        pushl   $0
        ret
        .cfi_endproc
        .size   overflow_stack, . - overflow_stack

        .section .rodata
        .balign 4
        .type   null_idt, @object
null_idt:
        .short  0
        .long   0
        .size   null_idt, . - null_idt
        .section .note.GNU-stack, "", @progbits
