/* The compute kernel in SSE2 registers, which needs CR4.OSFXSR. */
#include "kernels.h"

#define COLUMNS 40
#define ROWS 24
#define MOST_ITERATIONS 100

/* The Mandelbrot set, coarsely: everything in SSE2 registers, branches that are hard to foresee. */
uint32_t mandelbrot(void)
{
    uint32_t sum = 0;
    for (int row = 0; row < ROWS; row++)
        for (int column = 0; column < COLUMNS; column++) {
            double real = column * (3.0 / COLUMNS) - 2.125, imaginary = row * (2.5 / ROWS) - 1.25;
            double x = 0, y = 0;
            int count = 0;
            for (; count < MOST_ITERATIONS; count++) {
                double xx = x * x, yy = y * y;
                if (xx + yy > 4)
                    break;
                y = 2 * x * y + imaginary;
                x = xx - yy + real;
            }
            sum = sum * 31 + count;
        }
    return sum;
}
