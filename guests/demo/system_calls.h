/* The system calls: the number goes into EAX, up to three arguments into EBX, ESI and EDI, the result comes back in
   EAX; negative means refused. `int $0x80` keeps the other registers; SYSENTER also wants the return address in EDX
   and the stack pointer in ECX and loses both of them and the flags. */
#ifndef SYSTEM_CALLS_H
#define SYSTEM_CALLS_H

#define SYS_EXIT 1       /* exit(status): never returns */
#define SYS_WRITE 2      /* write(text, length_bytes): bytes written */
#define SYS_YIELD 3      /* yield(): 0, after the others had a turn */
#define SYS_SLEEP 4      /* sleep(ticks): 0, that many timer ticks later */
#define SYS_GETPID 5     /* getpid(): this task's number */
#define SYS_TICKS 6      /* ticks(): timer ticks since boot */
#define SYS_HERTZ 7      /* hertz(): timer ticks in a second */
#define SYS_MAP_SCREEN 8 /* map_screen(): address at which this task may now write the VGA text page */
#define SYS_COUNT 9

#endif
