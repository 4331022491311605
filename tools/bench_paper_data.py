"""What Adams and Agesen measured, and the model: exits that we count, priced as known processors had them.

Figures only, no code of engines; times and cycles are of the machines that `Source` names, never of this host.

Sources: K. Adams, O. Agesen, "A Comparison of Software and Hardware Techniques for x86 Virtualization", ASPLOS 2006
(tables of nanobenchmarks, of hardware costs, and the raw data); O. Agesen, J. Mattson, R. Rugina, J. Sheldon,
"Software Techniques for Avoiding Hardware Virtualization Exits", USENIX ATC 2012 (round trips of the later parts).
"""

from __future__ import annotations

from dataclasses import dataclass

P4_HERTZ = 3.8e9
FORKWAITS = 40_000
READS_AN_EXIT = 10  # of the VMCB, in the paper's words about a typical one


@dataclass(frozen=True, slots=True)
class Triple:
    """One line of the paper: native, software VMM (BT), hardware VMM (VT); cycles or seconds, the less the better.

    Attributes:
        name: as the paper has it.
        native, bt, vt: the figures.
    """

    name: str
    native: float
    bt: float
    vt: float

    @property
    def bt_over_vt(self) -> float:
        """Below 1, the software VMM was faster."""
        return self.bt / self.vt


# By our nanobenchmarks: cycles of an operation on a P4 672.
NANO: dict[str, Triple] = {
    "syscall_int": Triple("syscall", 242, 2308, 246),
    "in": Triple("in", 3209, 216, 15826),
    "mov_cr3": Triple("cr8wr", 150, 35, 177),
    "call_ret": Triple("call/ret", 11, 51, 11),
    "page_fault": Triple("pgfault", 1093, 3927, 11242),
    "divide_error": Triple("divzero", 889, 3223, 1014),
}
# By our workloads: the whole workloads that they are after; seconds, SPECint2000 as multiples of native.
WORKLOADS: dict[str, Triple] = {
    "forkwait": Triple("forkwait, 40,000 times", 6.02, 36.95, 106.4),
    "compute": Triple("SPECint2000, mean", 1.0, 1.04, 1.05),
    "mix": Triple("Linux kernel build", 265, 393, 483),
}
# The same on a Core 2 Duo before production.
CORE2: dict[str, Triple] = {
    "forkwait": Triple("forkwait, 40,000 times", 2.62, 18.43, 38.89),
    "mix": Triple("Linux kernel build", 204, 259.3, 281),
}


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


def paper_overhead_cycles(name: str) -> float | None:
    """What the hardware VMM added to an operation in the paper, in cycles of the P4 672; None: not measured there."""
    if name in NANO:
        return NANO[name].vt - NANO[name].native
    if name == "forkwait":
        whole = WORKLOADS[name]
        return (whole.vt - whole.native) * P4_HERTZ / FORKWAITS
    return None


def exits_for(overhead_cycles: float) -> float:
    """How many typical exits of a P4 672 make that overhead."""
    return overhead_cycles / PARTS[0].cycles(1, READS_AN_EXIT, 0)
