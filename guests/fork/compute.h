/* The computation of the workloads `compute` and `mix`, the same in ring 3 and as a program of the host. */
#ifndef COMPUTE_H
#define COMPUTE_H

#include <stdint.h>

/* `count` rounds of some 20,000 instructions: a sieve, a CRC, a sort, multiplications. The result depends on all. */
uint32_t compute(uint32_t count);

#endif
