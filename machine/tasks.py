"""Hardware task switches, and the fields of a task-state segment that other transfers ask for.

Who may switch to which task is decided by the callers; from the busy bits to the first instruction of the new task it
is done here.

Source: SDM Vol. 3A, "Task Management", with its table of the checks during a task switch.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import TYPE_CHECKING, Final

from machine.descriptors import (
    BUSY,
    IS_32,
    LDT,
    RPL,
    SELECTOR_INDEX,
    Descriptor,
    check_busy,
    read_descriptor,
    set_busy,
)
from machine.faults import (
    TI,
    GuestFault,
    general_protection,
    invalid_tss,
    not_present,
    stack_fault,
)
from machine.flags import ALWAYS_SET, DEFINED_MASK, IOPL, NT, VIF, VIP, VM
from machine.frames import check_room, push_frame
from machine.paging import check_pdptes
from machine.segmentation import load_descriptor, load_null, load_v86
from machine.state import CR0_PG, CR0_TS, CR4_PVI, CR4_VME, CS, DR6_BT, DR7_LOCAL, DS, ES, ESP, FS, GS, MASK32, SS

if TYPE_CHECKING:
    from machine.cpu import Cpu

# Offsets in a 32-bit TSS, and in a 16-bit one.
LINK: Final = 0
CR3_32: Final = 0x1C
EIP_32: Final = 0x20
EFLAGS_32: Final = 0x24
GPRS_32: Final = 0x28
SEGMENTS_32: Final = 0x48
LDT_32: Final = 0x60
TRAP_32: Final = 0x64
IO_MAP_BASE_32: Final = 0x66
LIMIT_32: Final = 0x67
IP_16: Final = 0x0E
FLAGS_16: Final = 0x10
GPRS_16: Final = 0x12
SEGMENTS_16: Final = 0x22
LDT_16: Final = 0x2A
LIMIT_16: Final = 0x2B


class SwitchKind(Enum):
    """What makes the task switch: it decides busy bits, back link and NT."""

    JUMP = auto()
    CALL = auto()  # also an interrupt or exception through a task gate
    RETURN = auto()


def inner_stack(cpu: Cpu, level: int, ext: int) -> tuple[int, int]:
    """SS and ESP for privilege `level` (0 to 2) out of the current TSS.

    Raises:
        GuestFault: #TS with the TSS selector if they lie beyond its limit; #PF.
    """
    tr = cpu.state.tr
    load = cpu.mmu.load_system
    if tr.attributes & IS_32:
        at = level * 8 + 4
        if at + 5 > tr.limit:
            raise invalid_tss(tr.selector & SELECTOR_INDEX | ext)
        return load(tr.base + at + 4, 2), load(tr.base + at, 4)
    at = level * 4 + 2
    if at + 3 > tr.limit:
        raise invalid_tss(tr.selector & SELECTOR_INDEX | ext)
    return load(tr.base + at + 2, 2), load(tr.base + at, 2)


def switch_task(
    cpu: Cpu,
    selector: int,
    target: Descriptor,
    kind: SwitchKind,
    return_eip: int,
    *,
    ext: int = 0,
    saved_flags: int | None = None,
    error_code: int | None = None,
) -> None:
    """Switch to the task whose TSS descriptor is `target`.

    Args:
        cpu: its current task is saved in the TSS of TR.
        selector: of the new TSS.
        target: known to be a TSS, available or (RETURN) busy as it must be.
        kind: what makes the switch.
        return_eip: EIP to save in the old TSS.
        ext: `faults.EXT` if an event outside the program makes the switch.
        saved_flags: EFLAGS to save in the old TSS, if not those of now.
        error_code: of the exception, pushed on the stack of the new task.

    Raises:
        GuestFault: #NP, #TS or #PF with nothing changed; or, with `return_eip` set in the fault, #TS, #NP, #SS, #GP,
            or #PF in the new task. The trap of its T bit becomes `cpu.pending_debug`.
    """
    state, mmu = cpu.state, cpu.mmu
    old = state.tr
    code = selector & SELECTOR_INDEX | ext
    is_32 = bool(target.type & IS_32)
    if not target.present:
        raise not_present(code)
    if target.limit < (LIMIT_32 if is_32 else LIMIT_16):
        raise invalid_tss(code)
    flags = state.eflags if saved_flags is None else saved_flags
    if cpu.before_task_switch is not None:
        cpu.before_task_switch(selector, kind is SwitchKind.RETURN, kind is SwitchKind.JUMP, error_code, flags)
    old_is_32 = bool(old.attributes & IS_32)
    first, end = (EIP_32, LDT_32) if old_is_32 else (IP_16, LDT_16)
    if old.limit < end - 1:
        raise invalid_tss(old.selector & SELECTOR_INDEX | ext)
    # Everything that is going to be touched must be mapped before the first change.
    mmu.check_linear(old.base + first, end - first, write=True, user=False)
    mmu.check_linear(target.base, (LIMIT_32 if is_32 else LIMIT_16) + 1, write=False, user=False)
    old_descriptor = (state.gdtr.base + (old.selector & 0xFFF8)) & MASK32
    if kind is SwitchKind.CALL:
        mmu.check_linear(target.base, 2, write=True, user=False)
    else:
        check_busy(cpu, old_descriptor)
    if kind is not SwitchKind.RETURN:
        check_busy(cpu, target.linear)

    if kind is SwitchKind.RETURN:
        flags &= ~NT
    if kind is not SwitchKind.CALL:
        set_busy(cpu, old_descriptor, busy=False)
    _save(cpu, old.base, old_is_32, return_eip, flags)
    if kind is SwitchKind.CALL:
        mmu.store_system(target.base + LINK, 2, old.selector)
    if kind is not SwitchKind.RETURN:
        set_busy(cpu, target.linear, busy=True)
    base = target.base
    old.load(selector, base, target.limit, target.attributes | BUSY)
    state.cr0 |= CR0_TS
    state.dr[7] &= ~DR7_LOCAL
    selectors, ldt, new_cr3 = _load_registers(cpu, base, is_32, is_nested=kind is SwitchKind.CALL)
    try:
        _load_address_space(cpu, new_cr3)
        _load_descriptors(cpu, selectors, ldt, ext)
        if error_code is not None:
            _push_error_code(cpu, error_code, 4 if is_32 else 2, ext)
        if state.eip > state.segments[CS].limit:
            raise general_protection(ext)
        if is_32 and mmu.load_system(base + TRAP_32, 2) & 1:
            cpu.pending_debug |= DR6_BT
        else:
            check_virtual_interrupt(cpu)
    except GuestFault as fault:
        fault.return_eip = state.eip
        raise


def check_virtual_interrupt(cpu: Cpu) -> None:
    """Raise #GP(0) if a virtual interrupt is pending and enabled before the first instruction after IRET or a switch.

    VIP counts below IOPL 3 only, with VME in virtual-8086 mode or with PVI at CPL 3.
    """
    state = cpu.state
    flags = state.eflags
    if flags & (VIF | VIP) != VIF | VIP or flags & IOPL == IOPL or state.cpl != 3:
        return
    if state.cr4 & (CR4_PVI | CR4_VME if flags & VM else CR4_PVI):
        raise general_protection(0)


def _save(cpu: Cpu, base: int, is_32: bool, eip: int, flags: int) -> None:
    state = cpu.state
    store = cpu.mmu.store_system
    selectors = [segment.selector for segment in state.segments]
    if is_32:
        store(base + EIP_32, 4, eip)
        store(base + EFLAGS_32, 4, flags)
        for n, value in enumerate(state.gpr):
            store(base + GPRS_32 + 4 * n, 4, value)
        for n, value in enumerate(selectors):
            store(base + SEGMENTS_32 + 4 * n, 2, value)
        return
    store(base + IP_16, 2, eip & 0xFFFF)
    store(base + FLAGS_16, 2, flags & 0xFFFF)
    for n, value in enumerate(state.gpr):
        store(base + GPRS_16 + 2 * n, 2, value & 0xFFFF)
    for n, value in enumerate(selectors[:4]):
        store(base + SEGMENTS_16 + 2 * n, 2, value)


def _load_registers(cpu: Cpu, base: int, is_32: bool, *, is_nested: bool) -> tuple[list[int], int, int | None]:
    """Load GPRs, EIP, EFLAGS and the visible parts of the segments.

    Returns:
        Selectors of ES CS SS DS FS GS, selector of the LDT, and CR3 unless the TSS has none.
    """
    state = cpu.state
    load = cpu.mmu.load_system
    cr3: int | None = None
    if is_32:
        cr3 = load(base + CR3_32, 4)
        eip = load(base + EIP_32, 4)
        flags = load(base + EFLAGS_32, 4)
        gpr = [load(base + GPRS_32 + 4 * n, 4) for n in range(8)]
        selectors = [load(base + SEGMENTS_32 + 4 * n, 2) for n in range(6)]
        ldt = load(base + LDT_32, 2)
    else:
        eip = load(base + IP_16, 2)
        flags = load(base + FLAGS_16, 2)
        # The SDM leaves the upper halves open; processors set them.
        gpr = [load(base + GPRS_16 + 2 * n, 2) | 0xFFFF_0000 for n in range(8)]
        selectors = [load(base + SEGMENTS_16 + 2 * n, 2) for n in range(4)] + [0, 0]
        ldt = load(base + LDT_16, 2)
    flags = flags & DEFINED_MASK | ALWAYS_SET
    if is_nested:
        flags |= NT
    state.gpr[:] = gpr
    state.eip = eip
    state.eflags = flags
    # Until their descriptors are found good, no segment can be used.
    for segment, value in zip(state.segments, selectors, strict=True):
        load_null(segment, value)
    load_null(state.ldtr, ldt)
    cpu.set_cpl(3 if flags & VM else selectors[CS] & RPL)
    return selectors, ldt, cr3


def _load_address_space(cpu: Cpu, cr3: int | None) -> None:
    if cr3 is None or not cpu.state.cr0 & CR0_PG:
        return
    cpu.state.cr3 = cr3
    cpu.mmu.flush()
    check_pdptes(cpu.memory, cpu.state.cr4, cr3)


def _load_descriptors(cpu: Cpu, selectors: list[int], ldt: int, ext: int) -> None:
    """Load the hidden parts of LDTR and the segments; after the fault of one, the others that are good still are."""
    state = cpu.state
    if state.eflags & VM:
        for segment, selector in zip(state.segments, selectors, strict=True):
            load_v86(segment, selector)
        _check_ldt_present(_find_ldt(cpu, ldt, ext), ldt, ext)
        _load_ldt(cpu, ldt, ext)
        return
    fault: GuestFault | None = None
    try:
        _qualify(cpu, selectors, ldt, ext)
    except GuestFault as first:
        fault = first
    for register in (CS, SS, ES, DS, FS, GS):
        try:
            _load_segment(cpu, register, selectors[register], ext)
        except GuestFault as other:
            fault = fault or other
    if fault is not None:
        raise fault


def _qualify(cpu: Cpu, selectors: list[int], ldt: int, ext: int) -> None:
    """Raise the first fault in the order of the SDM's table, which holds for the P6 family."""
    ldt_descriptor = _find_ldt(cpu, ldt, ext)
    if ldt_descriptor is not None and ldt_descriptor.present:
        _load_ldt(cpu, ldt, ext)  # the other selectors may need it
    code = read_descriptor(cpu, selectors[CS]) if selectors[CS] & SELECTOR_INDEX else None
    if code is not None and code.is_code:
        _check_code_privilege(code, selectors[CS], ext)
    _check_stack(cpu, selectors[SS], ext, with_rpl=False)
    _check_ldt_present(ldt_descriptor, ldt, ext)
    _check_code(cpu, selectors[CS], ext)
    _check_stack(cpu, selectors[SS], ext)
    for register in (ES, DS, FS, GS):
        if selectors[register] & SELECTOR_INDEX:
            _check_data(cpu, selectors[register], ext)


def _find(cpu: Cpu, selector: int, ext: int) -> Descriptor:
    descriptor = read_descriptor(cpu, selector) if selector & SELECTOR_INDEX else None
    if descriptor is None:
        raise invalid_tss(selector & SELECTOR_INDEX | ext)
    return descriptor


def _find_ldt(cpu: Cpu, selector: int, ext: int) -> Descriptor | None:
    """The LDT's descriptor, present or not; None for a null selector."""
    if not selector & SELECTOR_INDEX:
        return None
    descriptor = None if selector & TI else read_descriptor(cpu, selector)
    if descriptor is None or descriptor.system_type != LDT:
        raise invalid_tss(selector & SELECTOR_INDEX | ext)
    return descriptor


def _check_ldt_present(descriptor: Descriptor | None, selector: int, ext: int) -> None:
    if descriptor is not None and not descriptor.present:
        raise invalid_tss(selector & SELECTOR_INDEX | ext)


def _check_code_privilege(descriptor: Descriptor, selector: int, ext: int) -> None:
    rpl = selector & RPL
    if descriptor.dpl > rpl if descriptor.is_conforming else descriptor.dpl != rpl:
        raise invalid_tss(selector & SELECTOR_INDEX | ext)


def _check_code(cpu: Cpu, selector: int, ext: int) -> Descriptor:
    code = selector & SELECTOR_INDEX | ext
    descriptor = _find(cpu, selector, ext)
    if not descriptor.is_code:
        raise invalid_tss(code)
    _check_code_privilege(descriptor, selector, ext)
    if not descriptor.present:
        raise not_present(code)
    return descriptor


def _check_stack(cpu: Cpu, selector: int, ext: int, *, with_rpl: bool = True) -> Descriptor:
    code = selector & SELECTOR_INDEX | ext
    descriptor = _find(cpu, selector, ext)
    cpl = cpu.state.cpl
    if not descriptor.is_writable:
        raise invalid_tss(code)
    if not descriptor.present:
        raise stack_fault(code)
    if descriptor.dpl != cpl or (with_rpl and selector & RPL != cpl):
        raise invalid_tss(code)
    return descriptor


def _check_data(cpu: Cpu, selector: int, ext: int) -> Descriptor:
    code = selector & SELECTOR_INDEX | ext
    descriptor = _find(cpu, selector, ext)
    if not descriptor.is_readable:
        raise invalid_tss(code)
    if not descriptor.present:
        raise not_present(code)
    if not descriptor.is_conforming and descriptor.dpl < max(cpu.state.cpl, selector & RPL):
        raise invalid_tss(code)
    return descriptor


def _load_segment(cpu: Cpu, register: int, selector: int, ext: int) -> None:
    if register == CS:
        descriptor = _check_code(cpu, selector, ext)
    elif register == SS:
        descriptor = _check_stack(cpu, selector, ext)
    elif selector & SELECTOR_INDEX:
        descriptor = _check_data(cpu, selector, ext)
    else:
        return
    load_descriptor(cpu, cpu.state.segments[register], selector, descriptor)


def _load_ldt(cpu: Cpu, selector: int, ext: int) -> None:
    descriptor = _find_ldt(cpu, selector, ext)
    if descriptor is not None and descriptor.present:
        cpu.state.ldtr.load(selector, descriptor.base, descriptor.limit, descriptor.attributes)


def _push_error_code(cpu: Cpu, error_code: int, size_bytes: int, ext: int) -> None:
    state = cpu.state
    stack = state.segments[SS]
    check_room(stack, state.gpr[ESP], 1, size_bytes, ext)
    cpu.set_esp(push_frame(cpu, stack, state.gpr[ESP], size_bytes, [error_code], user=cpu.mmu.user))
