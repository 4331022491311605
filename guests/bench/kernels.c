/* Compute kernels for benchmarks: integers here (see x87.c and sse2.c), no library, no input. One unit of each takes some 200,000 to 600,000
   instructions. */
#include "kernels.h"

#define NOINLINE __attribute__((noinline))

/* Aligned, so that the guest and the program of the host find them at the same distances. */
#define PAGE_ALIGNED __attribute__((aligned(4096)))

static uint8_t bytes[65536] PAGE_ALIGNED;
static uint8_t other_bytes[65536 + 4096] PAGE_ALIGNED;
static uint32_t words[16384] PAGE_ALIGNED;

/* A linear congruential generator: the same numbers everywhere. */
static uint32_t next_random(uint32_t *state)
{
    *state = *state * 1664525 + 1013904223;
    return *state >> 8;
}

/* Text-like bytes: few different ones, and repetitions of what came before. */
static void fill_bytes(uint8_t *to, uint32_t count)
{
    uint32_t state = 1;
    for (uint32_t i = 0; i < count;) {
        uint32_t random = next_random(&state);
        if (i > 64 && (random & 3) != 0) {
            uint32_t length = 4 + (random >> 2 & 15), distance = 1 + (random >> 8 & 63);
            for (; length && i < count; length--, i++)
                to[i] = to[i - distance];
        } else {
            to[i++] = 'a' + random % 26;
        }
    }
}

/* Primes below 32768, by the sieve of Eratosthenes: byte stores with large strides. */
static uint32_t sieve(void)
{
    uint32_t count = 0, sum = 0;
    for (uint32_t i = 0; i < 32768; i++)
        bytes[i] = 1;
    for (uint32_t i = 2; i < 32768; i++) {
        if (!bytes[i])
            continue;
        count++;
        sum += i;
        for (uint32_t j = i + i; j < 32768; j += i)
            bytes[j] = 0;
    }
    return count << 20 ^ sum;
}

/* CRC-32 of 32 KiB by a table: a chain of dependent loads. */
static uint32_t crc32(void)
{
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t value = i;
        for (int bit = 0; bit < 8; bit++)
            value = value & 1 ? value >> 1 ^ 0xEDB88320 : value >> 1;
        words[i] = value;
    }
    for (uint32_t i = 0; i < 32768; i++)
        bytes[i] = i * 7 + (i >> 8);
    uint32_t crc = 0xFFFFFFFF;
    for (uint32_t i = 0; i < 32768; i++)
        crc = words[(crc ^ bytes[i]) & 0xFF] ^ crc >> 8;
    return ~crc;
}

/* Calls and returns and little else. The attributes keep the compiler from unrolling the recursion. */
NOINLINE __attribute__((optimize("no-optimize-sibling-calls"))) static uint32_t fibonacci(uint32_t n)
{
    return n < 2 ? n : fibonacci(n - 1) + fibonacci(n - 2);
}

static uint32_t fib(void)
{
    return fibonacci(20);
}

/* The product of two matrices of 32 by 32 numbers: a tight loop of multiplications. */
static uint32_t matrix(void)
{
    uint32_t *a = words, *b = words + 1024, *product = words + 2048;
    uint32_t state = 2, sum = 0;
    for (uint32_t i = 0; i < 2048; i++)
        words[i] = next_random(&state);
    for (uint32_t row = 0; row < 32; row++) {
        for (uint32_t column = 0; column < 32; column++) {
            uint32_t cell = 0;
            for (uint32_t i = 0; i < 32; i++)
                cell += a[row * 32 + i] * b[i * 32 + column];
            product[row * 32 + column] = cell;
            sum = sum * 31 + cell;
        }
    }
    return sum;
}

static void copy(void *to, const void *from, uint32_t length)
{
    asm volatile("rep movsl" : "+D"(to), "+S"(from), "+c"((uint32_t){length / 4}) : : "memory");
}

/* How many bytes of `text` come before the first `byte`, by REPNE SCASB. There must be one. */
static uint32_t scan(const uint8_t *text, uint8_t byte)
{
    const uint8_t *end = text;
    uint32_t left = 0xFFFFFFFF;
    asm volatile("repne scasb" : "+D"(end), "+c"(left) : "a"(byte) : "cc", "memory");
    return end - text - 1;
}

/* Copies of many sizes, and scans for the ends of strings: the string instructions. */
static uint32_t memory(void)
{
    uint32_t sum = 0;
    fill_bytes(bytes, 8192);
    for (uint32_t i = 63; i < 8192; i += 64)
        bytes[i] = 0;
    for (uint32_t size = 4; size <= 8192; size *= 2) {
        for (uint32_t at = 0; at + size <= 32768; at += 8192)
            copy(other_bytes + at, bytes, size);
    }
    for (uint32_t round = 0; round < 64; round++) {
        copy(other_bytes + 64 * round, bytes, 8192);
        for (uint32_t at = 0; at < 8192; at += scan(bytes + at, 0) + 1)
            sum = sum * 31 + bytes[at];
    }
    for (uint32_t i = 0; i < 8192; i++)
        sum = sum * 31 + other_bytes[i];
    return sum;
}

#define OPERATION(name, expression) \
    NOINLINE static uint32_t name(uint32_t value) { return expression; }
OPERATION(op_add, value + 0x9E3779B9)
OPERATION(op_rotate, value << 7 | value >> 25)
OPERATION(op_xor, value ^ value >> 15)
OPERATION(op_multiply, value * 0x85EBCA6B)
OPERATION(op_subtract, value - (value << 3))
OPERATION(op_swap, (value >> 16 | value << 16) + 1)
OPERATION(op_or, value + (value | 0x10101))
OPERATION(op_not, ~value + 3)

static uint32_t (*const operations[8])(uint32_t) = {
    op_add, op_rotate, op_xor, op_multiply, op_subtract, op_swap, op_or, op_not,
};

/* 32,768 calls through a table, by the value that the call before returned: nothing can predict them. */
static uint32_t calls(void)
{
    uint32_t value = 12345;
    for (uint32_t i = 0; i < 32768; i++)
        value = operations[(value ^ i) & 7](value);
    return value;
}

static void swap_words(uint32_t *a, uint32_t *b)
{
    uint32_t kept = *a;
    *a = *b;
    *b = kept;
}

/* Quicksort of array[first..last], then of the smaller part by recursion and of the larger by going round. */
NOINLINE static void quicksort(uint32_t *array, int first, int last)
{
    while (first < last) {
        uint32_t pivot = array[(first + last) / 2];
        int low = first, high = last;
        while (low <= high) {
            while (array[low] < pivot)
                low++;
            while (array[high] > pivot)
                high--;
            if (low <= high)
                swap_words(&array[low++], &array[high--]);
        }
        if (high - first < last - low) {
            quicksort(array, first, high);
            first = low;
        } else {
            quicksort(array, low, last);
            last = high;
        }
    }
}

/* Sorts 2048 numbers: branches that go either way. */
static uint32_t sort(void)
{
    uint32_t state = 3, sum = 0;
    for (uint32_t i = 0; i < 2048; i++)
        words[i] = next_random(&state);
    quicksort(words, 0, 2047);
    for (uint32_t i = 0; i < 2048; i++)
        sum = sum * 31 + words[i];
    return sum;
}

/* Compress `count` bytes at `from`: the output is literal bytes (0, byte) and references (length, distance), found by
   a hash of three bytes. Returns its length, at most 2 * count. */
static uint32_t compress(uint8_t *to, const uint8_t *from, uint32_t count)
{
    uint32_t *last_seen = words; /* where a hash was seen last, plus one; 1024 entries */
    uint32_t out = 0;
    for (uint32_t i = 0; i < 1024; i++)
        last_seen[i] = 0;
    for (uint32_t i = 0; i < count;) {
        uint32_t length = 0, distance = 0;
        if (i + 3 <= count) {
            uint32_t hash = (from[i] ^ from[i + 1] << 4 ^ from[i + 2] << 7) & 1023;
            uint32_t seen = last_seen[hash];
            last_seen[hash] = i + 1;
            distance = i + 1 - seen;
            if (seen && distance < 256) {
                while (length < 255 && i + length < count && from[i + length] == from[i + length - distance])
                    length++;
            }
        }
        if (length >= 3) {
            to[out++] = length;
            to[out++] = distance;
            i += length;
        } else {
            to[out++] = 0;
            to[out++] = from[i++];
        }
    }
    return out;
}

/* Undo `compress`. Returns the length of what comes out. */
static uint32_t decompress(uint8_t *to, const uint8_t *from, uint32_t count)
{
    uint32_t out = 0;
    for (uint32_t i = 0; i < count; i += 2) {
        if (from[i] == 0) {
            to[out++] = from[i + 1];
            continue;
        }
        for (uint32_t left = from[i]; left; left--, out++)
            to[out] = to[out - from[i + 1]];
    }
    return out;
}

/* Compresses 8 KiB of text and takes them apart again: short loops of unpredictable length. */
static uint32_t lz(void)
{
    uint8_t *text = bytes, *back = bytes + 16384;
    fill_bytes(text, 8192);
    uint32_t compressed = compress(other_bytes, text, 8192);
    uint32_t length = decompress(back, other_bytes, compressed);
    uint32_t sum = compressed << 16 ^ length;
    for (uint32_t i = 0; i < length; i++)
        sum = sum * 31 + (back[i] ^ text[i] << 8);
    return sum;
}

const struct kernel kernels[] = {
    {"sieve", sieve, false}, {"crc32", crc32, false}, {"fib", fib, false}, {"matrix", matrix, false},
    {"memory", memory, false}, {"calls", calls, false}, {"sort", sort, false}, {"lz", lz, false},
    {"nbody", nbody, true}, {"mandelbrot", mandelbrot, true},
};
const size_t kernel_count = sizeof kernels / sizeof kernels[0];

uint32_t run_kernel(const struct kernel *kernel, uint32_t repeats)
{
    uint32_t checksum = 0;
    for (uint32_t i = 0; i < repeats; i++)
        checksum = checksum * 31 + kernel->run();
    return checksum;
}
