/* The kernels as a program of the host: the same words as arguments, the same lines on standard output, and on standard
   error the nanoseconds that each took. */
#define _POSIX_C_SOURCE 200809L
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "kernels.h"

static void run(const struct kernel *kernel, unsigned long repeats)
{
    struct timespec begin, end;
    clock_gettime(CLOCK_MONOTONIC, &begin);
    uint32_t checksum = run_kernel(kernel, repeats);
    clock_gettime(CLOCK_MONOTONIC, &end);
    printf("%s %lu %08x\n", kernel->name, repeats, checksum);
    fprintf(stderr, "%s %lld\n", kernel->name,
            (end.tv_sec - begin.tv_sec) * 1000000000LL + (end.tv_nsec - begin.tv_nsec));
}

int main(int count, char **words)
{
    for (int i = 1; i < count; i++) {
        size_t length = strcspn(words[i], "=");
        size_t which = 0;
        while (which < kernel_count
               && (strlen(kernels[which].name) != length || memcmp(kernels[which].name, words[i], length) != 0))
            which++;
        if (which == kernel_count) {
            fprintf(stderr, "no kernel %s\n", words[i]);
            return 2;
        }
        run(&kernels[which], words[i][length] ? strtoul(words[i] + length + 1, NULL, 10) : 1);
    }
    for (size_t i = 0; count == 1 && i < kernel_count; i++)
        run(&kernels[i], 1);
    return 0;
}
