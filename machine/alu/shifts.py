"""Owns shifts, rotates and double shifts on 8, 16 and 32 bits; counts are as the instruction gives them, 0 to 255.

Flags that the SDM leaves undefined follow `machine.undefined.AMD_ZEN5`; other models are patched over them.

Source: SDM Vol. 2, RCL/RCR/ROL/ROR, SAL/SAR/SHL/SHR, SHLD and SHRD.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from machine.alu.arithmetic import KEEP, Binary
from machine.flags import AF, CF, OF, PARITY, SF, ZF

Ternary = Callable[[int, int, int, int], tuple[int, int]]
"""(a, b, c, eflags) to (result, eflags); a is the destination unless the operation says otherwise."""

_KEEP_ROTATE: Final = ~(CF | OF)

# CF (index bit 1) and the most significant bit of the result (bit 0): OF says that they differ.
_CARRY_AND_SIGN: Final = (0, OF, CF | OF, CF)
_SHL_OUT: Final = tuple(flags | (SF if index & 1 else 0) for index, flags in enumerate(_CARRY_AND_SIGN))
# ROL: the bit that went round is bit 0 of the index, the most significant bit of the result is bit 1.
_ROL_OUT: Final = (0, CF | OF, OF, CF)
# ROR: index is the top two bits of the result; the upper one went round.
_ROR_OUT: Final = (0, OF, CF | OF, CF)
# RCR: CF above the top two bits of the result.
_RCR_OUT: Final = tuple((CF if index & 4 else 0) | (OF if index & 3 in (1, 2) else 0) for index in range(8))
# OF by the top two bits of a result.
_TOP_DIFFERS: Final = (0, OF, OF, 0)


def shl(width: int) -> Binary:
    """SHL, also named SAL."""
    mask, top = (1 << width) - 1, width - 1

    def shl_any(a: int, count: int, eflags: int) -> tuple[int, int]:
        count &= 31
        if not count:
            return a, eflags
        wide = a << count
        result = wide & mask
        flags = eflags & KEEP | AF | _SHL_OUT[wide >> top & 3] | PARITY[result & 0xFF]
        return result, flags if result else flags | ZF

    return shl_any


def shr(width: int) -> Binary:
    """SHR."""
    second = width - 2

    def shr_any(a: int, count: int, eflags: int) -> tuple[int, int]:
        count &= 31
        if not count:
            return a, eflags
        last = a >> (count - 1)
        result = last >> 1
        # Bit n-2 of the result is the sign of the operand if count is 1, else 0; bit n-1 is 0.
        flags = eflags & KEEP | AF | last & CF | _TOP_DIFFERS[result >> second] | PARITY[result & 0xFF]
        return result, flags if result else flags | ZF

    return shr_any


def sar(width: int) -> Binary:
    """SAR."""
    mask, sign_value, size, sign = (1 << width) - 1, 1 << (width - 1), 1 << width, width - 8

    def sar_any(a: int, count: int, eflags: int) -> tuple[int, int]:
        count &= 31
        if not count:
            return a, eflags
        last = (a - size if a & sign_value else a) >> (count - 1)
        result = last >> 1 & mask
        flags = eflags & KEEP | AF | last & CF | PARITY[result & 0xFF] | result >> sign & SF
        return result, flags if result else flags | ZF

    return sar_any


def rol(width: int) -> Binary:
    """ROL."""
    mask, modulo, second = (1 << width) - 1, width - 1, width - 2

    def rol_any(a: int, count: int, eflags: int) -> tuple[int, int]:
        count &= 31
        if not count:
            return a, eflags
        count &= modulo
        result = (a << count | a >> (width - count)) & mask
        return result, eflags & _KEEP_ROTATE | _ROL_OUT[result & 1 | result >> second & 2]

    return rol_any


def ror(width: int) -> Binary:
    """ROR."""
    mask, modulo, second = (1 << width) - 1, width - 1, width - 2

    def ror_any(a: int, count: int, eflags: int) -> tuple[int, int]:
        count &= 31
        if not count:
            return a, eflags
        count &= modulo
        result = (a >> count | a << (width - count)) & mask
        return result, eflags & _KEEP_ROTATE | _ROR_OUT[result >> second]

    return ror_any


def rcl(width: int) -> Binary:
    """RCL: a rotate of `width` + 1 bits, CF on top."""
    size, top = width + 1, width - 1
    mask, size_mask = (1 << width) - 1, (1 << size) - 1

    def rcl_any(a: int, count: int, eflags: int) -> tuple[int, int]:
        count &= 31
        if not count:
            return a, eflags
        count %= size
        wide = (eflags & CF) << width | a
        wide = (wide << count | wide >> (size - count)) & size_mask
        return wide & mask, eflags & _KEEP_ROTATE | _CARRY_AND_SIGN[wide >> top]

    return rcl_any


def rcr(width: int) -> Binary:
    """RCR: a rotate of `width` + 1 bits, CF on top."""
    size, second = width + 1, width - 2
    mask, size_mask = (1 << width) - 1, (1 << size) - 1

    def rcr_any(a: int, count: int, eflags: int) -> tuple[int, int]:
        count &= 31
        if not count:
            return a, eflags
        count %= size
        wide = (eflags & CF) << width | a
        wide = (wide >> count | wide << (size - count)) & size_mask
        return wide & mask, eflags & _KEEP_ROTATE | _RCR_OUT[wide >> second]

    return rcr_any


def shld(width: int) -> Ternary:
    """SHLD of a, filled from b, by count. Counts above 16 of a 16-bit operand go on into b again."""
    mask, top, sign = (1 << width) - 1, width - 1, width - 8
    double = 2 * width
    repeat = 1 << width | 1

    def shld_any(a: int, b: int, count: int, eflags: int) -> tuple[int, int]:
        count &= 31
        if not count:
            return a, eflags
        result = (a << double | b * repeat) << count >> double & mask
        flags = (
            eflags & KEEP
            | AF
            | _CARRY_AND_SIGN[a << count >> top & 3]
            | PARITY[result & 0xFF]
            | result >> sign & SF
        )  # fmt: skip
        return result, flags if result else flags | ZF

    return shld_any


def shrd(width: int) -> Ternary:
    """SHRD of a, filled from b, by count. Counts above 16 of a 16-bit operand go on into b again."""
    mask, second, sign = (1 << width) - 1, width - 2, width - 8
    repeat = 1 << width | 1

    def shrd_any(a: int, b: int, count: int, eflags: int) -> tuple[int, int]:
        count &= 31
        if not count:
            return a, eflags
        result = (b * repeat << width | a) >> count & mask
        flags = (
            eflags & KEEP
            | AF
            | a >> (count - 1) & CF
            | _TOP_DIFFERS[result >> second]
            | PARITY[result & 0xFF]
            | result >> sign & SF
        )  # fmt: skip
        return result, flags if result else flags | ZF

    return shrd_any
