/* System calls: what ring 3 may ask for, and how its arguments are checked. */
#include "kernel.h"
#include "system_calls.h"
#include "x86.h"

#define REFUSED (-1)

typedef int service(uint32_t first, uint32_t second);

static int sys_exit(uint32_t status, uint32_t unused)
{
    (void)unused;
    task_exit(status);
}

/* The text is copied first, byte by byte, since the caller may name memory that it does not have. */
static int sys_write(uint32_t text, uint32_t length_bytes)
{
    char copy[128];
    if (length_bytes > sizeof copy)
        length_bytes = sizeof copy;
    if (text >= KERNEL_BASE || text + length_bytes > KERNEL_BASE)
        return REFUSED;
    for (uint32_t i = 0; i < length_bytes; i++) {
        if (!try_load(text + i, (uint8_t *)&copy[i]))
            return REFUSED;
    }
    if (quiet) {
        for (uint32_t i = 0; i < length_bytes; i++)
            screen_put(copy[i]);
    } else {
        put_string(copy, length_bytes);
    }
    return length_bytes;
}

static int sys_yield(uint32_t unused, uint32_t unused_too)
{
    (void)unused, (void)unused_too;
    yield();
    return 0;
}

static int sys_sleep(uint32_t duration_ticks, uint32_t unused)
{
    (void)unused;
    task_sleep(duration_ticks);
    return 0;
}

static int sys_getpid(uint32_t unused, uint32_t unused_too)
{
    (void)unused, (void)unused_too;
    return current->pid;
}

static int sys_ticks(uint32_t unused, uint32_t unused_too)
{
    (void)unused, (void)unused_too;
    return ticks;
}

static int sys_hertz(uint32_t unused, uint32_t unused_too)
{
    (void)unused, (void)unused_too;
    return hertz;
}

static int sys_map_screen(uint32_t unused, uint32_t unused_too)
{
    (void)unused, (void)unused_too;
    page_map(current->directory, USER_SCREEN, SCREEN_PHYSICAL, PAGE_PRESENT | PAGE_WRITE | PAGE_USER);
    return USER_SCREEN;
}

static service *const system_calls[SYS_COUNT] = {
    [SYS_EXIT] = sys_exit,
    [SYS_WRITE] = sys_write,
    [SYS_YIELD] = sys_yield,
    [SYS_SLEEP] = sys_sleep,
    [SYS_GETPID] = sys_getpid,
    [SYS_TICKS] = sys_ticks,
    [SYS_HERTZ] = sys_hertz,
    [SYS_MAP_SCREEN] = sys_map_screen,
};

/* Do what the registers in `frame` ask for and leave the result in its EAX. */
void syscall_dispatch(struct trap_frame *frame)
{
    uint32_t number = frame->eax;
    current->system_calls++;
    if (number < SYS_COUNT && system_calls[number])
        frame->eax = system_calls[number](frame->ebx, frame->esi);
    else
        frame->eax = REFUSED;
}
