"""Dispatch tables: sparse, all misses at first, cleared by page."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmm.native.dispatch import TABLE_BYTES, DispatchTable


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
