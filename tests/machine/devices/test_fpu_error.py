"""Port F0h and IRQ 13 on the board of a PC."""

from __future__ import annotations

from machine.clock import Clock
from machine.devices.board import Board
from machine.devices.fpu_error import FpuErrorPort
from machine.fpu import FpuErrorLines
from machine.lines import CpuLines
from machine.memory import MIB, PhysicalMemory

_SLAVE_IRR = 1 << (13 - 8)


def _levels(lines: FpuErrorLines) -> tuple[bool, bool]:
    return lines.ferr, lines.ignne


def _pending(board: Board) -> bool:
    board.ports.store(0xA0, 1, 0x0A)  # OCW3: read IRR
    return bool(board.ports.load(0xA0, 1) & _SLAVE_IRR)


def test_an_error_raises_irq_13_until_it_is_acknowledged() -> None:
    memory = PhysicalMemory(1 * MIB)
    board = Board(Clock(), CpuLines(), memory)
    board.power_on()
    lines = board.fpu_error.lines
    for port, value in (
        (0x20, 0x11),
        (0x21, 8),
        (0x21, 4),
        (0x21, 1),
        (0xA0, 0x11),
        (0xA1, 0x70),
        (0xA1, 2),
        (0xA1, 1),
    ):
        board.ports.store(port, 1, value)
    assert not _pending(board)
    lines.report()
    lines.report()
    assert _pending(board)
    assert board.devices["fpu_error"].describe() == "fpu error: FERR# up, IGNNE# down"
    board.ports.store(0xF1, 1, 0)
    assert _levels(lines) == (True, False)
    board.ports.store(0xF0, 1, 0)
    assert _levels(lines) == (True, True)
    assert not _pending(board)
    board.ports.store(0xF0, 1, 0)
    assert _levels(lines) == (True, True)
    assert board.ports.load(0xF0, 1) == 0xFF
    board.reset()
    assert _levels(lines) == (False, False)
    board.ports.store(0xF0, 1, 0)
    assert _levels(lines) == (False, False), "without an error there is nothing to ignore"
    memory.close()


def test_the_latch_survives_a_snapshot() -> None:
    levels: list[bool] = []
    first, second = FpuErrorPort(levels.append), FpuErrorPort(levels.append)
    first.lines.report()
    second.restore(first.snapshot())
    assert (second.lines.ferr, second.lines.ignne, second.irq) == (True, False, True)
    assert first.snapshot() == {"ferr": True, "ignne": False, "irq": True}
    assert levels == [True]
