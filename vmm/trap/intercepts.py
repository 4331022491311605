"""What a VMM wants to be told: the bits of the intercept vectors in a VMCB's control area.

It knows positions and names; that an intercepted event becomes an exit is the business of whoever runs the guest.

Source: AMD64 APM Vol. 2, appendix B, table "VMCB Layout, Control Area".
"""

from __future__ import annotations

from enum import IntFlag

CR_WRITE_SHIFT = 16
"""In the vectors for CR and DR accesses: reads in bits 15:0, writes in bits 31:16."""


class Intercept3(IntFlag):
    """The doubleword at offset 00Ch."""

    INTR = 1 << 0
    NMI = 1 << 1
    SMI = 1 << 2
    INIT = 1 << 3
    VINTR = 1 << 4
    CR0_SEL_WRITE = 1 << 5
    IDTR_READ = 1 << 6
    GDTR_READ = 1 << 7
    LDTR_READ = 1 << 8
    TR_READ = 1 << 9
    IDTR_WRITE = 1 << 10
    GDTR_WRITE = 1 << 11
    LDTR_WRITE = 1 << 12
    TR_WRITE = 1 << 13
    RDTSC = 1 << 14
    RDPMC = 1 << 15
    PUSHF = 1 << 16
    POPF = 1 << 17
    CPUID = 1 << 18
    RSM = 1 << 19
    IRET = 1 << 20
    SWINT = 1 << 21
    INVD = 1 << 22
    PAUSE = 1 << 23
    HLT = 1 << 24
    INVLPG = 1 << 25
    INVLPGA = 1 << 26
    IOIO_PROT = 1 << 27
    MSR_PROT = 1 << 28
    TASK_SWITCH = 1 << 29
    FERR_FREEZE = 1 << 30
    SHUTDOWN = 1 << 31


class Intercept4(IntFlag):
    """The doubleword at offset 010h; bits 31:16 are CR write traps."""

    VMRUN = 1 << 0
    VMMCALL = 1 << 1
    VMLOAD = 1 << 2
    VMSAVE = 1 << 3
    STGI = 1 << 4
    CLGI = 1 << 5
    SKINIT = 1 << 6
    RDTSCP = 1 << 7
    ICEBP = 1 << 8
    WBINVD = 1 << 9
    MONITOR = 1 << 10
    MWAIT = 1 << 11
    MWAIT_CONDITIONAL = 1 << 12
    XSETBV = 1 << 13
    RDPRU = 1 << 14
    EFER_WRITE_TRAP = 1 << 15


class Intercept5(IntFlag):
    """The doubleword at offset 014h."""

    INVLPGB = 1 << 0
    INVLPGB_ILLEGAL = 1 << 1
    INVPCID = 1 << 2
    MCOMMIT = 1 << 3
    TLBSYNC = 1 << 4
    BUSLOCK = 1 << 5
    IDLE_HLT = 1 << 6


def names_of(cr: int, dr: int, exceptions: int, three: int, four: int, five: int) -> list[str]:
    """The names of everything that is intercepted, in the order of the control area."""
    names: list[str] = []
    for prefix, vector in (("CR", cr), ("DR", dr)):
        for access, shift in (("READ", 0), ("WRITE", CR_WRITE_SHIFT)):
            names += [f"{prefix}{n}_{access}" for n in range(16) if vector >> (shift + n) & 1]
    names += [f"EXCP{n}" for n in range(32) if exceptions >> n & 1]
    for kind, vector in ((Intercept3, three), (Intercept4, four & 0xFFFF), (Intercept5, five)):
        known = [member for member in kind.__members__.values() if vector & member]
        names += [member.name or "" for member in known]
        rest = vector & ~sum(known)
        names += [f"{kind.__name__}.bit{n}" for n in range(32) if rest >> n & 1]
    names += [f"CR{n}_WRITE_TRAP" for n in range(16) if four >> (16 + n) & 1]
    return names
