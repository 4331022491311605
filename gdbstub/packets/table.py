"""The table of all packets that are understood, by the name that the manual gives them.

It must not know what they do; a packet that is not here gets the empty reply.
"""

import re

from gdbstub.packets import (
    breakpoints,
    general,
    lldb,
    memory,
    process,
    rcmd,
    registers,
    resume,
    search,
    threads,
    transfer,
)
from gdbstub.packets.command import Command

_FAMILIES = (general, registers, memory, search, resume, breakpoints, threads, transfer, process, rcmd, lldb)
COMMANDS: dict[bytes, Command] = {command.name: command for family in _FAMILIES for command in family.COMMANDS}

# q, Q and v packets are named by their letters (and `vCont?` differs from `vCont`), all others by one byte.
_LONG_NAME = re.compile(rb"vCont\?|[qQv][A-Za-z]*", re.DOTALL)


def split_name(payload: bytes) -> tuple[bytes, bytes]:
    """Return the name of a packet and what follows it."""
    match = _LONG_NAME.match(payload)
    end = match.end() if match else 1
    return payload[:end], payload[end:]
