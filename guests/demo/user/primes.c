/* primes: looks for prime numbers, a few at a time, and says so when it has found the 10th, the 100th and so on. Makes
   its system calls by interrupt. */
#include <stdbool.h>

#include "user.h"

#define CANDIDATES_A_TURN 20

uint32_t primes_found, last_prime;

static bool is_prime(uint32_t n)
{
    for (uint32_t i = 2; i * i <= n; i++) {
        if (n % i == 0)
            return false;
    }
    return true;
}

static void announce(void)
{
    char line[64];
    char *end = append_text(line, "primes: number ");
    end = append_number(end, primes_found, 1);
    end = append_text(end, " is ");
    end = append_number(end, last_prime, 1);
    end = append_text(end, "\n");
    sys_write(line, end - line);
}

void primes_main(void)
{
    uint32_t pause_ticks = sys_hertz() / 5;
    uint32_t next_announced = 10;
    for (uint32_t candidate = 2;; candidate++) {
        if (is_prime(candidate)) {
            last_prime = candidate;
            if (++primes_found == next_announced) {
                announce();
                next_announced *= 10;
            }
        }
        if (candidate % CANDIDATES_A_TURN == 0)
            sys_sleep(pause_ticks);
    }
}
