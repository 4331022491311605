"""The arithmetic of a clock chip's registers: seconds to calendar fields and back, for every value a guest may write.

It must not know the chip's control registers, nor virtual time.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass

SECONDS_PER_DAY = 86_400

_CYCLE_YEARS = 400
_CYCLE_DAYS = 146_097
_PM = 0x80
_DONT_CARE = 0xC0


@dataclass(frozen=True, slots=True)
class Format:
    """How register B has the fields stored: `binary` or BCD, `hours24` or twelve hours with PM in bit 7."""

    binary: bool
    hours24: bool

    def decode(self, byte: int) -> int:
        """The number in a register; digits above 9 count as they are."""
        return byte if self.binary else (byte >> 4) * 10 + (byte & 15)

    def encode(self, value: int) -> int:
        """The register for a number from 0 to 99."""
        return value if self.binary else value // 10 << 4 | value % 10

    def decode_hour(self, byte: int) -> int:
        """The hour, from 0 to 23 for a valid register."""
        if self.hours24:
            return self.decode(byte)
        return self.decode(byte & ~_PM) % 12 + (12 if byte & _PM else 0)

    def encode_hour(self, hour: int) -> int:
        """The register for an hour from 0 to 23."""
        if self.hours24:
            return self.encode(hour)
        return self.encode(hour % 12 or 12) | (_PM if hour >= 12 else 0)

    def alarm(self, byte: int, count: int) -> list[int]:
        """What an alarm register for seconds or minutes matches, out of `range(count)`."""
        if byte >= _DONT_CARE:
            return list(range(count))
        return [value for value in (self.decode(byte),) if value < count and self.encode(value) == byte]

    def alarm_hours(self, byte: int) -> list[int]:
        """What the alarm register for hours matches."""
        if byte >= _DONT_CARE:
            return list(range(24))
        return [hour for hour in (self.decode_hour(byte),) if hour < 24 and self.encode_hour(hour) == byte]


def day_number(year: int, month: int, day: int) -> int:
    """Days in the proleptic Gregorian calendar; month and day may lie outside their range and carry over."""
    year += (month - 1) // 12
    cycle, year_in_cycle = divmod(year, _CYCLE_YEARS)
    first = dt.date(year_in_cycle + _CYCLE_YEARS, (month - 1) % 12 + 1, 1).toordinal()
    return first + (cycle - 1) * _CYCLE_DAYS + day - 1


def calendar_day(number: int) -> tuple[int, int, int]:
    """Year, month and day of a `day_number`."""
    cycle, rest = divmod(number - 1, _CYCLE_DAYS)
    date = dt.date.fromordinal(rest + 1)
    return date.year + cycle * _CYCLE_YEARS, date.month, date.day


def next_match(after: int, hours: list[int], minutes: list[int], seconds: list[int]) -> int | None:
    """The first second after second `after` whose time of day has its hour, minute and second in the sorted lists."""
    if not (hours and minutes and seconds):
        return None
    day, start = divmod(after + 1, SECONDS_PER_DAY)
    for hour in hours:
        if (hour + 1) * 3600 <= start:
            continue
        for minute in minutes:
            base = hour * 3600 + minute * 60
            if base + 60 <= start:
                continue
            for second in seconds:
                if base + second >= start:
                    return day * SECONDS_PER_DAY + base + second
    return (day + 1) * SECONDS_PER_DAY + hours[0] * 3600 + minutes[0] * 60 + seconds[0]
