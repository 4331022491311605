"""VGA text mode: memory windows, register files, and the screen as people see it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from machine.clock import Clock
from machine.devices.vga import GLYPHS, WINDOW_BYTES, WINDOW_FIRST, Vga
from machine.memory import MIB, PhysicalMemory
from tests.machine.devices.rig import advance_to

TEXT = 0x18000
FRAME_NS = 900 * 449 * 1_000_000_000 / 28_322_000


_made: list[PhysicalMemory] = []


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    """The memory of adapters ends with the test."""
    yield
    while _made:
        _made.pop().close()


class Adapter:
    def __init__(self) -> None:
        self.clock = Clock()
        self.memory = PhysicalMemory(MIB)
        _made.append(self.memory)
        self.vga = Vga(self.clock, self.memory)
        self.memory.map_device(WINDOW_FIRST, WINDOW_BYTES, self.vga)

    def crtc(self, index: int, value: int) -> None:
        self.vga.store_port(0x3D4, 1, index)
        self.vga.store_port(0x3D5, 1, value)

    def read(self, port: int) -> int:
        return self.vga.load_port(port, 1)

    def out(self, port: int, value: int) -> None:
        self.vga.store_port(port, 1, value)

    def graphics(self, index: int, value: int) -> None:
        self.out(0x3CE, index)
        self.out(0x3CF, value)

    def write(self, text: str, cell: int = 0, attribute: int = 0x07) -> None:
        for n, character in enumerate(text):
            self.vga.store(TEXT + 2 * (cell + n), 2, ord(character) | attribute << 8)


def test_an_empty_screen() -> None:
    adapter = Adapter()
    assert adapter.vga.screen() == [" " * 80] * 25
    assert adapter.vga.attributes() == [b"\x07" * 80] * 25
    assert adapter.vga.cursor == (0, 0)
    assert adapter.vga.describe() == "vga: 80x25 start=0000 cursor=row 0 column 0"


def test_text_shows() -> None:
    adapter = Adapter()
    adapter.write("hello", 80 + 3, 0x1E)
    adapter.write("end", 25 * 80 - 3)
    screen = adapter.vga.screen()
    assert (screen[1][:10], screen[24][-4:]) == ("   hello  ", " end")
    assert adapter.vga.attributes()[1][2:9] == b"\x07" + b"\x1e" * 5 + b"\x07"


@pytest.mark.parametrize(
    ("code", "glyph"),
    [
        (0, " "), (1, "☺"), (0x1F, "▼"), (0x20, " "), (0x7E, "~"), (0x7F, "⌂"), (0xC4, "─"), (0xDB, "█"), (0xE1, "ß"),
        (0xFE, "■"), (0xFF, " "),
    ],
)  # fmt: skip
def test_glyphs(code: int, glyph: str) -> None:
    assert (len(GLYPHS), GLYPHS[code]) == (256, glyph)


def test_start_address_scrolls_and_wraps_at_16k_cells() -> None:
    adapter = Adapter()
    adapter.write("second", 80)
    adapter.crtc(0x0D, 80)
    assert adapter.vga.screen()[0].startswith("second")
    start = 0x4000 - 80
    adapter.write("first", 0)
    adapter.crtc(0x0C, start >> 8)
    adapter.crtc(0x0D, start & 0xFF)
    assert adapter.vga.screen()[1].startswith("first")


def test_cursor() -> None:
    adapter = Adapter()
    places = []
    for cell in (81, 24 * 80 + 79, 25 * 80):
        adapter.crtc(0x0E, cell >> 8)
        adapter.crtc(0x0F, cell & 0xFF)
        places.append(adapter.vga.cursor)
    assert places == [(1, 1), (24, 79), None]
    adapter.crtc(0x0C, 80 >> 8)
    adapter.crtc(0x0D, 80)
    places.append(adapter.vga.cursor)
    adapter.crtc(0x0A, 0x2D)
    places.append(adapter.vga.cursor)
    assert places[3:] == [(24, 0), None], "it is counted from the start address, and bit 5 of its start hides it"
    assert adapter.vga.describe().endswith("cursor=off")


def test_other_sizes_follow_the_crtc() -> None:
    adapter = Adapter()
    adapter.crtc(0x11, 0x0E)
    adapter.crtc(0x09, 0x47)
    assert (adapter.vga.columns, adapter.vga.rows, len(adapter.vga.screen())) == (80, 50, 50)
    adapter.crtc(0x01, 39)
    adapter.crtc(0x13, 20)
    adapter.write("x", 40)
    assert adapter.vga.screen()[1] == "x" + " " * 39
    adapter.crtc(0x13, 0)
    assert adapter.vga.cursor is None
    adapter.crtc(0x12, 0x0F)
    for overflow, rows in ((0x00, 2), (0x02, 34), (0x40, 66)):
        adapter.crtc(0x07, overflow)
        assert adapter.vga.rows == rows
    for register in (0x07, 0x12):
        adapter.crtc(register, 0xFF)
    adapter.crtc(0x09, 0)
    assert adapter.vga.rows == 100, "never more than a terminal could show"


@pytest.mark.parametrize(
    ("select", "answers"),
    [(0, (True, True, True)), (1, (True, False, False)), (2, (False, True, False)), (3, (False, False, True))],
)
def test_memory_map_select(select: int, answers: tuple[bool, bool, bool]) -> None:
    adapter = Adapter()
    adapter.graphics(6, select << 2)
    for offset, answers_here in zip((0x0100, 0x10100, 0x18200), answers, strict=True):
        adapter.vga.store(offset, 4, 0x12345678)
        assert adapter.vga.load(offset, 4) == (0x12345678 if answers_here else 0xFFFF_FFFF)


@pytest.mark.parametrize(
    ("select", "first", "last"), [(0, 0, 0x1FFFC), (1, 0, 0xFFFC), (2, 0x10000, 0x17FFC), (3, 0x18000, 0x1FFFC)]
)
def test_edges_of_the_windows(select: int, first: int, last: int) -> None:
    adapter = Adapter()
    adapter.graphics(6, select << 2)
    for offset in (first, last):
        adapter.vga.store(offset, 4, 0x12345678)
        assert adapter.vga.load(offset, 4) == 0x12345678
    for offset in (first - 4, last + 4):
        if 0 <= offset < 0x20000:
            assert adapter.vga.load(offset, 4) == 0xFFFF_FFFF


def test_both_text_windows_are_the_same_memory() -> None:
    adapter = Adapter()
    adapter.vga.store(TEXT + 4, 1, 0x41)
    adapter.graphics(6, 2 << 2)
    assert [adapter.vga.load(0x10004, size) for size in (1, 2, 4)] == [0x41, 0x0741, 0x07200741]
    adapter.vga.store(0x17FFE, 4, 0x11223344)
    assert (adapter.vga.load(0x17FFE, 2), len(adapter.vga.text)) == (0x3344, 0x8000)


@pytest.mark.parametrize(
    ("index_port", "data_port", "bits"),
    [(0x3D4, 0x3D5, "7f" * 25), (0x3C4, 0x3C5, "033d0f3f0e"), (0x3CE, 0x3CF, "0f0f0f1f037b0f0f7f")],
)
def test_register_files_read_back(index_port: int, data_port: int, bits: str) -> None:
    adapter = Adapter()
    adapter.crtc(0x11, 0x0E)
    for value in (0x7F, 0x55, 0x2A, 0x00):
        for index in range(len(bits) // 2):
            adapter.out(index_port, index)
            adapter.out(data_port, value)
        for index, mask in enumerate(bytes.fromhex(bits)):
            adapter.out(index_port, index)
            assert (adapter.read(index_port), adapter.read(data_port)) == (index, value & mask)
    adapter.out(index_port, 0x77)
    adapter.out(data_port, 0x55)
    assert adapter.read(data_port) == 0


def test_crtc_write_protection_spares_line_compare() -> None:
    adapter = Adapter()
    for index in range(8):
        adapter.crtc(index, 0x10)
    assert adapter.vga.crtc.values[:8] == bytes.fromhex("5f4f50825581bf1f")
    adapter.crtc(0x07, 0x00)
    assert adapter.vga.crtc.values[7] == 0x0F
    adapter.crtc(0x11, 0x0E)
    adapter.crtc(0x00, 0x10)
    assert adapter.vga.crtc.values[0] == 0x10


def test_attribute_flip_flop() -> None:
    adapter = Adapter()
    adapter.read(0x3DA)
    adapter.out(0x3C0, 0x03)
    adapter.out(0x3C0, 0x2A)
    assert (adapter.read(0x3C0), adapter.read(0x3C1)) == (0x03, 0x2A)
    adapter.out(0x3C0, 0x04)
    adapter.read(0x3DA)
    adapter.out(0x3C0, 0x21)
    assert (adapter.read(0x3C0), adapter.read(0x3C1)) == (0x21, 0x01)
    adapter.out(0x3C0, 0x3F)
    adapter.out(0x3C0, 0x3F)
    assert adapter.read(0x3C1) == 0


def test_dac() -> None:
    adapter = Adapter()
    adapter.out(0x3C8, 255)
    for value in (0xFF, 1, 2, 3, 4, 5, 6):
        adapter.out(0x3C9, value)
    assert (adapter.read(0x3C8), adapter.read(0x3C7)) == (1, 0)
    adapter.out(0x3C7, 255)
    assert [adapter.read(0x3C9) for _ in range(6)] == [0x3F, 1, 2, 3, 4, 5]
    assert adapter.read(0x3C7) == 3
    adapter.out(0x3C7, 1)
    assert [adapter.read(0x3C9) for _ in range(6)] == [0, 0, 42, 0, 42, 0], (
        "6 was the first of three, and changed nothing"
    )
    adapter.out(0x3C6, 0x5A)
    assert adapter.read(0x3C6) == 0x5A


def test_mono_and_colour_addresses() -> None:
    adapter = Adapter()
    adapter.out(0x3D4, 0x0E)
    assert (adapter.read(0x3D4), adapter.read(0x3B4), adapter.read(0x3CC)) == (0x0E, 0xFF, 0x67)
    adapter.out(0x3C2, 0x66)
    adapter.out(0x3B4, 0x0F)
    adapter.out(0x3B5, 0x12)
    assert (adapter.read(0x3D4), adapter.read(0x3B4), adapter.read(0x3B5)) == (0xFF, 0x0F, 0x12)
    adapter.out(0x3BA, 0x02)
    assert (adapter.read(0x3CA), adapter.read(0x3B9), adapter.read(0x3C3)) == (0x02, 0xFF, 0x00)


def test_input_status_follows_the_beam() -> None:
    adapter = Adapter()
    line_ns = FRAME_NS / 449
    by_line = {0: 0, 0.85: 1, 1: 0, 401: 1, 412.5: 9, 414.5: 1, 449.1: 0, 449.9: 1, 449 + 413: 9}
    seen = []
    for line in by_line:
        advance_to(adapter.clock, int(line * line_ns) + 1)
        seen.append(adapter.read(0x3DA))
    assert seen == list(by_line.values())


def test_reset_keeps_memory_and_power_on_clears_it() -> None:
    adapter = Adapter()
    adapter.write("x")
    adapter.crtc(0x0F, 5)
    adapter.vga.reset()
    assert (adapter.vga.screen()[0][0], adapter.vga.cursor) == ("x", (0, 0))
    adapter.vga.power_on()
    assert adapter.vga.screen()[0][0] == " "


def test_reset_brings_every_register_back() -> None:
    adapter = Adapter()
    for port in (
        0x3C7,
        0x3C2,
        0x3C6,
        0x3DA,
        0x3C0,
        0x3C0,
        0x3C0,
        0x3C4,
        0x3C5,
        0x3CE,
        0x3CF,
        0x3B4,
        0x3B5,
        0x3C9,
        0x3C9,
    ):
        adapter.out(port, 0x02)
    adapter.vga.reset()
    assert adapter.vga.snapshot() == Adapter().vga.snapshot()


def test_the_palette_after_reset() -> None:
    dac = Adapter().vga.dac
    colours = {
        0: (0, 0, 0),
        1: (0, 0, 42),
        4: (42, 0, 0),
        7: (42, 42, 42),
        0x14: (42, 21, 0),
        0x38: (21, 21, 21),
        63: (63,) * 3,
    }
    assert {index: tuple(dac[3 * index : 3 * index + 3]) for index in colours} == colours


@pytest.mark.parametrize("intercepts", [False, True])
@pytest.mark.parametrize("select", range(4))
def test_plain_memory_is_what_the_adapter_would_have_answered(select: int, intercepts: bool) -> None:
    adapter = Adapter()
    memory = adapter.memory
    memory.intercepts_devices = intercepts
    adapter.graphics(6, select << 2)
    for number, offset in enumerate((0, 0xF100, 0x1_0204, 0x1_7FFC, 0x1_8000, 0x1_FFFC)):
        memory.store(WINDOW_FIRST + offset, 4, 0x1234_5678 + number)
        answer = adapter.vga.load(offset, 4)
        assert memory.load(WINDOW_FIRST + offset, 4) == answer
        is_plain = memory.ram_address(WINDOW_FIRST + offset) >= 0
        assert is_plain == (answer != 0xFFFF_FFFF and not intercepts)
        assert memory.has_device(WINDOW_FIRST + offset)
        adapter.vga.store(offset, 2, number)
        assert memory.load(WINDOW_FIRST + offset, 4) == adapter.vga.load(offset, 4)


def test_who_caches_addresses_is_told_when_others_answer() -> None:
    adapter = Adapter()
    memory = adapter.memory
    told: list[int] = []
    memory.map_observers.append(lambda: told.append(memory.ram_address(0xB_8010)))
    adapter.graphics(6, 3 << 2 | 1)
    adapter.graphics(5, 1)
    assert not told, "the same window, and a register that moves none"
    adapter.graphics(6, 2 << 2)
    snapshot = adapter.vga.snapshot()
    adapter.graphics(6, 0 << 2)
    adapter.vga.restore(snapshot)
    memory.intercepts_devices = True
    adapter.vga.reset()
    memory.intercepts_devices = False
    assert told == [-1, 0xB_8010, -1, -1, 0xB_8010]


def test_a_snapshot_has_the_memory() -> None:
    adapter, other = Adapter(), Adapter()
    adapter.write("kept")
    adapter.memory.store(WINDOW_FIRST, 1, 0x55)
    other.vga.restore(adapter.vga.snapshot())
    assert other.vga.screen()[0].startswith("kept")
    adapter.graphics(6, 1 << 2)
    other.vga.restore(adapter.vga.snapshot())
    assert other.memory.load(WINDOW_FIRST, 1) == 0, "hidden it was not written to"
    assert other.vga.screen()[0].startswith("kept")
