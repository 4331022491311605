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
from machine.paging import walk
from machine.state import CR0_PG, CR0_WP, CR4_PAE, CR4_PSE
from vmm.native import hostmemory

WINDOW_BYTES = 1 << 32
# Nothing is mapped on both sides: an access at the last byte may run on, and a REP by some megabytes either way.
GUARD_BYTES = 1 << 32
STRIDE_BYTES = WINDOW_BYTES + 2 * GUARD_BYTES
MAX_WINDOWS = 16
MAX_MAPPINGS = 24_000  # two mappings a page at worst, of the 65,530 that Linux allows a process by default
HOLDS_SHADOWED_TABLE = 0x10  # page flag: a window depends on a page table in this page of RAM

WindowKey = tuple[int, bool, bool]


@dataclass(slots=True)
class Window:
    """One window.

    Attributes:
        host: its first address, a multiple of 4 GiB.
        key: CR3 with the paging mode in its low bits, user or supervisor, CR0.WP.
        pages: linear page number to (page of RAM, writable).
    """

    host: int
    key: WindowKey
    pages: dict[int, tuple[int, bool]] = field(default_factory=dict)


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
        self._spare: list[int] = []
        self._users_of_page: dict[int, set[tuple[WindowKey, int]]] = {}
        # A table entry's physical address to the window pages that came from it (a directory's: to all below it).
        self._users_of_entry: dict[int, set[tuple[WindowKey, int]]] = {}
        self._entries_in_page: dict[int, set[int]] = {}
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
        self.drop_all()
        for host in self._spare:
            hostmemory.release(host - GUARD_BYTES, STRIDE_BYTES)
        self._spare.clear()

    def select(self) -> Window:
        """The window for the CPU's address space and privilege; made if there is none yet."""
        state = self._cpu.state
        if state.cr0 & CR0_PG:
            mode = (1 if state.cr4 & CR4_PAE else 0) | (2 if state.cr4 & CR4_PSE else 0)
            user = state.cpl == 3
            key = (state.cr3 & 0xFFFF_FFE0 | mode | 4, user, bool(state.cr0 & CR0_WP) or user)
        else:
            key = (0, False, False)
        window = self._windows.get(key)
        if window is None:
            window = self._new_window(key)
        else:
            self._windows.move_to_end(key)
        self.current = window
        return window

    def _new_window(self, key: WindowKey) -> Window:
        if len(self._windows) >= MAX_WINDOWS:
            self._evict()
        if self._spare:
            host = self._spare.pop()
        else:
            host = hostmemory.reserve(STRIDE_BYTES, align=WINDOW_BYTES) + GUARD_BYTES
        window = self._windows[key] = Window(host, key)
        return window

    def _evict(self) -> None:
        key, window = next(iter(self._windows.items()))
        self.counters["windows evicted"] += 1
        self._empty(window)
        del self._windows[key]
        self._spare.append(window.host)

    def _empty(self, window: Window) -> None:
        for page in list(window.pages):
            self._forget(window, page)
            for observer in self.on_drop:
                observer(window.host, page)
        window.pages.clear()
        hostmemory.unmap(window.host, WINDOW_BYTES)

    def drop_all(self) -> None:
        """Forget every mapping of every window."""
        for window in self._windows.values():
            self._empty(window)
            self._spare.append(window.host)
        self._windows.clear()
        for ram_page in self._entries_in_page:
            self._memory.page_flags[ram_page] &= ~HOLDS_SHADOWED_TABLE
        self._entries_in_page.clear()
        self._users_of_entry.clear()
        self.select()

    def fill(self, linear: int, *, write: bool) -> bool:
        """Map the page at `linear` into the current window, as an access of the guest demands it.

        Returns:
            False if no mapping can serve the access: a device, ROM written to, a page that someone watches, or a page
            fault of the guest's own. The interpreter then executes the instruction.
        """
        window, memory = self.current, self._memory
        user = window.key[1]
        try:
            translation = walk(memory, self._cpu.state, linear, write=write, user=user)
        except PageFault:
            return False
        at = memory.ram_address(translation.physical)
        if at < 0:
            return False
        ram_page, page = at >> PAGE_SHIFT, linear >> PAGE_SHIFT
        flags = memory.page_flags[ram_page]
        if write and flags:
            return False
        allowed = translation.writable or not window.key[2]
        writable = translation.dirty and allowed and not flags
        old = window.pages.get(page)
        if old == (ram_page, writable):
            return False  # mapped already and faults all the same: not ours to mend
        if sum(len(each.pages) for each in self._windows.values()) >= MAX_MAPPINGS:
            self._empty(window)
        elif old is not None:
            self._forget(window, page)
        for entry in translation.tables:
            self._depend(entry, window.key, page)
        hostmemory.map_file(
            window.host + (page << PAGE_SHIFT), 4096, memory.ram_fd, ram_page << PAGE_SHIFT, writable=writable
        )
        window.pages[page] = (ram_page, writable)
        self._users_of_page.setdefault(ram_page, set()).add((window.key, page))
        self.counters["hidden faults"] += 1
        return True

    def _depend(self, entry: int, key: WindowKey, page: int) -> None:
        at = self._memory.ram_address(entry)
        if at < 0:
            return
        ram_page = at >> PAGE_SHIFT
        self._users_of_entry.setdefault(at, set()).add((key, page))
        entries = self._entries_in_page.get(ram_page)
        if entries is None:
            entries = self._entries_in_page[ram_page] = set()
            self._memory.flag_page(ram_page, HOLDS_SHADOWED_TABLE)
        entries.add(at)

    def _protect(self, ram_page: int) -> None:
        """A page of RAM got a flag: from now on a write to it faults in every window."""
        for key, page in self._users_of_page.get(ram_page, ()):
            window = self._windows[key]
            _, writable = window.pages[page]
            if writable:
                hostmemory.protect(window.host + (page << PAGE_SHIFT), 4096, writable=False)
                window.pages[page] = (ram_page, False)

    def _forget(self, window: Window, page: int) -> None:
        ram_page, _ = window.pages[page]
        users = self._users_of_page[ram_page]
        users.discard((window.key, page))
        if not users:
            del self._users_of_page[ram_page]

    def _drop(self, key: WindowKey, page: int) -> None:
        window = self._windows.get(key)
        if window is None or page not in window.pages:
            return
        self._forget(window, page)
        del window.pages[page]
        hostmemory.unmap(window.host + (page << PAGE_SHIFT), 4096)
        for observer in self.on_drop:
            observer(window.host, page)
        self.counters["pages dropped"] += 1

    def _written(self, at: int, length: int, _old: bytes, flags: int) -> None:
        """A store to a page that holds tables: what came from the entries it touched is dropped."""
        if not flags & HOLDS_SHADOWED_TABLE:
            return
        width = 8 if self._cpu.state.cr4 & CR4_PAE else 4
        for entry in range(at & -width, at + length, width):
            for key, page in self._users_of_entry.pop(entry, ()):
                self._drop(key, page)


def is_in_hole(ram_page: int) -> bool:
    """Whether a page of the RAM memfd lies in the PC hole, where the memory is not plain RAM."""
    return HOLE_FIRST >> PAGE_SHIFT <= ram_page <= HOLE_LAST >> PAGE_SHIFT
