/* The instructions that C has no word for. */
#ifndef X86_H
#define X86_H

#include <stdbool.h>
#include <stdint.h>

#include "layout.h"

static inline uint8_t in8(uint16_t port)
{
    uint8_t value;
    asm volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static inline void out8(uint16_t port, uint8_t value)
{
    asm volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static inline void out16(uint16_t port, uint16_t value)
{
    asm volatile("outw %0, %1" : : "a"(value), "Nd"(port));
}

static inline uint32_t read_cr0(void)
{
    uint32_t value;
    asm volatile("mov %%cr0, %0" : "=r"(value));
    return value;
}

static inline void write_cr0(uint32_t value)
{
    asm volatile("mov %0, %%cr0" : : "r"(value) : "memory");
}

/* The linear address of the last page fault. */
static inline uint32_t read_cr2(void)
{
    uint32_t value;
    asm volatile("mov %%cr2, %0" : "=r"(value));
    return value;
}

static inline uint32_t read_cr3(void)
{
    uint32_t value;
    asm volatile("mov %%cr3, %0" : "=r"(value));
    return value;
}

/* Switch to the address space whose page directory is at `physical`; forgets cached translations too. */
static inline void write_cr3(uint32_t physical)
{
    asm volatile("mov %0, %%cr3" : : "r"(physical) : "memory");
}

static inline uint32_t read_cr4(void)
{
    uint32_t value;
    asm volatile("mov %%cr4, %0" : "=r"(value));
    return value;
}

static inline uint32_t read_eflags(void)
{
    uint32_t value;
    asm volatile("pushfl; popl %0" : "=r"(value));
    return value;
}

static inline void write_eflags(uint32_t value)
{
    asm volatile("pushl %0; popfl" : : "r"(value) : "memory", "cc");
}

/* Turn interrupts off and return the flags as they were, for interrupts_restore. */
static inline uint32_t interrupts_off(void)
{
    uint32_t flags = read_eflags();
    asm volatile("cli" : : : "memory");
    return flags;
}

static inline void interrupts_restore(uint32_t flags)
{
    if (flags & EFLAGS_IF)
        asm volatile("sti" : : : "memory");
}

/* Sleep until the next interrupt. STI acts after the instruction that follows it, so none can slip in between. */
static inline void wait_for_interrupt(void)
{
    asm volatile("sti; hlt" : : : "memory");
}

static inline void cpuid(uint32_t leaf, uint32_t *eax, uint32_t *ebx, uint32_t *ecx, uint32_t *edx)
{
    asm volatile("cpuid" : "=a"(*eax), "=b"(*ebx), "=c"(*ecx), "=d"(*edx) : "a"(leaf), "c"(0));
}

static inline void write_msr(uint32_t msr, uint32_t value)
{
    asm volatile("wrmsr" : : "c"(msr), "a"(value), "d"(0));
}

#endif
