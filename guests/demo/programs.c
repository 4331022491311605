/* The programs linked into this image, and the ways to crash on purpose. */
#include "crashes.h"
#include "kernel.h"

#define PROGRAM(name)                                                                     \
    extern char name##_text[], name##_data[], name##_end[], name##_physical[];            \
    void name##_main(void);                                                               \
    const struct program name##_program = {#name,       name##_main, name##_text,         \
                                           name##_data, name##_end,  name##_physical};

PROGRAM(primes)
PROGRAM(clock)
PROGRAM(crash)

/* user/crash.c */
void crash_page_fault(void), crash_divide_by_zero(void), crash_invalid_opcode(void), crash_general_protection(void);
void crash_breakpoint(void), crash_stack(void);

static void kernel_page_fault(void) { page_fault_now(); }
static void kernel_divide_by_zero(void) { divide_by_zero_now(); }
static void kernel_invalid_opcode(void) { invalid_opcode_now(); }
static void kernel_general_protection(void) { general_protection_now(); }
static void kernel_breakpoint(void) { breakpoint_now(); }

const struct crash crashes[] = {
    {"pgfault", "write to an address that is not mapped", crash_page_fault, kernel_page_fault},
    {"div0", "divide by zero", crash_divide_by_zero, kernel_divide_by_zero},
    {"ud", "run an undefined instruction", crash_invalid_opcode, kernel_invalid_opcode},
    {"gp", "load a bad segment selector", crash_general_protection, kernel_general_protection},
    {"bp", "run a breakpoint instruction", crash_breakpoint, kernel_breakpoint},
    {"stack", "run out of stack; in the kernel, double fault", crash_stack, overflow_stack},
};
const uint32_t crash_count = sizeof crashes / sizeof crashes[0];
