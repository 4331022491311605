/* The program of ring 3: the workloads. Each checks what it does, and returns what shows that it did it. */
#include <stddef.h>
#include <stdint.h>

#include "compute.h"
#include "layout.h"

#define WORKING_SET_PAGES 16
#define PAGE_WORDS (PAGE_BYTES / sizeof(uint32_t))
#define CHURNED (USER_HEAP + 0x100000)
#define CHURNED_PAGES 64

#define INLINE static inline __attribute__((always_inline))

INLINE uint32_t call(uint32_t number, uint32_t argument)
{
    uint32_t answer;
    asm volatile("int %1" : "=a"(answer) : "i"(SYSTEM_CALL_VECTOR), "a"(number), "b"(argument) : "memory");
    return answer;
}

INLINE uint32_t fast_call(uint32_t number, uint32_t argument)
{
    uint32_t answer;
    asm volatile("movl %%esp, %%ecx\n\t"
                 "movl $1f, %%edx\n\t"
                 "sysenter\n"
                 "1:"
                 : "=a"(answer)
                 : "a"(number), "b"(argument)
                 : "ecx", "edx", "memory");
    return answer;
}

/* End everything with `where` unless `good`. */
INLINE void check(int good, uint32_t where)
{
    if (!good)
        call(CALL_FAIL, where);
}

/* Volatile: each access is to take place, and may fault. */
INLINE volatile uint32_t *working_set(uint32_t page)
{
    return (volatile uint32_t *)USER_HEAP + page % WORKING_SET_PAGES * PAGE_WORDS;
}

static void touch_working_set(void)
{
    for (uint32_t page = 0; page < WORKING_SET_PAGES; page++)
        *working_set(page) = page;
}

/* The child changes its copy of a page, and ends with what it found there and what it made of it. */
static uint32_t forkwait(uint32_t count)
{
    uint32_t sum = 0;
    touch_working_set();
    for (uint32_t i = 0; i < count; i++) {
        volatile uint32_t *word = working_set(i);
        uint32_t before = *word;
        if (call(CALL_FORK, 0) == 0) {
            *word = before + i + 1;
            call(CALL_EXIT, *word);
        }
        uint32_t status = call(CALL_WAIT, 0);
        check(status == before + i + 1, 1);
        check(*word == before, 2);
        *word = before + 1;
        sum += status;
    }
    return sum;
}

/* By both ways in turn. */
static uint32_t system_calls(uint32_t count)
{
    uint32_t right = 0, pid = call(CALL_GET_PID, 0);
    for (uint32_t left = count; left; left--)
        right += (left & 1 ? call(CALL_GET_PID, 0) : fast_call(CALL_GET_PID, 0)) == pid;
    check(right == count, 3);
    return right;
}

/* Pages come, are zero, are written and read, and go. */
static uint32_t churn_page_table(uint32_t count)
{
    uint32_t sum = 0;
    for (uint32_t i = 0; i < count; i++) {
        uint32_t linear = CHURNED + i % CHURNED_PAGES * PAGE_BYTES;
        volatile uint32_t *word = (volatile uint32_t *)linear;
        call(CALL_MAP, linear);
        check(word[0] == 0 && word[PAGE_WORDS - 1] == 0, 4);
        word[i % PAGE_WORDS] = i;
        sum += word[i % PAGE_WORDS];
        call(CALL_UNMAP, linear);
    }
    return sum;
}

static uint32_t access_ports(uint32_t count)
{
    uint32_t sum = 0;
    for (uint32_t i = 0; i < count; i++) {
        uint32_t back = call(CALL_PORTS, i & 0xFF);
        check(back == (i & 0xFF), 5);
        sum += back;
    }
    return sum;
}

/* What building a program looks like to a monitor: two children at a time, that compute, call the kernel, take memory and
   end, while their parent waits. */
static uint32_t mix(uint32_t count)
{
    uint32_t sum = 0, expected = compute(1) + churn_page_table(2) + 2;
    touch_working_set();
    for (uint32_t i = 0; i < count; i++) {
        for (uint32_t child = 0; child < 2; child++) {
            if (call(CALL_FORK, 0) != 0)
                continue;
            uint32_t result = compute(1) + churn_page_table(2);
            for (uint32_t page = 0; page < WORKING_SET_PAGES / 2; page++)
                *working_set(page + i) += child;
            fast_call(CALL_YIELD, 0);
            result += fast_call(CALL_PORTS, child);
            result += system_calls(2);
            call(CALL_EXIT, result - child);
        }
        for (uint32_t child = 0; child < 2; child++) {
            uint32_t status = call(CALL_WAIT, 0);
            check(status == expected, 6);
            sum += status;
        }
        check(*working_set(i) == i % WORKING_SET_PAGES, 7);
    }
    return sum;
}

/* In the order of main.c. */
static uint32_t (*const workloads[])(uint32_t) = {forkwait, compute, system_calls, churn_page_table, access_ports, mix};

/* Where the process begins, with both arguments on its stack and nobody to return to. */
void user_main(uint32_t workload, uint32_t count)
{
    call(CALL_EXIT, workloads[workload](count));
}
