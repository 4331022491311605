"""System instructions under `bt` against `interp`: in both rings, plain and not plain, with interrupts in between."""

from __future__ import annotations

import pytest

from tests.vmm.bare import Bare
from tests.vmm.rings import install
from tests.vmm.twins import Twins

pytestmark = pytest.mark.usefixtures("least_budget")


class Timer:
    """A device on port 50h: a write asks for interrupt 20h, so many nanoseconds later."""

    def __init__(self, bare: Bare) -> None:
        self.bare = bare
        bare.lines.acknowledge = self.acknowledge
        bare.ports.register(0x50, 0x50, self)

    def acknowledge(self) -> int:
        self.bare.lines.set_intr(False)
        return 0x20

    def raise_intr(self) -> None:
        self.bare.lines.set_intr(True)

    def load_port(self, _port: int, _size_bytes: int) -> int:
        return 0

    def store_port(self, _port: int, _size_bytes: int, value: int) -> None:
        self.bare.clock.schedule(self.bare.clock.now_ns + value, self.raise_intr)


def prepared(seed: int) -> Twins:
    def prepare(bare: Bare) -> None:
        Timer(bare)
        install(bare, seed)

    return Twins("nop", prepare)


@pytest.mark.parametrize("seed", range(30))
def test_random_slots(seed: int) -> None:
    with prepared(seed) as twins:
        twins.run(1500, (211, 1, 40, 7))
