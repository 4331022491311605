"""Counting of nested page walks, against the formula and by hand."""

from __future__ import annotations

from machine.memory import PhysicalMemory
from machine.state import CR0_PG, CR4_PAE, CR4_PSE, CpuState
from vmm.trap.walks import CACHE_ENTRIES, WalkCounter

DIRECTORY, TABLE = 0x1000, 0x2000


def counted(*linears: int, large: bool = False) -> WalkCounter:
    """Walks of 32-bit tables that map the first pages of every 4 MiB."""
    memory = PhysicalMemory(1 << 20)
    for number in range(1024):
        memory.store(DIRECTORY + 4 * number, 4, 0x83 if large else TABLE | 3)
        memory.store(TABLE + 4 * number, 4, number << 12 & 0xF_F000 | 3)
    paging = CpuState()
    paging.cr0, paging.cr3, paging.cr4 = CR0_PG, DIRECTORY, CR4_PSE
    counter = WalkCounter(memory)
    for linear in linears:
        counter.count(paging, linear)
    memory.close()
    return counter


def test_two_levels_over_two_make_eight() -> None:
    counter = counted(0x5000)
    assert (counter.walks, counter.references, counter.references_native) == (1, 8, 2)
    # The first nested walk reads two entries, the others find the upper one: 3 + 2 + 1.
    assert counter.references_cached == 6


def test_a_walk_of_which_all_upper_entries_are_cached_makes_three() -> None:
    assert counted(0x5000, 0x6000).references_cached == 6 + 3


def test_a_large_page_has_one_level() -> None:
    counter = counted(0x5000, large=True)
    assert (counter.references, counter.references_native) == (5, 1)


def test_the_cache_forgets_what_was_used_least_recently() -> None:
    far = [number << 22 for number in range(1, CACHE_ENTRIES + 1)]
    once = counted(0x5000, *far)
    again = counted(0x5000, *far, 0x5000)
    assert again.references_cached - once.references_cached == 2 + 2 + 1
    kept = counted(0x5000, *far[:-1], 0x5000)
    assert kept.references_cached - counted(0x5000, *far[:-1]).references_cached == 3


def test_without_paging_only_the_nested_tables_are_read() -> None:
    memory = PhysicalMemory(1 << 20)
    counter = WalkCounter(memory)
    counter.count(CpuState(), 0x5000)
    assert (counter.references, counter.references_native) == (2, 0)
    memory.close()


def test_pae_has_three_levels() -> None:
    memory = PhysicalMemory(1 << 20)
    for at, value in ((0x1000, 0x2001), (0x2000, 0x3003), (0x3028, 0x6003)):
        memory.store(at, 4, value)
    paging = CpuState()
    paging.cr0, paging.cr3, paging.cr4 = CR0_PG, 0x1000, CR4_PAE
    counter = WalkCounter(memory)
    counter.count(paging, 0x5000)
    assert (counter.references, counter.references_native) == (11, 3)
    memory.close()
