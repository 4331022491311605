"""The packets that read and write memory: `m x M X`.

It must not know whether addresses are linear or physical; that is between the user and the target.
"""

from typing import TYPE_CHECKING

from gdbstub.fields import ADDRESS_LIMIT, EFAULT, PacketError, parse_hex_bytes, parse_range
from gdbstub.framing import escape
from gdbstub.packets.command import Access, Command

if TYPE_CHECKING:
    from gdbstub.session import Session


def _read(session: "Session", arguments: bytes) -> bytes:
    """Read what fits a reply; a client that gets less than it asked for asks again from there."""
    address, length = parse_range(arguments)
    length = min(length, session.packet_size_bytes // 2, ADDRESS_LIMIT - address)
    data = session.target.read_memory(address, length)
    if length and not data:
        raise PacketError(f"cannot read memory at {address:#x}", EFAULT)
    return data


def read_hex(session: "Session", arguments: bytes) -> bytes:
    """`m ADDR,LENGTH`: as hex digits. An empty reply would mean that the packet is unknown, so nothing is an error."""
    data = _read(session, arguments)
    if not data:
        raise PacketError("nothing to read")
    return data.hex().encode()


def read_binary(session: "Session", arguments: bytes) -> bytes:
    """`x ADDR,LENGTH`: as binary data after a `b`, as gdb 16 introduced it (lldb's packet of this name has no `b`)."""
    return b"b" + escape(_read(session, arguments))


def write_hex(session: "Session", arguments: bytes) -> bytes:
    """`M ADDR,LENGTH:XX...`: hex digits."""
    where, _, digits = arguments.partition(b":")
    return _write(session, where, parse_hex_bytes(digits))


def write_binary(session: "Session", arguments: bytes) -> bytes:
    """`X ADDR,LENGTH:DATA`: binary data; length 0 only asks whether the packet is known."""
    where, _, data = arguments.partition(b":")
    return _write(session, where, data)


def _write(session: "Session", where: bytes, data: bytes) -> bytes:
    address, length = parse_range(where)
    if length != len(data):
        raise PacketError(f"{len(data)} bytes of data, but a length of {length}")
    if address + length > ADDRESS_LIMIT:
        raise PacketError("the write goes beyond 4 GiB", EFAULT)
    if data:
        session.target.write_memory(address, data)
    return b"OK"


COMMANDS = (
    Command(b"m", read_hex),
    Command(b"x", read_binary),
    Command(b"M", write_hex, Access.CHANGE, text_errors=True),
    Command(b"X", write_binary, Access.CHANGE, text_errors=True),
)
