"""`hybrid` against `interp`: exact across a change of engines anywhere; what it counts, and that its choices repeat."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from guests import images
from machine.cpu import Cpu
from machine.cpuid import P6_NO_FPU, PENTIUM4, CpuModel
from machine.debug import DebugControl, StopKind
from machine.devices.board import BoardOptions
from machine.loaders.image import LoadOptions
from machine.pc import Machine, MachineOptions
from tests.engine import Restless
from tests.vmm.bare import host_alu
from vmm import lockstep
from vmm.hybrid import HybridEngine
from vmm.interp import Interpreter
from vmm.lockstep import Outcome, Side, random_icounts
from vmm.native.hostfpu import HostFpu
from vmm.phases import Phase


def compare(
    image: str | bytes,
    append: str = "",
    *,
    total: int,
    longest: int = 20_000,
    stretch: int = 4000,
    model: CpuModel = P6_NO_FPU,
    ns_per_insn: int = 1,
) -> Outcome:
    """Run a guest in lockstep; engines change after up to `stretch` instructions."""
    options = MachineOptions(
        image=images.path(image) if isinstance(image, str) else image,
        model=model,
        make_fpu=HostFpu,
        loading=LoadOptions(ram_bytes=8 << 20, command_line=append),
        ns_per_insn=ns_per_insn,
    )

    def hybrid(machine: Machine) -> HybridEngine:
        chooser = Restless(machine.clock.icount, stretch)
        return HybridEngine(machine.cpu, machine.debug, verify=True, chooser=chooser)

    def make() -> tuple[Side, Side]:
        return (
            lockstep.machine_side(options, lambda machine: Interpreter(machine.cpu, machine.debug), host_alu()),
            lockstep.machine_side(options, hybrid, host_alu()),
        )

    outcome = lockstep.run(make, random_icounts(total, 1, longest))
    assert outcome.divergence is None, str(outcome.divergence)
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
        assert compare(name, total=1000, longest=30, stretch=6).stop is not None

    def test_demo_crashes_and_commands(self) -> None:
        commands = "pgfault;div0;ud;gp;bp;stack;ps;peek 0 8;poke 1000 1;uptime;poweroff"
        outcome = compare("demo", f"quiet run={commands}", total=1_000_000)
        assert outcome.stop is not None
        assert outcome.stop.kind is StopKind.EXIT

    def test_demo_with_interrupts(self) -> None:
        compare("demo", "quiet hz=1000 run=sleep 2;spin 3;poweroff", total=300_000, ns_per_insn=200, stretch=2000)

    @pytest.mark.parametrize("name", ["patched_code", "pte_invlpg", "page_fault", "in", "process_switch"])
    def test_nano(self, name: str) -> None:
        compare("nano", f"{name}=400", total=30_000, longest=5000, stretch=500)

    def test_fork(self) -> None:
        """Page tables are let go of by one engine and shadowed by the other, copied, and torn down."""
        compare("fork", "hz=20000 forkwait=2 ptchurn=2 mix=1", total=250_000, longest=5000)

    def test_floating_point(self) -> None:
        compare("bench", "paging mandelbrot", total=60_000, model=PENTIUM4, stretch=1000)

    def test_boot_sector(self) -> None:
        compare(images.floppy("boot"), total=60_000, stretch=1000)


def made(chooser: Restless | None, cpu: Cpu, debug: DebugControl) -> HybridEngine:
    return HybridEngine(cpu, debug, verify=False, chooser=chooser)


def measure(append: str, stint: int) -> tuple[int, list[Phase], Mapping[str, int | float | str]]:
    """Run `nano` to its end in stints; where it ended, the phases, and the statistics."""
    options = MachineOptions(
        image=images.path("nano"),
        loading=LoadOptions(ram_bytes=16 << 20, command_line=append),
        board=BoardOptions(),
    )
    factories = {"hybrid": lambda machine: made(None, machine.cpu, machine.debug)}
    machine = Machine(options, factories, "hybrid", host_alu())
    try:
        while machine.engine.run(machine.clock.icount + stint).kind is StopKind.BUDGET:
            pass
        assert isinstance(machine.engine, HybridEngine)
        return machine.clock.icount, list(machine.engine.chooser.phases), machine.statistics()
    finally:
        machine.close()


TWO_PHASES = "divide_error=8000 in=8000"
