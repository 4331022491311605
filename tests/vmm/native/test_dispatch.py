"""Dispatch tables: sparse, all misses at first, cleared by page."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vmm.native.dispatch import TABLE_BYTES, DispatchTable, Slice


@pytest.fixture
def table() -> Iterator[DispatchTable]:
    made = DispatchTable()
    yield made
    made.close()


def entry(table: DispatchTable, eip: int) -> int:
    return ctypes.c_uint32.from_address(table.host + 4 * eip).value


EDGES = (0, 0xFFF, 0x1000, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF)


def test_everything_is_a_miss_at_first(table: DispatchTable) -> None:
    assert [entry(table, eip) for eip in EDGES] == [0] * 6
    assert [table.get(eip) for eip in EDGES] == [None] * 6


def test_entries_are_what_was_set_last(table: DispatchTable) -> None:
    for offset in (0x10, 0x3FF_FFF0):
        for number, eip in enumerate(EDGES):
            table.set(eip, offset + number)
        assert [entry(table, eip) for eip in EDGES] == [table.get(eip) for eip in EDGES]
        assert [table.get(eip) for eip in EDGES] == [offset + number for number in range(6)]


def test_a_page_is_cleared_alone(table: DispatchTable) -> None:
    for eip in (0x1FFF, 0x2000, 0x2ABC, 0x2FFF, 0x3000):
        table.set(eip, 7)
    table.clear_page(2)
    assert [entry(table, eip) for eip in (0x1FFF, 0x2000, 0x2ABC, 0x2FFF, 0x3000)] == [7, 0, 0, 0, 7]
    assert [table.get(eip) for eip in (0x1FFF, 0x2000, 0x2ABC, 0x2FFF, 0x3000)] == [7, None, None, None, 7]
    table.clear_page(2)
    table.clear_page(0xF_FFFF)


def test_all_of_it_is_cleared(table: DispatchTable) -> None:
    for eip in EDGES:
        table.set(eip, 9)
    table.clear()
    assert [entry(table, eip) for eip in EDGES] == [0] * 6
    assert not table.entries


def test_it_costs_what_is_touched(table: DispatchTable) -> None:
    def resident_kib() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0])

    before = resident_kib()
    for number in range(64):
        table.set(number << 26, 1)
    assert resident_kib() - before < 64 * 4 + 2048  # huge pages would take 128 MiB


def test_it_is_given_back() -> None:
    made = DispatchTable()
    first, end = made.host, made.host + TABLE_BYTES
    made.close()
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(text, 16) for text in line.split()[0].split("-"))
        assert high <= first or low >= end


class TestSlices:
    """The slice is for the pages from 400h on, 256 of them."""

    PAGES = 0x100

    @pytest.fixture
    def part(self) -> Iterator[Slice]:
        made = Slice(0x400, self.PAGES)
        yield made
        made.close()

    @pytest.fixture
    def tables(self) -> Iterator[list[DispatchTable]]:
        made = [DispatchTable(slice_shift=8) for _ in range(2)]
        yield made
        for table in made:
            table.close()

    def test_what_one_sets_the_others_have(self, part: Slice, tables: list[DispatchTable]) -> None:
        eips = (0x3F_FFFF, 0x40_0000, 0x4F_FFFF, 0x50_0000)
        for table in tables:
            table.attach(part)
        for number, eip in enumerate(eips):
            tables[0].set(eip, 10 + number)
        assert [entry(tables[0], eip) for eip in eips] == [10, 11, 12, 13]
        assert [entry(tables[1], eip) for eip in eips] == [0, 11, 12, 0]
        assert [tables[1].get(eip) for eip in eips] == [None, 11, 12, None]
        assert [tables[1].has(eip >> 12) for eip in eips] == [False, True, True, False]
        assert [table.count() for table in tables] == [4, 2]

    def test_own_entries_become_common(self, part: Slice, tables: list[DispatchTable]) -> None:
        tables[0].set(0x40_0000, 1)
        tables[0].set(0x50_0000, 2)
        tables[1].set(0x40_0FFF, 3)
        for table in tables:
            table.attach(part)
        for table in tables:
            assert [table.get(eip) for eip in (0x40_0000, 0x40_0FFF)] == [1, 3]
            assert [entry(table, eip) for eip in (0x40_0000, 0x40_0FFF)] == [1, 3]
        assert [entry(table, 0x50_0000) for table in tables] == [2, 0]

    def test_who_lets_go_has_nothing(self, part: Slice, tables: list[DispatchTable]) -> None:
        for table in tables:
            table.attach(part)
        tables[1].set(0x45_6789, 5)
        tables[1].detach(4)
        assert [entry(table, 0x45_6789) for table in tables] == [5, 0]
        assert [table.get(0x45_6789) for table in tables] == [5, None]
        tables[1].set(0x45_6789, 6)
        assert [entry(table, 0x45_6789) for table in tables] == [5, 6]

    @pytest.mark.parametrize("clear", [lambda table: table.clear_page(0x456), DispatchTable.clear])
    def test_who_clears_does_it_for_all(
        self, part: Slice, tables: list[DispatchTable], clear: Callable[[DispatchTable], None]
    ) -> None:
        for table in tables:
            table.attach(part)
        tables[0].set(0x45_6789, 5)
        clear(tables[1])
        assert [entry(table, 0x45_6789) for table in tables] == [0, 0]
        assert [table.get(0x45_6789) for table in tables] == [None, None]
