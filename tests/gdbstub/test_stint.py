"""The budget of a stint follows the speed of the guest, within bounds."""

import pytest

from gdbstub.stint import MAX_BUDGET_INSNS, MIN_BUDGET_INSNS, STINT_GOAL_S, StintBudget


@pytest.mark.parametrize("insns_per_s", [2e5, 5e5, 5e7, 5e8, 4e9])
def test_settles_at_the_goal(insns_per_s: float) -> None:
    budget = StintBudget()
    for _ in range(20):
        budget.note(budget.insns / insns_per_s)
    assert budget.insns / insns_per_s == pytest.approx(STINT_GOAL_S, rel=0.01)


def test_a_guest_that_becomes_slow_is_noticed_at_once() -> None:
    budget = StintBudget()
    for _ in range(20):
        budget.note(budget.insns / 1e9)
    fast = budget.insns
    budget.note(1.0)
    assert budget.insns <= fast / 10


def test_bounds() -> None:
    budget = StintBudget()
    for _ in range(50):
        budget.note(0.0)
    assert budget.insns == MAX_BUDGET_INSNS
    for _ in range(50):
        budget.note(10.0)
    assert budget.insns == MIN_BUDGET_INSNS
