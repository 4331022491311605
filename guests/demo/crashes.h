/* Ways to go wrong, the same ones in ring 3 (user/crash.c) and in ring 0 (programs.c). */
#ifndef CRASHES_H
#define CRASHES_H

static inline void page_fault_now(void)
{
    *(volatile int *)0x10 = 1;
}

static inline void divide_by_zero_now(void)
{
    asm volatile("divl %%ecx" : : "a"(1), "d"(0), "c"(0) : "cc");
}

static inline void invalid_opcode_now(void)
{
    asm volatile("ud2");
}

/* A segment register can only be loaded with a selector that names a segment. */
static inline void general_protection_now(void)
{
    asm volatile("movw %w0, %%gs" : : "r"(0x1234));
}

static inline void breakpoint_now(void)
{
    asm volatile("int3");
}

#endif
