"""A VGA in text mode: the window A0000h to BFFFFh, the register files, and the screen as people see it.

It must not know who draws on it, nor any display of the host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol

from machine.clock import Clock
from machine.devices.device import Device
from machine.ports import FOR_EVER_NS

WINDOW_FIRST = 0xA_0000
WINDOW_BYTES = 0x2_0000
STATUS1_PORTS = (0x3BA, 0x3DA)
PORT_RANGES = ((0x3B0, 0x3BB), (0x3C0, 0x3DF))

_TEXT_OFFSET = 0x1_0000
_TEXT_BYTES = 0x8000
_TEXT_CELLS = _TEXT_BYTES // 2
_GRAPHICS_BYTES = 0x1_0000
_MAX_ROWS = 100

# By the memory map select of the graphics controller: first and last offset in the window that answer.
_WINDOWS = ((0x0_0000, 0x1_FFFF), (0x0_0000, 0x0_FFFF), (0x1_0000, 0x1_7FFF), (0x1_8000, 0x1_FFFF))
_PAGE_BYTES = 4096

_MISC_COLOR = 0x01

_CRTC_COLUMNS = 0x01
_CRTC_OVERFLOW = 0x07
_CRTC_CHAR_HEIGHT = 0x09
_CRTC_CURSOR_START = 0x0A
_CRTC_START = 0x0C
_CRTC_CURSOR = 0x0E
_CRTC_PROTECT = 0x11
_CRTC_DISPLAY_END = 0x12
_CRTC_STRIDE = 0x13
_PROTECTED = 0x80
_LINE_COMPARE_8 = 0x10
_CURSOR_OFF = 0x20

_GRAPHICS_MISC = 6

_STATUS_BLANK = 0x01
_STATUS_RETRACE = 0x08

# 720 x 400 at 70 Hz: a 28.322 MHz dot clock, 900 dots by 449 lines, of which 720 by 400 show.
_DOTS_PER_S = 28_322_000
_NS_PER_S = 1_000_000_000
_LINE_DOTS = 900
_FRAME_LINES = 449
_SHOWN_DOTS = 720
_SHOWN_LINES = 400
_RETRACE_LINES = range(412, 414)

# Mode 3, as the video BIOS leaves it (80 x 25 characters of 9 x 16 dots).
_CRTC_MODE3 = bytes.fromhex("5f4f50825581bf1f004f0d0e00000000 9c8e8f281f96b9a3ff")
_SEQUENCER_MODE3 = bytes.fromhex("0300030002")
_GRAPHICS_MODE3 = bytes.fromhex("0000000000100e00ff")
_ATTRIBUTE_MODE3 = bytes.fromhex("00010203040514073839 3a3b3c3d3e3f0c000f0800")
_MISC_MODE3 = 0x67

# The bits that exist, by register.
_CRTC_BITS = b"\xff" * 25
_SEQUENCER_BITS = bytes.fromhex("033d0f3f0e")
_GRAPHICS_BITS = bytes.fromhex("0f0f0f1f037b0f0fff")
_ATTRIBUTE_BITS = b"\x3f" * 16 + bytes.fromhex("efff3f0f0f")

_ATTRIBUTE_SHOWS = 0x20
# The low three bits of the colour mix the two thirds, the next three add one third each.
_DAC_MODE3 = bytes(
    42 * (color >> bit & 1) + 21 * (color >> bit + 3 & 1) for color in range(64) for bit in (2, 1, 0)
).ljust(768, b"\0")

_LOW_GLYPHS = " ☺☻♥♦♣♠•◘○◙♂♀♪♫☼►◄↕‼¶§▬↨↑↓→←∟↔▲▼"
GLYPHS = _LOW_GLYPHS + bytes(range(0x20, 0x7F)).decode("ascii") + "⌂" + bytes(range(0x80, 0xFF)).decode("cp437") + " "
"""What the 256 characters of the built-in font look like, in Unicode."""


class _Registers(Device):
    """A register file behind an index and a data port; what was written reads back, reserved bits as zeros."""

    _saved: ClassVar[tuple[str, ...]] = ("index", "values")

    def __init__(self, initial: bytes, masks: bytes) -> None:
        self._initial = initial
        self._masks = masks
        self.values = bytearray(initial)
        self.index = 0

    def reset(self) -> None:
        self.index = 0
        self.values[:] = self._initial

    def read(self) -> int:
        return self.values[self.index] if self.index < len(self.values) else 0

    def write(self, value: int) -> None:
        if self.index < len(self.values):
            self.values[self.index] = value & self._masks[self.index]


class VideoMemory(Protocol):
    """What holds an adapter's memory: `machine.memory.PhysicalMemory`."""

    def lend(self, first: int, length: int) -> memoryview:
        """The bytes that stand for the adapter's memory."""

    def expose(self, places: Mapping[int, int]) -> None:
        """Let these bytes answer at physical addresses, page by page, without the adapter being asked."""


class Vga(Device):
    """Text memory is plain bytes, character and attribute in turn, at B8000h or B0000h as the graphics controller says.

    The 64 KiB at A0000h are plain bytes as well, not planes: programs may probe and load fonts there, nothing is drawn
    from them. So an access does nothing but read or write bytes, and the pages of the window that the graphics
    controller has on are exposed as plain memory. After power-on the registers are as the video BIOS leaves them in
    mode 3. Input status 1 follows the virtual time.

    Source: IBM VGA technical reference; the register tables of Ferraro, "Programmer's Guide to the EGA and VGA Cards".
    """

    _saved: ClassVar[tuple[str, ...]] = (
        "text", "graphics", "misc", "feature", "crtc", "sequencer", "graphics_controller", "attribute",
        "attribute_index", "attribute_data_next", "dac", "dac_mask", "dac_index", "dac_component", "dac_reading",
        "dac_staged",
    )  # fmt: skip

    def __init__(self, clock: Clock, memory: VideoMemory) -> None:
        self._clock = clock
        self._memory = memory
        self.text = memory.lend(WINDOW_FIRST + WINDOW_BYTES - _TEXT_BYTES, _TEXT_BYTES)
        self.graphics = memory.lend(WINDOW_FIRST, _GRAPHICS_BYTES)
        self.crtc = _Registers(_CRTC_MODE3, _CRTC_BITS)
        self.sequencer = _Registers(_SEQUENCER_MODE3, _SEQUENCER_BITS)
        self.graphics_controller = _Registers(_GRAPHICS_MODE3, _GRAPHICS_BITS)
        self.attribute = bytearray(_ATTRIBUTE_MODE3)
        self.dac = bytearray(_DAC_MODE3)
        self.dac_staged = bytearray(3)
        self.power_on()

    def power_on(self) -> None:
        """Mode 3, an empty screen."""
        self.text[:] = b" \x07" * _TEXT_CELLS
        self.graphics[:] = bytes(_GRAPHICS_BYTES)
        self.reset()

    def reset(self) -> None:
        """Registers as in mode 3; memory stays."""
        self.misc = _MISC_MODE3
        self.feature = 0
        self.crtc.reset()
        self.sequencer.reset()
        self.graphics_controller.reset()
        self.attribute[:] = _ATTRIBUTE_MODE3
        self.attribute_index = _ATTRIBUTE_SHOWS
        self.attribute_data_next = False
        self.dac[:] = _DAC_MODE3
        self.dac_mask = 0xFF
        self.dac_index = 0
        self.dac_component = 0
        self.dac_reading = False
        self.dac_staged[:] = bytes(3)
        self._expose()

    def restore(self, state: dict[str, object]) -> None:
        """See `Device`."""
        super().restore(state)
        self._expose()

    def _expose(self) -> None:
        """Have the pages of the window that answer be plain memory, where the bytes lie that `_locate` finds."""
        places = {}
        for offset in range(0, WINDOW_BYTES, _PAGE_BYTES):
            place = self._locate(offset)
            if place is not None:
                memory, at = place
                first = WINDOW_FIRST if memory is self.graphics else WINDOW_FIRST + WINDOW_BYTES - _TEXT_BYTES
                places[WINDOW_FIRST + offset] = first + at
        self._memory.expose(places)

    def _locate(self, offset: int) -> tuple[memoryview, int] | None:
        """The memory and the place in it behind an offset of the window; None if nothing answers there."""
        first, last = _WINDOWS[self.graphics_controller.values[_GRAPHICS_MISC] >> 2 & 3]
        if not first <= offset <= last:
            return None
        if offset < _TEXT_OFFSET:
            return self.graphics, offset
        return self.text, offset & _TEXT_BYTES - 1

    def load(self, offset: int, size_bytes: int) -> int:
        """Read memory at `offset` of the window, little-endian."""
        place = self._locate(offset)
        if place is None:
            return (1 << 8 * size_bytes) - 1
        memory, at = place
        return int.from_bytes(memory[at : at + size_bytes], "little")

    def store(self, offset: int, size_bytes: int, value: int) -> None:
        """Write memory at `offset` of the window, little-endian; what lies past the end of the memory is lost."""
        place = self._locate(offset)
        if place is not None:
            memory, at = place
            data = value.to_bytes(size_bytes, "little")[: len(memory) - at]
            memory[at : at + len(data)] = data

    def status1_steady_until_ns(self, port: int) -> int:
        """When input status 1, at 3DAh or 3BAh, may change: as the beam ends what shows of its line, or the line."""
        if not self._selected(port):
            return FOR_EVER_NS
        if self.attribute_data_next:
            return 0
        dots = self._clock.now_ns * _DOTS_PER_S // _NS_PER_S
        dot = dots % _LINE_DOTS
        until_dots = dots - dot + (_SHOWN_DOTS if dot < _SHOWN_DOTS else _LINE_DOTS)
        return -(-until_dots * _NS_PER_S // _DOTS_PER_S)

    @property
    def _status1(self) -> int:
        """Input status 1: in retrace, and not showing, at this moment of the frame."""
        line, dot = divmod(self._clock.now_ns * _DOTS_PER_S // _NS_PER_S, _LINE_DOTS)
        line %= _FRAME_LINES
        status = 0 if line < _SHOWN_LINES and dot < _SHOWN_DOTS else _STATUS_BLANK
        return status | (_STATUS_RETRACE if line in _RETRACE_LINES else 0)

    def load_port(self, port: int, size_bytes: int) -> int:  # noqa: ARG002
        """3C0h to 3CFh; 3B4h, 3B5h, 3BAh or 3D4h, 3D5h, 3DAh, as the misc output register chooses mono or colour."""
        if not 0x3C0 <= port <= 0x3CF:
            return self._load_crtc_port(port & 0x0F) if self._selected(port) else 0xFF
        match port & 0x0F:
            case 0x0:
                return self.attribute_index
            case 0x1:
                index = self.attribute_index & 0x1F
                return self.attribute[index] if index < len(self.attribute) else 0
            case 0x4:
                return self.sequencer.index
            case 0x5:
                return self.sequencer.read()
            case 0x6:
                return self.dac_mask
            case 0x7:
                return 0x03 if self.dac_reading else 0x00
            case 0x8:
                return self.dac_index
            case 0x9:
                return self._step_dac(None)
            case 0xA:
                return self.feature
            case 0xC:
                return self.misc
            case 0xE:
                return self.graphics_controller.index
            case 0xF:
                return self.graphics_controller.read()
            case _:
                return 0x00

    def _selected(self, port: int) -> bool:
        return port >= 0x3D0 if self.misc & _MISC_COLOR else port < 0x3C0

    def _load_crtc_port(self, port: int) -> int:
        if port == 0x4:
            return self.crtc.index
        if port == 0x5:
            return self.crtc.read()
        if port == 0xA:
            self.attribute_data_next = False
            return self._status1
        return 0xFF

    def store_port(self, port: int, size_bytes: int, value: int) -> None:  # noqa: ARG002
        """The same ports as `load_port`."""
        if not 0x3C0 <= port <= 0x3CF:
            if self._selected(port):
                self._store_crtc_port(port & 0x0F, value)
            return
        match port & 0x0F:
            case 0x0:
                self._write_attribute(value)
            case 0x2:
                self.misc = value
            case 0x4:
                self.sequencer.index = value
            case 0x5:
                self.sequencer.write(value)
            case 0x6:
                self.dac_mask = value
            case 0x7 | 0x8:
                self.dac_index = value
                self.dac_component = 0
                self.dac_reading = port & 0x0F == 0x7
            case 0x9:
                self._step_dac(value & 0x3F)
            case 0xE:
                self.graphics_controller.index = value
            case 0xF:
                self.graphics_controller.write(value)
                if self.graphics_controller.index == _GRAPHICS_MISC:
                    self._expose()

    def _store_crtc_port(self, port: int, value: int) -> None:
        crtc = self.crtc
        if port == 0x4:
            crtc.index = value
        elif port == 0x5:
            if crtc.index <= _CRTC_OVERFLOW and crtc.values[_CRTC_PROTECT] & _PROTECTED:
                if crtc.index == _CRTC_OVERFLOW:
                    crtc.write(crtc.read() & ~_LINE_COMPARE_8 | value & _LINE_COMPARE_8)
            else:
                crtc.write(value)
        elif port == 0xA:
            self.feature = value

    def _write_attribute(self, value: int) -> None:
        index = self.attribute_index & 0x1F
        if not self.attribute_data_next:
            self.attribute_index = value & 0x3F
        elif index < len(self.attribute):
            self.attribute[index] = value & _ATTRIBUTE_BITS[index]
        self.attribute_data_next = not self.attribute_data_next

    def _step_dac(self, value: int | None) -> int:
        """Read or write the next of the three components of a colour; it changes with the third."""
        first = self.dac_index * 3
        result = self.dac[first + self.dac_component]
        if value is not None:
            self.dac_staged[self.dac_component] = value
        self.dac_component += 1
        if self.dac_component == 3:
            if value is not None:
                self.dac[first : first + 3] = self.dac_staged
            self.dac_component = 0
            self.dac_index = self.dac_index + 1 & 0xFF
        return result

    def _crtc_word(self, index: int) -> int:
        return self.crtc.values[index] << 8 | self.crtc.values[index + 1]

    @property
    def columns(self) -> int:
        """Characters in a row."""
        return self.crtc.values[_CRTC_COLUMNS] + 1

    @property
    def rows(self) -> int:
        """Rows on the screen."""
        overflow = self.crtc.values[_CRTC_OVERFLOW]
        lines = (self.crtc.values[_CRTC_DISPLAY_END] | (overflow & 0x02) << 7 | (overflow & 0x40) << 3) + 1
        return min(_MAX_ROWS, lines // ((self.crtc.values[_CRTC_CHAR_HEIGHT] & 0x1F) + 1))

    def _row(self, row: int, byte: int) -> bytes:
        """Characters (`byte` 0) or attributes (1) of a row that shows."""
        first = self._crtc_word(_CRTC_START) + row * self.crtc.values[_CRTC_STRIDE] * 2
        return bytes(self.text[(first + n) % _TEXT_CELLS * 2 + byte] for n in range(self.columns))

    def screen(self) -> list[str]:
        """The rows that show, from the top, each as long as the screen is wide."""
        return ["".join(GLYPHS[code] for code in self._row(row, 0)) for row in range(self.rows)]

    def attributes(self) -> Sequence[bytes]:
        """The attribute bytes of `screen`: foreground in bits 3 to 0, background in 6 to 4, blinking in 7."""
        return [self._row(row, 1) for row in range(self.rows)]

    @property
    def cursor(self) -> tuple[int, int] | None:
        """Row and column of the cursor, or None if it is off or not on the screen."""
        stride = self.crtc.values[_CRTC_STRIDE] * 2
        if self.crtc.values[_CRTC_CURSOR_START] & _CURSOR_OFF or not stride:
            return None
        row, column = divmod(self._crtc_word(_CRTC_CURSOR) - self._crtc_word(_CRTC_START), stride)
        return (row, column) if 0 <= row < self.rows and column < self.columns else None

    def describe(self) -> str:
        """Size, start and cursor."""
        place = self.cursor
        cursor = "off" if place is None else f"row {place[0]} column {place[1]}"
        return f"vga: {self.columns}x{self.rows} start={self._crtc_word(_CRTC_START):04x} cursor={cursor}"
