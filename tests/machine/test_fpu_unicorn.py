"""Every floating-point form on our CPU against Unicorn on zeros and finite normal numbers: values, and not flags.

Unicorn is QEMU 5: of x87 and SSE it flags next to no exceptions, and its own #UD for CMPPS with a reserved immediate is
not what processors do.
"""

from __future__ import annotations

from tests.machine.fpu_batch import State, ordinary_states
from tests.machine.fpu_forms import Form
from tests.machine.fpu_golden import APPROXIMATE, TRANSCENDENTAL
from tests.machine.fpu_runs import Slot, differences, plain_forms, report, run_ours, run_unicorn

# It rounds the constants to nearest always, and computes remainders and decimals in double precision.
_IMPRECISE = frozenset({"fldl2t", "fldl2e", "fldpi", "fldlg2", "fldln2", "fprem", "fprem1", "fbstp"})
_EXCLUDED = APPROXIMATE | TRANSCENDENTAL | _IMPRECISE | {"emms", "fldcw", "fnstsw"}
_COMPARES = frozenset({"cmpps", "cmpss", "cmppd", "cmpsd_sse2"})
_UNDEFINED_CONDITIONS = frozenset({"fsqrt"})
_TOP, _C3, _C0 = 0x3800, 0x4000, 0x0100


def _is_compared(form: Form) -> bool:
    return form.row not in _EXCLUDED and (form.row not in _COMPARES or form.data[-1] < 8)


def same(form: Form, _state: State, a: Slot, b: Slot) -> bool:
    """Equal but for flags of exceptions, C1 and C2, and the exponents of MMX registers."""
    if (a.operand, a.eax) != (b.operand, b.eax) or any(a.xmm(n) != b.xmm(n) for n in range(8)):
        return False
    if form.row in ("cvtpi2ps", "cvtpi2pd") and form.has_memory:
        return True
    mask = (1 << (80 if form.row.startswith("f") else 64)) - 1
    conditions = _TOP if form.row in _UNDEFINED_CONDITIONS else _TOP | _C3 | _C0
    same_x87 = all(not (a.st(n) ^ b.st(n)) & mask for n in range(8)) and a.tags == b.tags
    return same_x87 and not (a.fsw ^ b.fsw) & conditions and not (a.eflags ^ b.eflags) & 0x45


def test_results_are_those_of_unicorn() -> None:
    batch, given = [form for form in plain_forms() if _is_compared(form)], ordinary_states(4, 48)
    found = list(differences(batch, given, run_ours(batch, given), run_unicorn(batch, given), same))
    assert not found, report(found)
