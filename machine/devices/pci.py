"""PCI configuration mechanism 1 with a host bridge and an ISA bridge, as a PC of the i440FX kind shows them.

It must not know what the bridges' registers would do to memory and interrupts: they only read back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from machine.devices.device import Device

ADDRESS_PORT = 0xCF8
FIRST_DATA_PORT = 0xCFC
LAST_DATA_PORT = 0xCFF

_ENABLE = 0x8000_0000
_ADDRESS_BITS = 0x80FF_FFFC
_CONFIG_BYTES = 256


class PciFunction(Device):
    """The configuration space of one function; a mask says which bits a guest can write."""

    _saved: ClassVar[tuple[str, ...]] = ("space",)

    def __init__(self, initial: Mapping[int, bytes], writable: Mapping[int, bytes]) -> None:
        """`initial` gives values and `writable` masks by the offset of their first byte; the rest is zero."""
        self._initial = _spread(initial)
        self._writable = _spread(writable)
        self.space = bytearray(self._initial)

    def reset(self) -> None:
        """The values of power-on."""
        self.space[:] = self._initial

    def read(self, offset: int) -> int:
        """One byte."""
        return self.space[offset]

    def write(self, offset: int, value: int) -> None:
        """One byte."""
        mask = self._writable[offset]
        self.space[offset] = self.space[offset] & ~mask | value & mask


def _spread(pieces: Mapping[int, bytes]) -> bytes:
    space = bytearray(_CONFIG_BYTES)
    for offset, data in pieces.items():
        space[offset : offset + len(data)] = data
    return bytes(space)


# Offsets of the header: identity, command and status, revision and class.
_IDENTITY, _COMMAND, _CLASS = 0x00, 0x04, 0x08


def host_bridge() -> PciFunction:
    """Intel 82441FX (PMC), 8086:1237; its memory attribute registers read back what was written.

    Source: Intel 82441FX data sheet, order number 290549.
    """
    return PciFunction(
        {_IDENTITY: b"\x86\x80\x37\x12", _COMMAND: b"\x06\x00\x80\x02", _CLASS: b"\x02\x00\x00\x06"},
        {_COMMAND: b"\x40\x01", 0x0D: b"\xf8", 0x50: b"\xff" * 0x28},
    )


def isa_bridge() -> PciFunction:
    """Intel 82371SB (PIIX3), 8086:7000, the ISA bridge alone; its interrupt routing reads back what was written.

    Source: Intel 82371SB data sheet, order number 290550.
    """
    return PciFunction(
        {_IDENTITY: b"\x86\x80\x00\x70", _COMMAND: b"\x07\x00\x00\x02", _CLASS: b"\x00\x00\x01\x06", 0x60: b"\x80" * 4},
        {_COMMAND: b"\x08\x01", 0x4C: b"\xff" * 4, 0x60: b"\x8f" * 4},
    )


class Pci(Device):
    """CF8h (dwords) selects a register of a function, CFCh to CFFh read and write it; absent functions read ones."""

    _saved: ClassVar[tuple[str, ...]] = ("address", "host", "isa")

    def __init__(self) -> None:
        self.host = host_bridge()
        self.isa = isa_bridge()
        # By bus (8 bits), device (5) and function (3), as they stand in the address register from bit 8 on.
        self._functions = {0 << 3: self.host, 1 << 3: self.isa}
        self.address = 0

    def reset(self) -> None:
        """No register is selected."""
        self.address = 0
        self.host.reset()
        self.isa.reset()

    def load_port(self, port: int, size_bytes: int) -> int:
        """The address register, or 1, 2 or 4 bytes of the selected one."""
        if port < FIRST_DATA_PORT:
            return self.address
        function = self._selected()
        if function is None:
            return (1 << 8 * size_bytes) - 1
        offset = (self.address & 0xFC) + (port & 3)
        return int.from_bytes(bytes(function.read(offset + n) for n in range(size_bytes)), "little")

    def store_port(self, port: int, size_bytes: int, value: int) -> None:
        """The address register, or 1, 2 or 4 bytes of the selected one."""
        if port < FIRST_DATA_PORT:
            self.address = value & _ADDRESS_BITS
            return
        function = self._selected()
        if function is not None:
            offset = (self.address & 0xFC) + (port & 3)
            for n, byte in enumerate(value.to_bytes(size_bytes, "little")):
                function.write(offset + n, byte)

    def _selected(self) -> PciFunction | None:
        if not self.address & _ENABLE:
            return None
        return self._functions.get(self.address >> 8 & 0xFFFF)

    def describe(self) -> str:
        """The address register."""
        return f"pci: address={self.address:08x}"
