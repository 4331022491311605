"""Monitor commands about the PC around the CPU: devices, the screen, and what a user at the machine would type.

They ask devices to describe themselves; what a device does is known to the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from gdbstub.monitor.command import Command, usage_error
from gdbstub.target import TargetError

if TYPE_CHECKING:
    from gdbstub.guest import GuestTarget

_RELEASE = 0xF0
_EXTENDED = 0xE0
# Scan codes of set 2 for keys that no character names; those above 0xFF are sent after E0h.
_KEYS = {
    "shift": 0x12, "shift_r": 0x59, "ctrl": 0x14, "ctrl_r": 0xE014, "alt": 0x11, "alt_r": 0xE011, "meta_l": 0xE01F,
    "meta_r": 0xE027, "menu": 0xE02F, "esc": 0x76, "tab": 0x0D, "ret": 0x5A, "spc": 0x29, "backspace": 0x66,
    "caps_lock": 0x58, "num_lock": 0x77, "scroll_lock": 0x7E, "insert": 0xE070, "delete": 0xE071, "home": 0xE06C,
    "end": 0xE069, "pgup": 0xE07D, "pgdn": 0xE07A, "up": 0xE075, "down": 0xE072, "left": 0xE06B, "right": 0xE074,
    "f1": 0x05, "f2": 0x06, "f3": 0x04, "f4": 0x0C, "f5": 0x03, "f6": 0x0B, "f7": 0x83, "f8": 0x0A, "f9": 0x01,
    "f10": 0x09, "f11": 0x78, "f12": 0x07,
}  # fmt: skip
_ESCAPES = {"\\n": "\n", "\\t": "\t", "\\b": "\b", "\\e": "\x1b", "\\\\": "\\"}


def show_device(topic: str) -> Command:
    """`info TOPIC` of devices that describe themselves."""
    summary, names = _DEVICES[topic]

    def show(guest: GuestTarget, _words: list[str]) -> Iterator[str]:
        devices = guest.machine.board.devices
        for name in names or devices:
            if name in devices:
                text = devices[name].describe()
                yield f"{text}\n" if text.startswith(f"{name}:") else f"{name}: {text}\n"

    return Command(f"info {topic}", "", summary, show)


# By topic: what it shows, and the devices of the board that do.
_DEVICES = {
    "pic": ("the two interrupt controllers: requests, in service, masks", ("pic",)),
    "pit": ("the interval timer's channels", ("pit", "port61")),
    "rtc": ("the clock chip and CMOS memory", ("rtc",)),
    "serial": ("the serial ports: settings, what waits in the FIFOs", ("com1", "com2")),
    "keyboard": ("the keyboard, the mouse, and their controller", ("i8042", "keyboard", "mouse")),
    "vga": ("the display: mode, cursor", ("vga",)),
    "pci": ("the PCI bus", ("pci",)),
    "ata": ("the hard disk channel", ("ata",)),
    "devices": ("every device", ()),
}


def show_screen(guest: GuestTarget, _words: list[str]) -> Iterator[str]:
    """`screen`: the text page, with a frame."""
    lines = guest.machine.board.vga.screen()
    width = max(map(len, lines), default=0)
    rule = "+" + "-" * width + "+\n"
    yield rule + "".join(f"|{line:{width}}|\n" for line in lines) + rule


def type_text(guest: GuestTarget, words: list[str]) -> Iterator[str]:
    """`type TEXT`."""
    text = _unescape(words[0] if words else "")
    if not text:
        raise usage_error("type")
    try:
        guest.machine.type_text(text)
    except ValueError as error:
        raise TargetError(f"{error}.") from error
    yield f"{len(text)} keys are on their way.\n"


def send_key(guest: GuestTarget, words: list[str]) -> Iterator[str]:
    """`sendkey KEY[-KEY...]`: keys pressed together."""
    from machine.devices.ps2_keyboard import scan_codes

    if len(words) != 1:
        raise usage_error("sendkey")
    names = words[0].lower().split("-") if words[0] != "-" else ["-"]
    codes = []
    for name in names:
        if name in _KEYS:
            codes.append(_KEYS[name])
        elif len(name) == 1:
            try:
                codes.append(scan_codes(name)[0])
            except ValueError as error:
                raise TargetError(f"{error}.") from error
        else:
            raise TargetError(f"There is no key `{name}`; there are characters, and: {' '.join(_KEYS)}.")
    sequence = b"".join(_encode(code, release=False) for code in codes)
    sequence += b"".join(_encode(code, release=True) for code in reversed(codes))
    guest.machine.press_keys(sequence)
    yield f"Pressed {' and '.join(names)}.\n"


def _encode(code: int, *, release: bool) -> bytes:
    prefix = bytes((_EXTENDED,)) if code > 0xFF else b""
    return prefix + (bytes((_RELEASE,)) if release else b"") + bytes((code & 0xFF,))


def send_serial(guest: GuestTarget, words: list[str]) -> Iterator[str]:
    r"""`serial TEXT`: what a terminal at COM1 would send."""
    text = _unescape(words[0] if words else "")
    if not text:
        raise usage_error("serial")
    data = text.encode("latin-1", "replace")
    guest.machine.feed_serial(0, data)
    yield f"{len(data)} bytes are on their way to COM1.\n"


def raise_nmi(guest: GuestTarget, _words: list[str]) -> Iterator[str]:
    """`nmi`."""
    guest.machine.raise_nmi()
    pending = guest.machine.lines.nmi_pending
    yield (
        "The NMI will be taken at the next instruction boundary that allows one.\n"
        if pending
        else "The guest has masked NMI by bit 7 of port 70h.\n"
    )


def _unescape(text: str) -> str:
    out, at = [], 0
    while at < len(text):
        pair = text[at : at + 2]
        out.append(_ESCAPES.get(pair, text[at]))
        at += 2 if pair in _ESCAPES else 1
    return "".join(out)


COMMANDS = (
    *(show_device(topic) for topic in _DEVICES),
    Command("screen", "", "what the display shows, as text", show_screen),
    Command(
        "type",
        "TEXT",
        "type TEXT on the guest's keyboard (\\n is Enter)",
        type_text,
        changes=True,
        raw=True,
        details="Escapes: \\n Enter, \\t Tab, \\b Backspace, \\e Esc, \\\\ a backslash. A US keyboard is assumed.",
    ),
    Command(
        "sendkey",
        "KEY[-KEY...]",
        "press keys together and release them: `sendkey ctrl-alt-delete`, `sendkey f2`",
        send_key,
        changes=True,
        details=f"KEY is a character or one of {' '.join(_KEYS)}.",
    ),
    Command(
        "serial",
        "TEXT",
        "send TEXT to COM1, as a terminal there would (\\n is a line feed)",
        send_serial,
        changes=True,
        raw=True,
        details="The bytes arrive as fast as the line and the guest allow, once the guest runs.",
    ),
    Command("nmi", "", "raise a non-maskable interrupt", raise_nmi, changes=True),
)
