"""Sharing: slices of dispatch tables that address spaces have in common, so that a new one finds the kernel warm.

Where the entry above a page table says the same in two windows of the same rights, the same code is at the same
addresses, and stays so until that entry changes, which closes the region of one window, or an entry of the page table
does, which clears that page for all. It must not know fragments, nor who runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vmm.native import hostmemory
from vmm.native.dispatch import DispatchTable, Slice
from vmm.native.modes import Mode
from vmm.native.regions import Region
from vmm.native.shadows import MappingLedger, Window
from vmm.native.windows import MAX_MAPPINGS, Windows

MAX_SLICES = 256  # each is an open file
SLICE_MAPPINGS = 2  # at worst a slice cuts its table in two
_RIGHTS = 0x1F  # of a window's key, without CR3

# Mode, rights and paging mode of the window, first page, and what the entry above the page table says.
_Key = tuple[Mode, int, int, int]


@dataclass(slots=True, eq=False)
class Space:
    """One space.

    Attributes:
        window: guest memory.
        mode: what the fragments that run in it are translated for.
        table: their offsets by guest address.
        shared: its regions with code, by number.
    """

    window: Window
    mode: Mode
    table: DispatchTable
    shared: dict[int, _Key] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class _Common:
    """What has the same key: the spaces, and the slice as soon as there are two."""

    spaces: dict[Space, Region] = field(default_factory=dict)
    slice: Slice | None = None


class Sharing:
    """Who has code in common with whom, of one engine.

    Attributes:
        enabled: whether anything is shared at all.
        cold: windows of which a region with code that others have was closed, since they were last warmed.
    """

    def __init__(self, windows: Windows) -> None:
        self._windows = windows
        self._common: dict[_Key, _Common] = {}
        self._slices = 0
        self.enabled = True
        self.cold: set[int] = set()

    def join(self, space: Space, page: int) -> None:
        """There will be entries for a linear page, which the window has mapped: they are for all who may have them."""
        window = space.window
        number = page >> space.table.slice_shift
        if number in space.shared or not window.key or space.mode.code_base or not self.enabled:
            return
        region = window.regions[number]
        key = space.mode, window.key & _RIGHTS, region.first_page, region.uppers[-1][1]
        self._enlist(space, key, region)

    def _enlist(self, space: Space, key: _Key, region: Region) -> None:
        common = self._common.get(key)
        if common is None:
            common = self._common[key] = _Common()
        space.shared[region.first_page >> space.table.slice_shift] = key
        common.spaces[space] = region
        if common.slice is not None:
            self._attach(space, common)
        elif len(common.spaces) > 1 and self._slices < MAX_SLICES:
            try:
                common.slice = Slice(region.first_page, region.page_count)
            except OSError:  # the process has as many files open as it may
                return
            self._slices += 1
            for each in list(common.spaces):
                self._attach(each, common)

    def _attach(self, space: Space, common: _Common) -> None:
        """Have the slice, if the host has room for it; else the space goes on alone."""
        assert common.slice is not None
        region = common.spaces[space]
        try:
            if MappingLedger.used + SLICE_MAPPINGS > MAX_MAPPINGS:
                return
            space.table.attach(common.slice)
        except hostmemory.HostMemoryError:
            return
        MappingLedger.used += SLICE_MAPPINGS
        region.shared_code.append(common.slice.entries)

    def leave(self, space: Space, number: int) -> None:
        """A region of a space's window is closed, or the space is given up: it has nothing in common any more."""
        key = space.shared.pop(number, None)
        if key is None:
            return
        common = self._common[key]
        region = common.spaces.pop(space)
        if number in space.table.slices:
            region.shared_code = [
                pages for pages in region.shared_code if pages is not space.table.slices[number].entries
            ]
            space.table.detach(number)
            MappingLedger.used -= SLICE_MAPPINGS
            self.cold.add(space.window.host)
        if not common.spaces:
            del self._common[key]
            if common.slice is not None:
                common.slice.close()
                self._slices -= 1

    def warm(self, space: Space) -> None:
        """Have what others know of this space's code, wherever its window's entries say the same as theirs."""
        window = space.window
        self.cold.discard(window.host)
        if not window.key or space.mode.code_base or not self.enabled:
            return
        for key, common in list(self._common.items()):
            mode, rights, first_page, _ = key
            if common.slice is None or mode != space.mode or rights != window.key & _RIGHTS:
                continue
            known = next(iter(common.spaces.values()))
            number = first_page >> space.table.slice_shift
            if number not in space.shared and self._windows.open_like(window, known):
                self._enlist(space, key, window.regions[number])
