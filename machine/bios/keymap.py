"""What BIOS code each key of a US keyboard gives, plain and with Shift, Ctrl and Alt, by scan code of set 1.

A code is the scan code in the high byte and the character in the low one, as INT 16h returns it; a table only.

Source: IBM PS/2 and PC BIOS Interface Technical Reference, "Interrupt 16H - Keyboard", tables of scan codes.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Key:
    """Codes of one key; None where the combination gives none."""

    plain: int | None
    shift: int | None
    ctrl: int | None
    alt: int | None
    #: "letter": Caps Lock acts as Shift; "keypad": Num Lock does; otherwise empty.
    lock: str = ""


def _characters() -> dict[int, Key]:
    rows = (
        (0x02, "1234567890-=", "!@#$%^&*()_+"),
        (0x10, "qwertyuiop[]", "QWERTYUIOP{}"),
        (0x1E, "asdfghjkl;'`", 'ASDFGHJKL:"~'),
        (0x2B, "\\zxcvbnm,./", "|ZXCVBNM<>?"),
    )
    ctrl_characters = {"2": 0x0300, "6": 0x1E, "-": 0x1F, "[": 0x1B, "]": 0x1D, "\\": 0x1C}
    keys = {}
    for first, plain_row, shift_row in rows:
        for scan, (plain, shift) in enumerate(zip(plain_row, shift_row, strict=True), first):
            alt = scan << 8
            if first == 0x02:
                alt = scan + 0x76 << 8  # Alt with the top row has codes of its own, 7800h to 8300h
            if plain.isalpha():
                ctrl: int | None = scan << 8 | ord(shift) & 0x1F
            elif plain in ctrl_characters:
                ctrl = scan << 8 | ctrl_characters[plain] & 0xFF
            else:
                ctrl = None
            lock = "letter" if plain.isalpha() else ""
            keys[scan] = Key(scan << 8 | ord(plain), scan << 8 | ord(shift), ctrl, alt, lock)
    return keys


def _functions() -> dict[int, Key]:
    keys = {0x3B + n: Key(0x3B + n << 8, 0x54 + n << 8, 0x5E + n << 8, 0x68 + n << 8) for n in range(10)}
    keys[0x57] = Key(0x8500, 0x8700, 0x8900, 0x8B00)
    keys[0x58] = Key(0x8600, 0x8800, 0x8A00, 0x8C00)
    return keys


# Scan code, character with Num Lock, code with Ctrl, code of the grey twin (prefix E0h) with Alt.
_KEYPAD = (
    (0x47, "7", 0x77, 0x97),
    (0x48, "8", 0x8D, 0x98),
    (0x49, "9", 0x84, 0x99),
    (0x4B, "4", 0x73, 0x9B),
    (0x4C, "5", 0x8F, None),
    (0x4D, "6", 0x74, 0x9D),
    (0x4F, "1", 0x75, 0x9F),
    (0x50, "2", 0x91, 0xA0),
    (0x51, "3", 0x76, 0xA1),
    (0x52, "0", 0x92, 0xA2),
    (0x53, ".", 0x93, 0xA3),
)

#: Alt with these builds a character from its decimal number.
ALT_DIGITS = {scan: int(character) for scan, character, _, _ in _KEYPAD if character.isdigit()}

#: Keys without prefix.
KEYS: dict[int, Key] = {
    0x01: Key(0x011B, 0x011B, 0x011B, 0x0100),
    0x0E: Key(0x0E08, 0x0E08, 0x0E7F, 0x0E00),
    0x0F: Key(0x0F09, 0x0F00, 0x9400, 0xA500),
    0x1C: Key(0x1C0D, 0x1C0D, 0x1C0A, 0x1C00),
    0x37: Key(0x372A, 0x372A, 0x9600, 0x3700),
    0x39: Key(0x3920, 0x3920, 0x3920, 0x3920),
    0x4A: Key(0x4A2D, 0x4A2D, 0x8E00, 0x4A00),
    0x4E: Key(0x4E2B, 0x4E2B, 0x9000, 0x4E00),
    0x56: Key(0x565C, 0x567C, None, None),
    **{scan: Key(scan << 8, scan << 8 | ord(number), ctrl << 8, None, "keypad") for scan, number, ctrl, _ in _KEYPAD},
    **_characters(),
    **_functions(),
}

#: Keys with the prefix E0h; the cursor keys carry it as their character.
E0_KEYS: dict[int, Key] = {
    0x1C: Key(0xE00D, 0xE00D, 0xE00A, 0xA600),
    0x35: Key(0xE02F, 0xE02F, 0x9500, 0xA400),
    **{
        scan: Key(scan << 8 | 0xE0, scan << 8 | 0xE0, ctrl << 8 | 0xE0, alt << 8)
        for scan, _, ctrl, alt in _KEYPAD
        if alt is not None
    },
}
