"""The permission maps: which I/O ports and which model-specific registers cause an exit.

They are blocks of memory as the hardware reads them; where they lie is the VMM's business.

Source: AMD64 APM Vol. 2, "I/O Permissions Map" and "MSR Permissions Map".
"""

from __future__ import annotations

from collections.abc import Iterator

IO_MAP_BYTES = 12 << 10
MSR_MAP_BYTES = 8 << 10

_MSR_RANGE = 0x2000
_MSR_BASES = (0x0000_0000, 0xC000_0000, 0xC001_0000)
_MSR_BITS_PER_RANGE = 2 * _MSR_RANGE  # 2 KiB


class IoPermissions:
    """One bit a port, set where an access is intercepted; an access of several bytes asks for the bit of each.

    Attributes:
        map: 12 KiB; the third page is there for accesses that run over port FFFFh.
    """

    __slots__ = ("map",)

    def __init__(self, *, intercept_all: bool = False) -> None:
        self.map = bytearray((b"\xff" if intercept_all else b"\0") * IO_MAP_BYTES)

    def set(self, first: int, last: int, *, intercept: bool) -> None:
        """Intercept the ports `first` to `last`, or no longer; ValueError for what is no range of ports."""
        if not 0 <= first <= last < 8 * IO_MAP_BYTES:
            raise ValueError(f"not a range of I/O ports: {first:#x} to {last:#x}")
        for port in range(first, last + 1):
            if intercept:
                self.map[port >> 3] |= 1 << (port & 7)
            else:
                self.map[port >> 3] &= ~(1 << (port & 7))

    def intercepts(self, port: int, size_bytes: int) -> bool:
        """Whether an access of 1, 2 or 4 bytes at `port` exits."""
        at = port >> 3
        bits = (self.map[at] | self.map[at + 1] << 8) >> (port & 7)
        return bool(bits & ((1 << size_bytes) - 1))

    def ranges(self) -> Iterator[tuple[int, int]]:
        """The ports that are intercepted, as first and last."""
        first: int | None = None
        for port in range(0x1_0000):
            if self.map[port >> 3] >> (port & 7) & 1:
                first = port if first is None else first
            elif first is not None:
                yield first, port - 1
                first = None
        if first is not None:
            yield first, 0xFFFF


class MsrPermissions:
    """Two bits a register, set where RDMSR (the lower bit) or WRMSR is intercepted.

    Attributes:
        map: 8 KiB, 2 for each of the ranges from 0, C0000000h and C0010000h on; what lies outside always exits.
    """

    __slots__ = ("map",)

    def __init__(self, *, intercept_all: bool = False) -> None:
        self.map = bytearray((b"\xff" if intercept_all else b"\0") * MSR_MAP_BYTES)

    @staticmethod
    def _bit(msr: int) -> int | None:
        for number, base in enumerate(_MSR_BASES):
            if base <= msr < base + _MSR_RANGE:
                return number * _MSR_BITS_PER_RANGE + 2 * (msr - base)
        return None

    def set(self, msr: int, *, read: bool, write: bool) -> None:
        """Intercept reads and writes of a register, or no longer; ValueError if the map has no bits for it."""
        bit = self._bit(msr)
        if bit is None:
            raise ValueError(f"the permission map has no bits for MSR {msr:#x}: it is always intercepted")
        kept = self.map[bit >> 3] & ~(3 << (bit & 7))
        self.map[bit >> 3] = kept | (read | write << 1) << (bit & 7)

    def intercepts(self, msr: int, *, write: bool) -> bool:
        """Whether RDMSR or WRMSR of this register exits."""
        bit = self._bit(msr)
        return bit is None or bool(self.map[bit >> 3] >> ((bit & 7) + write) & 1)
