"""The fields that packets are made of: numbers, ranges, thread-ids, hex text, error replies.

It must not know commands or the target.
"""

import re
from dataclasses import dataclass

# There is one guest, so one process.
PROCESS_ID = 1
ADDRESS_LIMIT = 1 << 32
ALL_THREADS = -1
ANY_THREAD = 0

# errno numbers, as other stubs use; gdb shows them and nothing more.
# Of qXfer the manual says 0 for what is malformed, and for an annex that there is not.
BAD_TRANSFER = 0
EPERM, ENOENT, ESRCH, EIO, E2BIG, EFAULT, EBUSY, EINVAL = 1, 2, 3, 5, 7, 14, 16, 22

_NUMBER = re.compile(rb"[0-9a-fA-F]{1,16}\Z")


class PacketError(Exception):
    """A request that gets an error reply: a number, and a sentence for clients that take one."""

    def __init__(self, text: str, number: int = EINVAL) -> None:
        super().__init__(text)
        self.text = text
        self.number = number


@dataclass(frozen=True, slots=True)
class ThreadId:
    """A thread-id; None for `process` if the client named none, ALL_THREADS and ANY_THREAD as in the manual."""

    thread: int
    process: int | None = None


def parse_number(text: bytes) -> int:
    """Return an unsigned hex number of at most 16 digits; PacketError if it is something else."""
    if not _NUMBER.match(text):
        raise PacketError(f"not a hex number: {_quote(text)}")
    return int(text, 16)


def parse_pair(text: bytes, separator: bytes = b",") -> tuple[int, int]:
    """Return the two hex numbers of `ADDR,LENGTH`."""
    first, found, second = text.partition(separator)
    if not found:
        raise PacketError(f"not two numbers: {_quote(text)}")
    return parse_number(first), parse_number(second)


def parse_range(text: bytes) -> tuple[int, int]:
    """Return address and length of `ADDR,LENGTH` after checking that the address is one of 32 bits."""
    address, length = parse_pair(text)
    if address >= ADDRESS_LIMIT:
        raise PacketError(f"address {address:#x} is beyond 4 GiB", EFAULT)
    return address, length


def parse_hex_bytes(text: bytes) -> bytes:
    """Return the bytes that an even number of hex digits stands for."""
    try:
        # `fromhex` skips spaces, which no packet has.
        data = bytes.fromhex(text.decode("ascii"))
    except ValueError:
        raise PacketError(f"not hex bytes: {_quote(text)}") from None
    if 2 * len(data) != len(text):
        raise PacketError(f"not hex bytes: {_quote(text)}")
    return data


def parse_thread_id(text: bytes) -> ThreadId:
    """Return the thread-id `TID`, `pPID.TID` or `pPID` (all its threads)."""
    process: int | None = None
    if text.startswith(b"p"):
        process_text, found, text = text[1:].partition(b".")
        process = _parse_id(process_text)
        if not found:
            text = b"-1"
    return ThreadId(_parse_id(text), process)


def _parse_id(text: bytes) -> int:
    return ALL_THREADS if text == b"-1" else parse_number(text)


def hex_text(text: str | bytes) -> bytes:
    """Return text as hex digits."""
    return (text.encode() if isinstance(text, str) else text).hex().encode()


def _quote(text: bytes) -> str:
    shown = text[:40].decode("latin-1")
    return f'"{shown}"' if shown.isprintable() else repr(shown)
