"""`trap` against `interp` on the guests that ship, under both pagings, cut into pieces of random length."""

from __future__ import annotations

import pytest

from guests import images
from machine.cpuid import PENTIUM4
from machine.debug import StopKind
from tests.engine import trap, trap_nested
from tests.vmm.bare import EngineMaker
from tests.vmm.shipped import compare

pytestmark = pytest.mark.parametrize("make", [trap, trap_nested], ids=["shadow", "nested"])


@pytest.mark.parametrize("name", [name for name in images.NAMES if name.startswith("tiny-")])
def test_tiny(name: str, make: EngineMaker) -> None:
    outcome = compare(make, name, total=1000, longest=100)
    assert (outcome.stop is None) == (name == "tiny-loop")
    assert int(outcome.statistics[1]["exits"]) > 0


@pytest.mark.parametrize("name", ["tiny-selfmod", "tiny-stepper", "tiny-triple"])
def test_tiny_with_every_instruction_in_emitted_code(
    name: str, make: EngineMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmm.bt.MIN_BUDGET_INSNS", 1)
    monkeypatch.setattr("vmm.native.translator.MAX_TU_INSTRUCTIONS", 2)
    assert compare(make, name, total=1000, longest=12).stop is not None


def test_demo_crashes_and_commands(make: EngineMaker) -> None:
    commands = "pgfault;div0;ud;gp;bp;stack;ps;peek 0 8;poke 1000 1;uptime;poweroff"
    outcome = compare(make, "demo", f"quiet run={commands}", total=1_000_000, longest=20_000)
    assert outcome.stop is not None
    assert outcome.stop.kind is StopKind.EXIT
    counts = outcome.statistics[1]
    if make is trap_nested:
        assert int(counts["nested walk references"]) > int(counts["nested walk references with a page-walk cache"]) > 0
        assert not any(name.startswith(("exits EXCP_PF", "exits CR3", "exits INVLPG")) for name in counts)
        assert "exits NPF write 0xb8000" in counts
    else:
        for kind in ("true", "hidden", "trace", "device"):
            assert int(counts[f"exits EXCP_PF {kind}"]) > 0
        assert int(counts["exits CR3_WRITE"]) > 0
        assert int(counts["exits INVLPG"]) > 0


def test_demo_with_interrupts(make: EngineMaker) -> None:
    outcome = compare(
        make, "demo", "quiet hz=1000 run=sleep 2;spin 3;poweroff", total=400_000, longest=20_000, ns_per_insn=200
    )
    counts = outcome.statistics[1]
    assert int(counts["injected INTR"]) > 5
    assert int(counts["exits HLT"]) > 0
    assert int(counts["exits VINTR"]) > 0


def test_demo_triple_fault(make: EngineMaker) -> None:
    outcome = compare(make, "demo", "quiet run=triple", total=200_000, longest=20_000)
    assert outcome.stop is not None
    assert outcome.stop.kind is StopKind.TRIPLE_FAULT
    assert int(outcome.statistics[1]["exits SHUTDOWN"]) == 1


@pytest.mark.parametrize("name", ["sieve", "memory", "calls", "lz"])
def test_bench(name: str, make: EngineMaker) -> None:
    compare(make, "bench", name, total=60_000, longest=50_000)


def test_floating_point(make: EngineMaker) -> None:
    compare(make, "bench", "paging mandelbrot", total=100_000, longest=20_000, model=PENTIUM4)


@pytest.mark.parametrize("name", ["syscall_int", "pte", "pte_invlpg", "page_fault", "in", "divide_error", "cpuid"])
def test_nano(name: str, make: EngineMaker) -> None:
    outcome = compare(make, "nano", name, total=60_000, longest=20_000)
    assert int(outcome.statistics[1]["exits"]) > 0


def test_fork(make: EngineMaker) -> None:
    outcome = compare(make, "fork", "hz=20000 forkwait=2 ptchurn=2 mix=1", total=250_000, longest=5000)
    assert int(outcome.statistics[1]["injected INTR"]) > 0


def test_boot_sector(make: EngineMaker) -> None:
    outcome = compare(make, images.floppy("boot"), total=150_000, longest=20_000)
    assert b"protected mode" in outcome.output
