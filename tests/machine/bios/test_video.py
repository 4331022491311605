"""INT 10h where SeaBIOS's answers do not show it: the CRTC, windows past the edge, mode 7, what is not there."""

from collections.abc import Iterator

import pytest

from machine.bios import bda, video
from tests.machine.bios.pc import Pc

VIDEO = 0x10
TEXT = 0xB8000


@pytest.fixture
def pc() -> Iterator[Pc]:
    made = Pc()
    made.firmware.self_test()
    yield made
    made.close()


def crtc(pc: Pc, index: int) -> int:
    pc.board.ports.store(0x3D4, 1, index)
    return pc.board.ports.load(0x3D5, 1)


@pytest.mark.parametrize(
    ("shape", "start", "end"),
    [(0x0607, 14, 15), (0x0007, 1, 15), (0x0507, 11, 15), (0x0707, 15, 15), (0x0D0E, 13, 14), (0x2000, 0x20, 0)],
)
def test_cursor_shape_is_stretched_to_the_cell(pc: Pc, shape: int, start: int, end: int) -> None:
    pc.call(VIDEO, ah=0x01, cx=shape)
    assert (crtc(pc, 0x0A), crtc(pc, 0x0B)) == (start, end)
    assert pc.number(bda.CURSOR_SHAPE, 2) == shape
    assert (pc.board.vga.cursor is None) == (start == 0x20)


@pytest.mark.parametrize(
    ("window", "cells"),
    [
        ((24, 79, 0xFF, 0xFF), {24 * 80 + 79}),
        ((23, 78, 23, 0xFF), {23 * 80 + 78, 23 * 80 + 79}),
        ((0, 0, 0, 0), {0}),
        ((5, 5, 4, 10), set()),
        ((5, 5, 10, 4), set()),
        ((25, 0, 30, 10), set()),
        ((0, 80, 3, 90), set()),
    ],
)
def test_clearing_a_window_stays_inside(pc: Pc, window: tuple[int, int, int, int], cells: set[int]) -> None:
    pc.memory.write(TEXT, b"x\x02" * 0x1000)
    top, left, bottom, right = window
    pc.call(VIDEO, ax=0x0600, bx=0x1F00, ch=top, cl=left, dh=bottom, dl=right)
    text = pc.memory.read(TEXT, 0x2000)
    assert {at // 2 for at in range(0, 0x2000, 2) if text[at : at + 2] != b"x\x02"} == cells
    assert all(text[2 * cell : 2 * cell + 2] == b" \x1f" for cell in cells)


def test_cursor_follows_the_page_that_shows(pc: Pc) -> None:
    pc.call(VIDEO, ah=0x02, bh=1, dx=0x0203)
    assert pc.board.vga.cursor == (0, 0)
    pc.call(VIDEO, ax=0x0501)
    assert pc.board.vga.cursor == (2, 3)
    assert crtc(pc, 0x0C) << 8 | crtc(pc, 0x0D) == 0x800
    pc.call(VIDEO, ax=0x0E41)
    assert pc.screen()[2] == "   A"
    pc.call(VIDEO, ax=0x0500)
    assert pc.screen() == []


def test_40_columns(pc: Pc) -> None:
    pc.call(VIDEO, ax=0x0001)
    assert pc.board.vga.columns == 40
    for byte in b"0123456789" * 4 + b"!":
        pc.call(VIDEO, ax=0x0E00 | byte)
    assert pc.screen() == ["0123456789" * 4, "!"]


@pytest.mark.parametrize("mode", [4, 6, 0x12, 0x13, 0x55])
def test_graphics_modes_change_nothing(pc: Pc, mode: int) -> None:
    pc.call(VIDEO, ax=0x0E41)
    pc.call(VIDEO, ax=mode)
    assert pc.call(VIDEO, ah=0x0F).al == 3
    assert pc.screen() == ["A"]


def test_a_mode_can_keep_the_screen(pc: Pc) -> None:
    pc.call(VIDEO, ax=0x0E41)
    pc.call(VIDEO, ax=0x0083)
    assert pc.screen() == ["A"]
    pc.call(VIDEO, ax=0x0003)
    assert pc.screen() == []


def test_mode_7_is_at_b0000(pc: Pc) -> None:
    pc.call(VIDEO, ax=0x0007)
    assert pc.number(bda.CRTC_PORT, 2) == 0x3B4
    assert pc.call(VIDEO, ax=0x1210, bx=0x10).bh == 1


def test_runs_of_characters_end_with_the_memory(pc: Pc) -> None:
    pc.call(VIDEO, ah=0x02, bh=7, dx=0x184F)
    frame = pc.call(VIDEO, ax=0x0941, bx=0x071E, cx=0xFFFF)
    assert frame.cx == 0xFFFF
    assert pc.memory.read(TEXT + 0x7000 + 3998, 98) == b"A\x1e" * 49
    assert pc.memory.read(TEXT, 2) == b" \x07"


@pytest.mark.parametrize("ah", [0x0C, 0x0D, 0x1B, 0x1C, 0xFF])
def test_other_functions_leave_registers_alone(pc: Pc, ah: int) -> None:
    frame = pc.call(VIDEO, ah=ah, al=0x12, bx=1, cx=2, dx=3)
    assert (frame.ah, frame.al, frame.bx, frame.cx, frame.dx) == (ah, 0x12, 1, 2, 3)


def test_vbe_fails(pc: Pc) -> None:
    for function in (0x00, 0x01, 0x02, 0x15):
        assert pc.call(VIDEO, ax=0x4F00 | function).ax == 0x0100


def test_own_messages(pc: Pc) -> None:
    video.write_text(pc.platform, "one\r\ntwo")
    assert pc.screen() == ["one", "two"]
    assert pc.board.vga.cursor == (1, 3)
