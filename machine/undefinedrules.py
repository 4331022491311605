"""Owns the rules by which CPUs fill results and flags that the SDM leaves undefined: one function each, by name.

It must not know which operation or CPU model follows which rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

from machine.flags import AF, CF, OF, PARITY, SF, ZF


class Outcome(NamedTuple):
    """One execution, as rules see it.

    Attributes:
        operation: name in `machine.alu`.
        width: bits.
        a, b, c, eflags: what went in.
        result: what came out; double-width for MUL and IMUL.
        out: EFLAGS that came out, right at least in what is defined.
    """

    operation: str
    width: int
    a: int
    b: int
    c: int
    eflags: int
    result: int
    out: int

    @property
    def shift_count(self) -> int:
        """The masked count of a shift."""
        return (self.c if self.operation in ("shld", "shrd") else self.b) & 31


Rule = Callable[[Outcome, int], int]
"""The value of the given flag (any nonzero: set), or of the result, after an execution."""


def _unchanged(outcome: Outcome, flag: int) -> int:
    return outcome.eflags & flag


def _clear(_outcome: Outcome, _flag: int) -> int:
    return 0


def _set(_outcome: Outcome, _flag: int) -> int:
    return 1


def _by_value(value: int, width: int, flag: int) -> int:
    if flag == ZF:
        return not value & (1 << width) - 1
    if flag == SF:
        return value >> (width - 1) & 1
    return PARITY[value & 0xFF]


def _of_result(outcome: Outcome, flag: int) -> int:
    return _by_value(outcome.result, outcome.width, flag)


def _of_upper_half(outcome: Outcome, flag: int) -> int:
    return _by_value(outcome.result >> outcome.width, outcome.width, flag)


def _of_source(outcome: Outcome, flag: int) -> int:
    return _by_value(outcome.b, outcome.width, flag)


def _carry_differs_from_sign(outcome: Outcome, _flag: int) -> int:
    return (outcome.result >> (outcome.width - 1) ^ outcome.out) & CF


def _top_bits_differ(outcome: Outcome, _flag: int) -> int:
    return (outcome.result >> (outcome.width - 1) ^ outcome.result >> (outcome.width - 2)) & 1


def _sign_changed(outcome: Outcome, _flag: int) -> int:
    return (outcome.result ^ outcome.a) >> (outcome.width - 1) & 1


def _left_overflow(outcome: Outcome, _flag: int) -> int:
    shifted = outcome.a << outcome.shift_count
    return (shifted >> outcome.width ^ shifted >> (outcome.width - 1)) & 1


def _left_carry(outcome: Outcome, _flag: int) -> int:
    return outcome.a << outcome.shift_count >> outcome.width & 1


def _right_carry(outcome: Outcome, _flag: int) -> int:
    return outcome.a << 1 >> outcome.shift_count & 1


def _left_pair_carry(outcome: Outcome, _flag: int) -> int:
    return (outcome.a << outcome.width | outcome.b) << outcome.shift_count >> 2 * outcome.width & 1


def _right_pair_carry(outcome: Outcome, _flag: int) -> int:
    return (outcome.b << outcome.width | outcome.a) << 1 >> outcome.shift_count & 1


def _carry_by_size(outcome: Outcome, _flag: int) -> int:
    """The bit that went out last if counts are taken modulo the operand size, the size itself standing for 0."""
    width = outcome.width
    count = outcome.shift_count % width or width
    return outcome.a >> (width - count if outcome.operation == "shl" else count - 1) & 1


def _ror_overflow(outcome: Outcome, _flag: int) -> int:
    """OF as ROR by the bit index would leave it: the two bits next below and above the one tested."""
    width, index = outcome.width, outcome.b
    return (outcome.a >> (index - 1) % width ^ outcome.a >> (index - 2) % width) & 1


def _correction(outcome: Outcome) -> tuple[int, int, bool]:
    """Both operands of the addition or subtraction (true) inside a decimal adjustment, AH included."""
    al, carry = outcome.a & 0xFF, outcome.eflags & CF
    low = al & 0xF > 9 or outcome.eflags & AF
    if outcome.operation in ("aaa", "aas"):
        return outcome.a, 0x106 if low else 0, outcome.operation == "aas"
    if outcome.operation == "aad":
        return al, (outcome.a >> 8) * outcome.b & 0xFF, False
    return al, (6 if low else 0) | (0x60 if al > 0x99 or carry else 0), outcome.operation == "das"


def _sum_flag(x: int, y: int, *, subtract: bool, width: int, flag: int) -> int:
    mask = (1 << width) - 1
    x, y = x & mask, y & mask
    total = x - y if subtract else x + y
    carries = x ^ y ^ total
    if flag == CF:
        return carries >> width & 1
    if flag == AF:
        return carries & AF
    if flag == OF:
        return (carries >> width ^ carries >> (width - 1)) & 1
    return _by_value(total, width, flag)


def _of_byte_sum(outcome: Outcome, flag: int) -> int:
    x, y, subtract = _correction(outcome)
    return _sum_flag(x, y, subtract=subtract, width=8, flag=flag)


def _of_word_sum(outcome: Outcome, flag: int) -> int:
    x, y, subtract = _correction(outcome)
    return _sum_flag(x, y, subtract=subtract, width=16, flag=flag)


def _of_al(outcome: Outcome, flag: int) -> int:
    return _by_value(outcome.result, 8, flag)


def _destination_kept(outcome: Outcome, _flag: int) -> int:
    return outcome.a


def _bytes_swapped(outcome: Outcome, _flag: int) -> int:
    return outcome.a >> 8 | (outcome.a & 0xFF) << 8


def _source_twice(outcome: Outcome, _flag: int) -> int:
    return _double_shift(outcome, outcome.b)


def _destination_again(outcome: Outcome, _flag: int) -> int:
    return _double_shift(outcome, outcome.a)


def _double_shift(outcome: Outcome, beyond: int) -> int:
    width, mask = outcome.width, (1 << outcome.width) - 1
    if outcome.operation == "shld":
        return (outcome.a << 2 * width | outcome.b << width | beyond) << outcome.shift_count >> 2 * width & mask
    return (beyond << 2 * width | outcome.b << width | outcome.a) >> outcome.shift_count & mask


RULES: Final[Mapping[str, Rule]] = {
    "unchanged": _unchanged,
    "clear": _clear,
    "set": _set,
    "of result": _of_result,
    "of upper half": _of_upper_half,
    "of source": _of_source,
    "of AL": _of_al,
    "of byte sum": _of_byte_sum,
    "of word sum": _of_word_sum,
    "carry differs from sign": _carry_differs_from_sign,
    "top bits differ": _top_bits_differ,
    "sign changed": _sign_changed,
    "left overflow": _left_overflow,
    "left carry": _left_carry,
    "right carry": _right_carry,
    "left pair carry": _left_pair_carry,
    "right pair carry": _right_pair_carry,
    "carry by size": _carry_by_size,
    "ROR overflow": _ror_overflow,
    "zero": _clear,
    "destination kept": _destination_kept,
    "bytes swapped": _bytes_swapped,
    "source twice": _source_twice,
    "destination again": _destination_again,
}
"""Every rule by the name that profiles use."""
