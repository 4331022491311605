"""Where emitted code meets exceptions of the guest's: learned by Python, known to emitted code, which delivers them.

It owns the table of sites in the state block, and the counts that lead there. It must not know what a fault means.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from machine.state import MASK32
from vmm.native.adaptation import SITE_FAULTS
from vmm.native.faultroutine import site_index
from vmm.native.fragments import Fragment
from vmm.native.stateblock import DELIVERIES, SITE_BYTES, SITES_AT, StateBlock

_VECTORS = 32
_COUNTED = 4096


@dataclass(slots=True)
class FaultSites:
    """The sites of one translation cache, which forgets them when it is emptied.

    Attributes:
        counters: of sites that were entered, and of exceptions that were delivered without an exit.
    """

    block: StateBlock
    counters: dict[str, int] = field(default_factory=lambda: {"fault sites": 0, "faults delivered in the TC": 0})
    _faults: dict[int, int] = field(default_factory=dict)  # by offset of the host instruction

    def fault(self, fragment: Fragment, at: int, index: int) -> None:
        """The host instruction at offset `at`, of a fragment's instruction `index`, raised an exception of the guest's.

        What needs more than a refund and ESP set right stays Python's: x87 pointers, and what holds events off.
        """
        unit = fragment.unit
        if unit.spans or index in unit.shadows:
            return
        if len(self._faults) >= _COUNTED:
            self._faults.clear()
        count = self._faults[at] = self._faults.get(at, 0) + 1
        if count < SITE_FAULTS:
            return
        del self._faults[at]
        first = SITES_AT + site_index(at) * SITE_BYTES // 4
        site = at, unit.eips[index], unit.charged - index - 1, unit.stack_offsets.get(index, 0) & MASK32
        for number, value in enumerate(site):
            self.block.words[first + number] = value
        self.counters["fault sites"] += 1

    def take_deliveries(self, exceptions: dict[int, int]) -> None:
        """Add to `exceptions`, by vector, what was delivered since it was last asked."""
        words = self.block.words
        for vector in range(_VECTORS):
            count = words[DELIVERIES + vector]
            if count:
                words[DELIVERIES + vector] = 0
                exceptions[vector] = exceptions.get(vector, 0) + count
                self.counters["faults delivered in the TC"] += count
