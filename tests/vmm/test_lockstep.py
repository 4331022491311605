"""The comparison of engines itself: it must find what differs, and where, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from guests import images
from machine.cpu import Cpu
from machine.debug import DebugControl, Stop, StopKind
from machine.loaders.image import LoadOptions
from machine.pc import MachineOptions
from machine.state import EBX, MASK32
from tests.vmm.bare import ORIGIN, Bare, flat
from tests.vmm.engines import Variant
from vmm import lockstep
from vmm.differences import MEMORY_LINES, Difference, Kind
from vmm.interp import Interpreter
from vmm.lockstep import Input, LockstepError, Outcome, Side, differences, random_icounts

LOOP = "1: inc eax\nadd ebx, eax\nmov [0x3000 + eax * 4], ebx\njmp 1b"


class Wrong(Interpreter):
    """An engine that does something else once, after 1000 instructions."""

    def __init__(self, cpu: Cpu, debug: DebugControl) -> None:
        super().__init__(cpu, debug)
        self.mistake: Callable[[Cpu], None] = lambda _cpu: None
        self._done = False

    def run(self, until_icount: int, *, skip_breakpoint: bool = False, deliver_caught: bool = False) -> Stop:
        clock = self._cpu.clock
        if not self._done and until_icount > 1000:
            if clock.icount < 1000:
                super().run(1000)
            self.mistake(self._cpu)
            self._done = True
        return super().run(until_icount, skip_breakpoint=skip_breakpoint, deliver_caught=deliver_caught)


def compare(mistake: Callable[[Cpu], None], source: str = LOOP, total: int = 3000, *, locate: bool = True) -> Outcome:
    def make() -> tuple[Side, Side]:
        good, bad = flat(source), flat(source, Wrong)
        assert isinstance(bad.engine, Wrong)
        bad.engine.mistake = mistake
        return Side(good), Side(bad)

    return lockstep.run(make, random_icounts(total, 1, 400), locate=locate)


def flip_ebx(cpu: Cpu) -> None:
    cpu.state.gpr[EBX] ^= 0x80


class TestSearch:
    def test_equal_runs_have_no_difference(self) -> None:
        outcome = compare(lambda _cpu: None)
        assert outcome.divergence is None
        assert (outcome.icount, outcome.stop) == (3000, None)
        assert all(outcome.seconds)
        assert outcome.statistics[0]["instructions decoded"]

    def test_the_first_different_icount_is_found(self) -> None:
        divergence = compare(flip_ebx).divergence
        assert divergence is not None
        assert (divergence.agreed_icount, divergence.icount) == (1000, 1001)
        assert any(str(each).startswith("ebx: 0x") for each in divergence.differences)
        # 1000 instructions are 250 rounds; the 1001st increments EAX.
        assert divergence.trace[-1].split() == ["1000", "0008:00001000", "inc", "eax"]
        assert len(divergence.trace) == lockstep.TRACE_INSNS
        assert divergence.trace[-2].split()[2:4] == ["jmp", "0x1000"]

    def test_it_reads_well(self) -> None:
        text = str(compare(flip_ebx).divergence)
        assert text.startswith("equal at icount 1000, different at 1001:\n  ebx: 0x")
        assert "the first side's way there:\n" in text

    def test_without_a_search_it_is_as_coarse_as_the_icounts(self) -> None:
        divergence = compare(flip_ebx, locate=False).divergence
        assert divergence is not None
        icounts = [0, *random_icounts(3000, 1, 400)]
        index = icounts.index(divergence.agreed_icount)
        assert divergence.agreed_icount <= 1000 < divergence.icount == icounts[index + 1]
        assert divergence.trace == ()

    def test_a_difference_that_does_not_come_again_is_no_answer(self) -> None:
        turns = []

        def once(cpu: Cpu) -> None:
            turns.append(cpu)
            if len(turns) == 1:
                flip_ebx(cpu)

        with pytest.raises(LockstepError, match="did not come again: ebx"):
            compare(once)

    def test_stops_are_compared(self) -> None:
        def skip_halt(cpu: Cpu) -> None:
            cpu.state.gpr[0] = 0

        outcome = compare(skip_halt, "mov eax, 400\n1: dec eax\nnop\njnz 1b\nhlt")
        assert outcome.divergence is not None
        assert outcome.divergence.icount == 1001
        outcome = compare(lambda cpu: cpu.mmu.flush(), "mov eax, 400\n1: dec eax\nnop\njnz 1b\nhlt")
        assert outcome.divergence is None
        assert (outcome.stop, outcome.icount) == (Stop(StopKind.HALTED), 1202)

    def test_a_guest_that_does_not_come_on_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("machine.instructions.strings.CHUNK_ITERATIONS", 1)
        monkeypatch.setattr(lockstep, "PATIENCE_RUNS", 3)
        with closing(flat("rep lodsb")) as guest:
            guest.state.gpr[1] = MASK32
            with pytest.raises(LockstepError, match="interp comes no further than icount 0"):
                Side(guest).advance(1)

    def test_inputs_come_at_their_icount_to_both(self) -> None:
        seen: list[tuple[str, int]] = []

        def note(side: Side) -> None:
            seen.append((side.guest.engine.name, side.guest.clock.icount))
            side.guest.cpu.state.gpr[EBX] = 0

        outcome = lockstep.run(lambda: (Side(flat(LOOP)), Side(flat(LOOP))), [10, 2000], [Input(777, note)])
        assert outcome.divergence is None
        assert seen == [("interp", 777)] * 2

    def test_icounts_are_asked_for_as_they_are_wanted(self) -> None:
        """So many that memory would not hold them."""
        asked: list[int] = []

        def icounts() -> Iterator[int]:
            for icount in range(100, 1_000_000, 100):
                asked.append(icount)
                yield icount

        source = "mov eax, 100\n1: dec eax\nnop\njnz 1b\nhlt"
        outcome = lockstep.run(lambda: (Side(flat(source)), Side(flat(source))), icounts())
        assert outcome.stop == Stop(StopKind.HALTED)
        assert len(asked) < 10

    def test_inputs_come_again_in_the_search(self) -> None:
        def make() -> tuple[Side, Side]:
            good, bad = flat(LOOP), flat(LOOP, Wrong)
            assert isinstance(bad.engine, Wrong)
            bad.engine.mistake = lambda cpu: None if cpu.memory.load(0x9_0000, 4) else flip_ebx(cpu)
            return Side(good), Side(bad)

        def mark(side: Side) -> None:
            side.guest.memory.store(0x9_0000, 4, 1)

        assert lockstep.run(make, [500, 2000], [Input(999, mark)]).divergence is None
        divergence = lockstep.run(make, [500, 2000]).divergence
        assert divergence is not None
        assert divergence.icount == 1001


@pytest.fixture
def pair() -> Iterator[tuple[Bare, Bare]]:
    """Two guests that are equal."""
    first, second = flat("nop"), flat("nop")
    yield first, second
    first.close()
    second.close()


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        (lambda bare: bare.state.gpr.__setitem__(2, 0x99), ["edx: 0x600 / 0x99"]),
        (lambda bare: setattr(bare.state, "eflags", 0x46), ["flag PF: 0 / 1", "flag ZF: 0 / 1"]),
        (lambda bare: setattr(bare.state, "eflags", 0x3002), ["flag IOPL: 0 / 3"]),
        (lambda bare: setattr(bare.state.segments[3], "limit", 5), ["ds.limit: 0xffffffff / 0x5"]),
        (lambda bare: setattr(bare.state.gdtr, "base", 5), ["gdtr.base: 0xa000 / 0x5"]),
        (lambda bare: bare.state.dr.__setitem__(6, 0), ["dr6: 0xffff0ff0 / 0x0"]),
        (lambda bare: setattr(bare.state, "shadow", 1), ["shadow: 0x0 / 0x1"]),
        (lambda bare: bare.state.fpu.set_xmm(3, 7), ["xmm3: 0x0 / 0x7"]),
        (lambda bare: setattr(bare.state.fpu, "mxcsr", 0x1F81), ["mxcsr: 0x1f80 / 0x1f81"]),
        (lambda bare: setattr(bare.cpu, "pending_debug", 1), ["cpu pending_debug: 0x0 / 0x1"]),
        (lambda bare: setattr(bare.cpu, "repeating", True), ["cpu repeating: False / True"]),
        (lambda bare: setattr(bare.clock, "icount", 7), ["clock icount: 0x0 / 0x7"]),
        (lambda bare: setattr(bare.clock, "idle_ns", 7), ["clock idle_ns: 0x0 / 0x7"]),
        (lambda bare: bare.lines.raise_nmi(), ["line nmi_pending: False / True"]),
        (lambda bare: bare.lines.set_intr(True), ["line intr: False / True"]),
        (lambda bare: setattr(bare.memory, "a20_enabled", False), ["cpu a20: True / False"]),
        (lambda bare: bare.memory.store(0x2_3456, 1, 0xAB), ["memory 00023454: 00 00 00 00 / 00 00 ab 00"]),
        (lambda bare: bare.memory.store(ORIGIN, 1, 0x91), ["memory 00001000: 90 00 00 00 / 91 00 00 00"]),
    ],
    ids=lambda value: value[0].partition(":")[0] if isinstance(value, list) else "",
)
def test_what_is_compared(pair: tuple[Bare, Bare], change: Callable[[Bare], None], lines: list[str]) -> None:
    first, second = pair
    assert differences(Side(first), Side(second)) == []
    change(second)
    assert [str(each) for each in differences(Side(first), Side(second))] == lines


def test_devices_and_output_are_compared(pair: tuple[Bare, Bare]) -> None:
    first, second = map(Side, pair)
    first.output += b"hello world"
    second.output += b"hello there"
    first.devices = lambda: {"pic": {"mask": 255, "lines": [0, 1]}}
    second.devices = lambda: {"pic": {"mask": 255, "lines": [0, 2]}, "pit": {}}
    found = differences(first, second)
    assert [str(each) for each in found] == [
        "device pic.lines[1]: 0x1 / 0x2",
        "output after 6 bytes: b'world' / b'there'",
    ]
    assert found[0] == Difference(Kind.DEVICE, "pic.lines[1]", "0x1", "0x2")


def test_stops_are_compared_if_given(pair: tuple[Bare, Bare]) -> None:
    sides = Side(pair[0]), Side(pair[1])
    assert differences(*sides, None, None) == []
    assert str(differences(*sides, None, Stop(StopKind.HALTED))[0]) == "stopped by: nothing / halted"


def test_much_memory_is_summed_up(pair: tuple[Bare, Bare]) -> None:
    first, second = pair
    second.memory.write(0x5_0000, b"\1" * 0x2000)
    lines = differences(Side(first), Side(second))
    more = 0x2000 // 4 - MEMORY_LINES
    assert len(lines) == MEMORY_LINES + 1
    assert str(lines[-1]) == f"memory doublewords besides: {more} / {more}"


def test_comparing_costs_no_memory(pair: tuple[Bare, Bare]) -> None:
    """RAM that nobody has touched stays a hole in its file."""
    first, second = pair
    before = Path(f"/proc/self/fd/{first.memory.ram_fd}").stat().st_blocks
    differences(Side(first), Side(second))
    assert Path(f"/proc/self/fd/{first.memory.ram_fd}").stat().st_blocks == before < first.memory.ram_bytes // 512 // 4


def test_icounts_are_a_function_of_the_seed() -> None:
    icounts = random_icounts(10_000, 5, 1000)
    assert icounts == random_icounts(10_000, 5, 1000) != random_icounts(10_000, 6, 1000)
    steps = [b - a for a, b in zip([0, *icounts], icounts, strict=False)]
    assert icounts[-1] == 10_000
    assert min(steps) == 1
    assert 300 < max(steps) <= 1000
    assert sum(step < 10 for step in steps) > len(steps) // 5


def test_a_machine_is_a_side(variant: Variant) -> None:
    options = MachineOptions(image=images.path("tiny-exit"), loading=LoadOptions(ram_bytes=2 << 20))

    def make() -> tuple[Side, Side]:
        first = lockstep.machine_side(options, lambda machine: Interpreter(machine.cpu, machine.debug))
        second = lockstep.machine_side(options, lambda machine: variant.make(machine.cpu, machine.debug))
        return first, second

    outcome = lockstep.run(make, [50, 100, 10_000])
    assert outcome.divergence is None
    assert outcome.output == b"exit\r\n"
    assert outcome.stop is not None
    assert outcome.stop.kind is StopKind.EXIT
