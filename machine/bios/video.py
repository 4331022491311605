"""INT 10h: the text screen.

It writes characters to the memory at B8000h (B0000h in mode 7) and the cursor to the CRTC. Graphics and VBE are not
there.

Source: IBM PS/2 and PC BIOS Interface Technical Reference, "Interrupt 10H"; VESA BIOS Extension, function 00h.
"""

from machine.bios import bda
from machine.bios.frame import CallFrame
from machine.bios.platform import Platform

_ROWS_DEFAULT = 25
_PAGES = 8
_BLANK_ATTRIBUTE = 0x07
_STRING_PIECE = 8

# Mode: columns, page size in bytes, mode select register, CRTC's first 0x19 registers.
_CRTC_40 = bytes.fromhex("2d2728902ba0bf1f004f0d0e000000009c8e8f141f96b9a3ff")
_CRTC_80 = bytes.fromhex("5f4f50825581bf1f004f0d0e000000009c8e8f281f96b9a3ff")
_CRTC_MONO = bytes.fromhex("5f4f50825581bf1f004f0d0e000000009c8e8f280f96b9a3ff")
_MODES = {
    0: (40, 0x800, 0x2C, _CRTC_40),
    1: (40, 0x800, 0x28, _CRTC_40),
    2: (80, 0x1000, 0x2D, _CRTC_80),
    3: (80, 0x1000, 0x29, _CRTC_80),
    7: (80, 0x1000, 0x29, _CRTC_MONO),
}
_CRTC_PROTECT = 0x11
_CURSOR_START = 0x0A
_START_ADDRESS = 0x0C
_CURSOR_ADDRESS = 0x0E


def service(platform: Platform, frame: CallFrame) -> None:
    """INT 10h by AH; functions that are not there change nothing."""
    function = _FUNCTIONS.get(frame.ah)
    if function is not None:
        function(platform, frame)


def set_mode(platform: Platform, mode: int, *, clear: bool) -> None:
    """Mode 0 to 3 or 7: BIOS data, CRTC, an empty screen, the cursor at its top left; another mode changes nothing."""
    if mode not in _MODES:
        return
    columns, page_bytes, register, crtc = _MODES[mode]
    crtc_port = 0x3B4 if mode == 7 else 0x3D4
    platform.store(bda.VIDEO_MODE, 1, mode)
    platform.store(bda.VIDEO_COLUMNS, 2, columns)
    platform.store(bda.VIDEO_PAGE_BYTES, 2, page_bytes)
    platform.store(bda.VIDEO_PAGE_START, 2, 0)
    platform.cpu.write(bda.CURSORS, bytes(2 * _PAGES))
    platform.store(bda.VIDEO_PAGE, 1, 0)
    platform.store(bda.CRTC_PORT, 2, crtc_port)
    platform.store(bda.VIDEO_MODE_REGISTER, 1, register)
    platform.store(bda.VIDEO_PALETTE, 1, 0x30)
    platform.store(bda.VIDEO_LAST_ROW, 1, _ROWS_DEFAULT - 1)
    platform.store(bda.CHARACTER_ROWS, 2, 16)
    platform.store(bda.VIDEO_CONTROL, 1, 0x60 if clear else 0xE0)
    platform.store(bda.VIDEO_SWITCHES, 1, 0xF9)
    platform.store(bda.VIDEO_DISPLAY, 1, 0x51)
    platform.store(bda.VIDEO_COMBINATION, 1, 0x08)
    _set_crtc(platform, _CRTC_PROTECT, crtc[_CRTC_PROTECT] & 0x7F)
    for index, value in enumerate(crtc):
        _set_crtc(platform, index, value)
    if clear:
        size = 0x4000 if mode != 7 else 0x1000
        platform.cpu.write(_memory(platform), bytes((0x20, _BLANK_ATTRIBUTE)) * (size // 2))
    _set_shape(platform, 0x0607)
    _place_cursor(platform, 0, 0, 0)


def write_text(platform: Platform, text: str) -> None:
    """Teletype output on page 0, for the firmware's own messages."""
    for byte in text.encode("ascii"):
        _teletype(platform, byte, 0, None)


def _memory(platform: Platform) -> int:
    return 0xB0000 if platform.load(bda.VIDEO_MODE, 1) == 7 else 0xB8000


def _columns(platform: Platform) -> int:
    return max(1, platform.load(bda.VIDEO_COLUMNS, 2))


def _rows(platform: Platform) -> int:
    return platform.load(bda.VIDEO_LAST_ROW, 1) + 1


def _cell(platform: Platform, page: int, row: int, column: int) -> int:
    """Linear address of a character; its attribute follows."""
    page_start = page * platform.load(bda.VIDEO_PAGE_BYTES, 2)
    offset = page_start + 2 * (row * _columns(platform) + column)
    return _memory(platform) + offset % 0x8000


def _set_crtc(platform: Platform, index: int, value: int) -> None:
    port = platform.load(bda.CRTC_PORT, 2)
    platform.write_port(port, index)
    platform.write_port(port + 1, value)


def _cursor(platform: Platform, page: int) -> tuple[int, int]:
    """Row and column."""
    position = platform.load(bda.CURSORS + 2 * (page % _PAGES), 2)
    return position >> 8, position & 0xFF


def _place_cursor(platform: Platform, page: int, row: int, column: int) -> None:
    page %= _PAGES
    platform.store(bda.CURSORS + 2 * page, 2, row << 8 | column)
    if page == platform.load(bda.VIDEO_PAGE, 1):
        address = (platform.load(bda.VIDEO_PAGE_START, 2) >> 1) + row * _columns(platform) + column
        _set_crtc(platform, _CURSOR_ADDRESS, address >> 8)
        _set_crtc(platform, _CURSOR_ADDRESS + 1, address)


def _set_shape(platform: Platform, shape: int) -> None:
    """CX of function 01h: start and end line for cells of 8 lines, which are stretched to the 16 of the VGA."""
    platform.store(bda.CURSOR_SHAPE, 2, shape)
    start, end = shape >> 8 & 0x3F, shape & 0x1F
    lines = platform.load(bda.CHARACTER_ROWS, 1)
    if lines > 8 and end < 8 and start < 0x20:
        start = (end + 1) * lines // 8 - 2 if end == start + 1 else (start + 1) * lines // 8 - 1
        end = (end + 1) * lines // 8 - 1
    _set_crtc(platform, _CURSOR_START, start)
    _set_crtc(platform, _CURSOR_START + 1, end)


def _teletype(platform: Platform, character: int, page: int, attribute: int | None) -> None:
    row, column = _cursor(platform, page)
    if character == 0x08:
        column = max(0, column - 1)
    elif character == 0x0A:
        row += 1
    elif character == 0x0D:
        column = 0
    elif character != 0x07:
        cell = _cell(platform, page, row, column)
        platform.store(cell, 1, character)
        if attribute is not None:
            platform.store(cell + 1, 1, attribute)
        column += 1
        if column >= _columns(platform):
            row, column = row + 1, 0
    if row >= _rows(platform):
        row = _rows(platform) - 1
        blank = platform.load(_cell(platform, page, row, column) + 1, 1)
        _scroll(platform, page, (0, 0, row, _columns(platform) - 1), 1, blank)
    _place_cursor(platform, page, row, column)


def _scroll(platform: Platform, page: int, window: tuple[int, int, int, int], lines: int, attribute: int) -> None:
    """Move a window (top, left, bottom, right) up by `lines`, down if negative; 0 clears it."""
    top, left, bottom, right = window
    bottom, right = min(bottom, _rows(platform) - 1), min(right, _columns(platform) - 1)
    if top > bottom or left > right:
        return
    width = right - left + 1
    blank = bytes((0x20, attribute)) * width
    rows = [platform.cpu.read(_cell(platform, page, row, left), 2 * width) for row in range(top, bottom + 1)]
    count = len(rows) if lines == 0 or abs(lines) > len(rows) else abs(lines)
    moved = [*rows[count:], *[blank] * count] if lines >= 0 else [*[blank] * count, *rows[: len(rows) - count]]
    for row, data in enumerate(moved, top):
        platform.cpu.write(_cell(platform, page, row, left), data)


def _mode(platform: Platform, frame: CallFrame) -> None:
    mode = frame.al & 0x7F
    set_mode(platform, mode, clear=not frame.al & 0x80)
    frame.al = 0x30 if mode in (0, 1, 2, 3, 7) else 0x20


def _shape(platform: Platform, frame: CallFrame) -> None:
    _set_shape(platform, frame.cx)


def _move(platform: Platform, frame: CallFrame) -> None:
    _place_cursor(platform, frame.bh, frame.dh, frame.dl)


def _where(platform: Platform, frame: CallFrame) -> None:
    frame.cx = platform.load(bda.CURSOR_SHAPE, 2)
    frame.dh, frame.dl = _cursor(platform, frame.bh)


def _light_pen(_platform: Platform, frame: CallFrame) -> None:
    frame.ah = 0


def _page(platform: Platform, frame: CallFrame) -> None:
    page = frame.al % _PAGES
    start = page * platform.load(bda.VIDEO_PAGE_BYTES, 2)
    platform.store(bda.VIDEO_PAGE, 1, page)
    platform.store(bda.VIDEO_PAGE_START, 2, start)
    _set_crtc(platform, _START_ADDRESS, start >> 9)
    _set_crtc(platform, _START_ADDRESS + 1, start >> 1)
    _place_cursor(platform, page, *_cursor(platform, page))


def _scroll_window(platform: Platform, frame: CallFrame) -> None:
    lines = frame.al if frame.ah == 0x06 else -frame.al
    page = platform.load(bda.VIDEO_PAGE, 1)
    _scroll(platform, page, (frame.ch, frame.cl, frame.dh, frame.dl), lines, frame.bh)


def _read_cell(platform: Platform, frame: CallFrame) -> None:
    frame.ax = platform.load(_cell(platform, frame.bh % _PAGES, *_cursor(platform, frame.bh)), 2)


def _write_cells(platform: Platform, frame: CallFrame) -> None:
    cell = _cell(platform, frame.bh % _PAGES, *_cursor(platform, frame.bh))
    end = _memory(platform) + 0x8000
    count = min(frame.cx, (end - cell) // 2)
    if frame.ah == 0x09:
        platform.cpu.write(cell, bytes((frame.al, frame.bl)) * count)
    else:
        cells = bytearray(platform.cpu.read(cell, 2 * count))
        cells[::2] = bytes((frame.al,)) * count
        platform.cpu.write(cell, bytes(cells))


def _teletype_service(platform: Platform, frame: CallFrame) -> None:
    _teletype(platform, frame.al, platform.load(bda.VIDEO_PAGE, 1), None)


def _get_mode(platform: Platform, frame: CallFrame) -> None:
    frame.al = platform.load(bda.VIDEO_MODE, 1) | platform.load(bda.VIDEO_CONTROL, 1) & 0x80
    frame.ah = _columns(platform)
    frame.bh = platform.load(bda.VIDEO_PAGE, 1)


def _font(platform: Platform, frame: CallFrame) -> None:
    if frame.al != 0x30:
        return
    fonts = {2: bda.ROM_FONT_8X16, 3: bda.ROM_FONT_8X8, 4: bda.ROM_FONT_8X8, 5: bda.ROM_FONT_8X16}
    if frame.bh in (0, 1):
        pointer = platform.load(4 * (0x1F if frame.bh == 0 else 0x43), 4)
        frame.es, frame.bp = pointer >> 16, pointer & 0xFFFF
    else:
        frame.es, frame.bp = bda.ROM_SEGMENT, fonts.get(frame.bh, bda.ROM_FONT_8X16)
    frame.cx = platform.load(bda.CHARACTER_ROWS, 2)
    frame.dl = platform.load(bda.VIDEO_LAST_ROW, 1)


def _alternate_select(platform: Platform, frame: CallFrame) -> None:
    if frame.bl == 0x10:
        frame.bh = 0 if platform.load(bda.CRTC_PORT, 2) == 0x3D4 else 1
        frame.bl = 3  # 256 KiB of video memory
        frame.cx = platform.load(bda.VIDEO_SWITCHES, 1) & 0x0F
    elif 0x30 <= frame.bl <= 0x36:
        frame.al = 0x12


def _write_string(platform: Platform, frame: CallFrame) -> None:
    """13h, a few characters at a time: each may scroll the screen, and there may be 65535 of them."""
    page = frame.bh % _PAGES
    width = 2 if frame.al & 2 else 1
    done = frame.attempt
    if done == 0:
        frame.scratch = platform.load(bda.CURSORS + 2 * page, 2)
        _place_cursor(platform, page, frame.dh, frame.dl)
    count = max(0, min(frame.cx - done, _STRING_PIECE))
    text = platform.cpu.read((frame.es << 4) + frame.bp + done * width, count * width)
    for at in range(0, len(text), width):
        _teletype(platform, text[at], page, text[at + 1] if width == 2 else frame.bl)
    if done + count < frame.cx:
        frame.again(done + count)
    elif not frame.al & 1:
        _place_cursor(platform, page, frame.scratch >> 8 & 0xFF, frame.scratch & 0xFF)


def _combination(_platform: Platform, frame: CallFrame) -> None:
    if frame.al == 0x00:
        frame.al = 0x1A
        frame.bx = 0x0008  # VGA with a colour display, no second one


def _vbe(_platform: Platform, frame: CallFrame) -> None:
    frame.ax = 0x0100  # not supported, and failed


_FUNCTIONS = {
    0x00: _mode,
    0x01: _shape,
    0x02: _move,
    0x03: _where,
    0x04: _light_pen,
    0x05: _page,
    0x06: _scroll_window,
    0x07: _scroll_window,
    0x08: _read_cell,
    0x09: _write_cells,
    0x0A: _write_cells,
    0x0E: _teletype_service,
    0x0F: _get_mode,
    0x11: _font,
    0x12: _alternate_select,
    0x13: _write_string,
    0x1A: _combination,
    0x4F: _vbe,
}
