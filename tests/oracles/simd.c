/* Runs SSE instructions on the host's CPU with exceptions unmasked, and tells what a SIGFPE leaves.

   Standard input: records of 16 bytes of code (instruction, padded with NOPs) and an FXSAVE image of 512 bytes.
   Standard output: for each, the image afterwards (288 bytes) and 4 bytes: 1 if there was a SIGFPE. */

#define _GNU_SOURCE
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

static unsigned char given[512] __attribute__((aligned(16)));
static unsigned char result[512] __attribute__((aligned(16)));
static unsigned char own[512] __attribute__((aligned(16)));
static sigjmp_buf again;

static void on_fault(int number, siginfo_t *info, void *context)
{
    ucontext_t *frame = context;
    (void)number;
    (void)info;
    memcpy(result, frame->uc_mcontext.fpregs, sizeof result);
    siglongjmp(again, 1);
}

int main(void)
{
    struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_NODEFER};
    unsigned char code[16];
    unsigned char *page = mmap(0, 4096, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    sigaction(SIGFPE, &action, 0);
    __asm__ volatile("fxsave %0" : "=m"(own));
    while (fread(code, sizeof code, 1, stdin) == 1 && fread(given, sizeof given, 1, stdin) == 1) {
        volatile uint32_t faulted = 1;
        memcpy(page, code, sizeof code);
        page[sizeof code] = 0xC3;
        if (!sigsetjmp(again, 1)) {
            /* Below the red zone: the call must not overwrite what the compiler keeps there. */
            __asm__ volatile("sub $256, %%rsp; fxrstor %1; call *%2; fxsave %0; add $256, %%rsp"
                             : "=m"(result)
                             : "m"(given), "r"(page)
                             : "rax", "memory", "cc");
            faulted = 0;
        }
        __asm__ volatile("fninit; fxrstor %0" : : "m"(own));
        fwrite(result, 288, 1, stdout);
        fwrite((const void *)&faulted, sizeof faulted, 1, stdout);
    }
    return 0;
}
