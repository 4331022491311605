"""The keyboard controller with its two devices, at register level."""

from __future__ import annotations

import pytest

from machine.clock import Clock
from machine.devices.device import unconnected
from machine.devices.i8042 import I8042
from machine.devices.ps2_keyboard import SET2_TO_SET1, Ps2Keyboard, scan_codes
from machine.devices.ps2_mouse import Ps2Mouse
from machine.devices.system_control import A20Gate
from tests.machine.devices.rig import Wire, advance

PACE_NS = 10_000
IRQ1, IRQ12, TRANSLATE = 0x01, 0x02, 0x40


class Controller:
    def __init__(self, config: int = IRQ1 | IRQ12) -> None:
        self.clock = Clock()
        self.irq1, self.irq12 = Wire(self.clock), Wire(self.clock)
        self.resets = 0
        self.a20 = A20Gate(unconnected)
        self.i8042 = I8042(self.clock, self.irq1, self.irq12, self.a20, self._reset)
        self.keyboard = Ps2Keyboard(self.i8042.update)
        self.mouse = Ps2Mouse(self.i8042.update)
        self.i8042.plug(self.keyboard, self.mouse)
        self.command(0x60, config)

    def _reset(self) -> None:
        self.resets += 1

    def command(self, command: int, *data: int) -> None:
        self.i8042.store_port(0x64, 1, command)
        for value in data:
            self.write(value)

    def write(self, value: int) -> None:
        self.i8042.store_port(0x60, 1, value)

    @property
    def status(self) -> int:
        return self.i8042.load_port(0x64, 1)

    def read(self) -> int:
        return self.i8042.load_port(0x60, 1)

    def drain(self) -> bytes:
        """Read all that comes, waiting for each byte as long as a driver would."""
        data = bytearray()
        while True:
            if not self.status & 1:
                advance(self.clock, PACE_NS)
            if not self.status & 1:
                return bytes(data)
            data.append(self.read())

    def aux(self, *values: int) -> bytes:
        """Send each byte to the mouse; what it answers."""
        data = b""
        for value in values:
            self.command(0xD4, value)
            data += self.drain()
        return data


def test_status_after_reset() -> None:
    i8042 = I8042(Clock(), unconnected, unconnected, A20Gate(unconnected), lambda: None)
    assert i8042.load_port(0x64, 1) == 0x18


@pytest.mark.parametrize(
    ("command", "reply"), [(0xAA, 0x55), (0xAB, 0x00), (0xA9, 0x00), (0xC0, 0x80), (0xD0, 0xCF), (0xE0, 0x00)]
)
def test_commands_that_answer(command: int, reply: int) -> None:
    controller = Controller()
    controller.command(command)
    assert controller.status & 0x29 == 0x09
    assert controller.irq1.level
    assert controller.read() == reply
    assert (controller.status & 1, controller.irq1.level) == (0, False)
    assert controller.read() == reply, "the buffer keeps its last byte"


def test_the_command_flag_tells_the_port_of_the_last_write() -> None:
    controller = Controller()
    controller.command(0xAE)
    assert controller.status & 8
    controller.write(0xF4)
    assert not controller.status & 8


def test_configuration_and_ram() -> None:
    controller = Controller()
    controller.command(0x60, 0x65)
    controller.command(0x7F, 0xA5)
    answers = []
    for command in (0x20, 0x3F, 0x21):
        controller.command(command)
        answers.append(controller.read())
    assert answers == [0x65, 0xA5, 0x00]
    assert controller.status & 4, "the system flag is bit 2 of the configuration"
    controller.command(0x60, 0x63)
    assert not controller.status & 4
    controller.command(0xAA)
    assert controller.status & 4


def test_ports_are_switched_by_command_and_by_use() -> None:
    controller = Controller()
    seen = []
    for action in ((0xAD,), (0xA7,), (0xAE,), (0xA8,), (0xAD,), (0xA7,), (0xD4, 0xF4)):
        controller.command(*action)
        controller.command(0x20)
        controller.drain()
        seen.append(controller.i8042.ram[0] & 0x30)
    assert seen == [0x10, 0x30, 0x20, 0x00, 0x10, 0x30, 0x10]
    controller.write(0xF4)
    assert controller.i8042.ram[0] & 0x30 == 0


def test_a_port_that_is_off_holds_its_device_back() -> None:
    controller = Controller()
    controller.command(0xAD)
    controller.keyboard.press(b"\x1c")
    assert not controller.status & 1
    controller.command(0xAE)
    assert (controller.status & 0x21, controller.read()) == (1, 0x1C)


def test_output_port_drives_a20_and_reset() -> None:
    controller = Controller()
    seen = []
    for action in ((0xD1, 0xCD), (0xD1, 0xCF), (0xDD,), (0xDF,)):
        controller.command(*action)
        seen.append(controller.a20.enabled)
    assert (seen, controller.resets) == ([False, True, False, True], 0)
    controller.command(0xD1, 0xCE)
    assert controller.resets == 1


@pytest.mark.parametrize(("command", "resets"), [(0xFE, 1), (0xF0, 1), (0xFF, 0), (0xF1, 0), (0xEE, 0)])
def test_pulsing_bit_0_resets(command: int, resets: int) -> None:
    controller = Controller()
    controller.command(command)
    assert controller.resets == resets


def test_output_port_shows_the_buffer() -> None:
    controller = Controller()
    controller.a20.set_enabled(False)
    controller.command(0xD2, 0x55)
    assert controller.i8042._output_port == 0xDD
    controller.read()
    controller.command(0xD3, 0x55)
    assert controller.i8042._output_port == 0xED


def test_bytes_put_into_the_buffer_by_hand() -> None:
    controller = Controller(IRQ1 | IRQ12 | TRANSLATE)
    controller.command(0xD2, 0x1C)
    assert (controller.status & 0x21, controller.irq1.level, controller.irq12.level) == (0x01, True, False)
    assert controller.read() == 0x1C, "not translated"
    controller.command(0xD3, 0x55)
    assert (controller.status & 0x21, controller.irq1.level, controller.irq12.level) == (0x21, False, True)
    assert controller.read() == 0x55


def test_a_reply_waits_for_a_byte_that_was_not_read() -> None:
    controller = Controller()
    controller.keyboard.press(b"\x1c")
    controller.command(0xAA)
    assert (controller.read(), controller.read()) == (0x1C, 0x55)
    assert len(controller.irq1.rises) == 2, "the line fell between them"


def test_interrupts_only_where_the_configuration_says_so() -> None:
    controller = Controller(0)
    controller.keyboard.press(b"\x1c")
    assert (controller.status & 1, controller.irq1.level) == (1, False)
    controller.command(0x60, IRQ1)
    assert controller.irq1.level


def test_each_byte_makes_an_edge_ten_microseconds_after_the_one_before() -> None:
    controller = Controller()
    controller.keyboard.press(b"\x1c\x1b\x23")
    assert controller.read() == controller.read() == 0x1C
    advance(controller.clock, PACE_NS - 1)
    assert not controller.status & 1
    advance(controller.clock, 1)
    assert controller.read() == 0x1B
    advance(controller.clock, 5 * PACE_NS)
    assert controller.read() == 0x23
    assert controller.irq1.rises == [0, PACE_NS, 2 * PACE_NS]


def test_translation_to_set_1() -> None:
    controller = Controller(IRQ1 | TRANSLATE)
    controller.keyboard.press(bytes.fromhex("1c f01c e075 e0f075 83 7e"))
    assert controller.drain() == bytes.fromhex("1e 9e e048 e0c8 41 46")


def test_a_doubled_break_prefix_does_not_stall_the_port() -> None:
    controller = Controller(IRQ1 | TRANSLATE)
    controller.keyboard.press(b"\xf0\xf0\x1c\x1c")
    assert controller.drain() == b"\x9e\x1e"


# A sample of the keyboard chapter's table of key numbers: set 2 code, set 1 code.
@pytest.mark.parametrize(
    ("set2", "set1"),
    [(0x76, 0x01), (0x16, 0x02), (0x66, 0x0E), (0x15, 0x10), (0x5A, 0x1C), (0x14, 0x1D), (0x1C, 0x1E), (0x12, 0x2A),
     (0x1A, 0x2C), (0x59, 0x36), (0x11, 0x38), (0x29, 0x39), (0x58, 0x3A), (0x05, 0x3B), (0x83, 0x41), (0x09, 0x44),
     (0x77, 0x45), (0x6C, 0x47), (0x70, 0x52), (0x71, 0x53), (0x78, 0x57), (0x07, 0x58), (0xAA, 0xAA), (0xFA, 0xFA)],
)  # fmt: skip
def test_translation_table(set2: int, set1: int) -> None:
    assert SET2_TO_SET1[set2] == set1


def test_translation_is_one_to_one_for_keys() -> None:
    assert len(SET2_TO_SET1) == 256
    assert len(set(SET2_TO_SET1[:0x80])) == 0x80


@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        ([0xEE], "ee"), ([0xF2], "fa ab 83"), ([0xFF], "fa aa"), ([0xF4], "fa"), ([0xF5], "fa"), ([0xF6], "fa"),
        ([0xED, 0x07], "fa fa"), ([0xF3, 0x20], "fa fa"), ([0xF0, 0x02], "fa fa"), ([0xF0, 0x00], "fa fa 02"),
        ([0xF0, 0x03], "fa fe"), ([0xF7], "fa"), ([0xFB, 0x1C], "fa fa"), ([0xE7], "fe"), ([0x00], "fe"),
        ([0xFE], "00"), ([0xEE, 0xFE], "ee ee"), ([0xED, 0xF4], "fa fa"),
    ],
)  # fmt: skip
def test_keyboard_commands(sent: list[int], answer: str) -> None:
    controller = Controller()
    data = b""
    for value in sent:
        controller.write(value)
        data += controller.drain()
    assert data == bytes.fromhex(answer)


def test_leds_and_rate() -> None:
    controller = Controller()
    for value in (0xED, 0x05, 0xF3, 0x7F):
        controller.write(value)
        controller.drain()
    assert (controller.keyboard.leds, controller.keyboard.rate) == (5, 0x7F)
    assert controller.keyboard.describe() == "keyboard: scans set=2 leds=SC replies=0 keys=0"


def test_resets_of_the_keyboard() -> None:
    controller = Controller()
    controller.keyboard.press(b"\x1c\x1b")
    for value in (0xED, 0x07, 0xF5, 0xFF):
        controller.write(value)
        controller.drain()
    assert (controller.keyboard.leds, controller.keyboard.scanning) == (0, True)
    controller.keyboard.press(b"\x1c\x1b")
    controller.keyboard.reset()
    assert controller.keyboard.pending, "what was typed stays"
    controller.keyboard.power_on()
    assert not controller.keyboard.pending


def test_keys_wait_while_scanning_is_off() -> None:
    controller = Controller()
    controller.write(0xF5)
    assert controller.drain() == b"\xfa"
    controller.keyboard.press(b"\x1c")
    assert controller.drain() == b""
    controller.write(0xF4)
    assert controller.drain() == b"\xfa\x1c"


def test_keys_wait_for_the_parameter_of_a_command() -> None:
    controller = Controller()
    controller.write(0xED)
    assert controller.drain() == b"\xfa"
    controller.keyboard.press(b"\x1c")
    assert controller.drain() == b""
    controller.write(0x00)
    assert controller.drain() == b"\xfa\x1c"


def test_scan_code_set_1_of_the_keyboard_itself() -> None:
    controller = Controller()
    for value in (0xF0, 0x01):
        controller.write(value)
        controller.drain()
    controller.keyboard.press(bytes.fromhex("1c f01c e0f075"))
    assert controller.drain() == bytes.fromhex("1e 9e e0c8")


def test_an_old_reply_gives_way_to_a_new_command() -> None:
    controller = Controller()
    controller.keyboard.press(b"\x1c")
    for _ in range(1000):
        controller.write(0xF2)
    assert controller.drain() == b"\x1c\xfa\xab\x83"


@pytest.mark.parametrize(
    ("text", "codes"),
    [
        ("a", "1c f01c"),
        ("A", "12 1c f01c f012"),
        ("1!", "16 f016 12 16 f016 f012"),
        ("\n", "5a f05a"),
        (" ", "29 f029"),
        ("\r", "5a f05a"),
        ("\t", "0d f00d"),
        ("\b", "66 f066"),
        ("\x7f", "66 f066"),
        ("\x1b", "76 f076"),
        ("p]'/", "4d f04d 5b f05b 52 f052 4a f04a"),
        ("`=\\", "0e f00e 55 f055 5d f05d"),
    ],
)
def test_typing(text: str, codes: str) -> None:
    assert scan_codes(text) == bytes.fromhex(codes)


def test_every_printable_character_has_a_key_and_others_are_refused() -> None:
    printable = "".join(map(chr, range(0x20, 0x7F)))
    singles = {scan_codes(character) for character in printable}
    assert len(singles) == len(printable)
    with pytest.raises(ValueError, match="no key for 'ß'"):
        Controller().keyboard.type_text("ß")


def test_typed_text_arrives() -> None:
    controller = Controller(IRQ1 | TRANSLATE)
    controller.keyboard.type_text("Hi")
    assert controller.drain() == bytes.fromhex("2a 23 a3 aa 17 97")


@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        ([0xFF], "fa aa 00"), ([0xF2], "fa 00"), ([0xE9], "fa 00 02 64"), ([0xE8, 3, 0xE9], "fa fa fa 00 03 64"),
        ([0xF3, 80, 0xF4, 0xE7, 0xE9], "fa fa fa fa fa 30 02 50"), ([0xF0, 0xE9], "fa fa 40 02 64"),
        ([0xEB], "fa 08 00 00"), ([0xF4, 0xF5, 0xE9], "fa fa fa 00 02 64"),
        ([0xEE, 0x55, 0xEC], "fa 55 fa"), ([0xE1], "fe"), ([0xF2, 0xFE], "fa 00 00"),
    ],
)  # fmt: skip
def test_mouse_commands(sent: list[int], answer: str) -> None:
    controller = Controller()
    assert controller.aux(*sent) == bytes.fromhex(answer)
    assert (controller.irq1.rises, len(controller.irq12.rises) > 0) == ([], True)


def test_mouse_reports() -> None:
    controller = Controller()
    controller.mouse.move(5, -3, 1)
    assert controller.drain() == b"", "not before it is told to"
    assert controller.aux(0xF4) == bytes.fromhex("fa 29 05 fd")
    controller.mouse.move(1, 0)
    for _ in range(100):
        controller.mouse.move(-4, 3)
    assert controller.drain() == bytes.fromhex("08 01 00 18 01 ff"), "what comes meanwhile adds up to the limit"


def test_keyboard_goes_before_the_mouse() -> None:
    controller = Controller()
    controller.aux(0xF4)
    controller.command(0xD2, 0x00)
    controller.mouse.move(1, 1)
    controller.keyboard.press(b"\x1c")
    assert controller.drain() == bytes.fromhex("00 1c 08 01 01")
