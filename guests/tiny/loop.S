/* A jump to itself, for ever, with interrupts off; something to interrupt a debugger's `continue` in. */
#include "tiny.h"

        MULTIBOOT
        PRINT   "loop\r\n"
        .globl  forever
forever:
        jmp     forever
        END
