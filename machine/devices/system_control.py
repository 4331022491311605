"""The odd ports of a PC's board: A20 and fast reset (92h), speaker and refresh (61h), the chipset's reset (CF9h).

It must not know what A20 masks, nor how a reset is done.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from machine.devices.device import Device, Line
from machine.devices.pit import Pit

PORT_A = 0x92
PORT_B = 0x61
RESET_PORT = 0xCF9

_A_FAST_RESET = 0x01
_A_A20 = 0x02

_B_GATE2 = 0x01
_B_WRITABLE = 0x0F
_B_REFRESH = 0x10
_B_OUT2 = 0x20

_RESET_SYSTEM = 0x02
_RESET_CPU = 0x04


class A20Gate(Device):
    """Address line 20: the keyboard controller and port 92h write the same state, and both read it back."""

    _saved: ClassVar[tuple[str, ...]] = ("enabled",)

    def __init__(self, drive: Line) -> None:
        self._drive = drive
        self.reset()

    def reset(self) -> None:
        """The line is free, as the CPU needs it to fetch its first instruction."""
        self.set_enabled(True)

    def set_enabled(self, enabled: bool) -> None:
        """Free the line, or hold it at zero."""
        self.enabled = enabled
        self._drive(enabled)

    def restore(self, state: dict[str, object]) -> None:
        """Take the state and drive the line."""
        super().restore(state)
        self._drive(self.enabled)

    def describe(self) -> str:
        """One line."""
        return f"a20: {'enabled' if self.enabled else 'masked'}"


class PortA(Device):
    """System control port A (92h): bit 1 is A20, a rise of bit 0 resets the CPU."""

    _saved: ClassVar[tuple[str, ...]] = ("value",)

    def __init__(self, a20: A20Gate, request_reset: Callable[[], None]) -> None:
        self._a20 = a20
        self._request_reset = request_reset
        self.reset()

    def reset(self) -> None:
        """Bit 0 is down."""
        self.value = 0

    def load_port(self, port: int, size_bytes: int) -> int:  # noqa: ARG002
        """What was written, with A20 as it is."""
        return self.value & ~_A_A20 | (_A_A20 if self._a20.enabled else 0)

    def store_port(self, port: int, size_bytes: int, value: int) -> None:  # noqa: ARG002
        """A20 and fast reset."""
        before, self.value = self.value, value
        self._a20.set_enabled(bool(value & _A_A20))
        if value & ~before & _A_FAST_RESET:
            self._request_reset()

    def describe(self) -> str:
        """One line."""
        return f"port 92h: {self.value:02x}"


class PortB(Device):
    """System control port B (61h): the gate of timer channel 2 and its output, the speaker, the refresh toggle.

    There is no parity to fail and no I/O channel check: bits 6 and 7 are zero.
    """

    _saved: ClassVar[tuple[str, ...]] = ("value",)

    def __init__(self, pit: Pit) -> None:
        self._pit = pit
        self.value = 0

    def reset(self) -> None:
        """Speaker and gate are off."""
        self.value = 0
        self._pit.set_gate2(False)

    def load_port(self, port: int, size_bytes: int) -> int:  # noqa: ARG002
        """What was written, the refresh toggle and OUT of channel 2."""
        value = self.value
        if self._pit.refresh:
            value |= _B_REFRESH
        if self._pit.output2:
            value |= _B_OUT2
        return value

    def store_port(self, port: int, size_bytes: int, value: int) -> None:  # noqa: ARG002
        """Gate, speaker and the two checks that never fail."""
        self.value = value & _B_WRITABLE
        self._pit.set_gate2(bool(value & _B_GATE2))

    def describe(self) -> str:
        """One line."""
        return f"port 61h: {self.load_port(PORT_B, 1):02x}"


class ResetControl(Device):
    """The chipset's reset control register (CF9h): a rise of bit 2 resets.

    Source: 82371SB (PIIX3), "RC - Reset Control Register".
    """

    _saved: ClassVar[tuple[str, ...]] = ("value",)

    def __init__(self, request_reset: Callable[[], None]) -> None:
        self._request_reset = request_reset
        self.value = 0

    def reset(self) -> None:
        """Both bits are down."""
        self.value = 0

    def load_port(self, port: int, size_bytes: int) -> int:  # noqa: ARG002
        """The register."""
        return self.value

    def store_port(self, port: int, size_bytes: int, value: int) -> None:  # noqa: ARG002
        """Bit 1 chooses the kind of reset, all one here; bit 2 does it."""
        before, self.value = self.value, value & (_RESET_SYSTEM | _RESET_CPU)
        if value & ~before & _RESET_CPU:
            self._request_reset()

    def describe(self) -> str:
        """One line."""
        return f"port cf9h: {self.value:02x}"
