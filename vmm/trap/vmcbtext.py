"""A VMCB in words, as `monitor vmcb` prints it.

It reads the block and changes nothing, not even what is counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from machine.flags import describe as describe_eflags
from vmm.trap import exitcodes, intercepts
from vmm.trap.exitcodes import ExitCode
from vmm.trap.exitinfo import (
    Event,
    IoInfo,
    NestedPageFaultInfo,
    PageFaultInfo,
    RegisterAccessInfo,
    TaskSwitchInfo,
)
from vmm.trap.vmcb import (
    GUEST_INTERRUPT_MASK,
    INTERRUPT_SHADOW,
    LBR_VIRTUALIZATION,
    NP_ENABLE,
    SEGMENT_NAMES,
    TLB_FLUSH_ALL,
    TLB_FLUSH_GUEST,
    TLB_FLUSH_GUEST_NONGLOBAL,
    TLB_KEEP,
    V_GIF,
    V_GIF_ENABLE,
    V_IGN_TPR,
    V_INTR_MASKING,
    V_INTR_PRIO_SHIFT,
    V_INTR_VECTOR_SHIFT,
    V_IRQ,
    V_NMI,
    V_NMI_ENABLE,
    V_NMI_MASK,
    V_TPR_MASK,
    Vmcb,
)

_LINE_COLUMNS = 100
_TLB_CONTROLS = {
    TLB_KEEP: "keep",
    TLB_FLUSH_ALL: "flush all",
    TLB_FLUSH_GUEST: "flush this guest's",
    TLB_FLUSH_GUEST_NONGLOBAL: "flush this guest's, not the global ones",
}
_V_INTR_FLAGS = {
    V_IRQ: "V_IRQ", V_GIF: "V_GIF", V_NMI: "V_NMI", V_NMI_MASK: "V_NMI_MASK", V_IGN_TPR: "V_IGN_TPR",
    V_INTR_MASKING: "V_INTR_MASKING", V_GIF_ENABLE: "V_GIF_ENABLE", V_NMI_ENABLE: "V_NMI_ENABLE",
}  # fmt: skip
_WITH_ERROR_CODE = (8, 10, 11, 12, 13, 17, 21)


@runtime_checkable
class HasVmcb(Protocol):
    """An engine whose guest has a control block."""

    @property
    def vmcb(self) -> Vmcb:
        """The block, as the last exit left it."""


def describe(block: Vmcb) -> str:
    """The whole block in lines."""
    counts = block.reads, block.writes
    try:
        return "\n".join([*_exit_lines(block), *_control_lines(block), *_save_lines(block)]) + "\n"
    finally:
        block.reads, block.writes = counts


def describe_exit(code: int, info1: int, info2: int) -> str:
    """One line: the exit code's name, what has happened, and what EXITINFO1 and EXITINFO2 say of it."""
    detail = _detail(code, info1, info2)
    text = f"{exitcodes.name_of(code)}: {exitcodes.describe(code)}"
    return f"{text}; {detail}" if detail else text


def _detail(code: int, info1: int, info2: int) -> str:
    vector = exitcodes.exception_vector(code)
    try:
        if code == ExitCode.EXCP_PF:
            return str(PageFaultInfo.decode(info1, info2))
        if vector is not None:
            return f"error code {info1:#x}" if vector in _WITH_ERROR_CODE else ""
        if ExitCode.DR0_READ <= code <= ExitCode.DR15_WRITE:
            return str(RegisterAccessInfo.decode_debug(info1))
        if code <= ExitCode.CR15_WRITE:
            return str(RegisterAccessInfo.decode_control(info1))
        decoder = _DECODERS.get(code)
        return decoder(info1, info2) if decoder else ""
    except ValueError as error:
        return f"not decoded: {error}"


_DECODERS: dict[int, Callable[[int, int], str]] = {
    ExitCode.IOIO: lambda one, two: str(IoInfo.decode(one, two)),
    ExitCode.NPF: lambda one, two: str(NestedPageFaultInfo.decode(one, two)),
    ExitCode.TASK_SWITCH: lambda one, two: str(TaskSwitchInfo.decode(one, two)),
    ExitCode.MSR: lambda one, _two: "WRMSR" if one & 1 else "RDMSR",
    ExitCode.SWINT: lambda one, _two: f"vector {one & 0xFF:#04x}",
    ExitCode.INVLPG: lambda one, _two: f"linear {one & 0xFFFF_FFFF:08x}",
}


def _exit_lines(block: Vmcb) -> list[str]:
    return [
        f"exitcode     {describe_exit(block.exitcode, block.exitinfo1, block.exitinfo2)}",
        f"exitinfo     1 {block.exitinfo1:016x}  2 {block.exitinfo2:016x}",
        f"exitintinfo  {_event(block.exitintinfo)}",
        f"eventinj     {_event(block.eventinj)}",
        f"nrip         {block.nrip:08x}  instruction {block.instruction_bytes.hex(' ') or '-'}",
    ]


def _event(bits: int) -> str:
    try:
        return str(Event.decode(bits) or "-")
    except ValueError:
        return f"{bits:016x}, a reserved type"


def _control_lines(block: Vmcb) -> list[str]:
    names = intercepts.names_of(
        block.intercept_cr, block.intercept_dr, block.intercept_exceptions,
        block.intercept3, block.intercept4, block.intercept5,
    )  # fmt: skip
    v_intr = block.v_intr
    flags = [name for bit, name in _V_INTR_FLAGS.items() if v_intr & bit]
    vector, priority = v_intr >> V_INTR_VECTOR_SHIFT & 0xFF, v_intr >> V_INTR_PRIO_SHIFT & 0xF
    state = block.interrupt_state
    shadows = ["INTERRUPT_SHADOW"] * bool(state & INTERRUPT_SHADOW)
    shadows += ["GUEST_INTERRUPT_MASK"] * bool(state & GUEST_INTERRUPT_MASK)
    tlb = block.tlb_control
    return [
        *_wrapped("intercepts", names),
        f"maps         iopm {block.iopm_base_pa:016x}  msrpm {block.msrpm_base_pa:016x}",
        f"paging       {'nested' if block.np_control & NP_ENABLE else 'shadow'}  n_cr3 {block.n_cr3:016x}",
        f"asid         {block.guest_asid}  tlb_control {tlb} ({_TLB_CONTROLS.get(tlb, 'reserved')})",
        f"tsc_offset   {block.tsc_offset:016x}",
        f"v_intr       vector {vector:#04x}  priority {priority}  V_TPR {v_intr & V_TPR_MASK:#04x}  "
        + (" ".join(flags) or "-"),
        f"int_state    {' '.join(shadows) or '-'}",
        f"clean        {block.clean_bits:08x}  lbr {'on' if block.lbr_control & LBR_VIRTUALIZATION else 'off'}",
    ]


def _wrapped(title: str, words: list[str]) -> list[str]:
    lines = [f"{title:12}"]
    for word in words or ["-"]:
        if len(lines[-1]) + 1 + len(word) > _LINE_COLUMNS:
            lines.append(" " * 12)
        lines[-1] += f" {word}"
    return lines


def _save_lines(block: Vmcb) -> list[str]:
    lines = []
    for name in SEGMENT_NAMES:
        selector, base, limit, attributes = block.segment(name)
        if name in ("gdtr", "idtr"):
            lines.append(f"{name:12}       base {base:08x}  limit {limit:08x}")
        else:
            usable = "" if attributes & 0x80 else "  not present"
            lines.append(
                f"{name:12} {selector:04x}  base {base:08x}  limit {limit:08x}  attrib {attributes:03x}{usable}"
            )
    return [
        *lines,
        f"rip          {block.rip:08x}  rsp {block.rsp:08x}  rax {block.rax:08x}  cpl {block.cpl}",
        f"rflags       {block.rflags:08x}  {describe_eflags(block.rflags & 0xFFFF_FFFF)}",
        f"cr0          {block.cr0:08x}  cr2 {block.cr2:08x}  cr3 {block.cr3:08x}  cr4 {block.cr4:08x}",
        f"dr6          {block.dr6:08x}  dr7 {block.dr7:08x}  efer {block.efer:08x}",
        f"sysenter     cs {block.sysenter_cs:08x}  esp {block.sysenter_esp:08x}  eip {block.sysenter_eip:08x}",
    ]
