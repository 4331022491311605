"""Timers that can be moved, and snapshots of devices made of every kind of value."""

from __future__ import annotations

from typing import ClassVar

import pytest

from machine.clock import NEVER_ICOUNT, Clock
from machine.devices.device import Device, Timer
from tests.machine.devices.rig import advance_to


class Inner(Device):
    _saved: ClassVar[tuple[str, ...]] = ("level",)

    def __init__(self) -> None:
        self.level = False


class Outer(Device):
    _saved: ClassVar[tuple[str, ...]] = ("count", "name", "memory", "words", "inner", "timer")

    def __init__(self, clock: Clock) -> None:
        self.count = 1
        self.name = "x"
        self.memory = bytearray(b"abc")
        self.words = [1, 2]
        self.inner = Inner()
        self.rings: list[int] = []
        self.timer = Timer(clock, lambda: self.rings.append(clock.now_ns))


def test_a_timer_rings_once_at_the_last_time_it_was_set_to() -> None:
    clock = Clock()
    device = Outer(clock)
    for at_ns in (10, 30, 20):
        device.timer.arm(at_ns)
    assert (device.timer.armed, clock.deadline_icount) == (True, 20)
    advance_to(clock, 100)
    assert (device.rings, device.timer.armed) == ([20], False)
    device.timer.arm(200)
    device.timer.disarm()
    device.timer.disarm()
    advance_to(clock, 300)
    assert (device.rings, clock.deadline_icount) == ([20], NEVER_ICOUNT)


def test_arming_for_the_same_time_keeps_the_place_in_the_queue() -> None:
    clock = Clock()
    device = Outer(clock)
    device.timer.arm(10)
    clock.schedule(10, lambda: device.rings.append(-1))
    device.timer.arm(10)
    advance_to(clock, 10)
    assert device.rings == [10, -1]


def test_a_snapshot_shares_nothing_and_restores_in_place() -> None:
    clock = Clock()
    device = Outer(clock)
    memory, words = device.memory, device.words
    device.timer.arm(50)
    state = device.snapshot()
    assert state == {
        "count": 1, "name": "x", "memory": b"abc", "words": [1, 2], "inner": {"level": False}, "timer": [50, 0],
    }  # fmt: skip
    device.memory[0] = 0
    device.words.append(3)
    device.inner.level = True
    device.count = 7
    device.timer.arm(70)
    device.restore(state)
    assert device.snapshot() == state
    assert device.memory is memory
    assert device.words is words
    advance_to(clock, 100)
    assert device.rings == [50]
    idle = device.snapshot()
    device.timer.arm(200)
    device.restore(idle)
    assert not device.timer.armed


@pytest.mark.parametrize(
    ("name", "value"),
    [("count", "1"), ("count", True), ("memory", [1]), ("words", b"ab"), ("inner", 1), ("timer", 5), ("name", b"x")],
)
def test_a_value_of_another_kind_is_refused(name: str, value: object) -> None:
    device = Outer(Clock())
    with pytest.raises(ValueError, match=f"Outer.{name} cannot be taken"):
        device.restore(device.snapshot() | {name: value})


def test_missing_and_unknown_fields_are_refused() -> None:
    device = Outer(Clock())
    state = device.snapshot()
    for broken in ({**state, "more": 1}, {name: state[name] for name in state if name != "count"}):
        with pytest.raises(ValueError, match="a snapshot of Outer holds"):
            device.restore(broken)


def test_what_has_no_state_has_an_empty_snapshot() -> None:
    device = Device()
    device.power_on()
    device.restore(device.snapshot())
    assert (device.snapshot(), device.describe()) == ({}, "Device")
