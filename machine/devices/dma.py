"""The registers of the two 8237 DMA controllers and their page registers, which nothing here transfers with.

It must not know any device that would use DMA.
"""

from __future__ import annotations

from typing import ClassVar

from machine.devices.device import Device

FIRST_PORTS = (0x00, 0x0F)
PAGE_PORTS = (0x81, 0x8F)
SECOND_PORTS = (0xC0, 0xDF)

_COMMAND, _REQUEST, _SINGLE_MASK, _MODE, _CLEAR_FLIP_FLOP, _MASTER_CLEAR, _CLEAR_MASK, _ALL_MASKS = range(8, 16)
_ALL_MASKED = 0x0F


class DmaController(Device):
    """One 8237A: four address and four count registers behind a byte flip-flop, masks; no channel ever asks.

    Source: Intel 8237A data sheet, order number 231466.
    """

    _saved: ClassVar[tuple[str, ...]] = ("words", "high_next", "mask")

    def __init__(self) -> None:
        self.words = [0] * 8
        self.reset()

    def reset(self) -> None:
        """Master clear: all channels are masked."""
        self.high_next = False
        self.mask = _ALL_MASKED

    def power_on(self) -> None:
        """Also the addresses and counts are zero."""
        self.words[:] = [0] * 8
        self.reset()

    def read(self, register: int) -> int:
        """Registers 0 to 7 are words in two bytes; of the others only status (8) and masks (15) can be read."""
        if register < 8:
            shift = 8 * self.high_next
            self.high_next = not self.high_next
            return self.words[register] >> shift & 0xFF
        return self.mask if register == _ALL_MASKS else 0

    def write(self, register: int, value: int) -> None:
        """Any of the 16 registers."""
        if register < 8:
            shift = 8 * self.high_next
            self.high_next = not self.high_next
            self.words[register] = self.words[register] & ~(0xFF << shift) | value << shift
        elif register == _SINGLE_MASK:
            bit = 1 << (value & 3)
            self.mask = self.mask | bit if value & 4 else self.mask & ~bit
        elif register == _CLEAR_FLIP_FLOP:
            self.high_next = False
        elif register == _MASTER_CLEAR:
            self.reset()
        elif register == _CLEAR_MASK:
            self.mask = 0
        elif register == _ALL_MASKS:
            self.mask = value & _ALL_MASKED


class Dma(Device):
    """Both controllers (00h to 0Fh, and C0h to DEh, even) and the page registers 81h to 8Fh, which only read back."""

    _saved: ClassVar[tuple[str, ...]] = ("first", "second", "pages")

    def __init__(self) -> None:
        self.first = DmaController()
        self.second = DmaController()
        self.pages = bytearray(16)

    def reset(self) -> None:
        """Both controllers; pages stay."""
        self.first.reset()
        self.second.reset()

    def power_on(self) -> None:
        """Everything is zero, and masked."""
        self.first.power_on()
        self.second.power_on()
        self.pages[:] = bytes(16)

    def load_port(self, port: int, size_bytes: int) -> int:  # noqa: ARG002
        """A byte; the odd ports of the second controller are its even ones again."""
        if port >= SECOND_PORTS[0]:
            return self.second.read(port - SECOND_PORTS[0] >> 1)
        return self.pages[port & 0x0F] if port >= PAGE_PORTS[0] else self.first.read(port)

    def store_port(self, port: int, size_bytes: int, value: int) -> None:  # noqa: ARG002
        """A byte."""
        if port >= SECOND_PORTS[0]:
            self.second.write(port - SECOND_PORTS[0] >> 1, value)
        elif port >= PAGE_PORTS[0]:
            self.pages[port & 0x0F] = value
        else:
            self.first.write(port, value)
