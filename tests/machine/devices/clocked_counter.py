"""The 8254 counter of the data sheet, one CLK pulse after the other: the oracle for the closed form.

Written from the mode definitions alone; it shares nothing with `machine.devices.pit_channel`.
"""

from __future__ import annotations


class ClockedCounter:
    """State after each pulse: the counting element, OUT, and the null count flag."""

    def __init__(self, gate: bool) -> None:
        self.mode = 0
        self.bcd = False
        self.access = 3
        self.gate = gate
        self.register = 0
        self.element = 0
        self.loaded = 0
        self.out = False
        self.null = True
        self.counting = False
        self.load_next = False
        self.strobing = False
        self.armed = False
        self.has_count = False
        self.low_byte: int | None = None

    @property
    def modulus(self) -> int:
        return 10_000 if self.bcd else 65_536

    def control(self, mode: int, access: int, bcd: bool) -> None:
        self.element %= self.modulus
        self.mode, self.access, self.bcd = mode, access, bcd
        self.out = mode != 0
        self.null = True
        self.counting = self.load_next = self.strobing = self.armed = self.has_count = False
        self.low_byte = None

    def write(self, byte: int) -> None:
        if self.access == 1:
            self.count(byte)
        elif self.access == 2:
            self.count(byte << 8)
        elif self.low_byte is None:
            self.low_byte = byte
            if self.mode == 0:
                self.counting = self.load_next = False
                self.out = False
        else:
            low, self.low_byte = self.low_byte, None
            self.count(low | byte << 8)

    def count(self, register: int) -> None:
        if self.bcd:
            register = int("".join(str(register >> shift & 15) for shift in (12, 8, 4, 0))) if register else 0
        value = register or self.modulus
        self.register = max(2, value) if self.mode in (2, 3) else value
        self.null = True
        self.has_count = True
        if self.mode == 0:
            self.out = False
            self.load_next = True
        elif self.mode == 4 or (self.mode in (2, 3) and not self.counting):
            self.load_next = True

    def set_gate(self, level: bool) -> None:
        rises = level and not self.gate
        self.gate = level
        if self.mode in (2, 3):
            if not level:
                self.out = True
            elif rises and self.has_count:
                self.load_next = True
        elif self.mode in (1, 5) and rises and self.has_count:
            self.load_next = True

    def pulse(self) -> None:
        if self.strobing:
            self.strobing = False
            self.out = True
        if self.load_next:
            self.load_next = False
            self.load()
            self.counting = self.armed = True
            if self.mode == 1:
                self.out = False
        elif self.counting:
            self.step()

    def load(self) -> None:
        self.loaded = self.register
        self.element = self.register & ~1 if self.mode == 3 else self.register
        self.null = False

    def step(self) -> None:
        if self.mode in (0, 4) and not self.gate:
            return
        if self.mode in (2, 3):
            if self.gate:
                self.step_periodic()
            return
        self.element = (self.element - 1) % self.modulus
        if self.element == 0 and self.armed:
            self.armed = False
            if self.mode in (0, 1):
                self.out = True
            else:
                self.out = False
                self.strobing = True

    def step_periodic(self) -> None:
        if self.mode == 2:
            self.element -= 1
            if self.element == 1:
                self.out = False
            elif self.element == 0:
                self.out = True
                self.load()
        elif self.element == 0:
            # An odd count takes one pulse more in its high half.
            self.out = False
            self.load()
        else:
            self.element -= 2
            if self.element == 0 and not (self.loaded & 1 and self.out):
                self.out = not self.out
                self.load()
