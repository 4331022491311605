"""A clock that stops at every event, and wires that remember what was driven, for tests of single devices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from machine.clock import Clock
from machine.devices.board import Board, BoardOptions
from machine.lines import CpuLines
from machine.memory import MIB, PhysicalMemory

RAM_BYTES = 2 * MIB


class Wire:
    """An interrupt line that records (nanosecond, level) of every change."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.level = False
        self.changes: list[tuple[int, bool]] = []

    def __call__(self, level: bool) -> None:
        if level != self.level:
            self.level = level
            self.changes.append((self._clock.now_ns, level))

    @property
    def rises(self) -> list[int]:
        """The times at which the level went up."""
        return [at_ns for at_ns, level in self.changes if level]


def advance_to(clock: Clock, at_ns: int) -> None:
    """Let time pass up to `at_ns` at one nanosecond an instruction, and run every event exactly when it is due."""
    while clock.next_deadline_ns is not None and clock.next_deadline_ns <= at_ns:
        clock.icount = max(clock.icount, clock.deadline_icount)
        clock.run_due()
    clock.icount = max(clock.icount, at_ns - clock.idle_ns)


def advance(clock: Clock, ns: int) -> None:
    """Let `ns` pass."""
    advance_to(clock, clock.now_ns + ns)


@contextmanager
def a_board(options: BoardOptions | None = None) -> Iterator[Board]:
    """A board of its own with 2 MiB of RAM, given back at the end."""
    memory = PhysicalMemory(RAM_BYTES)
    try:
        yield Board(Clock(), CpuLines(), memory, options)
    finally:
        memory.close()


def set_up_like_firmware(board: Board) -> None:
    """Vectors 08h and 70h, timer at 18.2 Hz, keyboard translated with its interrupt, the usual lines unmasked."""
    for command, base, icw3, mask in ((0x20, 0x08, 0x04, 0xF8), (0xA0, 0x70, 0x02, 0x8E)):
        board.ports.store(command, 1, 0x11)
        for value in (base, icw3, 0x01, mask):
            board.ports.store(command + 1, 1, value)
    for port, value in ((0x43, 0x34), (0x40, 0x00), (0x40, 0x00), (0x64, 0x60), (0x60, 0x65)):
        board.ports.store(port, 1, value)
