"""Modes: what a fragment is translated for, besides its bytes. The same bytes in another mode are other fragments.

It must not know how anything is translated; a CPU state that no emitted code stands for has no mode.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from machine.cpu import Cpu
from machine.flags import VM
from machine.state import CR0_PE, CS, DS, ES, MASK32, SEG_CODE, SEG_READ_WRITE, SS, Segment

FLAT_SEGMENTS = 1 << ES | 1 << CS | 1 << SS | 1 << DS

MAX_SMALL_LIMIT = 0x7FFF_FFFE  # of CS, if it is not 4 GiB: a constant in emitted code
_READABLE_CODE = SEG_CODE | SEG_READ_WRITE
_MAX_SIGNATURES = 512
_Hidden = tuple[int, int, int]
_Signature = tuple[_Hidden, _Hidden, _Hidden, _Hidden, int, int]


@dataclass(frozen=True, slots=True)
class Mode:
    """One mode. The plain ones are 32-bit protected-mode code with CS, SS, DS and ES of base 0 and limit 4 GiB.

    Attributes:
        user: CPL is 3; else it is 0.
        flat: a bit for each segment register with base 0, limit 4 GiB and all rights that its accesses may need, as
            long as code runs in this mode. What others are is looked up as code runs.
        code_base: of CS.
        code_limit: the highest EIP; of 16-bit code 0xFFFF at most.
        is_narrow: CS.D is 0: 16-bit code.
        has_narrow_stack: SS.B is 0: the stack pointer is SP.
        is_real: selectors are paragraphs: real mode, or virtual-8086 mode with `user`.
    """

    user: bool
    flat: int = FLAT_SEGMENTS
    code_base: int = 0
    code_limit: int = MASK32
    is_narrow: bool = False
    has_narrow_stack: bool = False
    is_real: bool = False

    def is_flat(self, segment: int) -> bool:
        """Whether offsets in a segment, by its number, are linear addresses without any check."""
        return bool(self.flat >> segment & 1)

    def linear(self, eip: int) -> int:
        """The linear address of code."""
        return self.code_base + eip & MASK32

    @property
    def is_plain(self) -> bool:
        """Whether it is one of the two that have the class's defaults."""
        return self.flat == FLAT_SEGMENTS and not (self.is_narrow or self.has_narrow_stack)

    @property
    def is_v86(self) -> bool:
        """Whether it is virtual-8086 mode."""
        return self.is_real and self.user


class Modes:
    """Finds the mode that the CPU is in, with one look-up for a state that was met before."""

    def __init__(self, cpu: Cpu) -> None:
        self._cpu = cpu
        self._known: dict[_Signature, Mode | None] = {}
        self._interned: dict[Mode, Mode] = {}
        self._at_zero: dict[Mode, Mode] = {}

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

    def at_zero(self, mode: Mode) -> Mode:
        """The mode that differs in the base of CS alone, which is 0."""
        found = self._at_zero.get(mode)
        if found is None:
            if len(self._at_zero) >= _MAX_SIGNATURES:
                self._at_zero.clear()
            found = self._at_zero[mode] = replace(mode, code_base=0)
        return found

    def _intern(self, mode: Mode) -> Mode:
        if len(self._interned) >= _MAX_SIGNATURES:
            self._interned.clear()
        return self._interned.setdefault(mode, mode)

    def _classify(self) -> Mode | None:
        state = self._cpu.state
        if state.cpl not in (0, 3):
            return None
        is_real = not state.cr0 & CR0_PE or bool(state.eflags & VM)
        cs = state.segments[CS]
        is_narrow = not cs.big
        code_limit = min(cs.limit, 0xFFFF) if is_narrow else cs.limit
        if MAX_SMALL_LIMIT < code_limit < MASK32:
            return None
        return self._intern(
            Mode(
                user=state.cpl == 3,
                flat=0 if is_real else self._flat(),
                code_base=cs.base,
                code_limit=code_limit,
                is_narrow=is_narrow,
                has_narrow_stack=not state.segments[SS].big,
                is_real=is_real,
            )
        )

    def _flat(self) -> int:
        """See `Mode.flat`: CS has to be readable, the others writable; FS and GS are loaded too often to count."""
        segments = self._cpu.state.segments
        cs = segments[CS]
        flat = 1 << CS if cs.hidden[:2] == (0, MASK32) and cs.attributes & _READABLE_CODE == _READABLE_CODE else 0
        for number in (ES, SS, DS):
            if is_flat_data(segments[number]):
                flat |= 1 << number
        return flat


def is_flat_data(segment: Segment) -> bool:
    """Whether all of the 4 GiB can be read and written at their own addresses."""
    return not segment.base and not segment.write_low and segment.write_high == MASK32
