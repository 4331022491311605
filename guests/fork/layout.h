/* Where things are and what the selectors and system calls are called: constants that C and assembly share. */
#ifndef LAYOUT_H
#define LAYOUT_H

#define PAGE_BYTES 4096

/* Linear memory. The kernel's part maps physical memory to itself; the user's, one page table, differs from process to
   process. fork.ld has USER_TEXT and USER_DATA_PAGES once more. */
#define DIRECT_BYTES 0x00800000
#define USER_TEXT 0x40000000
#define USER_HEAP 0x40200000 /* zeros, present from the first touch on */
#define USER_STACK_TOP 0x40400000
#define USER_END 0x40400000

/* Selectors, in the order that SYSENTER and SYSEXIT want. */
#define KERNEL_CODE 0x08
#define KERNEL_DATA 0x10
#define USER_CODE 0x1B
#define USER_DATA 0x23
#define TASK_STATE 0x28

#define TIMER_VECTOR 32
#define SPURIOUS_VECTOR 39
#define SYSTEM_CALL_VECTOR 0x80
#define SYSENTER_VECTOR 0x81 /* no vector of the CPU's: what frames made by SYSENTER say */
#define PAGE_FAULT_VECTOR 14

#define EFLAGS_IF 0x200
#define CR0_WP 0x00010000
#define CR0_PG 0x80000000

/* System calls: the number in EAX, an argument in EBX, the answer in EAX. By SYSENTER, EDX holds the address to go on at
   and ECX the stack pointer. */
#define CALL_GET_PID 0
#define CALL_FORK 1 /* 0 in the child, its pid in the parent */
#define CALL_EXIT 2 /* EBX: the status, 32 bits */
#define CALL_WAIT 3 /* the status of a child that ended; only for who has one */
#define CALL_MAP 4  /* a page of zeros at EBX, which must be free */
#define CALL_UNMAP 5
#define CALL_PORTS 6 /* one round of port accesses with EBX in them; EBX as it came back */
#define CALL_YIELD 7
#define CALL_FAIL 8 /* ends everything: the check EBX failed */

#endif
