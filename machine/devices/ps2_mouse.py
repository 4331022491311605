"""A PS/2 mouse of the plainest kind as the controller's auxiliary port sees it.

It must not know the controller, nor what moves it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from machine.devices.device import Device
from machine.devices.ps2_keyboard import ACKNOWLEDGE, RESEND, SELF_TEST_PASSED

_IDENTITY = 0x00
_NONE = -1
_MOVE_LIMIT = 255

_SCALING_1 = 0xE6
_SCALING_2 = 0xE7
_SET_RESOLUTION = 0xE8
_STATUS = 0xE9
_STREAM = 0xEA
_READ_DATA = 0xEB
_END_WRAP = 0xEC
_WRAP = 0xEE
_REMOTE = 0xF0
_IDENTIFY = 0xF2
_SET_RATE = 0xF3
_ENABLE = 0xF4
_DISABLE = 0xF5
_SET_DEFAULTS = 0xF6
_REPEAT_LAST = 0xFE
_RESET = 0xFF


class Ps2Mouse(Device):
    """Three buttons and two axes; movements add up until they can be reported, to at most 255 in each direction.

    Source: IBM PS/2 Hardware Interface Technical Reference, "Auxiliary device".
    """

    _saved: ClassVar[tuple[str, ...]] = (
        "replies", "awaiting", "reporting", "remote", "wrap", "scaling", "resolution", "rate", "buttons", "dx", "dy",
        "moved", "last_sent",
    )  # fmt: skip

    def __init__(self, notify: Callable[[], None]) -> None:
        """`notify` is called when there may be something to `take`."""
        self._notify = notify
        self.replies = bytearray()
        self.reset()

    def reset(self) -> None:
        """Defaults; reporting is off."""
        self.replies.clear()
        self.awaiting = _NONE
        self.wrap = False
        self.buttons = 0
        self.last_sent = 0
        self._set_defaults()

    def _set_defaults(self) -> None:
        self.reporting = False
        self.remote = False
        self.scaling = 1
        self.resolution = 2
        self.rate = 100
        self.dx = self.dy = 0
        self.moved = False

    def move(self, dx: int, dy: int, buttons: int = 0) -> None:
        """Inject a movement, up and right positive, with the buttons (left 1, right 2, middle 4) that are down."""
        self.dx = max(-_MOVE_LIMIT, min(_MOVE_LIMIT, self.dx + dx))
        self.dy = max(-_MOVE_LIMIT, min(_MOVE_LIMIT, self.dy + dy))
        self.buttons = buttons & 7
        self.moved = True
        self._offer()
        self._notify()

    def _offer(self) -> None:
        """Report what has moved once the report before is out."""
        if self.moved and self.reporting and not self.remote and not self.wrap and not self.replies:
            self._report()

    def _report(self) -> None:
        signs = (0x10 if self.dx < 0 else 0) | (0x20 if self.dy < 0 else 0)
        self.replies += bytes((0x08 | signs | self.buttons, self.dx & 0xFF, self.dy & 0xFF))
        self.dx = self.dy = 0
        self.moved = False

    @property
    def pending(self) -> bool:
        """True if `take` has a byte."""
        return bool(self.replies)

    def take(self) -> int:
        """The next byte that the mouse sends; `pending` is true."""
        self.last_sent = self.replies.pop(0)
        self._offer()
        return self.last_sent

    def write(self, value: int) -> None:
        """A byte from the controller: a command, or the parameter of the last."""
        command, self.awaiting = self.awaiting, _NONE
        self.replies.clear()
        if self.wrap and value not in (_END_WRAP, _RESET):
            self.replies.append(value)
        elif command == _SET_RESOLUTION:
            self.resolution = value & 3
            self.replies.append(ACKNOWLEDGE)
        elif command == _SET_RATE:
            self.rate = value
            self.replies.append(ACKNOWLEDGE)
        else:
            self._obey(value)
        self._notify()

    def _obey(self, command: int) -> None:
        if command == _RESET:
            self.reset()
            self.replies += bytes((ACKNOWLEDGE, SELF_TEST_PASSED, _IDENTITY))
            return
        if command == _REPEAT_LAST:
            self.replies.append(self.last_sent)
            return
        if command in (_SCALING_1, _SCALING_2):
            self.scaling = 2 if command == _SCALING_2 else 1
        elif command in (_SET_RESOLUTION, _SET_RATE):
            self.awaiting = command
        elif command in (_STREAM, _REMOTE):
            self.remote = command == _REMOTE
        elif command in (_WRAP, _END_WRAP):
            self.wrap = command == _WRAP
        elif command in (_ENABLE, _DISABLE):
            self.reporting = command == _ENABLE
        elif command == _SET_DEFAULTS:
            self._set_defaults()
        elif command not in (_STATUS, _READ_DATA, _IDENTIFY):
            self.replies.append(RESEND)
            return
        self.replies.append(ACKNOWLEDGE)
        if command == _STATUS:
            self.replies += bytes((self._status, self.resolution, self.rate))
        elif command == _READ_DATA:
            self._report()
        elif command == _IDENTIFY:
            self.replies.append(_IDENTITY)

    @property
    def _status(self) -> int:
        buttons = (self.buttons & 1) << 2 | (self.buttons & 4) >> 1 | (self.buttons & 2) >> 1
        return self.remote << 6 | self.reporting << 5 | (self.scaling == 2) << 4 | buttons

    def describe(self) -> str:
        """Reporting and what waits."""
        return f"mouse: {'reports' if self.reporting else 'off'} replies={len(self.replies)}"
