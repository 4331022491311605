"""`qRcmd`: the user's `monitor` commands, passed to the target.

It must not know any of them.
"""

from typing import TYPE_CHECKING

from gdbstub.fields import parse_hex_bytes
from gdbstub.packets.command import Command, Work
from gdbstub.target import QuitRequested, TargetError

if TYPE_CHECKING:
    from gdbstub.session import Session


def run_monitor_command(session: "Session", arguments: bytes) -> Work:
    """`qRcmd,HEX`: output goes out as console packets. An error is output too, as older gdb take no text for it."""
    command = parse_hex_bytes(arguments.removeprefix(b",")).decode("utf-8", "replace").strip()
    if not command:
        command = "help"
    output = session.target.monitor(command, read_only=not session.controls or session.debuggee.running)
    try:
        for text in output:
            yield text.encode()
    except TargetError as error:
        yield f"{error}\n".encode()
    except QuitRequested as request:
        session.debuggee.quit(request.status)
    return b"OK"


COMMANDS = (Command(b"qRcmd", run_monitor_command),)
