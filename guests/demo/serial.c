/* The serial console, COM1: output waits for the transmitter, input comes by interrupt into a ring. */
#include "kernel.h"
#include "x86.h"

#define COM1 0x3F8
#define DATA (COM1 + 0)           /* with DLAB: divisor, low byte */
#define INTERRUPT_ENABLE (COM1 + 1) /* with DLAB: divisor, high byte */
#define FIFO_CONTROL (COM1 + 2)
#define LINE_CONTROL (COM1 + 3)
#define MODEM_CONTROL (COM1 + 4)
#define LINE_STATUS (COM1 + 5)

#define LINE_CONTROL_DLAB 0x80
#define LINE_CONTROL_8N1 0x03
#define LINE_STATUS_DATA_READY 0x01
#define LINE_STATUS_CAN_SEND 0x20

static char ring[256];
static volatile uint32_t received, taken; /* counts; the ring holds what lies between */

/* 115200 baud, 8 data bits, no parity; FIFOs on, no interrupts yet. */
void serial_init(void)
{
    out8(INTERRUPT_ENABLE, 0);
    out8(LINE_CONTROL, LINE_CONTROL_DLAB);
    out8(DATA, 1);
    out8(INTERRUPT_ENABLE, 0);
    out8(LINE_CONTROL, LINE_CONTROL_8N1);
    out8(FIFO_CONTROL, 0x07);  /* on, both emptied, trigger at one byte */
    out8(MODEM_CONTROL, 0x0B); /* DTR, RTS, and OUT2, which lets interrupts through */
}

/* An interrupt for each byte received from now on. The controllers must be set up before: they look for edges, and a
   byte that is there already makes its edge here. */
void serial_listen(void)
{
    out8(INTERRUPT_ENABLE, 0x01);
}

/* Send a byte, newline as carriage return and line feed. */
void serial_put(char c)
{
    if (c == '\n')
        serial_put('\r');
    while (!(in8(LINE_STATUS) & LINE_STATUS_CAN_SEND))
        ;
    out8(DATA, c);
}

/* Take all that has been received, drop what the ring has no room for, and wake who waits. */
void serial_interrupt(void)
{
    while (in8(LINE_STATUS) & LINE_STATUS_DATA_READY) {
        char c = in8(DATA);
        if (received - taken < sizeof ring)
            ring[received++ % sizeof ring] = c;
    }
    task_wake(ring);
}

/* Return the next byte received; sleeps until there is one. */
char serial_get(void)
{
    uint32_t flags = interrupts_off();
    while (received == taken)
        task_block(ring);
    char c = ring[taken++ % sizeof ring];
    interrupts_restore(flags);
    return c;
}
