/* What the nanobenchmarks share: selectors, the assembly's entry points, and the counts that prove that something
   happened. Read by C and by assembly. */
#ifndef NANO_H
#define NANO_H

#define KERNEL_CODE 0x08
#define KERNEL_DATA 0x10
#define USER_CODE 0x1B
#define USER_DATA 0x23
#define TASK_STATE 0x28
#define OTHER_DATA 0x30 /* flat as KERNEL_DATA, but another descriptor */
#define THREAD_DATA 0x38 /* with a base, as a thread's or a CPU's own data has */

#define CALL_SITES 256

#ifndef __ASSEMBLER__
#include <stdint.h>

/* Handlers, entered by the CPU. */
extern char divide_error_entry[], page_fault_entry[], system_call_entry[], leave_user_entry[], fast_call_entry[],
    unexpected_entry[];

/* Run `function(count)` in ring 3, until it executes INT 81h. */
void run_in_user(void (*function)(uint32_t), uint32_t count);
void user_system_calls(uint32_t count);
void user_fast_calls(uint32_t count);
void user_empty(uint32_t count);

/* `count` operations each. */
void loop_call_return(uint32_t count);
void loop_call_sites(uint32_t count);
void loop_interrupt_returns(uint32_t count);
uint32_t loop_patched(uint32_t count);
void loop_divide(uint32_t count);

/* Saves the registers and ESP, changes to another stack and page directory, takes the registers from there. */
void switch_process(uint32_t *saved_esp, uint32_t new_esp, uint32_t new_cr3);

extern uint32_t divide_errors, page_faults, system_calls;
extern uint32_t *missing_entry; /* the page-table entry that the #PF handler marks as present */
extern uint32_t (*const targets[256])(uint32_t);
#endif
#endif
