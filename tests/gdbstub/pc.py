"""A PC with a few bytes of code, for tests of what a debugger sees of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from gdbstub import guest_registers
from gdbstub.guest import GuestTarget
from gdbstub.target import Breakpoint, BreakpointKind, Resume, ResumeMode, StintEnd, StopEvent, Verdict
from machine.debug import StopKind
from machine.devices.board import BoardOptions
from machine.loaders.image import LoadOptions
from machine.pc import EngineFactory, Machine, MachineOptions
from tests import engine

CODE = 0x10_0000
RAM_BYTES = 4 << 20

NOP = b"\x90"
HLT = b"\xf4"
STI = b"\xfb"
JMP_SELF = b"\xeb\xfe"
INC_EAX = b"\x40"
UD2 = b"\x0f\x0b"
INT3 = b"\xcc"
REP_STOSB = b"\xf3\xaa"
DATA = CODE + 0x1000


@contextmanager
def guest(
    code: bytes,
    *,
    bits: int = 32,
    at: int = CODE,
    board: BoardOptions | None = None,
    factories: Mapping[str, EngineFactory] | None = None,
    name: str = "",
    timed: bool = False,
) -> Iterator[GuestTarget]:
    """A machine that stands before `code`, flat at `at`, with a debugger attached.

    It runs on the engine `name` of `factories`, by default on the test's. Unless `timed`, a stint lasts as long as its
    budget does: on a busy host it would end after any instruction.
    """
    loading = LoadOptions(ram_bytes=RAM_BYTES, load_address=at, entry_bits=bits)
    options = MachineOptions(image=code, loading=loading, board=board or BoardOptions())
    machine = Machine(options, factories or engine.factories(), name or engine.chosen())
    target = GuestTarget(machine)
    if not timed:
        machine.debug.longest_run_s = math.inf
    target.attach()
    target.interrupt()
    try:
        yield target
    finally:
        machine.close()


def mov_eax(value: int) -> bytes:
    return b"\xb8" + value.to_bytes(4, "little")


def mov_ecx(value: int) -> bytes:
    return b"\xb9" + value.to_bytes(4, "little")


def mov_edi(value: int) -> bytes:
    return b"\xbf" + value.to_bytes(4, "little")


def store_eax(address: int) -> bytes:
    return b"\xa3" + address.to_bytes(4, "little")


def load_eax(address: int) -> bytes:
    return b"\xa1" + address.to_bytes(4, "little")


def out_exit(value: int) -> bytes:
    """MOV AL, value; OUT F4h, AL."""
    return b"\xb0" + bytes((value,)) + b"\xe6\xf4"


def code_break(address: int, check: Callable[[], Verdict] | None = None) -> Breakpoint:
    return Breakpoint(BreakpointKind.SOFTWARE, address, 1, check=check)


def register(target: GuestTarget, name: str) -> int | None:
    """A register by name."""
    return target.read_register(1, guest_registers.DESCRIPTION.number_of(name))


def write(target: GuestTarget, name: str, value: int) -> None:
    """Set a register by name."""
    target.write_register(1, guest_registers.DESCRIPTION.number_of(name), value)


def go(target: GuestTarget, *, signal: int = 0, budget: int = 1000, stints: int = 20) -> StopEvent:
    """Continue until a stop; the guest must not become idle."""
    target.resume([Resume(ResumeMode.CONTINUE, signal=signal)])
    return finish(target, budget=budget, stints=stints)


def step(target: GuestTarget, *, signal: int = 0) -> StopEvent:
    """Step one instruction."""
    target.resume([Resume(ResumeMode.STEP, signal=signal)])
    return finish(target)


def step_range(target: GuestTarget, start: int, end: int, *, budget: int = 1000) -> StopEvent:
    """Step until EIP leaves a range."""
    target.resume([Resume(ResumeMode.RANGE_STEP, range_start=start, range_end=end)])
    return finish(target, budget=budget)


def finish(target: GuestTarget, *, budget: int = 1000, stints: int = 20) -> StopEvent:
    """Run stints until a stop."""
    for _ in range(stints):
        outcome = target.run(budget)
        if isinstance(outcome, StopEvent):
            return outcome
        assert outcome is StintEnd.BUDGET, "the guest is idle"
    raise AssertionError(f"no stop in {stints} stints of {budget} instructions")


def run_to(target: GuestTarget, icount: int) -> None:
    """Run the engine, whatever the debugger wants, to an icount that nothing stops it before."""
    machine = target.machine
    while machine.clock.icount < icount:
        assert machine.engine.run(icount).kind is StopKind.BUDGET


def say(target: GuestTarget, command: str, *, read_only: bool = False) -> str:
    """The output of a monitor command."""
    return "".join(target.monitor(command, read_only=read_only))
