"""`monitor vmm` in mid-session: wherever the guest stands, another engine goes on as if it had run it all along."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from guests import images
from machine.state import SHADOW_NONE
from tests import engine
from tests.system.runs import MIB, Run, booted
from tests.system.tools import asked, gdbs, run_gdb, run_lldb
from tests.system.trapgate import running

DEMO = images.path("demo")
COMMANDS = "quiet run=sleep 3;ps;spin 20;pgfault;div0;ticks"
NS_PER_INSN = 1000
LAST = 300_000
STEPPER_LAST = 3_000


def demo(name: str) -> AbstractContextManager[Run]:
    return booted(DEMO, append=COMMANDS, ram_bytes=16 * MIB, ns_per_insn=NS_PER_INSN, engine=name)


def stepper(name: str) -> AbstractContextManager[Run]:
    return booted(images.path("tiny-stepper"), ram_bytes=16 * MIB, ns_per_insn=NS_PER_INSN, engine=name)


@pytest.mark.parametrize("seed", [1, 2])
def test_at_random_places_of_a_kernel(seed: int) -> None:
    """In ring 3 and in handlers, by runs and by steps; the run that it is compared with is the reference engine's."""
    ring_3 = []
    with demo(engine.REFERENCE) as plain:
        while plain.icount < LAST:
            plain.run_to(plain.icount + 500)
            ring_3 += [plain.icount] if plain.machine.cpu.state.cpl else []
        expected = plain.state()
    chance = random.Random(seed)
    places = set()
    with demo("bt") as run:
        while run.icount < LAST:
            run.machine.select_engine(chance.choice(list(engine.factories())))
            state = run.machine.cpu.state
            places.add((state.cpl, state.eflags >> 9 & 1))
            if (kind := chance.random()) < 0.3:
                run.step_to(min(LAST, run.icount + chance.randrange(1, 20)))
            elif kind < 0.4:
                end = min(LAST - 1, run.icount + 2000)
                while run.icount < end and not state.cpl:
                    run.step()
            else:
                end = run.icount + int(10 ** chance.uniform(0, 4.3))
                run.run_to(min(LAST, end, *(icount for icount in ring_3 if icount > run.icount)))
        assert run.state() == expected
    assert places >= {(0, 0), (0, 1), (3, 1)}


def each_to_each() -> list[str]:
    """Engines in a row in which, the first one following the last, each goes over to each other one once."""
    names = list(engine.factories())
    left = {name: [other for other in names if other != name] for name in names}
    # Hierholzer's way round a graph: where there is no way on, the place is next in the row, from its end.
    row, path = [], [names[0]]
    while path:
        if left[path[-1]]:
            path.append(left[path[-1]].pop())
        else:
            row.append(path.pop())
    return row[:0:-1]


def test_each_goes_over_to_each() -> None:
    row, count = each_to_each(), len(engine.factories())
    assert len(set(zip(row, [*row[1:], row[0]], strict=True))) == len(row) == count * (count - 1)


@pytest.mark.parametrize("names", [("interp", "bt"), each_to_each()], ids=["interp-bt", "each-to-each"])
def test_after_each_step(names: Sequence[str]) -> None:
    """Through a guest that is hard to step: REP half done, the shadows of MOV SS and STI, HLT, TF."""
    with stepper(engine.REFERENCE) as plain:
        while plain.icount < STEPPER_LAST and plain.ended is None:
            plain.step()
        expected = plain.state()
    halfway = shadowed = 0
    with stepper(names[0]) as run:
        turn = 0
        while run.icount < STEPPER_LAST and run.ended is None:
            run.step()
            turn += 1
            halfway += run.machine.cpu.repeating
            shadowed += run.machine.cpu.state.shadow != SHADOW_NONE
            run.machine.select_engine(names[turn % len(names)])
        assert run.state() == expected
    assert turn > 2 * len(names)
    assert halfway >= 2
    assert shadowed >= 2


@pytest.mark.parametrize(
    "names", [("interp", "bt"), ("bt", "interp"), ("bt", "trap"), ("trap", "trap nested")], ids="-".join
)
def test_a_few_instructions_at_a_time(names: tuple[str, str]) -> None:
    with stepper(engine.REFERENCE) as plain:
        plain.run_to(STEPPER_LAST)
        expected = plain.state()
    with stepper(names[0]) as run:
        turn = 0
        while run.icount < STEPPER_LAST and run.ended is None:
            run.run_to(run.icount + 1 + turn % 3)
            turn += 1
            run.machine.select_engine(names[turn & 1])
        assert run.state() == expected


# Conditions, output, catches, watchpoints, steps by range; `%s` stands where the engine may change.
SESSION = (
    "set dprintf-style agent",
    "break syscall_dispatch if ticks > 2",
    "continue",
    "%s",
    "next",
    "%s",
    "stepi 5",
    "delete",
    'dprintf tasks_tick, "at tick %%d\\n", ticks',
    "break interrupt if ticks == 25",
    "continue",
    "%s",
    "watch ticks",
    "continue",
    "%s",
    "delete",
    "monitor step-interrupts on",
    "stepi 200",
    "%s",
    "finish",
    "monitor catch irq",
    "continue",
    "%s",
    "stepi",
    "info registers",
    "x/32xw $esp",
    *asked("$icount"),
)


def play(gdb: Path, *names: str) -> str:
    """What gdb prints, without what the commands in between print."""
    turn = iter(names * len(SESSION))
    commands = [f"monitor vmm {next(turn)}" if line == "%s" else line.replace("%%", "%") for line in SESSION]
    words = (DEMO, "--append", COMMANDS, "--ns-per-insn", str(NS_PER_INSN), "--serial", "none", "--vmm", names[0])
    with running(*words) as trapgate:
        done = run_gdb([trapgate.connect, *commands, "kill"], gdb=gdb, program=images.symbols_path("demo"))
    return re.sub(r"(?m)^[* ] .*\n|^.* runs the guest.*\n", "", done.output)


@pytest.mark.parametrize("gdb", gdbs(), ids=["stock", "recent"])
def test_a_session_is_the_same_on_each_engine_and_on_all_in_turns(gdb: Path) -> None:
    first = play(gdb, "interp")
    assert "at tick" in first
    assert "SIGUSR1" in first
    assert "No symbol" not in first
    assert play(gdb, "bt") == first
    assert play(gdb, "trap") == first
    assert play(gdb, "bt", "interp", "trap", "hybrid", "trap nested") == first


def test_lldb_switches_too() -> None:
    outputs = []
    for first, second in (("interp", "interp"), ("bt", "bt"), ("interp", "bt"), ("trap", "trap nested")):
        words = (DEMO, "--append", COMMANDS, "--ns-per-insn", str(NS_PER_INSN), "--serial", "none", "--vmm", first)
        with running(*words) as trapgate:
            session = run_lldb(
                [
                    f"gdb-remote 127.0.0.1:{trapgate.port}",
                    "breakpoint set --name syscall_dispatch --condition 'ticks > 2'",
                    "continue",
                    f"process plugin packet monitor vmm {second}",
                    "thread step-inst",
                    "thread step-over",
                    "breakpoint delete --force",
                    "watchpoint set expression -w write -s 4 -- &ticks",
                    "continue",
                    "register read eip esp eflags icount",
                    "kill",
                ],
                program=images.symbols_path("demo"),
            )
        outputs.append(re.findall(r"(?m)^ +(?:eip|esp|eflags|icount) = .*", session.output))
        assert len(outputs[-1]) == 4, session.output
    assert all(output == outputs[0] for output in outputs)
