"""Port F0h: how the handler of IRQ 13 tells the CPU to go on after an x87 error, as in a PC/AT.

It must not know when the CPU reports an error.

Source: SDM Vol. 1, appendix "Guidelines for Writing x87 FPU Exception Handlers", "MS-DOS Compatibility Sub-mode".
"""

from __future__ import annotations

from typing import ClassVar

from machine.devices.device import Device, Line
from machine.fpu import FpuErrorLines

FIRST_PORT = 0xF0  # clears the busy latch
LAST_PORT = 0xF1  # resets a coprocessor that is a chip of its own: nothing here
IRQ = 13


class FpuErrorPort(Device):
    """The latch between FERR#, IRQ 13 and IGNNE#.

    Attributes:
        lines: the CPU's end.
    """

    _saved: ClassVar[tuple[str, ...]] = ("ferr", "ignne", "irq")

    def __init__(self, irq: Line) -> None:
        self.lines = FpuErrorLines()
        self.lines.drive_irq = self._drive
        self.irq = False
        self._irq_line = irq

    def reset(self) -> None:
        """No error."""
        self.lines.reset()
        self._drive(False)

    def _drive(self, level: bool) -> None:
        self.irq = level
        self._irq_line(level)

    @property
    def ferr(self) -> bool:
        """The CPU reports an error."""
        return self.lines.ferr

    @ferr.setter
    def ferr(self, level: bool) -> None:
        self.lines.ferr = level

    @property
    def ignne(self) -> bool:
        """The CPU is told to ignore it."""
        return self.lines.ignne

    @ignne.setter
    def ignne(self, level: bool) -> None:
        self.lines.ignne = level

    def load_port(self, port: int, size_bytes: int) -> int:  # noqa: ARG002
        """Nothing to read."""
        return 0xFF

    def store_port(self, port: int, size_bytes: int, value: int) -> None:  # noqa: ARG002
        """Any value acknowledges."""
        if port == FIRST_PORT:
            self.lines.acknowledge()

    def describe(self) -> str:
        """The two wires."""
        return f"fpu error: FERR# {'up' if self.ferr else 'down'}, IGNNE# {'up' if self.ignne else 'down'}"
