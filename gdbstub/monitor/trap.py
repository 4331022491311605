"""Monitor commands about a guest that runs between exits: what it was left for, and its control block.

They read what the engine has counted, and change nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from gdbstub.monitor.command import Command
from gdbstub.target import TargetError
from machine.engine import CountsExits, LocatesExits

if TYPE_CHECKING:
    from gdbstub.guest import GuestTarget

_SITES_SHOWN = 10


def show_exits(guest: GuestTarget, _words: list[str]) -> Iterator[str]:
    """`exits`."""
    engine = guest.machine.engine
    if not isinstance(engine, CountsExits):
        raise TargetError(f"The engine `{engine.name}` has no exits; `hybrid` and the engines of `trap` have.")
    rows = engine.exit_counts()
    total = sum(row.count for row in rows)
    if not total:
        yield "The guest has not been left yet.\n"
        return
    yield f"{'exit':32} {'count':>12} {'share':>7} {'mean us':>9} {'total ms':>10}\n"
    for row in rows:
        mean_us = row.total_ns / row.count / 1e3
        yield f"{row.reason:32} {row.count:12,} {row.count / total:7.1%} {mean_us:9.2f} {row.total_ns / 1e6:10.3f}\n"
    total_ns = sum(row.total_ns for row in rows)
    yield f"{'all':32} {total:12,} {1:7.1%} {total_ns / total / 1e3:9.2f} {total_ns / 1e6:10.3f}\n"
    if isinstance(engine, LocatesExits):
        yield "guest addresses that cost most:\n"
        for eip, count, site_ns in engine.exit_sites(_SITES_SHOWN):
            share, mean_us = count / total, site_ns / count / 1e3
            yield f"  {eip:08x}{'':22} {count:12,} {share:7.1%} {mean_us:9.2f} {site_ns / 1e6:10.3f}\n"


def show_vmcb(guest: GuestTarget, _words: list[str]) -> Iterator[str]:
    """`vmcb`."""
    from vmm.trap.vmcbtext import HasVmcb, describe

    engine = guest.machine.engine
    if not isinstance(engine, HasVmcb):
        raise TargetError(f"The engine `{engine.name}` has no VMCB; `trap`, `trap nested` and `hybrid` have.")
    yield describe(engine.vmcb)


COMMANDS = (
    Command("exits", "", "what the guest was left for, how often, and what handling it took", show_exits),
    Command(
        "vmcb",
        "",
        "the virtual machine control block, as the last exit left it",
        show_vmcb,
        details="What has been changed since (registers by the debugger, an event that is about to be injected) is in "
        "the block when the guest is entered again.",
    ),
)
