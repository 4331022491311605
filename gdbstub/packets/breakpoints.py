"""Breakpoints and watchpoints, `Z0` to `Z4`, with conditions and commands that run at the breakpoint.

It must not know how the target notices them.
"""

from collections.abc import Callable, MutableMapping
from typing import TYPE_CHECKING

from gdbstub.agent import AgentError, Expression
from gdbstub.fields import ADDRESS_LIMIT, EFAULT, PacketError, parse_hex_bytes, parse_number
from gdbstub.packets.command import Access, Command
from gdbstub.target import Breakpoint, BreakpointKind, Verdict

if TYPE_CHECKING:
    from gdbstub.session import Session


class TargetContext:
    """What agent expressions of one session see: the guest at the breakpoint, and the session's console."""

    def __init__(self, session: "Session") -> None:
        self.variables: MutableMapping[int, int] = {}
        self._session = session
        self._target = session.target
        self._register_count = len(session.layout)
        self._thread = session.target.threads()[0].id

    def read_register(self, number: int) -> int:
        """Return a register of the CPU that is at the breakpoint."""
        value = self._target.read_register(self._thread, number) if number < self._register_count else None
        if value is None:
            raise AgentError(f"register {number} is not available")
        return value

    def read_memory(self, address: int, length: int) -> bytes:
        """Read memory; addresses are truncated to 32 bits, as the guest's are."""
        address &= ADDRESS_LIMIT - 1
        data = self._target.read_memory(address, length)
        if len(data) != length:
            raise AgentError(f"cannot read memory at {address + len(data):#x}")
        return data

    def write_output(self, text: bytes) -> None:
        """Show what an agent printf prints on the user's console."""
        self._session.write_console(text)


def insert(session: "Session", arguments: bytes) -> bytes:
    """`Z TYPE,ADDR,KIND[;XLEN,EXPR...][;cmds:PERSIST,XLEN,EXPR...]`: insert, or replace what is there.

    PERSIST is of no use: breakpoints are removed when the client goes.
    """
    place, *options = arguments.split(b";")
    kind, address, length = _parse_place(place)
    conditions: list[Expression] = []
    commands: list[Expression] = []
    for option in options:
        if option.startswith(b"cmds:"):
            commands += _parse_expressions(option.removeprefix(b"cmds:").partition(b",")[2])
        elif option.startswith(b"X"):
            conditions += _parse_expressions(option)
        elif option:
            raise PacketError("an unknown option of a breakpoint")
    check = _make_check(session, conditions, commands) if conditions or commands else None
    session.target.insert_breakpoint(Breakpoint(kind, address, length, check))
    return b"OK"


def remove(session: "Session", arguments: bytes) -> bytes:
    """`z TYPE,ADDR,KIND`: remove; it is no error if there is none."""
    session.target.remove_breakpoint(*_parse_place(arguments))
    return b"OK"


def _parse_place(text: bytes) -> tuple[BreakpointKind, int, int]:
    fields = text.split(b",")
    if len(fields) != 3:
        raise PacketError("a breakpoint needs type, address and kind")
    number, address, length = map(parse_number, fields)
    if number > max(BreakpointKind):
        raise PacketError(f"there are no breakpoints of type {number}")
    if address >= ADDRESS_LIMIT or address + length > ADDRESS_LIMIT:
        raise PacketError(f"address {address:#x} is beyond 4 GiB", EFAULT)
    kind = BreakpointKind(number)
    if length == 0 and kind >= BreakpointKind.WRITE:
        raise PacketError("a watchpoint of no bytes")
    return kind, address, length


def _parse_expressions(text: bytes) -> list[Expression]:
    """Parse `XLEN,HEX` as often as it comes."""
    expressions = []
    while text:
        header, found, rest = text.partition(b",")
        if not header.startswith(b"X") or not found:
            raise PacketError("an agent expression needs X, a length and a comma")
        digits = 2 * parse_number(header[1:])
        if digits > len(rest):
            raise PacketError("an agent expression is cut off")
        try:
            expressions.append(Expression(parse_hex_bytes(rest[:digits])))
        except AgentError as error:
            raise PacketError(str(error)) from error
        text = rest[digits:]
    return expressions


def _make_check(session: "Session", conditions: list[Expression], commands: list[Expression]) -> Callable[[], Verdict]:
    """Return what the target calls at the breakpoint.

    It stops if any condition is true or cannot be evaluated (the user is told why); with commands it runs them
    instead of stopping, as gdbserver does and dprintf needs.
    """
    context = session.agent_context
    debuggee = session.debuggee
    now_s = debuggee.now_s

    def check() -> Verdict:
        try:
            if not conditions or any(condition.evaluate(context) for condition in conditions):
                if not commands:
                    return Verdict.STOP
                for command in commands:
                    command.evaluate(context)
        except AgentError as error:
            session.write_console(f"Error in a breakpoint's agent expression: {error}\n".encode())
            return Verdict.STOP
        if session.is_congested or now_s() >= debuggee.stint_deadline_s:
            return Verdict.GO_ON_AND_YIELD
        return Verdict.GO_ON

    return check


COMMANDS = (
    Command(b"Z", insert, Access.CHANGE, text_errors=True),
    Command(b"z", remove, Access.CHANGE, text_errors=True),
)
