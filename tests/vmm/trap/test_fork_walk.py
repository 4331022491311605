"""fork and wait, exit by exit, as section 4.3 of Adams and Agesen's paper walks through it.

The guest is `fork`: the parent forks, the child writes to one page and exits, the parent waits and writes to that
page, too. The reference engine, which has no exits, is asked what there is to be done between one fork and the next:
what the guest's own page tables hold as it forks, and what its kernel has counted. From that the exits follow. The
first fork has every page of the working set to protect, later ones those that the parent has written to since.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

from gdbstub.cli_engine import make_factories
from guests import images
from machine.debug import CodeBreakpoint, StopKind
from machine.paging import RW, P
from machine.pc import Machine
from tools.bench_guests import machine_options
from vmm.hostalu import choose_alu

_FORKS = 20
_USER_ENTRY = 0x4000_0000 >> 22  # layout.h: USER_TEXT
# Of kernel.h.
_COUNTS = ("forks", "exits", "waits", "system_calls", "page_faults", "copies", "reuses", "zeroed", "switches", "ticks")


@cache
def symbols() -> dict[str, int]:
    done = subprocess.run(["nm", images.symbols_path("fork")], capture_output=True, text=True, check=True)
    return {name: int(value, 16) for value, _, name in (line.split() for line in done.stdout.splitlines())}


@contextmanager
def booted(engine: str) -> Iterator[Machine]:
    options = machine_options(images.path("fork"), f"hz=19 forkwait={_FORKS}", lambda _data: None)
    machine = Machine(options, make_factories(verify=True), engine, choose_alu())
    try:
        yield machine
    finally:
        machine.close()


@dataclass(frozen=True, slots=True)
class Moment:
    """The entry of `space_copy`, which copies the parent's page table.

    Attributes:
        icount: when it is.
        counts: what the kernel has counted.
        written: entries of the parent's table that are present and writable: those that fork changes.
        recycled: how many of the two frames that are zeroed for the child were the directory of a child until now.
    """

    icount: int
    counts: dict[str, int]
    written: int
    recycled: int


@cache
def moments() -> tuple[Moment, ...]:
    """Each fork of the run, from the reference engine."""
    found: list[Moment] = []
    directories: set[int] = set()
    with booted("interp") as machine:
        memory = machine.memory

        def load(name: str, offset: int = 0, size_bytes: int = 4) -> int:
            return memory.load(symbols()[name] + offset, size_bytes)

        machine.debug.set_breakpoints(frozenset({CodeBreakpoint(symbols()["space_copy"])}))
        skip = False
        while (stop := machine.engine.run(1 << 40, skip_breakpoint=skip)).kind is not StopKind.EXIT:
            skip = stop.kind is StopKind.BREAKPOINT
            if not skip:
                continue
            cr3 = machine.cpu.state.cr3
            table = memory.load(cr3 + 4 * _USER_ENTRY, 4) & ~0xFFF
            entries = [memory.load(table + 4 * n, 4) for n in range(1024)]
            free = load("free_count")
            frames = [load("free_frames", 2 * (free - n), 2) << 12 for n in (1, 2)]
            found.append(
                Moment(
                    machine.clock.icount,
                    {name: load("counts", 4 * n) for n, name in enumerate(_COUNTS)},
                    sum(entry & (P | RW) == P | RW for entry in entries),
                    len(directories.intersection(frames)),
                )
            )
            directories.difference_update(frames)
            directories.add(frames[0])  # the child's, in which it will run
    return tuple(found)


def exits_between_forks(engine: str) -> list[dict[str, int]]:
    """By reason, from each fork to the next."""
    looks: list[dict[str, int]] = []
    with booted(engine) as machine:
        for moment in moments():
            while machine.clock.icount < moment.icount:
                assert machine.engine.run(moment.icount).kind is StopKind.BUDGET
            statistics = machine.statistics()
            looks.append({name[6:]: int(count) for name, count in statistics.items() if name.startswith("exits ")})
    return [
        {name: count - before.get(name, 0) for name, count in after.items() if count != before.get(name, 0)}
        for before, after in pairwise(looks)
    ]


def test_under_shadow_paging() -> None:
    walked = exits_between_forks("trap")
    assert len(walked) == _FORKS - 1
    for (this, following), exits in zip(pairwise(moments()), walked, strict=True):
        rise = {name: following.counts[name] - count for name, count in this.counts.items()}
        resolved = rise["copies"] + rise["reuses"] + rise["zeroed"]
        # fork flushes what became read-only, and each switch of processes loads another directory.
        assert exits.pop("CR3_WRITE") == rise["switches"] + 1
        assert exits.pop("EXCP_PF true") == rise["page_faults"]
        # A page that is copied, or its writer's alone, has its entry changed, and is flushed.
        assert exits.pop("INVLPG") == rise["copies"] + rise["reuses"]
        # The entries that fork makes read-only, those of the faults, and REP STOS over what was a directory.
        assert exits.pop("EXCP_PF trace") == this.written + resolved + this.recycled
        # The shadow has to learn each page anew whose fault was resolved, and what a new address space uses: a page of
        # text in ring 3, and of the kernel its text, data, stack, tables and the frames that it copies and zeroes. The
        # parent's other pages, 18 at least, are shadowed as before.
        assert resolved + 6 <= exits.pop("EXCP_PF hidden") <= resolved + 12
        # System calls by INT 80h, IRET, and the copying itself are no exits.
        assert not {name: count for name, count in exits.items() if name != "INTR"}


def test_what_is_to_be_done_differs_from_fork_to_fork() -> None:
    """Else the test above might compare constants."""
    first, *later = moments()
    assert len(later) == _FORKS - 1
    assert first.written > 16, "the working set, and stack and data"
    assert {moment.written for moment in later[1:]} == {2}
    assert first.recycled == 0
    assert {moment.recycled for moment in later} == {1}


def test_under_nested_paging_none_of_it_is_an_exit() -> None:
    for exits in exits_between_forks("trap nested"):
        assert not {name: count for name, count in exits.items() if name != "INTR"}
