"""The 16550A serial port: registers, FIFOs and interrupts.

It must not know where the bytes go to or come from: output is a callable, input is injected with `receive`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from machine.clock import Clock
from machine.devices.device import Device, Line, Timer
from machine.ports import FOR_EVER_NS

COM1_FIRST_PORT = 0x3F8
COM1_IRQ = 4
COM2_FIRST_PORT = 0x2F8
COM2_IRQ = 3
PORTS = 8

Output = Callable[[bytes], None]

_NS_PER_S = 1_000_000_000
_CRYSTAL_HZ = 1_843_200
_CLOCKS_PER_BIT = 16
_FIFO_BYTES = 16
_TRIGGER_BYTES = (1, 4, 8, 14)
_TIMEOUT_CHARS = 4

_DATA, _IER, _IIR, _LCR, _MCR, LSR, _MSR, _SCRATCH = range(8)
_FCR = _IIR

_IER_RECEIVED = 0x01
_IER_TRANSMITTER = 0x02
_IER_LINE_STATUS = 0x04
_IER_MODEM_STATUS = 0x08

_IIR_NONE = 0x01
_IIR_MODEM_STATUS = 0x00
_IIR_TRANSMITTER = 0x02
_IIR_RECEIVED = 0x04
_IIR_LINE_STATUS = 0x06
_IIR_TIMEOUT = 0x0C
_IIR_FIFOS = 0xC0

_FCR_ENABLE = 0x01
_FCR_CLEAR_RECEIVER = 0x02

_LCR_DIVISOR = 0x80
_LCR_PARITY = 0x08
# By LCR bits 5 to 3 (stick, even, enable): none, odd, even, mark, space.
_PARITY_LETTERS = "nonenmns"
_LCR_TWO_STOP_BITS = 0x04

_MCR_DTR = 0x01
_MCR_RTS = 0x02
_MCR_OUT1 = 0x04
_MCR_OUT2 = 0x08
_MCR_LOOP = 0x10

_LSR_DATA = 0x01
_LSR_OVERRUN = 0x02
_LSR_BREAK = 0x10
_LSR_ERRORS = 0x1E
_LSR_EMPTY = 0x60
_LSR_FIFO_ERROR = 0x80

_MSR_CTS = 0x10
_MSR_DSR = 0x20
_MSR_RI = 0x40
_MSR_DCD = 0x80
_MSR_RI_FELL = 0x04
_MSR_CONNECTED = _MSR_CTS | _MSR_DSR | _MSR_DCD


class Uart(Device):
    """One serial port with a terminal at the other end that is always ready (CTS, DSR and DCD are up).

    A transmitted byte is passed to `output` at once, and the transmitter is empty again at once: a kernel that polls
    LSR would otherwise spend most of its instructions in waiting (87,000 for each byte at 115200 baud and one
    nanosecond an instruction). The interrupt line still falls and rises with each byte, as an edge-triggered
    controller needs.

    Injected input waits in a queue without bound and is never lost there. A byte enters the empty receiver at once,
    and the FIFO one character time after the byte before, so trigger levels and the time-out interrupt work as on a
    real line.

    With `gated_by_out2` the interrupt reaches the line only while MCR.OUT2 is up, as on a real PC's card. Without, as
    in QEMU, it always does: xv6 and JOS clear MCR and still expect their interrupts.

    Source: National PC16550D data sheet.
    """

    _saved: ClassVar[tuple[str, ...]] = (
        "queue", "fifo", "fifos_enabled", "trigger", "enables", "line_control", "modem_control", "errors",
        "modem_status", "scratch", "divisor", "transmitter_pending", "timeout_pending", "last_data", "irq_level",
        "arrival", "timeout",
    )  # fmt: skip

    def __init__(self, clock: Clock, irq: Line, output: Output | None, *, gated_by_out2: bool = False) -> None:
        self._clock = clock
        self._irq = irq
        self._output = output
        self._gated = gated_by_out2
        self.queue = bytearray()
        self.fifo = bytearray()
        self.arrival = Timer(clock, self._arrive)
        self.timeout = Timer(clock, self._time_out)
        self.power_on()

    def power_on(self) -> None:
        """Master reset, and nothing is on the line."""
        self.queue.clear()
        self.divisor = 12
        self.scratch = 0
        self.last_data = 0
        self.reset()

    def reset(self) -> None:
        """Master reset; injected input that has not arrived yet stays in its queue."""
        self.fifo.clear()
        self.fifos_enabled = False
        self.trigger = _TRIGGER_BYTES[0]
        self.enables = 0
        self.line_control = 0
        self.modem_control = 0
        self.errors = 0
        self.modem_status = _MSR_CONNECTED
        self.transmitter_pending = False
        self.timeout_pending = False
        self.arrival.disarm()
        self.timeout.disarm()
        self.irq_level = False
        self._irq(False)
        self._admit()

    @property
    def receives_by_interrupt(self) -> bool:
        """The guest has asked for an interrupt for received bytes."""
        return bool(self.enables & _IER_RECEIVED)

    @property
    def queued_bytes(self) -> int:
        """Injected bytes that the guest has not read; a source that wants to be polite waits while they are many."""
        return len(self.queue) + len(self.fifo)

    @property
    def char_ns(self) -> int:
        """The time of one character on the line."""
        bits = 7 + (self.line_control & 3)
        bits += bool(self.line_control & _LCR_PARITY) + bool(self.line_control & _LCR_TWO_STOP_BITS)
        return bits * _CLOCKS_PER_BIT * max(1, self.divisor) * _NS_PER_S // _CRYSTAL_HZ

    def receive(self, data: bytes) -> None:
        """Inject `data` at the current icount; it arrives as fast as the line and the guest allow."""
        self.queue += data
        self._admit()

    def receive_break(self) -> None:
        """Inject a break: a zero byte with the break bit, if there is room in the receiver."""
        if len(self.fifo) < self._capacity:
            self.errors |= _LSR_BREAK
            self._put(0)

    @property
    def _capacity(self) -> int:
        return _FIFO_BYTES if self.fifos_enabled else 1

    @property
    def _loops(self) -> bool:
        return bool(self.modem_control & _MCR_LOOP)

    def _admit(self) -> None:
        """Let the next injected byte in: at once into an empty receiver, else when its character time is over."""
        if not self.queue or self._loops:
            return
        if not self.fifo:
            self._arrive()
        elif not self.arrival.armed and len(self.fifo) < self._capacity:
            self.arrival.arm(self._clock.now_ns + self.char_ns)

    def _arrive(self) -> None:
        self.arrival.disarm()
        if self.queue and not self._loops and len(self.fifo) < self._capacity:
            byte = self.queue[0]
            del self.queue[0]
            self._put(byte)
            self._admit()

    def _put(self, byte: int) -> None:
        self.fifo.append(byte)
        self._watch()
        self._update()

    def _watch(self) -> None:
        """Start the time-out anew; it runs while the FIFO has something."""
        self.timeout_pending = False
        if self.fifos_enabled and self.fifo:
            self.timeout.arm(self._clock.now_ns + _TIMEOUT_CHARS * self.char_ns)
        else:
            self.timeout.disarm()

    def _time_out(self) -> None:
        self.timeout_pending = True
        self._update()

    @property
    def _cause(self) -> int:
        """The pending interrupt of the highest priority, as IIR shows it."""
        if self.enables & _IER_LINE_STATUS and self.errors:
            return _IIR_LINE_STATUS
        if self.enables & _IER_RECEIVED:
            if len(self.fifo) >= self.trigger:
                return _IIR_RECEIVED
            if self.timeout_pending:
                return _IIR_TIMEOUT
        if self.enables & _IER_TRANSMITTER and self.transmitter_pending:
            return _IIR_TRANSMITTER
        if self.enables & _IER_MODEM_STATUS and self.modem_status & 0x0F:
            return _IIR_MODEM_STATUS
        return _IIR_NONE

    def _update(self) -> None:
        level = self._cause != _IIR_NONE and (not self._gated or bool(self.modem_control & _MCR_OUT2))
        if level != self.irq_level:
            self.irq_level = level
            self._irq(level)

    def _read_data(self) -> int:
        if self.fifo:
            self.last_data = self.fifo[0]
            del self.fifo[0]
        self._watch()
        # The line falls here if this was the last byte, so that the next one makes an edge.
        self._update()
        self._admit()
        return self.last_data

    def _write_data(self, byte: int) -> None:
        self.transmitter_pending = False
        self._update()
        if not self._loops:
            if self._output is not None:
                self._output(bytes((byte,)))
        elif len(self.fifo) < self._capacity:
            self._put(byte)
        else:
            # The FIFO keeps what it has, the single register takes the new byte.
            self.errors |= _LSR_OVERRUN
            if not self.fifos_enabled:
                self.fifo[0] = byte
        self.transmitter_pending = True
        self._update()

    def _write_enables(self, value: int) -> None:
        newly = value & ~self.enables
        self.enables = value & 0x0F
        if newly & _IER_TRANSMITTER:
            self.transmitter_pending = True
        self._update()

    def _write_fifo_control(self, value: int) -> None:
        enable = bool(value & _FCR_ENABLE)
        if enable != self.fifos_enabled or (enable and value & _FCR_CLEAR_RECEIVER):
            self.fifo.clear()
            self.arrival.disarm()
        self.fifos_enabled = enable
        self.trigger = _TRIGGER_BYTES[value >> 6] if enable else _TRIGGER_BYTES[0]
        self._watch()
        self._update()
        self._admit()

    def _write_modem_control(self, value: int) -> None:
        self.modem_control = value & 0x1F
        lines = _MSR_CONNECTED
        if self._loops:
            lines = _MSR_CTS if value & _MCR_RTS else 0
            lines |= _MSR_DSR if value & _MCR_DTR else 0
            lines |= _MSR_RI if value & _MCR_OUT1 else 0
            lines |= _MSR_DCD if value & _MCR_OUT2 else 0
        changed = lines ^ self.modem_status & 0xF0
        deltas = changed >> 4
        if lines & _MSR_RI:
            # Only the trailing edge of the ring indicator counts.
            deltas &= ~_MSR_RI_FELL
        self.modem_status = lines | self.modem_status & 0x0F | deltas
        self._update()
        self._admit()

    def _read_cause(self) -> int:
        cause = self._cause
        if cause == _IIR_TRANSMITTER:
            self.transmitter_pending = False
            self._update()
        return cause | (_IIR_FIFOS if self.fifos_enabled else 0)

    def _read_line_status(self) -> int:
        status = _LSR_EMPTY | self.errors | (_LSR_DATA if self.fifo else 0)
        if self.fifos_enabled and self.errors & ~_LSR_OVERRUN:
            status |= _LSR_FIFO_ERROR
        self.errors = 0
        self._update()
        return status

    def _read_modem_status(self) -> int:
        status = self.modem_status
        self.modem_status &= 0xF0
        self._update()
        return status

    def load_port(self, port: int, size_bytes: int) -> int:  # noqa: ARG002
        """The register at `port`'s low three bits."""
        register = port & 7
        if self.line_control & _LCR_DIVISOR and register <= _IER:
            return self.divisor >> 8 * register & 0xFF
        match register:
            case 0:
                return self._read_data()
            case 1:
                return self.enables
            case 2:
                return self._read_cause()
            case 3:
                return self.line_control
            case 4:
                return self.modem_control
            case 5:
                return self._read_line_status()
            case 6:
                return self._read_modem_status()
            case _:
                return self.scratch

    def line_status_steady_until_ns(self) -> int:
        """For ever, unless reading LSR takes errors away."""
        return 0 if self.errors else FOR_EVER_NS

    def store_port(self, port: int, size_bytes: int, value: int) -> None:  # noqa: ARG002
        """The register at `port`'s low three bits; LSR and MSR ignore writes."""
        register = port & 7
        if self.line_control & _LCR_DIVISOR and register <= _IER:
            shift = 8 * register
            self.divisor = self.divisor & ~(0xFF << shift) | value << shift
        elif register == _DATA:
            self._write_data(value)
        elif register == _IER:
            self._write_enables(value)
        elif register == _FCR:
            self._write_fifo_control(value)
        elif register == _LCR:
            self.line_control = value
        elif register == _MCR:
            self._write_modem_control(value)
        elif register == _SCRATCH:
            self.scratch = value

    def describe(self) -> str:
        """Line settings, registers and what waits."""
        baud = _CRYSTAL_HZ // _CLOCKS_PER_BIT // max(1, self.divisor)
        parity = _PARITY_LETTERS[self.line_control >> 3 & 7]
        stop = 2 if self.line_control & _LCR_TWO_STOP_BITS else 1
        return (
            f"{baud} {5 + (self.line_control & 3)}{parity}{stop} ier={self.enables:02x} lcr={self.line_control:02x} "
            f"mcr={self.modem_control:02x} msr={self.modem_status:02x} fifo={len(self.fifo)}/{self._capacity} "
            f"trigger={self.trigger} queued={len(self.queue)} irq={int(self.irq_level)}"
        )
