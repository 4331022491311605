/* The kernels as a multiboot guest: takes NAME=REPEATS words from the command line, prints a line for each on COM1, and
   turns the machine off. */
#include <stdbool.h>

#include "kernels.h"

#define COM1 0x3F8
#define INFO_COMMAND_LINE 0x4
#define PAGE_FLAGS 0x3 /* present, writable */
#define MAPPED_PAGES 2048
#define CR0_PG 0x80000000
#define CR4_OSFXSR 0x200
#define CPUID_FPU_SSE2 0x07000001 /* FPU, FXSR, SSE, SSE2 */

struct multiboot_info {
    uint32_t flags, mem_lower, mem_upper, boot_device, cmdline;
};

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
    for (; *text; text++) {
        if (*text == '\n')
            put('\r');
        put(*text);
    }
}

/* Print `value` to `base`, with zeros in front up to `digits`. */
static void put_number(uint32_t value, uint32_t base, int digits)
{
    char text[11], *next = text + sizeof text;
    *--next = 0;
    while (value || digits > 0) {
        *--next = "0123456789abcdef"[value % base];
        value /= base;
        digits--;
    }
    put_text(next);
}

/* If `word` is `name`, followed by a space, `=` or the end, return what follows, else 0. */
static const char *after_name(const char *word, const char *name)
{
    while (*name) {
        if (*word++ != *name++)
            return 0;
    }
    return *word == 0 || *word == ' ' || *word == '=' ? word : 0;
}

/* Map the first 8 MiB to themselves and turn paging on. */
static void start_paging(void)
{
    static uint32_t directory[1024] __attribute__((aligned(4096)));
    static uint32_t tables[MAPPED_PAGES] __attribute__((aligned(4096)));
    for (uint32_t page = 0; page < MAPPED_PAGES; page++)
        tables[page] = page * 4096 | PAGE_FLAGS;
    for (uint32_t i = 0; i < MAPPED_PAGES / 1024; i++)
        directory[i] = (uint32_t)(tables + i * 1024) | PAGE_FLAGS;
    asm volatile("movl %0, %%cr3\n\t"
                 "movl %%cr0, %%eax\n\t"
                 "orl %1, %%eax\n\t"
                 "movl %%eax, %%cr0"
                 :
                 : "r"(directory), "i"(CR0_PG)
                 : "eax", "memory");
}

/* Let x87 and SSE2 instructions execute; false if this CPU has not both. */
static bool start_fpu(void)
{
    uint32_t eax = 1, features;
    asm volatile("cpuid" : "+a"(eax), "=d"(features) : : "ebx", "ecx");
    if ((features & CPUID_FPU_SSE2) != CPUID_FPU_SSE2)
        return false;
    asm volatile("movl %%cr4, %%eax\n\t"
                 "orl %0, %%eax\n\t"
                 "movl %%eax, %%cr4\n\t"
                 "fninit"
                 :
                 : "i"(CR4_OSFXSR)
                 : "eax");
    return true;
}

/* Announce, run, report: NAME, the repeats, the checksum. */
static void run(const struct kernel *kernel, uint32_t repeats)
{
    if (kernel->floating && !start_fpu()) {
        put_text("no FPU for ");
        put_text(kernel->name);
        put_text("\n");
        return;
    }
    put_text("start ");
    put_text(kernel->name);
    put_text("\n");
    uint32_t checksum = run_kernel(kernel, repeats);
    put_text(kernel->name);
    put_text(" ");
    put_number(repeats, 10, 1);
    put_text(" ");
    put_number(checksum, 16, 8);
    put_text("\n");
}

/* Run what a word of the command line says: `paging`, or NAME or NAME=REPEATS. True if it was a kernel. */
static bool run_word(const char *word)
{
    if (after_name(word, "paging"))
        start_paging();
    for (size_t i = 0; i < kernel_count; i++) {
        const char *rest = after_name(word, kernels[i].name);
        if (!rest)
            continue;
        uint32_t repeats = *rest == '=' ? 0 : 1;
        if (*rest == '=') {
            for (rest++; *rest >= '0' && *rest <= '9'; rest++)
                repeats = repeats * 10 + *rest - '0';
        }
        run(&kernels[i], repeats);
        return true;
    }
    return false;
}

/* Entered from start.S with the loader's information. Without a kernel on the command line, each runs once. */
void guest_main(const struct multiboot_info *info)
{
    const char *word = info->flags & INFO_COMMAND_LINE ? (const char *)info->cmdline : "";
    bool any = false;
    out8(COM1 + 3, 0x03);
    while (*word) {
        any |= run_word(word);
        while (*word && *word != ' ')
            word++;
        while (*word == ' ')
            word++;
    }
    for (size_t i = 0; !any && i < kernel_count; i++)
        run(&kernels[i], 1);
    put_text("done\n");
    asm volatile("outw %0, %1" : : "a"((uint16_t)0x2000), "d"((uint16_t)0x604)); /* ACPI state S5, as in QEMU */
}
