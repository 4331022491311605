"""The model's arithmetic: what has a price, and which."""

from __future__ import annotations

from vmm.native.tally import Tally
from vmm.prices import (
    FREE_EXITS,
    PARTS,
    READS_AN_EXIT,
    SOFTWARE_CYCLES,
    Part,
    exits_cycles,
    priced_exits,
    software_cycles,
)


def test_an_exit_is_priced_by_switches_and_accesses() -> None:
    part = Part("p", 1000, 10, 3, "")
    assert part.cycles(2, 5, 4) == 2000 + 50 + 12
    assert part.cycles(0, 0, 0) == 0
    assert part.exit_cycles == 1000 + READS_AN_EXIT * 10
    p4, core2, *later = PARTS
    assert p4.exit_cycles == 2409 + 1931 + 1780
    assert core2.exit_cycles == 937 + 1186 + 520
    assert all(part.cycles(3, 7, 7) == 3 * part.switches for part in later)


def test_ports_are_one_kind_and_the_hosts_own_exits_are_free() -> None:
    counts = {"IN from 0x0040": 2, "OUT to 0x03f8": 3, "INVLPG": 1, "CPUID": 0, **dict.fromkeys(FREE_EXITS, 9)}
    assert priced_exits(counts) == {"port I/O": 5, "INVLPG": 1}
    assert exits_cycles(counts, Part("p", 100, 0, 0, "")) == {"port I/O": 500, "INVLPG": 100}


def test_software_is_priced_by_the_names_of_statistics() -> None:
    counted = {"callouts": 2, "guest instructions translated": 3, "fragments": 7, "port accesses": 0}
    assert software_cycles(counted) == {"callouts": 2 * 1254, "guest instructions translated": 3 * 2300}
    assert set(SOFTWARE_CYCLES) - {"hidden faults", "port accesses"} <= set(Tally().report())  # others count those
