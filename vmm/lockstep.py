"""Lockstep: two engines on guests made alike, run to the same icounts and compared there, down to where they part.

It owns the runs and the search for the first instruction that differs; what is compared is `vmm.differences`'s
business. Which engines they are, and what the guests are, it must not know.
"""

from __future__ import annotations

import heapq
import random
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Generic, TypeVar

from machine.alu import Alu
from machine.clock import NEVER_ICOUNT
from machine.cpu import Cpu
from machine.debug import Stop, StopKind
from machine.devices.board import BoardOptions
from machine.engine import ExecutesUnits
from machine.pc import EngineFactory, Machine, MachineOptions
from machine.state import CS, MASK32, SEG_DB
from vmm.differences import (
    Difference,
    Guest,
    Kind,
    guest_differences,
    output_differences,
    stop_differences,
    tree_differences,
)

TRACE_INSNS = 16
# What an engine may execute as one unit, or in another way because the end of a run is near.
UNIT_INSNS = 64
# So far apart are the places that the search may begin at.
SAVE_EVERY_INSNS = 250_000
# A run that moves neither the icount nor the time this often in a row never will: some chunk of a REP would.
PATIENCE_RUNS = 20_000


Result = TypeVar("Result")


class LockstepError(Exception):
    """The comparison itself cannot go on."""


class _Slices(Generic[Result]):
    """The slices of something, and its result once they have been iterated over."""

    result: Result

    def __init__(self, slices: Generator[object, None, Result]) -> None:
        self._slices = slices

    def __iter__(self) -> Iterator[object]:
        self.result = yield from self._slices

    def finish(self) -> Result:
        """Have them all at once."""
        for _ in self:
            pass
        return self.result


@dataclass(slots=True)
class Side:
    """One of two guests that are to do the same.

    Attributes:
        guest: the guest, as both begin.
        output: what its devices send out; whoever makes the guest has them add to it.
        devices: a snapshot of them all, by name.
        reset: what to do when a device pulls RESET.
        slice_insns: so many instructions, at most, are executed at a time.
    """

    guest: Guest
    output: bytearray = field(default_factory=bytearray)
    devices: Callable[[], Mapping[str, object]] = dict
    reset: Callable[[], None] = lambda: None
    slice_insns: int = NEVER_ICOUNT

    def close(self) -> None:
        """Give the guest's share of the host back."""
        self.guest.close()

    def advance(self, until_icount: int) -> Stop | None:
        """Run to an icount exactly; None if it was reached, else what stopped the guest before.

        Raises:
            LockstepError: the guest retires nothing, and no time passes.
        """
        return _Slices(self.advancing(until_icount)).finish()

    def advancing(self, until_icount: int) -> Generator[None, None, Stop | None]:
        """The same in slices."""
        clock = self.guest.clock
        idle = 0
        while clock.icount < until_icount:
            before = clock.icount, clock.idle_ns
            stop = self.guest.engine.run(min(until_icount, clock.icount + self.slice_insns))
            if stop.kind is StopKind.RESET:
                self.reset()
            elif stop.kind is not StopKind.BUDGET:
                return stop
            idle = idle + 1 if before == (clock.icount, clock.idle_ns) else 0
            if idle > PATIENCE_RUNS:
                message = f"{self.guest.engine.name} comes no further than icount {clock.icount}"
                raise LockstepError(message)
            yield
        return None


Sides = tuple[Side, Side]
Make = Callable[[], Sides]


def machine_side(options: MachineOptions, factory: EngineFactory, alu: Alu | None = None) -> Side:
    """A whole PC as one side: see `side_of`."""
    return side_of(
        options.board, lambda board: Machine(replace(options, board=board), {"engine": factory}, "engine", alu)
    )


def side_of(board: BoardOptions, make: Callable[[BoardOptions], Machine]) -> Side:
    """A PC that is made with a board as one side; its serial ports and its debug console write into `Side.output`, and
    nowhere else.
    """
    output = bytearray()
    machine = make(replace(board, serial=(output.extend, output.extend), debugcon=output.extend))
    return Side(machine, output, machine.board.snapshot, machine.reset)


@dataclass(frozen=True, slots=True)
class Input:
    """Something from outside, done to each side when its icount is reached."""

    icount: int
    action: Callable[[Side], None]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a comparison has come.

    Attributes:
        icount: both sides are equal up to here.
        is_searching: they are not equal, and the place is being looked for.
    """

    icount: int
    is_searching: bool = False


@dataclass(frozen=True, slots=True)
class Divergence:
    """Where two runs part.

    Attributes:
        agreed_icount: up to here they are known to be equal.
        icount: here they differ; nothing in between was seen to.
        differences: what differs there.
        trace: the instructions that the first side executes before, the oldest first.
        is_exact: the last of them is the one. Otherwise an engine is wrong only where it executes several as one unit.
    """

    agreed_icount: int
    icount: int
    differences: tuple[Difference, ...]
    trace: tuple[str, ...] = ()
    is_exact: bool = True

    def __str__(self) -> str:
        lines = [f"equal at icount {self.agreed_icount}, different at {self.icount}:"]
        lines += [f"  {line}" for line in self.differences]
        if not self.is_exact:
            lines.append("executed one at a time the instructions do the same: the units that they are in do not")
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


def run(make: Make, icounts: Iterable[int], inputs: Sequence[Input] = (), *, locate: bool = True) -> Outcome:
    """Compare, to the end: see `compare`."""
    return _Slices(compare(make, icounts, inputs, locate=locate)).finish()


def compare(
    make: Make,
    icounts: Iterable[int],
    inputs: Sequence[Input] = (),
    *,
    locate: bool = True,
    singly: bool = False,
    save: Callable[[Side], Make] | None = None,
) -> Generator[Progress, None, Outcome]:
    """Run two fresh sides to each icount and compare them there, until they differ, stop, or the last one is reached.

    Args:
        make: two sides made alike; called again to search for the first difference.
        icounts: ascending. How a run is cut into pieces should change nothing; so vary them.
        inputs: what comes from outside; each is an icount to compare at, too.
        locate: False spares the search; then `Divergence` is as coarse as `icounts`.
        singly: no engine executes several instructions as one unit, in which it would be wrong between two `icounts`.
        save: returns what makes two sides that go on from where a side stands, so that the search need not begin at the
            beginning. The one that it returned before is not called any more.

    Raises:
        LockstepError: a side does not come on, or a difference does not come again.
    """
    first, second = make()
    seconds = [0.0, 0.0]
    ways = [_Way(make)]  # from the last place that was saved, and from the beginning
    stop: Stop | None = None
    found: list[Difference] = []
    with closing(first), closing(second):
        has_units = any(isinstance(side.guest.engine, ExecutesUnits) for side in (first, second))
        if singly:
            _execute_singly(first, second)
        agreed_icount = saved_icount = target = first.guest.clock.icount
        for target in _merge(icounts, inputs):
            stops = []
            for index, side in enumerate((first, second)):
                began = time.perf_counter()
                for _ in (slices := _Slices(side.advancing(target))):
                    seconds[index] += time.perf_counter() - began
                    yield Progress(agreed_icount)
                    began = time.perf_counter()
                seconds[index] += time.perf_counter() - began
                stops.append(slices.result)
            found = differences(first, second, *stops)
            stop = stops[0]
            if found or stop is not None:
                break
            agreed_icount = target
            _feed((first, second), inputs, target)
            if save is not None and target - saved_icount >= SAVE_EVERY_INSNS:
                ways[:-1] = [_Way(save(first))]
                saved_icount = target
                ways[-1].targets.append(target)
            else:
                for way in ways:
                    way.targets.append(target)
            yield Progress(target)
        icount = first.guest.clock.icount
        statistics = dict(first.guest.engine.statistics()), dict(second.guest.engine.statistics())
        output = bytes(first.output)
    divergence = None
    if found:
        divergence = Divergence(agreed_icount, target, tuple(found))
        if locate:
            divergence = yield from _locate(ways, inputs, divergence, has_units=has_units)
    return Outcome(icount, stop, divergence, output, (seconds[0], seconds[1]), statistics)


def _merge(icounts: Iterable[int], inputs: Sequence[Input]) -> Iterator[int]:
    """All icounts to compare at, each once; as they are wanted, for they may be more than memory holds."""
    for icount, _ in groupby(heapq.merge(icounts, sorted(each.icount for each in inputs))):
        yield icount


def _execute_singly(*sides: Side) -> None:
    for side in sides:
        if isinstance(side.guest.engine, ExecutesUnits):
            side.guest.engine.execute_singly()


def _feed(sides: Sides, inputs: Sequence[Input], icount: int) -> None:
    for each in inputs:
        if each.icount == icount:
            for side in sides:
                each.action(side)


@dataclass(frozen=True, slots=True)
class _Way:
    """How the compared sides came to where they are.

    Attributes:
        make: fresh sides that stand where it begins.
        targets: the icounts at which it was cut, ascending; both were equal there.
    """

    make: Make
    targets: list[int] = field(default_factory=list)

    def follow(
        self, inputs: Sequence[Input], then_icount: int, *, singly: bool
    ) -> Generator[Progress, None, list[Difference]]:
        """Go it with fresh sides, and on to another icount; returns what differs there.

        Args:
            inputs: what comes from outside.
            then_icount: past the last target.
            singly: the instructions behind the last target are units of their own.
        """
        first, second = self.make()
        with closing(first), closing(second):
            stops: list[Stop | None] = [None, None]
            for target in (*self.targets, then_icount):
                if target == then_icount and singly:
                    _execute_singly(first, second)
                for index, side in enumerate((first, second)):
                    slices = _Slices(side.advancing(target))
                    for _ in slices:
                        yield Progress(target, is_searching=True)
                    stops[index] = slices.result
                if target != then_icount:
                    _feed((first, second), inputs, target)
            return differences(first, second, *stops)

    def trace(
        self, inputs: Sequence[Input], from_icount: int, until_icount: int
    ) -> Generator[Progress, None, tuple[str, ...]]:
        """The instructions that the first side executes from one icount to another."""
        first, second = self.make()
        with closing(first), closing(second):
            for target in (*self.targets, from_icount):
                for _ in first.advancing(target):
                    yield Progress(target, is_searching=True)
                if target != from_icount:
                    _feed((first, second), inputs, target)
            return tuple(_steps(first, until_icount))


def _locate(
    ways: Sequence[_Way], inputs: Sequence[Input], coarse: Divergence, *, has_units: bool
) -> Generator[Progress, None, Divergence]:
    """Halve the range in which the runs part, with fresh sides each time; then say how the first one gets there.

    The first attempt is with every instruction as a unit of its own, which tells the one that is wrong. What comes of
    several in one unit only, or of what an engine has kept from long before, does not come again then.

    Args:
        ways: to the last place at which both were equal; the shortest first.
        inputs: what comes from outside.
        coarse: what is known.
        has_units: an engine executes several instructions as one unit.

    Raises:
        LockstepError: the difference does not come again.
    """
    attempts = [(ways[0], True)] if has_units else []
    attempts += [(way, False) for way in ways]
    for way, singly in attempts:
        low, high = coarse.agreed_icount, coarse.icount
        found = yield from way.follow(inputs, high, singly=singly)
        if not found:
            continue
        while high - low > 1:
            middle = (low + high) // 2
            now = yield from way.follow(inputs, middle, singly=singly)
            if now:
                high, found = middle, now
            else:
                low = middle
        is_exact = singly or not has_units
        if not is_exact:
            low = max(coarse.agreed_icount, high - UNIT_INSNS)
        trace = yield from way.trace(inputs, max(coarse.agreed_icount, high - TRACE_INSNS), high)
        return Divergence(low, high, tuple(found), trace, is_exact=is_exact)
    message = f"a difference at icount {coarse.icount} did not come again: " + "; ".join(map(str, coarse.differences))
    raise LockstepError(message)


def _steps(side: Side, until_icount: int) -> Iterator[str]:
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
        return f"{cs.selector:04x}:{eip:08x} {instruction.mnemonic} {instruction.op_str}".rstrip()
    return f"{cs.selector:04x}:{eip:08x} {data[:4].hex(' ') or 'not mapped'}"


def differences(first: Side, second: Side, *stops: Stop | None) -> list[Difference]:
    """What the guest, a device or a debugger could tell apart; empty if the sides are equal.

    Args:
        first: a side.
        second: the other one.
        stops: what stopped each, if that is to be equal, too.
    """
    return [
        *(stop_differences(*stops) if len(stops) == 2 else ()),
        *guest_differences(first.guest, second.guest),
        *tree_differences(Kind.DEVICE, first.devices(), second.devices()),
        *output_differences(first.output, second.output),
    ]
