/* The shell on the serial console: a line editor, and the commands. */
#include "kernel.h"
#include "x86.h"

#define ARGUMENTS 8

struct command {
    const char *name, *arguments, *help;
    void (*run)(int count, char **words); /* words[0] is the command */
};

static const struct command commands[];

/* The value of `text`: hexadecimal after 0x, else to `base`. Stops at the first character that is no digit. */
static uint32_t number(const char *text, uint32_t base)
{
    uint32_t value = 0;
    if (text[0] == '0' && (text[1] | 0x20) == 'x') {
        base = 16;
        text += 2;
    }
    for (;; text++) {
        uint32_t digit = *text - '0';
        if (digit > 9)
            digit = (*text | 0x20) - 'a' + 10;
        if (digit >= base)
            return value;
        value = value * base + digit;
    }
}

static uint32_t argument(int count, char **words, int index, uint32_t base, uint32_t otherwise)
{
    return index < count ? number(words[index], base) : otherwise;
}

static void help(int count, char **words);

static void ps(int count, char **words)
{
    static const char *const states[] = {"free", "ready", "asleep", "waiting", "ended"};
    (void)count, (void)words;
    print("pid name     ring state   ticks  calls      cr3\n");
    for (struct task *task = tasks; task < tasks + TASKS; task++) {
        if (task->state != TASK_FREE)
            print("%3u %-8s %4u %-7s %5u %6u %08x\n", task->pid, task->name, task_is_user(task) ? 3u : 0u,
                  task == current ? "running" : states[task->state], task->used_ticks, task->system_calls,
                  task->directory);
    }
}

static void show_ticks(int count, char **words)
{
    (void)count, (void)words;
    print("%u\n", ticks);
}

static void uptime(int count, char **words)
{
    (void)count, (void)words;
    uint32_t now = ticks;
    print("up %u.%02u seconds\n", now / hertz, now % hertz * 100 / hertz);
}

static void mem(int count, char **words)
{
    (void)count, (void)words;
    print("RAM     %u KiB, of which the kernel uses the first %u\n", ram_bytes / 1024,
          (ram_bytes < DIRECT_BYTES ? ram_bytes : DIRECT_BYTES) / 1024);
    print("image   %08x-%08x\n", (uint32_t)boot_begin, (uint32_t)kernel_end - KERNEL_BASE);
    print("free    %u pages\n", pages_free());
    for (uint32_t i = 0; i < memory_map_entries; i++)
        print("map     %08x%08x + %08x%08x type %u\n", (uint32_t)(memory_map[i].base >> 32),
              (uint32_t)memory_map[i].base, (uint32_t)(memory_map[i].length >> 32), (uint32_t)memory_map[i].length,
              memory_map[i].type);
}

static void peek(int count, char **words)
{
    uint32_t linear = argument(count, words, 1, 16, 0);
    uint32_t length = argument(count, words, 2, 10, 16);
    for (uint32_t offset = 0; offset < length; offset++) {
        uint8_t value;
        if (offset % 16 == 0)
            print("%s%08x ", offset ? "\n" : "", linear + offset);
        if (!try_load(linear + offset, &value)) {
            print(" page fault");
            break;
        }
        print(" %02x", value);
    }
    print("\n");
}

static void poke(int count, char **words)
{
    uint32_t linear = argument(count, words, 1, 16, 0);
    if (count < 3)
        print("poke what?\n");
    for (int i = 2; i < count; i++) {
        if (!try_store(linear + i - 2, number(words[i], 16))) {
            print("%08x  page fault\n", linear + i - 2);
            break;
        }
    }
}

static void regs(int count, char **words)
{
    (void)count, (void)words;
    struct {
        uint16_t limit;
        uint32_t base;
    } __attribute__((packed)) gdtr, idtr;
    uint32_t selectors[8];
    asm volatile("sgdt %0; sidt %1" : "=m"(gdtr), "=m"(idtr));
    asm volatile("mov %%cs, %0" : "=r"(selectors[0]));
    asm volatile("mov %%ss, %0" : "=r"(selectors[1]));
    asm volatile("mov %%ds, %0" : "=r"(selectors[2]));
    asm volatile("str %0" : "=r"(selectors[3]));
    asm volatile("sldt %0" : "=r"(selectors[4]));
    print("cr0 %08x  cr2 %08x  cr3 %08x  cr4 %08x  eflags %08x\n", read_cr0(), read_cr2(), read_cr3(), read_cr4(),
          read_eflags());
    print("cs %04x  ss %04x  ds %04x  tr %04x  ldtr %04x\n", selectors[0] & 0xFFFF, selectors[1] & 0xFFFF,
          selectors[2] & 0xFFFF, selectors[3] & 0xFFFF, selectors[4] & 0xFFFF);
    print("gdtr %08x+%04x  idtr %08x+%04x\n", gdtr.base, gdtr.limit, idtr.base, idtr.limit);
}

static void show_cpuid(int count, char **words)
{
    static const struct {
        uint8_t bit;
        const char *name;
    } features[] = {{0, "fpu"}, {1, "vme"}, {2, "de"}, {3, "pse"}, {4, "tsc"}, {5, "msr"}, {6, "pae"}, {8, "cx8"},
                    {9, "apic"}, {11, "sep"}, {12, "mtrr"}, {13, "pge"}, {15, "cmov"}, {23, "mmx"}, {24, "fxsr"},
                    {25, "sse"}, {26, "sse2"}};
    (void)count, (void)words;
    uint32_t highest, eax, ebx, ecx, edx;
    union {
        uint32_t parts[3];
        char text[13];
    } vendor = {.text = ""};
    cpuid(0, &highest, &vendor.parts[0], &vendor.parts[2], &vendor.parts[1]);
    cpuid(1, &eax, &ebx, &ecx, &edx);
    print("%s, leaves up to %u, family %u model %u stepping %u\n", vendor.text, highest, eax >> 8 & 15, eax >> 4 & 15,
          eax & 15);
    print("edx %08x:", edx);
    for (uint32_t i = 0; i < sizeof features / sizeof features[0]; i++) {
        if (edx & 1u << features[i].bit)
            print(" %s", features[i].name);
    }
    print("\nsystem calls: int 80h%s\n", has_sysenter ? ", sysenter" : "");
}

/* Crash in a task made for it, or right here. */
static void crash(int count, char **words)
{
    const struct crash *crash = crashes;
    while (strcmp(crash->name, words[0]) != 0)
        crash++;
    if (count > 1 && strcmp(words[1], "kernel") == 0) {
        crash->in_kernel();
        return;
    }
    struct task *task = task_create_user(&crash_program, crash->in_user);
    print("status %d\n", task_wait(task));
}

static void triple(int count, char **words)
{
    (void)count, (void)words;
    interrupts_off();
    triple_fault();
}

static void spin(int count, char **words)
{
    for (volatile uint32_t left = 1000 * argument(count, words, 1, 10, 1000); left; left--)
        ;
}

static void sleep(int count, char **words)
{
    task_sleep(argument(count, words, 1, 10, 1));
}

static void echo(int count, char **words)
{
    for (int i = 1; i < count; i++)
        print("%s%s", i > 1 ? " " : "", words[i]);
    print("\n");
}

static void reboot_now(int count, char **words)
{
    (void)count, (void)words;
    reboot();
}

static void power_off_now(int count, char **words)
{
    (void)count, (void)words;
    power_off();
}

static void debug_exit(int count, char **words)
{
    out8(0xF4, argument(count, words, 1, 10, 0));
    print("no debug-exit device at port f4h\n");
}

static void panic_now(int count, char **words)
{
    (void)count, (void)words;
    panic("as you wish");
}

static const struct command commands[] = {
    {"help", "", "this list", help},
    {"ps", "", "tasks, with the ticks and system calls they used", ps},
    {"ticks", "", "timer ticks since boot", show_ticks},
    {"uptime", "", "the same in seconds", uptime},
    {"mem", "", "memory, and the loader's map of it", mem},
    {"peek", "ADDR [N]", "show N bytes at a linear address", peek},
    {"poke", "ADDR BYTE...", "write bytes, in hexadecimal", poke},
    {"regs", "", "control and system registers", regs},
    {"cpuid", "", "the processor and its features", show_cpuid},
    {"triple", "", "triple fault, for want of an IDT", triple},
    {"spin", "N", "turn N thousand times in a loop", spin},
    {"sleep", "N", "sleep N ticks", sleep},
    {"echo", "...", "print the arguments", echo},
    {"reboot", "", "reset the machine", reboot_now},
    {"poweroff", "", "turn the machine off", power_off_now},
    {"exit", "N", "write N to the debug-exit port f4h", debug_exit},
    {"panic", "", "stop the kernel", panic_now},
};

static void help(int count, char **words)
{
    (void)count, (void)words;
    for (uint32_t i = 0; i < sizeof commands / sizeof commands[0]; i++)
        print("%-8s %-12s %s\n", commands[i].name, commands[i].arguments, commands[i].help);
    for (uint32_t i = 0; i < crash_count; i++)
        print("%-8s %-12s %s\n", crashes[i].name, "[kernel]", crashes[i].help);
}

/* Run one command line, which is cut into its words. */
static void execute(char *line)
{
    char *words[ARGUMENTS];
    int count = 0;
    while (count < ARGUMENTS) {
        while (*line == ' ')
            *line++ = 0;
        if (*line == 0)
            break;
        words[count++] = line;
        while (*line && *line != ' ')
            line++;
    }
    if (count == 0)
        return;
    for (uint32_t i = 0; i < sizeof commands / sizeof commands[0]; i++) {
        if (strcmp(words[0], commands[i].name) == 0) {
            commands[i].run(count, words);
            return;
        }
    }
    for (uint32_t i = 0; i < crash_count; i++) {
        if (strcmp(words[0], crashes[i].name) == 0) {
            crash(count, words);
            return;
        }
    }
    print("%s: no such command; try help\n", words[0]);
}

/* Read a line with echo; backspace takes a character back, Ctrl-U all. Returns its length, the newline left out. */
static uint32_t read_line(char *line, uint32_t capacity)
{
    uint32_t length = 0;
    for (;;) {
        char c = serial_get();
        if (c == '\r' || c == '\n') {
            print("\n");
            line[length] = 0;
            return length;
        }
        uint32_t back = c == '\b' || c == 0x7F ? 1 : c == 'U' - '@' ? length : 0;
        for (; back > 0 && length > 0; back--, length--)
            print("\b \b");
        if (c >= ' ' && c < 0x7F && length + 1 < capacity) {
            line[length++] = c;
            print("%c", c);
        }
    }
}

/* The shell's task: first the commands of the kernel's command line, then those that are typed. */
void shell(void)
{
    static char line[sizeof command_line];
    for (const char *next = boot_commands; *next;) {
        uint32_t length = 0;
        while (*next && *next != ';')
            line[length++] = *next++;
        line[length] = 0;
        if (*next == ';')
            next++;
        print("demo> %s\n", line);
        execute(line);
    }
    for (;;) {
        print("demo> ");
        read_line(line, sizeof line);
        execute(line);
    }
}
