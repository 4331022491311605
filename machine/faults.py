"""What a guest instruction can do wrong: exceptions of the IA-32 architecture, raised as Python exceptions.

Semantics raise them before they change any guest-visible state; delivery through the IDT is not known here.

Source: SDM Vol. 3A, "Exception and Interrupt Reference".
"""

from __future__ import annotations

from enum import IntEnum


class Vector(IntEnum):
    """Exception vectors by their SDM mnemonics."""

    DE = 0
    DB = 1
    NMI = 2
    BP = 3
    OF = 4
    BR = 5
    UD = 6
    NM = 7
    DF = 8
    TS = 10
    NP = 11
    SS = 12
    GP = 13
    PF = 14
    MF = 16
    AC = 17
    MC = 18
    XM = 19


# Bits of a selector error code: the event was external to the program; the index is one of the IDT; of the LDT.
EXT = 1
IDT = 2
TI = 4

# #PF error code bits.
PF_PRESENT = 1
PF_WRITE = 2
PF_USER = 4
PF_RESERVED = 8


class GuestFault(Exception):
    """An exception of the guest's own making: a fault, unless `Vector` says trap.

    Attributes:
        vector: 0 to 31.
        error_code: 16 or 32 bits to push, or None for vectors that push none.
        return_eip: None: delivery returns to where the instruction is that raised it. Set if that one
            changed the registers for good: a task switch that failed in the new task, or an IRET that found a virtual
            interrupt pending.
    """

    __slots__ = ("error_code", "return_eip", "vector")

    def __init__(self, vector: int, error_code: int | None = None) -> None:
        self.vector = vector
        self.error_code = error_code
        self.return_eip: int | None = None

    def __str__(self) -> str:
        code = "" if self.error_code is None else f"({self.error_code:#x})"
        return f"#{Vector(self.vector).name}{code}"


class PageFault(GuestFault):
    """#PF: carries the linear address that delivery puts into CR2."""

    __slots__ = ("linear",)

    def __init__(self, linear: int, error_code: int) -> None:
        super().__init__(Vector.PF, error_code)
        self.linear = linear

    def __str__(self) -> str:
        return f"{super().__str__()} at {self.linear:#010x}"


class DebugFault(GuestFault):
    """#DB with its reasons.

    Attributes:
        conditions: the `DR6_*` bits that delivery sets.
    """

    __slots__ = ("conditions",)

    def __init__(self, conditions: int) -> None:
        super().__init__(Vector.DB)
        self.conditions = conditions


class SoftwareInterrupt(Exception):
    """INT n, INT3, INTO (with OF set) or INT1 executed: delivery returns to the instruction after it.

    Attributes:
        vector: 0 to 255.
        by_int_n: it was the two-byte form, to which the rules of virtual-8086 mode apply.
    """

    __slots__ = ("by_int_n", "vector")

    def __init__(self, vector: int, *, by_int_n: bool = False) -> None:
        self.vector = vector
        self.by_int_n = by_int_n


def invalid_opcode() -> GuestFault:
    """#UD."""
    return GuestFault(Vector.UD)


def general_protection(error_code: int = 0) -> GuestFault:
    """#GP with a selector (index, TI, IDT and EXT bits) or 0."""
    return GuestFault(Vector.GP, error_code)


def stack_fault(error_code: int = 0) -> GuestFault:
    """#SS with a selector or 0."""
    return GuestFault(Vector.SS, error_code)


def not_present(error_code: int) -> GuestFault:
    """#NP with a selector."""
    return GuestFault(Vector.NP, error_code)


def invalid_tss(error_code: int) -> GuestFault:
    """#TS with a selector."""
    return GuestFault(Vector.TS, error_code)


def device_not_available() -> GuestFault:
    """#NM."""
    return GuestFault(Vector.NM)


def divide_error() -> GuestFault:
    """#DE."""
    return GuestFault(Vector.DE)
