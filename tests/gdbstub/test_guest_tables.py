"""The tables of `info os`: what is in them, under engines with and without exits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gdbstub.guest import GuestTarget
from gdbstub.target import TargetError
from tests.gdbstub.pc import CODE, guest, run_to
from tests.oracles.assembler import assemble

# The timer is set, the CPU identified, and a port read three times.
SOURCE = """
    mov al, 0x34
    out 0x43, al
    mov al, 0xff
    out 0x40, al
    out 0x40, al
    cpuid
    mov ecx, 3
1:  in al, 0x80
    loop 1b
    jmp $
"""
INSNS = 1000
COSTS = {"Count", "Share", "Mean us", "Total ms"}


@pytest.fixture
def target() -> Iterator[GuestTarget]:
    with guest(assemble(SOURCE, origin=CODE)) as made:
        yield made


def run(target: GuestTarget, engine: str) -> None:
    target.machine.select_engine(engine)
    run_to(target, INSNS)


def test_every_table_has_rows_with_the_same_columns(target: GuestTarget) -> None:
    run(target, "trap")
    for name, description in target.os_tables().items():
        rows = target.os_rows(name)
        assert rows, name
        assert len({tuple(row) for row in rows}) == 1, name
        assert all(isinstance(text, str) for row in rows for text in row.values())
        assert description


def test_engines(target: GuestTarget) -> None:
    target.default_engine = "bt"
    run(target, "trap nested")
    rows = target.os_rows("engines")
    assert [row["Engine"] for row in rows if row["Runs"] == "*"] == ["trap nested"]
    assert [row["Engine"] for row in rows if row["Default"] == "*"] == ["bt"]
    assert {row["Engine"] for row in rows} == set(target.machine.engine_names)


def test_statistics(target: GuestTarget) -> None:
    run(target, "interp")
    values = {row["Name"]: row["Value"] for row in target.os_rows("statistics")}
    assert (values["engine"], values["icount"]) == ("interp", "1000")


@pytest.mark.parametrize("engine", ["trap", "trap nested"])
def test_exits_by_reason_and_by_place(target: GuestTarget, engine: str) -> None:
    run(target, engine)
    exits = target.os_rows("exits")
    counts = {row["Exit"]: int(row["Count"]) for row in exits}
    assert counts["IN from 0x0080"] == 3
    assert counts["CPUID"] == 1
    shares = [float(row["Share"].removesuffix("%")) for row in exits]
    assert sum(shares) == pytest.approx(100, abs=0.1 * len(shares))
    for row in exits:
        assert float(row["Total ms"]) == pytest.approx(int(row["Count"]) * float(row["Mean us"]) / 1e3, abs=0.02)
    totals = [float(row["Total ms"]) for row in exits]
    assert totals == sorted(totals, reverse=True)
    sites = target.os_rows("exit-sites")
    assert len(sites) <= 10
    assert [row["Count"] for row in sites if row["EIP"] == f"{CODE + 17:#010x}"] == ["3"]


def test_where_there_are_no_exits(target: GuestTarget) -> None:
    run(target, "interp")
    assert target.os_rows("exits") == [{**dict.fromkeys(COSTS, "-"), "Exit": "interp has no exits"}]
    assert target.os_rows("exit-sites") == [{**dict.fromkeys(COSTS, "-"), "EIP": "interp has no exits"}]
    target.machine.select_engine("trap")
    assert target.os_rows("exits") == [{**dict.fromkeys(COSTS, "-"), "Exit": "none yet under trap"}]


def test_devices_and_what_is_due(target: GuestTarget) -> None:
    run(target, "bt")
    states = {row["Device"]: row["State"] for row in target.os_rows("devices")}
    assert states.keys() == target.machine.board.devices.keys()
    assert "pit0: mode=2" in states["pit"]
    assert states["pit"].count("; ") == 2
    events = {row["Event"]: row for row in target.os_rows("events")}
    event, clock = events["pit.timer"], target.machine.clock
    assert int(event["At ns"]) == clock.next_deadline_ns
    assert int(event["In ns"]) == int(event["At ns"]) - clock.now_ns
    assert clock.icount + int(event["In insns"]) == clock.deadline_icount


def test_what_there_is_not(target: GuestTarget) -> None:
    with pytest.raises(TargetError, match="There is no table zork"):
        target.os_rows("zork")
