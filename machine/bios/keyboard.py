"""The keyboard: scan codes into the buffer of the BIOS data area (IRQ 1), and INT 16h, which takes them out.

It must not know the keyboard controller: the ROM has read the scan code.

Source: IBM PS/2 and PC BIOS Interface Technical Reference, "Interrupt 09H" and "Interrupt 16H".
"""

from machine.bios import bda
from machine.bios.frame import CallFrame
from machine.bios.keymap import ALT_DIGITS, E0_KEYS, KEYS, Key
from machine.bios.platform import Platform

# What the ROM does after the interrupt; numbers as in rom.S.
KEY_NOTHING = 0
KEY_BREAK = 1
KEY_PRINT_SCREEN = 2
KEY_REBOOT = 3
KEY_SYSREQ_DOWN = 4
KEY_SYSREQ_UP = 5

_RELEASED = 0x80
_WARM = 0x1234
_DELETE = 0x53
_PRINT_SCREEN = 0x37
_PAUSE = 0x45
_BREAK = 0x46
_ALT_SYSREQ = 0x54

# Modifier keys: flag in SHIFT_FLAGS; and, where there is one, a byte and a flag that tell left from right.
_MODIFIERS = {
    (False, 0x2A): (bda.LEFT_SHIFT, 0, 0),
    (False, 0x36): (bda.RIGHT_SHIFT, 0, 0),
    (False, 0x1D): (bda.CTRL, bda.SHIFT_FLAGS_2, bda.LEFT_CTRL),
    (True, 0x1D): (bda.CTRL, bda.KEYBOARD_FLAGS_3, bda.RIGHT_CTRL),
    (False, 0x38): (bda.ALT, bda.SHIFT_FLAGS_2, bda.LEFT_ALT),
    (True, 0x38): (bda.ALT, bda.KEYBOARD_FLAGS_3, bda.RIGHT_ALT),
}
_LOCKS = {
    0x3A: (bda.CAPS_LOCK, bda.CAPS_DOWN),
    0x45: (bda.NUM_LOCK, bda.NUM_DOWN),
    0x46: (bda.SCROLL_LOCK, bda.SCROLL_DOWN),
}
_FAKE_SHIFTS = (0x2A, 0x36)


def interrupt(platform: Platform, frame: CallFrame) -> None:
    """IRQ 1: AL is the scan code; on return, AL says what the ROM is to do (`KEY_*`)."""
    frame.al = _take(platform, frame.al)


def _take(platform: Platform, scan: int) -> int:
    flags_3 = platform.load(bda.KEYBOARD_FLAGS_3, 1)
    extended = bool(flags_3 & bda.LAST_WAS_E0)
    if scan in (0xE0, 0xE1):
        platform.set_bits(bda.KEYBOARD_FLAGS_3, bda.LAST_WAS_E0 if scan == 0xE0 else bda.LAST_WAS_E1, on=True)
        return KEY_NOTHING
    if scan in (0xFA, 0xFE, 0xEE, 0x00, 0xFF):  # acknowledgements and errors, not keys
        return KEY_NOTHING
    if flags_3 & bda.LAST_WAS_E1:  # Pause: E1 1D 45, then E1 9D C5
        if scan & ~_RELEASED == _PAUSE:
            platform.set_bits(bda.KEYBOARD_FLAGS_3, bda.LAST_WAS_E1, on=False)
            if not scan & _RELEASED:
                platform.set_bits(bda.SHIFT_FLAGS_2, bda.PAUSED, on=True)
        return KEY_NOTHING
    platform.set_bits(bda.KEYBOARD_FLAGS_3, bda.LAST_WAS_E0, on=False)
    return _key(platform, scan & ~_RELEASED, extended=extended, pressed=not scan & _RELEASED)


def _key(platform: Platform, scan: int, *, extended: bool, pressed: bool) -> int:
    if extended and scan in _FAKE_SHIFTS:
        return KEY_NOTHING
    modifier = _MODIFIERS.get((extended, scan))
    if modifier is not None:
        _modify(platform, modifier, pressed=pressed)
        return KEY_NOTHING
    shift = platform.load(bda.SHIFT_FLAGS, 1)
    if scan in _LOCKS and not extended and not (shift & bda.CTRL and scan != 0x3A):
        _toggle(platform, *_LOCKS[scan], pressed=pressed)
        return KEY_NOTHING
    if scan == _ALT_SYSREQ and not extended:
        platform.set_bits(bda.SHIFT_FLAGS_2, bda.SYSREQ_DOWN, on=pressed)
        return KEY_SYSREQ_DOWN if pressed else KEY_SYSREQ_UP
    if scan == 0x52 and not (shift & (bda.CTRL | bda.ALT)) and (extended or not _shifted(shift, "keypad")):
        _toggle(platform, bda.INSERT, bda.INSERT_DOWN, pressed=pressed)
    if not pressed:
        return KEY_NOTHING
    return _press(platform, scan, shift, extended=extended)


def _press(platform: Platform, scan: int, shift: int, *, extended: bool) -> int:
    if platform.load(bda.SHIFT_FLAGS_2, 1) & bda.PAUSED:
        platform.set_bits(bda.SHIFT_FLAGS_2, bda.PAUSED, on=False)  # any key ends the pause
        return KEY_NOTHING
    if shift & bda.CTRL and shift & bda.ALT and scan == _DELETE:
        platform.store(bda.WARM_BOOT, 2, _WARM)
        return KEY_REBOOT
    if scan == _BREAK and shift & bda.CTRL:
        start = platform.load(bda.KEY_BUFFER_START, 2)
        platform.store(bda.KEY_HEAD, 2, start)
        platform.store(bda.KEY_TAIL, 2, start)
        platform.store(bda.BREAK_FLAG, 1, 0x80)
        put_key(platform, 0)
        return KEY_BREAK
    if scan == _PRINT_SCREEN and extended and not shift & (bda.CTRL | bda.ALT):
        return KEY_PRINT_SCREEN
    if scan == _PAUSE and shift & bda.CTRL:
        platform.set_bits(bda.SHIFT_FLAGS_2, bda.PAUSED, on=True)
        return KEY_NOTHING
    if shift & bda.ALT and not extended and scan in ALT_DIGITS:
        number = platform.load(bda.ALT_NUMBER, 1) * 10 + ALT_DIGITS[scan]
        platform.store(bda.ALT_NUMBER, 1, number)
        return KEY_NOTHING
    key = (E0_KEYS if extended else KEYS).get(scan)
    code = _code(key, shift) if key else None
    if code is not None:
        put_key(platform, code)
    return KEY_NOTHING


def _code(key: Key, shift: int) -> int | None:
    if shift & bda.ALT:
        return key.alt
    if shift & bda.CTRL:
        return key.ctrl
    return key.shift if _shifted(shift, key.lock) else key.plain


def _shifted(shift: int, lock: str) -> bool:
    locked = {"letter": bda.CAPS_LOCK, "keypad": bda.NUM_LOCK}.get(lock, 0)
    return bool(shift & (bda.LEFT_SHIFT | bda.RIGHT_SHIFT)) != bool(shift & locked)


def _modify(platform: Platform, modifier: tuple[int, int, int], *, pressed: bool) -> None:
    flag, side_byte, side_flag = modifier
    if side_byte:
        platform.set_bits(side_byte, side_flag, on=pressed)
        left = platform.load(bda.SHIFT_FLAGS_2, 1) & (bda.LEFT_CTRL if flag == bda.CTRL else bda.LEFT_ALT)
        right = platform.load(bda.KEYBOARD_FLAGS_3, 1) & (bda.RIGHT_CTRL if flag == bda.CTRL else bda.RIGHT_ALT)
        platform.set_bits(bda.SHIFT_FLAGS, flag, on=bool(left or right))
    else:
        platform.set_bits(bda.SHIFT_FLAGS, flag, on=pressed)
    if flag == bda.ALT and not pressed:
        number = platform.load(bda.ALT_NUMBER, 1)
        if number:
            platform.store(bda.ALT_NUMBER, 1, 0)
            put_key(platform, number)


def _toggle(platform: Platform, state: int, down: int, *, pressed: bool) -> None:
    """A lock key acts when it goes down, once, however often it repeats."""
    if pressed and not platform.load(bda.SHIFT_FLAGS_2, 1) & down:
        platform.store(bda.SHIFT_FLAGS, 1, platform.load(bda.SHIFT_FLAGS, 1) ^ state)
    platform.set_bits(bda.SHIFT_FLAGS_2, down, on=pressed)


def put_key(platform: Platform, code: int) -> bool:
    """Append a key to the buffer; False if it is full."""
    tail = platform.load(bda.KEY_TAIL, 2)
    following = _after(platform, tail)
    if following == platform.load(bda.KEY_HEAD, 2):
        return False
    platform.store(bda.BDA_FIRST + tail, 2, code)
    platform.store(bda.KEY_TAIL, 2, following)
    return True


def _after(platform: Platform, position: int) -> int:
    following = position + 2
    if following >= platform.load(bda.KEY_BUFFER_END, 2):
        return platform.load(bda.KEY_BUFFER_START, 2)
    return following


def service(platform: Platform, frame: CallFrame) -> None:
    """INT 16h: 00h, 10h read; 01h, 11h look; 02h, 12h shift states; 03h rate; 05h put; 09h, 0Ah, 92h, A2h abilities."""
    function = frame.ah
    if function in (0x00, 0x10):
        _read(platform, frame, extended=function == 0x10)
    elif function in (0x01, 0x11):
        key = _peek(platform)
        frame.zero = key is None
        if key is not None:
            frame.ax = key if function == 0x11 else _compatible(key)
    elif function in (0x02, 0x12):
        frame.al = platform.load(bda.SHIFT_FLAGS, 1)
        if function == 0x12:
            frame.ah = _extended_shift_flags(platform)
    elif function == 0x05:
        frame.al = 0 if put_key(platform, frame.cx) else 1
    elif function == 0x09:
        frame.al = 0x30  # functions 0Ah and 10h to 12h are there
    elif function == 0x0A:
        frame.bx = 0x41AB  # an MF2 keyboard behind a translating controller
    elif function == 0x92:
        frame.ah = 0x80  # DOS's question for functions 10h to 12h: "not 92h" means yes


def _read(platform: Platform, frame: CallFrame, *, extended: bool) -> None:
    key = _peek(platform)
    if key is None:
        frame.wait()
        return
    platform.store(bda.KEY_HEAD, 2, _after(platform, platform.load(bda.KEY_HEAD, 2)))
    frame.ax = key if extended else _compatible(key)


def _peek(platform: Platform) -> int | None:
    head = platform.load(bda.KEY_HEAD, 2)
    if head == platform.load(bda.KEY_TAIL, 2):
        return None
    return platform.load(bda.BDA_FIRST + head, 2)


def _compatible(key: int) -> int:
    """A key as the 84-key keyboard's functions give it: nothing tells grey keys from those of the keypad."""
    if key >> 8 == 0xE0:
        return {0x0D: 0x1C0D, 0x0A: 0x1C0A, 0x2F: 0x352F}.get(key & 0xFF, key)
    return key & 0xFF00 if key & 0xFF == 0xE0 and key >> 8 else key


def _extended_shift_flags(platform: Platform) -> int:
    second = platform.load(bda.SHIFT_FLAGS_2, 1)
    third = platform.load(bda.KEYBOARD_FLAGS_3, 1)
    return second & ~(bda.SYSREQ_DOWN | bda.PAUSED) | (second & bda.SYSREQ_DOWN) << 5 | third & 0x0C
