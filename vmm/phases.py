"""Phases: which of two engines suits what the guest does now, judged by what each was counted to do, with hysteresis.

It decides and remembers why. It must not know engines, only their names, nor clocks: a run that repeats, repeats its
choices.

A stretch of the run is judged at a time. While the running engine costs next to nothing, nothing is asked. When two
stretches in a row are alike, and not like those before, a phase has begun: the other engine is tried for two stretches,
of which the first, which pays for what is new to it, does not count, and the second is as long as the one that it is
compared with. It stays if it is cheaper by a margin. If not it is tried again, ever more rarely, since a phase may
change for one of them only.

Where phases turn out to be short, stretches get longer, until one has some of each kind in it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

# In instructions. A trial has to be long enough to tell rates of some per ten thousand, and short enough to be cheap.
STRETCH_INSNS = 10_000
LONGEST_STRETCH_INSNS = 10_240_000  # what is stable is asked ever more rarely
STRETCH_CYCLES = 4_000_000  # of overhead, at which a stretch is over in any case
# In cycles of overhead for a million instructions: below, there is nothing to gain.
NEGLIGIBLE = 20_000.0
MARGIN = 1.25  # how many times as dear the running engine has to be
CHANGE = 0.5  # of the overhead, in kind or amount: another phase
CUT = 8  # how much shorter stretches are when something has changed; they get longer until two are alike
UNSETTLED_STRETCHES = 10  # in a row that differ from each other: that is a phase, too
# In shortest stretches: phases that lasted less are looked at more coarsely, after those that lasted more it is finer.
SHORT_PHASE, LONG_PHASE = 16, 256
RETRY_STRETCHES = 8  # after a trial; twice as many after each that was in vain
RETRY_STRETCHES_MOST = 1024
_MILLION = 1_000_000
_KEPT = 256


@dataclass(frozen=True, slots=True)
class Cost:
    """What an engine did in a part of the run, beside executing instructions.

    Attributes:
        insns: how long that was.
        counts: how often, by kind.
        cycles: what it is priced at, by kind.
    """

    insns: int = 0
    counts: Mapping[str, float] = field(default_factory=dict)
    cycles: Mapping[str, float] = field(default_factory=dict)

    @property
    def total_cycles(self) -> float:
        """All of it."""
        return sum(self.cycles.values())

    @property
    def rate(self) -> float:
        """Cycles for a million instructions."""
        return self._of_a_million(self.total_cycles)

    @property
    def rates(self) -> dict[str, float]:
        """The same by kind."""
        return {kind: self._of_a_million(cycles) for kind, cycles in self.cycles.items()}

    @property
    def count_rates(self) -> dict[str, float]:
        """How often for a million instructions, by kind."""
        return {kind: self._of_a_million(count) for kind, count in self.counts.items()}

    def _of_a_million(self, number: float) -> float:
        # Much may happen while none retires.
        return number * _MILLION / max(1, self.insns)

    def __add__(self, other: Cost) -> Cost:
        counts, cycles = dict(self.counts), dict(self.cycles)
        for kind, count in other.counts.items():
            counts[kind] = counts.get(kind, 0) + count
        for kind, price in other.cycles.items():
            cycles[kind] = cycles.get(kind, 0.0) + price
        return Cost(self.insns + other.insns, counts, cycles)


@dataclass(slots=True)
class Phase:
    """A part of the run on one engine.

    Attributes:
        engine: which.
        first_icount: where it began.
        why: it was chosen.
        is_trial: only to see what it costs.
        cost: so far.
        other_rate: what the other engine was last seen to cost for this, in cycles for a million instructions; None if
            that is not known.
    """

    engine: str
    first_icount: int
    why: str
    is_trial: bool = False
    cost: Cost = field(default_factory=Cost)
    other_rate: float | None = None

    @property
    def end_icount(self) -> int:
        """Where it ended, or has come to."""
        return self.first_icount + self.cost.insns


def differ(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    """Whether two rates by kind are of different phases."""
    apart = sum(abs(one.get(kind, 0.0) - other.get(kind, 0.0)) for kind in {**one, **other})  # no set: its order varies
    return apart > max(NEGLIGIBLE, CHANGE * max(sum(one.values()), sum(other.values())))


class Chooser:
    """Chooses between two engines.

    Attributes:
        engine: which one is to run.
        stretch_insns: for how long, before `judge` is asked.
        phases: the last ones, and the one under way.
        switches: how often the engine changed.
    """

    def __init__(self, engine: str, other: str, icount: int = 0) -> None:
        """Prepare.

        Args:
            engine: which begins.
            other: the other one.
            icount: where the run stands.
        """
        self.engine = engine
        self._other = other
        self.stretch_insns = self._shortest_insns = STRETCH_INSNS
        self.switches = 0
        self.phases: deque[Phase] = deque([Phase(engine, icount, "it begins")], maxlen=_KEPT)
        self._unjudged = 1
        self._settled: Mapping[str, float] = {}  # the rates that the last decision was made by
        self._last: Mapping[str, float] = {}
        self._settled_icount = icount  # when they were
        self._unsettled = 0
        self._is_trying = False
        self._compared_insns = STRETCH_INSNS  # how long the stretch was that a trial is to be compared with
        self._rate_before = 0.0  # of the engine that ran before a trial
        self._rates_before: Mapping[str, float] = {}
        self._wait = 0  # stretches until the other one is tried again
        self._next_wait = RETRY_STRETCHES
        self._other_rate: float | None = None

    @property
    def phase(self) -> Phase:
        """The one under way."""
        return self.phases[-1]

    def judge(self, cost: Cost) -> bool:
        """A stretch is over, perhaps before its time; whether the other engine runs from now on."""
        phase = self.phase
        phase.cost += cost
        before = self.engine
        if self._unjudged:
            self._unjudged -= 1
            self.stretch_insns = self._compared_insns
        elif self._is_trying:
            self._end_trial(cost)
        else:
            self._look(cost)
        self._last = cost.rates
        return self.engine != before

    def forget(self, icount: int) -> None:
        """What was found so far does not count any more: a phase begins at `icount`, on the engine that runs."""
        self._last, self._unsettled, self._unjudged, self._is_trying = {}, 0, 0, False
        self.stretch_insns = self._shortest_insns
        self.phase.cost += Cost(icount - self.phase.end_icount)
        self._begin_phase({}, "prices have changed")

    def _look(self, cost: Cost) -> None:
        """Look at a stretch of the engine that has been chosen."""
        rates = cost.rates
        if differ(rates, self._settled):
            self._unsettled += 1
            if self._unsettled == 1:
                self._set_stretch(self.stretch_insns // CUT, cost.rate)
                return
            if differ(rates, self._last) and self._unsettled < UNSETTLED_STRETCHES:
                self._set_stretch(2 * self.stretch_insns, cost.rate)
                return
            self._note_length()
            self._begin_phase(rates, "the guest does something else")
        else:
            self._set_stretch(2 * self.stretch_insns, cost.rate)
        self._unsettled = 0
        if cost.rate <= NEGLIGIBLE:
            return
        if self._wait:
            self._wait -= 1
            return
        self._is_trying = True
        self._compared_insns = max(cost.insns, self._shortest_insns)
        self._rate_before, self._rates_before = cost.rate, rates
        self._set_stretch(0, cost.rate)
        self._switch(f"to see what it costs, where {self.engine} costs {cost.rate:,.0f}", is_trial=True)

    def _begin_phase(self, rates: Mapping[str, float], why: str) -> None:
        icount = self.phase.end_icount
        self._settled, self._settled_icount, self._other_rate = rates, icount, None
        self._wait, self._next_wait = 0, RETRY_STRETCHES
        self._add(Phase(self.engine, icount, why))

    def _note_length(self) -> None:
        """What the guest did is over: how coarsely it has to be looked at follows from how long it lasted."""
        lasted_insns = self.phase.end_icount - self._settled_icount
        if lasted_insns < SHORT_PHASE * self._shortest_insns:
            self._shortest_insns = min(2 * self._shortest_insns, LONGEST_STRETCH_INSNS)
        elif lasted_insns > LONG_PHASE * self._shortest_insns:
            self._shortest_insns = max(self._shortest_insns // 2, STRETCH_INSNS)

    def _set_stretch(self, insns: int, rate: float) -> None:
        """How long the next stretch is to be, unless that is too much at this rate."""
        limit = int(STRETCH_CYCLES * _MILLION / max(1.0, rate))
        insns = min(max(insns, self._shortest_insns), LONGEST_STRETCH_INSNS, limit)
        self.stretch_insns = max(insns, STRETCH_INSNS)

    def _end_trial(self, cost: Cost) -> None:
        """The stretch of a trial that counts is over: back, or not."""
        self._is_trying = False
        rate, before, tried = cost.rate, self._rate_before, self.engine
        if rate * MARGIN < before:
            why = f"{tried} costs {rate:,.0f}, {self._other} {before:,.0f}"
            self._settled, self._other_rate = cost.rates, before
            self._wait = self._next_wait = RETRY_STRETCHES
            self._add(Phase(tried, self.phase.end_icount, why, other_rate=before))
            return
        self._settled, self._other_rate = self._rates_before, rate
        self._wait = self._next_wait
        self._next_wait = min(2 * self._next_wait, RETRY_STRETCHES_MOST)
        self._switch(f"{tried} costs {rate:,.0f}, " + ("no less" if rate >= before else "hardly less"))

    def _switch(self, why: str, *, is_trial: bool = False) -> None:
        self.engine, self._other = self._other, self.engine
        self.switches += 1
        self._unjudged = 1
        other_rate = self._rate_before if is_trial else self._other_rate
        self._add(Phase(self.engine, self.phase.end_icount, why, is_trial, other_rate=other_rate))

    def _add(self, phase: Phase) -> None:
        """Go on with another phase; one that never ran is left out."""
        if not self.phase.cost.insns:
            self.phases.pop()
        self.phases.append(phase)
