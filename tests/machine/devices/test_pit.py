"""The timer on its ports, and IRQ 0 at the exact nanosecond."""

from __future__ import annotations

from fractions import Fraction
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from machine.clock import NEVER_ICOUNT, Clock
from machine.devices.pit import PIT_HZ, Pit, ns_of, tick_at
from tests.machine.devices.rig import Wire, advance, advance_to


class Timer:
    def __init__(self) -> None:
        self.clock = Clock()
        self.wire = Wire(self.clock)
        self.pit = Pit(self.clock, self.wire)

    def program(self, channel: int, control: int, count: int) -> None:
        self.pit.store_port(0x43, 1, channel << 6 | control)
        self.pit.store_port(0x40 + channel, 1, count & 0xFF)
        self.pit.store_port(0x40 + channel, 1, count >> 8)


def exact_ns(tick: int) -> int:
    return ceil(Fraction(tick * 1_000_000_000, PIT_HZ))


@given(st.integers(0, 10**18))
def test_ticks_and_nanoseconds_agree(tick: int) -> None:
    assert ns_of(tick) == exact_ns(tick)
    assert tick_at(ns_of(tick)) == tick
    assert tick == 0 or tick_at(ns_of(tick) - 1) == tick - 1


@pytest.mark.parametrize("control", [0x34, 0x36])
@pytest.mark.parametrize("count", [2, 3, 1193, 11932, 0xFFFF, 0])
def test_periodic_interrupts_come_at_the_exact_nanosecond(control: int, count: int) -> None:
    timer = Timer()
    advance(timer.clock, 12_345)
    timer.program(0, control, count)
    load = tick_at(12_345) + 1
    period = count or 65_536
    advance_to(timer.clock, exact_ns(load + 5 * period))
    # OUT is high from the control word on; the first edge to low is not an interrupt.
    assert timer.wire.rises[1:] == [exact_ns(load + n * period) for n in range(1, 6)]
    falls = [at_ns for at_ns, level in timer.wire.changes if not level]
    low = 1 if control == 0x34 else period // 2
    assert falls == [exact_ns(load + n * period - low) for n in range(1, 6)]


def test_mode_0_interrupts_once() -> None:
    timer = Timer()
    timer.program(0, 0x30, 1000)
    advance(timer.clock, 10_000_000)
    assert timer.wire.changes == [(exact_ns(1001), True)]
    assert timer.clock.deadline_icount == NEVER_ICOUNT


def test_a_new_count_takes_effect_at_the_end_of_the_period() -> None:
    timer = Timer()
    timer.program(0, 0x34, 100)
    advance_to(timer.clock, exact_ns(51))
    timer.pit.store_port(0x40, 1, 30)
    timer.pit.store_port(0x40, 1, 0)
    advance_to(timer.clock, exact_ns(200))
    assert timer.wire.rises[1:] == [exact_ns(tick) for tick in (101, 131, 161, 191)]


def test_latched_count_at_an_exact_time() -> None:
    timer = Timer()
    timer.program(0, 0x34, 0xFFFF)
    advance_to(timer.clock, exact_ns(1001))
    timer.pit.store_port(0x43, 1, 0x00)
    advance(timer.clock, 50_000)
    low, high = timer.pit.load_port(0x40, 1), timer.pit.load_port(0x40, 1)
    assert low | high << 8 == 0xFFFF - 1000


def test_read_back_latches_several_channels() -> None:
    timer = Timer()
    for channel in range(3):
        timer.program(channel, 0x30, 0x1000 * (channel + 1))
    advance_to(timer.clock, exact_ns(1))
    timer.pit.store_port(0x43, 1, 0xC0 | 0x0C)
    advance(timer.clock, 1_000_000)
    assert [timer.pit.load_port(0x41, 1) for _ in range(3)] == [0x30, 0x00, 0x20]
    # Channel 2 has no gate: it has loaded and waits.
    assert [timer.pit.load_port(0x42, 1) for _ in range(3)] == [0x30, 0x00, 0x30]
    timer.pit.store_port(0x43, 1, 0xC0 | 0x20 | 0x02)
    assert timer.pit.load_port(0x40, 1) & 0x7F == 0x30
    assert timer.pit.load_port(0x43, 1) == 0


def test_channel_2_follows_its_gate() -> None:
    timer = Timer()
    timer.program(2, 0x30, 100)
    advance(timer.clock, 1_000_000)
    levels = [timer.pit.output2]
    timer.pit.set_gate2(True)
    start = tick_at(timer.clock.now_ns)
    advance_to(timer.clock, exact_ns(start + 100) - 1)
    levels.append(timer.pit.output2)
    advance(timer.clock, 1)
    levels.append(timer.pit.output2)
    assert levels == [False, False, True]
    assert timer.wire.changes == [], "channel 2 drives no interrupt"


def test_refresh_toggles_every_15_microseconds() -> None:
    timer = Timer()
    levels = []
    for tick in range(0, 18 * 6, 9):
        advance_to(timer.clock, exact_ns(tick))
        levels.append(timer.pit.refresh)
    assert levels == [False, False, True, True] * 3


def test_reset_stops_the_interrupts() -> None:
    timer = Timer()
    timer.program(0, 0x36, 100)
    assert timer.wire.level
    timer.pit.reset()
    assert (timer.wire.level, timer.clock.deadline_icount) == (False, NEVER_ICOUNT)


def test_describe_shows_every_channel() -> None:
    timer = Timer()
    timer.program(0, 0x34, 1193)
    assert timer.pit.describe().splitlines()[0] == (
        "pit0: mode=2 bcd=0 access=3 count=1193 gate=1 running=1 value=0 out=1"
    )


@pytest.mark.parametrize("control", [0x30, 0x32, 0x34, 0x36, 0x38, 0x3A])
@pytest.mark.parametrize("count", [2, 25, 40])
def test_what_port_61h_sees_is_steady_until_then(control: int, count: int) -> None:
    timer = Timer()
    advance(timer.clock, 777)
    timer.pit.set_gate2(True)
    timer.program(2, control, count)

    def seen() -> tuple[bool, bool]:
        return timer.pit.output2, timer.pit.refresh

    changes = 0
    while timer.clock.now_ns < 150_000:
        steady_ns, before = timer.pit.steady_until_ns(), seen()
        assert steady_ns > timer.clock.now_ns
        while timer.clock.now_ns < steady_ns - 1:
            advance_to(timer.clock, min(timer.clock.now_ns + 97, steady_ns - 1))
            assert seen() == before
        advance_to(timer.clock, steady_ns)
        changes += seen() != before
    assert changes >= 9
