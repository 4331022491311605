"""Which engine a test that names none runs on: all in turn, if it uses the fixture `each_engine`.

Whoever starts a machine asks here, in this process (`make`, `factories`) or by the command line (`words`); why a test
does or does not run on all is the test's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from random import Random

import pytest

from machine.cpu import Cpu
from machine.debug import DebugControl
from machine.engine import Engine
from machine.pc import EngineFactory, Machine
from vmm.bt import BinaryTranslator
from vmm.hybrid import BT, TRAP, HybridEngine
from vmm.interp import Interpreter
from vmm.phases import Chooser, Cost
from vmm.trap.engine import TrapEngine


def verified(cpu: Cpu, debug: DebugControl) -> BinaryTranslator:
    """`bt` that proves what it emits before it may run."""
    return BinaryTranslator(cpu, debug, verify=True)


def trap(cpu: Cpu, debug: DebugControl) -> TrapEngine:
    """`trap` with shadow paging, verified as `bt` is."""
    return TrapEngine(cpu, debug, verify=True)


def trap_nested(cpu: Cpu, debug: DebugControl) -> TrapEngine:
    """`trap nested`, verified as `bt` is."""
    return TrapEngine(cpu, debug, nested=True, verify=True)


class Restless(Chooser):
    """Changes engines all the time, after one to some thousand instructions, the same way on every run."""

    def __init__(self, icount: int, longest_insns: int) -> None:
        super().__init__(BT, TRAP, icount)
        self._chance = Random(1)
        self._longest_insns = longest_insns
        self.judge(Cost())

    def judge(self, cost: Cost) -> bool:
        """Always the other one; as often a few instructions as many."""
        self.phase.cost += cost
        self.stretch_insns = int(self._longest_insns ** self._chance.random())
        self._switch("it always does")
        return True


def restless(cpu: Cpu, debug: DebugControl, *, longest_insns: int = 4000) -> HybridEngine:
    """`hybrid` that changes engines all the time, verified as `bt` is."""
    return HybridEngine(cpu, debug, verify=True, chooser=Restless(cpu.clock.icount, longest_insns))


MAKERS: Mapping[str, Callable[[Cpu, DebugControl], Engine]] = {
    "interp": Interpreter,
    "bt": verified,
    "trap": trap,
    "trap nested": trap_nested,
}
# Besides, what is for tests that switch engines: a test of one engine has both of hybrid's already.
_ALL_MAKERS = {**MAKERS, "hybrid": restless}
_WORDS = {"trap nested": ["--vmm", "trap", "--paging", "nested"]}
REFERENCE = "interp"

_chosen: list[str] = []


def chosen() -> str:
    """The name of the engine for whoever has no wish, in this process."""
    return _chosen[-1] if _chosen else REFERENCE


def words() -> list[str]:
    """What to add to a command line of `trapgate`: the engine, if one is chosen, and proof of what `bt` emits."""
    return [*(_WORDS.get(_chosen[-1], ["--vmm", _chosen[-1]]) if _chosen else []), "--verify-tc"]


def make(cpu: Cpu, debug: DebugControl) -> Engine:
    """An engine of the chosen kind."""
    return MAKERS[chosen()](cpu, debug)


def other() -> Callable[[Cpu, DebugControl], Engine]:
    """What makes the engine that is compared with the reference: the chosen one, else `bt`."""
    return MAKERS[chosen()] if chosen() != REFERENCE else verified


def factories() -> dict[str, EngineFactory]:
    """All engines, as `Machine` wants them."""
    return {name: _factory(name) for name in _ALL_MAKERS}


def _factory(name: str) -> EngineFactory:
    def factory(machine: Machine) -> Engine:
        return _ALL_MAKERS[name](machine.cpu, machine.debug)

    return factory


@contextmanager
def choice(name: str) -> Iterator[None]:
    """The engine for whoever has no wish, for a while."""
    _chosen.append(name)
    try:
        yield
    finally:
        _chosen.remove(name)


@pytest.fixture(params=MAKERS)
def each_engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test on every engine; returns its name."""
    name: str = request.param
    with choice(name):
        yield name
