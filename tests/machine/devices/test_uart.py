"""The 16550A: registers, FIFOs, interrupt priorities, and the pace of injected input."""

from __future__ import annotations

import pytest

from machine.clock import NEVER_ICOUNT, Clock
from machine.devices.device import unconnected
from machine.devices.uart import Uart
from tests.machine.devices.rig import Wire, advance

DATA, IER, IIR, LCR, MCR, LSR, MSR, SCR = range(8)
FCR = IIR
CHAR_NS = 10 * 16 * 1_000_000_000 // 1_843_200  # 8N1 at 115200 baud


class Port:
    def __init__(self, *, divisor: int = 1, out2: bool = False) -> None:
        self.clock = Clock()
        self.wire = Wire(self.clock)
        self.sent = bytearray()
        self.uart = Uart(self.clock, self.wire, self._send, gated_by_out2=out2)
        self.out(LCR, 0x83)
        self.out(DATA, divisor & 0xFF)
        self.out(IER, divisor >> 8)
        self.out(LCR, 0x03)

    def _send(self, data: bytes) -> None:
        self.sent += data

    def out(self, register: int, *values: int) -> None:
        for value in values:
            self.uart.store_port(0x3F8 + register, 1, value)

    def read(self, register: int) -> int:
        return self.uart.load_port(0x3F8 + register, 1)

    def drain(self) -> bytes:
        """Read while LSR has data."""
        data = bytearray()
        while self.read(LSR) & 1:
            data.append(self.read(DATA))
        return bytes(data)


def test_registers_after_reset() -> None:
    uart = Uart(Clock(), unconnected, None)
    assert [uart.load_port(0x3F8 + register, 1) for register in range(8)] == [0, 0, 1, 0, 0, 0x60, 0xB0, 0]
    uart.store_port(0x3F8, 1, 0x41)


def test_divisor_latch_hides_data_and_enables() -> None:
    port = Port()
    port.out(IER, 0xFF)
    port.out(LCR, 0x83)
    port.out(DATA, 0x34)
    port.out(IER, 0x12)
    assert (port.read(DATA), port.read(IER)) == (0x34, 0x12)
    port.out(LCR, 0x03)
    assert (port.read(IER), port.read(LCR), bytes(port.sent)) == (0x0F, 0x03, b"")


def test_bytes_go_out_at_once_and_the_transmitter_stays_empty() -> None:
    port = Port()
    for byte in b"trapgate":
        assert port.read(LSR) == 0x60
        port.out(DATA, byte)
    assert port.sent == b"trapgate"
    assert port.clock.now_ns == 0


def test_transmitter_interrupt_makes_an_edge_for_each_byte() -> None:
    port = Port()
    port.out(IER, 0x02)
    assert (len(port.wire.rises), port.read(IIR), port.read(IIR), port.wire.level) == (1, 0x02, 0x01, False)
    port.out(DATA, 0x41)
    assert (len(port.wire.rises), port.wire.level) == (2, True)
    port.out(DATA, 0x42)
    assert (len(port.wire.rises), port.wire.level) == (3, True)
    port.out(IER, 0x00)
    assert not port.wire.level
    port.out(IER, 0x02)
    assert port.read(IIR) == 0x02


def test_one_byte_at_a_time_without_fifos() -> None:
    port = Port()
    port.out(IER, 0x01)
    port.uart.receive(b"abc")
    assert (port.read(IIR), port.read(LSR), port.wire.rises) == (0x04, 0x61, [0])
    advance(port.clock, 100 * CHAR_NS)
    assert port.uart.queued_bytes == 3, "the receiver is full; the rest waits"
    assert port.read(DATA) == ord("a")
    assert len(port.wire.rises) == 2, "the next byte makes a new edge"
    assert (port.read(DATA), port.read(DATA), port.read(LSR), port.read(DATA)) == (ord("b"), ord("c"), 0x60, ord("c"))
    assert not port.wire.level


@pytest.mark.parametrize(("control", "trigger"), [(0x01, 1), (0x41, 4), (0x81, 8), (0xC1, 14)])
def test_trigger_levels(control: int, trigger: int) -> None:
    port = Port()
    port.out(FCR, control)
    port.out(IER, 0x01)
    port.uart.receive(bytes(range(20)))
    advance(port.clock, 100 * CHAR_NS)
    assert port.wire.rises == [(trigger - 1) * CHAR_NS]
    assert port.read(IIR) == 0xC4
    for _ in range(16 - trigger + 1):
        assert port.wire.level
        port.read(DATA)
    assert port.read(IIR) == (0xC1 if trigger > 1 else 0xC4)


def test_the_fifo_takes_sixteen_and_the_rest_waits() -> None:
    port = Port()
    port.out(FCR, 0x01)
    port.uart.receive(bytes(range(40)))
    advance(port.clock, 100 * CHAR_NS)
    assert (len(port.uart.fifo), port.uart.queued_bytes) == (16, 40)
    assert port.drain() == bytes(range(40)), "one that polls never waits for the line"


def test_time_out_interrupt() -> None:
    port = Port()
    port.out(FCR, 0xC1)
    port.out(IER, 0x01)
    port.uart.receive(b"ab")
    advance(port.clock, 100 * CHAR_NS)
    assert port.wire.rises == [5 * CHAR_NS], "four characters after the last that came"
    assert port.read(IIR) == 0xCC
    start = port.clock.now_ns
    assert port.read(DATA) == ord("a")
    assert (port.wire.level, port.read(IIR)) == (False, 0xC1)
    advance(port.clock, 100 * CHAR_NS)
    assert port.wire.rises == [5 * CHAR_NS, start + 4 * CHAR_NS]
    assert port.read(DATA) == ord("b")
    advance(port.clock, 100 * CHAR_NS)
    assert (port.wire.level, len(port.wire.rises)) == (False, 2)


def test_character_time_follows_divisor_and_format() -> None:
    port = Port(divisor=12)
    assert port.uart.char_ns == 10 * 16 * 12 * 1_000_000_000 // 1_843_200
    port.out(LCR, 0x1F)
    assert port.uart.char_ns == 12 * 16 * 12 * 1_000_000_000 // 1_843_200
    port.out(LCR, 0x80)
    port.out(DATA, 0)
    port.out(IER, 0)
    assert port.uart.char_ns == 7 * 16 * 1_000_000_000 // 1_843_200


def test_priorities() -> None:
    port = Port()
    port.out(MCR, 0x12)
    port.out(MCR, 0x10)
    port.out(IER, 0x0F)
    port.out(DATA, 1)
    port.out(DATA, 2)
    seen = []
    for register in (LSR, DATA, IIR, MSR):
        seen.append(port.read(IIR))
        if register != IIR:
            port.read(register)
    assert seen == [0x06, 0x04, 0x02, 0x00]
    assert (port.read(IIR), port.wire.level) == (0x01, False)


def test_overrun_in_loopback() -> None:
    port = Port()
    port.out(MCR, 0x10)
    port.out(DATA, 1, 2)
    assert (port.read(LSR), port.read(LSR), port.read(DATA)) == (0x63, 0x61, 2), "the register takes the newer byte"
    port.out(FCR, 0x01)
    port.out(DATA, *range(17))
    assert port.read(LSR) == 0x63
    assert port.drain() == bytes(range(16)), "the FIFO keeps the older"
    assert port.sent == b""


@pytest.mark.parametrize(
    ("control", "status"), [(0x10, 0x00), (0x11, 0x20), (0x12, 0x10), (0x14, 0x40), (0x18, 0x80), (0x1F, 0xF0)]
)
def test_modem_lines_in_loopback(control: int, status: int) -> None:
    port = Port()
    port.out(MCR, control)
    assert port.read(MSR) & 0xF0 == status
    assert port.read(MSR) == status


def test_modem_deltas() -> None:
    port = Port()
    assert port.read(MSR) == 0xB0
    port.out(MCR, 0x14)
    assert port.read(MSR) == 0x4B, "CTS, DSR and DCD fell; the rise of RI does not count"
    port.out(MCR, 0x10)
    assert port.read(MSR) == 0x04, "its fall does"
    port.out(MCR, 0x00)
    assert (port.read(MSR), port.read(MSR)) == (0xBB, 0xB0)


def test_input_waits_while_the_port_loops() -> None:
    port = Port()
    port.out(MCR, 0x10)
    port.uart.receive(b"x")
    assert port.read(LSR) == 0x60
    port.out(MCR, 0x00)
    assert port.drain() == b"x"


def test_out2_gates_the_interrupt_if_asked_for() -> None:
    for gated in (False, True):
        port = Port(out2=gated)
        port.out(IER, 0x02)
        assert port.wire.level == (not gated)
        port.out(MCR, 0x08)
        assert port.wire.level
        assert port.read(IIR) == 0x02


def test_fifo_control() -> None:
    port = Port()
    port.out(FCR, 0x01)
    port.uart.receive(b"ab")
    advance(port.clock, 10 * CHAR_NS)
    port.out(FCR, 0x03)
    assert (port.read(LSR), port.read(IIR)) == (0x60, 0xC1)
    port.uart.receive(b"c")
    port.out(FCR, 0x00)
    assert (port.read(LSR), port.read(IIR)) == (0x60, 0x01)


def test_fifo_control_clears_only_what_it_is_told_to() -> None:
    port = Port()
    port.uart.receive(b"a")
    port.out(FCR, 0x02)
    assert port.read(LSR) == 0x61, "without FIFOs the clear bits do nothing"
    port.out(FCR, 0x01)
    port.uart.receive(b"bc")
    port.out(FCR, 0xC1)
    assert port.read(LSR) == 0x61
    port.out(FCR, 0x03)
    assert (port.drain(), port.clock.now_ns) == (b"c", 0), "the next byte comes at once into the empty FIFO"


def test_reading_does_not_slow_the_line_down() -> None:
    port = Port()
    port.out(FCR, 0x01)
    port.uart.receive(b"abcd")
    advance(port.clock, CHAR_NS + CHAR_NS // 2)
    assert port.read(DATA) == ord("a")
    advance(port.clock, CHAR_NS // 2 + 1)
    assert bytes(port.uart.fifo) == b"bc"


def test_nothing_is_scheduled_when_nothing_waits() -> None:
    port = Port()
    port.out(FCR, 0xC1)
    port.uart.receive(b"ab")
    assert port.clock.deadline_icount == CHAR_NS
    assert port.drain() == b"ab"
    port.uart.receive(bytes(3))
    port.uart.reset()
    port.drain()
    assert port.clock.deadline_icount == NEVER_ICOUNT


def test_the_transmitter_interrupt_is_not_repeated_by_other_enables() -> None:
    port = Port()
    port.out(IER, 0x02)
    assert port.read(IIR) == 0x02
    port.out(IER, 0x03)
    assert port.read(IIR) == 0x01


def test_errors_do_not_interrupt_unless_enabled() -> None:
    port = Port()
    port.out(MCR, 0x10)
    port.out(IER, 0x09)
    port.read(MSR)
    port.out(DATA, 1, 2)
    assert port.read(IIR) == 0x04


def test_the_fifo_error_bit_is_for_breaks_in_the_fifo() -> None:
    port = Port()
    port.out(FCR, 0x01)
    port.uart.receive_break()
    assert (port.read(LSR), port.read(LSR)) == (0xF1, 0x61)


def test_break() -> None:
    port = Port()
    port.out(IER, 0x04)
    port.uart.receive_break()
    assert (port.wire.level, port.read(IIR), port.read(LSR), port.read(DATA)) == (True, 0x06, 0x71, 0)
    port.uart.receive(b"a")
    port.uart.receive_break()
    assert port.read(LSR) == 0x61, "no room, no break"


def test_scratch_and_unwritable_registers() -> None:
    port = Port()
    for register in (LSR, MSR, SCR):
        port.out(register, 0x5A)
    assert (port.read(LSR), port.read(MSR), port.read(SCR)) == (0x60, 0xB0, 0x5A)


def test_reset_keeps_what_waits_on_the_line_and_power_on_does_not() -> None:
    port = Port()
    port.uart.receive(b"abc")
    port.uart.reset()
    assert port.drain() == b"bc", "the byte in the receiver is gone"
    port.uart.receive(b"abc")
    port.uart.power_on()
    assert port.drain() == b""


def test_describe() -> None:
    port = Port()
    port.out(LCR, 0x1B)
    assert port.uart.describe().startswith("115200 8e1 ier=00 lcr=1b mcr=00 msr=b0 fifo=0/1")
