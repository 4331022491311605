"""Which flags an SSE instruction raises with underflow or overflow unmasked: computed masked, they come out otherwise.

Masked, underflow is flagged only where the result is inexact, and a result is inexact too where it lost bits for being
denormal, or overflowed. Unmasked, a tiny result is enough, and a result beyond the exponents of the format is inexact
only if its significand was too long. It must not know when this matters.

Source: SDM Vol. 1, "Numeric Underflow Exception (#U)" and "Inexact-Result (Precision) Exception (#P)"; tested against
the host's CPU with the exception unmasked.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from struct import Struct
from typing import TYPE_CHECKING

from iced_x86 import Instruction, RegisterExt

from machine.fpustate import MXCSR, MXCSR_FLUSH_TO_ZERO, OPERAND, XMM
from machine.instructions.operands import is_memory

if TYPE_CHECKING:
    from fractions import Fraction

OVERFLOW, UNDERFLOW, PRECISION = 0x08, 0x10, 0x20
_DENORMALS_ARE_ZERO = 0x40
_MASKS_SHIFT = 7

Buffer = bytes | memoryview

_OPERATIONS: dict[str, Callable[[Fraction, Fraction], Fraction]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
}
_SINGLE, _DOUBLE = Struct("<f"), Struct("<d")
_SIGNIFICAND_BITS = {4: 24, 8: 53}
_LEAST = {4: 2.0**-126, 8: 2.0**-1022}
_QUANTA_IN_1 = {4: 2**149, 8: 2**1074}
_LARGEST = {4: (2**24 - 1) * 2**104, 8: (2**53 - 1) * 2**971}


class Underflow:
    """One instruction's results and operands, element by element.

    Args:
        instruction: one of those that `can_underflow` names.
        name: its row.
    """

    def __init__(self, instruction: Instruction, name: str) -> None:
        converts = name.startswith("cvt")
        scalar = name.endswith(("ss", "sd") if not converts else ("sd2ss",))
        self._bytes = 4 if converts or name.endswith(("ps", "ss")) else 8
        self._source_bytes = 8 if converts else self._bytes
        self._count = 1 if scalar else 16 // self._source_bytes
        self._operation = None if converts else _OPERATIONS[name[:3]]
        self._target = XMM + 16 * RegisterExt.number(instruction.op_register(0))
        is_fetched = is_memory(instruction, 1)
        self._source = OPERAND if is_fetched else XMM + 16 * RegisterExt.number(instruction.op_register(1))

    def is_tiny(self, page: Buffer) -> bool:
        """Whether a result in the page is denormal."""
        least = _LEAST[self._bytes]
        for n in range(self._count):
            value = _float(page, self._target + n * self._bytes, self._bytes)
            if value and abs(value) < least:
                return True
        return False

    def is_inexact(self, before: Buffer) -> bool:
        """Whether a result is inexact, if those beyond the format's exponents keep all their bits where unmasked.

        Args:
            before: the page as it was before the computation.
        """
        mxcsr = int.from_bytes(before[MXCSR : MXCSR + 4], "little")
        return any(self._is_element_inexact(before, n, mxcsr) for n in range(self._count))

    def _is_element_inexact(self, before: Buffer, n: int, mxcsr: int) -> bool:
        at = n * self._source_bytes
        values = [_float(before, self._source + at, self._source_bytes)]
        if self._operation is not None:
            values.insert(0, _float(before, self._target + at, self._source_bytes))
        if mxcsr & _DENORMALS_ARE_ZERO:
            values = [0.0 if abs(value) < _LEAST[self._source_bytes] else value for value in values]
        if not all(map(math.isfinite, values)) or (self._operation is operator.truediv and not values[1]):
            return False
        from fractions import Fraction  # with the first exception of this kind: few guests have one

        fractions = [Fraction(value) for value in values]
        result = fractions[0] if self._operation is None else self._operation(*fractions)
        if abs(result) > _LARGEST[self._bytes] and mxcsr >> _MASKS_SHIFT & OVERFLOW:
            return True  # the masked response to overflow is inexact
        if abs(result) < _LEAST[self._bytes] and mxcsr >> _MASKS_SHIFT & UNDERFLOW:
            if mxcsr & MXCSR_FLUSH_TO_ZERO:
                return bool(result)
            return (result * _QUANTA_IN_1[self._bytes]).denominator != 1
        return not _fits(result, _SIGNIFICAND_BITS[self._bytes])


def can_underflow(name: str) -> bool:
    """Whether a row's results may be tiny."""
    return name in ("cvtpd2ps", "cvtsd2ss") or (name[:3] in _OPERATIONS and name[3:] in ("ps", "ss", "pd", "sd"))


def _float(data: Buffer, at: int, size: int) -> float:
    value: float = (_SINGLE if size == 4 else _DOUBLE).unpack_from(data, at)[0]
    return value


def _fits(value: Fraction, bits: int) -> bool:
    """Whether a number is a significand of so many bits times a power of two."""
    numerator, denominator = abs(value.numerator), value.denominator
    if denominator & (denominator - 1):
        return False
    return not numerator or (numerator // (numerator & -numerator)).bit_length() <= bits
