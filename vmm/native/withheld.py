"""Withheld pages: what a debugger or DR7 watches, so that an access to it has to be a fault.

On the books of a window such a page keeps the rights that it would have; here the host is told to give fewer. It must
not know who watches, nor what a fault leads to.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from machine.memory import PAGE_SHIFT
from vmm.native import hostmemory
from vmm.native.regions import Region


@dataclass(slots=True)
class Withheld:
    """The pages, by number; True: reads are faults, too, else writes only.

    Attributes:
        linear: linear pages, of every address space.
        ram: pages of RAM, wherever they are mapped.
    """

    linear: Mapping[int, bool] = field(default_factory=dict)
    ram: Mapping[int, bool] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.linear or self.ram)

    def enforce(self, region: Region, first: int, count: int) -> None:
        """Take the rights to such pages away, among `count` pages of a region that have just got theirs.

        Raises:
            HostMemoryError: the host has no room to tell them from their neighbours.
        """
        for index in self.indices(region):
            if first <= index < first + count:
                host = region.host + (index << PAGE_SHIFT)
                page, ram_page = region.first_page + index, region.ram_pages[index]
                if self.linear.get(page) or self.ram.get(ram_page):
                    hostmemory.forbid(host, 4096)
                else:
                    hostmemory.protect(host, 4096, writable=False)

    def indices(self, region: Region) -> set[int]:
        """Where a region has any of them mapped."""
        return _indices(region, self.linear.keys(), self.ram.keys())

    def changed_indices(self, region: Region, before: Withheld) -> set[int]:
        """Where a region has a page mapped that is not withheld as it was before."""
        linear = {page for page, _ in before.linear.items() ^ self.linear.items()}
        ram = {page for page, _ in before.ram.items() ^ self.ram.items()}
        return _indices(region, linear, ram)


def _indices(region: Region, pages: AbstractSet[int], ram_pages: AbstractSet[int]) -> set[int]:
    if len(pages) > region.page_count:
        found = {index for index in range(region.page_count) if region.first_page + index in pages}
    else:
        found = {page - region.first_page for page in pages if 0 <= page - region.first_page < region.page_count}
    found = {index for index in found if region.kinds[index]}
    return found.union(*(region.indices_of(ram_page) for ram_page in ram_pages))
