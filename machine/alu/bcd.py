"""Owns the decimal adjustments, all on AX, in the form of the table: width 16, result AX.

Flags that the SDM leaves undefined follow `machine.undefined.AMD_ZEN5`; other models are patched over them.

Source: SDM Vol. 2, AAA, AAD, AAM, AAS, DAA and DAS.
"""

from __future__ import annotations

from machine.alu.arithmetic import Binary, Unary, add, sub
from machine.faults import divide_error
from machine.flags import AF, CF, PARITY, SF, STATUS_MASK, ZF

_ADD8, _ADD16 = add(8), add(16)
_SUB8, _SUB16 = sub(8), sub(16)


def aaa(_width: int) -> Unary:
    """AAA. OF, SF, ZF and PF are those of adding 106h, or nothing, to AX."""

    def aaa_ax(a: int, eflags: int) -> tuple[int, int]:
        if a & 0xF > 9 or eflags & AF:
            total, flags = _ADD16(a, 0x106, eflags)
            return total & 0xFF0F, flags & ~(AF | CF) | AF | CF
        return a & 0xFF0F, _ADD16(a, 0, eflags)[1] & ~(AF | CF)

    return aaa_ax


def aas(_width: int) -> Unary:
    """AAS. OF, SF, ZF and PF are those of subtracting 106h, or nothing, from AX."""

    def aas_ax(a: int, eflags: int) -> tuple[int, int]:
        if a & 0xF > 9 or eflags & AF:
            total, flags = _SUB16(a, 0x106, eflags)
            return total & 0xFF0F, flags & ~(AF | CF) | AF | CF
        return a & 0xFF0F, _SUB16(a, 0, eflags)[1] & ~(AF | CF)

    return aas_ax


def daa(_width: int) -> Unary:
    """DAA. OF is that of adding the whole correction to AL at once."""

    def daa_ax(a: int, eflags: int) -> tuple[int, int]:
        al = a & 0xFF
        correction = out = 0
        if al & 0xF > 9 or eflags & AF:
            correction, out = 6, AF
        if al > 0x99 or eflags & CF:
            correction, out = correction | 0x60, out | CF
        result, flags = _ADD8(al, correction, eflags)
        return a & 0xFF00 | result, flags & ~(AF | CF) | out

    return daa_ax


def das(_width: int) -> Unary:
    """DAS. OF is that of subtracting the whole correction from AL at once."""

    def das_ax(a: int, eflags: int) -> tuple[int, int]:
        al = a & 0xFF
        correction = out = 0
        if al & 0xF > 9 or eflags & AF:
            # The low correction alone may borrow, and that borrow is CF too.
            correction, out = 6, AF | CF if al < 6 else AF
        if al > 0x99 or eflags & CF:
            correction, out = correction | 0x60, out | CF
        result, flags = _SUB8(al, correction, eflags)
        return a & 0xFF00 | result, flags & ~(AF | CF) | out

    return das_ax


def aam(_width: int) -> Binary:
    """AAM of AX with an immediate base; SF, ZF and PF by AL, the rest cleared.

    Raises:
        GuestFault: #DE, the base is 0.
    """

    def aam_ax(a: int, b: int, eflags: int) -> tuple[int, int]:
        if not b:
            raise divide_error()
        high, low = divmod(a & 0xFF, b)
        flags = eflags & ~STATUS_MASK | PARITY[low] | low & SF
        return high << 8 | low, flags if low else flags | ZF

    return aam_ax


def aad(_width: int) -> Binary:
    """AAD of AX with an immediate base; all flags are those of the addition of AL and AH times the base, in 8 bits."""

    def aad_ax(a: int, b: int, eflags: int) -> tuple[int, int]:
        return _ADD8(a & 0xFF, (a >> 8) * b & 0xFF, eflags)

    return aad_ax
