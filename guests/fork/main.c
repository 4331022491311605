/* A kernel with processes that fork, for measuring what that costs: takes NAME=COUNT words from the command line, runs each
   workload in ring 3 between two lines on COM1, and turns the machine off. */
#include <stddef.h>

#include "kernel.h"

#define COM1 0x3F8
#define INFO_MEMORY 0x1
#define INFO_COMMAND_LINE 0x4
#define DEFAULT_COUNT 10
#define DEFAULT_HERTZ 100
#define WORDS_BYTES 1024
#define LEAST_HERTZ 19 /* what 16 bits of the timer can count */

struct multiboot_info {
    uint32_t flags, mem_lower, mem_upper, boot_device, cmdline;
};

/* In the order of user.c. */
static const char *const workloads[] = {"forkwait", "compute", "syscalls", "ptchurn", "io", "mix"};
#define WORKLOADS (sizeof workloads / sizeof workloads[0])

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

/* Say what went wrong, and leave with status 1. */
void fail(const char *what, uint32_t value)
{
    put_text("failed: ");
    put_text(what);
    put_text(" ");
    put_number(value, 16);
    put_text("\n");
    for (;;) {
        out8(0xF4, 1);
        asm volatile("cli\n\thlt");
    }
}

/* Announce, run, report: NAME, the count, the result. Afterwards nothing may be left over. */
static void run(uint32_t workload, uint32_t count)
{
    put_text("start ");
    put_text(workloads[workload]);
    put_text("\n");
    uint32_t before = frames_free();
    process_run(workload, count);
    uint32_t result = process_wait();
    if (frames_free() != before)
        fail("pages are lost", before - frames_free());
    if (counts.exits != counts.waits)
        fail("ended and not waited for", counts.exits - counts.waits);
    put_text(workloads[workload]);
    put_text(" ");
    put_number(count, 10);
    put_text(" ");
    put_number(result, 16);
    put_text("\n");
}

static void put_count(const char *name, uint32_t value)
{
    put_text(" ");
    put_text(name);
    put_text("=");
    put_number(value, 10);
}

/* What has happened so far. Which of two processes copies a page depends on the timer, how often one is copied does not. */
static void put_counts(void)
{
    put_text("counts");
    put_count("forks", counts.forks);
    put_count("system_calls", counts.system_calls);
    put_count("page_faults", counts.page_faults);
    put_count("copies", counts.copies);
    put_count("reuses", counts.reuses);
    put_count("zeroed", counts.zeroed);
    put_count("switches", counts.switches);
    put_count("ticks", counts.ticks);
    put_text("\n");
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

static uint32_t value_after(const char *rest, uint32_t otherwise)
{
    if (*rest != '=')
        return otherwise;
    uint32_t value = 0;
    for (rest++; *rest >= '0' && *rest <= '9'; rest++)
        value = value * 10 + *rest - '0';
    return value;
}

static const char *next_word(const char *word)
{
    while (*word && *word != ' ')
        word++;
    while (*word == ' ')
        word++;
    return word;
}

static bool run_word(const char *word)
{
    for (uint32_t i = 0; i < WORKLOADS; i++) {
        const char *rest = after_name(word, workloads[i]);
        if (!rest)
            continue;
        uint32_t count = value_after(rest, DEFAULT_COUNT);
        if (count)
            run(i, count);
        return true;
    }
    if (after_name(word, "counts"))
        put_counts();
    return false;
}

static uint32_t find_hertz(const char *words)
{
    for (; *words; words = next_word(words)) {
        const char *rest = after_name(words, "hz");
        uint32_t hertz = rest ? value_after(rest, DEFAULT_HERTZ) : 0;
        if (hertz >= LEAST_HERTZ)
            return hertz;
    }
    return DEFAULT_HERTZ;
}

/* Entered from entry.S with the loader's information. Without a NAME on the command line, each runs. */
void kernel_main(const struct multiboot_info *info)
{
    static char words[WORDS_BYTES];
    const char *given = info->flags & INFO_COMMAND_LINE ? (const char *)info->cmdline : "";
    bool any = false;
    for (uint32_t i = 0; i < WORDS_BYTES - 1 && given[i]; i++)
        words[i] = given[i]; /* where the loader left it is memory that processes get */
    out8(COM1 + 3, 0x03);
    memory_init(info->flags & INFO_MEMORY ? (info->mem_upper + 1024) * 1024 : DIRECT_BYTES);
    traps_init(find_hertz(words));
    for (const char *word = words; *word; word = next_word(word))
        any |= run_word(word);
    for (uint32_t i = 0; !any && i < WORKLOADS; i++)
        run(i, DEFAULT_COUNT);
    put_text("done\n");
    asm volatile("outw %0, %1" : : "a"((uint16_t)0x2000), "d"((uint16_t)0x604)); /* ACPI state S5, as in QEMU */
}
