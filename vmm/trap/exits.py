"""Counters of exits: how often each reason came, and what handling it took.

They know names and times; what an exit is belongs to whoever counts.
"""

from __future__ import annotations

from collections.abc import Sequence

from machine.engine import ExitCount


class ExitCounters:
    """Counts by reason, a short text that people read."""

    __slots__ = ("_counts", "_times_ns")

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._times_ns: dict[str, int] = {}

    def note(self, reason: str, took_ns: int) -> None:
        """One more exit."""
        self._counts[reason] = self._counts.get(reason, 0) + 1
        self._times_ns[reason] = self._times_ns.get(reason, 0) + took_ns

    @property
    def total(self) -> int:
        """All exits."""
        return sum(self._counts.values())

    @property
    def total_ns(self) -> int:
        """The time that all of them took."""
        return sum(self._times_ns.values())

    def rows(self) -> Sequence[ExitCount]:
        """By reason, the most expensive first."""
        rows = [ExitCount(reason, count, self._times_ns[reason]) for reason, count in self._counts.items()]
        return sorted(rows, key=lambda row: -row.total_ns)
