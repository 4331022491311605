"""The MC146818 clock with its 128 bytes of CMOS memory: ports 70h and 71h, IRQ 8, the NMI mask.

It must not know the date of the host, nor what the firmware keeps in the CMOS (`cmos` writes that).
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from typing import ClassVar

from machine.clock import Clock
from machine.devices import calendar
from machine.devices.calendar import SECONDS_PER_DAY, Format
from machine.devices.device import Device, Line, Timer

INDEX_PORT = 0x70
DATA_PORT = 0x71
CMOS_BYTES = 128
CENTURY = 0x32

START_DATE = dt.datetime(2006, 10, 21, 12, 0, 0, tzinfo=dt.UTC)
"""What the clock shows at virtual time 0 unless an option says otherwise; Saturday noon."""

_NS_PER_S = 1_000_000_000
_NMI_MASK = 0x80

_SECONDS, _SECONDS_ALARM, _MINUTES, _MINUTES_ALARM, _HOURS, _HOURS_ALARM, _WEEKDAY, _DAY, _MONTH, _YEAR = range(10)
_REGISTER_A, _REGISTER_B, _REGISTER_C, _REGISTER_D = range(10, 14)
_TIME_REGISTERS = (_SECONDS, _MINUTES, _HOURS, _WEEKDAY, _DAY, _MONTH, _YEAR, CENTURY)

_A_UPDATE_IN_PROGRESS = 0x80
_A_DIVIDER_RUNS_BELOW = 0x30
_A_DIVIDER = 0x70
_A_RATE = 0x0F

_B_SET = 0x80
_B_PERIODIC = 0x40
_B_ALARM = 0x20
_B_UPDATE = 0x10
_B_SQUARE_WAVE = 0x08
_B_BINARY = 0x04
_B_24_HOURS = 0x02
_INTERRUPTS = _B_PERIODIC | _B_ALARM | _B_UPDATE

_C_REQUEST = 0x80
_D_VALID_RAM_AND_TIME = 0x80

# UIP rises 244 us before the update cycle, which takes 1984 us with a 32.768 kHz crystal.
_UPDATE_NS = 2_228_000
_CRYSTAL_HZ = 32_768
# The first update comes half a second after the divider is let run.
_FIRST_UPDATE_NS = _NS_PER_S // 2


class Rtc(Device):
    """The clock counts virtual seconds from a start date; it has events only while an interrupt is enabled.

    While updates are stopped (SET, or the divider held) the time registers are memory, as in the chip; when they start
    again the values count, an impossible date carried over into a possible one. RESET clears the interrupt enables and
    flags only: time and memory have a battery.

    Source: Motorola MC146818 data sheet; register 32h (century) as PC firmware has it.
    """

    _saved: ClassVar[tuple[str, ...]] = (
        "memory", "index", "nmi_masked", "control_a", "control_b", "flags", "seconds", "second_ns", "seen_ns",
        "weekday_shift", "irq_level", "timer",
    )  # fmt: skip

    def __init__(
        self, clock: Clock, irq: Line, contents: Mapping[int, int], start_date: dt.datetime = START_DATE
    ) -> None:
        """`contents` are the CMOS bytes at power-on by index, 14 to 127; `start_date` is what the clock shows then."""
        self._clock = clock
        self._irq = irq
        self._contents = dict(contents)
        self._start_date = start_date
        self.timer = Timer(clock, self._follow)
        self.memory = bytearray(CMOS_BYTES)
        self.irq_level = False
        self.power_on()

    def power_on(self) -> None:
        """The start date, the first contents of the memory, 24 hours in BCD."""
        self.memory[:] = bytes(CMOS_BYTES)
        for index, value in self._contents.items():
            self.memory[index] = value
        self.index = _REGISTER_D
        self.control_a = 0x26
        self.control_b = _B_24_HOURS
        start = self._start_date
        days = calendar.day_number(start.year, start.month, start.day)
        self.seconds = days * SECONDS_PER_DAY + start.hour * 3600 + start.minute * 60 + start.second
        self.weekday_shift = 0
        self.second_ns = self.seen_ns = self._clock.now_ns
        self.reset()

    def reset(self) -> None:
        """The RESET pin: no interrupt is enabled or pending; time and memory stay."""
        self.nmi_masked = False
        self.flags = 0
        self.control_b &= ~(_INTERRUPTS | _B_SQUARE_WAVE)
        self.timer.disarm()
        self.irq_level = False
        self._irq(False)

    @property
    def _format(self) -> Format:
        return Format(binary=bool(self.control_b & _B_BINARY), hours24=bool(self.control_b & _B_24_HOURS))

    @property
    def _divider_runs(self) -> bool:
        return self.control_a & _A_DIVIDER < _A_DIVIDER_RUNS_BELOW

    @property
    def _updates(self) -> bool:
        return self._divider_runs and not self.control_b & _B_SET

    @property
    def _period(self) -> int:
        """Cycles of the crystal from one periodic interrupt to the next; 0: there are none."""
        rate = self.control_a & _A_RATE
        if not rate or not self._divider_runs:
            return 0
        return 1 << (rate + 7 if rate <= 2 else rate) - 1

    def _periods(self, now_ns: int) -> int:
        return (now_ns - self.second_ns) * _CRYSTAL_HZ // (self._period * _NS_PER_S)

    def _next_alarm(self) -> int | None:
        form, memory = self._format, self.memory
        return calendar.next_match(
            self.seconds,
            form.alarm_hours(memory[_HOURS_ALARM]),
            form.alarm(memory[_MINUTES_ALARM], 60),
            form.alarm(memory[_SECONDS_ALARM], 60),
        )

    def _settle(self) -> None:
        """Account for the time since the last look: count the seconds and set the flags."""
        now_ns = self._clock.now_ns
        if now_ns < self.seen_ns:
            # The machine's clock was set back; this one has a battery and just goes on.
            self.second_ns -= self.seen_ns - now_ns
            self.seen_ns = now_ns
        if self._period and self._periods(now_ns) != self._periods(self.seen_ns):
            self.flags |= _B_PERIODIC
        self.seen_ns = now_ns
        passed = (now_ns - self.second_ns) // _NS_PER_S
        if not passed:
            return
        self.second_ns += passed * _NS_PER_S
        if self._updates:
            alarm = self._next_alarm()
            self.seconds += passed
            self.flags |= _B_UPDATE
            if alarm is not None and alarm <= self.seconds:
                self.flags |= _B_ALARM

    def _follow(self) -> None:
        """Drive IRQ 8 from flags and enables, and come back when that can change."""
        self._settle()
        level = bool(self.flags & self.control_b & _INTERRUPTS)
        if level != self.irq_level:
            self.irq_level = level
            self._irq(level)
        due = [] if level else self._due_ns()
        if due:
            self.timer.arm(min(due))
        else:
            self.timer.disarm()

    def _due_ns(self) -> list[int]:
        due = []
        if self.control_b & _B_PERIODIC and self._period:
            cycles = (self._periods(self.seen_ns) + 1) * self._period
            due.append(self.second_ns - (-cycles * _NS_PER_S // _CRYSTAL_HZ))
        if self._updates and self.control_b & _B_UPDATE:
            due.append(self.second_ns + _NS_PER_S)
        if self._updates and self.control_b & _B_ALARM:
            alarm = self._next_alarm()
            if alarm is not None:
                due.append(self.second_ns + (alarm - self.seconds) * _NS_PER_S)
        return due

    def _time_register(self, index: int) -> int:
        """What the running clock has in a time register."""
        form = self._format
        days, second = divmod(self.seconds, SECONDS_PER_DAY)
        if index == _SECONDS:
            return form.encode(second % 60)
        if index == _MINUTES:
            return form.encode(second // 60 % 60)
        if index == _HOURS:
            return form.encode_hour(second // 3600)
        if index == _WEEKDAY:
            return (days + self.weekday_shift) % 7 + 1
        year, month, day = calendar.calendar_day(days)
        fields = {_DAY: day, _MONTH: month, _YEAR: year % 100, CENTURY: year // 100 % 100}
        return form.encode(fields[index])

    def _store_time(self) -> None:
        """Put the time into memory, where it stays while updates are stopped."""
        for index in _TIME_REGISTERS:
            self.memory[index] = self._time_register(index)

    def _take_time(self) -> None:
        """Let the clock go on from the time registers in memory."""
        form, memory = self._format, self.memory
        year = form.decode(memory[CENTURY]) * 100 + form.decode(memory[_YEAR])
        days = calendar.day_number(year, form.decode(memory[_MONTH]), form.decode(memory[_DAY]))
        second = (
            form.decode_hour(memory[_HOURS]) * 3600 + form.decode(memory[_MINUTES]) * 60 + form.decode(memory[_SECONDS])
        )
        self.seconds = days * SECONDS_PER_DAY + second
        self.weekday_shift = (memory[_WEEKDAY] - 1 - self.seconds // SECONDS_PER_DAY) % 7

    def _write_control(self, control_a: int, control_b: int) -> None:
        updated, ran = self._updates, self._divider_runs
        if updated:
            self._store_time()
        self.control_a, self.control_b = control_a, control_b
        if self._divider_runs and not ran:
            self.second_ns = self.seen_ns - _FIRST_UPDATE_NS
        if self._updates and not updated:
            self._take_time()

    def _write_register(self, index: int, value: int) -> None:
        if index == _REGISTER_A:
            self._write_control(value & ~_A_UPDATE_IN_PROGRESS, self.control_b)
        elif index == _REGISTER_B:
            # SET also clears UIE.
            self._write_control(self.control_a, value & ~_B_UPDATE if value & _B_SET else value)
        elif index in (_REGISTER_C, _REGISTER_D):
            return
        elif index in _TIME_REGISTERS and self._updates:
            self._store_time()
            self.memory[index] = value
            self._take_time()
        else:
            self.memory[index] = value

    def _read_register(self, index: int) -> int:
        if index == _REGISTER_A:
            updating = self._updates and self.seen_ns - self.second_ns >= _NS_PER_S - _UPDATE_NS
            return self.control_a | (_A_UPDATE_IN_PROGRESS if updating else 0)
        if index == _REGISTER_B:
            return self.control_b
        if index == _REGISTER_C:
            flags = self.flags | (_C_REQUEST if self.irq_level else 0)
            self.flags = 0
            return flags
        if index == _REGISTER_D:
            return _D_VALID_RAM_AND_TIME
        if index in _TIME_REGISTERS and self._updates:
            return self._time_register(index)
        return self.memory[index]

    def load_port(self, port: int, size_bytes: int) -> int:  # noqa: ARG002
        """71h: the register that 70h selected; 70h itself cannot be read."""
        if port == INDEX_PORT:
            return 0xFF
        self._follow()
        value = self._read_register(self.index)
        self._follow()
        return value

    def store_port(self, port: int, size_bytes: int, value: int) -> None:  # noqa: ARG002
        """70h: select a register, and mask NMI with bit 7; 71h: write it."""
        if port == INDEX_PORT:
            self.index = value & ~_NMI_MASK
            self.nmi_masked = bool(value & _NMI_MASK)
            return
        self._settle()
        self._write_register(self.index, value)
        self._follow()

    def describe(self) -> str:
        """Date, time and the control registers."""
        self._settle()
        days, second = divmod(self.seconds, SECONDS_PER_DAY)
        year, month, day = calendar.calendar_day(days)
        return (
            f"rtc: {year:04}-{month:02}-{day:02} {second // 3600:02}:{second // 60 % 60:02}:{second % 60:02} "
            f"a={self.control_a:02x} b={self.control_b:02x} c={self.flags:02x} {'runs' if self._updates else 'stopped'}"
        )
