"""Owns addition, subtraction and logic on 8, 16 and 32 bits, with the flags that they give.

Pure functions on plain ints; must not know registers, memory or where operands come from.

Source: SDM Vol. 2, ADD to XOR; Vol. 1, "Status Flags".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from machine.flags import AF, CF, OF, PARITY, PF, SF, STATUS_MASK, ZF

Unary = Callable[[int, int], tuple[int, int]]
"""(a, eflags) to (result, eflags)."""

Binary = Callable[[int, int, int], tuple[int, int]]
"""(a, b, eflags) to (result, eflags); a is the destination."""

KEEP: Final = ~STATUS_MASK
KEEP_CARRY: Final = ~(STATUS_MASK & ~CF)
ZERO: Final = ZF | PF

# By the carries out of bits n-1 (1) and n-2 (2 -> 1): CF is the first, OF says that they differ. A subtraction that
# borrows leaves a negative number, whose index -1 or -2 is the same entry as 3 or 2.
CARRY_OUT: Final = (0, OF, CF | OF, CF)

# The same for bytes in one look: SF ZF PF CF by the nine-bit sum, AF OF by its carries; negative sums index from the
# end.
_SUM8: Final = tuple(
    PARITY[total & 0xFF] | total & SF | (0 if total & 0xFF else ZF) | (CF if total & 0x100 else 0)
    for total in range(0x200)
)
_CARRIES8: Final = tuple(carries & AF | CARRY_OUT[carries >> 7] & OF for carries in range(0x200))
_SZP8: Final = _SUM8[:0x100]


def add(width: int) -> Binary:
    """ADD of `width` bits; XADD computes the same."""
    if width == 8:

        def add8(a: int, b: int, eflags: int) -> tuple[int, int]:
            total = a + b
            return total & 0xFF, eflags & KEEP | _SUM8[total] | _CARRIES8[a ^ b ^ total]

        return add8
    mask, top, sign = (1 << width) - 1, width - 1, width - 8

    def add_wide(a: int, b: int, eflags: int) -> tuple[int, int]:
        total = a + b
        result = total & mask
        carries = a ^ b ^ total
        if result:
            return result, (
                eflags & KEEP | CARRY_OUT[carries >> top] | carries & AF | PARITY[result & 0xFF] | result >> sign & SF
            )
        return 0, eflags & KEEP | CARRY_OUT[carries >> top] | carries & AF | ZERO

    return add_wide


def adc(width: int) -> Binary:
    """ADC of `width` bits."""
    if width == 8:

        def adc8(a: int, b: int, eflags: int) -> tuple[int, int]:
            total = a + b + (eflags & CF)
            return total & 0xFF, eflags & KEEP | _SUM8[total] | _CARRIES8[a ^ b ^ total]

        return adc8
    mask, top, sign = (1 << width) - 1, width - 1, width - 8

    def adc_wide(a: int, b: int, eflags: int) -> tuple[int, int]:
        total = a + b + (eflags & CF)
        result = total & mask
        carries = a ^ b ^ total
        if result:
            return result, (
                eflags & KEEP | CARRY_OUT[carries >> top] | carries & AF | PARITY[result & 0xFF] | result >> sign & SF
            )
        return 0, eflags & KEEP | CARRY_OUT[carries >> top] | carries & AF | ZERO

    return adc_wide


def sub(width: int) -> Binary:
    """SUB of `width` bits."""
    if width == 8:

        def sub8(a: int, b: int, eflags: int) -> tuple[int, int]:
            total = a - b
            return total & 0xFF, eflags & KEEP | _SUM8[total] | _CARRIES8[a ^ b ^ total]

        return sub8
    mask, top, sign = (1 << width) - 1, width - 1, width - 8

    def sub_wide(a: int, b: int, eflags: int) -> tuple[int, int]:
        if a == b:
            return 0, eflags & KEEP | ZERO
        total = a - b
        result = total & mask
        carries = a ^ b ^ total
        return result, (
            eflags & KEEP | CARRY_OUT[carries >> top] | carries & AF | PARITY[result & 0xFF] | result >> sign & SF
        )

    return sub_wide


def sbb(width: int) -> Binary:
    """SBB of `width` bits."""
    if width == 8:

        def sbb8(a: int, b: int, eflags: int) -> tuple[int, int]:
            total = a - b - (eflags & CF)
            return total & 0xFF, eflags & KEEP | _SUM8[total] | _CARRIES8[a ^ b ^ total]

        return sbb8
    mask, top, sign = (1 << width) - 1, width - 1, width - 8

    def sbb_wide(a: int, b: int, eflags: int) -> tuple[int, int]:
        total = a - b - (eflags & CF)
        result = total & mask
        carries = a ^ b ^ total
        if result:
            return result, (
                eflags & KEEP | CARRY_OUT[carries >> top] | carries & AF | PARITY[result & 0xFF] | result >> sign & SF
            )
        return 0, eflags & KEEP | CARRY_OUT[carries >> top] | carries & AF | ZERO

    return sbb_wide


def cmp(width: int) -> Binary:
    """CMP of `width` bits: the flags of SUB; the result is the destination as it was."""
    if width == 8:

        def cmp8(a: int, b: int, eflags: int) -> tuple[int, int]:
            total = a - b
            return a, eflags & KEEP | _SUM8[total] | _CARRIES8[a ^ b ^ total]

        return cmp8
    top, sign = width - 1, width - 8

    def cmp_wide(a: int, b: int, eflags: int) -> tuple[int, int]:
        if a == b:
            return a, eflags & KEEP | ZERO
        total = a - b
        carries = a ^ b ^ total
        return a, (eflags & KEEP | CARRY_OUT[carries >> top] | carries & AF | PARITY[total & 0xFF] | total >> sign & SF)

    return cmp_wide


def and_(width: int) -> Binary:
    """AND of `width` bits. CF and OF are cleared; AF, undefined in the SDM, too."""
    if width == 8:

        def and8(a: int, b: int, eflags: int) -> tuple[int, int]:
            result = a & b
            return result, eflags & KEEP | _SZP8[result]

        return and8
    sign = width - 8

    def and_wide(a: int, b: int, eflags: int) -> tuple[int, int]:
        result = a & b
        if result:
            return result, eflags & KEEP | PARITY[result & 0xFF] | result >> sign & SF
        return 0, eflags & KEEP | ZERO

    return and_wide


def or_(width: int) -> Binary:
    """OR of `width` bits; flags as for AND."""
    if width == 8:

        def or8(a: int, b: int, eflags: int) -> tuple[int, int]:
            result = a | b
            return result, eflags & KEEP | _SZP8[result]

        return or8
    sign = width - 8

    def or_wide(a: int, b: int, eflags: int) -> tuple[int, int]:
        result = a | b
        if result:
            return result, eflags & KEEP | PARITY[result & 0xFF] | result >> sign & SF
        return 0, eflags & KEEP | ZERO

    return or_wide


def xor(width: int) -> Binary:
    """XOR of `width` bits; flags as for AND."""
    if width == 8:

        def xor8(a: int, b: int, eflags: int) -> tuple[int, int]:
            result = a ^ b
            return result, eflags & KEEP | _SZP8[result]

        return xor8
    sign = width - 8

    def xor_wide(a: int, b: int, eflags: int) -> tuple[int, int]:
        result = a ^ b
        if result:
            return result, eflags & KEEP | PARITY[result & 0xFF] | result >> sign & SF
        return 0, eflags & KEEP | ZERO

    return xor_wide


def test(width: int) -> Binary:
    """TEST of `width` bits: the flags of AND; the result is the destination as it was."""
    if width == 8:

        def test8(a: int, b: int, eflags: int) -> tuple[int, int]:
            return a, eflags & KEEP | _SZP8[a & b]

        return test8
    sign = width - 8

    def test_wide(a: int, b: int, eflags: int) -> tuple[int, int]:
        result = a & b
        if result:
            return a, eflags & KEEP | PARITY[result & 0xFF] | result >> sign & SF
        return a, eflags & KEEP | ZERO

    return test_wide


def inc(width: int) -> Unary:
    """INC of `width` bits; CF stays."""
    mask, sign_value, sign = (1 << width) - 1, 1 << (width - 1), width - 8

    def inc_any(a: int, eflags: int) -> tuple[int, int]:
        result = (a + 1) & mask
        if result == 0:
            return 0, eflags & KEEP_CARRY | AF | ZERO
        flags = eflags & KEEP_CARRY | (a ^ result) & AF | PARITY[result & 0xFF] | result >> sign & SF
        return result, flags | OF if result == sign_value else flags

    return inc_any


def dec(width: int) -> Unary:
    """DEC of `width` bits; CF stays."""
    mask, most, sign = (1 << width) - 1, (1 << (width - 1)) - 1, width - 8

    def dec_any(a: int, eflags: int) -> tuple[int, int]:
        result = (a - 1) & mask
        if result == 0:
            return 0, eflags & KEEP_CARRY | ZERO
        flags = eflags & KEEP_CARRY | (a ^ result) & AF | PARITY[result & 0xFF] | result >> sign & SF
        return result, flags | OF if result == most else flags

    return dec_any


def neg(width: int) -> Unary:
    """NEG of `width` bits: 0 minus the operand."""
    subtract = sub(width)

    def neg_any(a: int, eflags: int) -> tuple[int, int]:
        return subtract(0, a, eflags)

    return neg_any


def not_(width: int) -> Unary:
    """NOT of `width` bits; no flag changes."""
    mask = (1 << width) - 1

    def not_any(a: int, eflags: int) -> tuple[int, int]:
        return a ^ mask, eflags

    return not_any
