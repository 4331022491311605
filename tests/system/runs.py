"""Runs a machine without a server, to given icounts, and says what it printed when and what state it is in.

It knows nothing of guests; how a run is cut into pieces is the caller's choice and must make no difference.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from mmap import mmap
from os import PathLike

from machine.cpuid import P6_NO_FPU, CpuModel
from machine.debug import Stop, StopKind
from machine.devices.board import BoardOptions
from machine.lines import ExitRequest
from machine.loaders.image import LoadOptions
from machine.pc import Machine, MachineOptions
from tests import engine as engines
from vmm.native.hostfpu import HostFpu

MIB = 1 << 20

#: Stops after which a run goes on by itself: `Machine.reset` is what the outside owes a RESET.
_PASSING = frozenset({StopKind.BUDGET, StopKind.STEP, StopKind.BREAKPOINT, StopKind.WATCHPOINT})


class UnexpectedStopError(AssertionError):
    """The guest stopped for a reason that the test did not ask for."""


class Run:
    """One machine.

    Attributes:
        machine: the machine.
        printed: what went to COM1, byte by byte, with the icount.
        ended: how the guest ended the run; None while it has not.
        stops: how often each kind of stop was passed over.
    """

    def __init__(self, machine: Machine, printed: list[tuple[int, int]]) -> None:
        self.machine = machine
        self.printed = printed
        self.ended: ExitRequest | None = None
        self.stops: dict[StopKind, int] = {}

    @property
    def icount(self) -> int:
        """Instructions retired since power-on."""
        return self.machine.clock.icount

    @property
    def text(self) -> str:
        """All that went to COM1."""
        return bytes(byte for _, byte in self.printed).decode("latin-1")

    @property
    def screen(self) -> str:
        """What the display shows, without the blanks at the ends of its rows."""
        return "\n".join(row.rstrip() for row in self.machine.board.vga.screen())

    def lines(self) -> list[tuple[int, str]]:
        """The complete lines that went to COM1: the icount of the line feed, and the text without CR."""
        lines, text = [], b""
        for icount, byte in self.printed:
            if byte == 0x0A:
                lines.append((icount, text.replace(b"\r", b"").decode("latin-1")))
                text = b""
            else:
                text += bytes((byte,))
        return lines

    def run_to(self, icount: int, pieces: Callable[[], int] = lambda: MIB) -> None:
        """Run until `icount`, in budgets of what `pieces` says, past breakpoints and watchpoints.

        The run may end before, which `ended` then says.

        Raises:
            UnexpectedStopError: a triple fault, a catch, or HLT for ever.
        """
        at_breakpoint = False
        while self.icount < icount and self.ended is None:
            stop = self.machine.engine.run(min(icount, self.icount + pieces()), skip_breakpoint=at_breakpoint)
            at_breakpoint = stop.kind is StopKind.BREAKPOINT
            self._note(stop)

    def step_to(self, icount: int) -> None:
        """The same, one instruction at a time."""
        while self.icount < icount and self.ended is None:
            self.step()

    def step(self) -> None:
        """One instruction, or one iteration of a REP."""
        self._note(self.machine.engine.step())

    def run_until(self, seen: Callable[[], bool], limit_icount: int, every_insns: int = 10_000) -> int:
        """Run until `seen` says so, asked every so many instructions, and return the icount.

        Raises:
            UnexpectedStopError: it was not seen by `limit_icount`, or the guest stopped.
        """
        while not seen():
            if self.icount >= limit_icount or self.ended:
                message = f"not seen after {self.icount} instructions:\n{self.screen}\n{self.text}"
                raise UnexpectedStopError(message)
            self.run_to(self.icount + every_insns)
        return self.icount

    def _note(self, stop: Stop) -> None:
        self.stops[stop.kind] = self.stops.get(stop.kind, 0) + 1
        if stop.kind is StopKind.RESET:
            self.machine.reset()
        elif stop.kind is StopKind.EXIT:
            self.ended = stop.exit_request
        elif stop.kind not in _PASSING:
            message = f"{stop} after {self.icount} instructions"
            raise UnexpectedStopError(message)

    def state(self) -> dict[str, object]:
        """All that makes the guest's future: counters, registers, lines, and digests of devices and RAM."""
        machine = self.machine
        return {
            "icount": machine.clock.icount,
            "idle_ns": machine.clock.idle_ns,
            "registers": machine.cpu.state.pack(),
            "lines": machine.lines.snapshot(),
            "devices": {name: _digest(repr(state).encode()) for name, state in machine.board.snapshot().items()},
            "ram": _digest(machine.memory.ram),
            "printed": _digest(repr(self.printed).encode()),
            "ended": self.ended,
        }


def _digest(data: bytes | mmap) -> str:
    return hashlib.sha256(data).hexdigest()


@contextmanager
def booted(
    image: str | PathLike[str] | bytes,
    *,
    append: str = "",
    ram_bytes: int = 64 * MIB,
    ns_per_insn: int = 1,
    kernel: bool = False,
    engine: str | None = None,
    model: CpuModel = P6_NO_FPU,
) -> Iterator[Run]:
    """Build a machine, stopped before its first instruction, and give it back at the end.

    `engine` names another engine than the chosen one, `model` the CPU.
    """
    printed: list[tuple[int, int]] = []

    def print_bytes(data: bytes) -> None:
        printed.extend((machine.clock.icount, byte) for byte in data)

    machine = Machine(
        MachineOptions(
            image=image,
            model=model,
            make_fpu=HostFpu,
            loading=LoadOptions(ram_bytes=ram_bytes, command_line=append, kernel=kernel),
            board=BoardOptions(serial=(print_bytes, None)),
            ns_per_insn=ns_per_insn,
        ),
        engines.factories(),
        engine or engines.chosen(),
    )
    try:
        yield Run(machine, printed)
    finally:
        machine.close()
