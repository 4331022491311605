/* Traps: the interrupt descriptor table, and what is done about each exception. */
#include "kernel.h"
#include "x86.h"

#define GATE_INTERRUPT 0x8E /* present, 32-bit interrupt gate: turns interrupts off */
#define GATE_TASK 0x85
#define GATE_RING3 0x60 /* may be called by INT in ring 3 */

#define EXCEPTIONS 32
#define LINES 16
#define VECTOR_BREAKPOINT 3
#define VECTOR_OVERFLOW 4
#define VECTOR_DOUBLE_FAULT 8
#define VECTOR_PAGE_FAULT 14

#define ERROR_PRESENT 1
#define ERROR_WRITE 2
#define ERROR_USER 4

struct gate {
    uint16_t offset_low, selector;
    uint8_t zero, type;
    uint16_t offset_high;
};

struct fixup {
    uint32_t access, resume;
};

extern const struct fixup fixups_begin[], fixups_end[];

static struct gate idt[SYSTEM_CALL_VECTOR + 1];

static const char *const exception_names[EXCEPTIONS] = {
    "divide error",
    "debug",
    "NMI",
    "breakpoint",
    "overflow",
    "bound range exceeded",
    "invalid opcode",
    "device not available",
    "double fault",
    "coprocessor segment overrun",
    "invalid TSS",
    "segment not present",
    "stack fault",
    "general protection",
    "page fault",
    "exception 15",
    "x87 error",
    "alignment check",
    "machine check",
    "SIMD error",
};

static void set_gate(uint32_t vector, uint16_t selector, uint32_t offset, uint8_t type)
{
    idt[vector] = (struct gate){offset, selector, 0, type, offset >> 16};
}

/* Build and load the IDT: interrupt gates throughout, so that the kernel runs with interrupts off unless it says
   otherwise; a task gate for double faults. Ring 3 may call the system call, INT3 and INTO. */
void traps_init(void)
{
    for (uint32_t vector = 0; vector < EXCEPTIONS + LINES; vector++)
        set_gate(vector, KERNEL_CODE, vector_table[vector], GATE_INTERRUPT);
    set_gate(VECTOR_BREAKPOINT, KERNEL_CODE, vector_table[VECTOR_BREAKPOINT], GATE_INTERRUPT | GATE_RING3);
    set_gate(VECTOR_OVERFLOW, KERNEL_CODE, vector_table[VECTOR_OVERFLOW], GATE_INTERRUPT | GATE_RING3);
    set_gate(VECTOR_DOUBLE_FAULT, DOUBLE_FAULT_STATE, 0, GATE_TASK);
    set_gate(SYSTEM_CALL_VECTOR, KERNEL_CODE, vector_table[EXCEPTIONS + LINES], GATE_INTERRUPT | GATE_RING3);

    struct {
        uint16_t limit;
        uint32_t base;
    } __attribute__((packed)) table = {sizeof idt - 1, (uint32_t)idt};
    asm volatile("lidt %0" : : "m"(table));
}

static void print_frame(const struct trap_frame *frame)
{
    bool user = frame->cs & 3;
    print("  eax %08x  ebx %08x  ecx %08x  edx %08x\n", frame->eax, frame->ebx, frame->ecx, frame->edx);
    print("  esi %08x  edi %08x  ebp %08x  esp %08x\n", frame->esi, frame->edi, frame->ebp,
          user ? frame->esp : (uint32_t)&frame->esp);
    print("  eip %08x  cs %04x  eflags %08x  cr2 %08x  cr3 %08x\n", frame->eip, frame->cs & 0xFFFF, frame->eflags,
          read_cr2(), read_cr3());
}

/* Print the return addresses found by following the frame pointers from `ebp`. */
static void print_backtrace(uint32_t ebp)
{
    print("  called from");
    for (int depth = 0; depth < 10 && ebp >= KERNEL_BASE && ebp < KERNEL_BASE + DIRECT_BYTES - 8; depth++) {
        const uint32_t *frame = (const uint32_t *)ebp;
        if (frame[1] == 0)
            break;
        print(" %08x", frame[1]);
        ebp = frame[0];
    }
    print("\n");
}

/* Say why on both consoles and stop for good. */
void panic(const char *format, ...)
{
    asm volatile("cli");
    va_list arguments;
    va_start(arguments, format);
    print("panic: ");
    vprint(format, arguments);
    print("\n");
    va_end(arguments);
    print_backtrace((uint32_t)__builtin_frame_address(0));
    for (;;)
        asm volatile("cli; hlt");
}

/* Give a user stack that grows its next page. Returns false if `linear` is in no stack or there is no memory. */
static bool grow_stack(uint32_t linear)
{
    if (linear < USER_STACK_LIMIT || linear >= USER_STACK_TOP || !task_is_user(current))
        return false;
    uint32_t physical = page_allocate();
    if (physical == 0)
        return false;
    memset(direct(physical), 0, PAGE_BYTES);
    page_map(current->directory, linear & -PAGE_BYTES, physical, PAGE_PRESENT | PAGE_WRITE | PAGE_USER);
    return true;
}

/* A page fault: let the stack of ring 3 grow; let try_load and try_store fail. Returns false if it was neither, which
   is an error of the code that faulted. */
static bool page_fault(struct trap_frame *frame)
{
    uint32_t linear = read_cr2();
    if (!(frame->error & ERROR_PRESENT) && grow_stack(linear))
        return true;
    if (frame->error & ERROR_USER)
        return false;
    for (const struct fixup *fixup = fixups_begin; fixup < fixups_end; fixup++) {
        if (fixup->access == frame->eip) {
            frame->eip = fixup->resume;
            return true;
        }
    }
    return false;
}

/* An exception: in ring 3 it ends the task with a message, in ring 0 the kernel. A breakpoint is only reported. */
static void exception(struct trap_frame *frame)
{
    const char *name = exception_names[frame->vector] ? exception_names[frame->vector] : "reserved exception";
    if (frame->vector == VECTOR_PAGE_FAULT && page_fault(frame))
        return;
    if (frame->vector == VECTOR_BREAKPOINT) {
        print("pid %u (%s): breakpoint at %08x\n", current->pid, current->name, frame->eip);
        return;
    }
    if ((frame->cs & 3) == 0) {
        print("kernel exception %u (%s), error code %04x\n", frame->vector, name, frame->error);
        print_frame(frame);
        panic("%s at %08x", name, frame->eip);
    }
    print("pid %u (%s) killed: %s at %08x", current->pid, current->name, name, frame->eip);
    if (frame->vector == VECTOR_PAGE_FAULT)
        print(", %s %08x, %s", frame->error & ERROR_WRITE ? "write to" : "read of", read_cr2(),
              frame->error & ERROR_PRESENT ? "not permitted" : "not present");
    else if (frame->error)
        print(", error code %04x", frame->error);
    print("\n");
    task_exit(STATUS_KILLED + frame->vector);
}

/* All interrupts come here from entry.S, with interrupts off. May return to another task's frame much later. */
void trap(struct trap_frame *frame)
{
    if (frame->vector < EXCEPTIONS)
        exception(frame);
    else if (frame->vector < EXCEPTIONS + LINES)
        interrupt(frame->vector - EXCEPTIONS);
    else
        syscall_dispatch(frame);
}
