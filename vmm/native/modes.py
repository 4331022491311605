"""Modes: what a fragment is translated for, besides its bytes. The same bytes in another mode are other fragments.

It must not know how anything is translated; a CPU state that no emitted code stands for has no mode.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from machine.cpu import Cpu
from machine.flags import VM
from machine.state import CR0_PE, CS, DS, ES, MASK32, SEG_CODE, SEG_DB, SEG_READ_WRITE, SS, Segment

FLAT_SEGMENTS = 1 << ES | 1 << CS | 1 << SS | 1 << DS

_MAX_SIGNATURES = 512
_Hidden = tuple[int, int, int]
_Signature = tuple[_Hidden, _Hidden, _Hidden, _Hidden, int, int]


@dataclass(frozen=True, slots=True)
class Mode:
    """One mode: 32-bit protected-mode code; CS, SS, DS and ES have base 0 and limit 4 GiB.

    Attributes:
        user: CPL is 3; else it is 0.
        flat: a bit for each segment register with base 0, limit 4 GiB and all rights that its accesses may need, as
            long as code runs in this mode. What others are is looked up as code runs.
    """

    user: bool
    flat: int = FLAT_SEGMENTS

    def is_flat(self, segment: int) -> bool:
        """Whether offsets in a segment, by its number, are linear addresses without any check."""
        return bool(self.flat >> segment & 1)


class Modes:
    """Finds the mode that the CPU is in, with one look-up for a state that was met before."""

    def __init__(self, cpu: Cpu) -> None:
        self._cpu = cpu
        self._known: dict[_Signature, Mode | None] = {}
        self._interned: dict[Mode, Mode] = {}

    def current(self) -> Mode | None:
        """The mode of the CPU's state; None if emitted code cannot stand for it."""
        state = self._cpu.state
        if self._cpu.mmu.aligned_only:
            return None
        segments = state.segments
        signature = (
            segments[CS].hidden,
            segments[SS].hidden,
            segments[DS].hidden,
            segments[ES].hidden,
            state.cpl,
            state.cr0 & CR0_PE | state.eflags & VM,
        )
        try:
            return self._known[signature]
        except KeyError:
            if len(self._known) >= _MAX_SIGNATURES:
                self._known.clear()
            mode = self._known[signature] = self._classify()
            return mode

    def with_privilege(self, mode: Mode, *, user: bool) -> Mode:
        """The mode that differs in the privilege alone."""
        return self._intern(replace(mode, user=user)) if mode.user != user else mode

    def _intern(self, mode: Mode) -> Mode:
        return self._interned.setdefault(mode, mode)

    def _classify(self) -> Mode | None:
        state = self._cpu.state
        if not state.cr0 & CR0_PE or state.eflags & VM or state.cpl not in (0, 3):
            return None
        cs, stack = state.segments[CS], state.segments[SS]
        readable = SEG_CODE | SEG_READ_WRITE
        if cs.base or cs.limit != MASK32 or not cs.attributes & SEG_DB or cs.attributes & readable != readable:
            return None
        if not stack.attributes & SEG_DB or not all(map(is_flat_data, (stack, state.segments[DS], state.segments[ES]))):
            return None
        return self._intern(Mode(user=state.cpl == 3))


def is_flat_data(segment: Segment) -> bool:
    """Whether all of the 4 GiB can be read and written at their own addresses."""
    return not segment.base and not segment.write_low and segment.write_high == MASK32
