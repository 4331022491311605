"""What the guest's exceptions are called and how they look to gdb's user: signals and sentences.

It knows vectors and error codes; when the guest stops for them is decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence

from gdbstub.target import Signal
from machine.debug import FaultLevel
from machine.faults import EXT, IDT, PF_PRESENT, PF_RESERVED, PF_USER, PF_WRITE, TI, Vector

EXCEPTION_TITLES = {
    Vector.DE: "divide error",
    Vector.DB: "debug exception",
    Vector.NMI: "non-maskable interrupt",
    Vector.BP: "breakpoint",
    Vector.OF: "overflow",
    Vector.BR: "bound range exceeded",
    Vector.UD: "invalid opcode",
    Vector.NM: "device not available",
    Vector.DF: "double fault",
    Vector.TS: "invalid TSS",
    Vector.NP: "segment not present",
    Vector.SS: "stack fault",
    Vector.GP: "general protection",
    Vector.PF: "page fault",
    Vector.MF: "x87 floating-point error",
    Vector.AC: "alignment check",
    Vector.MC: "machine check",
}
_SIGNALS = {
    Vector.DE: Signal.FPE,
    Vector.DB: Signal.TRAP,
    Vector.NMI: Signal.USR2,
    Vector.BP: Signal.TRAP,
    Vector.OF: Signal.TRAP,
    Vector.UD: Signal.ILL,
    Vector.NM: Signal.FPE,
    Vector.MF: Signal.FPE,
    Vector.AC: Signal.BUS,
    Vector.MC: Signal.BUS,
}
INTERRUPT_SIGNAL = Signal.USR1  # gdb stops for it unless told otherwise, which it does not for SIGALRM
TRIPLE_FAULT_SIGNAL = Signal.ABRT
_FIRST_FREE_VECTOR = 32


def signal_of_vector(vector: int) -> Signal:
    """The signal that an exception stops with: what the same mistake gives a program on a Unix system."""
    return _SIGNALS.get(Vector(vector), Signal.SEGV) if vector in EXCEPTION_TITLES else Signal.SEGV


def signal_of(level: FaultLevel) -> Signal:
    """The signal that a stop before the delivery of `level` has."""
    if level.external or level.vector >= _FIRST_FREE_VECTOR:
        return Signal.USR2 if level.vector == Vector.NMI else INTERRUPT_SIGNAL
    return signal_of_vector(level.vector)


def must_deliver(level: FaultLevel) -> bool:
    """True if the event happens whatever signal gdb passes.

    An interrupt that the CPU has accepted cannot be given back, and gdb never passes SIGTRAP.
    """
    return signal_of(level) in (Signal.TRAP, Signal.USR1, Signal.USR2)


def name_of_vector(vector: int) -> str:
    """`#PF` for an exception, else the vector in hex."""
    return f"#{Vector(vector).name}" if vector in EXCEPTION_TITLES else f"vector {vector:#04x}"


def describe_error_code(vector: int, error_code: int) -> str:
    """What the bits of an error code say.

    Source: SDM Vol. 3A, "Error Code" and "Page-Fault Exceptions".
    """
    if vector == Vector.PF:
        words = [
            "reserved bit set"
            if error_code & PF_RESERVED
            else "protection"
            if error_code & PF_PRESENT
            else "not present",
            "write" if error_code & PF_WRITE else "read",
            "user" if error_code & PF_USER else "supervisor",
        ]
        return ", ".join(words)
    if error_code & ~EXT == 0:
        return "external event" if error_code & EXT else "no selector"
    if error_code & IDT:
        table, index = "IDT vector", error_code >> 3 & 0xFF
        what = f"{table} {index:#04x}"
    else:
        what = f"selector {error_code & 0xFFF8:#06x} in the {'LDT' if error_code & TI else 'GDT'}"
    return f"{what}, external event" if error_code & EXT else what


def describe_level(level: FaultLevel) -> str:
    """One line about an exception or interrupt on its way."""
    if level.external:
        what = (
            "non-maskable interrupt"
            if level.vector == Vector.NMI
            else f"external interrupt, vector {level.vector:#04x}"
        )
    elif level.vector in EXCEPTION_TITLES:
        what = f"{name_of_vector(level.vector)} {EXCEPTION_TITLES[Vector(level.vector)]} (vector {level.vector})"
    else:
        what = (
            f"software interrupt {level.vector:#04x}"
            if level.vector >= _FIRST_FREE_VECTOR
            else f"vector {level.vector}"
        )
    parts = [f"{what} at CS:EIP {level.cs:04x}:{level.eip:08x}"]
    if level.error_code is not None:
        parts.append(f"error code {level.error_code:#06x} ({describe_error_code(level.vector, level.error_code)})")
    if level.cr2 is not None:
        parts.append(f"CR2 {level.cr2:#010x}")
    return ", ".join(parts)


def describe_catch(level: FaultLevel) -> str:
    """The text of a stop before delivery."""
    return f"About to be delivered: {describe_level(level)}.\n"


def describe_chain(chain: Sequence[FaultLevel]) -> str:
    """The text of a triple fault: each exception and what happened while it was being delivered."""
    if not chain:
        return "Triple fault: the CPU has shut down; what led to it was not told.\n"
    lines = ["Triple fault: the CPU has shut down. The exceptions that led to it, the first one first:"]
    lines += [f"  {number}. {describe_level(level)}" for number, level in enumerate(chain, 1)]
    return "\n".join(lines) + "\n"
