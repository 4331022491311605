"""The port through which an engine computes floating point, and the rules about when an x87 error is told.

`machine` never computes floating point itself: whoever can (an engine with the host's FPU) plugs in an `FpuPort`.
Which instructions there are, their operands, checks and exceptions are `machine.instructions`' business.

Source: SDM Vol. 1, "x87 FPU Exception Handling in Software" and appendix "Guidelines for Writing x87 FPU Exception
Handlers" (FERR# and IGNNE#); Vol. 3A, "Configuring the x87 FPU Environment".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from iced_x86 import Instruction

from machine.faults import GuestFault, Vector
from machine.fpustate import FSW_EXCEPTIONS, FSW_INVALID, FSW_STACK_FAULT, FpuState
from machine.state import CR0_NE

if TYPE_CHECKING:
    from machine.cpu import Cpu

# Computes one instruction on the registers and operands in the page of an `FpuState`.
Computation = Callable[[], None]

# Unmasked exceptions with which a result is not stored: all but the one for a rounded result, and stack faults.
_KEEPING_RESULT = 0x1F


class FpuPort(Protocol):
    """Computes x87, MMX, SSE and SSE2 instructions."""

    @property
    def present(self) -> bool:
        """Whether it can compute anything."""

    def computation(self, instruction: Instruction) -> Computation:
        """What computes one decoded instruction on the registers in the `FpuState` that the port was made for.

        A memory operand is in the page at `OPERAND`, a general-purpose register at `GPR`, EFLAGS at `FLAGS`; there the
        results are left too. The computation must not be called for an instruction that waits for pending errors while
        the status word has ES set. With ES set by it, and an exception of the first five unmasked, the memory operand
        is not to be stored. Every SSE exception must be masked in MXCSR when it is called.

        Raises:
            ValueError: no instruction that can be computed so: a mistake of the caller's.
        """

    def close(self) -> None:
        """Give everything back to the host: no computation may be called any more."""


class NoFpu:
    """No FPU answers: of a CPU model without one, no instruction asks for a computation."""

    present = False

    def computation(self, instruction: Instruction) -> Computation:
        """Nothing can be computed."""
        raise ValueError(f"there is no FPU that could compute {instruction}")

    def close(self) -> None:
        """There is nothing to be given back."""


class FpuFrozen(GuestFault):
    """CR0.NE is clear and an x87 error is pending: the CPU stands still until an interrupt comes, as in HLT.

    It is no exception to be delivered: the instruction is tried again after the interrupt.
    """

    def __init__(self) -> None:
        super().__init__(Vector.MF)


class FpuErrorLines:
    """FERR# and IGNNE#: how a PC tells x87 errors by IRQ 13 when CR0.NE is clear.

    Attributes:
        drive_irq: told the level of IRQ 13; the board puts its own function here.
        ferr: the CPU reports an error.
        ignne: the handler has told the CPU to go on in spite of it, by a write to port F0h.
    """

    def __init__(self) -> None:
        self.drive_irq: Callable[[bool], None] = _ignore_level
        self.ferr = False
        self.ignne = False

    def reset(self) -> None:
        """Nothing pending."""
        self.ferr = self.ignne = False

    def report(self) -> None:
        """Raise FERR#, and IRQ 13 with it."""
        if not self.ferr:
            self.ferr = True
            self.drive_irq(True)

    def acknowledge(self) -> None:
        """A write to port F0h: IRQ 13 falls, and while FERR# is up the CPU ignores errors."""
        self.drive_irq(False)
        self.ignne = self.ferr

    def settle(self, fpu: FpuState) -> None:
        """The status or control word was written: without a pending error FERR# falls, and IGNNE# with it."""
        if self.ferr and not is_pending(fpu):
            self.ferr = self.ignne = False


def _ignore_level(_level: bool) -> None:
    return


def is_pending(fpu: FpuState) -> bool:
    """An unmasked x87 exception has happened and was not told yet."""
    return bool(fpu.fsw & ~fpu.fcw & FSW_EXCEPTIONS)


def tell_error(cpu: Cpu) -> bool:
    """An instruction that waits has met a pending error: raise what tells the guest of it.

    Returns:
        True: the error is to be ignored (`compute_ignoring`), because IGNNE# is up.

    Raises:
        GuestFault: #MF; `FpuFrozen` if CR0.NE is clear.
    """
    if cpu.state.cr0 & CR0_NE:
        raise GuestFault(Vector.MF)
    if cpu.fpu_error.ignne:
        return True
    cpu.fpu_error.report()
    raise FpuFrozen


def suppresses_store(fpu: FpuState) -> bool:
    """After a computation that raised an error: whether the result stays out of memory."""
    return bool(fpu.fsw & ~fpu.fcw & _KEEPING_RESULT)


def compute_ignoring(cpu: Cpu, compute: Computation) -> bool:
    """Compute in spite of a pending error, which stays pending; returns whether the result stays out of memory."""
    fpu = cpu.state.fpu
    aside = fpu.fsw & (FSW_EXCEPTIONS | FSW_STACK_FAULT)
    fpu.fsw &= ~(FSW_EXCEPTIONS | FSW_STACK_FAULT)
    compute()
    suppressed = suppresses_store(fpu)
    # The stack fault flag qualifies the invalid-operation flag: the newer one counts.
    if fpu.fsw & FSW_INVALID:
        aside &= ~FSW_STACK_FAULT
    fpu.fsw |= aside
    cpu.fpu_error.settle(fpu)
    return suppressed
