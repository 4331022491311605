/* The compute kernels: what they share with the two programs around them, the guest (guest.c) and the native one
   (native.c), which link the same object code. */
#ifndef KERNELS_H
#define KERNELS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct kernel {
    const char *name;
    uint32_t (*run)(void); /* one unit of work; its result depends on all of it, and is the same every time */
    bool floating; /* it needs x87 and SSE2 */
};

extern const struct kernel kernels[];
extern const size_t kernel_count;

/* Those of x87.c and sse2.c. */
uint32_t nbody(void);
uint32_t mandelbrot(void);

/* The checksum of `repeats` units: each one's result is mixed into the checksum of those before it, so that none can be
   left out. */
uint32_t run_kernel(const struct kernel *kernel, uint32_t repeats);

#endif
