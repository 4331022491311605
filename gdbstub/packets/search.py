"""Work on large memory that spares the client its transfer: `qCRC` and `qSearch:memory`, in slices.

It must not hold up anybody: each slice is one read of bounded size.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING
from zlib import crc32

from gdbstub.fields import ADDRESS_LIMIT, EFAULT, PacketError, parse_range
from gdbstub.packets.command import Command, Work

if TYPE_CHECKING:
    from gdbstub.session import Session

SLICE_BYTES = 0x40000
_REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
_MASK32 = 0xFFFF_FFFF


def compute_crc(session: "Session", arguments: bytes) -> Work:
    """`qCRC:ADDR,LENGTH`: the checksum that gdb's `compare-sections` wants.

    It is CRC-32 with the most significant bit first, started at all ones and not inverted at the end: zlib's CRC of
    the bytes with their bits reversed, reversed.
    """
    address, length = parse_range(arguments.removeprefix(b":"))
    crc = 0
    for piece in _read_slices(session, address, length):
        crc = crc32(piece.translate(_REVERSED_BITS), crc)
        yield b""
    return b"C%08x" % int(f"{crc ^ _MASK32:032b}"[::-1], 2)


def search(session: "Session", arguments: bytes) -> Work:
    """`qSearch:memory:ADDR;LENGTH;PATTERN`: the first place where a binary pattern lies within the range."""
    kind, _, rest = arguments.removeprefix(b":").partition(b":")
    fields = rest.split(b";", 2)
    if kind != b"memory" or len(fields) != 3 or not fields[2]:
        raise PacketError("qSearch needs an address, a length and a pattern")
    address, length = parse_range(fields[0] + b"," + fields[1])
    pattern = fields[2]
    tail = b""
    position = address
    for piece in _read_slices(session, address, length):
        text = tail + piece
        found = text.find(pattern)
        if found >= 0:
            return b"1,%x" % (position - len(tail) + found)
        position += len(piece)
        # What may be the beginning of a pattern that goes on in the next slice.
        tail = text[-(len(pattern) - 1) :] if len(pattern) > 1 else b""
        yield b""
    return b"0"


def _read_slices(session: "Session", address: int, length: int) -> Iterator[bytes]:
    if address + length > ADDRESS_LIMIT:
        raise PacketError("the range goes beyond 4 GiB", EFAULT)
    end = address + length
    while address < end:
        piece = session.target.read_memory(address, min(SLICE_BYTES, end - address))
        if not piece:
            raise PacketError(f"cannot read memory at {address:#x}", EFAULT)
        yield piece
        address += len(piece)


COMMANDS = (
    Command(b"qCRC", compute_crc),
    Command(b"qSearch", search),
)
