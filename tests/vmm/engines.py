"""The engines that a test runs on, and fixtures that make bare guests on each of them.

`bt-each` has a fragment for every instruction and enters it with any budget, so that guests of a few instructions run
as emitted code too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import pytest

from tests.engine import MAKERS, REFERENCE, choice, trap, trap_nested, verified
from tests.vmm import bare
from tests.vmm.bare import Bare, EngineMaker
from vmm.interp import Interpreter

Make = Callable[[str], Bare]


@dataclass(frozen=True, slots=True)
class Variant:
    """An engine with settings.

    Attributes:
        name: the id of the test.
        make: makes the engine.
        settings: attributes of modules to be patched, by dotted name.
    """

    name: str
    make: EngineMaker
    settings: Mapping[str, int] = field(default_factory=dict)

    def set_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Patch what the variant says."""
        for name, value in self.settings.items():
            monkeypatch.setattr(name, value)


_EACH = {"vmm.bt.MIN_BUDGET_INSNS": 1, "vmm.native.translator.MAX_TU_INSTRUCTIONS": 1}
INTERP = Variant("interp", Interpreter)
BT = Variant("bt", verified)
BT_EACH = Variant(
    "bt-each",
    verified,
    _EACH,
)
TRAP_EACH = Variant("trap-each", trap, _EACH)
TRAP_NESTED_EACH = Variant("trap-nested-each", trap_nested, _EACH)


@pytest.fixture(params=[INTERP, BT, BT_EACH, TRAP_EACH, TRAP_NESTED_EACH], ids=lambda variant: variant.name)
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Variant:
    """Each engine in turn."""
    chosen: Variant = request.param
    chosen.set_up(monkeypatch)
    return chosen


@pytest.fixture
def flat(variant: Variant) -> Iterator[Make]:
    """`bare.flat` on the engine; the guests are closed at the end."""
    yield from _maker(bare.flat, variant.make)


@pytest.fixture
def real(variant: Variant) -> Iterator[Make]:
    """`bare.real` on the engine."""
    yield from _maker(bare.real, variant.make)


def _maker(make_guest: Callable[[str, EngineMaker], Bare], make_engine: EngineMaker) -> Iterator[Make]:
    made: list[Bare] = []

    def make(source: str) -> Bare:
        made.append(make_guest(source, make_engine))
        return made[-1]

    yield make
    for each in made:
        each.close()


OTHERS = tuple(name for name in MAKERS if name != REFERENCE)


@pytest.fixture(params=OTHERS)
def other_engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each engine with emitted code in turn is what `Twins` compares with the reference; returns its name."""
    name: str = request.param
    with choice(name):
        yield name


_BT = ("budget-32", "budget-1")


@pytest.fixture(params=[*_BT, "trap", "trap nested"])
def native_core(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`bt` that enters emitted code with its usual least budget, and with any, and `trap` with any."""
    name: str = request.param
    monkeypatch.setattr("vmm.bt.MIN_BUDGET_INSNS", 32 if name == "budget-32" else 1)
    with choice("bt" if name in _BT else name):
        yield


bt_alone = pytest.mark.parametrize("native_core", _BT, indirect=True)
"""For tests of what `trap` leaves out: in-TC emulation and adaptation."""
