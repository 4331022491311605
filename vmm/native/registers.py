"""The guest's registers between `CpuState` and the state block, both ways.

What emitted code can change is compared with what was handed over, so that an exit which changed little costs little.
It must not know why the TC is entered or left.
"""

from __future__ import annotations

import struct
from functools import lru_cache

from machine.cpu import Cpu
from machine.descriptors import IS_32
from machine.flags import AC, ID, IF, IOPL, NT, VIF, VIP
from machine.state import MASK32, CpuState, Segment
from vmm.native import stateblock
from vmm.native.routine import HOST_FLAGS, RFLAGS
from vmm.native.stateblock import OFFSETS, SIZES, StateBlock

SYSTEM_FLAGS = IOPL | NT | AC | ID | VIF | VIP
_ESP0 = 4  # offset in a 32-bit TSS
_TSS_REACH = 9  # limit of a TSS that holds ESP0 and SS0

Hidden = tuple[int, int, int]  # base, limit, attributes
_GENERAL = struct.Struct("<8I")
_SEGMENTS = struct.Struct("<12I6I12q")
_SYSTEM = struct.Struct("<15I")  # behind the segments
_SEGMENTS_TAKEN = 512
# What emitted code may change besides the general registers: segments, IF, the system flags, CPL, CR0 to CR4.
_CHANGEABLE = slice(OFFSETS["segments"], OFFSETS["gdt_base"])
_ALL_SEGMENTS = slice(0, OFFSETS["segment_bounds"] + SIZES["segment_bounds"] - OFFSETS["segments"])
_ALL_SEGMENTS_IN_BLOCK = slice(OFFSETS["segments"], OFFSETS["segments"] + _ALL_SEGMENTS.stop)


class GuestRegisters:
    """Moves the registers of one CPU.

    Attributes:
        stale: registers other than the general ones and RFLAGS may have changed since they were handed over.
    """

    def __init__(self, cpu: Cpu, block: StateBlock) -> None:
        self._cpu = cpu
        self._block = block
        self._handed_over = b""
        # What the segment registers were after they had been loaded from these bytes of the state block.
        self._taken: dict[bytes, tuple[int | Hidden, ...]] = {}
        self.stale = True

    def hand_over(self) -> None:
        """CPU state to state block."""
        state, block = self._cpu.state, self._block
        if self.stale:
            self._hand_over_everything(state)
        else:
            _GENERAL.pack_into(block.data, 0, *state.gpr)
        block.quads[stateblock.FLAGS] = state.eflags & RFLAGS | HOST_FLAGS

    def _hand_over_everything(self, state: CpuState) -> None:
        block, tr = self._block, state.tr
        _GENERAL.pack_into(block.data, 0, *state.gpr)
        block.data[_ALL_SEGMENTS_IN_BLOCK] = _segments_of(_loaded(state))
        has_stack = tr.attributes & IS_32 and tr.limit >= _TSS_REACH
        gdtr, idtr = state.gdtr, state.idtr
        _SYSTEM.pack_into(
            block.data,
            _ALL_SEGMENTS_IN_BLOCK.stop,
            state.eflags & IF,
            state.eflags & SYSTEM_FLAGS,
            state.cpl,
            state.cr0,
            state.cr2,
            state.cr3,
            state.cr4,
            gdtr.base,
            gdtr.limit,
            idtr.base,
            idtr.limit,
            tr.base + _ESP0 & MASK32 if has_stack else 0,
            state.sysenter_cs,
            state.sysenter_esp,
            state.sysenter_eip,
        )
        self._handed_over = bytes(block.data[_CHANGEABLE])
        self.stale = False

    def take_back(self) -> None:
        """State block to CPU state; CPL and CR3 must have followed the space already."""
        state, block = self._cpu.state, self._block
        state.gpr[:] = _GENERAL.unpack_from(block.data)
        flags: int = block.quads[stateblock.FLAGS] & RFLAGS
        changed = bytes(block.data[_CHANGEABLE])
        if changed == self._handed_over:
            state.eflags = state.eflags & ~RFLAGS | flags
            return
        words = block.words
        rest = state.eflags & ~(RFLAGS | IF | SYSTEM_FLAGS)
        state.eflags = rest | flags | words[stateblock.INTERRUPT_FLAG] | words[stateblock.SYSTEM_FLAGS]
        state.cr0, state.cr2 = words[stateblock.CR0], words[stateblock.CR2]
        self._cpu.mmu.update_alignment()
        segments = changed[_ALL_SEGMENTS]
        if segments != self._handed_over[_ALL_SEGMENTS] and self._taken.get(segments) != _loaded(state):
            for number, segment in enumerate(state.segments):
                selector, high = words[stateblock.SEGMENTS + 2 * number], words[stateblock.SEGMENTS + 2 * number + 1]
                base = words[stateblock.SEGMENT_BASES + number]
                _load(segment, selector, high, base, block.quads[stateblock.SEGMENT_BOUNDS + 2 * number])
            if len(self._taken) >= _SEGMENTS_TAKEN:
                self._taken.clear()
            self._taken[segments] = _loaded(state)
        self._handed_over = changed


def _loaded(state: CpuState) -> tuple[int | Hidden, ...]:
    """What all six segment registers hold."""
    es, cs, ss, ds, fs, gs = state.segments
    return (
        *(es.selector, cs.selector, ss.selector, ds.selector, fs.selector, gs.selector),
        *(es.hidden, cs.hidden, ss.hidden, ds.hidden, fs.hidden, gs.hidden),
    )


@lru_cache(maxsize=512)
def _segments_of(loaded: tuple[int | Hidden, ...]) -> bytes:
    """What the state block says of all six segment registers, of which `_loaded` tells."""
    selectors = [each for each in loaded if isinstance(each, int)]
    parts = [_hidden_parts(each) for each in loaded if not isinstance(each, int)]
    return _SEGMENTS.pack(
        *(word for selector, part in zip(selectors, parts, strict=True) for word in (selector, part[0])),
        *(part[1] for part in parts),
        *(bound for part in parts for bound in part[2:]),
    )


@lru_cache(maxsize=512)
def _hidden_parts(hidden: Hidden) -> tuple[int, int, int, int]:
    """What the state block says of a segment besides its selector: see `segments`, `segment_bases`, `segment_bounds`.

    Bits 63:32 are of a descriptor with its attributes; base and limit are left out of them.
    """
    segment = Segment()
    segment.load(0, *hidden)
    base, limit, attributes = hidden
    high = (attributes & 0xFF) << 8 | (attributes & 0xF00) << 12
    return high, base, 0 if segment.read_low else -1 - limit, 0 if segment.write_low else -1 - limit


def _load(segment: Segment, selector: int, high: int, base: int, bound: int) -> None:
    """Load what emitted code loaded, if it did; it never loads what cannot be read from offset 0 on, but null."""
    attributes = high >> 8 & 0xFF | high >> 12 & 0xF00
    if bound:
        limit = -1 - bound
        if segment.selector != selector or segment.hidden != (base, limit, attributes):
            segment.load(selector, base, limit, attributes)
    elif segment.selector != selector or (not high and attributes != segment.attributes):
        segment.load(selector, 0, 0, 0)
