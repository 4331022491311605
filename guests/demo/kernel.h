/* What the kernel's files know of each other. Each group is one file; the contracts stand above the functions. */
#ifndef KERNEL_H
#define KERNEL_H

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "layout.h"

/* What entry.S leaves on the kernel stack: the task's registers, lowest address first. */
struct trap_frame {
    uint32_t edi, esi, ebp, esp_of_pusha, ebx, edx, ecx, eax;
    uint32_t gs, fs, es, ds;
    uint32_t vector;
    uint32_t error; /* 0 where the CPU pushes none */
    uint32_t eip, cs, eflags;
    uint32_t esp, ss; /* pushed by the CPU only if it came from ring 3 */
};

enum task_state { TASK_FREE, TASK_READY, TASK_ASLEEP, TASK_WAITING, TASK_ENDED };

struct task {
    uint32_t pid; /* 1 and up, never used again */
    const char *name;
    enum task_state state;
    uint32_t esp;                /* of the kernel stack, while the task does not run */
    uint32_t stack;              /* linear address of the one page of kernel stack */
    uint32_t directory;          /* physical address of the page directory */
    uint32_t wake_tick;          /* TASK_ASLEEP: when to get up */
    const volatile void *waited; /* TASK_WAITING: what for */
    uint32_t used_ticks;         /* timer ticks that found it running */
    uint32_t system_calls;
    int status; /* TASK_ENDED: from exit, or STATUS_KILLED and the exception's vector */
};

/* A user program linked into this image, see kernel.ld. */
struct program {
    const char *name;
    void (*entry)(void);
    const char *text, *data, *end; /* linear addresses in the user half; text is shared, data copied */
    const char *physical;          /* where the loader put the text; the data follows it */
};

/* boot.S, kernel.ld: symbols whose addresses are the value */
extern uint32_t kernel_directory[1024];
extern uint32_t direct_tables[];
extern char text_begin[], text_end[], kernel_end[], boot_begin[];

/* entry.S */
extern const uint32_t vector_table[];
void switch_context(uint32_t *save_esp, uint32_t esp);
void trap_return(void);
void thread_begin(void);
void sysenter_entry(void);
bool try_load(uint32_t linear, uint8_t *value);
bool try_store(uint32_t linear, uint8_t value);
void triple_fault(void) __attribute__((noreturn));
void overflow_stack(void);

/* main.c */
extern bool quiet;
extern char command_line[256];
extern const char *boot_commands;
extern uint32_t ram_bytes;
struct memory_map_entry {
    uint64_t base, length;
    uint32_t type; /* 1: RAM */
};
extern struct memory_map_entry memory_map[16];
extern uint32_t memory_map_entries;
void power_off(void) __attribute__((noreturn));
void reboot(void) __attribute__((noreturn));

/* segments.c */
void segments_init(void);
void segments_set_kernel_stack(uint32_t esp);
extern bool has_sysenter;

/* traps.c */
void traps_init(void);
void trap(struct trap_frame *frame);
void panic(const char *format, ...) __attribute__((noreturn, format(printf, 1, 2)));

/* interrupts.c */
extern volatile uint32_t ticks;
extern uint32_t hertz;
void interrupts_init(void);
void interrupt(uint32_t line);

/* memory.c */
void memory_init(uint32_t ram_bytes);
void memory_reserve(uint32_t first, uint32_t end);
uint32_t page_allocate(void);
void page_free(uint32_t physical);
uint32_t pages_free(void);
uint32_t directory_create(void);
void directory_destroy(uint32_t directory);
void page_map(uint32_t directory, uint32_t linear, uint32_t physical, uint32_t flags);
static inline void *direct(uint32_t physical) { return (void *)(physical + KERNEL_BASE); }

/* tasks.c */
#define TASKS 8
#define STATUS_KILLED 128
extern struct task tasks[TASKS];
extern struct task *current;
void tasks_init(void);
struct task *task_create_user(const struct program *program, void (*entry)(void));
struct task *task_create_thread(const char *name, void (*entry)(void));
void task_exit(int status) __attribute__((noreturn));
int task_wait(struct task *task);
void task_sleep(uint32_t duration_ticks);
void task_block(const volatile void *what);
void task_wake(const volatile void *what);
void tasks_tick(void);
void tasks_end_idling(void);
bool task_is_user(const struct task *task);
void yield(void);
void schedule(void);

/* syscall.c */
void syscall_dispatch(struct trap_frame *frame);

/* serial.c */
void serial_init(void);
void serial_listen(void);
void serial_put(char c);
char serial_get(void);
void serial_interrupt(void);

/* screen.c */
#define SCREEN_PHYSICAL 0xB8000
void screen_init(void);
void screen_put(char c);

/* print.c */
void print(const char *format, ...) __attribute__((format(printf, 1, 2)));
void vprint(const char *format, va_list arguments);
void put_string(const char *text, uint32_t length_bytes);
void *memcpy(void *to, const void *from, size_t length_bytes);
void *memset(void *to, int byte, size_t length_bytes);
void *memmove(void *to, const void *from, size_t length_bytes);
int memcmp(const void *a, const void *b, size_t length_bytes);
int strcmp(const char *a, const char *b);

/* shell.c */
void shell(void);

/* programs.c */
extern const bool sysenter_available; /* in the library */
void user_start(void);
extern const struct program primes_program, clock_program, crash_program;
struct crash {
    const char *name, *help;
    void (*in_user)(void);   /* entry in crash_program */
    void (*in_kernel)(void); /* the same in ring 0 */
};
extern const struct crash crashes[];
extern const uint32_t crash_count;

#endif
