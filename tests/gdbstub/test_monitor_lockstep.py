"""`monitor lockstep`: two engines on copies of the guest, from where it stands."""

from __future__ import annotations

import errno
import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gdbstub import monitor
from gdbstub.guest import GuestTarget
from gdbstub.target import Breakpoint, BreakpointKind, Resume, ResumeMode, StopEvent, StopReason, TargetError
from tests.engine import factories
from tests.gdbstub.pc import CODE, guest, register, run_to, say
from tests.oracles.assembler import assemble
from tests.vmm.planted import plant
from vmm.interp import Interpreter

SOURCE = """
    mov esp, 0x180000
1:  inc eax
    add ecx, 3
    cmp eax, 5000
    jnz 1b
    hlt
"""


@pytest.fixture
def target() -> Iterator[GuestTarget]:
    """A guest under bt that has run for 1,001 instructions."""
    made = factories() | {"trap kvm": lambda machine: Interpreter(machine.cpu, machine.debug)}
    with guest(assemble(SOURCE, origin=CODE), factories=made, name="bt") as target:
        run_to(target, 1001)
        yield target


def plant_wrong_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let bt and trap add 4 where 3 is meant."""
    plant(monkeypatch, assemble("add ecx, 3"), lambda draft: draft.asm.raw(assemble("add ecx, 4")))


def test_no_difference(target: GuestTarget) -> None:
    lines = say(target, "lockstep interp bt 5000").splitlines()
    assert lines[0] == "interp and bt from icount 1,001, 5,000 instructions, on copies"
    assert lines[1] == "no difference in 5,000 instructions"
    assert lines[2].startswith("the host's time: interp 0.")


def test_the_guest_is_not_moved_and_its_breakpoints_stay(target: GuestTarget) -> None:
    target.insert_breakpoint(Breakpoint(BreakpointKind.SOFTWARE, CODE + 6, 1))
    clock = target.machine.clock
    before = clock.snapshot(), target.machine.cpu.state.pack(), bytes(target.machine.memory.ram8)
    assert "no difference in 200 " in say(target, "lockstep bt trap 200")
    assert before == (clock.snapshot(), target.machine.cpu.state.pack(), bytes(target.machine.memory.ram8))
    assert target.machine.engine.name == "bt"
    target.resume([Resume(ResumeMode.CONTINUE)])
    assert target.run(10_000) == StopEvent(StopReason.SWBREAK)
    assert register(target, "eip") == CODE + 6


def test_both_come_to_an_end(target: GuestTarget) -> None:
    text = say(target, "lockstep interp trap nested")
    assert "both stop at icount 20,002: halted\nno difference in 19,001 instructions\n" in text


@pytest.mark.parametrize("names", ["interp bt", "trap-nested interp", "trap nested interp"])
def test_a_difference_is_named(target: GuestTarget, monkeypatch: pytest.MonkeyPatch, names: str) -> None:
    plant_wrong_sum(monkeypatch)
    lines = say(target, f"lockstep {names} 5000").splitlines()
    engines = names.replace("-", " ").replace(" interp", " / interp").replace(" bt", " / bt")
    # 1,001 is the place of the first instruction of a round.
    assert lines[1] == f"different after the instruction at icount 1,002 ({engines}):"
    values = ["0x2f1", "0x2f2"] if names.startswith("interp") else ["0x2f2", "0x2f1"]
    assert lines[2] == f"  ecx: {' / '.join(values)}"
    assert lines[-1].endswith(f"{CODE + 6:08x} add ecx, 3")


def test_each(target: GuestTarget) -> None:
    assert "no difference in 50 instructions" in say(target, "lockstep interp trap 50 each")


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ("bt", "Two engines are compared, and one is missing; there is: interp, bt, trap"),
        ("bt hvm", "There is no engine `hvm`; there is: interp, bt, trap, trap-nested, hybrid, trap-kvm."),
        ("bt trap kvm", "`trap kvm` has no icount: KVM does not count the guest's instructions"),
        ("trap-kvm bt 5", "`trap kvm` has no icount"),
        ("bt interp 5 6", "That is not how `lockstep` is used"),
        ("bt interp x", "`x` is no number of instructions"),
        ("bt interp 0", "The number of instructions is 1 or more."),
        pytest.param(f"bt interp 0x{5000 * 'f'}", " is no number of instructions", id="too long"),
    ],
)
def test_refusals(target: GuestTarget, words: str, answer: str) -> None:
    with pytest.raises(TargetError) as caught:
        say(target, f"lockstep {words}")
    assert answer in str(caught.value)


@pytest.mark.parametrize("allowed", range(4))
def test_a_host_that_has_no_more_is_told_of(target: GuestTarget, monkeypatch: pytest.MonkeyPatch, allowed: int) -> None:
    """The guest is still there: at the copy, at the memory of either side, and then at an engine's."""
    create, made = os.memfd_create, itertools.count()
    before = len(list(Path("/proc/self/fd").iterdir()))

    def create_some(name: str, *flags: int) -> int:
        if next(made) >= allowed:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return create(name, *flags)

    with monkeypatch.context() as patch:
        patch.setattr(os, "memfd_create", create_some)
        with pytest.raises(TargetError, match="Too many open files"):
            say(target, "lockstep interp bt 100")
    assert "no difference" in say(target, "lockstep interp bt 100")
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_it_comes_back_every_few_milliseconds_and_can_be_left(target: GuestTarget) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    output = monitor.run(target, "lockstep interp bt 15000", read_only=True)
    times = []
    for _ in range(5):
        began = time.process_time()
        next(output)
        times.append(time.process_time() - began)
    output.close()
    assert sorted(times)[len(times) // 2] < 0.02
    assert len(list(Path("/proc/self/fd").iterdir())) == before
