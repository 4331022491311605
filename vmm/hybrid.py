"""`hybrid`: `bt` and emulated `trap` in turns, whichever costs less for what the guest does at the time.

It owns the two engines, both warm, the counts that they are compared by, and the switch. When to switch is decided in
`vmm.phases`, at prices from `vmm.prices`; what guest code does is the engines' business.

Both engines are exact, so the guest cannot tell which one ran. What is chosen follows from counts, not from clocks: the
wall time of an emulated guest mode says nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from time import perf_counter, perf_counter_ns
from typing import TYPE_CHECKING

from machine.cpu import Cpu
from machine.debug import DebugControl, Stop, StopKind
from machine.engine import ExitCount
from vmm.bt import BinaryTranslator
from vmm.phases import STRETCH_CYCLES, Chooser, Cost
from vmm.prices import (
    FREE_EXITS,
    PARTS,
    SOFTWARE_CYCLES,
    Part,
    exits_cycles,
    priced_exits,
    priced_software,
    software_cycles,
)
from vmm.trap.engine import TrapEngine

if TYPE_CHECKING:
    from vmm.native.inspection import Translations
    from vmm.trap.vmcb import Vmcb

BT, TRAP = "bt", "trap"


class _CountingTranslator(BinaryTranslator):
    """`bt` that comes back after so many callouts.

    Attributes:
        events_left: how many.
    """

    events_left = 0

    def _is_interrupted(self, limit_icount: int) -> bool:
        self.events_left -= 1
        if self.events_left < 0:
            self._patience = -1
        return super()._is_interrupted(limit_icount)


class _CountingTrap(TrapEngine):
    """`trap` that comes back after so many exits that have a price.

    Attributes:
        events_left: how many.
    """

    events_left = 0

    def _execute(self, until_icount: int, *, skip_breakpoint: bool) -> Stop | None:
        stop = super()._execute(until_icount, skip_breakpoint=skip_breakpoint)
        self.events_left -= self._reason not in FREE_EXITS
        if self.events_left < 0:
            self._patience = -1
        return stop


class HybridEngine:
    """Chooses between two engines: see `machine.engine.Engine`.

    The windows, which are the shadow page tables, are one set for both; each has a translation cache of its own. Both
    are told of every store to code and page tables, whichever runs, so that what they keep is right when they go on.

    Attributes:
        chooser: what was chosen, and why.
        part: the processor by whose cycles exits are priced.
    """

    name = "hybrid"

    def __init__(self, cpu: Cpu, debug: DebugControl, *, verify: bool = False, chooser: Chooser | None = None) -> None:
        """Prepare.

        Args:
            cpu: what it runs.
            debug: what a debugger wants.
            verify: whether emitted code is proven harmless before it may run.
            chooser: chooses between the engines BT and TRAP; by default BT begins.
        """
        self._cpu = cpu
        self._debug = debug
        self._bt = _CountingTranslator(cpu, debug, verify=verify)
        self._trap = _CountingTrap(cpu, debug, verify=verify, beside=self._bt)
        self._engines: dict[str, _CountingTranslator | _CountingTrap] = {BT: self._bt, TRAP: self._trap}
        self.part = PARTS[0]
        self.chooser = chooser or Chooser(BT, TRAP, cpu.clock.icount)
        self._began_icount = self._end_icount = cpu.clock.icount
        self._counts: Mapping[str, float] = {}
        self._spent = {BT: Cost(), TRAP: Cost()}
        self._switches_cycles = 0.0
        self._switch_ns = 0

    def enter(self) -> None:
        """Take over the CPU."""
        # A change would unmap all windows, so it is the same for both: bt has memory of devices as slow here as trap.
        with ExitStack() as undo:
            undo.callback(setattr, self._cpu.memory, "intercepts_devices", False)
            self._cpu.memory.intercepts_devices = True
            for engine in (self._bt, self._trap):
                engine.enter()
                undo.callback(engine.leave)
                engine.pause()
                undo.callback(engine.resume)
            self._running.resume()
            self._begin_stretch()
            self._undo = undo.pop_all()

    def leave(self) -> None:
        """Hand the CPU over."""
        self._running.pause()
        self._undo.close()

    @property
    def _running(self) -> _CountingTranslator | _CountingTrap:
        return self._engines[self.chooser.engine]

    # Running.

    def run(self, until_icount: int, *, skip_breakpoint: bool = False, deliver_caught: bool = False) -> Stop:
        """Execute until the icount is reached or something stops it: see `Engine.run`."""
        clock, debug = self._cpu.clock, self._debug
        longest_s = debug.longest_run_s
        end_s = perf_counter() + longest_s
        try:
            while True:
                if self._is_over():
                    self._judge()
                limit = min(until_icount, self._end_icount)
                stop = self._running.run(limit, skip_breakpoint=skip_breakpoint, deliver_caught=deliver_caught)
                skip_breakpoint = deliver_caught = False
                left_s = end_s - perf_counter()
                is_done = limit == until_icount or (clock.icount < limit and not self._is_over())
                if stop.kind is not StopKind.BUDGET or is_done or left_s <= 0:
                    return stop
                debug.longest_run_s = left_s
        finally:
            debug.longest_run_s = longest_s

    def step(self, *, deliver_caught: bool = False) -> Stop:
        """Execute one instruction: see `Engine.step`."""
        if self._is_over():
            self._judge()
        return self._running.step(deliver_caught=deliver_caught)

    # Choosing.

    def _is_over(self) -> bool:
        """Whether the stretch is: it has been as long, or has cost as much, as it may."""
        end_icount = self._debug.goal(self._began_icount, self._end_icount)
        return self._cpu.clock.icount >= end_icount or self._running.events_left < 0

    def _begin_stretch(self) -> None:
        price = self.part.exit_cycles if self.chooser.engine == TRAP else SOFTWARE_CYCLES["callouts"]
        self._running.events_left = int(STRETCH_CYCLES / price)
        self._began_icount = self._cpu.clock.icount
        self._end_icount = self._began_icount + self.chooser.stretch_insns
        self._counts = self._count()

    def _judge(self) -> None:
        """A stretch is over: the other engine goes on, or this one."""
        cost = self.cost_of_stretch()
        name = self.chooser.engine
        self._spent[name] += cost
        if self.chooser.judge(cost):
            began_ns = perf_counter_ns()
            self._engines[name].pause()
            self._running.resume()
            self._switch_ns += perf_counter_ns() - began_ns
            self._switches_cycles += self.part.exit_cycles
        self._begin_stretch()

    def _count(self) -> dict[str, float]:
        """What the running engine has done so far that has a price, by kind."""
        if self.chooser.engine == TRAP:
            return priced_exits(self._trap.exits.counts())
        tally, windows = self._bt.tally, self._bt.windows
        return priced_software(
            {
                "callouts": tally.callouts,
                "faults delivered": tally.faults_delivered,
                "faults interpreted": tally.faults_interpreted,
                "hidden faults": windows.counters["hidden faults"],
                "port accesses": self._bt.ports.count,
                "guest instructions translated": tally.guest_insns,
                "dispatch misses": tally.misses,
                "chains made": tally.chains_made,
            }
        )

    def cost_of_stretch(self) -> Cost:
        """What the stretch under way has cost so far."""
        counts = {kind: count - self._counts.get(kind, 0) for kind, count in self._count().items()}
        counts = {kind: count for kind, count in counts.items() if count}
        cycles = exits_cycles(counts, self.part) if self.chooser.engine == TRAP else software_cycles(counts)
        return Cost(self._cpu.clock.icount - self._began_icount, counts, cycles)

    def price_as(self, part: Part) -> None:
        """From now on exits are priced as on this processor: what was found at other prices counts no more."""
        self._spent[self.chooser.engine] += self.cost_of_stretch()
        self.part = part
        self.chooser.forget(self._cpu.clock.icount)
        self._begin_stretch()

    # What is told of it.

    def spent(self) -> dict[str, Cost]:
        """By engine, all that has been counted so far."""
        return {**self._spent, self.chooser.engine: self._spent[self.chooser.engine] + self.cost_of_stretch()}

    @property
    def switches_cycles(self) -> float:
        """What the switches are priced at, each as a typical exit; what is refilled afterwards is counted anyway."""
        return self._switches_cycles

    @property
    def switch_ns(self) -> float:
        """What a switch took here, on average; 0 if there was none."""
        return self._switch_ns / max(1, self.chooser.switches)

    def exit_counts(self) -> Sequence[ExitCount]:
        """See `CountsExits`: those of `trap`."""
        return self._trap.exit_counts()

    def exit_sites(self, count: int) -> Sequence[tuple[int, int, int]]:
        """See `LocatesExits`."""
        return self._trap.exit_sites(count)

    @property
    def vmcb(self) -> Vmcb:
        """The control block of `trap`."""
        return self._trap.vmcb

    def translations(self) -> Translations:
        """See `Inspectable`: those of the engine that runs now."""
        return self._running.translations()

    def flush_translations(self) -> None:
        """Forget those of both engines."""
        for engine in self._engines.values():
            engine.flush_translations()

    def execute_singly(self) -> None:
        """See `ExecutesUnits`."""
        for engine in self._engines.values():
            engine.execute_singly()

    def statistics(self) -> Mapping[str, int | float | str]:
        """Counters since the start: its own, those of `bt`, and of `trap` those that `bt` has no name for.

        Clocks, interrupts and exceptions are of both together; pages are counted once, since windows are shared.
        """
        bt, trap = self._bt.statistics(), self._trap.statistics()
        spent = self.spent()
        own: dict[str, int | float | str] = {
            "running": self.chooser.engine,
            "switches": self.chooser.switches,
            "priced as": self.part.name,
            **{f"instructions in {name}": cost.insns for name, cost in spent.items()},
            **{f"estimated cycles in {name}": round(cost.total_cycles) for name, cost in spent.items()},
            "estimated cycles of switches": round(self._switches_cycles),
            "seconds in guest": round(self._bt.tally.seconds_in_tc + self._trap.tally.seconds_in_tc, 6),
        }
        both = {**trap, **bt, **{name: _add(bt[name], trap[name]) for name in bt if _is_of_both(name) and name in trap}}
        return {**both, **own}


def _is_of_both(name: str) -> bool:
    return name in ("interrupts", "true faults", "seconds in VMM") or name.startswith("exceptions ")


def _add(one: float | str, other: float | str) -> float | str:
    return one if isinstance(one, str) or isinstance(other, str) else one + other
