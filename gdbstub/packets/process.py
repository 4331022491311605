"""The guest as a process: letting it go, ending it, starting it again.

It must not know what becomes of the connection.
"""

from typing import TYPE_CHECKING

from gdbstub.fields import ESRCH, PROCESS_ID, PacketError, parse_number
from gdbstub.packets.command import Access, Command
from gdbstub.packets.resume import encode_exit, report_stop
from gdbstub.target import Signal

if TYPE_CHECKING:
    from gdbstub.session import Session


def detach(session: "Session", arguments: bytes) -> bytes:
    """`D[;PID]`: let the guest run on without this client."""
    _check_process(session, arguments)
    session.detach()
    return b"OK"


def kill(session: "Session", _arguments: bytes) -> bytes | None:
    """`k`: end the guest. gdb waits for no reply, lldb does; in extended mode it would be taken for another's."""
    session.debuggee.kill()
    return None if session.extended else encode_exit(session, b"X", Signal.KILL)


def kill_process(session: "Session", arguments: bytes) -> bytes:
    """`vKill;PID`: end the guest."""
    _check_process(session, arguments)
    session.debuggee.kill()
    return b"OK"


def restart(session: "Session", _arguments: bytes) -> None:
    """`R XX`: load the image again and stop; there is no reply."""
    session.claim()
    session.debuggee.restart()


def run(session: "Session", _arguments: bytes) -> bytes:
    """`vRun;FILE;ARGUMENTS`: the same with a stop reply. The image is the one of the command line, whatever FILE is."""
    session.claim()
    session.debuggee.restart()
    return report_stop(session, b"")


def attach(session: "Session", arguments: bytes) -> bytes:
    """`vAttach;PID`: take control again after `D`, and stop the guest."""
    _check_process(session, arguments)
    if session.debuggee.end is not None:
        raise PacketError("the guest has ended; run starts it again", ESRCH)
    session.claim()
    return report_stop(session, b"")


def _check_process(session: "Session", arguments: bytes) -> None:
    """Check `;PID`; without multiprocess gdb makes one up."""
    if arguments and session.multiprocess and parse_number(arguments.removeprefix(b";")) != PROCESS_ID:
        raise PacketError(f"there is only process {PROCESS_ID}", ESRCH)


COMMANDS = (
    Command(b"D", detach),
    Command(b"k", kill, Access.CONTROL),
    Command(b"vKill", kill_process, Access.CONTROL, text_errors=True),
    Command(b"R", restart),
    Command(b"vRun", run, text_errors=True),
    Command(b"vAttach", attach, text_errors=True),
)
