"""Windows: guest linear address spaces as host address space, one for each (page tables, privilege).

A page of a window is a mapping of the RAM memfd, so that the host's MMU does the walk: the window is the shadow page
table. It must not know instructions or fragments; who runs code tells it what must not be written behind our back.

Pages are mapped when they are first touched, for writing only if D is set and nobody watches the page of RAM. Stores to
page tables are seen through `PhysicalMemory.write_observers` and drop what they change, at once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from machine.cpu import Cpu
from machine.faults import PageFault
from machine.memory import HOLE_FIRST, HOLE_LAST, PAGE_SHIFT, PhysicalMemory
from machine.paging import ACCESSED, DIRTY, walk
from machine.state import CR0_PG, CR0_WP, CR4_PAE, CR4_PSE, CpuState
from vmm.native import hostmemory

WINDOW_BYTES = 1 << 32
# Nothing is mapped on both sides: an access at the last byte may run on, and a REP by some megabytes either way.
GUARD_BYTES = 1 << 32
STRIDE_BYTES = WINDOW_BYTES + 2 * GUARD_BYTES
MAX_WINDOWS = 16
MAX_MAPPINGS = 24_000  # two mappings a page at worst, of the 65,530 that Linux allows a process by default
HOLDS_SHADOWED_TABLE = 0x10  # page flag: a window depends on a page table in this page of RAM

WindowKey = tuple[int, bool, bool]
_PAE_KEY, _PSE_KEY, _PAGING_KEY = 1, 2, 4  # low bits of the first part
_ACCESSED_DIRTY = ACCESSED | DIRTY


@dataclass(slots=True)
class Mapping:
    """One page of a window.

    Attributes:
        ram_page: the page of RAM behind it.
        writable: whether the host lets it be written to.
        entries: offsets in RAM of the table entries that it came from, top down.
    """

    ram_page: int
    writable: bool
    entries: tuple[int, ...]


@dataclass(slots=True, eq=False)
class Window:
    """One window.

    Attributes:
        host: its first address, a multiple of 4 GiB.
        key: CR3 with the paging mode in its low bits, user or supervisor, CR0.WP.
        paging: the control registers that the walk of its page tables reads.
        pages: what is mapped, by linear page number.
    """

    host: int
    key: WindowKey
    paging: CpuState
    pages: dict[int, Mapping] = field(default_factory=dict)


_User = tuple[Window, int]  # a page of a window


class WindowsError(Exception):
    """The windows cannot be had: the host's limits are too low."""


class Windows:
    """All windows of one machine, and the ledger of host mappings.

    Attributes:
        current: the window of the address space and privilege that the CPU is in; `select` sets it.
        on_drop: told of each page that is mapped no more: the window's host address, the linear page number.
        counters: fills, drops and evictions since the start.
    """

    def __init__(self, cpu: Cpu) -> None:
        self._cpu = cpu
        self._memory: PhysicalMemory = cpu.memory
        self._windows: OrderedDict[WindowKey, Window] = OrderedDict()
        self._by_host: dict[int, Window] = {}
        self._spare: list[int] = []
        self._mapped_pages = 0
        # Who has a page of RAM mapped, and who came from a table entry (by its offset in RAM; of a directory's entry
        # that is everybody below it). What has no users is not in here.
        self._users_of_page: dict[int, set[_User]] = {}
        self._users_of_entry: dict[int, set[_User]] = {}
        self._used_entries_in_page: dict[int, int] = {}
        self.on_drop: list[Callable[[int, int], None]] = []
        self.counters = {"hidden faults": 0, "pages dropped": 0, "windows evicted": 0}
        self.current = self.select()

    def attach(self) -> None:
        """Watch stores to page tables."""
        self._memory.write_observers.append(self._written)
        self._memory.flag_observers.append(self._protect)
        self._memory.a20_observers.append(self.drop_all)

    def detach(self) -> None:
        """Stop watching and give all address space back."""
        self._memory.write_observers.remove(self._written)
        self._memory.flag_observers.remove(self._protect)
        self._memory.a20_observers.remove(self.drop_all)
        while self._windows:
            self._evict()
        for host in self._spare:
            hostmemory.release(host - GUARD_BYTES, STRIDE_BYTES)
        self._spare.clear()

    def select(self) -> Window:
        """The window for the CPU's address space and privilege; made if there is none yet."""
        state = self._cpu.state
        key = self._key(state.cr3, user=state.cpl == 3)
        window = self._windows.get(key)
        if window is None:
            window = self._new_window(key)
        else:
            self._windows.move_to_end(key)
        self.current = window
        return window

    def lookup(self, cr3: int, *, user: bool) -> Window | None:
        """The window for an address space and privilege in the CPU's paging mode, if there is one."""
        return self._windows.get(self._key(cr3, user=user))

    def at(self, host: int) -> Window | None:
        """The window that a host address lies in."""
        return self._by_host.get(host & -WINDOW_BYTES)

    def _key(self, cr3: int, *, user: bool) -> WindowKey:
        state = self._cpu.state
        if not state.cr0 & CR0_PG:
            return (0, False, False)
        mode = (_PAE_KEY if state.cr4 & CR4_PAE else 0) | (_PSE_KEY if state.cr4 & CR4_PSE else 0)
        return (cr3 & 0xFFFF_FFE0 | mode | _PAGING_KEY, user, bool(state.cr0 & CR0_WP) or user)

    def _new_window(self, key: WindowKey) -> Window:
        if len(self._windows) >= MAX_WINDOWS:
            self._evict()
            self.counters["windows evicted"] += 1
        if self._spare:
            host = self._spare.pop()
        else:
            host = hostmemory.reserve(STRIDE_BYTES, align=WINDOW_BYTES) + GUARD_BYTES
        paging = CpuState()
        paging.cr0 = (CR0_PG if key[0] & _PAGING_KEY else 0) | (CR0_WP if key[2] else 0)
        paging.cr3 = key[0] & 0xFFFF_FFE0
        paging.cr4 = (CR4_PAE if key[0] & _PAE_KEY else 0) | (CR4_PSE if key[0] & _PSE_KEY else 0)
        window = self._windows[key] = self._by_host[host] = Window(host, key, paging)
        return window

    def _evict(self) -> None:
        """Give up the window that was selected least recently."""
        _, window = self._windows.popitem(last=False)
        self._empty(window)
        del self._by_host[window.host]
        self._spare.append(window.host)

    def _empty(self, window: Window) -> None:
        for page in list(window.pages):
            self._forget(window, page)
        hostmemory.unmap(window.host, WINDOW_BYTES)

    def drop_all(self) -> None:
        """Forget every mapping of every window."""
        while self._windows:
            self._evict()
        self.select()

    def fill(self, linear: int, *, write: bool, window: Window | None = None) -> bool:
        """Map the page at `linear` into a window, the current one unless said, as an access of the guest demands it.

        Returns:
            False if no mapping can serve the access: a device, ROM written to, a page that someone watches, or a page
            fault of the guest's own. The interpreter then executes the instruction.

        Raises:
            WindowsError: the host has no room for a single page.
        """
        window, memory = window or self.current, self._memory
        try:
            translation = walk(memory, window.paging, linear, write=write, user=window.key[1])
        except PageFault:
            return False
        at = memory.ram_address(translation.physical)
        if at < 0:
            return False
        ram_page, page = at >> PAGE_SHIFT, linear >> PAGE_SHIFT
        # A recursive entry is met twice on the way.
        entries = tuple({entry: None for entry in map(memory.ram_address, translation.tables) if entry >= 0})
        # A page that holds its own table entry is about to be watched.
        watched = memory.page_flags[ram_page] or any(entry >> PAGE_SHIFT == ram_page for entry in entries)
        if write and watched:
            return False
        allowed = translation.writable or not window.key[2]
        mapping = Mapping(ram_page, translation.dirty and allowed and not watched, entries)
        old = window.pages.get(page)
        if old == mapping:
            return False  # mapped already and faults all the same: not ours to mend
        self.counters["hidden faults"] += 1
        if old is not None and (old.ram_page, old.entries) == (ram_page, entries):
            hostmemory.protect(window.host + (page << PAGE_SHIFT), 4096, writable=mapping.writable)
            old.writable = mapping.writable
            return True
        if old is not None:
            self._forget(window, page)
        elif self._mapped_pages >= MAX_MAPPINGS:
            self._make_room()
        self._map(window, page, mapping)
        return True

    def _map(self, window: Window, page: int, mapping: Mapping) -> None:
        host, offset = window.host + (page << PAGE_SHIFT), mapping.ram_page << PAGE_SHIFT
        while True:
            try:
                hostmemory.map_file(host, 4096, self._memory.ram_fd, offset, writable=mapping.writable)
                break
            except hostmemory.HostMemoryError as error:
                if not self._mapped_pages:
                    raise WindowsError("the host has no room for a page of a window") from error
                self._make_room()
        user = (window, page)
        window.pages[page] = mapping
        self._mapped_pages += 1
        self._users_of_page.setdefault(mapping.ram_page, set()).add(user)
        for entry in mapping.entries:
            users = self._users_of_entry.get(entry)
            if users is None:
                users = self._users_of_entry[entry] = set()
                table = entry >> PAGE_SHIFT
                used = self._used_entries_in_page[table] = self._used_entries_in_page.get(table, 0) + 1
                if used == 1:
                    self._memory.flag_page(table, HOLDS_SHADOWED_TABLE)
            users.add(user)

    def _make_room(self) -> None:
        """Empty the window that was selected least recently and has pages; the current one last."""
        window = next(each for each in self._windows.values() if each.pages)
        self._empty(window)
        self.counters["windows evicted"] += 1

    def _protect(self, ram_page: int) -> None:
        """A page of RAM got a flag: from now on a write to it faults in every window."""
        for window, page in self._users_of_page.get(ram_page, ()):
            mapping = window.pages[page]
            if mapping.writable:
                hostmemory.protect(window.host + (page << PAGE_SHIFT), 4096, writable=False)
                mapping.writable = False

    def _forget(self, window: Window, page: int) -> None:
        """Strike a page off the books; the caller unmaps it, or maps another one there."""
        mapping = window.pages.pop(page)
        self._mapped_pages -= 1
        user = (window, page)
        users = self._users_of_page[mapping.ram_page]
        users.discard(user)
        if not users:
            del self._users_of_page[mapping.ram_page]
        for entry in mapping.entries:
            users = self._users_of_entry[entry]
            users.discard(user)
            if not users:
                del self._users_of_entry[entry]
                table = entry >> PAGE_SHIFT
                self._used_entries_in_page[table] -= 1
                if not self._used_entries_in_page[table]:
                    del self._used_entries_in_page[table]
                    self._memory.page_flags[table] &= ~HOLDS_SHADOWED_TABLE
        for observer in self.on_drop:
            observer(window.host, page)

    def _written(self, at: int, length: int, old: bytes, flags: int) -> None:
        """A store to a page that holds tables: what came from the entries that it changed is dropped."""
        if not flags & HOLDS_SHADOWED_TABLE:
            return
        new = bytes(self._memory.ram8[at : at + length])
        for entry in range(at & -8, at + length, 4):
            users = self._users_of_entry.get(entry)
            if not users:
                continue
            for window, page in [user for user in users if _is_changed(entry, user[0].key, at, old, new)]:
                self._forget(window, page)
                hostmemory.unmap(window.host + (page << PAGE_SHIFT), 4096)
                self.counters["pages dropped"] += 1


def _is_changed(entry: int, key: WindowKey, at: int, old: bytes, new: bytes) -> bool:
    """Whether a store changed a table entry in a way that matters to a window that used it.

    A and D bits that are set, as the CPU does all the time, only grant more. In a PDPTE they are reserved.
    """
    size_bytes = 8 if key[0] & _PAE_KEY else 4
    grants = 0 if key[0] & _PAE_KEY and 0 <= entry - (key[0] & 0xFFFF_FFE0) < 32 else _ACCESSED_DIRTY
    for index in range(max(0, entry - at), min(len(new), entry + size_bytes - at)):
        change = old[index] ^ new[index]
        if change and (at + index != entry or change & ~grants or change & old[index]):
            return True
    return False


def is_in_hole(ram_page: int) -> bool:
    """Whether a page of the RAM memfd lies in the PC hole, where the memory is not plain RAM."""
    return HOLE_FIRST >> PAGE_SHIFT <= ram_page <= HOLE_LAST >> PAGE_SHIFT
