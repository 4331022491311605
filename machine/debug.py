"""What a debugger wants an engine to stop at, and why an engine stopped.

Every engine consults `DebugControl` and returns a `Stop`; packets, conditions and signals are unknown here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

from machine.lines import ExitRequest

STINT_SLACK_INSNS = 64  # `DebugControl.slack_insns` of who only wants to be heard now and then
SLACK_SHIFT = 4  # what is left over of a run is at most so small a part of it


@dataclass(frozen=True, slots=True)
class CodeBreakpoint:
    """Stop before the instruction at `address` (linear: CS base + EIP, or physical); only under `cr3` if given."""

    address: int
    physical: bool = False
    cr3: int | None = None


@dataclass(frozen=True, slots=True)
class Watchpoint:
    """Stop after the instruction that touches `length` bytes at `address`; only under `cr3` if it is given."""

    address: int
    length: int
    on_read: bool
    on_write: bool
    physical: bool = False
    cr3: int | None = None


class StopKind(Enum):
    """Why `Engine.run` came back."""

    BUDGET = auto()  # the icount asked for was reached, or `interrupt_requested` was seen
    STEP = auto()  # the one instruction (or REP iteration, or wake-up from HLT) is done
    BREAKPOINT = auto()  # before the instruction at `linear`
    WATCHPOINT = auto()  # after an instruction that touched a watched address
    CATCH = auto()  # before delivery of a vector that is being caught
    TRIPLE_FAULT = auto()  # the CPU is in shutdown
    HALTED = auto()  # HLT, and no event will ever come
    EXIT = auto()  # a device ended the run
    RESET = auto()  # a device pulled RESET; the machine is to be reset by whoever runs it


@dataclass(frozen=True, slots=True)
class FaultLevel:
    """One level of a chain of exceptions: what was being delivered when the next one happened.

    Attributes:
        vector: 0 to 255.
        error_code: what would have been pushed, or None.
        cr2: CR2 after a page fault, else None.
        cs, eip: where it was raised.
        external: it was an interrupt from outside, not an exception.
    """

    vector: int
    error_code: int | None
    cr2: int | None
    cs: int
    eip: int
    external: bool = False


@dataclass(frozen=True, slots=True)
class Stop:
    """A stop of the engine; which fields are set follows from `kind`.

    Attributes:
        linear: BREAKPOINT: the address of the instruction. WATCHPOINT: the first watched byte that was touched.
        watchpoint: the one that was hit.
        breakpoint: the one that was hit.
        was_write: WATCHPOINT: the access was a write.
        level: CATCH: what is about to be delivered.
        chain: TRIPLE_FAULT: the exceptions, first to last.
        exit_request: EXIT: what the device said.
    """

    kind: StopKind
    linear: int = 0
    breakpoint: CodeBreakpoint | None = None
    watchpoint: Watchpoint | None = None
    was_write: bool = False
    level: FaultLevel | None = None
    chain: tuple[FaultLevel, ...] = ()
    exit_request: ExitRequest | None = None


class DebugControl:
    """The debugger's wishes; change them through the methods while the guest is stopped.

    Attributes:
        caught_vectors: exceptions (by vector) that stop before delivery.
        catch_interrupts: also external interrupts do.
        catch_software: also INT n does.
        step_interrupts: False: a single step does not deliver external interrupts (they stay pending).
        longest_run_s: how long, by the host's clock, `Engine.run` goes on before it comes back, however little was
            executed: a debugger has to be heard. The guest cannot tell.
        slack_insns: how many instructions short of its goal a long `Engine.run` may come back: to come close is much
            cheaper than to hit it.
        on_change: told after each change, so that an engine can rebuild what it derives.
    """

    def __init__(self) -> None:
        self.breakpoints: frozenset[CodeBreakpoint] = frozenset()
        self.watchpoints: frozenset[Watchpoint] = frozenset()
        self.caught_vectors: frozenset[int] = frozenset()
        self.catch_interrupts = False
        self.catch_software = False
        self.step_interrupts = True
        self.longest_run_s = math.inf
        self.slack_insns = 0
        self.on_change: list[Callable[[], None]] = []

    def goal(self, icount: int, until_icount: int) -> int:
        """From which icount on a run from `icount` to `until_icount` may come back."""
        return until_icount - min(self.slack_insns, max(0, until_icount - icount) >> SLACK_SHIFT)

    def set_breakpoints(self, breakpoints: frozenset[CodeBreakpoint]) -> None:
        """Replace all code breakpoints."""
        self.breakpoints = breakpoints
        self._changed()

    def set_watchpoints(self, watchpoints: frozenset[Watchpoint]) -> None:
        """Replace all watchpoints."""
        self.watchpoints = watchpoints
        self._changed()

    def set_catches(self, vectors: frozenset[int], *, interrupts: bool = False, software: bool = False) -> None:
        """Replace what is stopped at before delivery."""
        self.caught_vectors = vectors
        self.catch_interrupts = interrupts
        self.catch_software = software
        self._changed()

    def clear(self) -> None:
        """Stop at nothing any more."""
        self.breakpoints = frozenset()
        self.watchpoints = frozenset()
        self.set_catches(frozenset())

    def _changed(self) -> None:
        for observer in self.on_change:
            observer()
