/* A triple fault in four steps: an undefined instruction, whose gate is not present (#NP, error code 33h: vector 6, in the
   IDT, while delivering an exception; QEMU leaves out that last bit), whose gate is not present either (a contributory
   fault in the delivery of another: #DF), whose gate is not present. */
#include "tiny.h"

        MULTIBOOT
        LOAD_GDT
        LOAD_IDT 32
        PRINT   "triple\r\n"
        .globl  first_fault
first_fault:
        ud2
        EXIT    $1                      /* not reached */
        END
