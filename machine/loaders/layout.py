"""Where in the guest's RAM the pieces of an image go: nothing outside RAM, nothing twice.

It owns the list of writes and finds room for what has no address of its own; it must not know what the pieces mean.
"""

import bisect
from dataclasses import dataclass

from machine.e820 import CONVENTIONAL_END, EBDA, EXTENDED
from machine.loaders.errors import ImageError
from machine.memory import PhysicalMemory

PAGE_BYTES = 4096
#: Conventional memory that loaders give out: past vectors, BIOS data and boot sector, up to the EBDA.
LOW_FIRST = 0x9000
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class MemoryWrite:
    """`data` to physical address `physical`, and `zero_bytes` of zeros behind it."""

    physical: int
    data: bytes
    zero_bytes: int
    what: str

    @property
    def end(self) -> int:
        """First physical address past it, the zeros included."""
        return self.physical + len(self.data) + self.zero_bytes

    def perform(self, memory: PhysicalMemory) -> None:
        """Do it."""
        memory.write(self.physical, self.data)
        at = self.physical + len(self.data)
        while at < self.end:
            length = min(_CHUNK_BYTES, self.end - at)
            memory.write(at, bytes(length))
            at += length


class Layout:
    """The writes of one image, ascending, for a machine with `ram_bytes` of RAM."""

    def __init__(self, ram_bytes: int) -> None:
        self.ram_bytes = ram_bytes
        self._writes: list[MemoryWrite] = []

    @property
    def writes(self) -> tuple[MemoryWrite, ...]:
        """All writes by ascending address."""
        return tuple(self._writes)

    @property
    def end(self) -> int:
        """First address above 1 MiB past everything placed so far."""
        return max([EXTENDED, *(write.end for write in self._writes[-1:])])

    def check(self, physical: int, size_bytes: int, what: str) -> None:
        """Refuse a place before its bytes are even read.

        Raises:
            ImageError: not RAM, or taken.
        """
        end = physical + size_bytes
        place = f"{what} at {physical:#x} to {end - 1:#x}"
        if end > self.ram_bytes:
            raise ImageError(f"{place} does not fit into {self.ram_bytes // EXTENDED} MiB of RAM")
        if physical < EXTENDED and end > CONVENTIONAL_END:
            raise ImageError(f"{place} reaches into the video memory and ROM between 0xa0000 and 0xfffff")
        index = bisect.bisect_left(self._writes, physical, key=lambda write: write.end - 1)
        if index < len(self._writes) and self._writes[index].physical < end:
            other = self._writes[index]
            raise ImageError(f"{place} overlaps {other.what} at {other.physical:#x} to {other.end - 1:#x}")

    def put(self, physical: int, data: bytes, what: str, zero_bytes: int = 0) -> None:
        """Place `data`, and zeros behind it, at an address.

        Raises:
            ImageError: not RAM, or taken.
        """
        if not data and not zero_bytes:
            return
        self.check(physical, len(data) + zero_bytes, what)
        bisect.insort(self._writes, MemoryWrite(physical, data, zero_bytes, what), key=lambda write: write.physical)

    def find(self, size_bytes: int, what: str, *, low: bool, align: int = 4) -> int:
        """A free place of `size_bytes`: in conventional memory if `low` and there is room, else above everything.

        Raises:
            ImageError: RAM is too small.
        """
        if low:
            at = LOW_FIRST
            for write in self._writes:
                if write.end <= at:
                    continue
                if write.physical >= at + size_bytes:
                    break
                at = -(-write.end // align) * align
            if at + size_bytes <= EBDA:
                return at
        at = -(-self.end // align) * align
        self.check(at, size_bytes, what)
        return at
