"""The guest's registers between `CpuState` and a virtual CPU of KVM, both ways.

It knows both forms of the state; when it is moved is the engine's business.

KVM keeps less of a segment than IA-32 has: depending on the host's CPU, G follows from the limit, and accessed, AVL and
DPL are those that the hardware wants. A segment that comes back otherwise unchanged is left as it was.
"""

from __future__ import annotations

from machine.state import (
    CS,
    DS,
    ES,
    FS,
    GS,
    SEG_ACCESSED,
    SEG_AVL,
    SEG_CODE,
    SEG_DB,
    SEG_DPL,
    SEG_DPL_SHIFT,
    SEG_G,
    SEG_PRESENT,
    SEG_S,
    SEG_TYPE,
    SHADOW_MOV_SS,
    SHADOW_NONE,
    SHADOW_STI,
    SS,
    CpuState,
    Segment,
)
from vmm.trap.kvm import EVENT_NMI_PENDING_VALID, EVENT_SHADOW_VALID, SEGMENT, SREGS, TABLE, Events, Vcpu

MASK32 = 0xFFFF_FFFF
_MSR_TSC = 0x10
_MSR_SYSENTER = (0x174, 0x175, 0x176)

# KVM's order of the general-purpose registers, by their encodings: RAX RBX RCX RDX RSI RDI RSP RBP.
_GPR_ORDER = (0, 3, 1, 2, 6, 7, 4, 5)
_SEGMENT_ORDER = (CS, DS, ES, FS, GS, SS)
_LOOSE_ATTRIBUTES = SEG_ACCESSED | SEG_AVL | SEG_DPL | SEG_G
_KVM_SHADOW_MOV_SS = 1
_KVM_SHADOW_STI = 2
_SHADOW_TO_KVM = {SHADOW_NONE: 0, SHADOW_STI: _KVM_SHADOW_STI, SHADOW_MOV_SS: _KVM_SHADOW_MOV_SS}


def store_state(vcpu: Vcpu, state: CpuState, *, fpu: bool) -> None:
    """Give the CPU of KVM the registers; with `fpu` those of x87 and SSE too.

    Raises:
        KvmError: KVM does not take them.
    """
    vcpu.set_sregs(_pack_sregs(state))
    gpr = state.gpr
    vcpu.set_regs((*(gpr[number] for number in _GPR_ORDER), *[0] * 8, state.eip, state.eflags))
    dr = state.dr
    vcpu.set_debug_registers((*dr[:4], dr[6], dr[7]))
    values = (state.sysenter_cs, state.sysenter_esp, state.sysenter_eip)
    vcpu.set_msrs(dict(zip(_MSR_SYSENTER, values, strict=True)))
    vcpu.set_events(
        Events(
            interrupt_shadow=_SHADOW_TO_KVM[state.shadow],
            nmi_masked=state.nmi_blocked,
            flags=EVENT_SHADOW_VALID | EVENT_NMI_PENDING_VALID,
        )
    )
    if fpu:
        vcpu.set_fpu(state.fpu.pack())


def load_state(vcpu: Vcpu, state: CpuState, *, fpu: bool) -> Events:
    """Take the registers back. The caller tells the MMU of it.

    Returns:
        What KVM is delivering or holding back: of this, `CpuState` has nothing.
    """
    values = vcpu.get_regs()
    for number, value in zip(_GPR_ORDER, values, strict=False):
        state.gpr[number] = value & MASK32
    state.eip, state.eflags = values[16] & MASK32, values[17] & MASK32
    _unpack_sregs(state, vcpu.get_sregs())
    *addresses, state.dr[6], state.dr[7] = (value & MASK32 for value in vcpu.get_debug_registers())
    state.dr[:4] = addresses
    state.sysenter_cs, state.sysenter_esp, state.sysenter_eip = (
        value & MASK32 for value in vcpu.get_msrs(_MSR_SYSENTER)
    )
    events = vcpu.get_events()
    state.nmi_blocked = events.nmi_masked
    if not events.interrupt_shadow:
        state.shadow = SHADOW_NONE
    elif events.interrupt_shadow & _KVM_SHADOW_MOV_SS and not events.interrupt_shadow & _KVM_SHADOW_STI:
        state.shadow = SHADOW_MOV_SS
    elif state.shadow == SHADOW_NONE:
        state.shadow = SHADOW_STI  # some hardware tells neither from the other
    if fpu:
        state.fpu.unpack(vcpu.get_fpu())
    return events


def load_system_registers(vcpu: Vcpu, state: CpuState) -> None:
    """Take back segments, tables and control registers only."""
    _unpack_sregs(state, vcpu.get_sregs())


def read_tsc(vcpu: Vcpu) -> int:
    """The time-stamp counter as the guest sees it."""
    return vcpu.get_msrs((_MSR_TSC,))[0]


def write_tsc(vcpu: Vcpu, value: int) -> None:
    """Set the time-stamp counter; it goes on at the host's rate."""
    if not vcpu.shift_tsc(value - read_tsc(vcpu)):
        vcpu.set_msrs({_MSR_TSC: value})


def _pack_segment(segment: Segment, dpl: int) -> bytes:
    selector, base, limit, attributes = segment.fields
    return SEGMENT.pack(
        base,
        limit,
        selector,
        attributes & SEG_TYPE,
        bool(attributes & SEG_PRESENT),
        dpl,
        bool(attributes & SEG_DB),
        bool(attributes & SEG_S),
        0,
        bool(attributes & SEG_G),
        bool(attributes & SEG_AVL),
        not attributes & SEG_PRESENT,
    )


def _pack_sregs(state: CpuState) -> bytes:
    parts = []
    for number in _SEGMENT_ORDER:
        segment = state.segments[number]
        # KVM takes SS.DPL for the privilege level, as both vendors' hardware does.
        parts.append(_pack_segment(segment, state.cpl if number == SS else segment.dpl))
    parts += [_pack_segment(segment, segment.dpl) for segment in (state.tr, state.ldtr)]
    tables = TABLE.pack(state.gdtr.base, state.gdtr.limit) + TABLE.pack(state.idtr.base, state.idtr.limit)
    return SREGS.pack(b"".join(parts), tables, state.cr0, state.cr2, state.cr3, state.cr4, 0, 0, 0, bytes(32))


def _unpack_sregs(state: CpuState, data: bytes) -> None:
    segments, tables, cr0, cr2, cr3, cr4, _, _, _, _ = SREGS.unpack(data)
    parts = list(SEGMENT.iter_unpack(segments))
    for number, part in zip(_SEGMENT_ORDER, parts, strict=False):
        _load_segment(state.segments[number], part)
    state.cpl = parts[_SEGMENT_ORDER.index(SS)][5]
    _load_segment(state.tr, parts[6])
    _load_segment(state.ldtr, parts[7])
    (state.gdtr.base, state.gdtr.limit), (state.idtr.base, state.idtr.limit) = TABLE.iter_unpack(tables)
    state.cr0, state.cr2, state.cr3, state.cr4 = cr0 & MASK32, cr2 & MASK32, cr3 & MASK32, cr4 & MASK32


def _load_segment(segment: Segment, part: tuple[int, ...]) -> None:
    base, limit, selector, kind, present, dpl, db, s, _, g, avl, unusable = part
    if unusable or not present:
        if segment.attributes & SEG_PRESENT or segment.selector != selector:
            segment.load(selector, 0, 0, 0)
        return
    attributes = kind | SEG_S * s | dpl << SEG_DPL_SHIFT | SEG_PRESENT | SEG_AVL * avl | SEG_DB * db | SEG_G * g
    same = (selector, base, limit) == (segment.selector, segment.base, segment.limit)
    if same and not (attributes ^ segment.attributes) & ~_LOOSE_ATTRIBUTES:
        return
    if s and kind & SEG_CODE == 0 and not kind & SEG_ACCESSED:
        attributes |= SEG_ACCESSED
    segment.load(selector, base, limit, attributes)
