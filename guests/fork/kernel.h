/* What the parts of the kernel know of each other. */
#ifndef KERNEL_H
#define KERNEL_H

#include <stdbool.h>
#include <stdint.h>

#include "layout.h"

#define PAGE_PRESENT 0x001
#define PAGE_WRITE 0x002
#define PAGE_USER 0x004
#define PAGE_SHARED 0x200 /* ours: a writable page that is to be copied before it is written to */

/* The stack when trap() is called, from its top on. */
struct frame {
    uint32_t edi, esi, ebp, unused_esp, ebx, edx, ecx, eax;
    uint32_t es, ds, vector, error;
    uint32_t eip, cs, eflags, esp, ss;
};

/* What has happened since the start; for the kernel's own checks, and to look at. */
struct counts {
    uint32_t forks, exits, waits, system_calls, page_faults, copies, reuses, zeroed, switches, ticks;
};
extern struct counts counts;

/* entry.S */
extern const uint32_t vector_table[];
void switch_context(uint32_t *saved_esp, uint32_t new_esp);
void trap_return(void);
void sysenter_entry(void);

/* main.c */
void fail(const char *what, uint32_t value) __attribute__((noreturn));

/* memory.c */
extern uint32_t kernel_directory[];
void memory_init(uint32_t ram_bytes);
uint32_t frames_free(void);
uint32_t frame_allocate(void);
void frame_release(uint32_t physical);
uint32_t space_create(void);
uint32_t space_load_program(uint32_t directory, uint32_t entry_arguments[3]);
uint32_t space_copy(uint32_t directory);
void space_destroy(uint32_t directory);
void space_map(uint32_t linear);
void space_unmap(uint32_t linear);
void page_fault(uint32_t linear, const struct frame *frame);

/* processes.c */
void process_run(uint32_t workload, uint32_t count);
uint32_t process_fork(const struct frame *frame);
void process_exit(uint32_t status);
uint32_t process_wait(void);
uint32_t process_pid(void);
uint32_t process_directory(void);
void yield(void);

/* traps.c */
void traps_init(uint32_t hertz);
void set_kernel_stack(uint32_t esp);

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

static inline void load_cr3(uint32_t physical)
{
    asm volatile("movl %0, %%cr3" : : "r"(physical) : "memory");
}

static inline void fill_words(uint32_t at, uint32_t value, uint32_t words)
{
    asm volatile("rep stosl" : "+D"(at), "+c"(words) : "a"(value) : "memory");
}

static inline void copy_words(uint32_t to, uint32_t from, uint32_t words)
{
    asm volatile("rep movsl" : "+D"(to), "+S"(from), "+c"(words) : : "memory");
}

#endif
