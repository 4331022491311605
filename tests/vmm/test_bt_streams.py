"""`bt` and `trap` against `interp` on every encoding that is translated, and on random programs in a space
of awkward pages.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings

from tests.vmm.streams import OFFSETS, SANDBOX, SANDBOX_PAGES, Program, Step, kinds_of_cases, programs
from tests.vmm.twins import Twins


def run(program: Program, insns: int, *, tu_insns: int = 12) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vmm.bt.MIN_BUDGET_INSNS", 1)
        patch.setattr("vmm.native.translator.MAX_TU_INSTRUCTIONS", tu_insns)
        with Twins("hlt", program.prepare) as twins:
            twins.run(insns, (5, 1, 40, 2, 13))


_PIECES = 8
_STEPS = 40


@pytest.mark.parametrize("piece", range(_PIECES))
@pytest.mark.parametrize(
    ("other_engine", "tu_insns"), [("bt", 1), ("bt", 12), ("trap", 1), ("trap nested", 12)], indirect=["other_engine"]
)
@pytest.mark.usefixtures("other_engine")
def test_every_form(piece: int, tu_insns: int) -> None:
    """In user mode, where the worst that can happen to ESP is a fault."""
    chance = random.Random(piece)
    found = kinds_of_cases()[piece::_PIECES]
    for at in range(0, len(found), _STEPS):
        steps = tuple(
            Step(
                case,
                0,
                SANDBOX + 0x1000 * chance.randrange(SANDBOX_PAGES) + chance.choice(OFFSETS),
                chance.randrange(64),
            )
            for case in found[at : at + _STEPS]
        )
        registers = tuple(chance.getrandbits(32) for _ in range(8))
        program = Program(
            steps, (0,) * (SANDBOX_PAGES + 2), user=True, write_protect=True, registers=registers, eflags=1
        )
        run(program, 3 * _STEPS, tu_insns=tu_insns)


@given(programs())
@settings(max_examples=60)
def test_random_programs(program: Program) -> None:
    run(program, 200)
