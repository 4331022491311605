# A multiboot kernel that writes its entry registers and all memory below 640 KiB and from 1 MiB to 1.25 MiB to the
# debug console (port E9h) and ends the run through isa-debug-exit. FLAGS and KLUDGE are set on the command line.
        .text
        .globl _start
        .balign 4
header: .long 0x1BADB002, FLAGS, -(0x1BADB002 + FLAGS)
#ifdef KLUDGE
        .long header, header, edata, end, _start
#endif
_start:
        movl %eax, registers
        movl %ebx, registers+4
        movl $stack_end, %esp
        pushfl
        popl registers+8
        movw %es, registers+12
        movw %cs, registers+14
        movw %ss, registers+16
        movw %ds, registers+18
        movw %fs, registers+20
        movw %gs, registers+22
        sgdt registers+24
        sidt registers+30
        movl %cr0, %eax
        movl %eax, registers+36
        movl %cr4, %eax
        movl %eax, registers+40
        cld
        movw $0xE9, %dx
        movl $registers, %esi
        movl $44, %ecx
        rep outsb
        movl registers+26, %esi         # the first three descriptors of the GDT
        movl $24, %ecx
        rep outsb
        xorl %esi, %esi
        movl $0xA0000, %ecx
        rep outsb
        movl $0x100000, %esi
        movl $0x40000, %ecx
        rep outsb
        movw $0xF4, %dx
        xorl %eax, %eax
        outl %eax, %dx
1:      hlt
        jmp 1b
        .data
        .globl marker
marker: .ascii "data of the kernel"
edata:
        .bss
registers: .skip 64
        .skip 256
stack_end:
        .skip 9000
end:
