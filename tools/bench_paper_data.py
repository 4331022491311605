"""What Adams and Agesen measured, by our benchmarks, and what of it is overhead; the model's prices are `vmm.prices`.

Figures only, no code of engines; times and cycles are of the machines that the paper names, never of this host.

Source: K. Adams, O. Agesen, "A Comparison of Software and Hardware Techniques for x86 Virtualization", ASPLOS 2006
(tables of nanobenchmarks and the raw data).
"""

from __future__ import annotations

from dataclasses import dataclass

from vmm.prices import PARTS

P4_HERTZ = 3.8e9
FORKWAITS = 40_000


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
    return overhead_cycles / PARTS[0].exit_cycles
