/* clock: writes the time since boot into the screen's title row every second, and to the console after 1, 10, 100
   seconds and so on. Makes its system calls by SYSENTER where there is one. */
#define SYSTEM_CALL fast_system_call
#include "user.h"

#define TITLE_COLUMN 70
#define TITLE_ATTRIBUTE 0x1F00

uint32_t seconds;

static void show(uint16_t *screen)
{
    char text[16];
    char *end = append_number(text, seconds / 3600, 2);
    end = append_text(end, ":");
    end = append_number(end, seconds / 60 % 60, 2);
    end = append_text(end, ":");
    end = append_number(end, seconds % 60, 2);
    for (char *next = text; next < end; next++)
        screen[TITLE_COLUMN + (next - text)] = TITLE_ATTRIBUTE | *next;
}

static void announce(void)
{
    char line[64];
    char *end = append_text(line, "clock: up ");
    end = append_number(end, seconds, 1);
    end = append_text(end, seconds == 1 ? " second\n" : " seconds\n");
    sys_write(line, end - line);
}

void clock_main(void)
{
    uint16_t *screen = sys_map_screen();
    uint32_t second_ticks = sys_hertz();
    uint32_t next_announced = 1;
    for (;;) {
        show(screen);
        if (seconds == next_announced) {
            announce();
            next_announced *= 10;
        }
        seconds++;
        sys_sleep(seconds * second_ticks - sys_ticks());
    }
}
