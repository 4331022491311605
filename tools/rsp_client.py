"""A client of the remote protocol that is as fast as it is simple: one request at a time over a socket.

It knows framing and acknowledgements; what the packets mean is the benchmark's business.
"""

from __future__ import annotations

import socket
from types import TracebackType
from typing import Self

_TIMEOUT_S = 60.0
_ESCAPE = 0x7D


class RspClient:
    """A connection to a server."""

    def __init__(self, port: int) -> None:
        """Connect over loopback; acknowledgements are turned off if the server can do without."""
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=_TIMEOUT_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._received = bytearray()
        self._acknowledge = True
        features = decode(self.ask(b"qSupported:swbreak+;hwbreak+;vContSupported+"))
        self.packet_bytes = 0x400
        for feature in features.split(b";"):
            if feature.startswith(b"PacketSize="):
                self.packet_bytes = int(feature[11:], 16)
        self.ask(b"qXfer:features:read:target.xml:0,fff")  # QEMU takes P only from who has asked for the registers
        if b"QStartNoAckMode+" in features and self.ask(b"QStartNoAckMode") == b"OK":
            self._acknowledge = False

    def __enter__(self) -> Self:
        """The client itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Hang up."""
        self._socket.close()

    def ask(self, payload: bytes) -> bytes:
        """Send a packet and return the payload of the reply, escapes and runs still in it."""
        self._socket.sendall(b"$%b#%02x" % (payload, sum(payload) & 0xFF))
        received = self._received
        while True:
            end = received.find(b"#")
            if end >= 0 and len(received) >= end + 3:
                break
            data = self._socket.recv(1 << 17)
            if not data:
                raise ConnectionError("the server has hung up")
            received += data
        reply = bytes(received[received.index(b"$") + 1 : end])
        del received[: end + 3]
        if self._acknowledge:
            self._socket.sendall(b"+")
        return reply


def decode(payload: bytes) -> bytes:
    """Undo escapes and run-length encoding."""
    out = bytearray()
    at = 0
    while at < len(payload):
        byte = payload[at]
        if byte == _ESCAPE:
            out.append(payload[at + 1] ^ 0x20)
            at += 2
        elif byte == ord("*"):
            out += out[-1:] * (payload[at + 1] - 29)
            at += 2
        else:
            out.append(byte)
            at += 1
    return bytes(out)
