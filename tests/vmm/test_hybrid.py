"""`hybrid` against `interp`: exact across a change of engines anywhere; what it counts, and that its choices repeat."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from functools import partial
from time import process_time

import pytest

from guests import images
from machine.cpuid import PENTIUM4
from machine.debug import CodeBreakpoint, StopKind, Watchpoint
from machine.devices.board import BoardOptions
from machine.engine import Engine
from machine.loaders.image import LoadOptions
from machine.pc import Machine, MachineOptions
from machine.state import EAX
from tests.engine import Restless, restless
from tests.vmm.bare import ORIGIN, EngineMaker, flat, host_alu
from tests.vmm.shipped import compare
from vmm.hybrid import BT, TRAP, HybridEngine
from vmm.interp import Interpreter
from vmm.lockstep import Outcome
from vmm.native.shadows import MappingLedger
from vmm.phases import STRETCH_CYCLES, STRETCH_INSNS, Chooser, Cost
from vmm.prices import PARTS


def often(stretch_insns: int) -> EngineMaker:
    """What makes a `hybrid` that changes engines after up to so many instructions."""
    return partial(restless, longest_insns=stretch_insns)


def took_turns(outcome: Outcome) -> Outcome:
    """Both engines have run the guest."""
    counts = outcome.statistics[1]
    assert int(counts["switches"]) > 3
    assert int(counts["instructions in bt"]) > 0
    assert int(counts["instructions in trap"]) > 0
    return outcome


class TestExactness:
    @pytest.mark.parametrize("name", ["tiny-selfmod", "tiny-stepper", "tiny-triple", "tiny-hlt"])
    def test_tiny(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """With a change every few instructions, each of which is emitted code."""
        monkeypatch.setattr("vmm.bt.MIN_BUDGET_INSNS", 1)
        monkeypatch.setattr("vmm.native.translator.MAX_TU_INSTRUCTIONS", 2)
        assert took_turns(compare(often(6), name, total=1000, longest=30)).stop is not None

    def test_demo_crashes_and_commands(self) -> None:
        commands = "pgfault;div0;ud;gp;bp;stack;ps;peek 0 8;poke 1000 1;uptime;poweroff"
        outcome = took_turns(compare(restless, "demo", f"quiet run={commands}", total=1_000_000, longest=20_000))
        assert outcome.stop is not None
        assert outcome.stop.kind is StopKind.EXIT

    def test_demo_with_interrupts(self) -> None:
        words = "quiet hz=1000 run=sleep 2;spin 3;poweroff"
        took_turns(compare(often(2000), "demo", words, total=300_000, longest=20_000, ns_per_insn=200))

    @pytest.mark.parametrize("name", ["patched_code", "pte_invlpg", "page_fault", "in", "process_switch"])
    def test_nano(self, name: str) -> None:
        took_turns(compare(often(500), "nano", f"{name}=400", total=30_000, longest=5000))

    def test_fork(self) -> None:
        """Page tables are let go of by one engine and shadowed by the other, copied, and torn down."""
        words = "hz=20000 forkwait=2 ptchurn=2 mix=1"
        took_turns(compare(restless, "fork", words, total=250_000, longest=5000))

    def test_floating_point(self) -> None:
        words = "paging mandelbrot"
        took_turns(compare(often(1000), "bench", words, total=60_000, longest=20_000, model=PENTIUM4))

    def test_boot_sector(self) -> None:
        took_turns(compare(often(1000), images.floppy("boot"), total=60_000, longest=20_000))


# Code that changes before each execution is a callout for bt and nothing for trap; ports are the other way round.
TWO_PHASES = "patched_code=50000 in=10000 patched_code=50000 in=10000"


def measure(append: str, chooser: Chooser | None = None, stint: int = 10_000_000) -> tuple[HybridEngine, int]:
    """Run `nano` to its end, in stints; the engine as it was then, and how many instructions that took."""
    options = MachineOptions(
        image=images.path("nano"), loading=LoadOptions(ram_bytes=16 << 20, command_line=append), board=BoardOptions()
    )
    factories = {"hybrid": lambda machine: HybridEngine(machine.cpu, machine.debug, chooser=chooser)}
    machine = Machine(options, factories, "hybrid", host_alu())
    try:
        while machine.engine.run(machine.clock.icount + stint).kind is StopKind.BUDGET:
            pass
        assert isinstance(machine.engine, HybridEngine)
        return machine.engine, machine.clock.icount
    finally:
        machine.close()


class Settled(Chooser):
    """Never changes its mind."""

    def judge(self, cost: Cost) -> bool:
        """Stay."""
        self.phase.cost += cost
        return False


def cycles(engine: HybridEngine) -> float:
    return sum(cost.total_cycles for cost in engine.spent().values()) + engine.switches_cycles


class TestChoice:
    @pytest.mark.slow
    def test_a_guest_of_two_phases_costs_less_than_under_either_engine(self) -> None:
        hybrid, icount = measure(TWO_PHASES)
        bt, bt_icount = measure(TWO_PHASES, Settled(BT, TRAP))
        trap, trap_icount = measure(TWO_PHASES, Settled(TRAP, BT))
        assert icount == bt_icount == trap_icount
        assert hybrid.chooser.switches >= 3
        assert cycles(hybrid) < 0.8 * min(cycles(bt), cycles(trap))
        assert sum(cost.insns for cost in hybrid.spent().values()) == icount
        assert hybrid.switches_cycles == hybrid.chooser.switches * PARTS[0].exit_cycles
        assert hybrid.switch_ns > 0

    def test_choices_repeat(self) -> None:
        """They follow from counts alone, not from clocks."""
        first, second = (measure("patched_code=12000 in=5000")[0] for _ in range(2))
        assert first.chooser.switches
        assert [str(phase) for phase in first.chooser.phases] == [str(phase) for phase in second.chooser.phases]
        assert first.spent() == second.spent()

    def test_what_is_kept_while_the_other_engine_runs(self) -> None:
        """Both stay warm: coming back, neither translates again what it had."""
        engine, _ = measure("call_ret=4000", Restless(0, 2000))
        statistics = [each.tally for each in (engine._bt, engine._trap)]
        assert engine.chooser.switches > 10
        assert all(0 < tally.units < 150 for tally in statistics)

    def test_a_stretch_at_other_prices_is_as_long_as_they_say(self) -> None:
        with closing(flat("jmp $", lambda cpu, debug: HybridEngine(cpu, debug, chooser=Chooser(TRAP, BT)))) as bare:
            engine = bare.engine
            assert isinstance(engine, HybridEngine)
            bare.run(10_000_000)
            assert engine.chooser.stretch_insns > STRETCH_INSNS
            engine.price_as(PARTS[-1])
            assert engine._end_icount == bare.clock.icount + STRETCH_INSNS
            assert engine._trap.events_left == int(STRETCH_CYCLES / PARTS[-1].exit_cycles)


class TestDebugging:
    def test_breakpoints_and_watchpoints_are_kept(self) -> None:
        with closing(
            flat(
                "xor eax, eax\n1: inc eax\nmov [0x3000], eax\nadd ebx, [0x3004]\njmp 1b",
                often(40),
            )
        ) as bare:
            bare.debug.set_breakpoints(frozenset({CodeBreakpoint(ORIGIN + 2)}))
            for count in range(30):
                stop = bare.engine.run(1000, skip_breakpoint=count > 0)
                assert (stop.kind, stop.linear) == (StopKind.BREAKPOINT, ORIGIN + 2)
                assert bare.cpu.state.gpr[EAX] == count
            bare.debug.set_breakpoints(frozenset())
            bare.debug.set_watchpoints(frozenset({Watchpoint(0x3000, 4, on_read=False, on_write=True)}))
            for count in range(30, 60):
                stop = bare.engine.run(1000)
                assert (stop.kind, stop.linear) == (StopKind.WATCHPOINT, 0x3000)
                assert bare.cpu.state.gpr[EAX] == count
            assert int(bare.engine.statistics()["switches"]) > 5

    def test_the_longest_run_is_that_of_all_stretches(self) -> None:
        with closing(flat("jmp $", often(5000))) as bare:
            bare.engine.run(1000)
            bare.debug.longest_run_s = 0.02
            began_s = process_time()
            assert bare.engine.run(1 << 40).kind is StopKind.BUDGET
            assert process_time() - began_s < 1
            assert bare.debug.longest_run_s == 0.02

    def test_a_switch_to_another_engine_and_back(self) -> None:
        """Nothing of the two engines is left behind when a third takes over."""
        options = MachineOptions(image=images.path("tiny-stepper"), loading=LoadOptions(ram_bytes=4 << 20))

        def make_hybrid(machine: Machine) -> Engine:
            return HybridEngine(machine.cpu, machine.debug, chooser=Restless(machine.clock.icount, 9))

        def make_interp(machine: Machine) -> Engine:
            return Interpreter(machine.cpu, machine.debug)

        factories: dict[str, Callable[[Machine], Engine]] = {"hybrid": make_hybrid, "interp": make_interp}
        machine = Machine(options, factories, "interp", host_alu())
        memory, mmu = machine.memory, machine.cpu.mmu
        try:

            def observers() -> list[int]:
                lists = (memory.write_observers, memory.flag_observers, memory.map_observers, mmu.flush_observers)
                return [len(each) for each in (*lists, machine.debug.on_change)]

            machine.engine.run(20)
            before, used = observers(), MappingLedger.used
            for _ in range(3):
                machine.select_engine("hybrid")
                machine.engine.run(machine.clock.icount + 60)
                machine.select_engine("interp")
                assert observers() == before
                assert MappingLedger.used == used
                assert not memory.intercepts_devices
                assert mmu.before_access is None
        finally:
            machine.close()
