/* The computation as a program of the host: takes counts, prints the line that the guest prints, and on standard error the
   nanoseconds of CPU time that each took. */
#define _POSIX_C_SOURCE 200809L
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "compute.h"

int main(int words, char **word)
{
    for (int i = 1; i < words; i++) {
        unsigned long rounds = strtoul(word[i], NULL, 10);
        struct timespec begin, end;
        clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &begin);
        uint32_t result = compute(rounds);
        clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &end);
        printf("compute %lu %x\n", rounds, result);
        fprintf(stderr, "%lld\n", (end.tv_sec - begin.tv_sec) * 1000000000LL + (end.tv_nsec - begin.tv_nsec));
    }
    return 0;
}
