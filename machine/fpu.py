"""The port through which an engine supplies floating-point semantics, and the CPU that has no FPU.

`machine` never computes floating point itself: whoever can (an engine with the host's FPU) plugs in an `FpuPort`.

Source: SDM Vol. 3A, "Initializing the x87 FPU" and "Configuring the x87 FPU Environment".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from iced_x86 import Instruction

if TYPE_CHECKING:
    from machine.cpu import Cpu


class FpuPort(Protocol):
    """Makes x87 instructions executable; CR0.EM and CR0.TS have been checked before an operation is called."""

    @property
    def present(self) -> bool:
        """What CPUID says of the FPU."""

    def build(self, cpu: Cpu, instruction: Instruction) -> Callable[[], None]:
        """The operation of one decoded instruction; it raises GuestFault before it changes anything."""


class NoFpu:
    """No FPU answers: an escape opcode does nothing, so that FNINIT and FNSTSW find what software looks for.

    A kernel tells by storing a pattern, executing FNINIT and FNSTSW or FNSTCW, and finding the pattern unchanged; it
    then sets CR0.EM, and from there on each escape raises #NM.
    """

    present = False

    def build(self, _cpu: Cpu, _instruction: Instruction) -> Callable[[], None]:
        """An operation that does nothing."""
        return _nothing


def _nothing() -> None:
    return
