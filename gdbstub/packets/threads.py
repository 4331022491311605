"""Threads: which there are, which one the next packets are about.

It must not know that there is only one CPU.
"""

from typing import TYPE_CHECKING

from gdbstub.fields import ESRCH, PacketError, hex_text, parse_thread_id
from gdbstub.packets.command import Command

if TYPE_CHECKING:
    from gdbstub.session import Session


def choose_thread(session: "Session", arguments: bytes) -> bytes:
    """`Hg TID`, `Hc TID`: the thread for registers, or for `c` and `s`."""
    thread = session.check_thread(parse_thread_id(arguments[1:]))
    if arguments[:1] == b"g":
        session.chosen_general_thread = thread
    elif arguments[:1] == b"c":
        session.chosen_resume_thread = thread
    else:
        raise PacketError("H needs g or c")
    return b"OK"


def report_alive(session: "Session", arguments: bytes) -> bytes:
    """`T TID`: whether a thread still exists."""
    session.check_thread(parse_thread_id(arguments))
    return b"OK"


def report_current(session: "Session", _arguments: bytes) -> bytes:
    """`qC`: the thread that stopped last."""
    return b"QC" + session.thread_id(session.general_thread())


def list_first(session: "Session", _arguments: bytes) -> bytes:
    """`qfThreadInfo`: all threads at once."""
    return b"m" + b",".join(session.thread_id(thread.id) for thread in session.target.threads())


def list_next(_session: "Session", _arguments: bytes) -> bytes:
    """`qsThreadInfo`: there are no more."""
    return b"l"


def describe(session: "Session", arguments: bytes) -> bytes:
    """`qThreadExtraInfo,TID`: a line for `info threads`."""
    wanted = session.check_thread(parse_thread_id(arguments.removeprefix(b",")))
    for thread in session.target.threads():
        if thread.id == wanted:
            return hex_text(f"{thread.name} {thread.extra}".strip())
    raise PacketError("that is not one thread", ESRCH)


COMMANDS = (
    Command(b"H", choose_thread),
    Command(b"T", report_alive),
    Command(b"qC", report_current),
    Command(b"qfThreadInfo", list_first),
    Command(b"qsThreadInfo", list_next),
    Command(b"qThreadExtraInfo", describe),
)
