"""Two engines by their names, each on a machine of its own that goes on from where one machine stands.

It owns the copies that a comparison needs, and says which engines cannot be compared; comparing is `vmm.lockstep`'s.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from functools import partial
from random import Random
from types import TracebackType
from typing import Self

from machine.pc import Machine
from machine.snapshot import Snapshot
from vmm import lockstep
from vmm.lockstep import Outcome, Progress, Side, Sides

WITHOUT_ICOUNT = frozenset({"trap kvm"})  # KVM does not count the guest's instructions
STEP_INSNS = range(1_000, 20_000)  # from one comparison to the next
SLICE_INSNS = 5_000
_SEED = 1


class PairError(Exception):
    """Two engines that cannot be compared; one line for the user."""


def take_engine(words: Sequence[str], known: Sequence[str]) -> tuple[str, list[str]]:
    """The engine that the first words name, as many of them as can be, and the words after those.

    A name of two words may be written with a hyphen.

    Raises:
        PairError: there is none of this name.
    """
    spelled = {name.replace(" ", "-"): name for name in known}
    for count in (2, 1):
        name = spelled.get("-".join(words[:count]))
        if name is not None and len(words) >= count:
            return name, list(words[count:])
    what = f"there is no engine `{words[0]}`" if words else "two engines are compared, and one is missing"
    raise PairError(f"{what}; there is: {', '.join(spelled)}")


def check_engines(names: tuple[str, ...], known: tuple[str, ...]) -> None:
    """Refuse engines that there are not, or that cannot stop at a given instruction.

    Raises:
        PairError: it says why.
    """
    for name in names:
        if name not in known:
            raise PairError(f"there is no engine `{name}`; there is: {', '.join(known)}")
        if name in WITHOUT_ICOUNT:
            raise PairError(
                f"`{name}` has no icount: KVM does not count the guest's instructions, so no two runs can be compared"
            )


class Pair:
    """Makes the two sides of a comparison, as often as the search for the first difference wants them.

    Attributes:
        engines: their names.
        begin_icount: where both begin.
    """

    def __init__(self, machine: Machine, engines: tuple[str, str], *, in_slices: bool = False) -> None:
        """Keep what `machine` is now; it is not run, nor changed.

        Args:
            machine: where both go on from; it must not be closed before the pair.
            engines: two of its engines.
            in_slices: a comparison comes back every few milliseconds, or within a second from a guest that executes
                long REPs one after the other: slices are counted in instructions.

        Raises:
            PairError: they cannot be compared.
            OSError: the host has no memory, or no more files can be open.
        """
        check_engines(engines, machine.engine_names)
        self.engines = engines
        self._machine = machine
        self._in_slices = in_slices
        self._start = machine.snapshot()
        self._saved: Snapshot | None = None
        self.begin_icount = self._start.icount

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Give the copies back."""
        self._start.close()
        self._forget()

    def compare(self, insns: int, *, locate: bool = True, each: bool = False) -> Generator[Progress, None, Outcome]:
        """Compare them over that many instructions: see `lockstep.compare`.

        Args:
            insns: how many.
            locate: search for the first instruction that differs.
            each: compare after each instruction; else here and there, and what is equal again by then is not seen.

        Raises:
            LockstepError: as there.
            EngineError: one of them cannot run on this host.
            OSError: as of `Pair`.
        """
        icounts = self._places(insns, step_insns=range(1, 2) if each else STEP_INSNS)
        make = partial(self._make, self._start)
        return lockstep.compare(make, icounts, locate=locate, singly=each, save=self._save)

    def _places(self, insns: int, step_insns: range) -> Iterator[int]:
        """Where to compare: the steps are irregular, for how a run is cut should make no difference."""
        chance, end_icount = Random(_SEED), self.begin_icount + insns
        at_icount = self.begin_icount
        while at_icount < end_icount:
            at_icount = min(end_icount, at_icount + chance.choice(step_insns))
            yield at_icount

    def _make(self, start: Snapshot) -> Sides:
        with ExitStack() as undo:
            first = undo.enter_context(closing(self._side(start, self.engines[0])))
            second = self._side(start, self.engines[1])
            undo.pop_all()
        return first, second

    def _side(self, start: Snapshot, engine: str) -> Side:
        side = lockstep.side_of(self._machine.options.board, partial(self._machine.twin, start, engine))
        if self._in_slices:
            side.slice_insns = SLICE_INSNS  # not by the clock: the search has to go the same way again
        return side

    def _save(self, side: Side) -> lockstep.Make:
        assert isinstance(side.guest, Machine)
        self._forget()
        self._saved = side.guest.snapshot()
        return partial(self._make, self._saved)

    def _forget(self) -> None:
        if self._saved is not None:
            self._saved.close()
            self._saved = None
