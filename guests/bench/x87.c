/* The compute kernel on the x87 stack. Its sum is of integers, so that it is the same wherever the arithmetic is right. */
#include "kernels.h"

#define BODIES 5
#define STEPS 400

struct body {
    double at[3], velocity[3], mass;
};

static struct body bodies[BODIES] __attribute__((aligned(4096)));

static double square_root(double value)
{
    double root;
    asm("fsqrt" : "=t"(root) : "0"(value));
    return root;
}

/* Let every two bodies attract each other. */
static void attract(struct body *one, struct body *other)
{
    double away[3], square = 0.01;
    for (int i = 0; i < 3; i++) {
        away[i] = one->at[i] - other->at[i];
        square += away[i] * away[i];
    }
    double pull = 0.001 / (square * square_root(square));
    for (int i = 0; i < 3; i++) {
        one->velocity[i] -= away[i] * other->mass * pull;
        other->velocity[i] += away[i] * one->mass * pull;
    }
}

/* Five bodies under gravity: chains of x87 operations, operands in memory. */
uint32_t nbody(void)
{
    for (int i = 0; i < BODIES; i++) {
        struct body start = {{i * 1.5, 2 - i * 0.75, i * 0.25}, {i * 0.015625, 0.03125, i * 0.0078125}, 1.0 / (i + 1)};
        bodies[i] = start;
    }
    for (int step = 0; step < STEPS; step++) {
        for (int i = 0; i < BODIES; i++)
            for (int j = i + 1; j < BODIES; j++)
                attract(&bodies[i], &bodies[j]);
        for (int i = 0; i < BODIES; i++)
            for (int k = 0; k < 3; k++)
                bodies[i].at[k] += bodies[i].velocity[k] * 0.0009765625;
    }
    uint32_t sum = 0;
    for (int i = 0; i < BODIES; i++)
        for (int k = 0; k < 3; k++)
            sum = sum * 31 + (uint32_t)(int32_t)(bodies[i].at[k] * 1048576);
    return sum;
}
