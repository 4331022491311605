"""Regions: what one page table, or one large page, puts into a window, and how many host mappings that takes.

It must not know who fills them, and it maps nothing itself.
"""

from __future__ import annotations

from array import array
from collections.abc import Container
from dataclasses import dataclass, field

UNMAPPED, READABLE, WRITABLE = 0, 1, 2
EDGE_MAPPINGS = 2  # at worst a region is cut off from both neighbours


@dataclass(slots=True, eq=False)
class Region:
    """A part of a window as large as one page table maps: 4 MiB, or 2 MiB with PAE.

    Attributes:
        host: where it begins in host memory.
        first_page: linear page number of its first page.
        page_count: pages in it, a power of two.
        table: offset in RAM of its page table; -1 if it has none, being a large page or without paging.
        uppers: (offset in RAM, value, bits that matter) of the entries above, top down; of a large page also its own.
        writable: R/W of the upper entries, or no write protection.
        user: U/S of the upper entries.
        dirty: of a large page: D is set.
        ram_pages: the page of RAM behind each page that is mapped.
        kinds: UNMAPPED, READABLE or WRITABLE for each page.
        mapped: how many are not UNMAPPED.
        boundaries: how often two neighbouring pages cannot be one host mapping.
        volatile: the pages that a store to the table has unmapped; they are mapped alone, for they may well go again.
        kept_out: the pages that are not mapped on a touch, as their entries change all the time.
        frames: where the owner of the windows has entered it.
        writes_since_fill: stores to its table since a page of it was last filled.
        shared_code: collections of linear page numbers, some of this region, that it depends on though not mapped here.
    """

    host: int
    first_page: int
    page_count: int
    table: int
    uppers: tuple[tuple[int, int, int], ...]
    writable: bool
    user: bool
    dirty: bool = False
    ram_pages: memoryview = field(init=False)
    kinds: bytearray = field(init=False)
    mapped: int = 0
    boundaries: int = 0
    volatile: set[int] = field(default_factory=set)
    kept_out: set[int] = field(default_factory=set)
    frames: set[int] = field(default_factory=set)
    writes_since_fill: int = 0
    shared_code: list[Container[int]] = field(default_factory=list)
    _ram_pages: bytearray = field(init=False)

    def __post_init__(self) -> None:
        self._ram_pages = bytearray(4 * self.page_count)
        self.ram_pages = memoryview(self._ram_pages).cast("I")
        self.kinds = bytearray(self.page_count)

    @property
    def entry_bytes(self) -> int:
        """Of an entry of the tables that it comes from: 4, or 8 with PAE."""
        return 4096 // self.page_count

    def shares(self, index: int) -> bool:
        """Whether it depends on a page because other windows have it."""
        return any(self.first_page + index in pages for pages in self.shared_code)

    def set_run(self, first: int, count: int, kind: int, ram_page: int = 0) -> int:
        """Record that `count` pages from index `first` on are of a kind, with consecutive pages of RAM from `ram_page`.

        Returns:
            how many host mappings more, or fewer, that may take.
        """
        kinds, last = self.kinds, first + count
        before = self._edges(first, last) + self._inside(first, last)
        if count == 1:
            self.mapped += (kind > 0) - (kinds[first] > 0)
            kinds[first] = kind
            if kind:
                self.ram_pages[first] = ram_page
        else:
            self.mapped += (count if kind else 0) - (count - kinds.count(0, first, last))
            kinds[first:last] = bytes((kind,)) * count
            if kind:
                self.ram_pages[first:last] = array("I", range(ram_page, ram_page + count))
        change = self._edges(first, last) - before
        self.boundaries += change
        return change

    def set_kind(self, first: int, count: int, kind: int) -> int:
        """Record that mapped pages change from readable to writable or back; returns as `set_run` does."""
        last = first + count
        before = self._edges(first, last) + self._inside(first, last)
        self.kinds[first:last] = bytes((kind,)) * count
        change = self._edges(first, last) + self._inside(first, last) - before
        self.boundaries += change
        return change

    def indices_of(self, ram_page: int) -> list[int]:
        """Where a page of RAM is mapped."""
        found = []
        # Among zeros, which most of it are, a search for what ends in zeros takes several times as long.
        wanted = ram_page.to_bytes(4, "little").rstrip(b"\0") or b"\0"
        at = self._ram_pages.find(wanted)
        while at >= 0:
            if not at & 3 and self.kinds[at >> 2] and self.ram_pages[at >> 2] == ram_page:
                found.append(at >> 2)
            at = self._ram_pages.find(wanted, at + 1)
        return found

    def runs(self) -> list[tuple[int, int]]:
        """First index and length of each run of pages that are mapped."""
        found = []
        kinds, at = self.kinds, 0
        while at < self.page_count:
            at += len(kinds) - at - len(kinds[at:].lstrip(b"\0"))
            if at == self.page_count:
                break
            end = kinds.find(0, at)
            end = self.page_count if end < 0 else end
            found.append((at, end - at))
            at = end
        return found

    def _is_boundary(self, at: int) -> bool:
        """Whether the pages at index `at` and before cannot be one mapping; the region's own ends do not count."""
        if not 0 < at < self.page_count:
            return False
        kind = self.kinds[at]
        return kind != self.kinds[at - 1] or (kind > 0 and self.ram_pages[at] != self.ram_pages[at - 1] + 1)

    def _edges(self, first: int, last: int) -> int:
        return self._is_boundary(first) + self._is_boundary(last)

    def _inside(self, first: int, last: int) -> int:
        if last - first == 1 or not self.boundaries or self.kinds.count(0, first, last) == last - first:
            return 0
        return sum(map(self._is_boundary, range(first + 1, last)))
