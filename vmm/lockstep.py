"""Lockstep: two engines on guests made alike, run to the same icounts and compared there, down to where they part.

It owns the comparison, the search for the first instruction that differs, and its description; which engines are
compared, and what the guests are, it must not know.
"""

from __future__ import annotations

import ctypes
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Protocol

from machine.alu import Alu
from machine.clock import Clock
from machine.cpu import Cpu
from machine.debug import Stop, StopKind
from machine.engine import Engine
from machine.lines import CpuLines
from machine.memory import PAGE_BYTES, PhysicalMemory
from machine.pc import EngineFactory, Machine, MachineOptions
from machine.state import CS, MASK32, SEG_DB, STATE_LAYOUT

TRACE_INSNS = 16
MEMORY_LINES = 8
# A run that moves neither the icount nor the time this often in a row never will: some chunk of a REP would.
PATIENCE_RUNS = 20_000

_memcmp = ctypes.CDLL(None).memcmp
_memcmp.restype = ctypes.c_int
_memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


class LockstepError(Exception):
    """The comparison itself cannot go on."""


class Guest(Protocol):
    """What is compared: `machine.pc.Machine` is one."""

    @property
    def cpu(self) -> Cpu:
        """Its CPU."""

    @property
    def memory(self) -> PhysicalMemory:
        """Its memory."""

    @property
    def clock(self) -> Clock:
        """Its clock."""

    @property
    def lines(self) -> CpuLines:
        """Its CPU's lines."""

    @property
    def engine(self) -> Engine:
        """What runs it."""

    def close(self) -> None:
        """Give everything back."""


@dataclass(slots=True)
class Side:
    """One of two guests that are to do the same.

    Attributes:
        guest: the guest, not run yet.
        output: what its devices send out; whoever makes the guest has them add to it.
        devices: a snapshot of them all, by name.
        reset: what to do when a device pulls RESET.
    """

    guest: Guest
    output: bytearray = field(default_factory=bytearray)
    devices: Callable[[], Mapping[str, object]] = dict
    reset: Callable[[], None] = lambda: None

    def close(self) -> None:
        """Give the guest's share of the host back."""
        self.guest.close()

    def advance(self, until_icount: int) -> Stop | None:
        """Run to an icount exactly; None if it was reached, else what stopped the guest before.

        Raises:
            LockstepError: the guest retires nothing, and no time passes.
        """
        clock = self.guest.clock
        idle = 0
        while clock.icount < until_icount:
            before = clock.icount, clock.idle_ns
            stop = self.guest.engine.run(until_icount)
            if stop.kind is StopKind.RESET:
                self.reset()
            elif stop.kind is not StopKind.BUDGET:
                return stop
            idle = idle + 1 if before == (clock.icount, clock.idle_ns) else 0
            if idle > PATIENCE_RUNS:
                message = f"{self.guest.engine.name} comes no further than icount {clock.icount}"
                raise LockstepError(message)
        return None


def machine_side(options: MachineOptions, factory: EngineFactory, alu: Alu | None = None) -> Side:
    """A whole PC as one side; its serial ports and its debug console write into `Side.output`, and nowhere else."""
    output = bytearray()
    board = replace(options.board, serial=(output.extend, output.extend), debugcon=output.extend)
    machine = Machine(replace(options, board=board), {"engine": factory}, "engine", alu)
    return Side(machine, output, machine.board.snapshot, machine.reset)


@dataclass(frozen=True, slots=True)
class Input:
    """Something from outside, done to each side when its icount is reached."""

    icount: int
    action: Callable[[Side], None]


@dataclass(frozen=True, slots=True)
class Divergence:
    """Where two runs part.

    Attributes:
        agreed_icount: up to here they are known to be equal.
        icount: here they differ; nothing in between was seen to.
        differences: what differs there, one line each, the first side's value first.
        trace: the instructions that the first side executes before, the oldest first.
    """

    agreed_icount: int
    icount: int
    differences: tuple[str, ...]
    trace: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"equal at icount {self.agreed_icount}, different at {self.icount}:"]
        lines += [f"  {line}" for line in self.differences]
        if self.trace:
            lines += ["the first side's way there:", *(f"  {line}" for line in self.trace)]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a comparison ended.

    Attributes:
        icount: how far both sides came.
        stop: what stopped both before the last icount that was asked for.
        divergence: None if all was equal.
        output: what the first side sent out.
        seconds: time that each side ran.
        statistics: what each engine counted.
    """

    icount: int
    stop: Stop | None
    divergence: Divergence | None
    output: bytes
    seconds: tuple[float, float]
    statistics: tuple[Mapping[str, int | float | str], Mapping[str, int | float | str]]


def random_icounts(total: int, seed: int, longest: int) -> list[int]:
    """Ascending icounts up to `total`: steps of 1 to `longest`, as many of about 10 as of about 10,000."""
    chance = random.Random(seed)
    icounts = []
    at = 0
    while at < total:
        at = min(total, at + chance.randint(1, max(1, int(longest ** chance.random()))))
        icounts.append(at)
    return icounts


def run(
    make: Callable[[], tuple[Side, Side]], icounts: Iterable[int], inputs: Sequence[Input] = (), *, locate: bool = True
) -> Outcome:
    """Run two fresh sides to each icount and compare them there, until they differ, stop, or the last one is reached.

    Args:
        make: two sides made alike; called again to search for the first difference.
        icounts: ascending. How a run is cut into pieces should change nothing; so vary them.
        inputs: what comes from outside; each is an icount to compare at, too.
        locate: False spares the search; then `Divergence` is as coarse as `icounts`.

    Raises:
        LockstepError: a side does not come on, or a difference does not come again.
    """
    targets = sorted({*icounts, *(each.icount for each in inputs)})
    first, second = make()
    seconds = [0.0, 0.0]
    done, target, stop, found = [0], 0, None, []
    with closing(first), closing(second):
        for target in targets:
            stops = []
            for index, side in enumerate((first, second)):
                before = time.perf_counter()
                stops.append(side.advance(target))
                seconds[index] += time.perf_counter() - before
            found = differences(first, second, *stops)
            stop = stops[0]
            if found or stop is not None:
                break
            done.append(target)
            _feed((first, second), inputs, target)
        icount = first.guest.clock.icount
        statistics = dict(first.guest.engine.statistics()), dict(second.guest.engine.statistics())
        output = bytes(first.output)
    divergence = None
    if found:
        divergence = Divergence(done[-1], target, tuple(found))
        if locate:
            divergence = _locate(make, done, inputs, divergence)
    return Outcome(icount, stop, divergence, output, (seconds[0], seconds[1]), statistics)


def _feed(sides: Sequence[Side], inputs: Sequence[Input], icount: int) -> None:
    for each in inputs:
        if each.icount == icount:
            for side in sides:
                each.action(side)


def _replay(sides: Sequence[Side], targets: Sequence[int], inputs: Sequence[Input], then: int) -> list[Stop | None]:
    """Run fresh sides the old way, and on to another icount; returns what stopped them."""
    stops: list[Stop | None] = []
    for target in (*targets, then):
        stops = [side.advance(target) for side in sides]
        if target != then:
            _feed(sides, inputs, target)
    return stops


def _locate(
    make: Callable[[], tuple[Side, Side]], targets: Sequence[int], inputs: Sequence[Input], coarse: Divergence
) -> Divergence:
    """Halve the range in which the runs part, with fresh sides each time; then say how the first one gets there."""
    low, high = coarse.agreed_icount, coarse.icount
    found = coarse.differences
    again = True
    while again or high - low > 1:
        middle = high if again else (low + high) // 2
        first, second = make()
        with closing(first), closing(second):
            now = differences(first, second, *_replay((first, second), targets, inputs, middle))
        if now:
            high, found = middle, tuple(now)
        elif again:
            message = f"a difference at icount {high} did not come again: " + "; ".join(found)
            raise LockstepError(message)
        else:
            low = middle
        again = False
    first, second = make()
    with closing(first), closing(second):
        _replay((first,), targets, inputs, max(coarse.agreed_icount, high - TRACE_INSNS))
        trace = tuple(_trace(first, high))
    return Divergence(low, high, found, trace)


def _trace(side: Side, until_icount: int) -> Iterator[str]:
    clock = side.guest.clock
    for _ in range(4 * TRACE_INSNS):
        if clock.icount >= until_icount:
            return
        yield f"{clock.icount:10} {_instruction(side.guest.cpu)}"
        if side.guest.engine.step().kind is not StopKind.STEP:
            return


def _instruction(cpu: Cpu) -> str:
    from capstone import CS_ARCH_X86, CS_MODE_16, CS_MODE_32, Cs

    cs, eip = cpu.state.segments[CS], cpu.state.eip
    data = b""
    for offset in range(15):
        physical = cpu.mmu.probe((cs.base + eip + offset) & MASK32)
        if physical is None:
            break
        data += cpu.memory.read(physical, 1)
    decoder = Cs(CS_ARCH_X86, CS_MODE_32 if cs.attributes & SEG_DB else CS_MODE_16)
    for instruction in decoder.disasm(data, eip, 1):
        return f"{cs.selector:04x}:{eip:08x} {instruction.mnemonic} {instruction.op_str}"
    return f"{cs.selector:04x}:{eip:08x} {data[:4].hex(' ') or 'not mapped'}"


def differences(first: Side, second: Side, *stops: Stop | None) -> list[str]:
    """What the guest, a device or a debugger could tell apart, one line each; empty if the sides are equal.

    Args:
        first: a side.
        second: the other one.
        stops: what stopped each, if that is to be equal, too.
    """
    lines = [f"stop: {stops[0]} / {stops[1]}"] if stops and stops[0] != stops[1] else []
    ours, theirs = first.guest, second.guest
    a, b = ours.cpu.state.pack(), theirs.cpu.state.pack()
    if a != b:
        lines += _differing(STATE_LAYOUT.parse(a), STATE_LAYOUT.parse(b))
    lines += _differing(_around(ours), _around(theirs))
    lines += _differing(first.devices(), second.devices())
    if first.output != second.output:
        common = 0
        while first.output[: common + 1] == second.output[: common + 1]:
            common += 1
        shown = [repr(bytes(side.output[common : common + 40])) for side in (first, second)]
        lines.append(f"output after {common} bytes: {' / '.join(shown)}")
    return lines + list(_memory_differences(ours.memory, theirs.memory))


def _around(guest: Guest) -> dict[str, object]:
    """State beside the registers."""
    cpu = guest.cpu
    return {
        "pending_debug": cpu.pending_debug,
        "repeating": cpu.repeating,
        "clock": guest.clock.snapshot(),
        "lines": guest.lines.snapshot(),
        "a20": guest.memory.a20_enabled,
    }


def _flatten(name: str, value: object) -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping):
        for key, each in value.items():
            if key != "_io":  # construct's own
                yield from _flatten(f"{name}.{key}" if name else str(key), each)
    elif isinstance(value, list | tuple):
        for index, each in enumerate(value):
            yield from _flatten(f"{name}[{index}]", each)
    else:
        yield name, value


def _differing(first: Mapping[str, object], second: Mapping[str, object]) -> list[str]:
    if first == second:
        return []
    ours, theirs = dict(_flatten("", first)), dict(_flatten("", second))
    names = [*ours, *(name for name in theirs if name not in ours)]
    return [
        f"{name}: {_show(ours.get(name))} / {_show(theirs.get(name))}"
        for name in names
        if ours.get(name) != theirs.get(name)
    ]


def _show(value: object) -> str:
    return f"{value:#x}" if isinstance(value, int) and not isinstance(value, bool) else repr(value)


def _memory_differences(first: PhysicalMemory, second: PhysicalMemory) -> Iterator[str]:
    if first.ram_bytes != second.ram_bytes:
        yield f"RAM: {first.ram_bytes:#x} / {second.ram_bytes:#x} bytes"
        return
    shown = 0
    for start, end in _extents(first, second):
        if _equal(first.ram8[start:end], second.ram8[start:end]):
            continue
        for page in range(start, end, PAGE_BYTES):
            a, b = first.ram[page : page + PAGE_BYTES], second.ram[page : page + PAGE_BYTES]
            for at in range(0, PAGE_BYTES if a != b else 0, 4):
                if a[at : at + 4] != b[at : at + 4]:
                    shown += 1
                    if shown <= MEMORY_LINES:
                        yield f"memory {page + at:08x}: {a[at : at + 4].hex(' ')} / {b[at : at + 4].hex(' ')}"
    if shown > MEMORY_LINES:
        yield f"memory: {shown - MEMORY_LINES} more doublewords"


def _equal(first: memoryview, second: memoryview) -> bool:
    # Two memoryviews are compared byte by byte, each by way of a Python object.
    address = ctypes.addressof(ctypes.c_char.from_buffer(first)), ctypes.addressof(ctypes.c_char.from_buffer(second))
    return not _memcmp(*address, len(first))


def _extents(*memories: PhysicalMemory) -> Iterator[tuple[int, int]]:
    """The parts of RAM that either guest has touched: the rest is zero, and reading it would cost memory."""
    edges = []
    for memory in memories:
        at = 0
        while True:
            try:
                start = os.lseek(memory.ram_fd, at, os.SEEK_DATA)
            except OSError:  # ENXIO: no data behind here
                break
            at = os.lseek(memory.ram_fd, start, os.SEEK_HOLE)
            edges += [(start, 1), (at, -1)]
    depth, begin = 0, 0
    for at, change in sorted(edges, key=lambda edge: (edge[0], -edge[1])):
        if not depth:
            begin = at
        depth += change
        if not depth:
            yield begin, at
