"""What lldb asks beyond gdb's packets, as far as it works better with an answer.

It must not hold anything that gdb needs. Source: LLVM's "GDB Remote Protocol Extensions".
"""

from typing import TYPE_CHECKING

from gdbstub.fields import ADDRESS_LIMIT, EINVAL, PROCESS_ID, PacketError, hex_text, parse_number
from gdbstub.packets.command import Command

if TYPE_CHECKING:
    from gdbstub.session import Session


def enable_error_strings(session: "Session", _arguments: bytes) -> bytes:
    """`QEnableErrorStrings`: send errors as number and hex text."""
    session.hex_error_texts = True
    return b"OK"


def report_host(session: "Session", _arguments: bytes) -> bytes:
    """`qHostInfo`: without it lldb takes the guest for a program of its own host."""
    return b"triple:%b;ptrsize:4;endian:little;" % hex_text(session.target.description.triple)


def report_process(session: "Session", _arguments: bytes) -> bytes:
    """`qProcessInfo`: the same for the process."""
    return b"pid:%x;%b" % (PROCESS_ID, report_host(session, b""))


def describe_region(session: "Session", arguments: bytes) -> bytes:
    """`qMemoryRegionInfo:ADDR`: the region or the hole around an address."""
    address = parse_number(arguments.removeprefix(b":"))
    if address >= ADDRESS_LIMIT:
        raise PacketError(f"address {address:#x} is beyond 4 GiB", EINVAL)
    region = session.target.region_at(address)
    if region is None:
        return b""
    permissions = b"permissions:%b;" % region.permissions.encode() if region.permissions else b""
    name = b"name:%b;" % hex_text(region.name) if region.name else b""
    return b"start:%x;size:%x;%b%b" % (region.start, region.length, permissions, name)


COMMANDS = (
    Command(b"QEnableErrorStrings", enable_error_strings),
    Command(b"qHostInfo", report_host),
    Command(b"qProcessInfo", report_process),
    Command(b"qMemoryRegionInfo", describe_region),
)
