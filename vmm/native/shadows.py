"""Shadows: which table entries each mapped page of a window came from, and what a store to one of them unmaps.

It keeps the regions of all windows, and the page flags by which writers to page tables tell it. It must not know why a
page is mapped, nor which window is in use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from machine.clock import Clock
from machine.memory import HOLDS_TABLE, PAGE_SHIFT, PhysicalMemory
from machine.paging import ACCESSED, DIRTY, PAE_ADDRESS, PAE_RESERVED, RW, US, P
from machine.state import CpuState
from vmm.native import hostmemory
from vmm.native.adaptation import TableWrites
from vmm.native.regions import EDGE_MAPPINGS, READABLE, UNMAPPED, WRITABLE, Region
from vmm.native.volatility import VolatileEntries
from vmm.native.withheld import Withheld

WINDOW_BYTES = 1 << 32
HOLDS_SHADOWED_TABLE = 0x10  # page flag: a window depends on a page table in this page of RAM
PAE_KEY, PSE_KEY, PAGING_KEY, USER_KEY, PROTECT_KEY = 1, 2, 4, 8, 16  # where CR3 has no address bits

_TABLE_FLAGS = HOLDS_TABLE | HOLDS_SHADOWED_TABLE
_FRAME_SHIFT = 4  # pages of RAM are looked up by 16, so that a run of a thousand is entered quickly
_ACCESSED_DIRTY = ACCESSED | DIRTY
_TOUCHED = P | ACCESSED


@dataclass(slots=True, eq=False)
class Window:
    """One window.

    Attributes:
        host: its first address, a multiple of 4 GiB.
        key: CR3 with the paging mode, privilege and CR0.WP in its low bits.
        user: whether it is what a user sees.
        paging: the control registers that the walk of its page tables reads.
        region_shift: log2 of the bytes that a region takes.
        regions: by linear address >> region_shift.
        fills: faults served since it was last empty.
    """

    host: int
    key: int
    user: bool
    paging: CpuState
    region_shift: int
    regions: dict[int, Region] = field(default_factory=dict)
    fills: int = 0

    def has(self, page: int) -> bool:
        """Whether a linear page is mapped."""
        return self.rights(page) != UNMAPPED

    def rights(self, page: int) -> int:
        """UNMAPPED, READABLE or WRITABLE for a linear page."""
        region = self.regions.get(page >> self.region_shift - PAGE_SHIFT)
        return UNMAPPED if region is None else region.kinds[page - region.first_page]

    def ram_page(self, page: int) -> int:
        """The page of RAM that a linear page is mapped to; -1 if it is not."""
        region = self.regions.get(page >> self.region_shift - PAGE_SHIFT)
        if region is None or not region.kinds[page - region.first_page]:
            return -1
        return region.ram_pages[page - region.first_page]


class MappingLedger:
    """How many host mappings the windows of the process take at most."""

    used = 0


class Shadows:
    """The regions of all windows of one machine.

    Attributes:
        cells32, cells64: RAM as table entries, without and with PAE.
        lets_go: a page table that is written time and again is not shadowed for a while, and a page that its entry
            moves is mapped anew at once; False where somebody wants to be asked before a page is mapped.
        withheld: pages that fault in spite of what they are mapped for.
        volatile: entries whose pages may be kept out of the windows, with the clock for them; None: no page is.
        entry_uses: a byte for each doubleword of RAM that is set before anything depends on an entry there, or None.
        on_drop: told of each page that is mapped no more: the window's host address, the linear page number.
        on_close: told of each region that is struck off the books, before its pages are dropped.
        counters: what happened since the start.
    """

    def __init__(self, memory: PhysicalMemory) -> None:
        self._memory = memory
        self._flags = memory.page_flags
        self.cells32 = memory.ram8.cast("I")
        self.cells64 = memory.ram8.cast("Q")
        # Who depends on an entry above the page tables, by its offset in RAM, and on a page table, by its own.
        self._by_upper: dict[int, dict[Region, Window]] = {}
        self._by_table: dict[int, dict[Region, Window]] = {}
        self._table_uses: dict[int, int] = {}
        # Which regions may have pages of RAM mapped, by number of the page of RAM / 16; some have not any more.
        self._by_frame: dict[int, dict[Region, Window]] = {}
        self._table_writes = TableWrites()
        self.lets_go = True
        self.withheld = Withheld()
        self.volatile: tuple[VolatileEntries, Clock] | None = None
        self.entry_uses: memoryview | None = None
        self.on_drop: list[Callable[[int, int], None]] = []
        self.on_close: list[Callable[[Window, Region], None]] = []
        self.counters = {"pages mapped": 0, "pages dropped": 0, "page tables given up": 0}

    def attach(self) -> None:
        """Watch stores to page tables, and flags of pages."""
        self._memory.write_observers.append(self._written)
        self._memory.flag_observers.append(self._protect)

    def detach(self) -> None:
        """Stop watching; every window has been emptied."""
        self._memory.write_observers.remove(self._written)
        self._memory.flag_observers.remove(self._protect)
        self.cells32.release()
        self.cells64.release()

    def entry_at(self, region: Region, at: int) -> int:
        """What the entry at RAM offset `at` says, in a table that a region comes from."""
        return self.cells64[at >> 3] if region.entry_bytes == 8 else self.cells32[at >> 2]

    def users_of(self, at: int) -> list[tuple[Region, Window]]:
        """The regions whose page table holds the entry at RAM offset `at`."""
        return list(self._by_table.get(at & -4096, {}).items())

    def begin(self, window: Window, region: Region) -> None:
        """Enter a region without pages: from now on its table entries are watched."""
        window.regions[region.first_page << PAGE_SHIFT >> window.region_shift] = region
        MappingLedger.used += EDGE_MAPPINGS
        for at, _, _ in region.uppers:
            self._by_upper.setdefault(at, {})[region] = window
            self._use(at >> PAGE_SHIFT)
            self._note_use(at, region.entry_bytes)
        if region.table >= 0:
            if self.volatile is not None:
                region.kept_out = self.volatile[0].kept_out(region.table)
            self._table_writes.take_back(region.table, self._memory.ram8[region.table : region.table + 4096])
            self._by_table.setdefault(region.table, {})[region] = window
            self._use(region.table >> PAGE_SHIFT)

    def empty(self, window: Window) -> None:
        """Unmap all of a window."""
        for region in list(window.regions.values()):
            self.forget(window, region)
        hostmemory.unmap(window.host, WINDOW_BYTES)
        window.fills = 0

    def close(self, window: Window, region: Region) -> None:
        """Unmap a region: its entry changed, or it has no pages."""
        if region.mapped:
            hostmemory.unmap(region.host, region.page_count << PAGE_SHIFT)
        self.forget(window, region)

    def forget(self, window: Window, region: Region) -> None:
        """Strike a region off the books; the caller unmaps it."""
        for closed in self.on_close:
            closed(window, region)
        for first, count in region.runs():
            for page in range(region.first_page + first, region.first_page + first + count):
                for observer in self.on_drop:
                    observer(window.host, page)
        self.counters["pages dropped"] += region.mapped
        MappingLedger.used -= EDGE_MAPPINGS + region.boundaries
        for frame in region.frames:
            users = self._by_frame[frame]
            del users[region]
            if not users:
                del self._by_frame[frame]
        region.frames.clear()
        region.volatile.clear()
        region.kinds[:] = bytes(region.page_count)
        region.mapped = region.boundaries = 0
        del window.regions[region.first_page << PAGE_SHIFT >> window.region_shift]
        for at, _, _ in region.uppers:
            users = self._by_upper[at]
            del users[region]
            if not users:
                del self._by_upper[at]
            self._unuse(at >> PAGE_SHIFT)
        if region.table >= 0:
            users = self._by_table[region.table]
            del users[region]
            if not users:
                del self._by_table[region.table]
            self._unuse(region.table >> PAGE_SHIFT)

    def _use(self, ram_page: int) -> None:
        uses = self._table_uses.get(ram_page, 0)
        self._table_uses[ram_page] = uses + 1
        if not uses:
            self._memory.flag_page(ram_page, HOLDS_SHADOWED_TABLE)

    def _unuse(self, ram_page: int) -> None:
        uses = self._table_uses[ram_page] - 1
        if uses:
            self._table_uses[ram_page] = uses
        else:
            del self._table_uses[ram_page]
            self._flags[ram_page] &= ~HOLDS_SHADOWED_TABLE

    def map(self, window: Window, region: Region, first: int, count: int, kind: int, ram_page: int) -> None:
        """Map `count` pages of a region, from index `first` on, to consecutive pages of RAM.

        Raises:
            HostMemoryError: the host refuses; nothing has changed.
        """
        host = region.host + (first << PAGE_SHIFT)
        offset = ram_page << PAGE_SHIFT
        if region.table >= 0:
            size = region.entry_bytes
            self._note_use(region.table + first * size, count * size)
        hostmemory.map_file(host, count << PAGE_SHIFT, self._memory.ram_fd, offset, writable=kind == WRITABLE)
        MappingLedger.used += region.set_run(first, count, kind, ram_page)
        if self.withheld:
            try:
                self.withheld.enforce(region, first, count)
            except hostmemory.HostMemoryError:
                MappingLedger.used += region.set_run(first, count, UNMAPPED)
                hostmemory.unmap(host, count << PAGE_SHIFT)
                raise
        self.counters["pages mapped"] += count
        frames = self._by_frame
        for frame in range(ram_page >> _FRAME_SHIFT, (ram_page + count - 1 >> _FRAME_SHIFT) + 1):
            users = frames.get(frame)
            if users is None:
                users = frames[frame] = {}
            users[region] = window
            region.frames.add(frame)

    def _note_use(self, at: int, length: int) -> None:
        """Something depends on the entries in so many bytes of RAM."""
        if self.entry_uses is not None:
            self.entry_uses[at >> 2 : at + length >> 2] = b"\1" * (length >> 2)

    def depend_on(self, cell: int) -> bool:
        """Whether a window depends on the entry that the doubleword at offset `cell` of RAM is, or is a part of."""
        if cell in self._by_upper or any(region.entry_bytes == 8 for region in self._by_upper.get(cell & -8, ())):
            return True
        for region in self._by_table.get(cell & -4096, ()):
            index = (cell & 4095) // region.entry_bytes
            if region.kinds[index] or region.shares(index):
                return True
        return False

    def stays_out(self, region: Region, index: int, value: int, *, insists: bool) -> bool:
        """Whether a page that is kept out, and touched now, stays so; `value` is what its entry says."""
        assert self.volatile is not None
        entries, _ = self.volatile
        if insists:
            entries.insist(region.table, index)
        elif entries.touch(region.table, index, value & ~_ACCESSED_DIRTY):
            return True
        for each in self._by_table[region.table]:
            each.kept_out.discard(index)
        return False

    def look_at(self, at: int) -> None:
        """The page of the entry at RAM offset `at` is accessed by the software path, as all the time."""
        for region in list(self._by_table.get(at & -4096, ())):
            index = (at & 4095) // region.entry_bytes
            if index in region.kept_out:
                self.stays_out(region, index, self.entry_at(region, at), insists=False)
                return

    def change_rights(self, window: Window, region: Region, first: int, count: int, kind: int) -> None:
        """Let pages that are mapped be written to, or not any more."""
        host = region.host + (first << PAGE_SHIFT)
        try:
            hostmemory.protect(host, count << PAGE_SHIFT, writable=kind == WRITABLE)
            if self.withheld:
                self.withheld.enforce(region, first, count)
        except hostmemory.HostMemoryError:
            if kind == WRITABLE:
                raise
            self.empty(window)  # takes fewer mappings, never more
            return
        MappingLedger.used += region.set_kind(first, count, kind)

    def withhold(self, window: Window, before: Withheld) -> None:
        """Bring a window's pages in line with `withheld`, which has changed."""
        for region in list(window.regions.values()):
            for index in self.withheld.changed_indices(region, before):
                if region.kinds[index]:
                    self.change_rights(window, region, index, 1, region.kinds[index])

    def _protect(self, ram_page: int) -> None:
        """A page of RAM got a flag: from now on a write to it faults in every window."""
        users = self._by_frame.get(ram_page >> _FRAME_SHIFT)
        if not users:
            return
        for region, window in list(users.items()):
            for index in region.indices_of(ram_page):
                if region.kinds[index] == WRITABLE:
                    self.change_rights(window, region, index, 1, READABLE)

    def _drop_page(self, window: Window, region: Region, index: int) -> None:
        try:
            hostmemory.unmap(region.host + (index << PAGE_SHIFT), 4096)
        except hostmemory.HostMemoryError:
            self.empty(window)
            return
        MappingLedger.used += region.set_run(index, 1, UNMAPPED)
        region.volatile.add(index)
        self.counters["pages dropped"] += 1
        for observer in self.on_drop:
            observer(window.host, region.first_page + index)

    def _written(self, at: int, length: int, old: bytes, flags: int) -> None:
        """A store to a page that holds tables: what came from the entries that it changed is dropped."""
        if not flags & HOLDS_SHADOWED_TABLE:
            return
        cells: Iterable[int] = range(at & -8, at + length, 4)
        if length > len(self._by_upper):
            cells = [cell for cell in self._by_upper if at & -8 <= cell < at + length]
        for cell in cells:
            users = self._by_upper.get(cell)
            if users:
                for region, window in list(users.items()):
                    if region in users and self._is_changed(region, cell):
                        self.close(window, region)
        table = at & -4096
        users = self._by_table.get(table)
        if not users:
            return
        # The upper half of an entry of eight bytes has neither A nor D.
        if length == 4 and not at & 3 and not (at & 4 and any(region.entry_bytes == 8 for region in users)):
            change = int.from_bytes(old, "little") ^ self.cells32[at >> 2]
            if not change & ~_ACCESSED_DIRTY and not change & int.from_bytes(old, "little"):
                return  # the CPU sets these all the time
        for region, window in list(users.items()):
            if region not in users:
                continue
            region.writes_since_fill += length + 3 >> 2
            if self.lets_go and self._table_writes.is_enough(table, region.writes_since_fill):
                self.counters["page tables given up"] += 1
                self._table_writes.let_go(table, bytes(self._memory.ram8[table : table + 4096]))
                for each, its_window in list(users.items()):
                    self.close(its_window, each)
                return
            size = region.entry_bytes
            for index in range((at - table) // size, (at - table + length - 1) // size + 1):
                if region.shared_code and not region.kinds[index] and region.shares(index):
                    for observer in self.on_drop:
                        observer(window.host, region.first_page + index)
                if region.kinds[index] or index in region.volatile:
                    self._reconsider(window, region, index)

    def _is_changed(self, region: Region, cell: int) -> bool:
        """Whether an entry above the page tables says something else than when the region was begun."""
        value = self.entry_at(region, cell)
        if region.table < 0 and region.dirty and cell == region.uppers[-1][0] and not value & DIRTY:
            return True
        return any(at == cell and (value ^ known) & bits for at, known, bits in region.uppers)

    def _reconsider(self, window: Window, region: Region, index: int) -> None:
        """The entry of a page that is mapped, or was until its entry changed, was stored to.

        The page goes, moves, comes back, or loses the right to be written to.
        """
        if index in region.kept_out:
            return
        entry = self.entry_at(region, region.table + index * region.entry_bytes)
        old = region.kinds[index]
        gone = entry & _TOUCHED != _TOUCHED or entry & PAE_RESERVED
        gone = gone or (window.user and not (region.user and entry & US))
        at = -1 if gone else self._memory.ram_address(entry & PAE_ADDRESS)
        ram_page = at >> PAGE_SHIFT
        if old and (at < 0 or (not self.lets_go and ram_page != region.ram_pages[index])):
            self._note_change(region, index)
            self._drop_page(window, region, index)
            return
        if at < 0 or not (old or self.lets_go):
            return
        is_written = region.writable and entry & DIRTY and (entry & RW or not window.key & PROTECT_KEY)
        if not old or ram_page != region.ram_pages[index]:
            if self._note_change(region, index):
                if old:
                    self._drop_page(window, region, index)
                return
            kind = WRITABLE if is_written and not self._flags[ram_page] else READABLE
            self._move_page(window, region, index, kind, ram_page)
        elif old == WRITABLE and not is_written:
            self.change_rights(window, region, index, 1, READABLE)

    def _note_change(self, region: Region, index: int) -> bool:
        """The page of an entry goes, moves or comes back; whether it is kept out of the windows from now on."""
        if self.volatile is None:
            return False
        entries, clock = self.volatile
        if entries.change(region.table, index, clock.icount):
            region.kept_out.add(index)
        return index in region.kept_out

    def _move_page(self, window: Window, region: Region, index: int, kind: int, ram_page: int) -> None:
        """Let a page be elsewhere. Its entry says that the guest has touched it, so nothing is told of a touch."""
        if region.kinds[index]:
            region.volatile.add(index)
            self.counters["pages dropped"] += 1
            for observer in self.on_drop:
                observer(window.host, region.first_page + index)
        try:
            self.map(window, region, index, 1, kind, ram_page)
        except hostmemory.HostMemoryError:
            self.empty(window)
