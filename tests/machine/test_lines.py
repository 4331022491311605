"""The CPU's lines: `attention` says whether any of them needs a look."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from machine.lines import CpuLines, ExitKind, ExitRequest


def asks(lines: CpuLines) -> bool:
    """The attribute, read anew."""
    return lines.attention


def test_nothing_is_up_at_first() -> None:
    lines = CpuLines()
    assert not asks(lines)
    assert lines.snapshot() == {"intr": False, "nmi_pending": False, "reset_requested": False}
    assert lines.exit_requested is None
    assert lines.acknowledge() == lines.peek() == 0xFF


def test_attention_goes_with_the_last_of_them() -> None:
    lines = CpuLines()
    lines.set_intr(True)
    lines.raise_nmi()
    lines.request_reset()
    lines.request_exit(ExitRequest(ExitKind.POWER_OFF, 0))
    lines.set_intr(False)
    assert asks(lines)
    lines.take_nmi()
    assert asks(lines)
    lines.take_reset()
    assert asks(lines)
    assert lines.take_exit() == ExitRequest(ExitKind.POWER_OFF, 0)
    assert not asks(lines)
    assert lines.take_exit() is None


def test_each_goes_alone() -> None:
    lines = CpuLines()
    seen = []
    wires: tuple[tuple[Callable[[], object], Callable[[], object]], ...] = (
        (lines.raise_nmi, lines.take_nmi),
        (lines.request_reset, lines.take_reset),
        (lambda: lines.set_intr(True), lambda: lines.set_intr(False)),
        (lambda: lines.request_exit(ExitRequest(ExitKind.POWER_OFF, 0)), lines.take_exit),
    )
    for raise_it, take_it in wires:
        raise_it()
        seen.append(asks(lines))
        take_it()
        seen.append(asks(lines))
    assert seen == [True, False] * 4


@pytest.mark.parametrize("name", ["set_intr", "raise_nmi", "request_reset", "request_exit"])
def test_each_asks_for_attention(name: str) -> None:
    lines = CpuLines()
    arguments = {"set_intr": (True,), "request_exit": (ExitRequest(ExitKind.DEBUG_EXIT, 3),)}
    getattr(lines, name)(*arguments.get(name, ()))
    assert asks(lines)


def test_the_first_exit_counts() -> None:
    lines = CpuLines()
    lines.request_exit(ExitRequest(ExitKind.DEBUG_EXIT, 3))
    lines.request_exit(ExitRequest(ExitKind.POWER_OFF, 0))
    assert lines.exit_requested == ExitRequest(ExitKind.DEBUG_EXIT, 3)


def test_reset_keeps_the_interrupt_controller_connected() -> None:
    lines = CpuLines()
    lines.acknowledge = lambda: 0x20
    lines.raise_nmi()
    lines.reset()
    assert (lines.attention, lines.acknowledge()) == (False, 0x20)


def test_snapshot_round_trip() -> None:
    lines = CpuLines()
    lines.raise_nmi()
    other = CpuLines()
    other.restore(lines.snapshot())
    assert other.snapshot() == lines.snapshot()
    assert asks(other)
    with pytest.raises(ValueError, match="snapshot"):
        other.restore({"intr": 1})
