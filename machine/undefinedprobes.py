"""Owns the operands with which a CPU is asked what it does with undefined flags: few, but enough to tell rules apart.

It must not know the rules; the tests try every candidate against these operands.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from typing import Final

from machine.flags import AF, CF, STATUS_MASK

Operands = tuple[int, int, int, int]
"""a, b, c (0 where the operation has fewer) and EFLAGS."""

_ROTATES: Final = ("rol", "ror", "shl", "shr", "sar")
_ROTATES_THROUGH_CARRY: Final = ("rcl", "rcr")
_DOUBLE_SHIFTS: Final = ("shld", "shrd")

# AX around the sums and differences that AAA, AAS, DAA and DAS are made of: results 0, sign changes of AL and of AX.
_DECIMALS: Final = (
    0x0000, 0x000A, 0x0009, 0x007A, 0x0080, 0x0106, 0x0105, 0x7EFA, 0x7FFF, 0x8000, 0x800F, 0x8105, 0xFEFA, 0xFF0F,
    0x1286, 0x0099, 0x7F20, 0x01FA,
)  # fmt: skip


@cache
def probes(operation: str, width: int) -> tuple[Operands, ...]:
    """Operands for one operation; they never raise #DE, and are the same on every call."""
    source = random.Random(width)
    if operation in _ROTATES or operation in _DOUBLE_SHIFTS or operation in _ROTATES_THROUGH_CARRY:
        return _shift_probes(operation, width, source)
    if operation in ("div", "idiv"):
        return _divide_probes(width, source, signed=operation == "idiv")
    if operation in ("bsf", "bsr"):
        values = [0, 0, 1, 2, 4, 8, 1 << (width - 1), 3 << (width - 3), *(source.getrandbits(width) for _ in range(4))]
        return _with_flags([(source.getrandbits(width), value, 0) for value in values])
    if operation in ("bt", "bts", "btr", "btc"):
        return _with_flags([(source.getrandbits(width), index, 0) for index in (*range(0, width, 3), 0, width - 1)])
    if operation in ("aaa", "aas", "daa", "das"):
        return tuple((ax, 0, 0, eflags) for ax in _DECIMALS for eflags in (CF | AF, STATUS_MASK & ~(CF | AF)))
    if operation in ("aam", "aad"):
        return _with_flags([(source.getrandbits(16), 10, 0) for _ in range(12)])
    sign, ones = 1 << (width - 1), (1 << width) - 1
    pairs = [(0, ones), (7, 0), (ones, ones), (sign, 1), (sign, 2), (3, 5), (1, sign >> 1), (sign | 2, sign | 1)]
    pairs += [(source.getrandbits(width), source.getrandbits(width)) for _ in range(2)]
    return _with_flags([(a, b, 0) for a, b in pairs])


def _with_flags(operands: Sequence[tuple[int, int, int]]) -> tuple[Operands, ...]:
    """All flags clear and all set in turn, then the other way round."""
    return tuple(
        (*case, STATUS_MASK if (number + turn) & 1 else 0) for turn in (0, 1) for number, case in enumerate(operands)
    )


def _shift_probes(operation: str, width: int, source: random.Random) -> tuple[Operands, ...]:
    """Operands with every combination of their ends, shifted by less than their size and by all of it."""
    some = [2, 3, 2, 5, width - 1, 2, 3, 6]
    if width == 32:
        all_out = [7, 9, 15, 31, 16, 17, 24, 30]
    elif operation in _ROTATES_THROUGH_CARRY:
        all_out = [width + 1] * 8
    elif operation in _DOUBLE_SHIFTS:
        all_out = [17, 17, 18, 20, 24, 31, 17, 19]
        some[5] = some[7] = 16
    else:
        all_out = [width] * 8
    cases = []
    for number, count in enumerate(some + all_out):
        ends = (number & 1) << (width - 1) | (number >> 1 & 1) << (width - 2) | number >> 2 & 1
        a = ends | source.getrandbits(width) & (1 << (width - 2)) - 2
        b = source.getrandbits(width)
        if operation in _DOUBLE_SHIFTS:
            # Both operands 0 once in each half, and b with every combination of its low bits.
            cases.append((a, b & ~3 | number >> 1 & 3, count) if number & 7 else (0, 0, count))
        else:
            cases.append((a, count, 0))
    if width < 32 and operation in _ROTATES:
        cases += [(1 << (width - 1), 31, 0), (1, width + 1, 0), ((1 << width) - 1, width + 1, 0), (3, 31, 0)]
    flags = (0, STATUS_MASK, STATUS_MASK, 0, 0, STATUS_MASK, 0, STATUS_MASK)
    return tuple((*case, flags[(number ^ number >> 3) & 7]) for number, case in enumerate(cases))


def _divide_probes(width: int, source: random.Random, *, signed: bool) -> tuple[Operands, ...]:
    """Quotients and remainders that are 0, small, large and negative."""
    sign, ones = 1 << (width - 1), (1 << width) - 1
    most = sign - 1 if signed else ones
    cases = []
    for number, quotient in enumerate((0, 0, 1, 2, sign >> 1, most, most ^ 5, 6)):
        divisor = (sign if signed or number & 2 else ones) - 1 - number
        remainder = 0 if number % 3 == 0 else source.randrange(3 * divisor >> 2, divisor)
        dividend = quotient * divisor + remainder
        if signed and number & 1:
            dividend = -dividend & (ones << width | ones)
        cases.append((dividend, divisor, 0))
    return _with_flags(cases)
