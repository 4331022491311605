"""The seam between the machine and whoever runs its CPU.

An engine executes guest instructions on the machine's state and memory; which one it is, the guest cannot see.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from machine.debug import Stop


class EngineError(Exception):
    """An engine cannot run on this host; one line for the user."""


class Engine(Protocol):
    """Runs the CPU of one machine. Between two calls all architectural state is in `Cpu.state` and in memory."""

    @property
    def name(self) -> str:
        """What a user types to select it."""

    def run(self, until_icount: int, *, skip_breakpoint: bool = False, deliver_caught: bool = False) -> Stop:
        """Execute until `Clock.icount` reaches `until_icount`, or something stops it.

        It never goes beyond, and stops short of it by `DebugControl.slack_insns` at most: exactly there by default.

        What is due at that icount (events, interrupts) is left to the next call.

        Args:
            until_icount: HLT lets virtual time pass without retiring instructions, so the return may come earlier: a
                stint that waited in HLT for a device returns with `StopKind.BUDGET` after some events, and any does
                when `DebugControl.longest_run_s` is over.
            skip_breakpoint: a code breakpoint at the first instruction does not stop (the debugger just stopped there).
            deliver_caught: the first event that is caught is delivered instead (the debugger has just stopped for it).
        """

    def step(self, *, deliver_caught: bool = False) -> Stop:
        """Execute one instruction, or one iteration of a REP, or wait in HLT for the next interrupt.

        An external interrupt that is pending is delivered instead, if `DebugControl.step_interrupts` is set.
        Code breakpoints are ignored; watchpoints, catches and the rest stop as in `run`.
        """

    def enter(self) -> None:
        """This engine runs the CPU from now on: build what is derived from the state."""

    def leave(self) -> None:
        """Another engine takes over: drop what is derived, the state is complete."""

    def statistics(self) -> Mapping[str, int | float | str]:
        """Counters since the start, by name, for people and for JSON."""


@dataclass(frozen=True, slots=True)
class ExitCount:
    """How often a guest was left for one reason, and what that took.

    Attributes:
        reason: what the guest did.
        count: how often.
        total_ns: time of the host that handling it took, guest execution not included.
    """

    reason: str
    count: int
    total_ns: int


@runtime_checkable
class CountsExits(Protocol):
    """An engine that runs the guest between exits."""

    def exit_counts(self) -> Sequence[ExitCount]:
        """By reason, the most expensive first."""


@runtime_checkable
class LocatesExits(Protocol):
    """An engine that knows where in the guest its exits came from."""

    def exit_sites(self, count: int) -> Sequence[tuple[int, int, int]]:
        """The guest addresses whose exits cost most, that first: EIP, how many, and their nanoseconds."""


@runtime_checkable
class ExecutesUnits(Protocol):
    """An engine that executes several instructions as one unit, so that they cannot be told apart from outside."""

    def execute_singly(self) -> None:
        """Make each instruction a unit of its own from now on, and execute no more of them in another way than must be.

        The guest sees nothing of it; it is slow, and stays so until another engine takes over.
        """
