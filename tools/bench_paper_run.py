"""Runs the guests of `bench paper` under any engine that the command line has, and meters each workload by itself.

It knows the names of statistics, not how engines work; whether an engine is there, it finds out by making one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter_ns, process_time_ns

from guests import images
from machine.debug import STINT_SLACK_INSNS, StopKind
from machine.engine import EngineError
from machine.pc import EngineFactory, Machine
from tools.bench import BenchmarkError
from tools.bench_guests import machine_options
from vmm.hostalu import choose_alu

_STINT_INSNS = 20_000_000
_LONGEST_S = 600
# The statistics that are a clock of DESIGN.md; the VMM's is the rest.
_GUEST_CLOCKS = ("seconds in guest", "seconds in TC")
_HARDWARE_CLOCK = "seconds in emulation of hardware"
_EXIT_PREFIX = "exits "
_READS, _WRITES = "VMCB reads an exit", "VMCB writes an exit"

Statistics = Mapping[str, int | float | str]
Factories = Mapping[str, EngineFactory]


@dataclass(frozen=True, slots=True)
class Clocks:
    """Where the time of a workload went, in nanoseconds.

    Attributes:
        guest: the guest's own instructions.
        vmm: everything else but the emulation of hardware: for bt translation, callouts and faults, for trap its exits.
        hardware: what only the emulation of a CPU with guest mode costs; 0 for an engine that emulates none.
    """

    guest: float
    vmm: float
    hardware: float


@dataclass(frozen=True, slots=True)
class Metered:
    """One workload as it ran.

    Attributes:
        name, count, result: as in its line.
        elapsed_ns: CPU time of this process from the line before to the line after, whatever else the host does.
        clocks: None if the engine keeps none.
        counters: by how much each counter of the engine rose.
        exits: by reason; those of an engine that has no exits are empty.
        reads, writes: of the VMCB, all exits together.
        facts: what the engine says of itself in words, by the names of its statistics.
    """

    name: str
    count: int
    result: str
    elapsed_ns: float
    clocks: Clocks | None = None
    counters: Mapping[str, float] = field(default_factory=dict)
    exits: Mapping[str, float] = field(default_factory=dict)
    reads: float = 0.0
    writes: float = 0.0
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def ns(self) -> float:
        """Nanoseconds an operation."""
        return self.elapsed_ns / self.count


@dataclass(slots=True)
class Meter:
    """Takes the bytes of COM1, and at both ends of each workload the engine's statistics."""

    read_statistics: Callable[[], Statistics]
    metered: list[Metered] = field(default_factory=list)
    last_line: str = ""
    _text: bytearray = field(default_factory=bytearray)
    _running: str = ""
    _before: Statistics = field(default_factory=dict)
    _after: Statistics = field(default_factory=dict)
    _began_ns: tuple[int, int] = (0, 0)
    _ended_ns: tuple[int, int] = (0, 0)

    def take(self, data: bytes) -> None:
        """Some bytes came just now; what looking at statistics takes is in no figure."""
        for byte in data:
            if self._running and not self._text:
                self._ended_ns = process_time_ns(), perf_counter_ns()
                self._after = self.read_statistics()
            if byte == 0x0A:
                self._end_line()
            else:
                self._text.append(byte)

    def _end_line(self) -> None:
        line = self.last_line = self._text.decode("latin-1").rstrip("\r")
        self._text.clear()
        if self._running:
            name, running = self._running, line.split()
            self._running = ""
            if len(running) != 3 or running[0] != name or not running[1].isdecimal():
                raise BenchmarkError(f"the guest says {line!r} of {name}")
            cpu_ns, wall_ns = (end - begin for begin, end in zip(self._began_ns, self._ended_ns, strict=True))
            count, result = int(running[1]), running[2]
            self.metered.append(compare(name, count, result, cpu_ns, self._before, self._after, wall_ns=wall_ns))
        if line.startswith("start "):
            self._running = line.removeprefix("start ")
            self._before = self.read_statistics()
            self._began_ns = process_time_ns(), perf_counter_ns()


def compare(
    name: str,
    count: int,
    result: str,
    elapsed_ns: float,
    before: Statistics,
    after: Statistics,
    *,
    wall_ns: float | None = None,
) -> Metered:
    """What happened between two looks at the statistics.

    Engines measure their clocks by the wall. If that is given, they are scaled so that their sum is the CPU time.
    """
    scale = elapsed_ns / wall_ns if wall_ns else 1.0
    rises = {
        key: value - _number(before.get(key, 0))
        for key, value in after.items()
        if isinstance(value, int | float) and not key.endswith("an exit")
    }
    guest = next((rises[key] * 1e9 * scale for key in _GUEST_CLOCKS if key in rises), None)
    clocks = None
    if guest is not None:
        hardware = max(0.0, rises.get(_HARDWARE_CLOCK, 0.0) * 1e9 * scale)
        clocks = Clocks(guest, max(0.0, elapsed_ns - guest - hardware), hardware)
    exits = {
        key.removeprefix(_EXIT_PREFIX): rise for key, rise in rises.items() if key.startswith(_EXIT_PREFIX) and rise
    }
    reads, writes = (_total(after, key) - _total(before, key) for key in (_READS, _WRITES))
    facts = {key: value for key, value in after.items() if isinstance(value, str)}
    return Metered(name, count, result, elapsed_ns, clocks, rises, exits, reads, writes, facts)


def _number(value: float | str) -> float:
    return 0.0 if isinstance(value, str) else value


def _total(statistics: Statistics, mean: str) -> float:
    """All accesses, from their mean over all exits."""
    return _number(statistics.get(mean, 0)) * _number(statistics.get("exits", 0))


def run(factories: Factories, engine: str, image: Path, command_line: str) -> Sequence[Metered]:
    """Run a guest to its end, and meter each workload.

    Raises:
        BenchmarkError: it did not end by turning the machine off, or took too long.
        EngineError: the engine cannot run here.
    """
    machine: Machine | None = None
    meter = Meter(lambda: {} if machine is None else machine.statistics())
    options = machine_options(image, command_line, meter.take)
    machine = Machine(options, factories, engine, choose_alu())
    machine.debug.slack_insns = STINT_SLACK_INSNS
    end_ns = perf_counter_ns() + int(_LONGEST_S * 1e9)
    try:
        kind = StopKind.BUDGET
        while kind is StopKind.BUDGET:
            kind = machine.engine.run(machine.clock.icount + _STINT_INSNS).kind
            if perf_counter_ns() > end_ns:
                raise BenchmarkError(f"{image.name} under {engine} takes more than {_LONGEST_S} s")
    finally:
        machine.close()
    if kind is not StopKind.EXIT or meter.last_line != "done":
        raise BenchmarkError(f"{image.name} under {engine} ended with {kind.name}: {meter.last_line or 'no output'}")
    return meter.metered


def why_not(factories: Factories, engine: str) -> str | None:
    """Why an engine cannot be measured, found out by having it run a few instructions; None if it can."""
    if engine not in factories:
        return f"there is no engine {engine!r}"
    try:
        machine = Machine(machine_options(images.path("tiny-exit")), factories, engine, choose_alu())
    except EngineError as error:
        return str(error)
    try:
        kind = StopKind.BUDGET
        while kind is StopKind.BUDGET:
            kind = machine.engine.run(machine.clock.icount + _STINT_INSNS).kind
    finally:
        machine.close()
    return None if kind is StopKind.EXIT else f"a guest that exits ends with {kind.name}"
