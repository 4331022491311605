"""The tables that `info os` shows: engines, what they have counted, exits, devices and what is due.

It must not know packets; values are text as people read it. gdb pads every column to ten characters, so the long ones
come last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gdbstub.target import TargetError
from machine.engine import CountsExits, ExitCount, LocatesExits

if TYPE_CHECKING:
    from gdbstub.guest import GuestTarget

SITES = 10
_COSTS = ("Count", "Share", "Mean us", "Total ms")

Row = dict[str, str]


@dataclass(frozen=True, slots=True)
class Table:
    """One table.

    Attributes:
        description: a few words for the list of tables.
        rows: its rows now, each by column.
    """

    description: str
    rows: Callable[[GuestTarget], Iterable[Row]]


def _engine_rows(guest: GuestTarget) -> Iterable[Row]:
    machine = guest.machine
    for name in machine.engine_names:
        runs, default = name == machine.engine.name, name == guest.default_engine
        yield {"Runs": "*" if runs else "", "Default": "*" if default else "", "Engine": name}


def _statistics_rows(guest: GuestTarget) -> Iterable[Row]:
    for name, value in guest.machine.statistics().items():
        yield {"Value": str(value), "Name": name}


def _exit_counts(guest: GuestTarget) -> Sequence[ExitCount]:
    engine = guest.machine.engine
    return engine.exit_counts() if isinstance(engine, CountsExits) else ()


def _exit_rows(guest: GuestTarget) -> Iterable[Row]:
    counts = _exit_counts(guest)
    total = sum(row.count for row in counts)
    for row in counts:
        yield {**_costs(row.count, total, row.total_ns), "Exit": row.reason}
    if not counts:
        yield {**dict.fromkeys(_COSTS, "-"), "Exit": _none(guest)}


def _exit_site_rows(guest: GuestTarget) -> Iterable[Row]:
    engine = guest.machine.engine
    if isinstance(engine, LocatesExits):
        total = sum(row.count for row in _exit_counts(guest))
        for eip, count, total_ns in engine.exit_sites(SITES):
            yield {**_costs(count, total, total_ns), "EIP": f"{eip:#010x}"}
    if not _exit_counts(guest) or not isinstance(engine, LocatesExits):
        told = isinstance(engine, LocatesExits) or not isinstance(engine, CountsExits)
        yield {**dict.fromkeys(_COSTS, "-"), "EIP": _none(guest) if told else f"{engine.name} does not tell where"}


def _none(guest: GuestTarget) -> str:
    """For a table that would be empty, of which gdb shows nothing at all."""
    engine = guest.machine.engine
    return f"none yet under {engine.name}" if isinstance(engine, CountsExits) else f"{engine.name} has no exits"


def _costs(count: int, of_all: int, total_ns: int) -> Row:
    values = str(count), f"{count / of_all:.1%}", f"{total_ns / count / 1e3:.2f}", f"{total_ns / 1e6:.3f}"
    return dict(zip(_COSTS, values, strict=True))


def _device_rows(guest: GuestTarget) -> Iterable[Row]:
    board = guest.machine.board
    for name in board.devices:
        yield {"Device": name, "State": "; ".join(line.strip() for line in board.describe(name).splitlines())}


def _event_rows(guest: GuestTarget) -> Iterable[Row]:
    clock = guest.machine.clock
    for at_ns, name in sorted((at_ns, name) for name, at_ns in guest.machine.board.timers()):
        left_ns = max(0, at_ns - clock.now_ns)
        insns = -(-left_ns // clock.ns_per_insn)
        yield {"At ns": str(at_ns), "In ns": str(left_ns), "In insns": str(insns), "Event": name}


TABLES: Mapping[str, Table] = {
    "engines": Table("The engines, and which one runs the guest", _engine_rows),
    "statistics": Table("What the engine has counted since the start", _statistics_rows),
    "exits": Table("What the guest was left for, by trap and hybrid", _exit_rows),
    "exit-sites": Table("The guest addresses whose exits cost most", _exit_site_rows),
    "devices": Table("The state of each device", _device_rows),
    "events": Table("What devices have to do at a later time", _event_rows),
}


def rows(guest: GuestTarget, name: str) -> Sequence[Row]:
    """The rows of a table.

    Raises:
        TargetError: there is none of this name.
    """
    if name not in TABLES:
        raise TargetError(f"There is no table {name}.")
    return list(TABLES[name].rows(guest))
