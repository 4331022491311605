"""Guest memory as instructions see it: segment checks, the coherent TLB, RAM, devices, watchpoints and #AC.

It raises the fault an access deserves before the access changes anything; delivering faults is not its business.

The TLB is coherent (a store to a page table acts at once): pages that hold tables are flagged in `PhysicalMemory`, and
a write to a present entry that one came from drops every cached translation. Only plain RAM is cached for writing:
pages with any flag, devices and watched pages always take the slow path.

Source: SDM Vol. 3A, "Protection" and "Paging"; Vol. 3A, "Alignment Check Exception (#AC)".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from struct import Struct

from machine.faults import GuestFault, Vector, general_protection, stack_fault
from machine.memory import HOLDS_TABLE, PAGE_SHIFT, PhysicalMemory
from machine.paging import P, Translation, probe, walk
from machine.state import CR0_AM, CR4_PAE, MASK32, SS, CpuState, Segment

_U16 = Struct("<H")
_U32 = Struct("<I")
EFLAGS_AC = 1 << 18

# Told of every data access to a watched page: linear address, physical address, size in bytes, is it a write.
AccessObserver = Callable[[int, int, int, bool], None]


@dataclass(frozen=True, slots=True)
class TlbEntry:
    """One cached translation, for people to read."""

    linear: int
    physical: int
    page_bytes: int
    writable: bool
    user: bool
    is_global: bool


class Mmu:
    """Linear and segmented accesses of one CPU.

    `reads` and `writes` map a linear page number to what must be added to a linear address to get the offset in RAM;
    they are the fast path, for the current privilege. `set_user` switches between the user's and the supervisor's.

    Attributes:
        entry_uses: where an engine wants to see what the TLB depends on: a byte for each doubleword of RAM, which is
            set where an entry stands that a cached translation came from. Whoever lends it clears it.
    """

    def __init__(self, state: CpuState, memory: PhysicalMemory) -> None:
        self.state = state
        self.memory = memory
        self.ram = memory.ram
        self.ram8 = memory.ram8
        self._tlbs: tuple[tuple[dict[int, int], dict[int, int]], ...] = (({}, {}), ({}, {}))
        self.user = False
        self.reads, self.writes = self._tlbs[0]
        self.entries: dict[int, TlbEntry] = {}
        # The same for pages with a flag that have been written to: they need no walk, but the slow path.
        self._traced: tuple[dict[int, int], dict[int, int]] = {}, {}
        # By page of RAM: the offsets in RAM of all doublewords of entries that cached translations came from.
        self._cells: dict[int, set[int]] = {}
        self.entry_uses: memoryview | None = None
        self.flush_observers: list[Callable[[bool], None]] = []
        self.watched_pages: frozenset[int] = frozenset()
        self.watch_everything = False
        self.on_access: AccessObserver | None = None
        # Told of accesses, at least of all that do not go to plain RAM, before they are made: linear address, physical
        # address, is it a write, is it a user's. It may raise GuestFault instead of returning.
        self.before_access: Callable[[int, int, bool, bool], None] | None = None
        self.aligned_only = False
        memory.write_observers.append(self._table_written)
        memory.flag_observers.append(self._forget_writes)
        memory.map_observers.append(self.flush)

    def set_user(self, user: bool) -> None:
        """Accesses are from now on a user's (CPL 3) or a supervisor's."""
        self.user = user
        self.reads, self.writes = self._tlbs[user]
        self.update_alignment()

    def update_alignment(self) -> None:
        """CR0.AM, EFLAGS.AC or CPL may have changed: with all three, misaligned accesses fault."""
        state = self.state
        aligned_only = state.cpl == 3 and bool(state.eflags & EFLAGS_AC) and bool(state.cr0 & CR0_AM)
        if aligned_only != self.aligned_only:
            self.aligned_only = aligned_only
            self.flush()

    def flush(self, *, by_store: bool = False) -> None:
        """Forget every translation; `by_store` if an instruction stored to a page table rather than to a register."""
        for reads, writes in self._tlbs:
            reads.clear()
            writes.clear()
        for traced in self._traced:
            traced.clear()
        self.entries.clear()
        flags = self.memory.page_flags
        for page in self._cells:
            if page >= 0:
                flags[page] &= ~HOLDS_TABLE
        self._cells.clear()
        for observer in self.flush_observers:
            observer(by_store)

    def forget_page(self, linear: int) -> None:
        """INVLPG: with a coherent TLB there is nothing stale; the entry goes all the same."""
        page = linear >> PAGE_SHIFT
        for reads, writes in self._tlbs:
            reads.pop(page, None)
            writes.pop(page, None)
        for traced in self._traced:
            traced.pop(page, None)
        self.entries.pop(page, None)

    def _forget_writes(self, ram_page: int) -> None:
        """A page of RAM got a flag: from now on writes to it take the slow path."""
        base = ram_page << PAGE_SHIFT
        for _, writes in self._tlbs:
            for page in [page for page, delta in writes.items() if page * 4096 + delta == base]:
                del writes[page]

    def set_watch(self, pages: frozenset[int], observer: AccessObserver | None, *, everything: bool = False) -> None:
        """Tell `observer` of each data access to these linear pages, or to every page."""
        self.watched_pages = pages
        self.watch_everything = everything
        self.on_access = observer
        self.flush()

    def _table_written(self, at: int, length: int, old: bytes, flags: int) -> None:
        if not flags & HOLDS_TABLE:
            return
        for entry in self.live_cells(at, at + length):
            low = entry - at
            byte = old[low] if low >= 0 else self.ram8[entry]
            if byte & P or entry & 4:  # the upper half of a PAE entry has no P bit of its own
                self.flush(by_store=True)
                return

    def live_cells(self, first: int, end: int) -> list[int]:
        """The offsets of doublewords with bytes from `first` to before `end`, in one page of RAM, that translations
        came from: a store to one of them moves pages.
        """
        cells = self._cells.get(first >> PAGE_SHIFT)
        if not cells:
            return []
        if 4 * len(cells) < end - first:
            return [cell for cell in cells if first - 4 < cell < end]
        return [cell for cell in range(first & ~3, end, 4) if cell in cells]

    @property
    def traced_writes(self) -> dict[int, int]:
        """The same as `writes` for pages with a flag: what writes to them is up to `PhysicalMemory.write_at`."""
        return self._traced[self.user]

    def translate(self, linear: int, *, write: bool, user: bool) -> int:
        """Physical address of one byte; fills the TLB. Raises PageFault."""
        translation = walk(self.memory, self.state, linear, write=write, user=user)
        if self.before_access is not None:
            self.before_access(linear, translation.physical, write, user)
        self._remember(linear, translation, write=write, user=user)
        return translation.physical

    def _remember(self, linear: int, translation: Translation, *, write: bool, user: bool) -> None:
        memory = self.memory
        pae = self.state.cr4 & CR4_PAE
        for table in translation.tables:
            at = memory.ram_address(table)
            ram_page = at >> PAGE_SHIFT
            cells = self._cells.get(ram_page)
            if cells is None:
                cells = self._cells[ram_page] = set()
            if at >= 0 and not memory.page_flags[ram_page] & HOLDS_TABLE:
                memory.flag_page(ram_page, HOLDS_TABLE)
            cells.add(at)
            if pae:
                cells.add(at + 4)
            if self.entry_uses is not None and at >= 0:
                self.entry_uses[at >> 2] = 1
                if pae:
                    self.entry_uses[at + 4 >> 2] = 1
        page = linear >> PAGE_SHIFT
        physical = translation.physical & ~0xFFF
        self.entries[page] = TlbEntry(
            linear & ~0xFFF,
            physical,
            min(translation.page_bytes, 4 << 20),
            translation.writable,
            translation.user,
            translation.is_global,
        )
        at = memory.ram_address(physical)
        if at < 0 or self.watch_everything or page in self.watched_pages or self.aligned_only:
            return
        delta = at - (page << PAGE_SHIFT)
        reads, writes = self._tlbs[user]
        reads[page] = delta
        if write:
            if memory.page_flags[at >> PAGE_SHIFT]:
                self._traced[user][page] = delta
            else:
                writes[page] = delta

    def probe(self, linear: int) -> int | None:
        """Physical address for a debugger, without side effects; None if not mapped."""
        return probe(self.memory, self.state, linear & MASK32)

    def load_linear(self, linear: int, size_bytes: int, user: bool) -> int:
        """Read 1 to 8 bytes at a linear address; an access over 4 GiB wraps."""
        linear &= MASK32
        if self.aligned_only and user and linear & (size_bytes - 1):
            raise GuestFault(Vector.AC, 0)
        return self._load(linear, size_bytes, user=user, write=False)

    def _load(self, linear: int, size_bytes: int, *, user: bool, write: bool) -> int:
        first_bytes = 4096 - (linear & 0xFFF)
        if write and first_bytes >= size_bytes and self.before_access is None:
            delta = self._traced[user].get(linear >> PAGE_SHIFT)
            if delta is not None:
                return int.from_bytes(self.ram8[linear + delta : linear + delta + size_bytes], "little")
        physical = self.translate(linear, write=write, user=user)
        if first_bytes >= size_bytes:
            value = self.memory.load(physical, size_bytes) if size_bytes <= 4 else self._load_wide(physical)
        else:
            second = self.translate((linear + first_bytes) & MASK32, write=write, user=user)
            data = self.memory.read(physical, first_bytes) + self.memory.read(second, size_bytes - first_bytes)
            value = int.from_bytes(data, "little")
        if self.on_access:
            self._observe(linear, size_bytes, write=False)
        return value

    def _load_wide(self, physical: int) -> int:
        return self.memory.load(physical, 4) | self.memory.load(physical + 4, 4) << 32

    def store_linear(self, linear: int, size_bytes: int, value: int, user: bool) -> None:
        """Write 1 to 8 bytes at a linear address; both pages are checked before either is written."""
        linear &= MASK32
        delta = self._tlbs[user][1].get(linear >> PAGE_SHIFT)
        if delta is not None and linear & 0xFFF <= 4096 - size_bytes:
            self.ram8[linear + delta : linear + delta + size_bytes] = value.to_bytes(size_bytes, "little")
            return
        if self.aligned_only and user and linear & (size_bytes - 1):
            raise GuestFault(Vector.AC, 0)
        memory = self.memory
        first_bytes = 4096 - (linear & 0xFFF)
        if first_bytes >= size_bytes <= 4 and self.before_access is None:
            delta = self._traced[user].get(linear >> PAGE_SHIFT)
            if delta is not None:
                memory.write_at(linear + delta, value.to_bytes(size_bytes, "little"))
                return
        physical = self.translate(linear, write=True, user=user)
        if first_bytes >= size_bytes:
            if size_bytes <= 4:
                memory.store(physical, size_bytes, value)
            else:
                memory.store(physical, 4, value & MASK32)
                memory.store(physical + 4, 4, value >> 32)
        else:
            second = self.translate((linear + first_bytes) & MASK32, write=True, user=user)
            data = value.to_bytes(size_bytes, "little")
            memory.write(physical, data[:first_bytes])
            memory.write(second, data[first_bytes:])
        if self.on_access:
            self._observe(linear, size_bytes, write=True)

    def check_linear(self, linear: int, size_bytes: int, *, write: bool, user: bool) -> None:
        """Raise the PageFault that an access would raise, and set A and D bits as it would; transfer nothing."""
        linear &= MASK32
        cached = self._tlbs[user][write]
        if linear >> PAGE_SHIFT in cached and (linear + size_bytes - 1 & MASK32) >> PAGE_SHIFT in cached:
            return
        first_bytes = 4096 - (linear & 0xFFF)
        self.translate(linear, write=write, user=user)
        if first_bytes < size_bytes:
            self.translate((linear + first_bytes) & MASK32, write=write, user=user)

    def _observe(self, linear: int, size_bytes: int, *, write: bool) -> None:
        observer = self.on_access
        while observer is not None and size_bytes:
            count = min(size_bytes, 4096 - (linear & 0xFFF))
            if self.watch_everything or linear >> PAGE_SHIFT in self.watched_pages:
                observer(linear, self.probe(linear) or 0, count, write)
            linear = (linear + count) & MASK32
            size_bytes -= count

    def load_system(self, linear: int, size_bytes: int) -> int:
        """Read with supervisor rights whatever CPL is: descriptor tables, TSS, stacks of inner levels."""
        linear &= MASK32
        delta = self._tlbs[0][0].get(linear >> PAGE_SHIFT)
        if delta is not None and linear & 0xFFF <= 4096 - size_bytes:
            return int.from_bytes(self.ram8[linear + delta : linear + delta + size_bytes], "little")
        return self._load(linear, size_bytes, user=False, write=False)

    def store_system(self, linear: int, size_bytes: int, value: int) -> None:
        """Write with supervisor rights whatever CPL is."""
        self.store_linear(linear, size_bytes, value, user=False)

    def limit_fault(self, segment: Segment) -> GuestFault:
        """What an access beyond the limit or the rights of `segment` raises."""
        return stack_fault() if segment is self.state.segments[SS] else general_protection()

    def check_segment(self, segment: Segment, offset: int, size_bytes: int, *, write: bool) -> int:
        """The linear address of an access that the segment allows. Raises #GP(0) or #SS(0).

        A segment that ends at 4 GiB lets an access run over its end and wrap, as current processors do.
        """
        low, high = (segment.write_low, segment.write_high) if write else (segment.read_low, segment.read_high)
        if not low <= offset <= high or (offset + size_bytes - 1 > high and high != MASK32):
            raise self.limit_fault(segment)
        if offset + size_bytes - 1 > MASK32 and low:
            raise self.limit_fault(segment)
        return (segment.base + offset) & MASK32

    def load(self, segment: Segment, offset: int, size_bytes: int) -> int:
        """Read 1 to 8 bytes."""
        return self.load_linear(self.check_segment(segment, offset, size_bytes, write=False), size_bytes, self.user)

    def store(self, segment: Segment, offset: int, size_bytes: int, value: int) -> None:
        """Write 1 to 8 bytes."""
        linear = self.check_segment(segment, offset, size_bytes, write=True)
        self.store_linear(linear, size_bytes, value, self.user)

    def load_to_modify(self, segment: Segment, offset: int, size_bytes: int) -> int:
        """The read half of a read-modify-write: it needs, and faults like, the right to write."""
        linear = self.check_segment(segment, offset, size_bytes, write=True)
        if self.aligned_only and self.user and linear & (size_bytes - 1):
            raise GuestFault(Vector.AC, 0)
        return self._load(linear, size_bytes, user=self.user, write=True)

    def check(self, segment: Segment, offset: int, size_bytes: int, *, write: bool) -> None:
        """Raise whatever an access would raise, and set A and D bits as it would; transfer nothing."""
        linear = self.check_segment(segment, offset, size_bytes, write=write)
        if self.aligned_only and self.user and linear & (size_bytes - 1):
            raise GuestFault(Vector.AC, 0)
        self.check_linear(linear, size_bytes, write=write, user=self.user)

    def load8(self, segment: Segment, offset: int) -> int:
        """Read a byte."""
        if segment.read_low <= offset <= segment.read_high:
            linear = (segment.base + offset) & MASK32
            delta = self.reads.get(linear >> 12)
            if delta is not None:
                return self.ram8[linear + delta]
        return self.load(segment, offset, 1)

    def load16(self, segment: Segment, offset: int) -> int:
        """Read a word."""
        if segment.read_low <= offset < segment.read_high:
            linear = (segment.base + offset) & MASK32
            delta = self.reads.get(linear >> 12)
            if delta is not None and linear & 0xFFF <= 0xFFE:
                return _load16(self.ram, linear + delta)[0]
        return self.load(segment, offset, 2)

    def load32(self, segment: Segment, offset: int) -> int:
        """Read a doubleword."""
        if segment.read_low <= offset <= segment.read_high - 3:
            linear = (segment.base + offset) & MASK32
            delta = self.reads.get(linear >> 12)
            if delta is not None and linear & 0xFFF <= 0xFFC:
                return _load32(self.ram, linear + delta)[0]
        return self.load(segment, offset, 4)

    def store8(self, segment: Segment, offset: int, value: int) -> None:
        """Write a byte."""
        if segment.write_low <= offset <= segment.write_high:
            linear = (segment.base + offset) & MASK32
            delta = self.writes.get(linear >> 12)
            if delta is not None:
                self.ram8[linear + delta] = value
                return
        self.store(segment, offset, 1, value)

    def store16(self, segment: Segment, offset: int, value: int) -> None:
        """Write a word."""
        if segment.write_low <= offset < segment.write_high:
            linear = (segment.base + offset) & MASK32
            delta = self.writes.get(linear >> 12)
            if delta is not None and linear & 0xFFF <= 0xFFE:
                _store16(self.ram, linear + delta, value)
                return
        self.store(segment, offset, 2, value)

    def store32(self, segment: Segment, offset: int, value: int) -> None:
        """Write a doubleword."""
        if segment.write_low <= offset <= segment.write_high - 3:
            linear = (segment.base + offset) & MASK32
            delta = self.writes.get(linear >> 12)
            if delta is not None and linear & 0xFFF <= 0xFFC:
                _store32(self.ram, linear + delta, value)
                return
        self.store(segment, offset, 4, value)

    def modify8(self, segment: Segment, offset: int) -> int:
        """Read a byte that the same instruction will write."""
        if segment.write_low <= offset <= segment.write_high:
            linear = (segment.base + offset) & MASK32
            delta = self.writes.get(linear >> 12)
            if delta is not None:
                return self.ram8[linear + delta]
        return self.load_to_modify(segment, offset, 1)

    def modify16(self, segment: Segment, offset: int) -> int:
        """Read a word that the same instruction will write."""
        if segment.write_low <= offset < segment.write_high:
            linear = (segment.base + offset) & MASK32
            delta = self.writes.get(linear >> 12)
            if delta is not None and linear & 0xFFF <= 0xFFE:
                return _load16(self.ram, linear + delta)[0]
        return self.load_to_modify(segment, offset, 2)

    def modify32(self, segment: Segment, offset: int) -> int:
        """Read a doubleword that the same instruction will write."""
        if segment.write_low <= offset <= segment.write_high - 3:
            linear = (segment.base + offset) & MASK32
            delta = self.writes.get(linear >> 12)
            if delta is not None and linear & 0xFFF <= 0xFFC:
                return _load32(self.ram, linear + delta)[0]
        return self.load_to_modify(segment, offset, 4)


_load16: Callable[[object, int], tuple[int]] = _U16.unpack_from  # type: ignore[assignment]
_load32: Callable[[object, int], tuple[int]] = _U32.unpack_from  # type: ignore[assignment]
_store16 = _U16.pack_into
_store32 = _U32.pack_into
