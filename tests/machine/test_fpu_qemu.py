"""Every floating-point form on our CPU against QEMU on zeros and finite normal numbers.

Beyond these QEMU 7.2 knows too little of x87 (stack faults, denormal operands, C1, operands under reduced precision)
and of MMX (exponents); the comparison with Bochs covers them. FSIN, FCOS, FSINCOS and FPTAN it computes in double
precision.
"""

from __future__ import annotations

import functools
import math
import struct

from machine.cpuid import P6_INSTRUCTIONS, PENTIUM4_INSTRUCTIONS
from machine.instructions import codes
from tests.machine.fpu_batch import State, ordinary_states
from tests.machine.fpu_forms import Form, floating_codes, forms
from tests.machine.fpu_golden import APPROXIMATE, TRANSCENDENTAL
from tests.machine.fpu_runs import AREAS, Slot, differences, plain_forms, report, run_ours, run_qemu

_CONDITIONS, _DENORMAL, _C1 = 0x4700, 0x02, 0x200
_DOUBLE_PRECISION = frozenset({"fsin", "fcos", "fsincos", "fptan"})
# C0, C2 and C3 are undefined after FSQRT; QEMU's quotient bits of FPREM1 disagree with Bochs and with the host.
_CONDITIONS_DIFFER = frozenset({"fsqrt", "fprem1"})
_FLAGS_OF_COMPARES = 0x45
_SIGNIFICAND = (1 << 64) - 1
_APPROXIMATION = 1.5 * 2**-12
_LARGEST_EXPONENTS = {"f2xm1": 0x3FFE, "fyl2xp1": 0x3FFC}
_LEAST_NORMAL = 2.0**-126


def _is_x87(form: Form) -> bool:
    return form.row.startswith("f")


def _fsw_mask(form: Form) -> int:
    mask = 0xFFFF & ~(_DENORMAL | _C1)
    return mask & ~_CONDITIONS if form.row in _CONDITIONS_DIFFER else mask


def _same_registers(form: Form, a: Slot, b: Slot) -> bool:
    if form.row in ("cvtpi2ps", "cvtpi2pd") and form.has_memory:
        return True  # QEMU lets these change to MMX, the SDM does not
    if form.row == "emms":
        return a.tags == b.tags  # QEMU leaves TOP
    mask = (1 << 80) - 1 if _is_x87(form) else _SIGNIFICAND
    if any((a.st(n) ^ b.st(n)) & mask for n in range(8)) or a.tags != b.tags:
        return False
    return not (a.fsw ^ b.fsw) & _fsw_mask(form)


def same(form: Form, _state: State, a: Slot, b: Slot) -> bool:
    """Equal in what QEMU emulates right."""
    if not _same_registers(form, a, b) or (a.fcw != b.fcw and form.row != "fldcw"):
        return False
    if (a.mxcsr | _DENORMAL, a.operand, a.eax) != (b.mxcsr | _DENORMAL, b.operand, b.eax):
        return False
    flags = _FLAGS_OF_COMPARES if form.row.startswith(("fcomi", "fucomi")) else 0xFFF
    return not (a.eflags ^ b.eflags) & flags and all(a.xmm(n) == b.xmm(n) for n in range(8))


@functools.cache
def _given() -> list[State]:
    return ordinary_states(3, 72)


def _compare(batch: list[Form]) -> tuple[list[Slot], list[Slot]]:
    return run_ours(batch, _given()), run_qemu(batch, _given())


def test_results_are_those_of_qemu() -> None:
    batch = [form for form in plain_forms() if form.row not in APPROXIMATE | TRANSCENDENTAL]
    found = list(differences(batch, _given(), *_compare(batch), same))
    assert not found, report(found)


def _value(bits: int) -> tuple[int, int]:
    """An extended number as a signed significand and its exponent."""
    significand = bits & _SIGNIFICAND
    return (-significand if bits >> 79 else significand), bits >> 64 & 0x7FFF


def _distance_bits(a: int, b: int) -> int:
    """How many of the low significand bits two extended numbers differ in, at the larger exponent."""
    (left, left_exponent), (right, right_exponent) = _value(a), _value(b)
    exponent = max(left_exponent, right_exponent)
    left >>= min(exponent - left_exponent, 66)
    right >>= min(exponent - right_exponent, 66)
    return abs(left - right).bit_length()


def _same_transcendental(form: Form, state: State, a: Slot, b: Slot) -> bool:
    given = Slot(state.image)
    if _value(given.st(0))[1] > _LARGEST_EXPONENTS.get(form.row, 0x7FFF):
        return True  # outside the operand's range the result is undefined
    if form.row in _DOUBLE_PRECISION and not 0x3FE0 < _value(given.st(0))[1] < 0x4005:
        return True  # no double says enough of the angle
    limit = 16 if form.row in _DOUBLE_PRECISION else 2
    near = all(_distance_bits(a.st(n), b.st(n)) <= limit or _both_tiny(a.st(n), b.st(n)) for n in range(8))
    return near and a.tags == b.tags and not (a.fsw ^ b.fsw) & 0x3C00


def _both_tiny(a: int, b: int) -> bool:
    """What remains of a sine or cosine near its zero is the error of pi in double precision."""
    return _value(a)[1] < 0x3FD0 and _value(b)[1] < 0x3FD0


def test_transcendental_results_are_near_those_of_qemu() -> None:
    batch = [form for form in plain_forms() if form.row in TRANSCENDENTAL]
    assert {form.row for form in batch} == TRANSCENDENTAL
    found = list(differences(batch, _given(), *_compare(batch), _same_transcendental))
    assert not found, report(found)


def _singles(value: int) -> list[float]:
    return list(struct.unpack("<4f", value.to_bytes(16, "little")))


def _same_approximation(form: Form, state: State, a: Slot, b: Slot) -> bool:
    source = int.from_bytes(state.operand, "little") if form.has_memory else Slot(state.image).xmm(2)
    lanes = list(zip(_singles(source), _singles(a.xmm(1)), _singles(b.xmm(1)), strict=True))
    if form.row.endswith("ss"):
        lanes = lanes[:1]
    for given, ours, theirs in lanes:
        if math.isnan(ours) or abs(given) < _LEAST_NORMAL or abs(theirs) < _LEAST_NORMAL:
            continue  # denormal numbers count as zero for processors, and not for QEMU
        if ours != theirs and abs(ours - theirs) > _APPROXIMATION * abs(theirs):
            return False
    return a.mxcsr == Slot(state.image).mxcsr  # they flag nothing


def test_approximations_are_as_near_as_the_manual_says() -> None:
    batch = [form for form in plain_forms() if form.row in APPROXIMATE]
    assert {form.row for form in batch} == APPROXIMATE
    found = list(differences(batch, _given(), *_compare(batch), _same_approximation))
    assert not found, report(found)


def test_every_code_is_compared() -> None:
    new = set(codes(PENTIUM4_INSTRUCTIONS)) - set(codes(P6_INSTRUCTIONS))
    assert new <= set(floating_codes())
    assert {form.code for form in plain_forms()} == {form.code for form in forms(0) if form.row not in AREAS}
    assert {form.code for form in forms(0)} == set(floating_codes())
