"""Back to an instruction boundary: what a signal has to undo of the instruction in whose middle it came.

It works on the state block alone. It must not know why the signal came.
"""

from __future__ import annotations

from machine.state import MASK32, SHADOW_NONE, Gpr
from vmm.native import stateblock
from vmm.native.fragments import Fragment
from vmm.native.stateblock import StateBlock


def leave_fragment(fragment: Fragment, index: int, block: StateBlock) -> int:
    """Before instruction `index` of a fragment, or the first for -1; returns its guest address."""
    unit = fragment.unit
    retired = max(index, 0)
    block.quads[stateblock.BUDGET] += unit.charged - retired
    block.words[stateblock.SHADOW] = unit.shadows.get(index, SHADOW_NONE)
    block.words[Gpr.ESP] = block.words[Gpr.ESP] + unit.stack_offsets.get(index, 0) & MASK32
    return unit.eips[retired]
