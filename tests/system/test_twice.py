"""The same guest twice is the same run: at every stop the same icount, registers, devices, output and memory.

Whatever engine runs it, however it is cut into stints, stepped, or stopped by breakpoints and watchpoints on the way.
Input comes at icounts.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from guests import images
from machine.debug import CodeBreakpoint, StopKind, Watchpoint
from machine.lines import ExitKind
from machine.state import CS, ESP, MASK32, SS
from tests import engine
from tests.system import debian
from tests.system.dialogue import Dialogue, attached
from tests.system.runs import MIB, Run, booted
from tests.system.tools import recent_gdb, stock_gdb
from tests.system.trapgate import running


@dataclass(frozen=True, slots=True)
class Script:
    """A guest, and what is done to it.

    Attributes:
        image: makes the image's path; foreign ones are fetched when they are first needed.
        stops: the icounts at which states are compared, ascending.
        ns_per_insn: large, so that timer interrupts come every few thousand instructions.
        inputs: bytes for COM1 by icount.
        stepped: ranges of icounts through which one way of running it steps.
    """

    image: Callable[[], Path]
    stops: Sequence[int]
    stepped: Sequence[tuple[int, int]]
    append: str = ""
    ram_mib: int = 16
    ns_per_insn: int = 1000
    inputs: Mapping[int, bytes] = field(default_factory=dict)


SCRIPTS = {
    "demo": Script(
        image=lambda: images.path("demo"),
        stops=(1, 2, *range(20_000, 520_001, 20_000)),
        # From before the paging; system calls and the timer; around an input; the reset.
        stepped=((0, 3_000), (118_000, 131_000), (199_990, 200_400), (430_000, 445_000)),
        inputs={130_000: b"ps\r", 200_001: b"regs\r", 260_123: b"spin 9\r", 400_000: b"reboot\r"},
    ),
    "boot": Script(
        image=lambda: images.path("boot"),
        stops=(1, 82, 83, *range(1_000, 17_001, 1_000)),
        stepped=((0, 17_000),),
        ram_mib=8,
    ),
    "gnumach": Script(
        image=debian.gnumach,
        stops=(1, 2, *range(100_000, 1_800_001, 100_000)),
        # The entry; the first instructions with paging on; the first output.
        stepped=((0, 2_000), (580_000, 585_000), (1_408_000, 1_412_000)),
        append="console=com0",
        ram_mib=24,
        ns_per_insn=1,
    ),
}

Advance = Callable[[Run, int], None]


def whole(run: Run, icount: int) -> None:
    run.run_to(icount)


@dataclass
class InPieces:
    """Stints of 1 to 30,000 instructions, short ones as likely as long ones."""

    random: random.Random

    def __call__(self, run: Run, icount: int) -> None:
        run.run_to(icount, lambda: int(10 ** self.random.uniform(0, 4.5)))


@dataclass
class Stepping:
    """Single steps through some ranges of icounts."""

    ranges: Sequence[tuple[int, int]]

    def __call__(self, run: Run, icount: int) -> None:
        for first, last in self.ranges:
            if run.icount <= last and first < icount:
                run.run_to(min(max(first, run.icount), icount))
                run.step_to(min(last, icount))
        run.run_to(icount)


def places(run: Run) -> tuple[CodeBreakpoint, Watchpoint]:
    """A breakpoint where the guest is and a watchpoint on the top of its stack."""
    state = run.machine.cpu.state
    code = (state.segments[CS].base + state.eip) & MASK32
    stack = (state.segments[SS].base + state.gpr[ESP] - 4) & MASK32 & ~3
    return CodeBreakpoint(code), Watchpoint(stack, 4, on_read=True, on_write=True)


@dataclass(frozen=True)
class Record:
    """The states at the stops, and where the guest was then."""

    states: list[dict[str, object]]
    breakpoints: frozenset[CodeBreakpoint]
    watchpoints: frozenset[Watchpoint]
    kinds: Mapping[StopKind, int]
    resets: int


def play(
    script: Script,
    advance: Advance,
    prepare: Callable[[Run], None] = lambda _run: None,
    engine_name: str | None = None,
) -> Record:
    """Run the guest from its start to the last stop, on the chosen engine if none is named."""
    states, where = [], []
    with booted(
        script.image(),
        append=script.append,
        ram_bytes=script.ram_mib * MIB,
        ns_per_insn=script.ns_per_insn,
        engine=engine_name,
    ) as run:
        prepare(run)
        for icount in sorted({*script.stops, *script.inputs}):
            advance(run, icount)
            assert run.icount == icount or run.ended
            if icount in script.stops:
                states.append(run.state())
                where.append(places(run))
            if icount in script.inputs:
                run.machine.feed_serial(0, script.inputs[icount])
        breakpoints = frozenset(code for code, _ in where)
        watchpoints = frozenset(watched for _, watched in where)
        return Record(states, breakpoints, watchpoints, run.stops, run.machine.resets)


@functools.cache
def first_run(name: str) -> Record:
    """The run that the others are compared with, on the reference engine."""
    return play(SCRIPTS[name], whole, engine_name=engine.REFERENCE)


def assert_same(name: str, other: Record) -> None:
    for first, second in zip(first_run(name).states, other.states, strict=True):
        assert first == second


@pytest.mark.usefixtures("each_engine")
@pytest.mark.parametrize("name", SCRIPTS)
def test_twice(name: str) -> None:
    assert_same(name, play(SCRIPTS[name], whole))


@pytest.mark.usefixtures("each_engine")
@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("seed", [1, 2])
def test_in_stints_of_any_size(name: str, seed: int) -> None:
    other = play(SCRIPTS[name], InPieces(random.Random(seed)))
    assert other.kinds[StopKind.BUDGET] > 2 * len(other.states)
    assert_same(name, other)


@pytest.mark.usefixtures("each_engine")
@pytest.mark.parametrize("name", SCRIPTS)
def test_stepping_through_parts_of_it(name: str) -> None:
    other = play(SCRIPTS[name], Stepping(SCRIPTS[name].stepped))
    assert other.kinds[StopKind.STEP] > 5_000
    assert_same(name, other)


@pytest.mark.usefixtures("each_engine")
@pytest.mark.parametrize("name", SCRIPTS)
def test_past_breakpoints(name: str) -> None:
    """At code that the guest is known to come to, some of it often."""
    breakpoints = first_run(name).breakpoints
    other = play(SCRIPTS[name], whole, lambda run: run.machine.debug.set_breakpoints(breakpoints))
    assert other.kinds[StopKind.BREAKPOINT] > 10
    assert_same(name, other)


@pytest.mark.usefixtures("each_engine")
@pytest.mark.parametrize("name", ["demo", "boot"])
def test_past_watchpoints_and_breakpoints_in_pieces(name: str) -> None:
    """Watchpoints on tops of stacks, which are read and written all the time."""
    record = first_run(name)

    def prepare(run: Run) -> None:
        run.machine.debug.set_watchpoints(record.watchpoints)
        run.machine.debug.set_breakpoints(record.breakpoints)

    other = play(SCRIPTS[name], InPieces(random.Random(3)), prepare)
    assert other.kinds[StopKind.WATCHPOINT] > 50
    assert_same(name, other)


def test_the_runs_are_worth_comparing() -> None:
    """They differ from stop to stop, take interrupts, go through a reset, and end as they should."""
    for name, script in SCRIPTS.items():
        states = first_run(name).states
        for number, (before, after) in enumerate(itertools.pairwise(states)):
            assert before != after or after["ended"], f"{name}: stop {number}"
        assert len(states) == len(script.stops)
    assert first_run("demo").resets == 1
    ended = first_run("boot").states[-1]["ended"]
    assert getattr(ended, "kind", None) is ExitKind.POWER_OFF


@pytest.mark.usefixtures("each_engine")
def test_another_input_or_another_time_is_another_run() -> None:
    """The comparison notices input 1000 instructions later, and a character that is another."""
    script = SCRIPTS["demo"]
    late = {icount + 1000 * (icount == 200_001): text for icount, text in script.inputs.items()}
    other = dict(script.inputs) | {260_123: b"spin 8\r"}
    stops = [stop for stop in script.stops if stop <= 300_000]
    expected = first_run("demo").states[: len(stops)]
    for inputs in (late, other):
        changed = Script(script.image, stops, (), inputs={key: inputs[key] for key in inputs if key < 300_000})
        assert play(changed, whole).states != expected


def under_gdb(path: Path, dump: Path, detour: Callable[[Dialogue], None]) -> tuple[int, list[int], list[str], bytes]:
    """Stop a booted demo kernel at its 60th tick; returns icount, registers, the screen and the kernel's memory."""
    demo = images.path("demo")
    with (
        running(demo, "-m", "16", "--ns-per-insn", "1000", "--serial", "none") as trapgate,
        attached(trapgate, path, demo) as gdb,
    ):
        gdb.say("monitor step-interrupts on")
        detour(gdb)
        gdb.say("delete")
        gdb.say("break tasks_tick if ticks == 60")
        gdb.go()
        registers = [gdb.number(f"${name}") for name in ("eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi", "eip")]
        gdb.say(f"dump binary memory {dump} 0xc0000000 0xc0400000")
        return gdb.count(), registers, gdb.screen(), dump.read_bytes()


def steps_and_stops(gdb: Dialogue) -> None:
    """Steps through the first ticks, by instruction and by line; stops at system calls and at writes."""
    gdb.say("break syscall_dispatch")
    gdb.go()
    gdb.go("stepi 3000")
    gdb.go("next")
    gdb.say("delete")
    gdb.say("watch ticks")
    gdb.go("continue 3")


@pytest.mark.usefixtures("each_engine")
def test_under_gdb(tmp_path: Path) -> None:
    """Another gdb, and steps and stops on the way: the same tick is the same instruction, with the same memory."""
    first = under_gdb(stock_gdb(), tmp_path / "first", lambda _gdb: None)
    assert first == under_gdb(stock_gdb(), tmp_path / "second", steps_and_stops)
    assert first == under_gdb(recent_gdb(), tmp_path / "third", steps_and_stops)
