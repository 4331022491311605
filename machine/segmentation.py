"""Loads of segment registers, LDTR and TR outside of control transfers, and the instructions that only look.

It owns the checks of MOV Sreg, POP Sreg, LxS, LLDT, LTR, LAR, LSL, VERR, VERW; it must not know how they are encoded.

Source: SDM Vol. 2, those instructions; Vol. 3A, "Protection"; Vol. 3B, "8086 Emulation".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from machine.descriptors import (
    BUSY,
    CALL_GATE16,
    CALL_GATE32,
    LDT,
    RPL,
    SELECTOR_INDEX,
    TASK_GATE,
    TSS16,
    TSS16_BUSY,
    TSS32,
    TSS32_BUSY,
    Descriptor,
    check_accessed,
    mark_accessed,
    read_descriptor,
    set_busy,
)
from machine.faults import TI, general_protection, invalid_opcode, not_present, stack_fault
from machine.flags import VM
from machine.state import CR0_PE, CS, SEG_AVL, SEG_DB, SEG_G, SEG_PRESENT, SS, Segment

if TYPE_CHECKING:
    from machine.cpu import Cpu

REAL_ATTRIBUTES: Final = 0x93  # present, writable data, accessed
V86_ATTRIBUTES: Final = 0xF3  # the same with DPL 3
# Bits 19:16 are undefined in the SDM; the processors measured (AMD) give those of the descriptor, as the APM says.
_LAR_MASK: Final = 0x00FF_FF00

_LSL_TYPES: Final = frozenset((TSS16, LDT, TSS16_BUSY, TSS32, TSS32_BUSY))
_LAR_TYPES: Final = _LSL_TYPES | {CALL_GATE16, TASK_GATE, CALL_GATE32}


def load_segment(cpu: Cpu, register: int, selector: int) -> None:
    """MOV Sreg, POP Sreg, LxS: load ES, SS, DS, FS or GS in the mode that the CPU is in.

    Args:
        cpu: its CPL, mode and tables decide.
        register: `machine.state.ES` to `GS`.
        selector: 16 bits; higher ones are dropped.

    Raises:
        GuestFault: #GP, #SS or #NP with the selector, #GP(0) for a null SS; #UD for CS.
    """
    state = cpu.state
    selector &= 0xFFFF
    if register == CS:
        raise invalid_opcode()
    segment = state.segments[register]
    if not state.cr0 & CR0_PE:
        load_real_data(segment, selector)
    elif state.eflags & VM:
        load_v86(segment, selector)
    elif register == SS:
        load_descriptor(cpu, segment, selector, _stack_descriptor(cpu, selector))
    elif not selector & SELECTOR_INDEX:
        load_null(segment, selector)
    else:
        load_descriptor(cpu, segment, selector, _data_descriptor(cpu, selector))


def load_real_data(segment: Segment, selector: int) -> None:
    """Load a data segment in real mode: limit and attributes stay as they are ("unreal mode").

    A register that was null in protected mode becomes an ordinary 64 KiB segment.
    """
    if segment.attributes & SEG_PRESENT:
        segment.load(selector, selector << 4, segment.limit, segment.attributes)
    else:
        segment.load(selector, selector << 4, 0xFFFF, REAL_ATTRIBUTES)


def load_real_code(segment: Segment, selector: int) -> None:
    """Load CS in real mode: writable too; limit, D and G stay as they are."""
    kept = segment.attributes & (SEG_DB | SEG_G | SEG_AVL)
    segment.load(selector, selector << 4, segment.limit, kept | REAL_ATTRIBUTES)


def load_v86(segment: Segment, selector: int) -> None:
    """Load any segment register in virtual-8086 mode."""
    segment.load(selector, selector << 4, 0xFFFF, V86_ATTRIBUTES)


def load_null(segment: Segment, selector: int) -> None:
    """Make a data segment unusable."""
    segment.load(selector, 0, 0, 0)


def load_descriptor(cpu: Cpu, segment: Segment, selector: int, descriptor: Descriptor) -> None:
    """Load a register from a descriptor that passed its checks; sets the accessed bit, which may raise a PageFault."""
    mark_accessed(cpu, descriptor)
    segment.load(selector, descriptor.base, descriptor.limit, descriptor.attributes)


def _stack_descriptor(cpu: Cpu, selector: int) -> Descriptor:
    if not selector & SELECTOR_INDEX:
        raise general_protection(0)
    code = selector & SELECTOR_INDEX
    descriptor = read_descriptor(cpu, selector)
    cpl = cpu.state.cpl
    if descriptor is None or selector & RPL != cpl or not descriptor.is_writable or descriptor.dpl != cpl:
        raise general_protection(code)
    if not descriptor.present:
        raise stack_fault(code)
    check_accessed(cpu, descriptor)
    return descriptor


def _data_descriptor(cpu: Cpu, selector: int) -> Descriptor:
    code = selector & SELECTOR_INDEX
    descriptor = read_descriptor(cpu, selector)
    if descriptor is None or not descriptor.is_readable or not _is_visible(cpu, selector, descriptor):
        raise general_protection(code)
    if not descriptor.present:
        raise not_present(code)
    check_accessed(cpu, descriptor)
    return descriptor


def _is_visible(cpu: Cpu, selector: int, descriptor: Descriptor) -> bool:
    """CPL and RPL allow the use of a descriptor as data."""
    if descriptor.is_conforming:
        return True
    return descriptor.dpl >= cpu.state.cpl and descriptor.dpl >= selector & RPL


def load_ldt(cpu: Cpu, selector: int) -> None:
    """LLDT, in protected mode.

    Raises:
        GuestFault: #GP(0) above CPL 0; #GP or #NP with the selector.
    """
    if cpu.state.cpl:
        raise general_protection(0)
    selector &= 0xFFFF
    code = selector & SELECTOR_INDEX
    if not code:
        load_null(cpu.state.ldtr, selector)
        return
    descriptor = None if selector & TI else read_descriptor(cpu, selector)
    if descriptor is None or descriptor.system_type != LDT:
        raise general_protection(code)
    if not descriptor.present:
        raise not_present(code)
    cpu.state.ldtr.load(selector, descriptor.base, descriptor.limit, descriptor.attributes)


def load_task_register(cpu: Cpu, selector: int) -> None:
    """LTR, in protected mode: the TSS must be available and becomes busy.

    Raises:
        GuestFault: #GP(0) above CPL 0 or for a null selector; #GP or #NP with the selector.
    """
    if cpu.state.cpl:
        raise general_protection(0)
    selector &= 0xFFFF
    code = selector & SELECTOR_INDEX
    if not code:
        raise general_protection(0)
    descriptor = None if selector & TI else read_descriptor(cpu, selector)
    if descriptor is None or descriptor.system_type not in (TSS16, TSS32):
        raise general_protection(code)
    if not descriptor.present:
        raise not_present(code)
    set_busy(cpu, descriptor.linear, busy=True)
    cpu.state.tr.load(selector, descriptor.base, descriptor.limit, descriptor.attributes | BUSY)


def _look_up(cpu: Cpu, selector: int) -> Descriptor | None:
    if not selector & SELECTOR_INDEX:
        return None
    descriptor = read_descriptor(cpu, selector)
    return descriptor if descriptor and _is_visible(cpu, selector, descriptor) else None


def access_rights(cpu: Cpu, selector: int) -> int | None:
    """LAR: the second doubleword under 00FFFF00h (a 16-bit destination takes FF00h of it); None: ZF is cleared."""
    descriptor = _look_up(cpu, selector & 0xFFFF)
    if descriptor is None or (descriptor.system_type >= 0 and descriptor.system_type not in _LAR_TYPES):
        return None
    return descriptor.high & _LAR_MASK


def segment_limit(cpu: Cpu, selector: int) -> int | None:
    """LSL: the limit in bytes; None: ZF is cleared."""
    descriptor = _look_up(cpu, selector & 0xFFFF)
    if descriptor is None or (descriptor.system_type >= 0 and descriptor.system_type not in _LSL_TYPES):
        return None
    return descriptor.limit


def verify(cpu: Cpu, selector: int, write: bool) -> bool:
    """VERR, or VERW with `write`: the value of ZF."""
    descriptor = _look_up(cpu, selector & 0xFFFF)
    if descriptor is None:
        return False
    return descriptor.is_writable if write else descriptor.is_readable
