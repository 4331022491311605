/* What user programs may use: the system calls as C functions, and the shared library. A program that wants SYSENTER
   says `#define SYSTEM_CALL fast_system_call` first. */
#ifndef USER_H
#define USER_H

#include <stdint.h>

#include "../system_calls.h"

#ifndef SYSTEM_CALL
#define SYSTEM_CALL system_call
#endif

int system_call(int number, uint32_t first, uint32_t second, uint32_t third);
int fast_system_call(int number, uint32_t first, uint32_t second, uint32_t third);

static inline int sys_write(const char *text, uint32_t length_bytes)
{
    return SYSTEM_CALL(SYS_WRITE, (uint32_t)text, length_bytes, 0);
}

static inline int sys_sleep(uint32_t duration_ticks) { return SYSTEM_CALL(SYS_SLEEP, duration_ticks, 0, 0); }
static inline int sys_yield(void) { return SYSTEM_CALL(SYS_YIELD, 0, 0, 0); }
static inline int sys_getpid(void) { return SYSTEM_CALL(SYS_GETPID, 0, 0, 0); }
static inline uint32_t sys_ticks(void) { return SYSTEM_CALL(SYS_TICKS, 0, 0, 0); }
static inline uint32_t sys_hertz(void) { return SYSTEM_CALL(SYS_HERTZ, 0, 0, 0); }
static inline uint16_t *sys_map_screen(void) { return (uint16_t *)SYSTEM_CALL(SYS_MAP_SCREEN, 0, 0, 0); }

/* library.c: put texts and numbers together; each returns where the next part goes. */
char *append_text(char *to, const char *text);
char *append_number(char *to, uint32_t value, int least_digits);

#endif
