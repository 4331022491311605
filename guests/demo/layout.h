/* Where things are and what the selectors are called: constants that C and assembly share. */
#ifndef LAYOUT_H
#define LAYOUT_H

/* Linear memory. Below KERNEL_BASE is the task's own half, from it on the kernel's, the same in every address space:
   the first DIRECT_BYTES of physical memory, so that physical P is read at KERNEL_BASE + P. */
#define KERNEL_BASE 0xC0000000
#define DIRECT_BYTES 0x01000000
#define PAGE_BYTES 4096

/* The user half; kernel.ld has the addresses of the programs, and the library's once more. */
#define LIBRARY 0x00200000
#define USER_STACK_TOP 0xBFFFF000
#define USER_STACK_LIMIT 0xBFFEF000 /* 16 pages, present from the first touch on */
#define USER_SCREEN 0x00300000      /* where the map_screen system call puts the VGA text page */

/* Selectors, in the order that SYSENTER and SYSEXIT want: kernel code, kernel data, user code, user data. */
#define KERNEL_CODE 0x08
#define KERNEL_DATA 0x10
#define USER_CODE 0x1B
#define USER_DATA 0x23
#define TASK_STATE 0x28
#define DOUBLE_FAULT_STATE 0x30

#define SYSTEM_CALL_VECTOR 0x80
#define SYSENTER_VECTOR 0x81 /* no vector of the CPU's: what trap frames made by SYSENTER say */

#define EFLAGS_IF 0x00000200
#define EFLAGS_ID 0x00200000
#define CR0_PE 0x00000001
#define CR0_EM 0x00000004
#define CR0_WP 0x00010000
#define CR0_PG 0x80000000

#define PAGE_PRESENT 0x001
#define PAGE_WRITE 0x002
#define PAGE_USER 0x004

#endif
