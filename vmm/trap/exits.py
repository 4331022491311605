"""Counters of exits: how often each reason came, and what handling it took.

They know names and times; what an exit is belongs to whoever counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from machine.engine import ExitCount

# A guest may look for devices everywhere.
MAX_REASONS = 1 << 12  # ports and pages that are told apart
MAX_SITES = 1 << 16  # addresses that are


class ExitCounters:
    """Counts by reason, a short text that people read, and by the guest address that the guest was left at."""

    __slots__ = ("_counts", "_sites", "_times_ns")

    def __init__(self) -> None:
        self._sites: dict[int, list[int]] = {}
        self._counts: dict[str, int] = {}
        self._times_ns: dict[str, int] = {}

    def note(self, reason: str, took_ns: int, eip: int | None = None) -> None:
        """One more exit; at `eip`, if addresses are told apart. A port or page is the last word of a reason."""
        if reason not in self._counts and len(self._counts) >= MAX_REASONS:
            reason = f"{reason.rpartition(' ')[0]} elsewhere" if "0x" in reason else reason
        if eip is not None:
            site = self._sites.get(eip)
            if site is not None:
                site[0] += 1
                site[1] += took_ns
            elif len(self._sites) < MAX_SITES:
                self._sites[eip] = [1, took_ns]
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

    def counts(self) -> Mapping[str, int]:
        """How often, by reason."""
        return self._counts

    def rows(self) -> Sequence[ExitCount]:
        """By reason, the most expensive first."""
        rows = [ExitCount(reason, count, self._times_ns[reason]) for reason, count in self._counts.items()]
        return sorted(rows, key=lambda row: -row.total_ns)

    def sites(self, count: int) -> Sequence[tuple[int, int, int]]:
        """The addresses whose exits took longest: address, how many, nanoseconds."""
        sites = sorted(self._sites.items(), key=lambda item: -item[1][1])[:count]
        return [(eip, exits, total_ns) for eip, (exits, total_ns) in sites]
