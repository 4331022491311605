/* Leave at once through the debug-exit port, with the first decimal number on the command line, or 21 without one. */
#include "tiny.h"

#define INFO_COMMAND_LINE 4
#define DEFAULT 21

        MULTIBOOT
        movl    $DEFAULT, %ecx
        testl   $INFO_COMMAND_LINE, (%ebx)
        jz      leave
        movl    16(%ebx), %esi          /* the command line; a number follows a space or begins it */
        movb    $' ', %ah
next:   lodsb
        testb   %al, %al
        jz      leave
        cmpb    $' ', %ah
        movb    %al, %ah
        jne     next
        leal    -'0'(%eax), %edx
        cmpb    $9, %dl
        ja      next
        xorl    %ecx, %ecx
digit:  movzbl  %dl, %edx
        imull   $10, %ecx
        addl    %edx, %ecx
        lodsb
        leal    -'0'(%eax), %edx
        cmpb    $9, %dl
        jbe     digit
leave:  PRINT   "exit\r\n"
        EXIT    %cl
        END
