"""The clock chip: time from virtual time, its interrupts at the exact nanosecond, the CMOS memory."""

from __future__ import annotations

import datetime as dt
from fractions import Fraction
from math import ceil

import pytest

from machine.clock import NEVER_ICOUNT, Clock
from machine.devices.rtc import Rtc
from tests.machine.devices.rig import Wire, advance, advance_to

SECOND = 1_000_000_000
TIME = (0x00, 0x02, 0x04, 0x06, 0x07, 0x08, 0x09, 0x32)
A, B, C, D = 0x0A, 0x0B, 0x0C, 0x0D
SET, PIE, AIE, UIE, SQWE, BINARY, HOURS24 = 0x80, 0x40, 0x20, 0x10, 0x08, 0x04, 0x02


class Chip:
    def __init__(self, start: dt.datetime | None = None, contents: dict[int, int] | None = None) -> None:
        self.clock = Clock()
        self.wire = Wire(self.clock)
        arguments = () if start is None else (start,)
        self.rtc = Rtc(self.clock, self.wire, contents or {}, *arguments)

    def read(self, index: int) -> int:
        self.rtc.store_port(0x70, 1, index)
        return self.rtc.load_port(0x71, 1)

    def write(self, index: int, value: int) -> None:
        self.rtc.store_port(0x70, 1, index)
        self.rtc.store_port(0x71, 1, value)

    def time(self) -> bytes:
        """Seconds, minutes, hours, weekday, day, month, year, century as they stand in the registers."""
        return bytes(self.read(index) for index in TIME)


def at(text: str) -> dt.datetime:
    return dt.datetime.fromisoformat(text + "+00:00")


def test_the_documented_start_date() -> None:
    assert Chip().time() == bytes.fromhex("00 00 12 07 21 10 06 20")


@pytest.mark.parametrize(
    ("start", "seconds", "registers"),
    [
        ("2006-10-21 12:00:00", 59, "59 00 12 07 21 10 06 20"),
        ("2006-10-21 23:59:59", 1, "00 00 00 01 22 10 06 20"),
        ("1999-12-31 23:59:58", 2, "00 00 00 07 01 01 00 20"),
        ("2008-02-28 23:59:59", 1, "00 00 00 06 29 02 08 20"),
        ("2006-10-21 12:00:00", 86_400 * 365, "00 00 12 01 21 10 07 20"),
    ],
)
def test_time_goes_on(start: str, seconds: int, registers: str) -> None:
    chip = Chip(at(start))
    advance(chip.clock, seconds * SECOND - 1)
    before = chip.time()
    advance(chip.clock, 1)
    assert before != chip.time() == bytes.fromhex(registers)


@pytest.mark.parametrize(
    ("control", "registers"),
    [
        (0x00, "56 34 81 03 05 06 07 20"),
        (HOURS24, "56 34 13 03 05 06 07 20"),
        (BINARY, "38 22 81 03 05 06 07 14"),
        (BINARY | HOURS24, "38 22 0d 03 05 06 07 14"),
    ],
)
def test_formats(control: int, registers: str) -> None:
    chip = Chip(at("2007-06-05 13:34:56"))
    chip.write(B, control)
    assert chip.time() == bytes.fromhex(registers)


def test_set_stops_the_registers_and_they_can_be_written() -> None:
    chip = Chip()
    chip.write(B, SET | HOURS24)
    for index, value in zip(TIME, bytes.fromhex("59 59 23 04 31 12 99 19"), strict=True):
        chip.write(index, value)
    advance(chip.clock, 10 * SECOND)
    assert chip.time() == bytes.fromhex("59 59 23 04 31 12 99 19")
    chip.write(B, HOURS24)
    advance(chip.clock, SECOND)
    assert chip.time() == bytes.fromhex("00 00 00 05 01 01 00 20")


def test_set_shows_what_stood_in_the_registers() -> None:
    chip = Chip()
    advance(chip.clock, 5 * SECOND)
    chip.write(B, SET | HOURS24)
    advance(chip.clock, 5 * SECOND)
    assert chip.time() == bytes.fromhex("05 00 12 07 21 10 06 20")


def test_time_registers_can_be_written_while_they_run() -> None:
    chip = Chip()
    chip.write(0x04, 0x23)
    chip.write(0x06, 0x02)
    chip.write(0x32, 0x19)
    advance(chip.clock, 3600 * SECOND)
    assert chip.time() == bytes.fromhex("00 00 00 03 22 10 06 19")


def test_a_date_that_does_not_exist_is_carried_over() -> None:
    chip = Chip()
    chip.write(B, SET | HOURS24)
    for index, value in zip(TIME, bytes.fromhex("61 99 99 00 31 02 07 20"), strict=True):
        chip.write(index, value)
    chip.write(B, HOURS24)
    assert chip.time()[4:] == bytes.fromhex("07 03 07 20")


def test_update_in_progress_before_each_second() -> None:
    chip = Chip()
    seen = []
    for at_ns in (0, SECOND - 2_228_001, SECOND - 2_228_000, SECOND - 1, SECOND):
        advance_to(chip.clock, at_ns)
        seen.append(chip.read(A))
    assert seen == [0x26, 0x26, 0xA6, 0xA6, 0x26]
    chip.write(B, SET)
    advance_to(chip.clock, 2 * SECOND - 1)
    assert chip.read(A) == 0x26, "not while updates are stopped"


def test_the_first_update_comes_half_a_second_after_the_divider_starts() -> None:
    chip = Chip()
    advance(chip.clock, SECOND // 4)
    chip.write(A, 0x76)
    advance(chip.clock, 5 * SECOND)
    assert chip.time()[0] == 0
    start = chip.clock.now_ns
    chip.write(A, 0x26)
    advance_to(chip.clock, start + SECOND // 2 - 1)
    seconds = [chip.time()[0]]
    advance(chip.clock, 1)
    seconds.append(chip.time()[0])
    assert seconds == [0, 1]


# Data sheet, table 5, for the 32.768 kHz time base.
PERIODS_US = {
    1: "3906.25", 2: "7812.5", 3: "122.0703125", 4: "244.140625", 5: "488.28125", 6: "976.5625", 7: "1953.125",
    8: "3906.25", 9: "7812.5", 10: "15625", 11: "31250", 12: "62500", 13: "125000", 14: "250000", 15: "500000",
}  # fmt: skip


@pytest.mark.parametrize("rate", PERIODS_US)
def test_periodic_interrupt(rate: int) -> None:
    chip = Chip()
    advance(chip.clock, 10_000)
    chip.write(A, 0x20 | rate)
    chip.write(B, PIE | HOURS24)
    period_ns = Fraction(PERIODS_US[rate]) * 1000
    for n in range(1, 5):
        advance_to(chip.clock, ceil(n * period_ns))
        assert chip.read(C) & ~0x10 == 0xC0, "the update flag comes with every second"
        assert chip.read(C) == 0
    assert chip.wire.rises == [ceil(n * period_ns) for n in range(1, 5)]


def test_periods_count_from_the_start_of_the_divider() -> None:
    chip = Chip()
    advance(chip.clock, 123_457)
    chip.write(A, 0x76)
    advance(chip.clock, 1_000_003)
    chip.write(A, 0x2F)
    chip.write(B, PIE | HOURS24)
    start = chip.clock.now_ns - SECOND // 2
    for n in (2, 3):
        advance_to(chip.clock, start + n * SECOND // 2)
        assert chip.read(C) & 0xC0 == 0xC0
    assert chip.wire.rises == [start + SECOND, start + 3 * SECOND // 2]


def test_nothing_is_scheduled_that_nobody_asked_for() -> None:
    chip = Chip()
    for index, value in ((1, 5), (3, 0), (5, 0x12)):
        chip.write(index, value)
    deadlines = [chip.clock.deadline_icount]
    chip.write(B, UIE | PIE | AIE | HOURS24)
    deadlines.append(chip.clock.deadline_icount)
    chip.write(B, HOURS24)
    deadlines.append(chip.clock.deadline_icount)
    chip.write(B, SET | UIE | AIE | HOURS24)
    deadlines.append(chip.clock.deadline_icount)
    chip.write(B, AIE | HOURS24)
    deadlines.append(chip.clock.deadline_icount)
    chip.rtc.reset()
    deadlines.append(chip.clock.deadline_icount)
    assert deadlines == [NEVER_ICOUNT, 976_563, NEVER_ICOUNT, NEVER_ICOUNT, 5 * SECOND, NEVER_ICOUNT]


def test_daylight_saving_and_square_wave_change_nothing() -> None:
    chip = Chip(at("2007-06-05 23:34:56"))
    chip.write(B, HOURS24 | SQWE | 1)
    assert (chip.time(), chip.read(B)) == (bytes.fromhex("56 34 23 03 05 06 07 20"), HOURS24 | SQWE | 1)


def test_rate_0_has_no_periodic_interrupt() -> None:
    chip = Chip()
    chip.write(A, 0x20)
    chip.write(B, PIE | HOURS24)
    advance(chip.clock, 3 * SECOND)
    assert (chip.wire.changes, chip.read(C)) == ([], 0x10)


def test_update_ended_interrupt() -> None:
    chip = Chip()
    chip.write(B, UIE | HOURS24)
    advance(chip.clock, SECOND + 5)
    assert chip.wire.changes == [(SECOND, True)]
    assert chip.clock.deadline_icount == NEVER_ICOUNT, "nothing more until C is read"
    assert chip.read(C) == 0xD0
    advance(chip.clock, SECOND)
    assert chip.wire.rises == [SECOND, 2 * SECOND]


@pytest.mark.parametrize(
    ("alarm", "first", "second"),
    [
        ("05 00 12", 5, 86_405),
        ("00 ff ff", 60, 120),
        ("c0 01 ff", 60, 61),
        ("30 59 11", 86_370, 2 * 86_400 - 30),
        ("00 00 12", 86_400, 2 * 86_400),
    ],
)
def test_alarm_interrupt(alarm: str, first: int, second: int) -> None:
    chip = Chip()
    for index, value in zip((1, 3, 5), bytes.fromhex(alarm), strict=True):
        chip.write(index, value)
    chip.write(B, AIE | HOURS24)
    advance_to(chip.clock, first * SECOND + 1)
    assert chip.read(C) & 0xA0 == 0xA0
    advance_to(chip.clock, second * SECOND)
    assert chip.wire.rises == [first * SECOND, second * SECOND]


def test_flags_are_set_without_being_enabled() -> None:
    chip = Chip()
    for index, value in ((1, 1), (3, 0), (5, 0x12)):
        chip.write(index, value)
    advance(chip.clock, SECOND)
    assert (chip.read(C), chip.read(C), chip.wire.changes) == (0x70, 0, [])


def test_enabling_a_flag_that_is_up_interrupts_at_once() -> None:
    chip = Chip()
    advance(chip.clock, 2 * SECOND)
    chip.write(B, UIE | HOURS24)
    assert chip.wire.rises == [2 * SECOND]
    chip.write(B, HOURS24)
    assert not chip.wire.level


def test_set_clears_the_update_interrupt_enable() -> None:
    chip = Chip()
    chip.write(B, SET | UIE | HOURS24)
    assert chip.read(B) == SET | HOURS24


def test_registers_that_cannot_be_written() -> None:
    chip = Chip()
    for index in (C, D):
        chip.write(index, 0xFF)
    assert (chip.read(C), chip.read(D), chip.rtc.load_port(0x70, 1)) == (0, 0x80, 0xFF)
    chip.write(A, 0xFF)
    assert chip.read(A) == 0x7F


def test_memory_and_nmi_mask() -> None:
    chip = Chip(contents={0x10: 0x40, 0x7F: 0x12})
    assert (chip.read(0x10), chip.read(0x7F)) == (0x40, 0x12)
    chip.write(0x8F, 0x5A)
    assert chip.rtc.nmi_masked
    assert chip.read(0x0F) == 0x5A
    assert not chip.rtc.nmi_masked


def test_reset_keeps_time_and_memory_and_power_on_does_not() -> None:
    chip = Chip(contents={0x10: 0x40})
    chip.write(0x10, 1)
    chip.write(B, PIE | AIE | UIE | SQWE | BINARY)
    advance(chip.clock, SECOND)
    chip.rtc.reset()
    assert (chip.wire.level, chip.read(B), chip.read(0x10), chip.read(0)) == (False, BINARY, 1, 1)
    chip.clock.reset()
    chip.rtc.power_on()
    assert (chip.read(B), chip.read(0x10), chip.read(0)) == (HOURS24, 0x40, 0)


def test_a_battery_survives_a_reset_of_virtual_time() -> None:
    chip = Chip()
    advance(chip.clock, 10 * SECOND + SECOND // 2)
    chip.read(0)
    chip.clock.reset()
    chip.rtc.reset()
    seconds = [chip.read(0)]
    advance(chip.clock, SECOND // 2)
    seconds.append(chip.read(0))
    assert seconds == [0x10, 0x11]


def test_describe() -> None:
    chip = Chip()
    advance(chip.clock, SECOND)
    assert chip.rtc.describe() == "rtc: 2006-10-21 12:00:01 a=26 b=02 c=50 runs"
