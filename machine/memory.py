"""Guest physical memory: RAM in one memfd, ROM, device windows, the A20 gate, and a byte of flags for each page of RAM.

It knows addresses and bytes; paging, segmentation and who runs the guest are above it.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

PAGE_BYTES = 4096
PAGE_SHIFT = 12
PAGES_OF_4_GIB = 1 << 20
MIB = 1 << 20

# Flags of a page of RAM. A writer that finds any set goes through `PhysicalMemory.write`, which tells the observers.
HOLDS_TABLE = 1  # a page table that a cached translation depends on
HOLDS_CODE = 2  # bytes that an engine has decoded or translated
WATCHED = 4  # a physical watchpoint
READ_ONLY = 8  # ROM: writes are dropped
SECOND_HOLDS_CODE = 0x40  # as HOLDS_CODE, of an engine that stays beside another one

HOLE_FIRST = 0xA_0000  # the PC hole: VGA, option ROMs, BIOS
HOLE_LAST = 0xF_FFFF
HOLE_PAGES = HOLE_LAST + 1 - HOLE_FIRST >> PAGE_SHIFT
ROM_ALIAS_END = 1 << 32  # the BIOS ROM ends at 1 MiB and again at 4 GiB
RAM_LIMIT_BYTES = 0xE000_0000  # above it a PC keeps PCI and ROM


class MemoryDevice(Protocol):
    """A device that answers at physical addresses; `offset` counts from the start of its window."""

    def load(self, offset: int, size_bytes: int) -> int:
        """The value of `size_bytes` (1, 2 or 4) bytes at `offset`, little-endian."""

    def store(self, offset: int, size_bytes: int, value: int) -> None:
        """Write `size_bytes` (1, 2 or 4) bytes."""


# Called after a write to a flagged page: physical address, length, the bytes that stood there before, the page's flags.
WriteObserver = Callable[[int, int, bytes, int], None]


class MemorySizeError(ValueError):
    """A RAM size that no PC of ours can have."""


class PhysicalMemory:
    """The physical address space.

    Attributes:
        ram_fd: the memfd; byte N of it is physical byte N, but for the PC hole, where it has ROM and memory of devices.
        ram: its mapping.
        ram_bytes: size of RAM, a multiple of 4096, at least 1 MiB.
        page_flags: one byte of flags for each page of `ram`, and room for those of 4 GiB, so that any 32-bit address
            has one.
        map_observers: called after something else has begun to answer at some addresses.
        other_accesses: how many so far did not go to plain RAM: of devices, of nothing, and writes to flagged pages.
    """

    def __init__(self, ram_bytes: int) -> None:
        if ram_bytes % PAGE_BYTES or not MIB <= ram_bytes <= RAM_LIMIT_BYTES:
            message = f"RAM size {ram_bytes} is not a multiple of 4096 between 1 MiB and {RAM_LIMIT_BYTES >> 20} MiB"
            raise MemorySizeError(message)
        self.ram_bytes = ram_bytes
        self.ram_fd = os.memfd_create("guest-ram")
        self._close_descriptor = weakref.finalize(self, os.close, self.ram_fd)
        os.ftruncate(self.ram_fd, ram_bytes)
        self.ram = mmap.mmap(self.ram_fd, ram_bytes)
        self.ram8 = memoryview(self.ram)
        self.page_flags = bytearray(PAGES_OF_4_GIB)
        self.write_observers: list[WriteObserver] = []
        self.flag_observers: list[Callable[[int], None]] = []
        self.map_observers: list[Callable[[], None]] = []
        self.other_accesses = 0
        self._a20_mask = (1 << 64) - 1
        self._devices: list[tuple[int, int, MemoryDevice]] = []
        self._rom_first = HOLE_LAST + 1
        # By page of the PC hole: the offset in `ram` that answers, or -1; and what is so of memory of devices.
        self._hole = [-1] * HOLE_PAGES
        self._exposed = [-1] * HOLE_PAGES
        self._intercepts_devices = False
        self._lent: list[memoryview] = []

    def close(self) -> None:
        """Give the memory back to the host; the object is of no use afterwards."""
        for view in self._lent:
            view.release()
        self.ram8.release()
        self.ram.close()
        self._close_descriptor()

    def used_extents(self) -> Iterator[tuple[int, int]]:
        """The parts of `ram` that somebody has touched, each as first byte and end; the rest is a hole, and zero.

        Reading the rest would cost memory.
        """
        at = 0
        while True:
            try:
                start = os.lseek(self.ram_fd, at, os.SEEK_DATA)
            except OSError:  # ENXIO: no data behind here
                return
            at = os.lseek(self.ram_fd, start, os.SEEK_HOLE)
            yield start, at

    @property
    def a20_enabled(self) -> bool:
        """False: address line 20 is held at zero."""
        return bool(self._a20_mask & MIB)

    @a20_enabled.setter
    def a20_enabled(self, enabled: bool) -> None:
        mask = (1 << 64) - 1 if enabled else ~MIB & ((1 << 64) - 1)
        if mask != self._a20_mask:
            self._a20_mask = mask
            self._tell_mapped()

    def _tell_mapped(self) -> None:
        for observer in self.map_observers:
            observer()

    def flag_page(self, ram_page: int, flag: int) -> None:
        """Set a flag of a page; whoever caches the right to write to it is told, unless another flag forbids that."""
        before = self.page_flags[ram_page]
        self.page_flags[ram_page] = before | flag
        if not before:
            for observer in self.flag_observers:
                observer(ram_page)

    def map_device(self, first: int, length: int, device: MemoryDevice) -> None:
        """Give `length` bytes from physical `first` on to `device`; whole pages, outside RAM or in the PC hole."""
        if (first | length) % PAGE_BYTES:
            message = f"device window {first:#x}+{length:#x} is not made of whole pages"
            raise ValueError(message)
        self._devices.append((first, first + length, device))

    def lend(self, first: int, length: int) -> memoryview:
        """The bytes of `ram` at an address in the PC hole, for a device that has memory; gone when this is closed."""
        view = self.ram8[first : first + length]
        self._lent.append(view)
        return view

    def expose(self, places: Mapping[int, int]) -> None:
        """Say where in the PC hole memory of devices is plain memory now, so that no access need reach the device.

        Args:
            places: offset in `ram` by physical address, for each such page; both are addresses in the hole.
        """
        exposed = [places.get(HOLE_FIRST + (page << PAGE_SHIFT), -1) for page in range(HOLE_PAGES)]
        if exposed != self._exposed:
            self._exposed = exposed
            self._map_hole()
            if not self._intercepts_devices:
                self._tell_mapped()

    @property
    def intercepts_devices(self) -> bool:
        """True: memory of devices is never plain memory, for an engine whose VMM looks at each access to a device."""
        return self._intercepts_devices

    @intercepts_devices.setter
    def intercepts_devices(self, intercepts: bool) -> None:
        if intercepts != self._intercepts_devices:
            self._intercepts_devices = intercepts
            self._map_hole()
            self._tell_mapped()

    def _map_hole(self) -> None:
        hole = [-1] * HOLE_PAGES if self._intercepts_devices else [*self._exposed]
        first = self._rom_first - HOLE_FIRST >> PAGE_SHIFT
        hole[first:] = range(self._rom_first, HOLE_LAST + 1, PAGE_BYTES)
        self._hole = hole

    def map_rom(self, data: bytes) -> None:
        """Put a BIOS of whole pages so that it ends at 1 MiB, and at 4 GiB."""
        if len(data) % PAGE_BYTES or len(data) > 128 << 10:
            message = f"a BIOS of {len(data)} bytes: whole pages, at most 128 KiB, are needed"
            raise ValueError(message)
        first = HOLE_LAST + 1 - len(data)
        self.ram[first : HOLE_LAST + 1] = data
        for page in range(first >> PAGE_SHIFT, (HOLE_LAST + 1) >> PAGE_SHIFT):
            self.page_flags[page] = READ_ONLY
        self._rom_first = first
        self._map_hole()

    def ram_address(self, physical: int) -> int:
        """The offset in `ram` that answers at `physical`, A20 applied; -1 if a device or nothing does."""
        physical &= self._a20_mask
        if physical < HOLE_FIRST or HOLE_LAST < physical < self.ram_bytes:
            return physical
        if physical <= HOLE_LAST:
            return self._hole[physical - HOLE_FIRST >> PAGE_SHIFT] | physical & 0xFFF
        if physical < ROM_ALIAS_END and physical >= ROM_ALIAS_END - (HOLE_LAST + 1 - self._rom_first):
            return physical - (ROM_ALIAS_END - (HOLE_LAST + 1))
        return -1

    def has_device(self, physical: int) -> bool:
        """True if a device window answers at `physical`."""
        physical &= self._a20_mask
        return any(first <= physical < end for first, end, _ in self._devices)

    def load(self, physical: int, size_bytes: int) -> int:
        """Read 1, 2 or 4 bytes, little-endian; nothing there reads as ones."""
        at = self.ram_address(physical)
        if at >= 0 and at & 0xFFF <= PAGE_BYTES - size_bytes:
            return int.from_bytes(self.ram8[at : at + size_bytes], "little")
        if physical & 0xFFF > PAGE_BYTES - size_bytes:
            return int.from_bytes(self.read(physical, size_bytes), "little")
        self.other_accesses += 1
        physical &= self._a20_mask
        for first, end, device in self._devices:
            if first <= physical < end:
                return device.load(physical - first, size_bytes)
        return (1 << 8 * size_bytes) - 1

    def store(self, physical: int, size_bytes: int, value: int) -> None:
        """Write 1, 2 or 4 bytes, little-endian; where nothing is, the write is lost."""
        at = self.ram_address(physical)
        if physical & 0xFFF > PAGE_BYTES - size_bytes:
            self.write(physical, value.to_bytes(size_bytes, "little"))
        elif at >= 0:
            flags = self.page_flags[at >> PAGE_SHIFT]
            if flags:
                self._write_flagged(at, value.to_bytes(size_bytes, "little"), flags)
            else:
                self.ram8[at : at + size_bytes] = value.to_bytes(size_bytes, "little")
        else:
            self.other_accesses += 1
            physical &= self._a20_mask
            for first, end, device in self._devices:
                if first <= physical < end:
                    device.store(physical - first, size_bytes, value)
                    return

    def write_at(self, at: int, data: bytes) -> None:
        """Write bytes that lie in one page, at an offset in `ram` as `ram_address` returns it."""
        flags = self.page_flags[at >> PAGE_SHIFT]
        if flags:
            self._write_flagged(at, data, flags)
        else:
            self.ram8[at : at + len(data)] = data

    def store_entry(self, physical: int, value: int) -> None:
        """Write a paging-structure entry whose A or D bit the walker sets: no cached translation depends on those."""
        at = self.ram_address(physical)
        if at < 0:
            self.store(physical, 4, value)
            return
        flags = self.page_flags[at >> PAGE_SHIFT] & ~HOLDS_TABLE
        data = value.to_bytes(4, "little")
        if flags:
            self._write_flagged(at, data, flags)
        else:
            self.ram8[at : at + 4] = data

    def read(self, physical: int, length: int) -> bytes:
        """Read `length` bytes page by page; device bytes are read one at a time."""
        parts = []
        while length:
            count = min(length, PAGE_BYTES - (physical & 0xFFF))
            at = self.ram_address(physical)
            if at >= 0:
                parts.append(bytes(self.ram8[at : at + count]))
            else:
                parts.append(bytes(self.load(physical + i, 1) for i in range(count)))
            physical += count
            length -= count
        return b"".join(parts)

    def write(self, physical: int, data: bytes) -> None:
        """Write `data` page by page; ROM and nothing swallow it."""
        done = 0
        while done < len(data):
            count = min(len(data) - done, PAGE_BYTES - (physical & 0xFFF))
            at = self.ram_address(physical)
            chunk = data[done : done + count]
            if at < 0:
                for i, byte in enumerate(chunk):
                    self.store(physical + i, 1, byte)
            else:
                self.write_at(at, chunk)
            physical += count
            done += count

    def _write_flagged(self, at: int, data: bytes, flags: int) -> None:
        self.other_accesses += 1
        if flags & READ_ONLY:
            return
        old = bytes(self.ram8[at : at + len(data)])
        self.ram8[at : at + len(data)] = data
        for observer in self.write_observers:
            observer(at, len(data), old, flags)
