"""Far JMP and CALL in all modes, through call gates, task gates and TSSs too, and SYSENTER and SYSEXIT.

It owns the checks of privilege on the way in; returns are in `machine.returns`, interrupts in `machine.interrupts`.

Source: SDM Vol. 2, "JMP", "CALL", "SYSENTER", "SYSEXIT"; Vol. 3A, "Privilege Levels" and "Code Privilege Checking".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from machine.descriptors import (
    CALL_GATE16,
    CALL_GATE32,
    IS_32,
    RPL,
    SELECTOR_INDEX,
    TASK_GATE,
    TSS16,
    TSS32,
    Descriptor,
    check_accessed,
    mark_accessed,
    read_descriptor,
)
from machine.faults import TI, general_protection, invalid_tss, not_present, stack_fault
from machine.flags import IF, RF, VM
from machine.frames import check_room, peek, push_frame
from machine.returns import far_return, interrupt_return
from machine.segmentation import load_descriptor, load_real_code, load_v86
from machine.state import (
    CR0_PE,
    CS,
    ECX,
    EDX,
    ESP,
    MASK32,
    SEG_ACCESSED,
    SEG_CODE,
    SEG_DB,
    SEG_DPL_SHIFT,
    SEG_G,
    SEG_PRESENT,
    SEG_READ_WRITE,
    SEG_S,
    SS,
    Segment,
)
from machine.tasks import SwitchKind, inner_stack, switch_task

if TYPE_CHECKING:
    from machine.cpu import Cpu

__all__ = ["far_call", "far_jump", "far_return", "interrupt_return", "stack_for_level", "sysenter", "sysexit"]

_FLAT_CODE = SEG_PRESENT | SEG_S | SEG_CODE | SEG_READ_WRITE | SEG_ACCESSED | SEG_DB | SEG_G
_FLAT_DATA = SEG_PRESENT | SEG_S | SEG_READ_WRITE | SEG_ACCESSED | SEG_DB | SEG_G


def _is_paragraph_mode(cpu: Cpu) -> bool:
    """Real or virtual-8086 mode: selectors are paragraph numbers."""
    return not cpu.state.cr0 & CR0_PE or bool(cpu.state.eflags & VM)


def _load_paragraph_code(cpu: Cpu, selector: int) -> None:
    """Load CS in real or virtual-8086 mode."""
    segment = cpu.state.segments[CS]
    if cpu.state.eflags & VM:
        load_v86(segment, selector)
    else:
        load_real_code(segment, selector)


def far_jump(cpu: Cpu, selector: int, offset: int, operand_bytes: int, next_eip: int) -> None:
    """JMP ptr16:16, ptr16:32, m16:16, m16:32.

    Args:
        cpu: EIP is set last.
        selector: 16 bits.
        offset: `operand_bytes` wide; gates ignore it.
        operand_bytes: 2 or 4.
        next_eip: what a task switch saves as EIP.

    Raises:
        GuestFault: with nothing changed, unless a task switch passed its commit point.
    """
    state = cpu.state
    if operand_bytes == 2:
        offset &= 0xFFFF
    if _is_paragraph_mode(cpu):
        if offset > state.segments[CS].limit:
            raise general_protection(0)
        _load_paragraph_code(cpu, selector)
        state.eip = offset
        return
    descriptor = _target(cpu, selector)
    kind = descriptor.system_type
    if kind < 0:
        _check_direct(cpu, selector, descriptor)
        _enter(cpu, selector, descriptor, offset)
    elif kind in (CALL_GATE16, CALL_GATE32):
        code_selector, code = _through_gate(cpu, selector, descriptor)
        if not code.is_conforming and code.dpl != state.cpl:
            raise general_protection(code_selector & SELECTOR_INDEX)
        _check_code_present(code_selector, code)
        _enter(cpu, code_selector, code, descriptor.gate_offset)
    else:
        _switch(cpu, selector, descriptor, SwitchKind.JUMP, next_eip)


def far_call(cpu: Cpu, selector: int, offset: int, operand_bytes: int, next_eip: int) -> None:
    """CALL ptr16:16, ptr16:32, m16:16, m16:32; arguments and faults as of `far_jump`, `next_eip` is pushed."""
    state = cpu.state
    if operand_bytes == 2:
        offset &= 0xFFFF
    cs, stack, esp = state.segments[CS], state.segments[SS], state.gpr[ESP]
    user = cpu.mmu.user
    if _is_paragraph_mode(cpu):
        check_room(stack, esp, 2, operand_bytes, 0)
        if offset > cs.limit:
            raise general_protection(0)
        esp = push_frame(cpu, stack, esp, operand_bytes, (cs.selector, next_eip), user=user)
        _load_paragraph_code(cpu, selector)
        cpu.set_esp(esp)
        state.eip = offset
        return
    descriptor = _target(cpu, selector)
    kind = descriptor.system_type
    if kind < 0:
        _check_direct(cpu, selector, descriptor)
        _call(cpu, selector, descriptor, offset, operand_bytes, next_eip)
    elif kind in (CALL_GATE16, CALL_GATE32):
        code_selector, code = _through_gate(cpu, selector, descriptor)
        _check_code_present(code_selector, code)
        size_bytes = 4 if kind & IS_32 else 2
        if not code.is_conforming and code.dpl < state.cpl:
            _call_inner(cpu, descriptor, code_selector, code, next_eip)
        else:
            _call(cpu, code_selector, code, descriptor.gate_offset, size_bytes, next_eip)
    else:
        _switch(cpu, selector, descriptor, SwitchKind.CALL, next_eip)


def _target(cpu: Cpu, selector: int) -> Descriptor:
    if not selector & SELECTOR_INDEX:
        raise general_protection(0)
    descriptor = read_descriptor(cpu, selector)
    if descriptor is None:
        raise general_protection(selector & SELECTOR_INDEX)
    return descriptor


def _check_direct(cpu: Cpu, selector: int, descriptor: Descriptor) -> None:
    """Privilege of a transfer to a code segment without a gate."""
    code = selector & SELECTOR_INDEX
    cpl = cpu.state.cpl
    if not descriptor.is_code:
        raise general_protection(code)
    if descriptor.is_conforming:
        if descriptor.dpl > cpl:
            raise general_protection(code)
    elif selector & RPL > cpl or descriptor.dpl != cpl:
        raise general_protection(code)
    if not descriptor.present:
        raise not_present(code)


def _check_gate(cpu: Cpu, selector: int, gate: Descriptor) -> None:
    """Privilege to use a call gate, task gate or TSS."""
    if gate.dpl < cpu.state.cpl or gate.dpl < selector & RPL:
        raise general_protection(selector & SELECTOR_INDEX)


def _through_gate(cpu: Cpu, selector: int, gate: Descriptor) -> tuple[int, Descriptor]:
    """The code segment behind a call gate, as far as CALL and JMP check it alike."""
    _check_gate(cpu, selector, gate)
    if not gate.present:
        raise not_present(selector & SELECTOR_INDEX)
    code_selector = gate.gate_selector
    descriptor = _target(cpu, code_selector)
    if not descriptor.is_code or descriptor.dpl > cpu.state.cpl:
        raise general_protection(code_selector & SELECTOR_INDEX)
    return code_selector, descriptor


def _check_code_present(selector: int, descriptor: Descriptor) -> None:
    if not descriptor.present:
        raise not_present(selector & SELECTOR_INDEX)


def _enter(cpu: Cpu, selector: int, descriptor: Descriptor, offset: int) -> None:
    """Continue at `offset` of a code segment that passed its checks, at the present privilege level."""
    if offset > descriptor.limit:
        raise general_protection(0)
    state = cpu.state
    load_descriptor(cpu, state.segments[CS], selector & ~RPL | state.cpl, descriptor)
    state.eip = offset


def _call(cpu: Cpu, selector: int, descriptor: Descriptor, offset: int, size_bytes: int, next_eip: int) -> None:
    """CALL without a change of privilege."""
    state = cpu.state
    stack, esp = state.segments[SS], state.gpr[ESP]
    check_room(stack, esp, 2, size_bytes, 0)
    if offset > descriptor.limit:
        raise general_protection(0)
    check_accessed(cpu, descriptor)
    values = (state.segments[CS].selector, next_eip)
    esp = push_frame(cpu, stack, esp, size_bytes, values, user=cpu.mmu.user)
    cpu.set_esp(esp)
    _enter(cpu, selector, descriptor, offset)


def stack_for_level(cpu: Cpu, level: int, ext: int) -> tuple[int, int, Segment, Descriptor]:
    """The stack of an inner privilege level, checked.

    Args:
        cpu: the TSS in its TR names the stack.
        level: DPL of the code segment to be entered.
        ext: `faults.EXT` or 0, for the error codes.

    Returns:
        Selector, ESP, the segment as SS will hold it, and its descriptor, whose accessed bit is not set yet.

    Raises:
        GuestFault: #TS, #SS with the stack's selector or #TS with that of the TSS; #PF.
    """
    selector, esp = inner_stack(cpu, level, ext)
    code = selector & SELECTOR_INDEX | ext
    descriptor = read_descriptor(cpu, selector) if selector & SELECTOR_INDEX else None
    if descriptor is None or selector & RPL != level or descriptor.dpl != level or not descriptor.is_writable:
        raise invalid_tss(code)
    if not descriptor.present:
        raise stack_fault(code)
    segment = Segment()
    segment.load(selector, descriptor.base, descriptor.limit, descriptor.attributes | SEG_ACCESSED)
    return selector, esp, segment, descriptor


def _call_inner(cpu: Cpu, gate: Descriptor, selector: int, code: Descriptor, next_eip: int) -> None:
    """CALL through a call gate to a more privileged, nonconforming segment: new stack, parameters copied."""
    state = cpu.state
    size_bytes = 4 if gate.type & IS_32 else 2
    level = code.dpl
    stack_selector, esp, stack, descriptor = stack_for_level(cpu, level, 0)
    count = gate.gate_parameter_count
    check_room(stack, esp, 4 + count, size_bytes, stack_selector & SELECTOR_INDEX)
    offset = gate.gate_offset
    if offset > code.limit:
        raise general_protection(0)
    parameters = peek(cpu, count, size_bytes)
    check_accessed(cpu, code)
    check_accessed(cpu, descriptor)
    old_stack, old_cs = state.segments[SS], state.segments[CS]
    values = [old_stack.selector, state.gpr[ESP], *reversed(parameters), old_cs.selector, next_eip]
    new_esp = push_frame(cpu, stack, esp, size_bytes, values, user=False)
    mark_accessed(cpu, descriptor)
    mark_accessed(cpu, code)
    old_stack.copy_from(stack)
    cpu.set_esp(new_esp)
    old_cs.load(selector & ~RPL | level, code.base, code.limit, code.attributes)
    cpu.set_cpl(level)
    state.eip = offset


def _switch(cpu: Cpu, selector: int, descriptor: Descriptor, kind: SwitchKind, next_eip: int) -> None:
    """JMP or CALL to a task gate or a TSS, or to nothing that can be a target."""
    if descriptor.system_type == TASK_GATE:
        _check_gate(cpu, selector, descriptor)
        if not descriptor.present:
            raise not_present(selector & SELECTOR_INDEX)
        selector = descriptor.gate_selector
        tss = None if selector & TI or not selector & SELECTOR_INDEX else read_descriptor(cpu, selector)
        if tss is None or tss.system_type not in (TSS16, TSS32):
            raise general_protection(selector & SELECTOR_INDEX)
        descriptor = tss
    elif descriptor.system_type not in (TSS16, TSS32) or selector & TI:
        raise general_protection(selector & SELECTOR_INDEX)
    else:
        _check_gate(cpu, selector, descriptor)
    switch_task(cpu, selector, descriptor, kind, next_eip)


def sysenter(cpu: Cpu) -> None:
    """SYSENTER: to CPL 0 with flat segments by the three MSRs. Raises #GP(0) in real mode or without a CS."""
    state = cpu.state
    selector = state.sysenter_cs & SELECTOR_INDEX
    if not state.cr0 & CR0_PE or not selector:
        raise general_protection(0)
    state.eflags &= ~(VM | IF | RF)
    state.segments[CS].load(selector, 0, MASK32, _FLAT_CODE)
    state.segments[SS].load(selector + 8 & 0xFFFF, 0, MASK32, _FLAT_DATA)
    cpu.set_cpl(0)
    state.gpr[ESP] = state.sysenter_esp
    state.eip = state.sysenter_eip


def sysexit(cpu: Cpu) -> None:
    """SYSEXIT: to CPL 3 at EDX with stack ECX. Raises #GP(0) in real mode, above CPL 0 or without a CS."""
    state = cpu.state
    selector = state.sysenter_cs & SELECTOR_INDEX
    if not state.cr0 & CR0_PE or not selector or state.cpl:
        raise general_protection(0)
    level = 3 << SEG_DPL_SHIFT
    state.segments[CS].load((selector + 16 | RPL) & 0xFFFF, 0, MASK32, _FLAT_CODE | level)
    state.segments[SS].load((selector + 24 | RPL) & 0xFFFF, 0, MASK32, _FLAT_DATA | level)
    cpu.set_cpl(3)
    state.gpr[ESP] = state.gpr[ECX]
    state.eip = state.gpr[EDX]
