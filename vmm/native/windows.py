"""Windows: guest linear address spaces as host address space, one for each (page tables, privilege).

A page of a window is a mapping of the RAM memfd, so that the host's MMU does the walk: the window is the shadow page
table. It must not know instructions or fragments; who runs code tells it what must not be written behind our back.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path

from machine.cpu import Cpu
from machine.memory import PAGE_SHIFT
from machine.state import CR0_PG, CR0_WP, CR4_PAE, CR4_PSE, CpuState
from vmm.native import hostmemory
from vmm.native.filling import AROUND_PAGES, Filler, Refusal
from vmm.native.regions import Region
from vmm.native.shadows import (
    HOLDS_SHADOWED_TABLE,
    PAE_KEY,
    PAGING_KEY,
    PROTECT_KEY,
    PSE_KEY,
    USER_KEY,
    WINDOW_BYTES,
    MappingLedger,
    Shadows,
    Window,
)
from vmm.native.volatility import VolatileEntries
from vmm.native.withheld import Withheld

__all__ = ["HOLDS_SHADOWED_TABLE", "WINDOW_BYTES", "Refusal", "Window", "Windows", "WindowsError"]

# Nothing is mapped on both sides: an access at the last byte may run on, and a REP by some megabytes either way.
GUARD_BYTES = 1 << 32
STRIDE_BYTES = WINDOW_BYTES + 2 * GUARD_BYTES
MAX_WINDOWS = 96
RESERVED_MAPPINGS = 8192  # host mappings left to Python, to everything else in the process, and to other engines
WINDOW_MAPPINGS = 3  # a window's reservation and its guards
FILLS_KEPT = 8  # more than the pages that one instruction can need

_DEFAULT_MAP_COUNT = 65_530
_MAX_MAP_COUNT = Path("/proc/sys/vm/max_map_count")
_NOTHING_SELECTED = (-1, 0, 0, 0)


def max_mappings() -> int:
    """How many host mappings all windows of the process may take: what the kernel allows, less a reserve."""
    try:
        allowed = int(_MAX_MAP_COUNT.read_text())
    except (OSError, ValueError):
        allowed = _DEFAULT_MAP_COUNT
    return max(allowed // 2, allowed - RESERVED_MAPPINGS)


MAX_MAPPINGS = max_mappings()


class WindowsError(Exception):
    """The windows cannot be had: the host's limits are too low."""


class Windows:
    """All windows of one machine.

    Attributes:
        current: the window of the address space and privilege that the CPU is in; `select` sets it.
        on_drop: told of each page that is mapped no more: the window's host address, the linear page number.
        on_close: told of each region, what one page table or large page maps, before its pages are dropped.
        on_evict: told of each window that is given up, by its host address.
        before_fill: asked before a page is mapped: window, linear address, is it for a write; False refuses.
    """

    def __init__(self, cpu: Cpu) -> None:
        self._cpu = cpu
        self._shadows = Shadows(cpu.memory)
        self._filler = Filler(cpu.memory, self._shadows)
        self._windows: OrderedDict[int, Window] = OrderedDict()
        self._by_host: dict[int, Window] = {}
        self._spare: list[int] = []
        self._selected = _NOTHING_SELECTED
        self._evicted = 0
        self._watched: tuple[Mapping[int, bool], Mapping[int, bool]] = {}, {}
        self.on_drop = self._shadows.on_drop
        self.on_close = self._shadows.on_close
        self.on_evict: list[Callable[[int], None]] = []
        self.before_fill: Callable[[Window, int, bool], bool] | None = None
        self.current = self.select()

    @property
    def refusal(self) -> Refusal:
        """Why the last `fill` returned False."""
        return self._filler.refusal

    @property
    def counters(self) -> dict[str, int]:
        """What happened since the start."""
        volatile = {} if self._shadows.volatile is None else self._shadows.volatile[0].counters
        return {**self._filler.counters, **self._shadows.counters, **volatile, "windows evicted": self._evicted}

    def keep_tables(self, *, always: bool = True) -> None:
        """From now on no page table is let go of because it is written time and again; or, if not always, again."""
        self._shadows.lets_go = not always

    def keep_out(self, volatile: VolatileEntries) -> None:
        """From now on pages whose entries change all the time may be kept out: see `fill`."""
        self._shadows.volatile = volatile, self._cpu.clock

    def note_uses(self, uses: memoryview | None) -> None:
        """From now on set a byte for each doubleword of an entry that a mapping comes from; no page is mapped yet."""
        self._shadows.entry_uses = uses

    def look_at(self, cell: int) -> None:
        """The page whose entry is at offset `cell` of RAM is accessed without a window: it may have calmed down."""
        self._shadows.look_at(cell)

    def depend_on(self, cell: int) -> bool:
        """Whether anything is mapped because of the entry at offset `cell` of RAM."""
        return self._shadows.depend_on(cell)

    def prefill(self, at: int) -> int:
        """Map the pages whose entry at RAM offset `at` of a page table was written and says that they were touched.

        Returns:
            How many windows got a page.
        """
        return sum(self._filler.prefill(window, region, at) for region, window in self._shadows.users_of(at))

    def attach(self) -> None:
        """Watch stores to page tables."""
        self._shadows.attach()
        self._cpu.memory.map_observers.append(self.drop_all)

    def detach(self) -> None:
        """Stop watching and give all address space back."""
        self._cpu.memory.map_observers.remove(self.drop_all)
        while self._windows:
            self._evict()
        for host in self._spare:
            hostmemory.release(host - GUARD_BYTES, STRIDE_BYTES)
            MappingLedger.used -= WINDOW_MAPPINGS
        self._spare.clear()
        self._shadows.detach()

    # Choosing a window.

    def select(self) -> Window:
        """The window for the CPU's address space and privilege; made if there is none yet."""
        state = self._cpu.state
        selected = (state.cr3, state.cpl, state.cr0, state.cr4)
        if selected == self._selected:
            return self.current
        key = self._key(state.cr3, user=state.cpl == 3)
        window = self._windows.get(key)
        if window is None:
            window = self._new_window(key)
        else:
            self._windows.move_to_end(key)
        self.current = window
        self._selected = selected
        return window

    def lookup(self, cr3: int, *, user: bool) -> Window | None:
        """The window for an address space and privilege in the CPU's paging mode, if there is one."""
        return self._windows.get(self._key(cr3, user=user))

    def at(self, host: int) -> Window | None:
        """The window that a host address lies in."""
        return self._by_host.get(host & -WINDOW_BYTES)

    def _key(self, cr3: int, *, user: bool) -> int:
        state = self._cpu.state
        cr0 = state.cr0
        if not cr0 & CR0_PG:
            return 0
        cr4 = state.cr4
        key = cr3 & 0xFFFF_FFE0 | PAGING_KEY
        if cr4 & CR4_PAE:
            key |= PAE_KEY
        if cr4 & CR4_PSE:
            key |= PSE_KEY
        if user:
            return key | USER_KEY | PROTECT_KEY
        return key | PROTECT_KEY if cr0 & CR0_WP else key

    def _new_window(self, key: int) -> Window:
        while len(self._windows) >= MAX_WINDOWS:
            self._evict()
            self._evicted += 1
        if self._spare:
            host = self._spare.pop()
        else:
            host = hostmemory.reserve(STRIDE_BYTES, align=WINDOW_BYTES) + GUARD_BYTES
            MappingLedger.used += WINDOW_MAPPINGS
        paging = CpuState()
        paging.cr0 = (CR0_PG if key & PAGING_KEY else 0) | (CR0_WP if key & PROTECT_KEY else 0)
        paging.cr3 = key & 0xFFFF_FFE0 if key else 0
        paging.cr4 = (CR4_PAE if key & PAE_KEY else 0) | (CR4_PSE if key & PSE_KEY else 0)
        window = Window(host, key, bool(key & USER_KEY), paging, 21 if key & PAE_KEY else 22)
        self._windows[key] = self._by_host[host] = window
        return window

    def open_like(self, window: Window, known: Region) -> bool:
        """Depend on what a region of another window depends on, if this one's entry says the same; nothing is mapped.

        Returns:
            Whether it does.
        """
        return self._filler.open_like(window, known)

    # Giving up.

    def _evict(self) -> None:
        """Give up the window that was selected least recently."""
        _, window = self._windows.popitem(last=False)
        self._shadows.empty(window)
        del self._by_host[window.host]
        self._spare.append(window.host)
        self._selected = _NOTHING_SELECTED
        for observer in self.on_evict:
            observer(window.host)

    def drop_all(self) -> None:
        """Forget every mapping of every window."""
        while self._windows:
            self._evict()
        self._shadows.withheld = self._place_watched()
        self.select()

    def _make_room(self, wanted: Window, least_fills: int = FILLS_KEPT) -> bool:
        """Empty the window that was selected least recently, of those that were filled so often; `wanted` itself last.

        Returns:
            False if none has hardly more than one instruction needs, which may use two windows.
        """
        for window in self._windows.values():
            if window.regions and window is not wanted and window.fills >= least_fills:
                break
        else:
            if wanted.fills < FILLS_KEPT:
                return False
            window = wanted
        self._shadows.empty(window)
        self._evicted += 1
        return True

    def withhold(self, linear: Mapping[int, bool], physical: Mapping[int, bool]) -> None:
        """From now on every write to these pages is a fault that `fill` does not serve, since somebody watches them.

        Args:
            linear: linear page numbers of every address space; True if reads are faults, too.
            physical: physical page numbers; a page of RAM that answers at several addresses is withheld at all.
        """
        before = self._shadows.withheld
        self._watched = dict(linear), dict(physical)
        self._shadows.withheld = self._place_watched()
        if before != self._shadows.withheld:
            for window in list(self._windows.values()):
                self._shadows.withhold(window, before)

    def _place_watched(self) -> Withheld:
        """Which pages are withheld, with A20 as it is."""
        linear, physical = self._watched
        places = ((self._cpu.memory.ram_address(page << PAGE_SHIFT), reads) for page, reads in physical.items())
        return Withheld(linear, {at >> PAGE_SHIFT: reads for at, reads in places if at >= 0})

    # Filling.

    def fill(self, linear: int, *, write: bool, window: Window | None = None, insists: bool = True) -> bool:
        """Map the page at `linear` into a window, the current one unless said, as an access of the guest demands it.

        Args:
            linear: where.
            write: the access is a write.
            window: see above.
            insists: False: who makes the access can do without the page, if that is volatile.

        Returns:
            False if no mapping can serve the access, `refusal` says why: a device, ROM written to, a page that someone
            watches, or a page fault of the guest's own. The interpreter then executes the instruction.

        Raises:
            WindowsError: the host has no room for a single page.
        """
        if window is None:
            window = self.current
        if self.before_fill is not None and not self.before_fill(window, linear, write):
            self._filler.refusal = Refusal.SPURIOUS
            return False
        while MappingLedger.used + 2 * AROUND_PAGES > MAX_MAPPINGS and self._make_room(window):
            pass
        while True:
            try:
                return self._filler.fill(window, linear, write=write, insists=insists)
            except hostmemory.HostMemoryError as error:
                if not self._make_room(window, least_fills=0):
                    if not any(region.mapped for region in window.regions.values()):
                        raise WindowsError("the host has no room for a page of a window") from error
                    self._shadows.empty(window)
