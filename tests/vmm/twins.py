"""Two bare guests that are to do the same, one on the reference engine and one on another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Self

from machine.debug import Stop
from tests import engine as engines
from tests.vmm.bare import Bare, EngineMaker, flat
from vmm.interp import Interpreter
from vmm.lockstep import Side, differences

MakeGuest = Callable[[str, EngineMaker], Bare]


class Twins:
    """The pair. Everything that is done to them is done to both, and after each run they must be equal.

    Args:
        source: assembly for both.
        prepare: done to each before it runs.
        make_guest: `bare.flat` or `bare.real`.
        engine: what runs the second one; None: the chosen one, else `bt`.
    """

    def __init__(
        self,
        source: str = "hlt",
        prepare: Callable[[Bare], object] = lambda _bare: None,
        *,
        make_guest: MakeGuest = flat,
        engine: EngineMaker | None = None,
    ) -> None:
        self.reference = make_guest(source, Interpreter)
        self.other = make_guest(source, engine or engines.other())
        self._sides = Side(self.reference), Side(self.other)
        self.each(prepare)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close both."""
        for side in self._sides:
            side.close()

    def each(self, action: Callable[[Bare], object]) -> None:
        """Do something to both."""
        action(self.reference)
        action(self.other)

    def run(self, insns: int, steps: Sequence[int] = ()) -> Stop | None:
        """Run both for that many instructions, in pieces of `steps` over and over; returns what stopped them before."""
        end = self.reference.clock.icount + insns
        turn = 0
        while self.reference.clock.icount < end:
            step = steps[turn % len(steps)] if steps else insns
            turn += 1
            target = min(end, self.reference.clock.icount + step)
            stops = [side.advance(target) for side in self._sides]
            self.check(stops)
            if stops[0] is not None:
                return stops[0]
        return None

    def check(self, stops: Iterable[Stop | None] = ()) -> None:
        """Compare them."""
        found = differences(*self._sides, *stops)
        assert not found, f"at icount {self.reference.clock.icount}:\n" + "\n".join(map(str, found))

    def count(self, name: str) -> int:
        """How often something happened, by the statistics of the other engine."""
        count = self.other.engine.statistics().get(name, 0)
        assert isinstance(count, int)
        return count
