/* An integer mix without input, library or system call. */
#include "compute.h"

#define NUMBERS 128
#define SIEVED 1024
#define SIDE 10

static uint32_t numbers[NUMBERS];
static uint8_t composite[SIEVED];
static uint32_t left[SIDE][SIDE], right[SIDE][SIDE];

static uint32_t next_random(uint32_t *state)
{
    *state = *state * 1664525 + 1013904223;
    return *state >> 8;
}

/* Primes below SIEVED: byte stores. */
static uint32_t sieve(void)
{
    uint32_t count = 0;
    for (uint32_t i = 0; i < SIEVED; i++)
        composite[i] = 0;
    for (uint32_t i = 2; i < SIEVED; i++) {
        if (composite[i])
            continue;
        count++;
        for (uint32_t j = i + i; j < SIEVED; j += i)
            composite[j] = 1;
    }
    return count;
}

/* Insertion, in gaps that shrink: branches that nothing predicts. */
static void sort(void)
{
    for (uint32_t gap = NUMBERS / 2; gap; gap /= 2) {
        for (uint32_t i = gap; i < NUMBERS; i++) {
            uint32_t value = numbers[i], j = i;
            for (; j >= gap && numbers[j - gap] > value; j -= gap)
                numbers[j] = numbers[j - gap];
            numbers[j] = value;
        }
    }
}

static uint32_t crc(uint32_t crc)
{
    for (uint32_t i = 0; i < NUMBERS; i++) {
        crc ^= numbers[i];
        for (int bit = 0; bit < 8; bit++)
            crc = crc & 1 ? crc >> 1 ^ 0xEDB88320 : crc >> 1;
    }
    return crc;
}

static uint32_t multiply(void)
{
    uint32_t sum = 0;
    for (uint32_t i = 0; i < SIDE; i++) {
        for (uint32_t j = 0; j < SIDE; j++) {
            uint32_t cell = 0;
            for (uint32_t k = 0; k < SIDE; k++)
                cell += left[i][k] * right[k][j];
            sum = sum * 31 + cell;
        }
    }
    return sum;
}

uint32_t compute(uint32_t count)
{
    uint32_t sum = 0, random = 1;
    while (count--) {
        for (uint32_t i = 0; i < NUMBERS; i++)
            numbers[i] = next_random(&random);
        for (uint32_t i = 0; i < SIDE; i++) {
            for (uint32_t j = 0; j < SIDE; j++) {
                left[i][j] = next_random(&random);
                right[j][i] = next_random(&random);
            }
        }
        sort();
        sum = crc(sum ^ multiply()) + sieve();
    }
    return sum;
}
