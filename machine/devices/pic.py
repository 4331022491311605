"""The two 8259A interrupt controllers of a PC, their cascade, and the edge/level registers of the chipset.

It must not know who drives the sixteen lines, nor what the CPU does with a vector.
"""

from __future__ import annotations

from typing import ClassVar

from machine.devices.device import Device, Line
from machine.lines import CpuLines

_ICW1_START = 0x10
_ICW1_SINGLE = 0x02
_ICW1_NEEDS_ICW4 = 0x01
_ICW4_AUTO_EOI = 0x02
_ICW4_SPECIAL_FULLY_NESTED = 0x10

_OCW3 = 0x08
_OCW3_ENABLE_SPECIAL_MASK = 0x40
_OCW3_SPECIAL_MASK = 0x20
_OCW3_POLL = 0x04
_OCW3_READ_REGISTER = 0x02
_OCW3_READ_ISR = 0x01

_OCW2_ROTATE = 0x80
_OCW2_SPECIFIC = 0x40
_OCW2_EOI = 0x20

_READY = 0
_WAIT_ICW1 = 1
_WAIT_ICW2 = 2
_WAIT_ICW3 = 3
_WAIT_ICW4 = 4

_SPURIOUS = 7
_POLL_FOUND = 0x80
_CASCADE = 2
_CASCADE_BIT = 1 << _CASCADE

ELCR_FIRST = 0x4D0
ELCR_LAST = 0x4D1
MASTER_FIRST = 0x20
MASTER_LAST = 0x21
SLAVE_FIRST = 0xA0
SLAVE_LAST = 0xA1

# System timer, keyboard, cascade, clock and FPU error cannot be level triggered (PIIX3, ELCR1 and ELCR2).
_MASTER_LEVEL_BITS = 0xF8
_SLAVE_LEVEL_BITS = 0xDE


class Chip(Device):
    """One 8259A in 8086 mode.

    A request is an input that is high and whose rising edge was latched (or that is level triggered): an input that
    falls before the acknowledge takes its request back, and the acknowledge then answers 7, as the datasheet has it.
    The LTIM bit of ICW1 has no effect: the chipset's ELCR stands in its place. After power-on the chip asks for nothing
    until it has been initialised.

    Source: Intel 8259A data sheet, order number 231468; 82371SB (PIIX3) for ELCR.
    """

    _saved: ClassVar[tuple[str, ...]] = (
        "levels", "latched", "level_triggered", "in_service", "mask", "lowest", "base", "awaiting", "needs_icw4",
        "single", "auto_eoi", "rotate_in_auto_eoi", "nested", "special_mask", "poll", "read_isr", "output",
    )  # fmt: skip

    def __init__(self, drive: Line, level_bits: int, cascade_bit: int) -> None:
        self._drive = drive
        self._level_bits = level_bits
        self._cascade_bit = cascade_bit
        self.output = False
        self.reset()

    def reset(self) -> None:
        """The state before any ICW1; every input low, every line edge triggered."""
        self.levels = 0
        self.level_triggered = 0
        self.base = 0
        self._clear()
        self.awaiting = _WAIT_ICW1
        self._update()

    def _clear(self) -> None:
        """What ICW1 resets."""
        self.latched = 0
        self.in_service = 0
        self.mask = 0
        self.lowest = 7
        self.needs_icw4 = False
        self.single = False
        self.auto_eoi = False
        self.rotate_in_auto_eoi = False
        self.nested = False
        self.special_mask = False
        self.poll = False
        self.read_isr = False

    @property
    def requests(self) -> int:
        """IRR: a bit for every input that asks, masked or not."""
        return self.levels & (self.latched | self.level_triggered)

    def set_input(self, irq: int, level: bool) -> None:
        """Drive input `irq` (0 to 7)."""
        bit = 1 << irq
        if level:
            if self.levels & bit:
                return
            self.levels |= bit
            self.latched |= bit
        else:
            if not self.levels & bit:
                return
            self.levels &= ~bit
            self.latched &= ~bit
        self._update()

    def _by_priority(self) -> range:
        return range(self.lowest + 1, self.lowest + 9)

    def best(self) -> int:
        """The input that wins now, or -1."""
        waiting = self.requests & ~self.mask
        if not waiting or self.awaiting != _READY:
            return -1
        if self.lowest == 7 and not self.special_mask and not self.nested:
            bit = waiting & -waiting
            return -1 if self.in_service & (bit << 1) - 1 else bit.bit_length() - 1
        serving = self.in_service & ~self.mask if self.special_mask else self.in_service
        reentrant = self._cascade_bit if self.nested else 0
        for position in self._by_priority():
            bit = 1 << (position & 7)
            if waiting & bit and (not serving & bit or reentrant & bit):
                return position & 7
            if serving & bit:
                break
        return -1

    def _update(self) -> None:
        output = self.best() >= 0
        if output != self.output:
            self.output = output
            self._drive(output)

    def accept(self) -> int:
        """An acknowledge cycle: the winning input goes into service.

        Returns:
            Its number, or -1 if no input asks any more.
        """
        irq = self.best()
        # INT falls during the cycle, so that a request that is still there makes a new edge at a master's input.
        if self.output:
            self.output = False
            self._drive(False)
        if irq >= 0:
            self.latched &= ~(1 << irq)
            if not self.auto_eoi:
                self.in_service |= 1 << irq
            elif self.rotate_in_auto_eoi:
                self.lowest = irq
        self._update()
        return irq

    def read(self, address: int) -> int:
        """Read at A0 = `address`."""
        if self.poll:
            self.poll = False
            irq = self.accept()
            return _POLL_FOUND | irq if irq >= 0 else 0
        if address:
            return self.mask
        return self.in_service if self.read_isr else self.requests

    def write(self, address: int, value: int) -> None:
        """Write at A0 = `address`: an ICW, or an OCW once the chip is initialised."""
        if address:
            self._write_high(value)
        elif value & _ICW1_START:
            self._clear()
            self.needs_icw4 = bool(value & _ICW1_NEEDS_ICW4)
            self.single = bool(value & _ICW1_SINGLE)
            self.awaiting = _WAIT_ICW2
        elif value & _OCW3:
            self._write_ocw3(value)
        else:
            self._write_ocw2(value)
        self._update()

    def _write_high(self, value: int) -> None:
        if self.awaiting == _WAIT_ICW2:
            self.base = value & 0xF8
            if not self.single:
                self.awaiting = _WAIT_ICW3
            else:
                self.awaiting = _WAIT_ICW4 if self.needs_icw4 else _READY
        elif self.awaiting == _WAIT_ICW3:
            # The wiring of the board is fixed; what the guest says of it changes nothing.
            self.awaiting = _WAIT_ICW4 if self.needs_icw4 else _READY
        elif self.awaiting == _WAIT_ICW4:
            self.auto_eoi = bool(value & _ICW4_AUTO_EOI)
            self.nested = bool(value & _ICW4_SPECIAL_FULLY_NESTED)
            self.awaiting = _READY
        else:
            self.mask = value

    def _write_ocw3(self, value: int) -> None:
        if value & _OCW3_ENABLE_SPECIAL_MASK:
            self.special_mask = bool(value & _OCW3_SPECIAL_MASK)
        if value & _OCW3_POLL:
            self.poll = True
        elif value & _OCW3_READ_REGISTER:
            self.read_isr = bool(value & _OCW3_READ_ISR)

    def _write_ocw2(self, value: int) -> None:
        rotate = bool(value & _OCW2_ROTATE)
        level = value & 7
        if not value & _OCW2_EOI:
            if value & _OCW2_SPECIFIC:
                if rotate:
                    self.lowest = level
            else:
                self.rotate_in_auto_eoi = rotate
            return
        if not value & _OCW2_SPECIFIC:
            level = self._highest_in_service()
            if level < 0:
                return
        self.in_service &= ~(1 << level)
        if rotate:
            self.lowest = level

    def _highest_in_service(self) -> int:
        # "An IS bit that is masked by an IMR bit will not be cleared by a non-specific EOI" in special mask mode.
        served = self.in_service & ~self.mask if self.special_mask else self.in_service
        for position in self._by_priority():
            if served >> (position & 7) & 1:
                return position & 7
        return -1

    def set_level_triggered(self, value: int) -> None:
        """Write the chip's half of ELCR."""
        self.level_triggered = value & self._level_bits
        self._update()

    def describe(self) -> str:
        """One line of registers."""
        return (
            f"irr={self.requests:02x} imr={self.mask:02x} isr={self.in_service:02x} base={self.base:02x} "
            f"lowest={self.lowest} elcr={self.level_triggered:02x} "
            f"read={'isr' if self.read_isr else 'irr'} aeoi={int(self.auto_eoi)} "
            f"sfnm={int(self.nested)} smm={int(self.special_mask)} int={int(self.output)}"
            + ("" if self.awaiting == _READY else f" awaits ICW{self.awaiting}")
        )


class Pic(Device):
    """Master at 20h, slave at A0h on the master's input 2, ELCR at 4D0h; drives INTR and answers its acknowledge."""

    _saved: ClassVar[tuple[str, ...]] = ("master", "slave")

    def __init__(self, lines: CpuLines) -> None:
        self.master = Chip(lines.set_intr, _MASTER_LEVEL_BITS, _CASCADE_BIT)
        self.slave = Chip(self._cascade, _SLAVE_LEVEL_BITS, 0)
        lines.acknowledge = self.acknowledge
        lines.peek = self.peek

    def _cascade(self, level: bool) -> None:
        self.master.set_input(_CASCADE, level)

    def reset(self) -> None:
        """Both chips; the devices then drive their lines anew."""
        self.slave.reset()
        self.master.reset()

    def line(self, irq: int) -> Line:
        """The wire of interrupt `irq` (0 to 15 without 2), for the device that drives it."""
        chip = self.slave if irq >= 8 else self.master
        number = irq & 7

        def drive(level: bool) -> None:
            chip.set_input(number, level)

        return drive

    def acknowledge(self) -> int:
        """The INTA cycles of the CPU.

        Returns:
            The vector: 7 of the chip that was asked if its request has gone meanwhile, and nothing goes into service.
        """
        irq = self.master.accept()
        if irq == _CASCADE and not self.master.single:
            irq = self.slave.accept()
            return self.slave.base | (irq if irq >= 0 else _SPURIOUS)
        return self.master.base | (irq if irq >= 0 else _SPURIOUS)

    def peek(self) -> int:
        """The vector that `acknowledge` would return now; nothing changes: for a debugger's stop before delivery."""
        irq = self.master.best()
        if irq == _CASCADE and not self.master.single:
            irq = self.slave.best()
            return self.slave.base | (irq if irq >= 0 else _SPURIOUS)
        return self.master.base | (irq if irq >= 0 else _SPURIOUS)

    def load_port(self, port: int, size_bytes: int) -> int:  # noqa: ARG002
        """20h, 21h, A0h, A1h, 4D0h, 4D1h; bytes."""
        if port >= ELCR_FIRST:
            return (self.slave if port & 1 else self.master).level_triggered
        return (self.slave if port & 0x80 else self.master).read(port & 1)

    def store_port(self, port: int, size_bytes: int, value: int) -> None:  # noqa: ARG002
        """20h, 21h, A0h, A1h, 4D0h, 4D1h; bytes."""
        if port >= ELCR_FIRST:
            (self.slave if port & 1 else self.master).set_level_triggered(value)
        else:
            (self.slave if port & 0x80 else self.master).write(port & 1, value)

    def describe(self) -> str:
        """A line for each chip."""
        return f"pic0: {self.master.describe()}\npic1: {self.slave.describe()}"
