"""INT 1Ah and IRQ 8: ticks, the real-time clock, and waits that its periodic interrupt counts down.

It must not know the clock chip but by its registers behind ports 70h and 71h.

Source: IBM PS/2 and PC BIOS Interface Technical Reference, "Interrupt 1AH" and "Interrupt 70H"; MC146818 data sheet.
"""

from machine.bios import bda
from machine.bios.frame import CallFrame
from machine.bios.platform import Platform

SECONDS, SECONDS_ALARM, MINUTES, MINUTES_ALARM, HOURS, HOURS_ALARM = range(6)
DAY, MONTH, YEAR = 7, 8, 9
REGISTER_A, REGISTER_B, REGISTER_C, REGISTER_D = range(0x0A, 0x0E)
CENTURY = 0x32
UPDATE_IN_PROGRESS = 0x80  # register A
RATE_1024_HZ = 0x26
SET = 0x80  # register B
PERIODIC = 0x40
ALARM = 0x20
HOURS_24 = 0x02
DAYLIGHT = 0x01
# Ticks of the PIT: 1193182 Hz / 65536.
_TICKS_A_DAY = 0x1800B0
_PERIOD_US = 976

_PIC_MASTER_MASK = 0x21
_PIC_SLAVE = 0xA0
_PIC_SLAVE_MASK = 0xA1
_CASCADE = 0x04
_IRQ8 = 0x01


def service(platform: Platform, frame: CallFrame) -> None:
    """INT 1Ah: 00h, 01h ticks; 02h to 05h time and date; 06h, 07h alarm; the rest (PCI BIOS among it) CF set."""
    function = _FUNCTIONS.get(frame.ah)
    if function is None:
        frame.carry = True
    else:
        function(platform, frame)


def interrupt(platform: Platform, frame: CallFrame) -> None:
    """IRQ 8: count down a wait; AL on return is 1 if the alarm rang. The ROM ends the interrupt."""
    cause = platform.read_cmos(REGISTER_C)
    enabled = platform.read_cmos(REGISTER_B)
    if cause & enabled & PERIODIC and platform.load(bda.WAIT_ACTIVE, 1) & bda.WAITING:
        left = platform.load(bda.WAIT_MICROSECONDS, 4)
        if left > _PERIOD_US:
            platform.store(bda.WAIT_MICROSECONDS, 4, left - _PERIOD_US)
        else:
            pointer = platform.load(bda.WAIT_FLAG_POINTER, 4)
            cancel_wait(platform)
            platform.set_bits((pointer >> 16 << 4) + (pointer & 0xFFFF), bda.WAIT_ELAPSED, on=True)
    frame.al = 1 if cause & enabled & ALARM else 0


def start_wait(platform: Platform, microseconds: int, flag_pointer: int) -> bool:
    """Have bit 7 of the byte at `flag_pointer` (selector and offset) set when the time is over; False if one waits."""
    if platform.load(bda.WAIT_ACTIVE, 1) & bda.WAITING:
        return False
    platform.store(bda.WAIT_FLAG_POINTER, 4, flag_pointer)
    platform.store(bda.WAIT_MICROSECONDS, 4, microseconds)
    platform.store(bda.WAIT_ACTIVE, 1, bda.WAITING)
    platform.write_port(_PIC_MASTER_MASK, platform.read_port(_PIC_MASTER_MASK) & ~_CASCADE)
    platform.write_port(_PIC_SLAVE_MASK, platform.read_port(_PIC_SLAVE_MASK) & ~_IRQ8)
    platform.write_cmos(REGISTER_A, RATE_1024_HZ)
    platform.read_cmos(REGISTER_C)
    platform.write_cmos(REGISTER_B, platform.read_cmos(REGISTER_B) | PERIODIC)
    return True


def cancel_wait(platform: Platform) -> None:
    """Forget the wait and stop the periodic interrupt."""
    platform.store(bda.WAIT_ACTIVE, 1, 0)
    platform.write_cmos(REGISTER_B, platform.read_cmos(REGISTER_B) & ~PERIODIC)


def ticks_since_midnight(platform: Platform) -> int:
    """The tick count that fits the clock's time."""
    hours, minutes, seconds = (_from_bcd(platform.read_cmos(index)) for index in (HOURS, MINUTES, SECONDS))
    return (hours * 3600 + minutes * 60 + seconds) * _TICKS_A_DAY // 86400 % _TICKS_A_DAY


def _from_bcd(value: int) -> int:
    return (value >> 4) * 10 + (value & 0x0F)


def _get_ticks(platform: Platform, frame: CallFrame) -> None:
    ticks = platform.load(bda.TICKS, 4)
    frame.cx, frame.dx = ticks >> 16, ticks & 0xFFFF
    frame.al = platform.load(bda.TICKS_MIDNIGHT, 1)
    platform.store(bda.TICKS_MIDNIGHT, 1, 0)
    frame.succeed()


def _set_ticks(platform: Platform, frame: CallFrame) -> None:
    platform.store(bda.TICKS, 4, frame.cx << 16 | frame.dx)
    platform.store(bda.TICKS_MIDNIGHT, 1, 0)
    frame.succeed()


def _updating(platform: Platform, frame: CallFrame) -> bool:
    if platform.read_cmos(REGISTER_A) & UPDATE_IN_PROGRESS:
        frame.wait()  # an update lasts 2 ms; the next interrupt comes later
        return True
    return False


def _get_time(platform: Platform, frame: CallFrame) -> None:
    if _updating(platform, frame):
        return
    frame.ch = platform.read_cmos(HOURS)
    frame.cl = platform.read_cmos(MINUTES)
    frame.dh = platform.read_cmos(SECONDS)
    frame.dl = platform.read_cmos(REGISTER_B) & DAYLIGHT
    frame.succeed()


def _set_time(platform: Platform, frame: CallFrame) -> None:
    control = platform.read_cmos(REGISTER_B)
    platform.write_cmos(REGISTER_B, control | SET)
    platform.write_cmos(HOURS, frame.ch)
    platform.write_cmos(MINUTES, frame.cl)
    platform.write_cmos(SECONDS, frame.dh)
    platform.write_cmos(REGISTER_B, control & ~(SET | DAYLIGHT) | HOURS_24 | frame.dl & DAYLIGHT)
    frame.succeed()


def _get_date(platform: Platform, frame: CallFrame) -> None:
    if _updating(platform, frame):
        return
    frame.ch = platform.read_cmos(CENTURY)
    frame.cl = platform.read_cmos(YEAR)
    frame.dh = platform.read_cmos(MONTH)
    frame.dl = platform.read_cmos(DAY)
    frame.succeed()


def _set_date(platform: Platform, frame: CallFrame) -> None:
    control = platform.read_cmos(REGISTER_B)
    platform.write_cmos(REGISTER_B, control | SET)
    platform.write_cmos(CENTURY, frame.ch)
    platform.write_cmos(YEAR, frame.cl)
    platform.write_cmos(MONTH, frame.dh)
    platform.write_cmos(DAY, frame.dl)
    platform.write_cmos(REGISTER_B, control & ~SET)
    frame.succeed()


def _set_alarm(platform: Platform, frame: CallFrame) -> None:
    control = platform.read_cmos(REGISTER_B)
    if control & ALARM:
        frame.carry = True  # one is set already
        return
    platform.write_cmos(HOURS_ALARM, frame.ch)
    platform.write_cmos(MINUTES_ALARM, frame.cl)
    platform.write_cmos(SECONDS_ALARM, frame.dh)
    platform.write_port(_PIC_MASTER_MASK, platform.read_port(_PIC_MASTER_MASK) & ~_CASCADE)
    platform.write_port(_PIC_SLAVE_MASK, platform.read_port(_PIC_SLAVE_MASK) & ~_IRQ8)
    platform.write_cmos(REGISTER_B, control & ~SET | ALARM)
    frame.succeed()


def _clear_alarm(platform: Platform, frame: CallFrame) -> None:
    platform.write_cmos(REGISTER_B, platform.read_cmos(REGISTER_B) & ~(SET | ALARM))
    frame.succeed()


_FUNCTIONS = {
    0x00: _get_ticks,
    0x01: _set_ticks,
    0x02: _get_time,
    0x03: _set_time,
    0x04: _get_date,
    0x05: _set_date,
    0x06: _set_alarm,
    0x07: _clear_alarm,
}
