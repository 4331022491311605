"""The debugger's breakpoints and watchpoints in the four debug registers of the host.

It decides what fits there; what does not is left to an engine that looks at every instruction.
"""

from __future__ import annotations

from dataclasses import dataclass

from machine.debug import CodeBreakpoint, DebugControl, Watchpoint
from vmm.trap.kvmfacts import KvmFacts

REGISTERS = 4
_ENABLE_EXACT = 1 << 9 | 1 << 10  # GE, and the bit that is always set
_WRITES, _ACCESSES = 1, 3
_LENGTHS = {1: 0, 2: 1, 4: 3}


@dataclass(frozen=True, slots=True)
class DebugPlan:
    """What the debug registers are to hold.

    Attributes:
        addresses: linear, of DR0 to DR3.
        dr7: which of them are on, and for what.
        watchpoints: by register, None where it is a code breakpoint or unused.
    """

    addresses: tuple[int, int, int, int] = (0, 0, 0, 0)
    dr7: int = 0
    watchpoints: tuple[Watchpoint | None, ...] = (None,) * REGISTERS

    @property
    def used(self) -> bool:
        """Whether there is anything to stop at."""
        return bool(self.dr7)

    def watched(self, dr6: int) -> Watchpoint | None:
        """The watchpoint that DR6 says was hit."""
        for number, watchpoint in enumerate(self.watchpoints):
            if dr6 >> number & 1 and watchpoint is not None:
                return watchpoint
        return None


def plan(debug: DebugControl, facts: KvmFacts, extra: frozenset[int] = frozenset()) -> DebugPlan | None:
    """Put all breakpoints and watchpoints, and code breakpoints at the `extra` addresses, into the registers.

    Returns:
        None if they do not fit: too many, physical, lengths that no register has, reads without writes, or kinds that
        this KVM does not stop at.
    """
    entries: list[tuple[int, int, Watchpoint | None]] = []
    codes: set[int] = set(extra)
    for breakpoint_ in debug.breakpoints:
        if not _fits(breakpoint_, facts):
            return None
        codes.add(breakpoint_.address)
    entries += [(address, 0, None) for address in sorted(codes)]
    for watchpoint in sorted(debug.watchpoints, key=lambda each: each.address):
        length = _LENGTHS.get(watchpoint.length)
        aligned = length is not None and watchpoint.address % watchpoint.length == 0
        if watchpoint.physical or length is None or not aligned or not facts.data_breakpoints:
            return None
        if not watchpoint.on_write:
            return None
        kind = _ACCESSES if watchpoint.on_read else _WRITES
        entries.append((watchpoint.address, kind | length << 2, watchpoint))
    if len(entries) > REGISTERS or (codes and not facts.code_breakpoints):
        return None
    addresses, dr7 = [0] * REGISTERS, 0
    watchpoints: list[Watchpoint | None] = [None] * REGISTERS
    for number, (address, kind, watched) in enumerate(entries):
        addresses[number], watchpoints[number] = address, watched
        dr7 |= 2 << 2 * number | kind << 16 + 4 * number | _ENABLE_EXACT
    first, second, third, fourth = addresses
    return DebugPlan((first, second, third, fourth), dr7, tuple(watchpoints))


def _fits(breakpoint_: CodeBreakpoint, facts: KvmFacts) -> bool:
    return facts.code_breakpoints and not breakpoint_.physical
