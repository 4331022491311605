"""A PS/2 keyboard as the controller sees it: a source of scan codes that obeys commands.

It must not know the controller's translation to scan code set 1, nor who types.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from machine.devices.device import Device

ACKNOWLEDGE = 0xFA
RESEND = 0xFE
SELF_TEST_PASSED = 0xAA

_ECHO = 0xEE
_IDENTITY = (0xAB, 0x83)
_BREAK = 0xF0
_EXTENDED = 0xE0
_NONE = -1

_SET_LEDS = 0xED
_SCAN_CODE_SET = 0xF0
_IDENTIFY = 0xF2
_SET_RATE = 0xF3
_ENABLE = 0xF4
_DISABLE = 0xF5
_SET_DEFAULTS = 0xF6
_ALL_KEYS = range(0xF7, 0xFB)
_ONE_KEY = range(0xFB, 0xFE)
_REPEAT_LAST = 0xFE
_RESET = 0xFF

# What a keyboard in scan code set 1 sends, and what the controller makes of set 2, by the set 2 code.
SET2_TO_SET1 = bytes.fromhex(
    "ff43413f3d3b3c58 644442403e0f2959 65382a701d10025a 66712c1f1e11035b"
    "672e2d201205045c 68392f211413065d 693130232215075e 6a7232241608095f"
    "6b332517180b0a60 6c34352627190c61 6d7328741a0d626e 3a361c1b752b6376"
    "55567778797a0e7b 7c4f7d4b477e7f6f 5253504c4d480145 574e514a37494654"
) + bytes({0x83: 0x41, 0x84: 0x54}.get(code, code) for code in range(0x80, 0x100))

LEFT_SHIFT = 0x12
_ROWS = (
    ("`1234567890-=", "~!@#$%^&*()_+", "0e 16 1e 26 25 2e 36 3d 3e 46 45 4e 55"),
    ("qwertyuiop[]\\", "QWERTYUIOP{}|", "15 1d 24 2d 2c 35 3c 43 44 4d 54 5b 5d"),
    ("asdfghjkl;'", 'ASDFGHJKL:"', "1c 1b 23 2b 34 33 3b 42 4b 4c 52"),
    ("zxcvbnm,./", "ZXCVBNM<>?", "1a 22 21 2a 32 31 3a 41 49 4a"),
)
_PLAIN = {" ": 0x29, "\n": 0x5A, "\r": 0x5A, "\t": 0x0D, "\b": 0x66, "\x7f": 0x66, "\x1b": 0x76}
_SHIFTED: dict[str, int] = {}
for _plain, _shifted, _codes in _ROWS:
    _PLAIN |= dict(zip(_plain, bytes.fromhex(_codes), strict=True))
    _SHIFTED |= dict(zip(_shifted, bytes.fromhex(_codes), strict=True))


def scan_codes(text: str) -> bytes:
    """The set 2 codes of typing `text` on a US keyboard, each key pressed and released.

    Raises:
        ValueError: a character has no key.
    """
    codes = bytearray()
    for character in text:
        if character in _PLAIN:
            code = _PLAIN[character]
            codes += bytes((code, _BREAK, code))
        elif character in _SHIFTED:
            code = _SHIFTED[character]
            codes += bytes((LEFT_SHIFT, code, _BREAK, code, _BREAK, LEFT_SHIFT))
        else:
            raise ValueError(f"a US keyboard has no key for {character!r}")
    return bytes(codes)


class Ps2Keyboard(Device):
    """Replies to commands go before keys; keys that were pressed while scanning is off wait until it is on.

    Scan code sets 1 and 2 can be selected; set 3 is refused with "resend", as keyboards without it do. The self test
    takes no time. A byte from the host makes the keyboard drop what it had to say to the one before.

    Source: IBM PS/2 Hardware Interface Technical Reference, "Keyboard (101- and 102-key)".
    """

    _saved: ClassVar[tuple[str, ...]] = (
        "replies",
        "keys",
        "awaiting",
        "scanning",
        "scan_code_set",
        "leds",
        "rate",
        "last_sent",
    )

    def __init__(self, notify: Callable[[], None]) -> None:
        """`notify` is called when there may be something to `take`."""
        self._notify = notify
        self.replies = bytearray()
        self.keys = bytearray()
        self.power_on()

    def power_on(self) -> None:
        """Nothing is typed, defaults."""
        self.keys.clear()
        self.reset()

    def reset(self) -> None:
        """Forget replies; scanning in set 2. What somebody has typed stays."""
        self.replies.clear()
        self.awaiting = _NONE
        self.leds = 0
        self.last_sent = 0
        self._set_defaults(scanning=True)

    def _set_defaults(self, *, scanning: bool) -> None:
        self.scanning = scanning
        self.scan_code_set = 2
        self.rate = 0x2B

    def press(self, codes: bytes) -> None:
        """Inject scan codes of set 2, with F0h before those of a released key, at the current icount."""
        self.keys += codes
        self._notify()

    def type_text(self, text: str) -> None:
        """Inject the keys for `text`; raises ValueError for a character that has no key."""
        self.press(scan_codes(text))

    @property
    def pending(self) -> bool:
        """True if `take` has a byte."""
        return bool(self.replies) or (self.scanning and self.awaiting == _NONE and bool(self.keys))

    def take(self) -> int:
        """The next byte that the keyboard sends; `pending` is true."""
        if self.replies:
            self.last_sent = self.replies.pop(0)
            return self.last_sent
        code = self.keys.pop(0)
        if self.scan_code_set == 1:
            released = 0
            if code == _BREAK and self.keys:
                code = self.keys.pop(0)
                released = 0x80
            code = code if code == _EXTENDED else SET2_TO_SET1[code] | released
        self.last_sent = code
        return code

    def write(self, value: int) -> None:
        """A byte from the controller: a command, or the parameter of the last."""
        command, self.awaiting = self.awaiting, _NONE
        self.replies.clear()
        if command != _NONE and value < 0x80:
            self._take_parameter(command, value)
        else:
            self._obey(value)
        self._notify()

    def _take_parameter(self, command: int, value: int) -> None:
        if command == _SET_LEDS:
            self.leds = value & 7
        elif command == _SET_RATE:
            self.rate = value
        elif command == _SCAN_CODE_SET:
            if value == 0:
                self.replies += bytes((ACKNOWLEDGE, self.scan_code_set))
                return
            if value > 2:
                self.replies.append(RESEND)
                return
            self.scan_code_set = value
        self.replies.append(ACKNOWLEDGE)

    def _obey(self, command: int) -> None:
        if command in (_SET_LEDS, _SCAN_CODE_SET, _SET_RATE) or command in _ONE_KEY:
            self.awaiting = command
        elif command == _ECHO:
            self.replies.append(_ECHO)
            return
        elif command == _REPEAT_LAST:
            self.replies.append(self.last_sent)
            return
        elif command == _IDENTIFY:
            self.replies += bytes((ACKNOWLEDGE, *_IDENTITY))
            return
        elif command == _RESET:
            self.reset()
            self.replies += bytes((ACKNOWLEDGE, SELF_TEST_PASSED))
            return
        elif command == _ENABLE:
            self.scanning = True
        elif command in (_DISABLE, _SET_DEFAULTS):
            self._set_defaults(scanning=self.scanning and command == _SET_DEFAULTS)
        elif command not in _ALL_KEYS:
            self.replies.append(RESEND)
            return
        self.replies.append(ACKNOWLEDGE)

    def describe(self) -> str:
        """Scanning, set, LEDs and what waits."""
        leds = "".join(letter for bit, letter in enumerate("SNC") if self.leds >> bit & 1) or "-"
        return (
            f"keyboard: {'scans' if self.scanning else 'off'} set={self.scan_code_set} leds={leds} "
            f"replies={len(self.replies)} keys={len(self.keys)}"
        )
