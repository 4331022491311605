"""`bt` against `interp` on every guest that ships, cut into pieces of random length; also within narrow limits."""

from __future__ import annotations

from functools import partial

import pytest

from guests import images
from machine.cpuid import PENTIUM4
from machine.debug import StopKind
from machine.pc import Machine
from tests.engine import verified
from tests.vmm import shipped
from vmm.lockstep import Input, Side

compare = partial(shipped.compare, verified)

# The demo kernel waits at its prompt from here on.
PROMPT_ICOUNT = 150_000


def types(text: str, *, after: int = PROMPT_ICOUNT, apart: int = 3000) -> tuple[Input, ...]:
    """Text on COM1, a byte at a time."""

    def send(byte: bytes) -> Input:
        def action(side: Side) -> None:
            assert isinstance(side.guest, Machine)
            side.guest.feed_serial(0, byte)

        nonlocal after
        after += apart
        return Input(after, action)

    return tuple(send(bytes([byte])) for byte in text.encode())


class TestTiny:
    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("name", [name for name in images.NAMES if name.startswith("tiny-")])
    def test_all(self, name: str, seed: int) -> None:
        outcome = compare(name, total=1000, longest=(10, 100, 1000)[seed], seed=seed)
        assert (outcome.stop is None) == (name == "tiny-loop")

    @pytest.mark.parametrize("name", ["tiny-selfmod", "tiny-stepper"])
    @pytest.mark.parametrize("insns", [1, 2, 5])
    def test_every_length_of_a_fragment(self, name: str, insns: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("vmm.bt.MIN_BUDGET_INSNS", 1)
        monkeypatch.setattr("vmm.native.translator.MAX_TU_INSTRUCTIONS", insns)
        assert compare(name, total=1000, longest=12).stop is not None


class TestDemo:
    def test_crashes_and_commands(self) -> None:
        commands = "echo hello;pgfault;div0;ud;gp;bp;stack;ps;mem;regs;peek 0 8;poke 1000 1;uptime;poweroff"
        outcome = compare("demo", f"run={commands}", total=2_000_000, longest=20_000)
        assert outcome.stop is not None
        assert outcome.stop.kind is StopKind.EXIT
        for word in (b"hello", b"page fault", b"divide error", b"demo> poweroff"):
            assert word in outcome.output

    def test_typed_input(self) -> None:
        outcome = compare(
            "demo", "quiet hz=1000", total=700_000, longest=30_000, inputs=types("echo typed\rtriple\r"), ns_per_insn=20
        )
        assert b"typed" in outcome.output

    def test_a_panic_and_a_reset(self) -> None:
        outcome = compare("demo", "quiet run=reboot", total=200_000, longest=20_000)
        assert outcome.output.count(b"reboot") > 1

    def test_tiny_budgets(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("vmm.bt.MIN_BUDGET_INSNS", 1)
        compare("demo", "quiet run=pgfault;poweroff", total=200_000, longest=1000)

    def test_few_windows_and_mappings(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("vmm.native.windows.MAX_WINDOWS", 2)
        monkeypatch.setattr("vmm.native.windows.MAX_MAPPINGS", 5)
        outcome = compare("demo", "run=pgfault;ps;poweroff", total=300_000, longest=20_000)
        assert int(outcome.statistics[1]["windows evicted"]) > 10

    def test_a_small_translation_cache(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("vmm.native.cache.TC_BYTES", 80 << 10)
        outcome = compare("demo", "run=pgfault;ps;poweroff", total=300_000, longest=20_000)
        assert outcome.stop is not None


class TestBench:
    @pytest.mark.parametrize("name", ["sieve", "crc32", "fib", "matrix", "memory", "calls", "sort", "lz"])
    def test_each(self, name: str) -> None:
        compare("bench", name, total=150_000, longest=50_000)

    @pytest.mark.parametrize("name", ["nbody", "mandelbrot"])
    def test_floating_point(self, name: str) -> None:
        compare("bench", f"paging {name}", total=400_000, longest=20_000, model=PENTIUM4)

    def test_with_paging(self) -> None:
        compare("bench", "paging calls", total=150_000, longest=50_000)


class TestFork:
    """Processes that share pages until one writes to them, with timer interrupts among them."""

    def test_each_workload(self) -> None:
        outcome = compare(
            "fork", "hz=2000 forkwait=3 compute syscalls=50 ptchurn=20 io=20 mix=1", total=3_000_000, longest=20_000
        )
        assert outcome.stop is not None
        assert outcome.stop.kind is StopKind.EXIT
        assert b"ptchurn 20 be\n" in outcome.output
        assert int(outcome.statistics[1]["interrupts"]) > 0

    def test_forks_cut_into_small_pieces(self) -> None:
        outcome = compare("fork", "hz=20000 forkwait=2 ptchurn=2", total=300_000, longest=700)
        assert b"done\n" in outcome.output

    def test_few_windows_and_a_small_translation_cache(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("vmm.native.windows.MAX_WINDOWS", 2)
        monkeypatch.setattr("vmm.native.cache.TC_BYTES", 80 << 10)
        outcome = compare("fork", "forkwait=3 mix=1", total=3_000_000, longest=20_000)
        assert b"done\n" in outcome.output


def test_boot_sector() -> None:
    outcome = compare(images.floppy("boot"), total=400_000, longest=20_000)
    assert b"protected mode" in outcome.output
