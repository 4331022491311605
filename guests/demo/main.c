/* The beginning and the end: what the boot loader tells, the order in which the parts start, and turning off. */
#include "kernel.h"
#include "x86.h"

#define MULTIBOOT_LOADED 0x2BADB002
#define INFO_MEMORY 0x001
#define INFO_COMMAND_LINE 0x004
#define INFO_MODULES 0x008
#define INFO_MEMORY_MAP 0x040

#define ACPI_CONTROL 0x604
#define ACPI_SLEEP_ENABLE 0x2000
#define KEYBOARD_COMMAND 0x64
#define KEYBOARD_PULSE_RESET 0xFE

/* Multiboot Specification 0.6.96, "Boot information format". */
struct multiboot_info {
    uint32_t flags, mem_lower, mem_upper, boot_device, cmdline, mods_count, mods_addr, syms[4], mmap_length, mmap_addr;
};

struct multiboot_module {
    uint32_t start, end, string, reserved;
};

bool quiet;
char command_line[256];
const char *boot_commands = ""; /* the part of command_line after run= */
uint32_t ram_bytes = 4 << 20;   /* unless the loader says otherwise */
struct memory_map_entry memory_map[16];
uint32_t memory_map_entries;

/* The loader's structures must lie in the direct map; what does not is taken as not there. */
static bool reachable(uint32_t physical)
{
    return physical != 0 && physical < DIRECT_BYTES - PAGE_BYTES;
}

/* Copy what we need of the loader's information, before its memory is used for something else. */
static void read_multiboot_info(const struct multiboot_info *info)
{
    if ((info->flags & INFO_COMMAND_LINE) && reachable(info->cmdline)) {
        const char *text = direct(info->cmdline);
        for (uint32_t i = 0; i < sizeof command_line - 1 && text[i]; i++)
            command_line[i] = text[i];
    }
    if (info->flags & INFO_MEMORY)
        ram_bytes = (1024 + info->mem_upper) * 1024;
    if ((info->flags & INFO_MEMORY_MAP) && reachable(info->mmap_addr)) {
        const char *next = direct(info->mmap_addr);
        const char *end = next + info->mmap_length;
        /* Each entry begins with its size, which does not count itself. */
        while (next < end && memory_map_entries < sizeof memory_map / sizeof memory_map[0]) {
            memcpy(&memory_map[memory_map_entries++], next + 4, sizeof memory_map[0]);
            next += 4 + *(const uint32_t *)next;
        }
    }
}

/* Keep the modules that the loader put into memory. They are not used, but a debugger may want to see them. */
static void reserve_modules(const struct multiboot_info *info)
{
    if (!(info->flags & INFO_MODULES) || !reachable(info->mods_addr))
        return;
    const struct multiboot_module *module = direct(info->mods_addr);
    for (uint32_t i = 0; i < info->mods_count; i++)
        memory_reserve(module[i].start, module[i].end);
}

/* Options of the command line, between spaces: `quiet`, `hz=N`, and `run=COMMAND[;COMMAND...]`, which comes last since
   commands may have spaces. Other words (GRUB passes the image's name) mean nothing. */
static void read_options(void)
{
    const char *word = command_line;
    while (*word) {
        if (memcmp(word, "run=", 4) == 0) {
            boot_commands = word + 4;
            return;
        }
        if (memcmp(word, "quiet", 5) == 0 && (word[5] == 0 || word[5] == ' '))
            quiet = true;
        if (memcmp(word, "hz=", 3) == 0) {
            uint32_t value = 0;
            for (const char *digit = word + 3; *digit >= '0' && *digit <= '9'; digit++)
                value = value * 10 + *digit - '0';
            if (value >= 19 && value <= 100000) /* what the timer's 16-bit divisor can do */
                hertz = value;
        }
        while (*word && *word != ' ')
            word++;
        while (*word == ' ')
            word++;
    }
}

/* Entered from boot.S on a stack of one page, paging on, interrupts off, nothing else set up. */
void kernel_main(uint32_t magic, uint32_t info_physical)
{
    segments_init();
    traps_init();
    serial_init();
    screen_init();
    bool loaded = magic == MULTIBOOT_LOADED && reachable(info_physical);
    if (loaded)
        read_multiboot_info(direct(info_physical));
    read_options();
    memory_init(ram_bytes);
    if (loaded)
        reserve_modules(direct(info_physical));
    interrupts_init();
    serial_listen();
    if (!quiet)
        print("trapgate demo kernel: %u KiB RAM, %u Hz, system calls by %s\n", ram_bytes / 1024, hertz,
              has_sysenter ? "int 80h and sysenter" : "int 80h");
    tasks_init();
}

/* Ask for ACPI state S5 where QEMU has the register; waits for power to go. */
void power_off(void)
{
    interrupts_off();
    out16(ACPI_CONTROL, ACPI_SLEEP_ENABLE);
    for (;;)
        asm volatile("hlt");
}

/* Reset by way of the keyboard controller, or by triple fault if that is not heard. */
void reboot(void)
{
    interrupts_off();
    out8(KEYBOARD_COMMAND, KEYBOARD_PULSE_RESET);
    for (volatile int patience = 0; patience < 1000; patience++)
        ;
    triple_fault();
}
