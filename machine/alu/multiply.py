"""Owns multiplication and division; double-width values are one int, as EDX:EAX, DX:AX or AH:AL hold them.

Flags that the SDM leaves undefined follow `machine.undefined.AMD_ZEN5`; other models are patched over them.

Source: SDM Vol. 2, MUL, IMUL, DIV and IDIV.
"""

from __future__ import annotations

from typing import Final

from machine.alu.arithmetic import Binary
from machine.faults import divide_error
from machine.flags import AF, CF, OF, PF, SF, ZF

_OVERFLOW: Final = CF | OF
_KEEP_MULTIPLY: Final = ~_OVERFLOW
_KEEP_DIVIDE: Final = ~(PF | ZF | SF)


def mul(width: int) -> Binary:
    """MUL: the result is twice `width` bits."""
    mask = (1 << width) - 1

    def mul_any(a: int, b: int, eflags: int) -> tuple[int, int]:
        product = a * b
        return product, eflags | _OVERFLOW if product > mask else eflags & _KEEP_MULTIPLY

    return mul_any


def imul(width: int) -> Binary:
    """IMUL with one operand: the result is twice `width` bits."""
    sign = 1 << (width - 1)
    double_mask = (1 << 2 * width) - 1

    def imul_any(a: int, b: int, eflags: int) -> tuple[int, int]:
        product = ((a ^ sign) - sign) * ((b ^ sign) - sign)
        return product & double_mask, eflags & _KEEP_MULTIPLY if -sign <= product < sign else eflags | _OVERFLOW

    return imul_any


def imul2(width: int) -> Binary:
    """IMUL with two or three operands: the result is the low `width` bits."""
    sign = 1 << (width - 1)
    mask = (1 << width) - 1

    def imul2_any(a: int, b: int, eflags: int) -> tuple[int, int]:
        product = ((a ^ sign) - sign) * ((b ^ sign) - sign)
        return product & mask, eflags & _KEEP_MULTIPLY if -sign <= product < sign else eflags | _OVERFLOW

    return imul2_any


def div(width: int) -> Binary:
    """DIV of a, twice `width` bits, by b: the result is remainder and quotient, the remainder in the upper half.

    Raises:
        GuestFault: #DE, b is 0 or the quotient does not fit.
    """
    mask = (1 << width) - 1

    def div_any(a: int, b: int, eflags: int) -> tuple[int, int]:
        if not b:
            raise divide_error()
        quotient, remainder = divmod(a, b)
        if quotient > mask:
            raise divide_error()
        return remainder << width | quotient, eflags & _KEEP_DIVIDE | AF

    return div_any


def idiv(width: int) -> Binary:
    """IDIV, signed and rounded towards 0; operands, result and faults as for `div`."""
    sign, mask = 1 << (width - 1), (1 << width) - 1
    double_sign = 1 << (2 * width - 1)

    def idiv_any(a: int, b: int, eflags: int) -> tuple[int, int]:
        if not b:
            raise divide_error()
        dividend = (a ^ double_sign) - double_sign
        divisor = (b ^ sign) - sign
        quotient, remainder = divmod(dividend, divisor)
        if remainder and (dividend < 0) != (divisor < 0):
            quotient += 1  # Python rounds down
            remainder -= divisor
        if not -sign <= quotient < sign:
            raise divide_error()
        return (remainder & mask) << width | quotient & mask, eflags & _KEEP_DIVIDE | AF

    return idiv_any
