"""The guest's registers between `CpuState` and the state block, both ways.

What emitted code can change is compared with what was handed over, so that an exit which changed little costs little.
It must not know why the TC is entered or left.
"""

from __future__ import annotations

import struct

from machine.cpu import Cpu
from machine.descriptors import IS_32
from machine.flags import AC, DF, ID, IF, IOPL, NT, STATUS_MASK, VIF, VIP
from machine.state import MASK32, CpuState, Segment
from vmm.native import stateblock
from vmm.native.stateblock import OFFSETS, SEGMENT_BYTES, StateBlock

RFLAGS_MASK = STATUS_MASK | DF  # flags of the guest that live in the host's RFLAGS
_HOST_FLAGS = 2 | IF  # the rest of RFLAGS while emitted code runs
SYSTEM_FLAGS = IOPL | NT | AC | ID | VIF | VIP
_ESP0 = 4  # offset in a 32-bit TSS
_TSS_REACH = 9  # limit of a TSS that holds ESP0 and SS0

_GENERAL = struct.Struct("<8I")
_EVERYTHING = struct.Struct("<36I")
# What emitted code may change besides the general registers: segments, IF, the system flags, CPL, CR0 to CR4.
_CHANGEABLE = slice(OFFSETS["segments"], OFFSETS["gdt_base"])


class GuestRegisters:
    """Moves the registers of one CPU.

    Attributes:
        stale: registers other than the general ones and RFLAGS may have changed since they were handed over.
    """

    def __init__(self, cpu: Cpu, block: StateBlock) -> None:
        self._cpu = cpu
        self._block = block
        self._handed_over = b""
        self.stale = True

    def hand_over(self, pending: int) -> None:
        """CPU state to state block; with `pending` not 0, what may enable interrupts or is INT n is a callout."""
        state, block = self._cpu.state, self._block
        if self.stale:
            self._hand_over_everything(state, pending)
        else:
            _GENERAL.pack_into(block.data, 0, *state.gpr)
        block.quads[stateblock.FLAGS] = state.eflags & RFLAGS_MASK | _HOST_FLAGS

    def _hand_over_everything(self, state: CpuState, pending: int) -> None:
        block, tr = self._block, state.tr
        has_stack = tr.attributes & IS_32 and tr.limit >= _TSS_REACH
        _EVERYTHING.pack_into(
            block.data,
            0,
            *state.gpr,
            *(word for segment in state.segments for word in (segment.selector, _descriptor_high(segment))),
            state.eflags & IF,
            state.eflags & SYSTEM_FLAGS,
            state.cpl,
            state.cr0,
            state.cr2,
            state.cr3,
            state.cr4,
            state.gdtr.base,
            state.gdtr.limit,
            state.idtr.base,
            state.idtr.limit,
            tr.base + _ESP0 & MASK32 if has_stack else 0,
            state.sysenter_cs,
            state.sysenter_esp,
            state.sysenter_eip,
            pending,
        )
        self._handed_over = bytes(block.data[_CHANGEABLE])
        self.stale = False

    def take_back(self) -> None:
        """State block to CPU state; CPL and CR3 must have followed the space already."""
        state, block = self._cpu.state, self._block
        state.gpr[:] = _GENERAL.unpack_from(block.data)
        flags: int = block.quads[stateblock.FLAGS] & RFLAGS_MASK
        changed = bytes(block.data[_CHANGEABLE])
        if changed == self._handed_over:
            state.eflags = state.eflags & ~RFLAGS_MASK | flags
            return
        words = block.words
        rest = state.eflags & ~(RFLAGS_MASK | IF | SYSTEM_FLAGS)
        state.eflags = rest | flags | words[stateblock.INTERRUPT_FLAG] | words[stateblock.SYSTEM_FLAGS]
        self._cpu.mmu.update_alignment()
        for number, segment in enumerate(state.segments):
            at = SEGMENT_BYTES * number
            if changed[at : at + SEGMENT_BYTES] != self._handed_over[at : at + SEGMENT_BYTES]:
                _load(segment, words[stateblock.SEGMENTS + 2 * number], words[stateblock.SEGMENTS + 2 * number + 1])
        self._handed_over = changed


def _descriptor_high(segment: Segment) -> int:
    """Bits 63:32 of a descriptor with the attributes of `segment`; base and limit are left out."""
    return (segment.attributes & 0xFF) << 8 | (segment.attributes & 0xF00) << 12


def _load(segment: Segment, selector: int, high: int) -> None:
    """Load what emitted code loaded: a null selector, or a flat segment."""
    if high:
        segment.load(selector, 0, MASK32, high >> 8 & 0xFF | high >> 12 & 0xF00)
    else:
        segment.load(selector, 0, 0, 0)
