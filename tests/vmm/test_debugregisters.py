"""DR7 decoded: which instructions and accesses the guest's own breakpoints are for."""

from __future__ import annotations

import pytest

from vmm.debugregisters import data_hits, instruction_addresses, instruction_hits, watch_data, watch_pages

EXECUTE, WRITE, ACCESS = 0, 1, 3


def registers(*breakpoints: tuple[int, int, int, int]) -> list[int]:
    """DR0 to DR7 with breakpoints: address, enable bits (L, G), R/W, LEN."""
    values = [0] * 8
    for number, (address, enable, kind, length) in enumerate(breakpoints):
        values[number] = address
        values[7] |= enable << 2 * number | kind << 16 + 4 * number | length << 18 + 4 * number
    return values


def test_instructions() -> None:
    dr = registers((0x1000, 1, EXECUTE, 0), (0x1000, 2, EXECUTE, 0), (0x1000, 0, EXECUTE, 0), (0x1000, 1, WRITE, 0))
    assert instruction_addresses(dr) == {0x1000}
    assert instruction_hits(dr, 0x1000) == 0b0011
    assert instruction_hits(dr, 0x1001) == 0
    # A length is not for instructions.
    assert instruction_hits(registers((0x1000, 1, EXECUTE, 3)), 0x1000) == 0
    assert instruction_addresses(registers((0x1000, 0, EXECUTE, 0))) == frozenset()


@pytest.mark.parametrize(("length", "size"), [(0, 1), (1, 2), (3, 4), (2, 8)])
def test_data(length: int, size: int) -> None:
    dr = registers((0x2000 + 8 | 1, 1, WRITE, length), (0x2008, 2, ACCESS, length))
    first = 0x2009 if size == 1 else 0x2008
    assert data_hits(dr, first, 1, write=True) & 1
    assert data_hits(dr, first + size - 1, 1, write=True) & 1
    assert data_hits(dr, first - 4, 4, write=True) & 1 == 0
    assert data_hits(dr, first + size, 4, write=True) & 1 == 0
    assert data_hits(dr, 0x2008, 4, write=False) == 0b10


def test_pages() -> None:
    pages: dict[int, bool] = {}
    watch_data(
        pages, registers((0x2FFC, 1, WRITE, 3), (0x5000, 1, ACCESS, 0), (0x7000, 1, EXECUTE, 0), (0x8000, 0, 1, 0))
    )
    assert pages == {2: False, 3: False, 5: True}
    watch_pages(pages, 0x3FFF, 2, reads=True)
    assert pages == {2: False, 3: True, 4: True, 5: True}
