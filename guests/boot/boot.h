/* Numbers that the parts of the boot guest share. */
#define COM1 0x3F8
#define COPY 0x9000 /* where the sectors after the first are read once more by LBA */
#define RECORD 0x8F00 /* an E820 record */
#define PROTECTED_STACK 0x7000
#define CODE32 0x08
#define DATA32 0x10
#define CR0_PE 0x00000001
