"""Filling of windows: which pages are mapped when the guest touches one, and with which rights.

Around a touched page it maps what the guest has touched before, so that no A or D bit is set that the guest's own
accesses would not set; for writing only if D is set and nobody watches the page of RAM. It must not know which window
is in use, nor who runs in it.
"""

from __future__ import annotations

from enum import IntEnum

from machine.faults import PageFault
from machine.memory import HOLDS_TABLE, HOLE_FIRST, HOLE_LAST, MIB, PAGE_SHIFT, PhysicalMemory
from machine.paging import ACCESSED, DIRTY, PAE_ADDRESS, PAE_RESERVED, PS, RW, US, P, entries, walk
from vmm.native import hostmemory
from vmm.native.regions import READABLE, WRITABLE, Region
from vmm.native.shadows import HOLDS_SHADOWED_TABLE, PROTECT_KEY, Shadows, Window

AROUND_PAGES = 8  # how far scattered neighbours are looked for

_TABLE_FLAGS = HOLDS_TABLE | HOLDS_SHADOWED_TABLE
_TOUCHED = P | ACCESSED
# What matters of an entry above the page tables; bits that are free to software, PWT and PCD do not.
_UPPER_BITS = P | RW | US | ACCESSED | PS | PAE_ADDRESS | PAE_RESERVED
_PDPTE_BITS = (1 << 64) - 1 & ~0xE18
_HOLE_PAGE = HOLE_FIRST >> PAGE_SHIFT
_FIRST_PAGE_AFTER_HOLE = HOLE_LAST + 1 >> PAGE_SHIFT
_MIB_PAGES = MIB >> PAGE_SHIFT


class Refusal(IntEnum):
    """Why `Windows.fill` mapped nothing."""

    NONE = 0
    PAGE_FAULT = 1  # of the guest's own
    DEVICE = 2  # no RAM is there, or the tables are not in RAM
    TRACE = 3  # a write to a page that somebody watches, or to ROM
    SPURIOUS = 4  # the page was mapped for this access already
    TABLE = 5  # a write to a page with page tables and nothing else that is watched
    VOLATILE = 6  # the page is kept out, as its entry changes all the time


class Filler:
    """Maps pages into the windows of one machine.

    Attributes:
        refusal: why the last `fill` returned False.
        counters: what happened since the start.
    """

    def __init__(self, memory: PhysicalMemory, shadows: Shadows) -> None:
        self._memory = memory
        self._flags = memory.page_flags
        self._shadows = shadows
        self.refusal = Refusal.NONE
        self.counters = {"hidden faults": 0, "trace faults": 0, "device faults": 0}

    def fill(self, window: Window, linear: int, *, write: bool, insists: bool = True) -> bool:
        """Map the page at `linear`, as an access of the guest demands it; False if `refusal` says why not.

        A volatile page is mapped only for who `insists`.

        Raises:
            HostMemoryError: the host refuses a mapping; what is mapped is on the books.
        """
        region = window.regions.get(linear >> window.region_shift)
        touched_before = is_known = True
        if region is None:
            is_known = False
            region, touched_before = self._open(window, linear, write=write)
            if region is None:
                return False
        region.writes_since_fill = 0
        if region.table >= 0:
            refusal = self._fill_page(window, region, linear, write, touched_before, insists=insists)
        else:
            refusal = self._fill_large(window, region, linear, write)
        self.refusal = refusal
        if refusal:
            if not is_known and not region.mapped and window.regions.get(linear >> window.region_shift) is region:
                self._shadows.forget(window, region)
            if refusal in (Refusal.TRACE, Refusal.TABLE):
                self.counters["trace faults"] += 1
            elif refusal is Refusal.DEVICE:
                self.counters["device faults"] += 1
            return False
        window.fills += 1
        self.counters["hidden faults"] += 1
        return True

    def prefill(self, window: Window, region: Region, at: int) -> bool:
        """Map the page of the entry at RAM offset `at` of a region's page table, if the guest has touched it before.

        Raises:
            HostMemoryError: the host refuses.
        """
        index = (at - region.table) // region.entry_bytes
        if region.kinds[index] or self._shadows.withheld:
            return False
        if self._shadows.entry_at(region, at) & _TOUCHED != _TOUCHED:
            return False
        return not self._fill_page(window, region, region.first_page + index << PAGE_SHIFT, False, False)

    def _open(self, window: Window, linear: int, *, write: bool) -> tuple[Region | None, bool]:
        """Begin a region: walk its upper entries, which are watched from then on.

        Returns:
            The region, or None if `refusal` says why not; whether the walk found all A and D bits set.
        """
        memory, paging = self._memory, window.paging
        before = list(entries(memory, paging, linear)) if window.key else []
        try:
            walk(memory, paging, linear, write=write, user=window.user)
        except PageFault:
            self.refusal = Refusal.PAGE_FAULT
            return None, False
        path = list(entries(memory, paging, linear)) if window.key else []
        places = [memory.ram_address(entry.physical) for entry in path]
        if -1 in places:
            self.refusal = Refusal.DEVICE
            self.counters["device faults"] += 1
            return None, False
        rights = RW | US
        for entry in path[:-1] if path and path[-1].level == "PTE" else path:
            if entry.level != "PDPTE":
                rights &= entry.value
        number = linear >> window.region_shift
        first = number << window.region_shift
        table, dirty = -1, True
        uppers = []
        for at, entry in zip(places, path, strict=True):
            if entry.level == "PTE":
                table = at & ~0xFFF
                break
            bits = _PDPTE_BITS if entry.level == "PDPTE" else _UPPER_BITS
            uppers.append((at, entry.value & bits, bits))
            dirty = bool(entry.value & DIRTY)
        region = Region(
            window.host + first,
            first >> PAGE_SHIFT,
            1 << window.region_shift - PAGE_SHIFT,
            table,
            tuple(uppers),
            bool(rights & RW) or not (window.key & PROTECT_KEY),
            bool(rights & US),
            dirty,
        )
        self._shadows.begin(window, region)
        return region, path == before

    def open_like(self, window: Window, known: Region) -> bool:
        """Begin a region like one of another window, if the entry above its page table says the same.

        Returns:
            Whether it does; no A bit is set, for it has it, and nothing is mapped.
        """
        first = known.first_page << PAGE_SHIFT
        region = window.regions.get(first >> window.region_shift)
        if region is not None:
            return region.uppers[-1][1] == known.uppers[-1][1]
        memory = self._memory
        uppers: list[tuple[int, int, int]] = []
        dirty = True
        for entry, (_, value, bits) in zip(entries(memory, window.paging, first), known.uppers, strict=False):
            at = memory.ram_address(entry.physical)
            if at < 0 or entry.reserved or not entry.value & P:
                return False
            if entry.value & bits != value and entry.level != "PDPTE":  # which has no rights
                return False
            uppers.append((at, entry.value & bits, bits))
            dirty = bool(entry.value & DIRTY)
        region = Region(
            window.host + first,
            known.first_page,
            known.page_count,
            known.table,
            tuple(uppers),
            known.writable,
            known.user,
            dirty,
        )
        self._shadows.begin(window, region)
        return True

    def _fill_page(
        self,
        window: Window,
        region: Region,
        linear: int,
        write: bool,
        touched_before: bool,
        *,
        insists: bool = True,
    ) -> Refusal:
        """Map the page that the page table has for `linear`."""
        index = (linear >> PAGE_SHIFT) - region.first_page
        cells, base = (
            (self._shadows.cells64, region.table >> 3)
            if region.entry_bytes == 8
            else (self._shadows.cells32, region.table >> 2)
        )
        entry = cells[base + index]
        if not entry & P or entry & PAE_RESERVED or (window.user and not (region.user and entry & US)):
            return Refusal.PAGE_FAULT
        writable = region.writable and bool(entry & RW or not window.key & PROTECT_KEY)
        if write and not writable:
            return Refusal.PAGE_FAULT
        at = self._memory.ram_address(entry & PAE_ADDRESS)
        if at < 0:
            return Refusal.DEVICE
        ram_page = at >> PAGE_SHIFT
        watched = self._flags[ram_page]
        if write and watched:
            return Refusal.TRACE if watched & ~_TABLE_FLAGS else Refusal.TABLE
        if index in region.kept_out and self._shadows.stays_out(region, index, entry, insists=insists):
            return Refusal.VOLATILE
        wanted = entry | (ACCESSED | DIRTY if write else ACCESSED)
        kind = WRITABLE if writable and wanted & DIRTY and not watched else READABLE
        old = region.kinds[index]
        if old >= kind:
            return Refusal.SPURIOUS
        if wanted != entry:
            if self._flags[region.table >> PAGE_SHIFT] & ~_TABLE_FLAGS:
                self._memory.store_entry(region.table + index * region.entry_bytes, wanted & 0xFFFF_FFFF)
            else:
                cells[base + index] = wanted
        if old:
            self._shadows.change_rights(window, region, index, 1, kind)
            return Refusal.NONE
        first, count = index, 1
        around = touched_before and wanted == entry and not watched and index not in region.volatile
        around = around and self._memory.a20_enabled
        if around:
            first, count = self._extent(region, cells, base, index, ram_page, kind)
        self._shadows.map(window, region, first, count, kind, ram_page - (index - first))
        if around and count == 1:
            self._map_neighbours(window, region, cells, base, index)
        return Refusal.NONE

    def _extent(
        self, region: Region, cells: memoryview, base: int, index: int, ram_page: int, kind: int
    ) -> tuple[int, int]:
        """First index and length of the run around a page, whose entries say the same but for consecutive addresses."""
        if ram_page < _HOLE_PAGE:
            below, above = ram_page, _HOLE_PAGE - 1 - ram_page
        elif ram_page < _FIRST_PAGE_AFTER_HOLE:
            return index, 1
        else:
            below, above = ram_page - _FIRST_PAGE_AFTER_HOLE, (self._memory.ram_bytes >> PAGE_SHIFT) - 1 - ram_page
        kinds, flags = region.kinds, self._flags
        free = kinds[index + 1 : index + 1 + above]
        above = len(free) - len(free.lstrip(b"\0"))
        free = kinds[max(0, index - below) : index]
        below = len(free) - len(free.rstrip(b"\0"))
        above = _run_length(cells, base + index, 1, above)
        below = _run_length(cells, base + index, -1, below)
        for at in region.kept_out:
            if index < at <= index + above:
                above = at - 1 - index
            elif index - below <= at < index:
                below = index - 1 - at
        if kind == WRITABLE:
            free = flags[ram_page + 1 : ram_page + 1 + above]
            above = len(free) - len(free.lstrip(b"\0"))
            free = flags[ram_page - below : ram_page]
            below = len(free) - len(free.rstrip(b"\0"))
        return index - below, below + 1 + above

    def _map_neighbours(self, window: Window, region: Region, cells: memoryview, base: int, index: int) -> None:
        """Map what the guest has touched of the pages beside one, wherever they are in RAM."""
        first = index & -AROUND_PAGES
        for at, entry in enumerate(cells[base + first : base + first + AROUND_PAGES].tolist(), first):
            if entry & _TOUCHED != _TOUCHED or region.kinds[at] or entry & PAE_RESERVED or at in region.kept_out:
                continue
            if window.user and not entry & US:
                continue
            ram_page = self._memory.ram_address(entry & PAE_ADDRESS) >> PAGE_SHIFT
            if ram_page < 0:
                continue
            writable = region.writable and (entry & RW or not window.key & PROTECT_KEY)
            kind = WRITABLE if writable and entry & DIRTY and not self._flags[ram_page] else READABLE
            self._shadows.map(window, region, at, 1, kind, ram_page)

    def _fill_large(self, window: Window, region: Region, linear: int, write: bool) -> Refusal:
        """Map all of a large page, or of 4 MiB without paging."""
        index = (linear >> PAGE_SHIFT) - region.first_page
        if window.user and not region.user:
            return Refusal.PAGE_FAULT
        if write and not region.writable:
            return Refusal.PAGE_FAULT
        fresh = not region.mapped
        if fresh:
            self._map_large(window, region)
        old = region.kinds[index]
        if not old:
            return Refusal.DEVICE
        if not write:
            return Refusal.NONE if fresh else Refusal.SPURIOUS
        if old == WRITABLE:
            return Refusal.NONE if fresh else Refusal.SPURIOUS
        watched = self._flags[region.ram_pages[index]]
        if watched:
            return Refusal.TRACE if watched & ~_TABLE_FLAGS else Refusal.TABLE
        if region.dirty:
            self._shadows.change_rights(window, region, index, 1, WRITABLE)
            return Refusal.NONE
        walk(self._memory, window.paging, linear, write=True, user=window.user)
        region.dirty = True
        for first, count in region.runs():
            self._grant(window, region, first, count)
        return Refusal.NONE

    def _map_large(self, window: Window, region: Region) -> None:
        """Map what is RAM of a large page; pages that are watched stay read-only."""
        if region.uppers:
            at, _, _ = region.uppers[-1]
            physical = self._shadows.entry_at(region, at) & PAE_ADDRESS & -(1 << window.region_shift)
        else:
            physical = region.first_page << PAGE_SHIFT
        kind = WRITABLE if region.writable and region.dirty else READABLE
        try:
            for first, ram_page, count in _pieces(self._memory, physical, region.page_count):
                self._shadows.map(window, region, first, count, kind, ram_page)
                for at, flagged in _runs_of_flags(self._flags, ram_page, count) if kind == WRITABLE else ():
                    self._shadows.change_rights(window, region, first + at, flagged, READABLE)
                if not region.uppers:
                    hostmemory.populate_resident(region.host + (first << PAGE_SHIFT), count << PAGE_SHIFT)
        except hostmemory.HostMemoryError:
            self._shadows.close(window, region)
            raise

    def _grant(self, window: Window, region: Region, first: int, count: int) -> None:
        """Let pages of a run be written to, except where somebody watches."""
        at = 0
        while at < count:
            ram_page = region.ram_pages[first + at]
            following = 1
            while at + following < count and region.ram_pages[first + at + following] == ram_page + following:
                following += 1
            self._shadows.change_rights(window, region, first + at, following, WRITABLE)
            for start, flagged in _runs_of_flags(self._flags, ram_page, following):
                self._shadows.change_rights(window, region, first + at + start, flagged, READABLE)
            at += following


def _run_length(cells: memoryview, at: int, step: int, limit: int) -> int:
    """How many entries beside the one at `at`, up or down by `step`, continue it with consecutive addresses."""
    entry = cells[at]
    found, size = 0, 8
    while found < limit:
        size = min(size, limit - found)
        if step > 0:
            got = cells[at + found + 1 : at + found + 1 + size].tolist()
        else:
            got = cells[at - found - size : at - found].tolist()[::-1]
        first = entry + step * (found + 1) * 4096
        expected = list(range(first, first + step * size * 4096, step * 4096))
        if got != expected:
            return found + next(n for n, (one, other) in enumerate(zip(got, expected, strict=True)) if one != other)
        found += size
        size *= 8
    return found


def _runs_of_flags(flags: bytearray, ram_page: int, count: int) -> list[tuple[int, int]]:
    """Offset and length of each run of pages with a flag, among `count` pages from `ram_page` on."""
    part = bytes(flags[ram_page : ram_page + count])
    found = []
    at = 0
    while at < count:
        at = count - len(part[at:].lstrip(b"\0"))
        if at == count:
            break
        end = part.find(0, at)
        end = count if end < 0 else end
        found.append((at, end - at))
        at = end
    return found


def _pieces(memory: PhysicalMemory, physical: int, page_count: int) -> list[tuple[int, int, int]]:
    """What of `page_count` pages from `physical` on is RAM or ROM: offset, page of RAM, count; A20 applied."""
    found: list[tuple[int, int, int]] = []
    for first in range(0, page_count, _MIB_PAGES):
        at = memory.ram_address(physical + (first << PAGE_SHIFT))
        last = memory.ram_address(physical + (first + _MIB_PAGES - 1 << PAGE_SHIFT))
        if at >= MIB and last == at + MIB - 4096:
            pieces = [(first, at >> PAGE_SHIFT, _MIB_PAGES)]
        elif at < 0 and last < 0:
            continue
        else:
            places = (memory.ram_address(physical + (page << PAGE_SHIFT)) for page in range(first, first + _MIB_PAGES))
            pieces = [(first + n, place >> PAGE_SHIFT, 1) for n, place in enumerate(places) if place >= 0]
        for piece in pieces:
            if found and found[-1][0] + found[-1][2] == piece[0] and found[-1][1] + found[-1][2] == piece[1]:
                found[-1] = (found[-1][0], found[-1][1], found[-1][2] + piece[2])
            else:
                found.append(piece)
    return found
