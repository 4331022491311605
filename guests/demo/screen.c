/* The VGA text screen: a copy of what goes to the serial console, below a title row that does not scroll. */
#include "kernel.h"
#include "x86.h"

#define COLUMNS 80
#define ROWS 25
#define ATTRIBUTE 0x0700       /* grey on black */
#define TITLE_ATTRIBUTE 0x1F00 /* white on blue */
#define CRTC_INDEX 0x3D4
#define CRTC_DATA 0x3D5
#define CRTC_CURSOR_HIGH 0x0E
#define CRTC_CURSOR_LOW 0x0F

static uint16_t *const cells = (uint16_t *)(KERNEL_BASE + SCREEN_PHYSICAL);
static uint32_t cursor; /* in cells from the top left */

static void show_cursor(void)
{
    out8(CRTC_INDEX, CRTC_CURSOR_HIGH);
    out8(CRTC_DATA, cursor >> 8);
    out8(CRTC_INDEX, CRTC_CURSOR_LOW);
    out8(CRTC_DATA, cursor);
}

static void blank(uint32_t first, uint32_t end, uint16_t attribute)
{
    for (uint32_t cell = first; cell < end; cell++)
        cells[cell] = attribute | ' ';
}

/* Clear the screen and write the title. */
void screen_init(void)
{
    blank(0, COLUMNS, TITLE_ATTRIBUTE);
    blank(COLUMNS, COLUMNS * ROWS, ATTRIBUTE);
    const char *title = "trapgate demo kernel";
    for (uint32_t i = 0; title[i]; i++)
        cells[1 + i] = TITLE_ATTRIBUTE | title[i];
    cursor = COLUMNS;
    show_cursor();
}

/* Write a character at the cursor; understands newline, carriage return and backspace. */
void screen_put(char c)
{
    if (c == '\n')
        cursor += COLUMNS - cursor % COLUMNS;
    else if (c == '\r')
        cursor -= cursor % COLUMNS;
    else if (c == '\b')
        cursor -= cursor % COLUMNS > 0;
    else
        cells[cursor++] = ATTRIBUTE | (uint8_t)c;
    if (cursor == COLUMNS * ROWS) {
        memmove(cells + COLUMNS, cells + 2 * COLUMNS, (ROWS - 2) * COLUMNS * sizeof cells[0]);
        cursor -= COLUMNS;
        blank(cursor, cursor + COLUMNS, ATTRIBUTE);
    }
    show_cursor();
}
