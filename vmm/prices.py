"""Prices: what published processors took for a world switch, and a published software VMM for what it does instead.

Figures and their arithmetic only, in cycles of the machines that are named, never of this host. It must not know
engines, only the names of what they count.

Sources: K. Adams, O. Agesen, "A Comparison of Software and Hardware Techniques for x86 Virtualization", ASPLOS 2006
(hardware costs, and nanobenchmarks on a P4 672); O. Agesen, J. Mattson, R. Rugina, J. Sheldon, "Software Techniques for
Avoiding Hardware Virtualization Exits", USENIX ATC 2012 (round trips of the later parts).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

READS_AN_EXIT = 10  # of the VMCB, in the paper's words about a typical one


@dataclass(frozen=True, slots=True)
class Part:
    """What world switches cost on a processor, in its cycles.

    Attributes:
        name: of the processor.
        switches: entry and exit together.
        read, write: of a field of the VMCB; 0 where the published figure of a round trip is all there is.
        source: where it was published.
    """

    name: str
    switches: float
    read: float
    write: float
    source: str

    def cycles(self, exits: float, reads: float, writes: float) -> float:
        """The model: so many exits, with so many accesses of the VMCB in all.

        It prices world switches and the VMCB, not what the VMM does in between, nor what the exits do to caches.
        """
        return exits * self.switches + reads * self.read + writes * self.write

    @property
    def exit_cycles(self) -> float:
        """A typical exit."""
        return self.cycles(1, READS_AN_EXIT, 0)


PARTS = (
    Part("P4 672", 2409 + 1931, 178, 171, "ASPLOS 2006"),
    Part("Core 2", 937 + 1186, 52, 44, "ASPLOS 2006"),
    Part("Prescott", 3963, 0, 0, "ATC 2012"),
    Part("Merom", 1579, 0, 0, "ATC 2012"),
    Part("Penryn", 1266, 0, 0, "ATC 2012"),
    Part("Nehalem", 1009, 0, 0, "ATC 2012"),
    Part("Westmere", 761, 0, 0, "ATC 2012"),
    Part("Sandy Bridge", 784, 0, 0, "ATC 2012"),
)

# By the names of statistics of `bt`, what the software VMM of the paper took on a P4 672. What ours does in Python is
# priced so; what ours does in emitted code (system calls, CR3 loads, POPF) costs it about as much as those instructions
# cost hardware (74 ns for INT and IRET together, of which a P4 672 takes 64), and has no price.
_CALLOUT = 1254  # RDTSC by callout
_FAULT = 3927 - 1093  # a page fault, less what it took natively; an exception by DIV took 500 less
SOFTWARE_CYCLES: Mapping[str, float] = {
    "callouts": _CALLOUT,
    "faults delivered": _FAULT,
    "faults interpreted": _FAULT,
    "hidden faults": _FAULT,
    "port accesses": 216,  # IN
    "guest instructions translated": 2300,
    "dispatch misses": _CALLOUT,  # a way out of the TC and back, as a callout's
    "chains made": _CALLOUT,
}
# Exits that are the host's own business, or a debugger's: bt comes out as often, and that has no price either.
FREE_EXITS = frozenset({"INTR", "debugger"})


def priced_software(counters: Mapping[str, float]) -> dict[str, float]:
    """Of the statistics of `bt` those that have a price, if they are not 0."""
    return {name: counters[name] for name in SOFTWARE_CYCLES if counters.get(name)}


def priced_exits(counts: Mapping[str, float]) -> dict[str, float]:
    """Of exits by reason those that have a price, if they are not 0; all ports are one kind."""
    kinds: dict[str, float] = {}
    for reason, count in counts.items():
        if count and reason not in FREE_EXITS:
            kind = "port I/O" if reason.startswith(("IN ", "OUT ")) else reason
            kinds[kind] = kinds.get(kind, 0) + count
    return kinds


def software_cycles(counters: Mapping[str, float]) -> dict[str, float]:
    """Cycles by kind of what `priced_software` picks."""
    return {name: count * SOFTWARE_CYCLES[name] for name, count in priced_software(counters).items()}


def exits_cycles(counts: Mapping[str, float], part: Part) -> dict[str, float]:
    """Cycles by kind of what `priced_exits` picks."""
    return {kind: count * part.exit_cycles for kind, count in priced_exits(counts).items()}
