"""Every x87, MMX, SSE and SSE2 form on our CPU gives what Bochs gave: registers, flags, tags and memory, to the bit."""

from tests.machine.fpu_golden import digests, golden_forms, golden_states, recorded
from tests.machine.fpu_runs import run_ours


def test_results_are_those_of_bochs() -> None:
    forms, states = golden_forms(), golden_states()
    ours, theirs = digests(forms, states, run_ours(forms, states)), recorded()
    assert ours.keys() == theirs.keys()
    assert [name for name, digest in ours.items() if digest != theirs[name]] == []
