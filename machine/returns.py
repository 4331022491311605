"""Far RET and IRET in all modes: to the same level, to an outer one, to virtual-8086 mode, to the previous task.

It owns the checks of privilege on the way out, and which flags IRET may change; it must not know who called.

Source: SDM Vol. 2, "RET" and "IRET/IRETD"; Vol. 3B, "8086 Emulation" for virtual-mode extensions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from machine.descriptors import (
    RPL,
    SELECTOR_INDEX,
    TSS16_BUSY,
    TSS32_BUSY,
    Descriptor,
    check_accessed,
    mark_accessed,
    read_descriptor,
)
from machine.faults import TI, GuestFault, general_protection, invalid_tss, not_present, stack_fault
from machine.flags import (
    AC,
    ALWAYS_SET,
    DEFINED_MASK,
    DF,
    ID,
    IF,
    IOPL,
    IOPL_BIT,
    NT,
    RF,
    STATUS_MASK,
    TF,
    VIF,
    VIP,
    VM,
)
from machine.frames import check_within, peek
from machine.segmentation import load_null, load_real_code, load_v86
from machine.state import (
    CR0_PE,
    CR4_VME,
    CS,
    DS,
    ES,
    ESP,
    FS,
    GS,
    SEG_CODE,
    SEG_CONFORMING_EXPAND_DOWN,
    SEG_S,
    SS,
)
from machine.tasks import LINK, SwitchKind, check_virtual_interrupt, switch_task

if TYPE_CHECKING:
    from machine.cpu import Cpu

_ALWAYS: Final = STATUS_MASK | TF | DF | NT  # what any IRET loads
_WIDE: Final = RF | AC | ID  # with a 32-bit operand


def far_return(cpu: Cpu, operand_bytes: int, release_bytes: int) -> None:
    """RETF, RETF imm16.

    Args:
        cpu: ESP and EIP are set last.
        operand_bytes: 2 or 4.
        release_bytes: taken off the stack after the return address, and off the outer stack.

    Raises:
        GuestFault: #GP, #NP, #SS, #PF with nothing changed.
    """
    state = cpu.state
    eip, selector = peek(cpu, 2, operand_bytes)
    selector &= 0xFFFF
    esp = state.gpr[ESP]
    if not state.cr0 & CR0_PE or state.eflags & VM:
        _return_paragraph(cpu, selector, eip)
        cpu.set_esp(esp + 2 * operand_bytes + release_bytes)
        state.eip = eip
        return
    descriptor = _return_code(cpu, selector)
    if selector & RPL == state.cpl:
        _check_eip(descriptor, eip)
        check_accessed(cpu, descriptor)
        _load(cpu, CS, selector, descriptor)
        cpu.set_esp(esp + 2 * operand_bytes + release_bytes)
    else:
        skip = 2 * operand_bytes + release_bytes
        new_esp, stack_selector = peek(cpu, 2, operand_bytes, skip)
        _return_outer(cpu, selector, descriptor, eip, stack_selector & 0xFFFF, new_esp)
        cpu.set_esp(new_esp + release_bytes)
        _drop_privileged_segments(cpu)
    state.eip = eip


def _return_paragraph(cpu: Cpu, selector: int, eip: int) -> None:
    """CS of a return in real or virtual-8086 mode."""
    segment = cpu.state.segments[CS]
    if eip > segment.limit:
        raise general_protection(0)
    if cpu.state.eflags & VM:
        load_v86(segment, selector)
    else:
        load_real_code(segment, selector)


def _return_code(cpu: Cpu, selector: int) -> Descriptor:
    """The code segment to return to."""
    if not selector & SELECTOR_INDEX:
        raise general_protection(0)
    code = selector & SELECTOR_INDEX
    rpl = selector & RPL
    descriptor = read_descriptor(cpu, selector)
    if descriptor is None or not descriptor.is_code or rpl < cpu.state.cpl:
        raise general_protection(code)
    if descriptor.dpl > rpl if descriptor.is_conforming else descriptor.dpl != rpl:
        raise general_protection(code)
    if not descriptor.present:
        raise not_present(code)
    return descriptor


def _check_eip(descriptor: Descriptor, eip: int) -> None:
    if eip > descriptor.limit:
        raise general_protection(0)


def _load(cpu: Cpu, register: int, selector: int, descriptor: Descriptor) -> None:
    mark_accessed(cpu, descriptor)
    cpu.state.segments[register].load(selector, descriptor.base, descriptor.limit, descriptor.attributes)


def _return_outer(cpu: Cpu, selector: int, descriptor: Descriptor, eip: int, stack_selector: int, new_esp: int) -> None:
    """Check the outer stack, then load CS, SS, ESP and CPL."""
    if not stack_selector & SELECTOR_INDEX:
        raise general_protection(0)
    code = stack_selector & SELECTOR_INDEX
    level = selector & RPL
    stack = read_descriptor(cpu, stack_selector)
    if stack is None or stack_selector & RPL != level or not stack.is_writable or stack.dpl != level:
        raise general_protection(code)
    if not stack.present:
        raise stack_fault(code)
    _check_eip(descriptor, eip)
    check_accessed(cpu, descriptor)
    check_accessed(cpu, stack)
    _load(cpu, CS, selector, descriptor)
    _load(cpu, SS, stack_selector, stack)
    cpu.set_cpl(level)
    cpu.set_esp(new_esp)


def _drop_privileged_segments(cpu: Cpu) -> None:
    """After a return to an outer level: what that level may not use becomes null."""
    state = cpu.state
    for register in (ES, DS, FS, GS):
        segment = state.segments[register]
        attributes = segment.attributes
        conforming = SEG_S | SEG_CODE | SEG_CONFORMING_EXPAND_DOWN
        if segment.dpl < state.cpl and attributes & conforming != conforming:
            load_null(segment, 0)


def interrupt_return(cpu: Cpu, operand_bytes: int, next_eip: int) -> None:
    """IRET, IRETD. NMIs are accepted again afterwards.

    RF comes from the popped image with a 32-bit operand and is clear with a 16-bit one; whoever retires the instruction
    must not clear it.

    Args:
        cpu: EFLAGS, ESP and EIP are set last.
        operand_bytes: 2 or 4.
        next_eip: what the switch to the previous task (EFLAGS.NT) saves as EIP.

    Raises:
        GuestFault: with nothing changed, unless `return_eip` is set in it.
    """
    state = cpu.state
    if not state.cr0 & CR0_PE:
        _iret_real(cpu, operand_bytes)
    elif state.eflags & VM:
        _iret_within_v86(cpu, operand_bytes)
    elif state.eflags & NT:
        _return_to_previous_task(cpu, next_eip)
    else:
        _iret_protected(cpu, operand_bytes)
    state.nmi_blocked = 0
    if state.eflags & VIP:
        try:
            check_virtual_interrupt(cpu)
        except GuestFault as fault:
            fault.return_eip = state.eip
            raise


def _set_flags(cpu: Cpu, value: int, mask: int) -> None:
    """Load the flags of `mask` from `value`."""
    state = cpu.state
    state.eflags = (state.eflags & ~mask | value & mask) & DEFINED_MASK | ALWAYS_SET
    cpu.mmu.update_alignment()


def _iret_real(cpu: Cpu, operand_bytes: int) -> None:
    state = cpu.state
    eip, selector, flags = peek(cpu, 3, operand_bytes)
    _return_paragraph(cpu, selector & 0xFFFF, eip)
    cpu.set_esp(state.gpr[ESP] + 3 * operand_bytes)
    mask = _ALWAYS | IF | IOPL | (_WIDE if operand_bytes == 4 else 0)
    state.eflags &= ~RF
    _set_flags(cpu, flags, mask)
    state.eip = eip


def _iret_within_v86(cpu: Cpu, operand_bytes: int) -> None:
    state = cpu.state
    virtual_if = state.eflags & IOPL != IOPL
    if virtual_if and not (state.cr4 & CR4_VME and operand_bytes == 2):
        raise general_protection(0)
    eip, selector, flags = peek(cpu, 3, operand_bytes)
    if virtual_if and (flags & TF or (flags & IF and state.eflags & VIP)):
        raise general_protection(0)
    _return_paragraph(cpu, selector & 0xFFFF, eip)
    cpu.set_esp(state.gpr[ESP] + 3 * operand_bytes)
    state.eflags &= ~RF
    if virtual_if:
        state.eflags = state.eflags | VIF if flags & IF else state.eflags & ~VIF
        _set_flags(cpu, flags, _ALWAYS)
    else:
        _set_flags(cpu, flags, _ALWAYS | IF | (_WIDE if operand_bytes == 4 else 0))
    state.eip = eip


def _return_to_previous_task(cpu: Cpu, next_eip: int) -> None:
    tr = cpu.state.tr
    selector = cpu.mmu.load_system(tr.base + LINK, 2)
    code = selector & SELECTOR_INDEX
    descriptor = None if selector & TI or not code else read_descriptor(cpu, selector)
    if descriptor is None or descriptor.system_type not in (TSS16_BUSY, TSS32_BUSY):
        raise invalid_tss(code)
    switch_task(cpu, selector, descriptor, SwitchKind.RETURN, next_eip)


def _iret_protected(cpu: Cpu, operand_bytes: int) -> None:
    state = cpu.state
    old_cpl = state.cpl
    eip, selector, flags = peek(cpu, 3, operand_bytes)
    selector &= 0xFFFF
    if operand_bytes == 4 and flags & VM and not old_cpl:
        _return_to_v86(cpu, eip, selector, flags)
        return
    mask = _ALWAYS | (_WIDE if operand_bytes == 4 else 0)
    if old_cpl <= (state.eflags & IOPL) >> IOPL_BIT:
        mask |= IF
    if not old_cpl:
        mask |= IOPL | (VIF | VIP if operand_bytes == 4 else 0)
    descriptor = _return_code(cpu, selector)
    if selector & RPL == old_cpl:
        _check_eip(descriptor, eip)
        check_accessed(cpu, descriptor)
        _load(cpu, CS, selector, descriptor)
        cpu.set_esp(state.gpr[ESP] + 3 * operand_bytes)
    else:
        new_esp, stack_selector = peek(cpu, 2, operand_bytes, 3 * operand_bytes)
        _return_outer(cpu, selector, descriptor, eip, stack_selector & 0xFFFF, new_esp)
        _drop_privileged_segments(cpu)
    state.eflags &= ~RF
    _set_flags(cpu, flags, mask)
    state.eip = eip


def _return_to_v86(cpu: Cpu, eip: int, selector: int, flags: int) -> None:
    state = cpu.state
    check_within(cpu, 9, 4)
    esp, ss, es, ds, fs, gs = peek(cpu, 6, 4, 12)
    if eip > 0xFFFF:
        raise general_protection(0)
    state.eflags = flags & DEFINED_MASK | ALWAYS_SET
    for register, value in ((CS, selector), (SS, ss), (ES, es), (DS, ds), (FS, fs), (GS, gs)):
        load_v86(state.segments[register], value & 0xFFFF)
    state.gpr[ESP] = esp
    cpu.set_cpl(3)
    state.eip = eip
