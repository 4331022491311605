"""How many instructions make a stint of a few milliseconds on this host with this engine.

It must not know the target; whoever runs stints says how long each took.
"""

STINT_GOAL_S = 0.003
# A stint that calls back (a condition, a printf) ends here though its budget is not used up.
STINT_LIMIT_S = 0.005
MIN_BUDGET_INSNS = 200
# No multiple of a guest's timer period: else each Ctrl-C would find the guest at the same place in the period.
MAX_BUDGET_INSNS = 16_180_339
_FIRST_BUDGET_INSNS = 1000
_MAX_GROWTH = 2.0
_MAX_SHRINKAGE = 0.1


class StintBudget:
    """A budget of instructions that follows the speed of the guest: fast down, slowly up."""

    def __init__(self) -> None:
        self.insns = _FIRST_BUDGET_INSNS

    def note(self, elapsed_s: float) -> None:
        """Adapt to a stint of the whole budget that lasted `elapsed_s` seconds."""
        factor = STINT_GOAL_S / max(elapsed_s, 1e-6)
        factor = min(max(factor, _MAX_SHRINKAGE), _MAX_GROWTH)
        self.insns = min(max(int(self.insns * factor), MIN_BUDGET_INSNS), MAX_BUDGET_INSNS)
