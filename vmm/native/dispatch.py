"""Dispatch tables: from a guest address to the offset of its fragment, by one load without compare or flags.

4 bytes for each of 2**32 guest addresses, reserved and touched only where code is; 0, the miss stub, everywhere else.
A slice of a table may be one memfd that several tables have in common. It must not know what fragments are.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass, field

from vmm.native import hostmemory

TABLE_BYTES = 4 << 32
ENTRY_BYTES = 4

Entries = dict[int, dict[int, int]]  # by linear page number: offsets by guest address


@dataclass(slots=True, eq=False)
class Slice:
    """A part of several tables: what one sets or clears, all have or miss.

    Attributes:
        first_page: number of its first page in guest addresses.
        page_count: how many pages it is for.
        entries: what was set.

    Raises:
        OSError: the process may open no more files.
    """

    first_page: int
    page_count: int
    entries: Entries = field(default_factory=dict)
    _fd: int = field(init=False)

    def __post_init__(self) -> None:
        self._fd = os.memfd_create("dispatch-slice")
        os.ftruncate(self._fd, self.length_bytes)

    @property
    def length_bytes(self) -> int:
        """Of this part of a table."""
        return ENTRY_BYTES * self.page_count << 12

    def map(self, host: int) -> None:
        """Put it into the table at `host`.

        Raises:
            HostMemoryError: the host refuses; nothing has changed.
        """
        at = host + (ENTRY_BYTES * self.first_page << 12)
        hostmemory.map_file(at, self.length_bytes, self._fd, 0, writable=True)

    def unmap(self, host: int) -> None:
        """Let the table at `host` have nothing in its place."""
        at = host + (ENTRY_BYTES * self.first_page << 12)
        hostmemory.map_anonymous(self.length_bytes, host=at)
        hostmemory.use_small_pages(at, self.length_bytes)

    def close(self) -> None:
        """No more tables will have it; when none has any more its memory is free."""
        os.close(self._fd)


@dataclass(slots=True, eq=False)
class DispatchTable:
    """The table of one space.

    Attributes:
        code_base: what makes a linear address of a guest address.
        host: its address.
        entries: what is in no slice.
        slices: by page number >> `slice_shift`; only of a table whose `code_base` is 0.
        slice_shift: log2 of the pages of a slice.
    """

    code_base: int = 0
    slice_shift: int = 10
    host: int = 0
    entries: Entries = field(default_factory=dict)
    slices: dict[int, Slice] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.host = hostmemory.map_anonymous(TABLE_BYTES)
        hostmemory.use_small_pages(self.host, TABLE_BYTES)

    def close(self) -> None:
        """Give it back."""
        hostmemory.release(self.host, TABLE_BYTES)

    def attach(self, part: Slice) -> None:
        """Have a slice; own entries in its place become entries of all who have it.

        Raises:
            HostMemoryError: the host refuses; nothing has changed.
        """
        part.map(self.host)
        self.slices[part.first_page >> self.slice_shift] = part
        behind = part.first_page + part.page_count
        for page in [page for page in self.entries if part.first_page <= page < behind]:
            for eip, offset in self.entries.pop(page).items():
                self.set(eip, offset)

    def detach(self, number: int) -> None:
        """Have the slice no more, nor anything in its place."""
        self.slices.pop(number).unmap(self.host)

    def set(self, eip: int, offset: int) -> None:
        """Let jumps to `eip` go to the code at `offset`."""
        page = self._page(eip)
        self._entries_of(page).setdefault(page, {})[eip] = offset
        ctypes.c_uint32.from_address(self.host + ENTRY_BYTES * eip).value = offset

    def get(self, eip: int) -> int | None:
        """The offset of the code for `eip`; None without an entry."""
        linear_page = self._page(eip)
        page = self._entries_of(linear_page).get(linear_page)
        return None if page is None else page.get(eip)

    def has(self, page: int) -> bool:
        """Whether there is an entry for a linear page."""
        return page in self._entries_of(page)

    def count(self) -> int:
        """How many entries it has."""
        parts = (self.entries, *(part.entries for part in self.slices.values()))
        return sum(len(page) for part in parts for page in part.values())

    def clear_page(self, page: int) -> None:
        """Let jumps into a linear page miss."""
        for eip in self._entries_of(page).pop(page, ()):
            ctypes.c_uint32.from_address(self.host + ENTRY_BYTES * eip).value = 0

    def clear(self) -> None:
        """Let every jump miss."""
        for part in (self.entries, *(part.entries for part in self.slices.values())):
            for page in list(part):
                self.clear_page(page)

    def _page(self, eip: int) -> int:
        return (self.code_base + eip & 0xFFFF_FFFF) >> 12

    def _entries_of(self, page: int) -> Entries:
        part = self.slices.get(page >> self.slice_shift) if self.slices else None
        return self.entries if part is None else part.entries
