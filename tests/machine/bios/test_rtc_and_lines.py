"""INT 1Ah, 14h and 17h on the board's own devices."""

from collections.abc import Iterator

import pytest

from machine.bios import bda
from machine.devices.rtc import START_DATE
from tests.machine.bios.pc import Pc

CLOCK, SERIAL, PRINTER = 0x1A, 0x14, 0x17


@pytest.fixture
def pc() -> Iterator[Pc]:
    made = Pc()
    made.firmware.self_test()
    yield made
    made.close()


def bcd(number: int) -> int:
    return number // 10 << 4 | number % 10


def test_time_and_date_are_the_clocks(pc: Pc) -> None:
    frame = pc.call(CLOCK, ah=0x02)
    assert (frame.ch, frame.cl, frame.carry) == (bcd(START_DATE.hour), bcd(START_DATE.minute), False)
    frame = pc.call(CLOCK, ah=0x04)
    assert (frame.cx, frame.dh, frame.dl) == (0x2006, bcd(START_DATE.month), bcd(START_DATE.day))


def test_set_time_and_date(pc: Pc) -> None:
    pc.call(CLOCK, ah=0x05, cx=0x1999, dx=0x1231)
    pc.call(CLOCK, ah=0x03, cx=0x2359, dx=0x5800)
    time, date = pc.call(CLOCK, ah=0x02), pc.call(CLOCK, ah=0x04)
    assert (time.cx, time.dh) == (0x2359, 0x58)
    assert (date.cx, date.dx) == (0x1999, 0x1231)


def test_ticks_start_at_the_time_of_day(pc: Pc) -> None:
    frame = pc.call(CLOCK)
    seconds = START_DATE.hour * 3600 + START_DATE.minute * 60 + START_DATE.second
    assert abs((frame.cx << 16 | frame.dx) - seconds * 1573040 / 86400) < 19
    assert frame.al == 0


def test_midnight_is_told_once(pc: Pc) -> None:
    pc.memory.store(bda.TICKS_MIDNIGHT, 1, 1)
    assert pc.call(CLOCK).al == 1
    assert pc.call(CLOCK).al == 0
    pc.memory.store(bda.TICKS_MIDNIGHT, 1, 1)
    pc.call(CLOCK, ah=0x01, cx=1, dx=2)
    frame = pc.call(CLOCK)
    assert (frame.al, frame.cx, frame.dx) == (0, 1, 2)


def test_alarm(pc: Pc) -> None:
    assert not pc.call(CLOCK, ah=0x06, cx=0x1200, dx=0x3000).carry
    assert pc.call(CLOCK, ah=0x06, cx=0x1200, dx=0x3000).carry
    assert [pc.platform.read_cmos(index) for index in (5, 3, 1)] == [0x12, 0x00, 0x30]
    pc.clock.idle_ns += 31_000_000_000
    pc.clock.run_due()
    assert pc.call(0x70).al == 1
    assert pc.call(0x70).al == 0
    pc.call(CLOCK, ah=0x07)
    assert not pc.call(CLOCK, ah=0x06, cx=0x1200, dx=0x3000).carry


@pytest.mark.parametrize("ah", [0x08, 0xB1, 0xFF])
def test_other_clock_functions_fail(pc: Pc, ah: int) -> None:
    assert pc.call(CLOCK, ah=ah).carry


def test_serial_lines_are_found(pc: Pc) -> None:
    assert [pc.number(bda.COM_PORTS + 2 * index, 2) for index in range(4)] == [0x3F8, 0x2F8, 0, 0]
    assert pc.call(0x11).ax >> 9 & 7 == 2


def test_serial_send_and_receive() -> None:
    pc = Pc()
    sent = bytearray()
    pc.board.com1._output = sent.extend
    pc.firmware.self_test()
    pc.call(SERIAL, ax=0x00E3)
    assert pc.call(SERIAL, ax=0x0141).ah & 0x80 == 0
    assert sent == b"A"
    pc.board.com1.receive(b"z")
    pc.clock.idle_ns += 10_000_000
    pc.clock.run_due()
    frame = pc.call(SERIAL, ah=0x02)
    assert (frame.al, frame.ah & 0x80) == (ord("z"), 0)
    pc.close()


@pytest.mark.parametrize(
    ("al", "baud"), [(al << 5 | 3, baud) for al, baud in enumerate((110, 150, 300, 600, 1200, 2400, 4800, 9600))]
)
def test_serial_set_up(pc: Pc, al: int, baud: int) -> None:
    pc.call(SERIAL, ax=al)
    ports = pc.board.ports
    assert ports.load(0x3FB, 1) == 0x03
    ports.store(0x3FB, 1, 0x83)
    divisor = ports.load(0x3F8, 1) | ports.load(0x3F9, 1) << 8
    assert divisor == round(115200 / baud)
    ports.store(0x3FB, 1, 0x03)
    assert ports.load(0x3F9, 1) == 0


def test_serial_receive_times_out(pc: Pc) -> None:
    frame = pc.call(SERIAL, ah=0x02, al=0x55)
    waits = 0
    while frame.attempt:
        waits += 1
        frame = pc.call_again()
    assert (waits, frame.ah & 0x80, frame.al) == (18, 0x80, 0x55)


def test_lines_that_are_not_there(pc: Pc) -> None:
    for line in (2, 3, 4, 0xFFFF):
        frame = pc.call(SERIAL, ax=0x0341, dx=line)
        assert (frame.ax, frame.carry) == (0x0341, True)
    assert pc.call(PRINTER, ah=0x02).ah == 0x01
    assert pc.call(PRINTER, ah=0x02, dx=3).ah == 0x02
