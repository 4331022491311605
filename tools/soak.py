"""Runs guests in a loop in one process under bt, and fails if memory, host mappings, descriptors or the TC grow.

`python -m tools.soak [--seconds N]`: 30 minutes by default. Each round runs the demo kernel (tasks, system calls,
faults, a shell) and the benchmark guests; what the process holds after a round is compared with what it held
when it was warm. It must not know how the engine works inside.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from time import monotonic

from guests import images
from machine.debug import StopKind
from machine.devices.board import BoardOptions
from machine.loaders.image import LoadOptions
from machine.pc import Machine, MachineOptions
from tools.bench_guests import ENGINES
from vmm.hostalu import choose_alu

DEFAULT_SECONDS = 1800.0
WARM_ROUNDS = 3
RSS_SLACK_BYTES = 24 << 20  # what CPython's allocator may keep back
MAPPINGS_SLACK = 100
MAX_MAPPINGS = 60_000  # Linux allows 65,530
MAX_TC_BYTES = 64 << 20
_RAM_BYTES = 16 << 20
_STINT_INSNS = 500_000
_CRASHES = "pgfault;div0;ud;gp;bp;stack"
_FOREVER_INSNS = 1 << 62
# Image, command line, and the icount at which it is cut off, for what reboots for ever.
GUESTS = (
    ("demo", f"quiet run={_CRASHES};ps;mem;poweroff", _FOREVER_INSNS),
    ("bench", "paging sieve=3 crc32=3 fib=3 matrix=3 memory=2 calls=3 sort=3 lz=3", _FOREVER_INSNS),
    ("nano", "", _FOREVER_INSNS),
    ("demo", "hz=1000 run=reboot", 400_000),
)


class SoakError(Exception):
    """Something grew, or a guest did not do what it does."""


@dataclass(frozen=True, slots=True)
class Holdings:
    """What the process holds.

    Attributes:
        rss_bytes: resident memory.
        mappings: lines of /proc/self/maps.
        descriptors: open files.
    """

    rss_bytes: int
    mappings: int
    descriptors: int

    @classmethod
    def now(cls) -> Holdings:
        """Those of this process."""
        gc.collect()
        resident_pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        with Path("/proc/self/maps").open("rb") as maps:
            mappings = sum(1 for _ in maps)
        return cls(
            resident_pages * os.sysconf("SC_PAGE_SIZE"), mappings, sum(1 for _ in Path("/proc/self/fd").iterdir())
        )

    def grown_since(self, before: Holdings) -> list[str]:
        """What is more than it was, beyond what may be."""
        complaints = []
        if self.rss_bytes > before.rss_bytes + RSS_SLACK_BYTES:
            complaints.append(f"memory from {before.rss_bytes >> 20} to {self.rss_bytes >> 20} MiB")
        if self.mappings > before.mappings + MAPPINGS_SLACK:
            complaints.append(f"mappings from {before.mappings} to {self.mappings}")
        if self.descriptors > before.descriptors:
            complaints.append(f"descriptors from {before.descriptors} to {self.descriptors}")
        return complaints


@dataclass(slots=True)
class Peaks:
    """The most that was seen while guests ran."""

    mappings: int = 0
    tc_bytes: int = 0


def run_guest(name: str, command_line: str, end_icount: int, peaks: Peaks, *, engine: str = "bt") -> int:
    """Run one guest to its end, or to `end_icount`; returns the instructions.

    Raises:
        SoakError: it stopped for another reason.
    """
    output = bytearray()
    options = MachineOptions(
        image=images.path(name),
        loading=LoadOptions(ram_bytes=_RAM_BYTES, command_line=command_line),
        board=BoardOptions(serial=(output.extend, None)),
    )
    machine = Machine(options, ENGINES, engine, choose_alu())
    try:
        kind = StopKind.BUDGET
        while kind is not StopKind.EXIT and machine.clock.icount < end_icount:
            stop = machine.engine.run(machine.clock.icount + _STINT_INSNS)
            kind = stop.kind
            if kind is StopKind.RESET:
                machine.reset()
            elif kind not in (StopKind.BUDGET, StopKind.EXIT):
                raise SoakError(f"{name} ended with {kind.name}: {bytes(output[-200:])!r}")
            with Path("/proc/self/maps").open("rb") as maps:
                peaks.mappings = max(peaks.mappings, sum(1 for _ in maps))
            peaks.tc_bytes = max(peaks.tc_bytes, int(machine.statistics().get("TC bytes used", 0)))
        return machine.clock.icount
    finally:
        machine.close()


def soak(seconds: float, say: Callable[[str], None], measure: Callable[[], Holdings] = Holdings.now) -> int:
    """Run rounds for so long, at least WARM_ROUNDS + 1; returns the instructions of all guests.

    Raises:
        SoakError: something grew.
    """
    end = monotonic() + seconds
    peaks, warm, insns = Peaks(), None, 0
    for number in count(1):
        for guest in GUESTS:
            insns += run_guest(*guest, peaks)
        held = measure()
        say(
            f"round {number}: {insns / 1e6:,.0f} M instructions, {held.rss_bytes >> 20} MiB, {held.mappings} mappings "
            f"(at most {peaks.mappings}), {held.descriptors} descriptors, TC at most {peaks.tc_bytes >> 10} KiB"
        )
        if number == WARM_ROUNDS:
            warm = held
        complaints = [] if warm is None else held.grown_since(warm)
        if peaks.mappings > MAX_MAPPINGS:
            complaints.append(f"{peaks.mappings} mappings at once")
        if peaks.tc_bytes > MAX_TC_BYTES:
            complaints.append(f"{peaks.tc_bytes} bytes of TC")
        if complaints:
            raise SoakError("; ".join(complaints))
        if number > WARM_ROUNDS and monotonic() > end:
            break
    return insns


def main() -> int:
    """Soak; 0 if nothing grew."""
    parser = argparse.ArgumentParser(prog="tools.soak", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=DEFAULT_SECONDS, help="how long (default: 30 minutes)")
    arguments = parser.parse_args()

    def say(line: str) -> None:
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()

    try:
        soak(arguments.seconds, say)
    except SoakError as error:
        sys.stderr.write(f"soak: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
