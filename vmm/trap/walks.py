"""Page walks under nested paging: how many memory references the two-dimensional walk makes, and what caches save.

It counts and changes nothing; when the hardware walks is known to whoever runs the guest.

With m levels of guest tables over n levels of nested ones a walk makes nm + n + m references: each guest entry has a
guest-physical address that is translated first, and so has the final one. A page-walk cache keeps upper entries.

Source: R. Bhargava et al., "Accelerating Two-Dimensional Page Walks for Virtualized Systems", ASPLOS 2008.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TypeVar

from machine.memory import PhysicalMemory
from machine.paging import entries
from machine.state import CR0_PG, CpuState

NESTED_LEVELS = 2  # tables of 32 bits with pages of 4 KiB, as the guest's own
CACHE_ENTRIES = 16
_REGION_SHIFT = 22
_Key = TypeVar("_Key")


class WalkCounter:
    """The walks of one guest.

    Attributes:
        walks: how many.
        references: of memory, by all of them.
        references_native: what the guest's tables alone would have taken.
        references_cached: with a page-walk cache of 16 upper entries of the guest's tables, and as many nested ones.
    """

    __slots__ = ("_guest", "_memory", "_nested", "references", "references_cached", "references_native", "walks")

    def __init__(self, memory: PhysicalMemory) -> None:
        self._memory = memory
        self._guest: OrderedDict[tuple[int, int], None] = OrderedDict()
        self._nested: OrderedDict[int, None] = OrderedDict()
        self.walks = self.references = self.references_native = self.references_cached = 0

    def count(self, paging: CpuState, linear: int) -> None:
        """One walk for a linear address under the guest's control registers."""
        path = list(entries(self._memory, paging, linear)) if paging.cr0 & CR0_PG else []
        levels = len(path)
        self.walks += 1
        self.references_native += levels
        self.references += NESTED_LEVELS * levels + NESTED_LEVELS + levels
        upper_known = levels > 1 and _touch(self._guest, (paging.cr3, linear >> _REGION_SHIFT))
        for entry in path[-1:] if upper_known else path:
            self.references_cached += self._nested_references(entry.physical) + 1
        leaf = path[-1].value & 0xFFFF_F000 if path else linear
        self.references_cached += self._nested_references(leaf)

    def _nested_references(self, physical: int) -> int:
        return 1 if _touch(self._nested, physical >> _REGION_SHIFT) else NESTED_LEVELS


def _touch(cache: OrderedDict[_Key, None], key: _Key) -> bool:
    """Whether a key was in a cache; it is from now on."""
    known = key in cache
    cache[key] = None
    cache.move_to_end(key)
    if len(cache) > CACHE_ENTRIES:
        cache.popitem(last=False)
    return known
