"""Which engine a test that names none runs on: all in turn, if it uses the fixture `each_engine`.

Whoever starts a machine asks here, in this process (`make`, `factories`) or by the command line (`words`); why a test
does or does not run on all is the test's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import pytest

from machine.cpu import Cpu
from machine.debug import DebugControl
from machine.engine import Engine
from machine.pc import EngineFactory, Machine
from vmm.bt import BinaryTranslator
from vmm.interp import Interpreter
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


MAKERS: Mapping[str, Callable[[Cpu, DebugControl], Engine]] = {
    "interp": Interpreter,
    "bt": verified,
    "trap": trap,
    "trap nested": trap_nested,
}
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
    return {name: _factory(name) for name in MAKERS}


def _factory(name: str) -> EngineFactory:
    def factory(machine: Machine) -> Engine:
        return MAKERS[name](machine.cpu, machine.debug)

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
