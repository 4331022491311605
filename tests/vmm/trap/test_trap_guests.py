"""`trap` against `interp` on the guests that ship, under both pagings, cut into pieces of random length."""

from __future__ import annotations

import pytest

from guests import images
from machine.cpu import Cpu
from machine.cpuid import P6_NO_FPU, PENTIUM4, CpuModel
from machine.debug import DebugControl, StopKind
from machine.loaders.image import LoadOptions
from machine.pc import MachineOptions
from tests.vmm.bare import host_alu
from vmm import lockstep
from vmm.interp import Interpreter
from vmm.lockstep import Outcome, Side, random_icounts
from vmm.native.hostfpu import HostFpu
from vmm.trap.engine import TrapEngine

pytestmark = pytest.mark.parametrize("nested", [False, True], ids=["shadow", "nested"])


def trap(cpu: Cpu, debug: DebugControl, *, nested: bool) -> TrapEngine:
    return TrapEngine(cpu, debug, nested=nested, verify=True)


def compare(
    image: str | bytes,
    append: str = "",
    *,
    nested: bool,
    total: int,
    longest: int = 20_000,
    seed: int = 1,
    model: CpuModel = P6_NO_FPU,
    ns_per_insn: int = 1,
) -> Outcome:
    options = MachineOptions(
        image=images.path(image) if isinstance(image, str) else image,
        model=model,
        make_fpu=HostFpu,
        loading=LoadOptions(ram_bytes=8 << 20, command_line=append),
        ns_per_insn=ns_per_insn,
    )

    def make() -> tuple[Side, Side]:
        return (
            lockstep.machine_side(options, lambda machine: Interpreter(machine.cpu, machine.debug), host_alu()),
            lockstep.machine_side(options, lambda machine: trap(machine.cpu, machine.debug, nested=nested), host_alu()),
        )

    outcome = lockstep.run(make, random_icounts(total, seed, longest))
    assert outcome.divergence is None, str(outcome.divergence)
    return outcome


@pytest.mark.parametrize("name", [name for name in images.NAMES if name.startswith("tiny-")])
def test_tiny(name: str, nested: bool) -> None:
    outcome = compare(name, nested=nested, total=1000, longest=100)
    assert (outcome.stop is None) == (name == "tiny-loop")
    assert int(outcome.statistics[1]["exits"]) > 0


@pytest.mark.parametrize("name", ["tiny-selfmod", "tiny-stepper", "tiny-triple"])
def test_tiny_with_every_instruction_in_emitted_code(name: str, nested: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmm.bt.MIN_BUDGET_INSNS", 1)
    monkeypatch.setattr("vmm.native.translator.MAX_TU_INSTRUCTIONS", 2)
    assert compare(name, nested=nested, total=1000, longest=12).stop is not None


def test_demo_crashes_and_commands(nested: bool) -> None:
    commands = "pgfault;div0;ud;gp;bp;stack;ps;peek 0 8;poke 1000 1;uptime;poweroff"
    outcome = compare("demo", f"quiet run={commands}", nested=nested, total=1_000_000)
    assert outcome.stop is not None
    assert outcome.stop.kind is StopKind.EXIT
    counts = outcome.statistics[1]
    if nested:
        assert int(counts["nested walk references"]) > int(counts["nested walk references with a page-walk cache"]) > 0
        assert not any(name.startswith(("exits EXCP_PF", "exits CR3", "exits INVLPG")) for name in counts)
        assert "exits NPF write 0xb8000" in counts
    else:
        for kind in ("true", "hidden", "trace", "device"):
            assert int(counts[f"exits EXCP_PF {kind}"]) > 0
        assert int(counts["exits CR3_WRITE"]) > 0
        assert int(counts["exits INVLPG"]) > 0


def test_demo_with_interrupts(nested: bool) -> None:
    outcome = compare(
        "demo", "quiet hz=1000 run=sleep 2;spin 3;poweroff", nested=nested, total=400_000, ns_per_insn=200
    )
    counts = outcome.statistics[1]
    assert int(counts["injected INTR"]) > 5
    assert int(counts["exits HLT"]) > 0
    assert int(counts["exits VINTR"]) > 0


def test_demo_triple_fault(nested: bool) -> None:
    outcome = compare("demo", "quiet run=triple", nested=nested, total=200_000)
    assert outcome.stop is not None
    assert outcome.stop.kind is StopKind.TRIPLE_FAULT
    assert int(outcome.statistics[1]["exits SHUTDOWN"]) == 1


@pytest.mark.parametrize("name", ["sieve", "memory", "calls", "lz"])
def test_bench(name: str, nested: bool) -> None:
    compare("bench", name, nested=nested, total=60_000, longest=50_000)


def test_floating_point(nested: bool) -> None:
    compare("bench", "paging mandelbrot", nested=nested, total=100_000, model=PENTIUM4)


@pytest.mark.parametrize("name", ["syscall_int", "pte", "pte_invlpg", "page_fault", "in", "divide_error", "cpuid"])
def test_nano(name: str, nested: bool) -> None:
    outcome = compare("nano", name, nested=nested, total=60_000)
    assert int(outcome.statistics[1]["exits"]) > 0


def test_fork(nested: bool) -> None:
    outcome = compare("fork", "hz=20000 forkwait=2 ptchurn=2 mix=1", nested=nested, total=250_000, longest=5000)
    assert int(outcome.statistics[1]["injected INTR"]) > 0


def test_boot_sector(nested: bool) -> None:
    outcome = compare(images.floppy("boot"), nested=nested, total=150_000)
    assert b"protected mode" in outcome.output
