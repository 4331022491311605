"""The 8254 interval timer of a PC: ports 40h to 43h, IRQ 0, and what port 61h sees of it.

It must not know the interrupt controller, nor what becomes of the sound.
"""

from __future__ import annotations

from typing import ClassVar

from machine.clock import Clock
from machine.devices.device import Device, Line, Timer
from machine.devices.pit_channel import ACCESS_BOTH, PitChannel

PIT_HZ = 1_193_182
FIRST_PORT = 0x40
LAST_PORT = 0x43

_NS_PER_S = 1_000_000_000
_CONTROL_PORT = 0x43
_READ_BACK = 3
_READ_BACK_NO_COUNT = 0x20
_READ_BACK_NO_STATUS = 0x10

# Counter 1 asks for a memory refresh every 18 ticks (15.085 us) on every PC; port 61h bit 4 toggles with each.
_REFRESH_TICKS = 18


def tick_at(now_ns: int) -> int:
    """CLK pulses up to `now_ns`."""
    return now_ns * PIT_HZ // _NS_PER_S


def ns_of(tick: int) -> int:
    """The first nanosecond at which CLK pulse number `tick` has been."""
    return -(-tick * _NS_PER_S // PIT_HZ)


class Pit(Device):
    """Three counters at 1193182 Hz; OUT of counter 0 is IRQ 0, and follows it to the nanosecond.

    The gates of counters 0 and 1 are tied high; counter 2 belongs to the speaker and to port 61h.
    """

    _saved: ClassVar[tuple[str, ...]] = ("channel0", "channel1", "channel2", "irq_level", "timer")

    def __init__(self, clock: Clock, irq: Line) -> None:
        self._clock = clock
        self._irq = irq
        self.channel0 = PitChannel()
        self.channel1 = PitChannel()
        self.channel2 = PitChannel()
        self._channels = (self.channel0, self.channel1, self.channel2)
        self.timer = Timer(clock, self._follow)
        self.irq_level = False
        self.reset()

    def reset(self) -> None:
        """No counter is programmed, no interrupt is due; GATE of counter 2 is low."""
        for channel in self._channels:
            channel.gate = True
            channel.reset()
        self.channel2.gate = False
        self.timer.disarm()
        self.irq_level = False
        self._irq(False)

    @property
    def _tick(self) -> int:
        return tick_at(self._clock.now_ns)

    def _follow(self) -> None:
        """Drive IRQ 0 as OUT is now, and come back when it changes."""
        level, change = self.channel0.follow(self._clock.now_ns * PIT_HZ // _NS_PER_S)
        if level != self.irq_level:
            self.irq_level = level
            self._irq(level)
        if change is None:
            self.timer.disarm()
        else:
            self.timer.arm(ns_of(change))

    def set_gate2(self, level: bool) -> None:
        """Drive GATE of counter 2 (port 61h bit 0)."""
        self.channel2.set_gate(level, self._tick)

    @property
    def output2(self) -> bool:
        """OUT of counter 2 (port 61h bit 5)."""
        return self.channel2.output(self._tick)

    @property
    def refresh(self) -> bool:
        """The refresh toggle (port 61h bit 4)."""
        return bool(self._tick // _REFRESH_TICKS & 1)

    def steady_until_ns(self) -> int:
        """The time at which OUT of counter 2 or the refresh toggle may change, if nothing is written before."""
        tick = self._tick
        toggle, change = tick - tick % _REFRESH_TICKS + _REFRESH_TICKS, self.channel2.next_change(tick)
        return ns_of(toggle if change is None else min(toggle, change))

    def load_port(self, port: int, size_bytes: int) -> int:  # noqa: ARG002
        """40h to 42h: a counter; 43h has nothing to read."""
        if port == _CONTROL_PORT:
            return 0
        return self._channels[port & 3].read(self._tick)

    def store_port(self, port: int, size_bytes: int, value: int) -> None:  # noqa: ARG002
        """40h to 42h: a counter; 43h: control word, latch and read-back commands."""
        tick = self._tick
        if port != _CONTROL_PORT:
            self._channels[port & 3].write(value, tick)
            if port == FIRST_PORT:
                self._follow()
            return
        select = value >> 6
        if select == _READ_BACK:
            for number, channel in enumerate(self._channels):
                if value >> number + 1 & 1:
                    if not value & _READ_BACK_NO_COUNT:
                        channel.latch_count(tick)
                    if not value & _READ_BACK_NO_STATUS:
                        channel.latch_status(tick)
        elif value >> 4 & ACCESS_BOTH == 0:
            self._channels[select].latch_count(tick)
        else:
            self._channels[select].write_control(value, tick)
            if select == 0:
                self._follow()

    def describe(self) -> str:
        """A line for each counter."""
        tick = self._tick
        return "\n".join(
            f"pit{number}: {channel.describe()} value={channel.value(tick)} out={int(channel.output(tick))}"
            for number, channel in enumerate(self._channels)
        )
