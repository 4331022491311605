"""Dispatch tables: from a guest address to the offset of its fragment, by one load without compare or flags.

4 bytes for each of 2**32 guest addresses, reserved and touched only where code is; 0, the miss stub, everywhere else.
It must not know what fragments are.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

from vmm.native import hostmemory

TABLE_BYTES = 4 << 32


@dataclass(slots=True)
class DispatchTable:
    """The table of one space.

    Attributes:
        code_base: what makes a linear address of a guest address.
        host: its address.
        entries: linear page number to the entries of that page, offsets by guest address.
    """

    code_base: int = 0
    host: int = 0
    entries: dict[int, dict[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.host = hostmemory.map_anonymous(TABLE_BYTES)
        hostmemory.use_small_pages(self.host, TABLE_BYTES)

    def close(self) -> None:
        """Give it back."""
        hostmemory.release(self.host, TABLE_BYTES)

    def set(self, eip: int, offset: int) -> None:
        """Let jumps to `eip` go to the code at `offset`."""
        ctypes.c_uint32.from_address(self.host + 4 * eip).value = offset
        self.entries.setdefault(self._page(eip), {})[eip] = offset

    def get(self, eip: int) -> int | None:
        """The offset of the code for `eip`; None without an entry."""
        page = self.entries.get(self._page(eip))
        return None if page is None else page.get(eip)

    def _page(self, eip: int) -> int:
        return (self.code_base + eip & 0xFFFF_FFFF) >> 12

    def clear_page(self, page: int) -> None:
        """Let jumps into a linear page miss."""
        for eip in self.entries.pop(page, ()):
            ctypes.c_uint32.from_address(self.host + 4 * eip).value = 0

    def clear(self) -> None:
        """Let every jump miss."""
        for page in list(self.entries):
            self.clear_page(page)
