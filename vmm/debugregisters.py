"""DR0 to DR3 and DR7: which instructions and data accesses the guest's own breakpoints are for, as pure functions.

They take the eight debug registers. What a hit leads to, and who watches the pages, is the engines' business.

Source: SDM Vol. 3B, "Debug Registers".
"""

from __future__ import annotations

from collections.abc import Sequence

from machine.memory import PAGE_SHIFT

DR7_ENABLED = 0xFF  # L and G bits of all four
# R/W fields; 0 is an instruction, 2 needs CR4.DE and an I/O port.
_WRITE, _ACCESS = 1, 3
_LENGTHS_BYTES = (1, 2, 8, 4)  # by LEN field


def _is_enabled(dr7: int, number: int) -> bool:
    return bool(dr7 >> (2 * number) & 3)


def instruction_addresses(registers: Sequence[int]) -> frozenset[int]:
    """The linear addresses of all instruction breakpoints."""
    return frozenset(
        registers[number] for number in range(4) if instruction_hits(registers, registers[number]) >> number & 1
    )


def instruction_hits(registers: Sequence[int], linear: int) -> int:
    """Which breakpoints the instruction at a linear address meets, as the B bits of DR6."""
    dr7 = registers[7]
    hits = 0
    for number in range(4):
        if registers[number] == linear and dr7 >> (2 * number) & 3 and not dr7 >> (16 + 4 * number) & 0xF:
            hits |= 1 << number
    return hits


def data_hits(registers: Sequence[int], linear: int, size_bytes: int, *, write: bool) -> int:
    """Which breakpoints a data access meets, as the B bits of DR6."""
    hits = 0
    for number in range(4):
        kind = registers[7] >> (16 + 4 * number) & 3
        if _is_enabled(registers[7], number) and (kind == _ACCESS or (kind == _WRITE and write)):
            length = _LENGTHS_BYTES[registers[7] >> (18 + 4 * number) & 3]
            first = registers[number] & ~(length - 1)
            if linear < first + length and first < linear + size_bytes:
                hits |= 1 << number
    return hits


def watch_data(pages: dict[int, bool], registers: Sequence[int]) -> None:
    """Add the pages of all data breakpoints: see `watch_pages`."""
    for number in range(4):
        kind = registers[7] >> (16 + 4 * number) & 3
        if _is_enabled(registers[7], number) and kind & _WRITE:
            watch_pages(pages, registers[number], 8, reads=kind == _ACCESS)


def watch_pages(pages: dict[int, bool], address: int, length: int, *, reads: bool) -> None:
    """Add the page numbers of `length` bytes; True if reads matter, too."""
    for page in range(address >> PAGE_SHIFT, (address + length - 1 >> PAGE_SHIFT) + 1):
        pages[page] = pages.get(page, False) or reads
