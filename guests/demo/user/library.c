/* The library that all programs share, second part: text. It is mapped read only, so it can have no variables. */
#include "user.h"

/* Copy `text` without its end to `to`. */
char *append_text(char *to, const char *text)
{
    while (*text)
        *to++ = *text++;
    return to;
}

/* Write `value` in decimal, with zeros in front up to `least_digits`. */
char *append_number(char *to, uint32_t value, int least_digits)
{
    char digits[10];
    int count = 0;
    do {
        digits[count++] = '0' + value % 10;
        value /= 10;
    } while (value || count < least_digits);
    while (count)
        *to++ = digits[--count];
    return to;
}
