"""What a row of the command table is made of: a name, a handler, and who may send it when.

It must not know any single command.
"""

import enum
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gdbstub.session import Session

# Work that is done in slices: yields console text (b"" for none) after each slice, and returns the reply.
Work = Generator[bytes, None, bytes]
# The reply, already escaped where it is binary; b"" says that the packet is not supported, None is no reply (yet).
Reply = bytes | Work | None
Handler = Callable[["Session", bytes], Reply]


class Access(enum.Enum):
    """Who may send a packet, and when."""

    LOOK = enum.auto()  # anybody, also while the guest runs
    CHANGE = enum.auto()  # the controller, while there is a guest and it is stopped
    CONTROL = enum.auto()  # the controller, whatever the guest does


@dataclass(frozen=True, slots=True)
class Command:
    """One packet: its name in the manual, and `handle`, which gets what follows the name.

    `text_errors` says that every gdb takes `E.text` in reply; otherwise only one that offered `error-message` does.
    """

    name: bytes
    handle: Handler
    access: Access = Access.LOOK
    text_errors: bool = False
