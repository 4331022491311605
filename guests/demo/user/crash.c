/* crash: one entry for each way to be killed by the kernel. The shell starts it. */
#include "../crashes.h"
#include "user.h"

void crash_page_fault(void) { page_fault_now(); }
void crash_divide_by_zero(void) { divide_by_zero_now(); }
void crash_invalid_opcode(void) { invalid_opcode_now(); }
void crash_general_protection(void) { general_protection_now(); }
void crash_breakpoint(void) { breakpoint_now(); }

/* The stack ends long before the recursion. */
static uint32_t recurse(uint32_t depth)
{
    volatile uint32_t filler[64];
    filler[0] = depth;
    return depth < 1000000 ? recurse(depth + 1) + filler[0] : 0;
}

void crash_stack(void) { recurse(0); }

void crash_main(void) {}
