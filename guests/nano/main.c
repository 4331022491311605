/* Nanobenchmarks of what a monitor has to take care of, after Adams and Agesen's: takes NAME=COUNT words from the command
   line, executes COUNT operations of each between two lines on COM1, and turns the machine off. */
#include <stdbool.h>
#include <stddef.h>

#include "nano.h"

#define COM1 0x3F8
#define INFO_COMMAND_LINE 0x4
#define DEFAULT_COUNT 100
#define PAGE_PRESENT 0x1
#define PAGE_FLAGS 0x7 /* present, writable, user */
#define MAPPED_PAGES 2048
#define CR0_PG 0x80000000
#define MSR_SYSENTER_CS 0x174
#define VGA 0xB8000
/* Linear addresses without contents, of which the benchmarks change the page-table entries. */
#define CHANGED_PAGE 1536
#define PRIVATE_PAGE 1537 /* differs from process to process */
#define FREE_FRAMES 1600 /* physical pages that nothing else uses */
#define PROCESS_FRAMES 1616 /* physical pages for page directories */
#define PROCESSES 40
#define PROCESS_CALLS 8

#define NOINLINE __attribute__((noinline))

struct multiboot_info {
    uint32_t flags, mem_lower, mem_upper, boot_device, cmdline;
};

struct benchmark {
    const char *name;
    uint32_t (*run)(uint32_t count); /* the result shows that the operations took place */
};

struct __attribute__((packed)) pointer {
    uint16_t limit;
    uint32_t base;
};

uint32_t divide_errors, page_faults, system_calls;
uint32_t *missing_entry;

static uint32_t directories[2][1024] __attribute__((aligned(4096)));
static uint32_t tables[MAPPED_PAGES] __attribute__((aligned(4096)));
static uint32_t other_table[1024] __attribute__((aligned(4096)));
static uint64_t segments[8];
static uint64_t gates[256];
static uint32_t task_state[26];
static uint32_t other_stack[1024];
extern char interrupt_stack_top[];

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

static void put(char c)
{
    while (!(in8(COM1 + 5) & 0x20))
        ;
    out8(COM1, c);
}

static void put_text(const char *text)
{
    for (; *text; text++)
        put(*text);
}

static void put_number(uint32_t value, uint32_t base)
{
    char text[12], *next = text + sizeof text;
    *--next = 0;
    do {
        *--next = "0123456789abcdef"[value % base];
        value /= base;
    } while (value);
    put_text(next);
}

/* Descriptors, gates, pages. */

static uint64_t segment(uint32_t base, uint32_t limit_pages, uint32_t access)
{
    uint64_t low = (limit_pages & 0xFFFF) | (uint64_t)(base & 0xFFFFFF) << 16;
    return low | (uint64_t)access << 40 | (uint64_t)(limit_pages >> 16 | 0xC0) << 48 | (uint64_t)(base >> 24) << 56;
}

static void set_gate(int vector, const char *entry, uint32_t access)
{
    uint32_t offset = (uint32_t)entry;
    gates[vector] = (offset & 0xFFFF) | KERNEL_CODE << 16 | (uint64_t)((offset & 0xFFFF0000) | access << 8) << 32;
}

static void write_msr(uint32_t number, uint32_t value)
{
    asm volatile("wrmsr" : : "c"(number), "a"(value), "d"(0));
}

static void start_protection(void)
{
    segments[KERNEL_CODE >> 3] = segment(0, 0xFFFFF, 0x9B);
    segments[KERNEL_DATA >> 3] = segments[OTHER_DATA >> 3] = segment(0, 0xFFFFF, 0x93);
    segments[USER_CODE >> 3] = segment(0, 0xFFFFF, 0xFB);
    segments[USER_DATA >> 3] = segment(0, 0xFFFFF, 0xF3);
    segments[THREAD_DATA >> 3] = segment((uint32_t)other_stack, 0xFFFFF, 0x93);
    segments[TASK_STATE >> 3] = segment((uint32_t)task_state, 0, 0x89);
    task_state[1] = (uint32_t)interrupt_stack_top;
    task_state[2] = KERNEL_DATA;
    struct pointer gdt = {sizeof segments - 1, (uint32_t)segments}, idt = {sizeof gates - 1, (uint32_t)gates};
    for (int vector = 0; vector < 256; vector++)
        set_gate(vector, unexpected_entry, 0x8E);
    set_gate(0, divide_error_entry, 0x8E);
    set_gate(14, page_fault_entry, 0x8E);
    set_gate(0x80, system_call_entry, 0xEE);
    set_gate(0x81, leave_user_entry, 0xEE);
    asm volatile("lgdt %0\n\t"
                 "lidt %1\n\t"
                 "ljmp %2, $1f\n"
                 "1:\n\t"
                 "movl %3, %%ds\n\tmovl %3, %%es\n\tmovl %3, %%ss\n\tmovl %3, %%fs\n\tmovl %3, %%gs\n\t"
                 "ltr %w4"
                 :
                 : "m"(gdt), "m"(idt), "i"(KERNEL_CODE), "r"(KERNEL_DATA), "r"(TASK_STATE)
                 : "memory");
    write_msr(MSR_SYSENTER_CS, KERNEL_CODE);
    write_msr(MSR_SYSENTER_CS + 1, (uint32_t)interrupt_stack_top);
    write_msr(MSR_SYSENTER_CS + 2, (uint32_t)fast_call_entry);
    out8(0x21, 0xFF); /* no interrupts when STI is measured */
    out8(0xA1, 0xFF);
}

/* Two processes share all but one page table, the second. */
static void start_paging(void)
{
    for (uint32_t page = 0; page < MAPPED_PAGES; page++)
        tables[page] = page * 4096 | PAGE_FLAGS;
    for (uint32_t i = 0; i < 1024; i++)
        other_table[i] = tables[1024 + i];
    other_table[PRIVATE_PAGE - 1024] = FREE_FRAMES * 4096 | PAGE_FLAGS;
    for (uint32_t i = 0; i < 2; i++) {
        directories[i][0] = (uint32_t)tables | PAGE_FLAGS;
        directories[i][1] = (uint32_t)(i ? other_table : tables + 1024) | PAGE_FLAGS;
    }
    asm volatile("movl %0, %%cr3\n\t"
                 "movl %%cr0, %%eax\n\t"
                 "orl %1, %%eax\n\t"
                 "movl %%eax, %%cr0"
                 :
                 : "r"(directories[0]), "i"(CR0_PG)
                 : "eax", "memory");
}

static volatile uint32_t *at_page(uint32_t page)
{
    return (volatile uint32_t *)(page * 4096);
}

static inline void invalidate(volatile uint32_t *linear)
{
    asm volatile("invlpg %0" : : "m"(*linear) : "memory");
}

/* The benchmarks. LOOP makes one of an asm statement. */

#define LOOP(name, ...) \
    static uint32_t name(uint32_t count) \
    { \
        do { \
            __VA_ARGS__; \
        } while (--count); \
        return 0; \
    }

LOOP(empty, asm volatile(""))
LOOP(port_in, (void)in8(0x21))
LOOP(port_out, out8(0x80, 0))
LOOP(load_cr3, asm volatile("movl %0, %%cr3" : : "r"(directories[0]) : "memory"))
LOOP(read_cr0, uint32_t value; asm volatile("movl %%cr0, %0" : "=r"(value)))
LOOP(push_pop_flags, asm volatile("pushfl\n\tpopfl" : : : "memory", "cc"))
LOOP(clear_set_interrupts, asm volatile("cli\n\tsti" : : : "memory"))
LOOP(load_ds, asm volatile("movl %0, %%ds" : : "r"(OTHER_DATA) : "memory"))
LOOP(load_fs, asm volatile("movl %0, %%fs" : : "r"(THREAD_DATA) : "memory"))
LOOP(time_stamp, asm volatile("rdtsc" : : : "eax", "edx"))
LOOP(identify, uint32_t leaf = 1; asm volatile("cpuid" : "+a"(leaf) : : "ebx", "ecx", "edx"))
LOOP(vga_store, *(volatile uint16_t *)VGA = 0x0720)

static uint32_t in_user_empty(uint32_t count)
{
    run_in_user(user_empty, count);
    return 0;
}

static uint32_t by_interrupt(uint32_t count)
{
    system_calls = 0;
    run_in_user(user_system_calls, count);
    return system_calls;
}

static uint32_t by_sysenter(uint32_t count)
{
    system_calls = 0;
    run_in_user(user_fast_calls, count);
    return system_calls;
}

static uint32_t call_return(uint32_t count)
{
    loop_call_return(count);
    return 0;
}

static uint32_t call_sites(uint32_t count)
{
    loop_call_sites(count);
    return 0;
}

static uint32_t interrupt_return(uint32_t count)
{
    loop_interrupt_returns(count);
    return 0;
}

static uint32_t divide_error(uint32_t count)
{
    divide_errors = 0;
    loop_divide(count);
    return divide_errors;
}

/* Functions that differ, so that no linker makes one of them. */
#define TARGET(n) \
    NOINLINE static uint32_t target_##n(uint32_t value) { return value + 0x##n; }
#define ROW(macro, n) \
    macro(n##0) macro(n##1) macro(n##2) macro(n##3) macro(n##4) macro(n##5) macro(n##6) macro(n##7) \
    macro(n##8) macro(n##9) macro(n##A) macro(n##B) macro(n##C) macro(n##D) macro(n##E) macro(n##F)
#define ALL(macro) \
    ROW(macro, 0) ROW(macro, 1) ROW(macro, 2) ROW(macro, 3) ROW(macro, 4) ROW(macro, 5) ROW(macro, 6) ROW(macro, 7) \
    ROW(macro, 8) ROW(macro, 9) ROW(macro, A) ROW(macro, B) ROW(macro, C) ROW(macro, D) ROW(macro, E) ROW(macro, F)
ALL(TARGET)
#define NAMED(n) target_##n,
uint32_t (*const targets[256])(uint32_t) = {ALL(NAMED)};

static uint32_t one_target(uint32_t count)
{
    uint32_t (*volatile target)(uint32_t) = targets[7];
    uint32_t sum = 0;
    do
        sum = target(sum);
    while (--count);
    return sum;
}

/* The next target depends on a pseudo-random number, so that nothing predicts it. */
static uint32_t many_targets(uint32_t count)
{
    uint32_t sum = 0, random = 1;
    do {
        random = random * 1664525 + 1013904223;
        sum = targets[random >> 24](sum);
    } while (--count);
    return sum;
}

static uint32_t page_fault(uint32_t count)
{
    volatile uint32_t *linear = at_page(CHANGED_PAGE);
    page_faults = 0;
    missing_entry = &tables[CHANGED_PAGE];
    do {
        *(volatile uint32_t *)missing_entry &= ~(uint32_t)PAGE_PRESENT;
        invalidate(linear);
        (void)*linear;
    } while (--count);
    return page_faults;
}

/* An entry that nobody uses is written, in a table that is in use. */
static uint32_t change_entry(uint32_t count)
{
    volatile uint32_t *entry = &tables[CHANGED_PAGE];
    (void)*at_page(PRIVATE_PAGE);
    do
        *entry = (FREE_FRAMES + (count & 1)) * 4096 | PAGE_FLAGS;
    while (--count);
    *entry = CHANGED_PAGE * 4096 | PAGE_FLAGS;
    invalidate(at_page(CHANGED_PAGE));
    return 0;
}

/* The page is moved between two frames, and read; the sum is of what is in them, 3 and 5. */
static uint32_t change_and_use(uint32_t count)
{
    volatile uint32_t *entry = &tables[CHANGED_PAGE], *linear = at_page(CHANGED_PAGE);
    uint32_t sum = 0;
    *at_page(FREE_FRAMES) = 3;
    *at_page(FREE_FRAMES + 1) = 5;
    do {
        *entry = (FREE_FRAMES + (count & 1)) * 4096 | PAGE_FLAGS;
        invalidate(linear);
        sum += *linear;
    } while (--count);
    *entry = CHANGED_PAGE * 4096 | PAGE_FLAGS;
    invalidate(linear);
    return sum;
}

static uint32_t patched_code(uint32_t count)
{
    return loop_patched(count);
}

/* Two processes take turns; each adds to a number at the same linear address, in a page of its own. */
static uint32_t saved_esp[2];

static void other_process(void)
{
    for (;;) {
        ++*at_page(PRIVATE_PAGE);
        switch_process(&saved_esp[1], saved_esp[0], (uint32_t)directories[0]);
    }
}

static uint32_t process_switch(uint32_t count)
{
    uint32_t *stack = other_stack + 1024;
    *--stack = (uint32_t)other_process;
    saved_esp[1] = (uint32_t)(stack - 4);
    *at_page(PRIVATE_PAGE) = 0;
    *at_page(FREE_FRAMES) = 0;
    for (uint32_t left = count; left; left -= left > 1 ? 2 : 1) {
        ++*at_page(PRIVATE_PAGE);
        switch_process(&saved_esp[0], saved_esp[1], (uint32_t)directories[1]);
    }
    return *at_page(PRIVATE_PAGE) + *at_page(FREE_FRAMES);
}

/* The page directory of one of many processes, which have the kernel in common with the first. */
static volatile uint32_t *directory_of(uint32_t process)
{
    volatile uint32_t *directory = at_page(PROCESS_FRAMES + process);
    for (uint32_t i = 0; i < 2; i++)
        directory[i] = 0;
    for (uint32_t i = 0; i < 2; i++)
        directory[i] = directories[0][i];
    return directory;
}

static inline void enter_process(volatile uint32_t *directory)
{
    asm volatile("movl %0, %%cr3" : : "r"(directory) : "memory");
}

/* What a kernel does for a process, in code that was executed before. */
static uint32_t call_kernel(void)
{
    uint32_t sum = 0;
    for (uint32_t i = 0; i < PROCESS_CALLS; i++)
        sum = targets[i * 256 / PROCESS_CALLS](sum);
    return sum;
}

/* Many processes take turns. */
static uint32_t many_processes(uint32_t count)
{
    volatile uint32_t *all[PROCESSES];
    uint32_t sum = 0, next = 0;
    for (uint32_t i = 0; i < PROCESSES; i++)
        all[i] = directory_of(i);
    do {
        enter_process(all[next]);
        sum += call_kernel();
        next = next + 1 < PROCESSES ? next + 1 : 0;
    } while (--count);
    enter_process(directories[0]);
    return sum;
}

/* A process begins, and ends at once: its directory is made anew each time. */
static uint32_t new_process(uint32_t count)
{
    uint32_t sum = 0;
    do {
        enter_process(directory_of(count % PROCESSES));
        sum += call_kernel();
        enter_process(directories[0]);
    } while (--count);
    return sum;
}

static const struct benchmark benchmarks[] = {
    {"empty", empty},
    {"user_empty", in_user_empty},
    {"syscall_int", by_interrupt},
    {"syscall_sysenter", by_sysenter},
    {"in", port_in},
    {"out", port_out},
    {"mov_cr3", load_cr3},
    {"mov_from_cr0", read_cr0},
    {"call_ret", call_return},
    {"call_1_target", one_target},
    {"call_256_targets", many_targets},
    {"call_256_sites", call_sites},
    {"page_fault", page_fault},
    {"divide_error", divide_error},
    {"pte", change_entry},
    {"pte_invlpg", change_and_use},
    {"pushf_popf", push_pop_flags},
    {"cli_sti", clear_set_interrupts},
    {"mov_ds", load_ds},
    {"mov_fs", load_fs},
    {"rdtsc", time_stamp},
    {"cpuid", identify},
    {"iret", interrupt_return},
    {"patched_code", patched_code},
    {"process_switch", process_switch},
    {"process_switch_40", many_processes},
    {"new_process", new_process},
    {"vga_store", vga_store},
};
#define BENCHMARK_COUNT (sizeof benchmarks / sizeof benchmarks[0])

/* If `word` is `name`, followed by a space, `=` or the end, return what follows, else 0. */
static const char *after_name(const char *word, const char *name)
{
    while (*name) {
        if (*word++ != *name++)
            return 0;
    }
    return *word == 0 || *word == ' ' || *word == '=' ? word : 0;
}

/* Announce, run, report: NAME, the count, what it gave. */
static void run(const struct benchmark *benchmark, uint32_t count)
{
    put_text("start ");
    put_text(benchmark->name);
    put_text("\n");
    uint32_t result = benchmark->run(count);
    put_text(benchmark->name);
    put_text(" ");
    put_number(count, 10);
    put_text(" ");
    put_number(result, 16);
    put_text("\n");
}

static bool run_word(const char *word)
{
    for (size_t i = 0; i < BENCHMARK_COUNT; i++) {
        const char *rest = after_name(word, benchmarks[i].name);
        if (!rest)
            continue;
        uint32_t count = *rest == '=' ? 0 : DEFAULT_COUNT;
        if (*rest == '=') {
            for (rest++; *rest >= '0' && *rest <= '9'; rest++)
                count = count * 10 + *rest - '0';
        }
        if (count)
            run(&benchmarks[i], count);
        return true;
    }
    return false;
}

/* Entered from entry.S with the loader's information. Without a NAME on the command line, each runs. */
void nano_main(const struct multiboot_info *info)
{
    const char *word = info->flags & INFO_COMMAND_LINE ? (const char *)info->cmdline : "";
    bool any = false;
    out8(COM1 + 3, 0x03);
    start_protection();
    start_paging();
    while (*word) {
        any |= run_word(word);
        while (*word && *word != ' ')
            word++;
        while (*word == ' ')
            word++;
    }
    for (size_t i = 0; !any && i < BENCHMARK_COUNT; i++)
        run(&benchmarks[i], DEFAULT_COUNT);
    put_text("done\n");
    asm volatile("outw %0, %1" : : "a"((uint16_t)0x2000), "d"((uint16_t)0x604)); /* ACPI state S5, as in QEMU */
}
