"""The breakpoints and watchpoints of gdb and of the monitor, and what an engine has to be told of them.

It does not decide what a hit means, and it never touches guest memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from gdbstub.target import Breakpoint, BreakpointKind, StopReason, TargetError
from machine.debug import CodeBreakpoint, DebugControl, Watchpoint

_Key = tuple[BreakpointKind, int, int]
CODE_KINDS = (BreakpointKind.SOFTWARE, BreakpointKind.HARDWARE)
REASONS = {
    BreakpointKind.SOFTWARE: StopReason.SWBREAK,
    BreakpointKind.HARDWARE: StopReason.HWBREAK,
    BreakpointKind.WRITE: StopReason.WATCH,
    BreakpointKind.READ: StopReason.RWATCH,
    BreakpointKind.ACCESS: StopReason.AWATCH,
}


@dataclass(slots=True)
class OwnBreakpoint:
    """One made by a monitor command: `stop` is what the engine gets, `hits` counts its stops."""

    number: int
    stop: CodeBreakpoint | Watchpoint
    hits: int = 0

    def describe(self) -> str:
        """What it stops at, as a user would say it."""
        stop = self.stop
        if isinstance(stop, CodeBreakpoint):
            text = f"break at {'physical' if stop.physical else 'linear'} {stop.address:#010x}"
        else:
            access = {(True, True): "access", (True, False): "read", (False, True): "write"}[
                stop.on_read, stop.on_write
            ]
            space = "physical" if stop.physical else "linear"
            text = f"watch {access} of {stop.length} bytes at {space} {stop.address:#010x}"
        return text if stop.cr3 is None else f"{text}, CR3 {stop.cr3:#010x}"


class BreakpointTable:
    """All that stops the guest by address. `apply` hands it to the engine when something has changed."""

    def __init__(self, debug: DebugControl) -> None:
        self._debug = debug
        self._client: dict[_Key, Breakpoint] = {}
        self._own: dict[int, OwnBreakpoint] = {}
        self._code_by_linear: dict[int, list[Breakpoint]] = {}
        self._next_number = 1
        self._dirty = False

    @property
    def own(self) -> list[OwnBreakpoint]:
        """Those of the monitor, by number."""
        return list(self._own.values())

    @property
    def client(self) -> list[Breakpoint]:
        """Those of gdb."""
        return list(self._client.values())

    def insert(self, breakpoint_: Breakpoint) -> None:
        """Add one of gdb's; one with the same kind, address and length is replaced.

        Raises:
            TargetError: the address or length is none of a 32-bit machine.
        """
        if not 0 <= breakpoint_.address < 1 << 32:
            raise TargetError(f"{breakpoint_.address:#x} is not a linear address of 32 bits.")
        if breakpoint_.kind not in CODE_KINDS:
            if breakpoint_.length < 1:
                raise TargetError("A watchpoint is at least one byte long.")
            if breakpoint_.address + breakpoint_.length > 1 << 32:
                raise TargetError("The watched range goes past the end of linear memory.")
        self._client[breakpoint_.kind, breakpoint_.address, breakpoint_.length] = breakpoint_
        self._dirty = True

    def remove(self, kind: BreakpointKind, address: int, length: int) -> None:
        """Remove one of gdb's, if it is there."""
        if self._client.pop((kind, address, length), None) is not None:
            self._dirty = True

    def add_own(self, stop: CodeBreakpoint | Watchpoint) -> OwnBreakpoint:
        """Add one of the monitor's under the next number."""
        own = OwnBreakpoint(self._next_number, stop)
        self._next_number += 1
        self._own[own.number] = own
        self._dirty = True
        return own

    def delete_own(self, number: int | None) -> int:
        """Delete the monitor's breakpoint `number`, or all of them; returns how many there were.

        Raises:
            TargetError: there is no such number.
        """
        if number is None:
            count = len(self._own)
            self._own.clear()
        elif self._own.pop(number, None) is None:
            raise TargetError(f"There is no monitor breakpoint {number}.")
        else:
            count = 1
        self._dirty = True
        return count

    def clear(self) -> None:
        """Drop everything."""
        self._client.clear()
        self._own.clear()
        self._dirty = True

    def apply(self) -> None:
        """Tell the engine, if it has to know anything new; gdb takes all breakpoints out and in again at each stop."""
        if not self._dirty:
            return
        self._dirty = False
        code: set[CodeBreakpoint] = set()
        data: set[Watchpoint] = set()
        self._code_by_linear.clear()
        for breakpoint_ in self._client.values():
            if breakpoint_.kind in CODE_KINDS:
                code.add(CodeBreakpoint(breakpoint_.address))
                self._code_by_linear.setdefault(breakpoint_.address, []).append(breakpoint_)
            else:
                data.add(_watchpoint(breakpoint_))
        for own in self._own.values():
            if isinstance(own.stop, CodeBreakpoint):
                code.add(own.stop)
            else:
                data.add(own.stop)
        if self._debug.breakpoints != code:
            self._debug.set_breakpoints(frozenset(code))
        if self._debug.watchpoints != data:
            self._debug.set_watchpoints(frozenset(data))

    def code_at(self, linear: int) -> list[Breakpoint]:
        """Those of gdb that stop before the instruction at a linear address, as last applied."""
        return self._code_by_linear.get(linear, [])

    def own_code_at(self, linear: int, physical: int | None, cr3: int) -> list[OwnBreakpoint]:
        """Those of the monitor that stop before the instruction at an address, in an address space."""
        hits = []
        for own in self._own.values():
            stop = own.stop
            if not isinstance(stop, CodeBreakpoint) or stop.cr3 not in (None, cr3):
                continue
            if stop.address == (physical if stop.physical else linear):
                hits.append(own)
        return hits

    def data_like(self, watchpoint: Watchpoint) -> tuple[list[Breakpoint], list[OwnBreakpoint]]:
        """Those that the engine was told of as `watchpoint`: gdb's and the monitor's."""
        client = [b for b in self._client.values() if b.kind not in CODE_KINDS and _watchpoint(b) == watchpoint]
        return client, [own for own in self._own.values() if own.stop == watchpoint]


def _watchpoint(breakpoint_: Breakpoint) -> Watchpoint:
    return Watchpoint(
        breakpoint_.address,
        breakpoint_.length,
        on_read=breakpoint_.kind is not BreakpointKind.WRITE,
        on_write=breakpoint_.kind is not BreakpointKind.READ,
    )
