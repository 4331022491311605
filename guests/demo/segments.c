/* Segments: the global descriptor table, the task state segments, and where SYSENTER finds the kernel. */
#include "kernel.h"
#include "x86.h"

#define ACCESS_CODE 0x9A /* present, readable code */
#define ACCESS_DATA 0x92 /* present, writable data */
#define ACCESS_TSS 0x89  /* present, available 32-bit task state segment */
#define ACCESS_RING3 0x60
#define FLAT 0xFFFFF /* limit in pages */
#define FLAGS_PAGES_32 0xC
#define FLAGS_BYTES 0x0

#define MSR_SYSENTER_CS 0x174
#define MSR_SYSENTER_ESP 0x175
#define MSR_SYSENTER_EIP 0x176
#define CPUID_SEP 0x800

/* SDM Vol. 3A, "32-Bit Task-State Segment (TSS)". We let the CPU switch tasks only on a double fault; otherwise all it
   reads is the stack to enter ring 0 with. */
struct task_state_segment {
    uint32_t link;
    uint32_t esp0, ss0, esp1, ss1, esp2, ss2;
    uint32_t cr3, eip, eflags, eax, ecx, edx, ebx, esp, ebp, esi, edi;
    uint32_t es, cs, ss, ds, fs, gs, ldt;
    uint16_t debug_trap, io_map;
};

struct descriptor {
    uint16_t limit_low, base_low;
    uint8_t base_middle, access, limit_high_flags, base_high;
};

struct descriptor_table {
    uint16_t limit;
    uint32_t base;
} __attribute__((packed));

bool has_sysenter;
struct task_state_segment task_state, double_fault_state;
static struct descriptor gdt[7];
static uint8_t double_fault_stack[2048] __attribute__((aligned(16)));

static void set_descriptor(uint32_t selector, uint32_t base, uint32_t limit, uint8_t access, uint8_t flags)
{
    gdt[selector / 8] = (struct descriptor){
        .limit_low = limit,
        .base_low = base,
        .base_middle = base >> 16,
        .access = access,
        .limit_high_flags = flags << 4 | limit >> 16,
        .base_high = base >> 24,
    };
}

/* Where a double fault arrives, by the task gate in the IDT: as a new task, because the stack of the old one may be
   what failed. The CPU has saved the old task's registers in its TSS. */
static void double_fault(void)
{
    panic("double fault at %08x, esp %08x, cr2 %08x, cr3 %08x", task_state.eip, task_state.esp, read_cr2(),
          double_fault_state.cr3);
}

/* True if the processor has SYSENTER; the first Pentium Pros report it without having it. */
static bool find_sysenter(void)
{
    uint32_t eax, ebx, ecx, edx;
    uint32_t flags = read_eflags();
    write_eflags(flags | EFLAGS_ID);
    bool has_cpuid = read_eflags() & EFLAGS_ID;
    write_eflags(flags);
    if (!has_cpuid)
        return false;
    cpuid(0, &eax, &ebx, &ecx, &edx);
    if (eax == 0)
        return false;
    cpuid(1, &eax, &ebx, &ecx, &edx);
    return (edx & CPUID_SEP) && (eax & 0xFFF) >= 0x633;
}

/* Load the GDT, all segment registers and the task register; set SYSENTER up if there is one. */
void segments_init(void)
{
    set_descriptor(KERNEL_CODE, 0, FLAT, ACCESS_CODE, FLAGS_PAGES_32);
    set_descriptor(KERNEL_DATA, 0, FLAT, ACCESS_DATA, FLAGS_PAGES_32);
    set_descriptor(USER_CODE, 0, FLAT, ACCESS_CODE | ACCESS_RING3, FLAGS_PAGES_32);
    set_descriptor(USER_DATA, 0, FLAT, ACCESS_DATA | ACCESS_RING3, FLAGS_PAGES_32);

    task_state.ss0 = KERNEL_DATA;
    task_state.io_map = sizeof task_state; /* beyond the limit: no port for ring 3 */
    set_descriptor(TASK_STATE, (uint32_t)&task_state, sizeof task_state - 1, ACCESS_TSS, FLAGS_BYTES);

    double_fault_state = (struct task_state_segment){
        .esp0 = (uint32_t)(double_fault_stack + sizeof double_fault_stack),
        .ss0 = KERNEL_DATA,
        .cr3 = (uint32_t)kernel_directory - KERNEL_BASE,
        .eip = (uint32_t)double_fault,
        .eflags = 0x2,
        .esp = (uint32_t)(double_fault_stack + sizeof double_fault_stack),
        .es = KERNEL_DATA,
        .cs = KERNEL_CODE,
        .ss = KERNEL_DATA,
        .ds = KERNEL_DATA,
        .io_map = sizeof double_fault_state,
    };
    set_descriptor(DOUBLE_FAULT_STATE, (uint32_t)&double_fault_state, sizeof double_fault_state - 1, ACCESS_TSS,
                   FLAGS_BYTES);

    struct descriptor_table table = {sizeof gdt - 1, (uint32_t)gdt};
    asm volatile("lgdt %0\n\t"
                 "ljmp %1, $1f\n"
                 "1:\n\t"
                 "movl %2, %%ds\n\t"
                 "movl %2, %%es\n\t"
                 "movl %2, %%ss\n\t"
                 "movl %3, %%fs\n\t"
                 "movl %3, %%gs\n\t"
                 "lldt %w3\n\t" /* after reset it would be a table of 64 KiB at 0 */
                 "ltr %w4"
                 :
                 : "m"(table), "i"(KERNEL_CODE), "r"(KERNEL_DATA), "r"(0), "r"(TASK_STATE)
                 : "memory");

    has_sysenter = find_sysenter();
    if (has_sysenter) {
        write_msr(MSR_SYSENTER_CS, KERNEL_CODE);
        write_msr(MSR_SYSENTER_ESP, (uint32_t)&task_state.esp0);
        write_msr(MSR_SYSENTER_EIP, (uint32_t)sysenter_entry);
    }
}

/* From now on ring 3 enters the kernel with its stack pointer at `esp`. */
void segments_set_kernel_stack(uint32_t esp)
{
    task_state.esp0 = esp;
}
