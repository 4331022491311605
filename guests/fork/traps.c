/* Segments, interrupts, exceptions and system calls: how the CPU gets from ring 3 to ring 0, and what it does there. */
#include "kernel.h"

#define PIT_HERTZ 1193182
#define MSR_SYSENTER_CS 0x174
#define VECTORS 48
#define COM1_SCRATCH 0x3FF
#define PIC_MASK 0x21
#define SLAVE_MASK 0xA1
#define TIMER_ONLY 0xFE
#define CMOS_FREE 0x60 /* a byte of CMOS memory that nobody uses */

struct __attribute__((packed)) pointer {
    uint16_t limit;
    uint32_t base;
};

static uint64_t segments[6];
static uint64_t gates[256];
static uint32_t task_state[26];
struct counts counts;

/* From now on ring 3 enters the kernel with its stack pointer at `esp`. */
void set_kernel_stack(uint32_t esp)
{
    task_state[1] = esp;
}

static uint64_t flat(uint32_t access)
{
    return 0xFFFF | (uint64_t)access << 40 | 0xCFull << 48;
}

static void set_gate(uint32_t vector, uint32_t offset, uint32_t access)
{
    gates[vector] = (offset & 0xFFFF) | KERNEL_CODE << 16 | (uint64_t)((offset & 0xFFFF0000) | access << 8) << 32;
}

static void write_msr(uint32_t number, uint32_t value)
{
    asm volatile("wrmsr" : : "c"(number), "a"(value), "d"(0));
}

static void start_timer(uint32_t hertz)
{
    out8(0x20, 0x11);
    out8(PIC_MASK, TIMER_VECTOR);
    out8(PIC_MASK, 4);
    out8(PIC_MASK, 1);
    out8(0xA0, 0x11);
    out8(SLAVE_MASK, TIMER_VECTOR + 8);
    out8(SLAVE_MASK, 2);
    out8(SLAVE_MASK, 1);
    out8(PIC_MASK, TIMER_ONLY);
    out8(SLAVE_MASK, 0xFF);
    out8(0x43, 0x34); /* counter 0, rate generator */
    out8(0x40, PIT_HERTZ / hertz & 0xFF);
    out8(0x40, PIT_HERTZ / hertz >> 8);
}

/* Load GDT, IDT, task register and the registers of SYSENTER, and start the timer; interrupts come in ring 3 only. */
void traps_init(uint32_t hertz)
{
    uint32_t base = (uint32_t)task_state;
    segments[KERNEL_CODE >> 3] = flat(0x9B);
    segments[KERNEL_DATA >> 3] = flat(0x93);
    segments[USER_CODE >> 3] = flat(0xFB);
    segments[USER_DATA >> 3] = flat(0xF3);
    segments[TASK_STATE >> 3] = (sizeof task_state - 1) | (uint64_t)(base & 0xFFFFFF) << 16 | 0x89ull << 40
                                | (uint64_t)(base >> 24) << 56;
    task_state[2] = KERNEL_DATA;
    task_state[25] = sizeof task_state << 16; /* beyond the limit: no port for ring 3 */
    for (uint32_t vector = 0; vector < VECTORS; vector++)
        set_gate(vector, vector_table[vector], 0x8E);
    set_gate(SYSTEM_CALL_VECTOR, vector_table[VECTORS], 0xEE);
    struct pointer gdt = {sizeof segments - 1, (uint32_t)segments}, idt = {sizeof gates - 1, (uint32_t)gates};
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
    write_msr(MSR_SYSENTER_CS + 1, (uint32_t)&task_state[1]);
    write_msr(MSR_SYSENTER_CS + 2, (uint32_t)sysenter_entry);
    start_timer(hertz);
}

/* What drivers do: write and read registers that remember, read some that change, and a write to nowhere. Eleven
   accesses. Returns `value`, if every register that remembers does. */
static uint32_t access_ports(uint8_t value)
{
    uint8_t other = value ^ 0x5A;
    out8(COM1_SCRATCH, value);
    out8(0x70, CMOS_FREE);
    out8(0x71, other);
    out8(0x43, 0); /* latch counter 0 */
    (void)in8(0x40);
    (void)in8(0x40);
    out8(0x80, value);
    bool masked = in8(PIC_MASK) == TIMER_ONLY && in8(SLAVE_MASK) == 0xFF;
    return in8(0x71) == other && masked ? in8(COM1_SCRATCH) : ~0u;
}

static uint32_t system_call(struct frame *frame)
{
    counts.system_calls++;
    switch (frame->eax) {
    case CALL_GET_PID:
        return process_pid();
    case CALL_FORK:
        return process_fork(frame);
    case CALL_EXIT:
        process_exit(frame->ebx);
        return 0;
    case CALL_WAIT:
        return process_wait();
    case CALL_MAP:
        space_map(frame->ebx);
        return 0;
    case CALL_UNMAP:
        space_unmap(frame->ebx);
        return 0;
    case CALL_PORTS:
        return access_ports(frame->ebx);
    case CALL_YIELD:
        yield();
        return 0;
    case CALL_FAIL:
        fail("a check failed", frame->ebx);
    default:
        fail("no such system call", frame->eax);
    }
}

/* Called from entry.S with what was interrupted. */
void trap(struct frame *frame)
{
    uint32_t linear;
    switch (frame->vector) {
    case SYSTEM_CALL_VECTOR:
    case SYSENTER_VECTOR:
        frame->eax = system_call(frame);
        return;
    case PAGE_FAULT_VECTOR:
        asm volatile("movl %%cr2, %0" : "=r"(linear));
        page_fault(linear, frame);
        return;
    case TIMER_VECTOR:
        counts.ticks++;
        out8(0x20, 0x20);
        yield();
        return;
    case SPURIOUS_VECTOR:
        return;
    default:
        fail("unexpected vector", frame->vector);
    }
}
