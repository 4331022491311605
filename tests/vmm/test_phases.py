"""What is chosen when, from rates alone: trials, margins, patience, and the scale at which a guest settles."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import pytest

from vmm import phases
from vmm.phases import LONGEST_STRETCH_INSNS, MARGIN, NEGLIGIBLE, STRETCH_CYCLES, STRETCH_INSNS, Chooser, Cost, differ

# What each engine costs in cycles for a million instructions, at an icount.
Guest = Callable[[int], Mapping[str, float]]
DEAR, CHEAP = 50e6, 1e6


def play(guest: Guest, until: int, chooser: Chooser | None = None) -> Chooser:
    """Let a chooser choose for a guest that is known by its rates, up to an icount."""
    chooser = chooser or Chooser("bt", "trap")
    icount = chooser.phase.end_icount
    while icount < until:
        piece = max(1000, chooser.stretch_insns // 40)
        insns, cycles = 0, 0.0
        while insns < chooser.stretch_insns and cycles < STRETCH_CYCLES:
            cycles += guest(icount + insns)[chooser.engine] * piece / 1e6
            insns += piece
        chooser.judge(Cost(insns, {"x": 1}, {"x": cycles}))
        icount += insns
    return chooser


def steady(bt: float, trap: float) -> Guest:
    return lambda _icount: {"bt": bt, "trap": trap}


def insns_on(chooser: Chooser, engine: str) -> int:
    return sum(phase.cost.insns for phase in chooser.phases if phase.engine == engine)


class TestCost:
    def test_rates_are_for_a_million_instructions(self) -> None:
        cost = Cost(500_000, {"a": 2, "b": 1}, {"a": 20.0, "b": 5.0})
        assert cost.rates == {"a": 40.0, "b": 10.0}
        assert cost.count_rates == {"a": 4.0, "b": 2.0}
        assert (cost.total_cycles, cost.rate) == (25.0, 50.0)
        assert Cost().rate == 0

    def test_sums(self) -> None:
        total = Cost(10, {"a": 1}, {"a": 2.0}) + Cost(5, {"a": 1, "b": 4}, {"a": 1.0, "b": 8.0})
        assert total == Cost(15, {"a": 2, "b": 4}, {"a": 3.0, "b": 8.0})

    def test_phases_differ_in_amount_or_kind(self) -> None:
        assert not differ({"a": 1e6}, {"a": 1.4e6})
        assert differ({"a": 1e6}, {"a": 2.1e6})
        assert differ({"a": 1e6}, {"b": 1e6})
        assert not differ({"a": NEGLIGIBLE}, {})
        assert differ({"a": 1.1 * NEGLIGIBLE}, {})


class TestChoice:
    def test_what_costs_next_to_nothing_is_left_alone(self) -> None:
        chooser = play(steady(NEGLIGIBLE / 2, 0), 20_000_000)
        assert chooser.switches == 0
        assert chooser.stretch_insns == LONGEST_STRETCH_INSNS

    def test_the_cheaper_engine_is_found_and_kept(self) -> None:
        chooser = play(steady(DEAR, CHEAP), 10_000_000)
        assert chooser.engine == "trap"
        assert insns_on(chooser, "bt") < 300_000
        assert chooser.phase.other_rate == pytest.approx(DEAR)
        assert "trap costs 1,000,000, bt 50,000,000" in [phase.why for phase in chooser.phases]

    def test_a_trial_in_vain_goes_back_and_comes_ever_more_rarely(self) -> None:
        chooser = play(steady(CHEAP, DEAR), 500_000_000)
        assert chooser.engine == "bt"
        trials = [phase.first_icount for phase in chooser.phases if phase.is_trial]
        gaps = [later - earlier for earlier, later in itertools.pairwise(trials)]
        assert len(gaps) >= 2
        assert gaps == sorted(gaps)
        assert gaps[-1] > 1.8 * gaps[-2]
        assert chooser.phase.other_rate == pytest.approx(DEAR)

    def test_hysteresis(self) -> None:
        """What is hardly cheaper is not worth a change, whichever runs."""
        hardly = CHEAP / MARGIN * 1.02
        assert play(steady(CHEAP, hardly), 5_000_000).engine == "bt"
        assert play(steady(CHEAP, CHEAP / MARGIN / 1.02), 5_000_000).engine == "trap"

    def test_each_phase_gets_the_engine_that_suits_it(self) -> None:
        def guest(icount: int) -> Mapping[str, float]:
            return {"bt": DEAR, "trap": CHEAP} if icount // 10_000_000 % 2 else {"bt": CHEAP, "trap": DEAR}

        chooser = play(guest, 60_000_000)
        for number in range(6):
            suited = "trap" if number % 2 else "bt"
            first, end = number * 10_000_000, (number + 1) * 10_000_000
            inside = [phase for phase in chooser.phases if phase.engine != suited]
            wrong = sum(max(0, min(end, p.end_icount) - max(first, p.first_icount)) for p in inside)
            assert wrong < 2_000_000

    def test_short_stretches_of_many_kinds_are_one_phase(self) -> None:
        """A mix whose parts are shorter than the longest stretch is judged by their mean."""

        def guest(icount: int) -> Mapping[str, float]:
            return {"bt": 8e6, "trap": 1e5} if icount // 60_000 % 2 else {"bt": 0.0, "trap": 16e6}

        chooser = play(guest, 40_000_000)
        assert chooser.engine == "bt"
        assert insns_on(chooser, "bt") > 0.7 * 40_000_000

    def test_a_trial_is_as_long_as_what_it_is_compared_with(self) -> None:
        """Else it sees one of the parts of a mix, in which the engine that is dearer on the whole costs nothing."""

        def guest(icount: int) -> Mapping[str, float]:
            return {"bt": 1e6, "trap": 12e6 if icount // 50_000 % 4 == 0 else 0.0}

        chooser = play(guest, 100_000_000)
        assert insns_on(chooser, "bt") > 0.75 * 100_000_000

    def test_noise_without_end_is_a_phase_too(self) -> None:
        """Rates that never settle: after some stretches the other engine is tried all the same."""
        rates = [DEAR * (3**step) for step in (0, 2, 1, 3)]

        class Noise:
            turn = 0

            def __call__(self, _icount: int) -> Mapping[str, float]:
                self.turn += 1
                return {"bt": rates[self.turn // 10 % 4], "trap": CHEAP}

        assert play(Noise(), 5_000_000).engine == "trap"

    def test_stretches_are_short_where_much_happens(self) -> None:
        assert play(steady(DEAR, DEAR), 5_000_000).stretch_insns <= STRETCH_CYCLES * 1e6 / DEAR
        assert play(steady(100 * DEAR, 100 * DEAR), 1_000_000).stretch_insns == STRETCH_INSNS

    def test_the_first_stretch_after_a_change_does_not_count(self) -> None:
        """It pays for translation, or for filling of shadow page tables."""
        chooser = Chooser("bt", "trap")
        while chooser.engine == "bt":
            chooser.judge(Cost(STRETCH_INSNS, {}, {"x": DEAR / 100}))
        assert chooser.phase.is_trial
        assert not chooser.judge(Cost(STRETCH_INSNS, {}, {"x": 100 * DEAR}))
        assert not chooser.judge(Cost(STRETCH_INSNS, {}, {"x": 0.0}))
        assert chooser.engine == "trap"
        assert not chooser.phase.is_trial

    def test_forgetting_asks_again(self) -> None:
        chooser = play(steady(CHEAP, DEAR), 3_000_000)
        before = chooser.switches
        chooser.forget(chooser.phase.end_icount)
        assert chooser.phase.why == "prices have changed"
        play(steady(CHEAP, DEAR), chooser.phase.end_icount + 100_000, chooser)
        assert chooser.switches > before

    def test_forgetting_says_nothing_of_how_long_phases_last(self) -> None:
        chooser = Chooser("bt", "trap")
        for _ in range(20):
            chooser.forget(0)
        assert chooser.stretch_insns == STRETCH_INSNS
        assert [phase.why for phase in chooser.phases] == ["prices have changed"]


class TestPhases:
    def test_they_follow_on_each_other(self) -> None:
        chooser = play(steady(DEAR, CHEAP), 3_000_000)
        listed = list(chooser.phases)
        assert listed[0].why == "it begins"
        for before, after in itertools.pairwise(listed):
            assert before.end_icount == after.first_icount

    def test_old_ones_are_forgotten(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(phases, "RETRY_STRETCHES_MOST", 1)
        monkeypatch.setattr(phases, "RETRY_STRETCHES", 1)
        chooser = play(steady(CHEAP, DEAR), 2_000_000_000)
        assert chooser.switches > 260
        assert len(chooser.phases) == 256
