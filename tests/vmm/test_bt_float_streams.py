"""`bt` and `trap` against `interp` on every floating-point encoding, and on random programs that mix
them with everything else.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings

from tests.vmm.float_streams import FloatProgram, aimed, float_programs, kinds_of_floating_cases
from tests.vmm.streams import SANDBOX_PAGES
from tests.vmm.twins import Twins


def run(program: FloatProgram, insns: int, *, tu_insns: int = 12) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vmm.bt.MIN_BUDGET_INSNS", 1)
        patch.setattr("vmm.native.translator.MAX_TU_INSTRUCTIONS", tu_insns)
        with Twins("hlt", program.prepare) as twins:
            twins.run(insns, (50, 1, 40, 12, 13))


_PIECES = 4
_STEPS = 100


@pytest.mark.usefixtures("other_engine")
@pytest.mark.parametrize("piece", range(_PIECES))
def test_every_form(piece: int) -> None:
    tu_insns = (12, 1, 12, 3)[piece]
    chance = random.Random(piece)
    found = kinds_of_floating_cases()[piece::_PIECES]
    for at in range(0, len(found), _STEPS):
        steps = tuple(aimed(case, chance) for case in found[at : at + _STEPS])
        registers = tuple(chance.getrandbits(32) for _ in range(8))
        program = FloatProgram(
            steps, (0,) * (SANDBOX_PAGES + 2), user=True, write_protect=True, registers=registers, eflags=1,
            fpu_seed=chance.getrandbits(16),
        )  # fmt: skip
        run(program, 4 * _STEPS, tu_insns=tu_insns)


@given(float_programs())
@settings(max_examples=40)
def test_random_programs(program: FloatProgram) -> None:
    run(program, 300)
