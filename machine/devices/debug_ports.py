"""Ports by which a guest talks to whoever watches it: debugcon (E9h), POST codes (80h), debug exit, ACPI power-off.

They must not know where the bytes go, nor how a run ends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from machine.devices.device import Device
from machine.lines import CpuLines, ExitKind, ExitRequest

DEBUGCON_PORT = 0xE9
POST_PORT = 0x80
DEBUG_EXIT_PORT = 0xF4
DEBUG_EXIT_PORTS = 4
POWER_PORTS = (0x604, 0xB004)

_DEBUGCON_HERE = 0xE9
_SLEEP_ENABLE = 0x2000


class Debugcon(Device):
    """Bytes written go out at once; reading answers E9h, by which guests know that it is there."""

    def __init__(self, output: Callable[[bytes], None] | None) -> None:
        self._output = output

    def load_port(self, port: int, size_bytes: int) -> int:  # noqa: ARG002
        """E9h."""
        return _DEBUGCON_HERE

    def store_port(self, port: int, size_bytes: int, value: int) -> None:  # noqa: ARG002
        """One byte of output."""
        if self._output is not None:
            self._output(bytes((value,)))


class PostPort(Device):
    """Keeps the last POST code."""

    _saved: ClassVar[tuple[str, ...]] = ("code",)

    def __init__(self) -> None:
        self.code = 0

    def reset(self) -> None:
        """Code 0."""
        self.code = 0

    def load_port(self, port: int, size_bytes: int) -> int:  # noqa: ARG002
        """The last code."""
        return self.code

    def store_port(self, port: int, size_bytes: int, value: int) -> None:  # noqa: ARG002
        """A new code."""
        self.code = value

    def describe(self) -> str:
        """The last code."""
        return f"post: {self.code:02x}"


class DebugExit(Device):
    """Writing v ends the run with status (v << 1) | 1 in eight bits, as QEMU's isa-debug-exit."""

    def __init__(self, lines: CpuLines) -> None:
        self._lines = lines

    def load_port(self, port: int, size_bytes: int) -> int:  # noqa: ARG002
        """Zero."""
        return 0

    def store_port(self, port: int, size_bytes: int, value: int) -> None:  # noqa: ARG002
        """Ask for the end."""
        self._lines.request_exit(ExitRequest(ExitKind.DEBUG_EXIT, (value << 1 | 1) & 0xFF))


class PowerControl(Device):
    """The word PM1a_CNT at 604h (PIIX4 as QEMU places it) and at B004h (older ones): SLP_EN, whatever the type, is off.

    Source: ACPI specification, "PM1 Control Registers".
    """

    _saved: ClassVar[tuple[str, ...]] = ("value",)

    def __init__(self, lines: CpuLines) -> None:
        self._lines = lines
        self.value = 0

    def reset(self) -> None:
        """Nothing is set."""
        self.value = 0

    def load_port(self, port: int, size_bytes: int) -> int:  # noqa: ARG002
        """What was written; SLP_EN reads as zero."""
        return self.value

    def store_port(self, port: int, size_bytes: int, value: int) -> None:  # noqa: ARG002
        """SLP_EN ends the run with status 0."""
        self.value = value & ~_SLEEP_ENABLE
        if value & _SLEEP_ENABLE:
            self._lines.request_exit(ExitRequest(ExitKind.POWER_OFF, 0))

    def describe(self) -> str:
        """The register."""
        return f"pm1a_cnt: {self.value:04x}"
