/* Text out to both consoles, a small printf, and the memory and string functions that C programs expect. */
#include "kernel.h"
#include "x86.h"

/* Write to both consoles, without another task's output in between. */
void put_string(const char *text, uint32_t length_bytes)
{
    uint32_t flags = interrupts_off();
    for (uint32_t i = 0; i < length_bytes; i++) {
        serial_put(text[i]);
        screen_put(text[i]);
    }
    interrupts_restore(flags);
}

/* Append `text` to line[*length], padded to `width`: on the right if it is negative, else on the left with `pad`. */
static void append(char *line, uint32_t *length, uint32_t capacity, const char *text, int width, char pad)
{
    int text_length = 0;
    while (text[text_length])
        text_length++;
    for (int i = text_length; i < width && *length < capacity; i++)
        line[(*length)++] = pad;
    for (int i = 0; i < text_length && *length < capacity; i++)
        line[(*length)++] = text[i];
    for (int i = text_length; i < -width && *length < capacity; i++)
        line[(*length)++] = ' ';
}

/* Write `value` in `base` so that it ends before `end`; returns where it begins. */
static char *digits(char *end, uint32_t value, uint32_t base)
{
    *--end = 0;
    do {
        *--end = "0123456789abcdef"[value % base];
        value /= base;
    } while (value);
    return end;
}

/* Print by a format of %d %u %x %s %c and %%, with width, `-` and `0`. The result must fit into 256 bytes. */
void vprint(const char *format, va_list arguments)
{
    char line[256], number[12];
    uint32_t length = 0;
    for (; *format && length < sizeof line; format++) {
        if (*format != '%') {
            line[length++] = *format;
            continue;
        }
        int sign = 1, width = 0;
        char pad = ' ';
        if (*++format == '-') {
            sign = -1;
            format++;
        } else if (*format == '0') {
            pad = '0';
            format++;
        }
        while (*format >= '0' && *format <= '9')
            width = width * 10 + *format++ - '0';
        const char *text = number;
        if (*format == 's') {
            text = va_arg(arguments, const char *);
        } else if (*format == 'u') {
            text = digits(number + sizeof number, va_arg(arguments, uint32_t), 10);
        } else if (*format == 'x') {
            text = digits(number + sizeof number, va_arg(arguments, uint32_t), 16);
        } else if (*format == 'd') {
            int value = va_arg(arguments, int);
            char *begin = digits(number + sizeof number, value < 0 ? -(uint32_t)value : (uint32_t)value, 10);
            if (value < 0)
                *--begin = '-';
            text = begin;
        } else {
            number[0] = *format == 'c' ? va_arg(arguments, int) : *format;
            number[1] = 0;
        }
        append(line, &length, sizeof line, text, sign * width, pad);
    }
    put_string(line, length);
}

void print(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vprint(format, arguments);
    va_end(arguments);
}

void *memcpy(void *to, const void *from, size_t length_bytes)
{
    void *destination = to;
    asm volatile("rep movsb" : "+D"(destination), "+S"(from), "+c"(length_bytes) : : "memory");
    return to;
}

void *memset(void *to, int byte, size_t length_bytes)
{
    void *destination = to;
    asm volatile("rep stosb" : "+D"(destination), "+c"(length_bytes) : "a"(byte) : "memory");
    return to;
}

/* Like memcpy, but the two may overlap. */
void *memmove(void *to, const void *from, size_t length_bytes)
{
    if ((uintptr_t)to - (uintptr_t)from >= length_bytes)
        return memcpy(to, from, length_bytes);
    char *last_to = (char *)to + length_bytes - 1;
    const char *last_from = (const char *)from + length_bytes - 1;
    asm volatile("std; rep movsb; cld" : "+D"(last_to), "+S"(last_from), "+c"(length_bytes) : : "memory");
    return to;
}

int memcmp(const void *a, const void *b, size_t length_bytes)
{
    const uint8_t *left = a, *right = b;
    for (; length_bytes; length_bytes--, left++, right++) {
        if (*left != *right)
            return *left - *right;
    }
    return 0;
}

int strcmp(const char *a, const char *b)
{
    while (*a && *a == *b) {
        a++;
        b++;
    }
    return (uint8_t)*a - (uint8_t)*b;
}
