"""Negotiation and the queries that are about the session as a whole.

It must not know how bytes travel, only which modes a session has.
"""

from typing import TYPE_CHECKING

from gdbstub.fields import PacketError
from gdbstub.packets.command import Access, Command

if TYPE_CHECKING:
    from gdbstub.session import Session


def report_support(session: "Session", arguments: bytes) -> bytes:
    """`qSupported:FEATURE;...`: take notice of the client's features and answer with ours."""
    offered = frozenset(arguments.removeprefix(b":").split(b";"))
    session.offered = offered
    session.multiprocess = b"multiprocess+" in offered
    if b"error-message+" in offered:
        session.text_errors = True
    target = session.target
    features = [
        b"PacketSize=%x" % session.packet_size_bytes,
        b"QStartNoAckMode+",
        b"vContSupported+",
        b"swbreak+",
        b"hwbreak+",
        b"ConditionalBreakpoints+",
        b"BreakpointCommands+",
        b"QPassSignals+",
        b"binary-upload+",
        b"error-message+",
        b"qXfer:features:read+",
        b"qXfer:threads:read+",
    ]
    if session.multiprocess:
        features.append(b"multiprocess+")
    # An object that is offered must never be answered with an empty packet, so offer only what is there.
    if target.memory_map() is not None:
        features.append(b"qXfer:memory-map:read+")
    if target.exec_file() is not None:
        features.append(b"qXfer:exec-file:read+")
    if target.os_tables():
        features.append(b"qXfer:osdata:read+")
    return b";".join(features)


def start_no_ack_mode(session: "Session", _arguments: bytes) -> bytes:
    """`QStartNoAckMode`: the acknowledgement of this packet was the last that we sent."""
    session.acknowledging = False
    return b"OK"


def reply_empty(_session: "Session", _arguments: bytes) -> bytes:
    """`vMustReplyEmpty`: show how unknown packets are answered."""
    return b""


def extend(session: "Session", _arguments: bytes) -> bytes:
    """`!`: the client stays when the guest ends, and may start it again."""
    session.extended = True
    return b"OK"


def report_attached(_session: "Session", _arguments: bytes) -> bytes:
    """`qAttached`: always 1, so that gdb detaches when its user quits, and the guest runs on."""
    return b"1"


def report_offsets(_session: "Session", _arguments: bytes) -> bytes:
    """`qOffsets`: the image is where it was linked."""
    return b"Text=0;Data=0;Bss=0"


def offer_symbols(_session: "Session", _arguments: bytes) -> bytes:
    """`qSymbol::`: no symbol is needed."""
    return b"OK"


def interrupt(session: "Session", _arguments: bytes) -> None:
    """`vCtrlC`: as the byte 0x03, but with a reply, which comes before that of the stop."""
    session.send(b"OK")
    session.debuggee.interrupt()


def pass_signals(session: "Session", arguments: bytes) -> bytes:
    """`QPassSignals:SIGNAL;...`: what the user has told gdb to `handle` with `nostop noprint pass`."""
    if not arguments.startswith(b":"):
        raise PacketError("QPassSignals needs a list")
    texts = [text for text in arguments[1:].split(b";") if text]
    try:
        signals = frozenset(int(text, 16) for text in texts)
    except ValueError:
        raise PacketError("QPassSignals has a signal that is not a number") from None
    # Every gdb sends this when it connects: nothing that a read-only client should hear an error about.
    if session.controls:
        session.target.pass_signals(signals)
    return b"OK"


COMMANDS = (
    Command(b"qSupported", report_support),
    Command(b"QStartNoAckMode", start_no_ack_mode),
    Command(b"vMustReplyEmpty", reply_empty),
    Command(b"!", extend),
    Command(b"qAttached", report_attached),
    Command(b"qOffsets", report_offsets),
    Command(b"qSymbol", offer_symbols),
    Command(b"vCtrlC", interrupt, Access.CONTROL),
    Command(b"QPassSignals", pass_signals),
)
