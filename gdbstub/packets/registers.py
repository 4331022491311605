"""The packets that read and write registers: `g G p P`.

It must not know what the registers mean.
"""

from typing import TYPE_CHECKING

from gdbstub.fields import PacketError, parse_number
from gdbstub.packets.command import Access, Command

if TYPE_CHECKING:
    from gdbstub.session import Session


def read_all(session: "Session", _arguments: bytes) -> bytes:
    """`g`: all registers of the thread that `Hg` chose."""
    return session.layout.encode_all(session.target.read_registers(session.general_thread()))


def write_all(session: "Session", arguments: bytes) -> bytes:
    """`G XX...`: write what differs, so that registers which cannot be written do no harm if they are left alone."""
    thread = session.general_thread()
    wanted = session.layout.decode_all(arguments)
    current = session.target.read_registers(thread)
    for number, value in enumerate(wanted):
        if value is not None and value != current[number]:
            session.target.write_register(thread, number, value)
    return b"OK"


def read_one(session: "Session", arguments: bytes) -> bytes:
    """`p N`: one register."""
    number = _parse_register(session, arguments)
    return session.layout.encode(number, session.target.read_register(session.general_thread(), number))


def write_one(session: "Session", arguments: bytes) -> bytes:
    """`P N=VALUE`: one register."""
    number_text, found, digits = arguments.partition(b"=")
    if not found:
        raise PacketError("P needs a register and a value")
    number = _parse_register(session, number_text)
    session.target.write_register(session.general_thread(), number, session.layout.decode(number, digits))
    return b"OK"


def _parse_register(session: "Session", text: bytes) -> int:
    number = parse_number(text)
    if number >= len(session.layout):
        raise PacketError(f"there is no register {number}")
    return number


COMMANDS = (
    Command(b"g", read_all),
    Command(b"G", write_all, Access.CHANGE, text_errors=True),
    Command(b"p", read_one),
    Command(b"P", write_one, Access.CHANGE, text_errors=True),
)
