"""The client's end of the wire in tests: its own framing, written from the manual and not from gdbstub.framing."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count

from gdbstub.debuggee import Debuggee
from gdbstub.session import Session
from tests.gdbstub.toy import ToyTarget

MAX_STINTS = 2000


def pack(payload: bytes) -> bytes:
    """Frame a payload as a client does."""
    return b"$" + payload + b"#" + f"{sum(payload) % 256:02x}".encode()


def expand(payload: bytes) -> bytes:
    """Undo run-length encoding, byte by byte."""
    result = bytearray()
    position = 0
    while position < len(payload):
        if payload[position] == 0x2A:
            result += result[-1:] * (payload[position + 1] - 29)
            position += 2
        else:
            result.append(payload[position])
            position += 1
    return bytes(result)


def unescape(payload: bytes) -> bytes:
    """Undo the escapes of binary data."""
    return re.sub(rb"}(.)", lambda match: bytes((match[1][0] ^ 0x20,)), payload, flags=re.DOTALL)


@dataclass
class Received:
    """What a server sent: packets (runs expanded, still escaped), and the acknowledgements between them."""

    packets: list[bytes]
    acks: bytes


def unpack(stream: bytes) -> Received:
    """Take the server's bytes apart; every checksum must be right."""
    packets, acks = [], b""
    position = 0
    while position < len(stream):
        if stream[position : position + 1] == b"$":
            end = stream.index(b"#", position)
            payload = stream[position + 1 : end]
            assert int(stream[end + 1 : end + 3], 16) == sum(payload) % 256
            packets.append(expand(payload))
            position = end + 3
        else:
            assert stream[position : position + 1] in (b"+", b"-")
            acks += stream[position : position + 1]
            position += 1
    return Received(packets, acks)


class Talk:
    """A session on a toy target, and a client that speaks without acknowledgements unless told otherwise."""

    def __init__(self, target: ToyTarget | None = None, debuggee: Debuggee | None = None, *, ack: bool = False) -> None:
        self.target = target or ToyTarget()
        # A clock that counts its readings: time passes, the same in every run.
        clock = count()
        self.debuggee = debuggee or Debuggee(self.target, lambda: next(clock) * 1e-4)
        self.log: list[str] = []
        self.session = Session(self.debuggee, self.log.append)
        if not ack:
            assert self.send_raw(pack(b"QStartNoAckMode")) == b"+$OK#9a"

    def send_raw(
        self, data: bytes, *, run: bool = True, chunks: Callable[[bytes], Iterator[bytes]] | None = None
    ) -> bytes:
        """Send bytes and return the answer; the guest runs until it stops if `run` says so."""
        output = b""
        for chunk in chunks(data) if chunks else (data,):
            self.session.receive(chunk)
            while self.session.has_work:
                self.session.advance()
            output += self.session.take_output()
        stints = 0
        while run and self.debuggee.running and stints < MAX_STINTS:
            self.debuggee.stint()
            stints += 1
        return output + self.session.take_output()

    def ask_all(self, payload: bytes, *, run: bool = True) -> list[bytes]:
        """Send one packet and return the packets of the answer."""
        return unpack(self.send_raw(pack(payload), run=run)).packets

    def ask(self, payload: bytes, *, run: bool = True) -> bytes:
        """Send one packet and return the only packet of the answer."""
        (reply,) = self.ask_all(payload, run=run)
        return reply
