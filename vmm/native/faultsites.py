"""Where emitted code meets exceptions of the guest's: learned by Python, known to emitted code, which delivers them.

It owns the table of sites in the state block, and the counts that lead there. It must not know what a fault means.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vmm.native.adaptation import SITE_FAULTS, SOFT_FAULTS
from vmm.native.faultroutine import site, site_index
from vmm.native.fragments import Fragment
from vmm.native.stateblock import DELIVERIES, SITE_BYTES, SITES_AT, VECTORS, StateBlock

_COUNTED = 4096
MOST = 0x7FFF_FFFF


@dataclass(slots=True)
class FaultSites:
    """The sites of one translation cache, which forgets them when it is emptied.

    Attributes:
        counters: of sites that were entered, and of exceptions that were delivered without an exit.
    """

    block: StateBlock
    counters: dict[str, int] = field(default_factory=lambda: {"fault sites": 0, "faults delivered in the TC": 0})
    _faults: dict[int, int] = field(default_factory=dict)  # by offset of the host instruction

    def fault(self, fragment: Fragment, at: int, index: int, most: int = MOST) -> bool:
        """An exception of the guest's was raised at offset `at` of the TC, by instruction `index` of a fragment.

        What needs more than a refund and ESP set right stays Python's: x87 pointers, and what holds events off.

        Args:
            fragment: the fragment.
            at: where its code, or a routine that it called, was to go on.
            index: the number of the instruction.
            most: how many exceptions are delivered there before Python is asked again.

        Returns:
            Whether a soft form would pay: that many were delivered, from when on there is no limit, or a known place
            has come to Python time and again, as where an access may have begun in the page before.
        """
        unit = fragment.unit
        if unit.spans or index in unit.shadows:
            return False
        words, first = self.block.words, SITES_AT + site_index(at) * SITE_BYTES // 4
        is_known = words[first] == at and words[first + 1] == unit.eips[index]
        if len(self._faults) >= _COUNTED:
            self._faults.clear()
        count = self._faults[at] = self._faults.get(at, 0) + 1
        if not is_known:
            if count < SITE_FAULTS:
                return False
            self._faults[at] = 0
            self.counters["fault sites"] += 1
        is_used_up = is_known and bool(words[first + 3] >> 31)
        if not is_known or is_used_up:
            refund_insns, esp = unit.charged - index - 1, unit.stack_offsets.get(index, 0)
            values = site(at, unit.eips[index], refund_insns, esp, MOST if is_known else most)
            for number, value in enumerate(values):
                words[first + number] = value
        return is_used_up or (is_known and count >= SOFT_FAULTS)

    def take_deliveries(self, exceptions: dict[int, int]) -> None:
        """Add to `exceptions`, by vector, what was delivered since it was last asked."""
        words = self.block.words
        for vector in range(VECTORS):
            count = words[DELIVERIES + vector]
            if count:
                words[DELIVERIES + vector] = 0
                exceptions[vector] = exceptions.get(vector, 0) + count
                self.counters["faults delivered in the TC"] += count
