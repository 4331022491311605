"""World switch: the guest's registers between `CpuState` and the save area of a VMCB, exact for IA-32.

The block has no room for the general-purpose registers but EAX and ESP, for DR0 to DR3 and for floating point: as on
real hardware whoever runs the guest carries those himself. HLT and masked NMIs are the VMM's own knowledge too.

Source: AMD64 APM Vol. 2, "VMRUN Instruction", "Segment State in the VMCB", and appendix B.
"""

from __future__ import annotations

from struct import Struct

from machine.state import (
    CR0_CD,
    CR0_NW,
    EAX,
    ESP,
    SHADOW_NONE,
    SHADOW_STI,
    CpuState,
    Segment,
)
from vmm.trap.exitinfo import Event
from vmm.trap.intercepts import Intercept4
from vmm.trap.vmcb import EFER_SVME, INTERRUPT_SHADOW, Vmcb, offset_of

_SEGMENTS = Struct("<" + "HHIQ" * 10)
_CONTROLS = Struct("<7Q")  # CR4, CR3, CR0, DR7, DR6, RFLAGS, RIP
_SYSTEM = Struct("<4Q")  # SYSENTER_CS, _ESP, _EIP, CR2

_SEGMENTS_AT = offset_of("es")
_CONTROLS_AT = offset_of("cr4")
_SYSTEM_AT = offset_of("sysenter_cs")
_CPL = offset_of("cpl")
_EFER = offset_of("efer") // 8
_RSP = offset_of("rsp") // 8
_RAX = offset_of("rax") // 8
_TSC_OFFSET = offset_of("tsc_offset") // 8
_INTERRUPT_STATE = offset_of("interrupt_state") // 8


def store_state(block: Vmcb, state: CpuState) -> None:
    """Write the guest's state into the save area; its TSC offset and interrupt shadow into the control area.

    Nothing of this counts as a write by the VMM: `Vmcb.writes` is what it does by name.
    """
    es, cs, ss, ds, fs, gs = state.segments
    gdtr, idtr = state.gdtr, state.idtr
    page, quads = block.page, block.views[3]
    _SEGMENTS.pack_into(
        page,
        _SEGMENTS_AT,
        *_packed(es),
        *_packed(cs),
        *_packed(ss),
        *_packed(ds),
        *_packed(fs),
        *_packed(gs),
        *(0, 0, gdtr.limit, gdtr.base),
        *_packed(state.ldtr),
        *(0, 0, idtr.limit, idtr.base),
        *_packed(state.tr),
    )
    block.views[0][_CPL] = state.cpl
    quads[_EFER] = EFER_SVME
    _CONTROLS.pack_into(
        page, _CONTROLS_AT, state.cr4, state.cr3, state.cr0, state.dr[7], state.dr[6], state.eflags, state.eip
    )
    quads[_RSP] = state.gpr[ESP]
    quads[_RAX] = state.gpr[EAX]
    _SYSTEM.pack_into(page, _SYSTEM_AT, state.sysenter_cs, state.sysenter_esp, state.sysenter_eip, state.cr2)
    quads[_TSC_OFFSET] = state.tsc_offset
    kept = quads[_INTERRUPT_STATE] & ~INTERRUPT_SHADOW
    quads[_INTERRUPT_STATE] = kept | INTERRUPT_SHADOW * (state.shadow != SHADOW_NONE)


def load_state(block: Vmcb, state: CpuState) -> None:
    """Take the guest's state from the block; what the block has no room for stays as it is in `state`.

    The block does not tell the shadow of STI from that of MOV SS: with its bit set, one that `state` has already
    stays, else it becomes that of STI. The caller tells the MMU of a new CPL, and of changed control registers.
    """
    page, quads = block.page, block.views[3]
    fields = _SEGMENTS.unpack_from(page, _SEGMENTS_AT)
    for number, segment in enumerate(state.segments):
        _load(segment, fields, number)
    state.gdtr.limit, state.gdtr.base = fields[26], fields[27]
    _load(state.ldtr, fields, 7)
    state.idtr.limit, state.idtr.base = fields[34], fields[35]
    _load(state.tr, fields, 9)
    state.cpl = block.views[0][_CPL]
    (state.cr4, state.cr3, state.cr0, state.dr[7], state.dr[6], state.eflags, state.eip) = _CONTROLS.unpack_from(
        page, _CONTROLS_AT
    )
    state.gpr[ESP] = quads[_RSP]
    state.gpr[EAX] = quads[_RAX]
    state.sysenter_cs, state.sysenter_esp, state.sysenter_eip, state.cr2 = _SYSTEM.unpack_from(page, _SYSTEM_AT)
    state.tsc_offset = quads[_TSC_OFFSET]
    if not quads[_INTERRUPT_STATE] & INTERRUPT_SHADOW:
        state.shadow = SHADOW_NONE
    elif state.shadow == SHADOW_NONE:
        state.shadow = SHADOW_STI


def _packed(segment: Segment) -> tuple[int, int, int, int]:
    return segment.selector, segment.attributes, segment.limit, segment.base


def _load(segment: Segment, fields: tuple[int, ...], number: int) -> None:
    selector, attributes, limit, base = fields[4 * number : 4 * number + 4]
    if (selector, base, limit, attributes) != segment.fields:
        segment.load(selector, base, limit, attributes)


def invalid_because(block: Vmcb) -> str | None:
    """Why VMRUN would exit with VMEXIT_INVALID, or None; the checks are those that matter to a 32-bit guest."""
    if not block.efer & EFER_SVME:
        return "EFER.SVME is clear"
    if block.cr0 >> 32 or block.cr4 >> 32:
        return "the upper half of CR0 or CR4 is not zero"
    if not block.cr0 & CR0_CD and block.cr0 & CR0_NW:
        return "CR0.NW is set while CR0.CD is clear"
    if block.dr6 >> 32 or block.dr7 >> 32:
        return "the upper half of DR6 or DR7 is not zero"
    if not block.intercept4 & Intercept4.VMRUN:
        return "VMRUN is not intercepted"
    if not block.guest_asid:
        return "the ASID is 0, the host's own"
    try:
        Event.decode(block.eventinj)
    except ValueError:
        return "EVENTINJ has a reserved type"
    return None
