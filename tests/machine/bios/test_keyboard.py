"""Scan codes to BIOS codes, shift states, the buffer, and the keys that do something else."""

from collections.abc import Iterator

import pytest

from machine.bios import bda, keyboard
from machine.bios.keymap import E0_KEYS, KEYS
from tests.machine.bios.pc import Pc

IRQ1 = 0x09
KEYS_SERVICE = 0x16
L_SHIFT, R_SHIFT, CTRL, ALT, CAPS, NUM, SCROLL = 0x2A, 0x36, 0x1D, 0x38, 0x3A, 0x45, 0x46
UP = 0x80


@pytest.fixture
def pc() -> Iterator[Pc]:
    made = Pc()
    made.firmware.self_test()
    yield made
    made.close()


def press(pc: Pc, *codes: int) -> list[int]:
    """Send scan codes; what the ROM is told to do, without the nothings."""
    return [action for code in codes if (action := pc.call(IRQ1, al=code).al) != keyboard.KEY_NOTHING]


def keys(pc: Pc) -> list[int]:
    """Take all keys out of the buffer."""
    taken = []
    while not pc.call(KEYS_SERVICE, ah=0x11).zero:
        taken.append(pc.call(KEYS_SERVICE, ah=0x10).ax)
    return taken


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ((0x1E, 0x1E | UP), [0x1E61]),
        ((L_SHIFT, 0x1E, L_SHIFT | UP, 0x1E), [0x1E41, 0x1E61]),
        ((R_SHIFT, 0x02, R_SHIFT | UP), [0x0221]),
        ((CTRL, 0x2E, CTRL | UP), [0x2E03]),
        ((0xE0, CTRL, 0x2E), [0x2E03]),
        ((ALT, 0x10), [0x1000]),
        ((ALT, 0x02), [0x7800]),
        ((ALT, 0x0D), [0x8300]),
        ((CTRL, 0x03), [0x0300]),
        ((CTRL, 0x02), []),
        ((CTRL, 0x0C), [0x0C1F]),
        ((CTRL, 0x1A), [0x1A1B]),
        ((CAPS, CAPS | UP, 0x1E, 0x02), [0x1E41, 0x0231]),
        ((CAPS, CAPS | UP, L_SHIFT, 0x1E), [0x1E61]),
        ((0x01, 0x0E, 0x0F, 0x1C, 0x39), [0x011B, 0x0E08, 0x0F09, 0x1C0D, 0x3920]),
        ((L_SHIFT, 0x0F), [0x0F00]),
        ((0x3B, 0x44, 0x57, 0x58), [0x3B00, 0x4400, 0x8500, 0x8600]),
        ((L_SHIFT, 0x3B, 0x58), [0x5400, 0x8800]),
        ((CTRL, 0x3B), [0x5E00]),
        ((ALT, 0x3B), [0x6800]),
        ((0x48,), [0x4800]),
        ((0xE0, 0x48), [0x48E0]),
        ((CTRL, 0xE0, 0x4B), [0x73E0]),
        ((ALT, 0xE0, 0x4B), [0x9B00]),
        ((NUM, NUM | UP, 0x48), [0x4838]),
        ((NUM, NUM | UP, L_SHIFT, 0x48), [0x4800]),
        ((NUM, NUM | UP, 0xE0, 0x48), [0x48E0]),
        ((0xE0, L_SHIFT, 0xE0, 0x48), [0x48E0]),  # the shift that keyboards invent around grey keys
        ((0xE0, R_SHIFT, 0xE0, 0x48), [0x48E0]),
        ((L_SHIFT, 0x48), [0x4838]),
        ((0xE0, 0x1C, 0xE0, 0x35), [0xE00D, 0xE02F]),
        ((0x2B, 0x56), [0x2B5C, 0x565C]),
        ((0x7F, 0x60), []),
        ((0xFA, 0x00, 0xFE, 0xEE, 0xFF), []),
        ((ALT, 0x4F, 0x50, 0x51, ALT | UP), [0x007B]),
        ((ALT, ALT | UP), []),
    ],
)
def test_codes(pc: Pc, codes: tuple[int, ...], expected: list[int]) -> None:
    assert press(pc, *codes) == []
    assert keys(pc) == expected


def test_every_key_has_its_scan_code_or_one_of_the_known_others() -> None:
    for scan, key in KEYS.items():
        assert key.plain is not None
        assert key.plain >> 8 in (scan, 0x85, 0x86)
    for scan, key in E0_KEYS.items():
        assert key.plain is not None
        assert key.plain & 0xFF == 0xE0 or key.plain >> 8 == 0xE0
        assert scan in KEYS


@pytest.mark.parametrize(
    ("codes", "flags", "extended"),
    [
        ((L_SHIFT,), bda.LEFT_SHIFT, 0),
        ((L_SHIFT, L_SHIFT | UP), 0, 0),
        ((CTRL,), bda.CTRL, bda.LEFT_CTRL),
        ((0xE0, CTRL), bda.CTRL, 0x04),
        ((CTRL, 0xE0, CTRL, CTRL | UP), bda.CTRL, 0x04),
        ((CTRL, 0xE0, CTRL, CTRL | UP, 0xE0, CTRL | UP), 0, 0),
        ((0xE0, ALT), bda.ALT, 0x08),
        ((CAPS,), bda.CAPS_LOCK, bda.CAPS_DOWN),
        ((CAPS, CAPS, CAPS, CAPS | UP), bda.CAPS_LOCK, 0),
        ((CAPS, CAPS | UP, CAPS, CAPS | UP), 0, 0),
        ((SCROLL, SCROLL | UP), bda.SCROLL_LOCK, 0),
        ((0x52, 0x52 | UP), bda.INSERT, 0),
        ((0xE0, 0x52), bda.INSERT, bda.INSERT_DOWN),
    ],
)
def test_shift_states(pc: Pc, codes: tuple[int, ...], flags: int, extended: int) -> None:
    press(pc, *codes)
    frame = pc.call(KEYS_SERVICE, ah=0x12)
    assert (frame.al, frame.ah) == (flags, extended)
    assert pc.call(KEYS_SERVICE, ah=0x02).al == flags


def test_buffer_holds_fifteen(pc: Pc) -> None:
    press(pc, *range(0x02, 0x12))
    taken = keys(pc)
    assert [key >> 8 for key in taken] == list(range(0x02, 0x11))
    press(pc, 0x1E)
    assert keys(pc) == [0x1E61]  # the ring has wrapped


def test_reading_waits(pc: Pc) -> None:
    frame = pc.call(KEYS_SERVICE, eax=0x12340000, ebx=5)
    assert (frame.eax, frame.ebx, frame.attempt) == (0x12340000, 5, 1)
    assert pc.call_again().attempt == 2
    status = 36
    saved = pc.memory.read(0x600, 46)
    press(pc, 0x1E)
    pc.memory.write(0x600, saved)
    frame = pc.call_again()
    assert (frame.eax, frame.attempt) == (0x12341E61, 0)
    assert saved[status] == 2


def test_special_keys(pc: Pc) -> None:
    assert press(pc, CTRL, ALT, 0x53) == [keyboard.KEY_REBOOT]
    assert pc.number(bda.WARM_BOOT, 2) == 0x1234
    press(pc, ALT | UP, 0x1E)
    assert press(pc, 0xE0, 0x46) == [keyboard.KEY_BREAK]
    assert pc.number(bda.BREAK_FLAG) == 0x80
    assert keys(pc) == [0]
    press(pc, CTRL | UP)
    assert press(pc, 0xE0, 0x37) == [keyboard.KEY_PRINT_SCREEN]
    assert press(pc, 0x54, 0x54 | UP) == [keyboard.KEY_SYSREQ_DOWN, keyboard.KEY_SYSREQ_UP]


@pytest.mark.parametrize(
    "codes", [(CTRL, 0x53), (ALT, 0x53), (0x53,), (CTRL, ALT, 0x52), (CTRL, 0x37), (0x46,), (ALT, 0xE0, 0x37)]
)
def test_parts_of_special_keys_are_none(pc: Pc, codes: tuple[int, ...]) -> None:
    assert press(pc, *codes) == []
    assert pc.number(bda.WARM_BOOT, 2) == 0


def test_pause_swallows_the_key_that_ends_it(pc: Pc) -> None:
    assert press(pc, 0xE1, 0x1D, 0x45, 0xE1, 0x9D, 0xC5) == []
    assert pc.number(bda.SHIFT_FLAGS) == 0
    assert pc.number(bda.SHIFT_FLAGS_2) == bda.PAUSED
    press(pc, 0x1E, 0x1F)
    assert keys(pc) == [0x1F73]
