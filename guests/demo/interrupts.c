/* Interrupts from devices: the pair of 8259 controllers, and the 8254 timer behind line 0. */
#include "kernel.h"
#include "x86.h"

#define MASTER_COMMAND 0x20
#define MASTER_DATA 0x21
#define SLAVE_COMMAND 0xA0
#define SLAVE_DATA 0xA1
#define FIRST_VECTOR 32
#define END_OF_INTERRUPT 0x20
#define READ_IN_SERVICE 0x0B

#define LINE_TIMER 0
#define LINE_SLAVE 2
#define LINE_COM1 4

#define TIMER_CHANNEL0 0x40
#define TIMER_COMMAND 0x43
#define TIMER_INPUT_HERTZ 1193182

volatile uint32_t ticks;
uint32_t hertz = 100;

/* Move the lines to vectors 32 to 47, away from the exceptions, and let in only those that somebody serves. */
static void controllers_init(void)
{
    uint16_t open = 1 << LINE_TIMER | 1 << LINE_SLAVE | 1 << LINE_COM1;
    out8(MASTER_COMMAND, 0x11); /* ICW1: edge triggered, cascaded, ICW4 follows */
    out8(SLAVE_COMMAND, 0x11);
    out8(MASTER_DATA, FIRST_VECTOR); /* ICW2 */
    out8(SLAVE_DATA, FIRST_VECTOR + 8);
    out8(MASTER_DATA, 1 << LINE_SLAVE); /* ICW3: who is where */
    out8(SLAVE_DATA, LINE_SLAVE);
    out8(MASTER_DATA, 0x01); /* ICW4: 8086 mode */
    out8(SLAVE_DATA, 0x01);
    out8(MASTER_DATA, ~open);
    out8(SLAVE_DATA, ~open >> 8);
}

/* Let channel 0 tick `hertz` times a second, as a rate generator (mode 2). */
static void timer_init(void)
{
    uint32_t divisor = (TIMER_INPUT_HERTZ + hertz / 2) / hertz;
    out8(TIMER_COMMAND, 0x34);
    out8(TIMER_CHANNEL0, divisor);
    out8(TIMER_CHANNEL0, divisor >> 8);
}

void interrupts_init(void)
{
    controllers_init();
    timer_init();
}

/* True if the controller raised its lowest line without having it in service: the request went away again. */
static bool is_spurious(uint32_t line)
{
    if (line != 7 && line != 15)
        return false;
    uint16_t command = line == 7 ? MASTER_COMMAND : SLAVE_COMMAND;
    out8(command, READ_IN_SERVICE);
    if (in8(command) & 0x80)
        return false;
    if (line == 15)
        out8(MASTER_COMMAND, END_OF_INTERRUPT);
    return true;
}

/* An interrupt on `line`. The end of interrupt is sent first, because this may switch to another task. */
void interrupt(uint32_t line)
{
    if (is_spurious(line))
        return;
    if (line >= 8)
        out8(SLAVE_COMMAND, END_OF_INTERRUPT);
    out8(MASTER_COMMAND, END_OF_INTERRUPT);
    if (line == LINE_TIMER) {
        ticks++;
        tasks_tick();
    } else if (line == LINE_COM1) {
        serial_interrupt();
        tasks_end_idling();
    }
}
