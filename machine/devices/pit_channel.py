"""One counter of the 8254: all six modes, computed from the number of the clock tick it is looked at.

It must not know virtual time in nanoseconds, nor what its OUT pin drives.
"""

from __future__ import annotations

from typing import ClassVar

from machine.devices.device import Device

_NEVER_TICK = 1 << 62
_NONE = -1

_STATUS_OUT = 0x80
_STATUS_NULL_COUNT = 0x40

ACCESS_LOW = 1
ACCESS_HIGH = 2
ACCESS_BOTH = 3


def _to_bcd(value: int) -> int:
    return value // 1000 % 10 << 12 | value // 100 % 10 << 8 | value // 10 % 10 << 4 | value % 10


def _from_bcd(value: int) -> int:
    return (value >> 12) * 1000 + (value >> 8 & 15) * 100 + (value >> 4 & 15) * 10 + (value & 15)


class PitChannel(Device):
    """A counter of the 8254; every method takes `tick`, the number of CLK pulses so far.

    A count that is written at tick w is loaded by the CLK pulse w + 1 (or by the one after a trigger), and from there
    counts down one a pulse; so value and OUT at any tick follow from the tick of the load, and nothing has to happen
    in between.
    Modes 2 and 3 treat the illegal count 1 as 2.

    Source: Intel 8254 data sheet, order number 231164.
    """

    _saved: ClassVar[tuple[str, ...]] = (
        "control", "written", "reload", "gate", "running", "count", "load_tick", "starts_low", "value_before",
        "out_before", "paused_elapsed", "struck", "next_count", "next_tick", "next_starts_low", "null_until",
        "count_latch", "status_latch", "read_high", "write_high", "write_low_byte",
    )  # fmt: skip

    def __init__(self) -> None:
        self.gate = True
        self.reset()

    def reset(self) -> None:
        """As after a control word for mode 0 that no count has followed; GATE stays as it is driven."""
        self.control = ACCESS_BOTH << 4
        self.written = False
        self.reload = 0
        self.running = False
        self.count = 0
        self.load_tick = 0
        self.starts_low = False
        self.value_before = 0
        self.out_before = False
        self.paused_elapsed = _NONE
        self.struck = False
        self.next_count = 0
        self.next_tick = _NONE
        self.next_starts_low = False
        self.null_until = _NEVER_TICK
        self.count_latch = _NONE
        self.status_latch = _NONE
        self.read_high = False
        self.write_high = False
        self.write_low_byte = 0

    @property
    def mode(self) -> int:
        """0 to 5; the encodings 6 and 7 mean 2 and 3."""
        mode = self.control >> 1 & 7
        return mode - 4 if mode > 5 else mode

    @property
    def access(self) -> int:
        """Which bytes are read and written: ACCESS_LOW, ACCESS_HIGH or ACCESS_BOTH."""
        return self.control >> 4 & 3

    @property
    def modulus(self) -> int:
        """10000 in BCD, 65536 in binary: what a count of 0 stands for."""
        return 10_000 if self.control & 1 else 0x1_0000

    def _settle(self, tick: int) -> None:
        """Take over a new count that waited for the end of a period."""
        if self.next_tick != _NONE and tick >= self.next_tick:
            self.load_tick = self.next_tick
            self.count = self.next_count
            self.starts_low = self.next_starts_low
            self.next_tick = _NONE

    def _elapsed(self, tick: int) -> int:
        """CLK pulses counted since the load."""
        return self.paused_elapsed if self.paused_elapsed != _NONE else tick - self.load_tick

    def _phase(self, tick: int) -> int:
        """The place in the period of modes 2 and 3; mode 3 starts with its high half."""
        elapsed = self._elapsed(tick)
        if self.starts_low:
            elapsed += self.count + 1 >> 1
        return elapsed % self.count

    def value(self, tick: int) -> int:
        """The counting element, as a number."""
        self._settle(tick)
        if not self.running or tick < self.load_tick:
            return self.value_before
        if self.mode == 2:
            return self.count - self._phase(tick)
        if self.mode == 3:
            # It counts by two, from an even number, through each half.
            phase = self._phase(tick)
            high = self.count + 1 >> 1
            return (self.count & ~1) - 2 * (phase if phase < high else phase - high)
        return (self.count - self._elapsed(tick)) % self.modulus

    def output(self, tick: int) -> bool:
        """The level of OUT."""
        self._settle(tick)
        if not self.running or tick < self.load_tick:
            return self.out_before
        mode = self.mode
        if mode <= 1:
            return self._elapsed(tick) >= self.count
        if mode >= 4:
            # The strobe lasts one pulse, also if GATE falls meanwhile.
            return self.struck or tick != self.load_tick + self.count or self._elapsed(tick) != self.count
        if not self.gate:
            return True
        phase = self._phase(tick)
        return phase != self.count - 1 if mode == 2 else phase < self.count + 1 >> 1

    def next_change(self, tick: int) -> int | None:
        """The next tick after `tick` at which OUT may change; None if it stays as it is."""
        self._settle(tick)
        if not self.running:
            return None
        if self.paused_elapsed != _NONE:
            return tick + 1 if self.mode == 4 and not self.output(tick) else None
        if tick < self.load_tick:
            if self.output(self.load_tick) != self.out_before:
                return self.load_tick
            tick = self.load_tick
        mode = self.mode
        if mode == 2:
            phase = self._phase(tick)
            change = tick + (self.count - 1 - phase or 1)
        elif mode == 3:
            phase = self._phase(tick)
            high = self.count + 1 >> 1
            change = tick + (high - phase if phase < high else self.count - phase)
        else:
            change = self.load_tick + self.count
            if tick == change and mode >= 4:
                change += 1
            if change <= tick:
                return None
        return change if self.next_tick == _NONE else min(change, self.next_tick)

    def follow(self, tick: int) -> tuple[bool, int | None]:
        """`output` and `next_change` at once: what a timer asks that nobody touches, time and again."""
        control = self.control
        is_steady = self.next_tick == _NONE and self.running and self.gate and tick >= self.load_tick
        if not is_steady or not control & 4 or self.paused_elapsed != _NONE:
            return self.output(tick), self.next_change(tick)
        count = self.count
        high = count + 1 >> 1
        phase = (tick - self.load_tick + (high if self.starts_low else 0)) % count
        if not control & 2:
            left = count - 1 - phase
            return left != 0, tick + (left or 1)
        if phase < high:
            return True, tick + high - phase
        return False, tick + count - phase

    def write_control(self, value: int, tick: int) -> None:
        """A control word for this counter, other than the latch command."""
        self.value_before = self.value(tick) % self.modulus
        self.control = value & 0x3F
        self.running = False
        self.written = False
        self.out_before = self.mode != 0
        self.paused_elapsed = _NONE
        self.next_tick = _NONE
        self.null_until = _NEVER_TICK
        self.count_latch = _NONE
        self.status_latch = _NONE
        self.read_high = False
        self.write_high = False

    def write(self, value: int, tick: int) -> None:
        """A byte of the count."""
        access = self.access
        if access == ACCESS_LOW:
            self._write_count(value, tick)
        elif access == ACCESS_HIGH:
            self._write_count(value << 8, tick)
        elif self.write_high:
            self.write_high = False
            self._write_count(self.write_low_byte | value << 8, tick)
        else:
            self.write_high = True
            self.write_low_byte = value
            if self.mode == 0:
                # The first byte stops the counting and takes OUT down at once.
                self.value_before = self.value(tick)
                self.running = False
                self.out_before = False
                self.paused_elapsed = _NONE
                if tick < self.null_until:
                    self.null_until = _NEVER_TICK

    def _write_count(self, register: int, tick: int) -> None:
        count = (_from_bcd(register) if self.control & 1 else register) or self.modulus
        mode = self.mode
        if mode in (2, 3):
            count = max(count, 2)
        value, output = self.value(tick), self.output(tick)
        self.reload = count
        self.written = True
        self.null_until = _NEVER_TICK
        if mode in (0, 4):
            self.value_before = value
            self.out_before = output and mode == 4
            self._load(count, tick)
            self.paused_elapsed = _NONE if self.gate else 0
        elif self.running and tick < self.load_tick:
            self.count = count
            self.null_until = self.load_tick
        elif mode in (1, 5):
            return
        elif not self.running:
            self.value_before = value
            self.out_before = True
            self._load(count, tick)
            self.paused_elapsed = _NONE if self.gate else 0
        elif self.gate:
            self._load_at_end_of_period(count, tick)

    def _load(self, count: int, tick: int) -> None:
        self.count = count
        self.load_tick = tick + 1
        self.null_until = min(self.null_until, tick + 1)
        self.starts_low = False
        self.struck = False
        self.paused_elapsed = _NONE
        self.next_tick = _NONE
        self.running = True

    def _load_at_end_of_period(self, count: int, tick: int) -> None:
        """Mode 2 goes on with its period, mode 3 with its half period, before it takes the new count."""
        phase = self._phase(tick)
        high = self.count + 1 >> 1
        first_half = self.mode == 3 and phase < high
        self.next_tick = tick + (high if first_half else self.count) - phase
        self.next_starts_low = first_half
        self.next_count = count
        self.null_until = self.next_tick

    def set_gate(self, level: bool, tick: int) -> None:
        """Drive GATE: low pauses modes 0 and 4 and stops 2 and 3, which start anew; its rise triggers 1 and 5."""
        if level == self.gate:
            return
        value, output = self.value(tick), self.output(tick)
        self.gate = level
        mode = self.mode
        if not level:
            if self.running and mode not in (1, 5):
                self.paused_elapsed = max(0, tick - self.load_tick)
                self.struck = self.paused_elapsed > self.count
                if self.next_tick != _NONE:
                    self.next_tick = _NONE
                    self.null_until = _NEVER_TICK
        elif mode in (0, 4):
            if self.paused_elapsed != _NONE:
                self.struck = self.paused_elapsed >= self.count and tick > self.load_tick + self.count
                self.load_tick = max(self.load_tick, tick - self.paused_elapsed)
                self.paused_elapsed = _NONE
        elif self.written:
            self.value_before = value
            self.out_before = output
            self._load(self.reload, tick)

    def latch_count(self, tick: int) -> None:
        """The counter latch command; ignored while a latched count has not been read."""
        if self.count_latch == _NONE:
            self.count_latch = self._encode(tick)

    def latch_status(self, tick: int) -> None:
        """The status half of the read-back command; ignored while a latched status has not been read."""
        if self.status_latch == _NONE:
            self.status_latch = self.status(tick)

    def status(self, tick: int) -> int:
        """The status byte: OUT, null count, and the control word as it was written."""
        status = self.control
        if self.output(tick):
            status |= _STATUS_OUT
        if tick < self.null_until:
            status |= _STATUS_NULL_COUNT
        return status

    def _encode(self, tick: int) -> int:
        value = self.value(tick)
        return _to_bcd(value) if self.control & 1 else value & 0xFFFF

    def read(self, tick: int) -> int:
        """A byte: of the latched status, else of the latched count, else of the count as it runs."""
        if self.status_latch != _NONE:
            status = self.status_latch
            self.status_latch = _NONE
            return status
        value = self.count_latch if self.count_latch != _NONE else self._encode(tick)
        high = self.access == ACCESS_HIGH
        if self.access == ACCESS_BOTH:
            high = self.read_high
            self.read_high = not high
            if not high:
                return value & 0xFF
        self.count_latch = _NONE
        return value >> 8 if high else value & 0xFF

    def describe(self) -> str:
        """One line; what depends on the time is left to the caller."""
        count = self.next_count if self.next_tick != _NONE else (self.count if self.running else self.reload)
        return (
            f"mode={self.mode} bcd={self.control & 1} access={self.access} count={count} gate={int(self.gate)} "
            f"running={int(self.running)}"
        )
