"""Owns bit tests and scans, BSWAP, the compare-and-exchange family and the moves of flags through AH and AL.

Flags that the SDM leaves undefined follow `machine.undefined.AMD_ZEN5`; other models are patched over them.

Source: SDM Vol. 2, BT to BTC, BSF, BSR, BSWAP, CMPXCHG, CMPXCHG8B, LAHF, SAHF. SALC (D6h) has no page there: it is as
a host CPU does it.
"""

from __future__ import annotations

from typing import Final

from machine.alu.arithmetic import KEEP, ZERO, Binary, Unary, cmp
from machine.alu.shifts import Ternary
from machine.flags import AF, ALWAYS_SET, CF, PARITY, PF, SF, ZF

_AH_FLAGS: Final = SF | ZF | AF | PF | CF


def bt(width: int) -> Binary:
    """BT: bit b (modulo `width`) of a to CF; the result is a."""
    modulo = width - 1

    def bt_any(a: int, b: int, eflags: int) -> tuple[int, int]:
        return a, eflags & ~CF | a >> (b & modulo) & 1

    return bt_any


def bts(width: int) -> Binary:
    """BTS: as BT, and the bit is set."""
    modulo = width - 1

    def bts_any(a: int, b: int, eflags: int) -> tuple[int, int]:
        b &= modulo
        return a | 1 << b, eflags & ~CF | a >> b & 1

    return bts_any


def btr(width: int) -> Binary:
    """BTR: as BT, and the bit is cleared."""
    modulo = width - 1

    def btr_any(a: int, b: int, eflags: int) -> tuple[int, int]:
        b &= modulo
        return a & ~(1 << b), eflags & ~CF | a >> b & 1

    return btr_any


def btc(width: int) -> Binary:
    """BTC: as BT, and the bit is inverted."""
    modulo = width - 1

    def btc_any(a: int, b: int, eflags: int) -> tuple[int, int]:
        b &= modulo
        return a ^ 1 << b, eflags & ~CF | a >> b & 1

    return btc_any


def bsf(_width: int) -> Binary:
    """BSF: index of the lowest set bit of b; with b = 0 ZF is set and a, the old destination, stays."""

    def bsf_any(a: int, b: int, eflags: int) -> tuple[int, int]:
        if not b:
            return a, eflags & KEEP | ZERO
        index = (b & -b).bit_length() - 1
        return index, eflags & KEEP | PARITY[index]

    return bsf_any


def bsr(_width: int) -> Binary:
    """BSR: index of the highest set bit of b; with b = 0 ZF is set and a, the old destination, stays."""

    def bsr_any(a: int, b: int, eflags: int) -> tuple[int, int]:
        if not b:
            return a, eflags & KEEP | ZERO
        index = b.bit_length() - 1
        return index, eflags & KEEP | PARITY[index]

    return bsr_any


def bswap(width: int) -> Unary:
    """BSWAP; of 16 bits it is undefined, and gives 0."""

    def bswap16(_a: int, eflags: int) -> tuple[int, int]:
        return 0, eflags

    def bswap32(a: int, eflags: int) -> tuple[int, int]:
        return a >> 24 | a >> 8 & 0xFF00 | (a & 0xFF00) << 8 | (a & 0xFF) << 24, eflags

    return bswap16 if width == 16 else bswap32


def cmpxchg(width: int) -> Ternary:
    """CMPXCHG of (accumulator, destination, source): the result is the new destination; the flags are those of CMP.

    With ZF clear the destination stays, and the accumulator is the caller's to load from it.
    """
    compare = cmp(width)

    def cmpxchg_any(a: int, b: int, c: int, eflags: int) -> tuple[int, int]:
        return c if a == b else b, compare(a, b, eflags)[1]

    return cmpxchg_any


def cmpxchg8b(_width: int) -> Ternary:
    """CMPXCHG8B of (EDX:EAX, memory, ECX:EBX): the result is the new memory; of the flags only ZF changes."""

    def cmpxchg8b_any(a: int, b: int, c: int, eflags: int) -> tuple[int, int]:
        return (c, eflags | ZF) if a == b else (b, eflags & ~ZF)

    return cmpxchg8b_any


def lahf(_width: int) -> Unary:
    """LAHF of AX."""

    def lahf_ax(a: int, eflags: int) -> tuple[int, int]:
        return a & 0xFF | (eflags & _AH_FLAGS | ALWAYS_SET) << 8, eflags

    return lahf_ax


def sahf(_width: int) -> Unary:
    """SAHF of AX; OF stays."""

    def sahf_ax(a: int, eflags: int) -> tuple[int, int]:
        return a, eflags & ~_AH_FLAGS | a >> 8 & _AH_FLAGS

    return sahf_ax


def salc(_width: int) -> Unary:
    """SALC of AL: FFh if CF, else 0; no flag changes."""

    def salc_al(_a: int, eflags: int) -> tuple[int, int]:
        return 0xFF if eflags & CF else 0, eflags

    return salc_al
