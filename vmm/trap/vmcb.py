"""The virtual machine control block: 4 KiB in the layout of the AMD64 manual, its fields as attributes.

The layout is declared once and read with offsets computed from it. It must not know who runs the guest, nor what the
fields make the hardware do.

Source: AMD64 APM Vol. 2, appendix B "Layout of VMCB".
"""

from __future__ import annotations

import mmap
from typing import Final, overload

from construct import Bytes, Int8ul, Int16ul, Int32ul, Int64ul, Padding, Struct

VMCB_BYTES: Final = 4096
SAVE_AREA: Final = 0x400
"""Byte offset of the state save area; the control area lies before it."""

SEGMENT_NAMES: Final = ("es", "cs", "ss", "ds", "fs", "gs", "gdtr", "ldtr", "idtr", "tr")
"""The segments of the save area in their order; each is selector, attributes, limit and base."""

# TLB_CONTROL.
TLB_KEEP, TLB_FLUSH_ALL, TLB_FLUSH_GUEST, TLB_FLUSH_GUEST_NONGLOBAL = 0, 1, 3, 7

# The quadword with the virtual interrupt.
V_TPR_MASK = 0xFF
V_IRQ = 1 << 8
V_GIF = 1 << 9
V_NMI = 1 << 11
V_NMI_MASK = 1 << 12
V_INTR_PRIO_SHIFT = 16
V_IGN_TPR = 1 << 20
V_INTR_MASKING = 1 << 24
V_GIF_ENABLE = 1 << 25
V_NMI_ENABLE = 1 << 26
V_INTR_VECTOR_SHIFT = 32

INTERRUPT_SHADOW = 1 << 0
GUEST_INTERRUPT_MASK = 1 << 1

NP_ENABLE = 1 << 0
LBR_VIRTUALIZATION = 1 << 0

EFER_SVME = 1 << 12

_CONTROL = Struct(
    "intercept_cr" / Int32ul,
    "intercept_dr" / Int32ul,
    "intercept_exceptions" / Int32ul,
    "intercept3" / Int32ul,
    "intercept4" / Int32ul,
    "intercept5" / Int32ul,
    Padding(0x24),
    "pause_filter_threshold" / Int16ul,
    "pause_filter_count" / Int16ul,
    "iopm_base_pa" / Int64ul,
    "msrpm_base_pa" / Int64ul,
    "tsc_offset" / Int64ul,
    "guest_asid" / Int32ul,
    "tlb_control" / Int8ul,
    Padding(3),
    "v_intr" / Int64ul,
    "interrupt_state" / Int64ul,
    "exitcode" / Int64ul,
    "exitinfo1" / Int64ul,
    "exitinfo2" / Int64ul,
    "exitintinfo" / Int64ul,
    "np_control" / Int64ul,
    "avic_apic_bar" / Int64ul,
    "ghcb_pa" / Int64ul,
    "eventinj" / Int64ul,
    "n_cr3" / Int64ul,
    "lbr_control" / Int64ul,
    "clean_bits" / Int32ul,
    Padding(4),
    "nrip" / Int64ul,
    "fetched_bytes" / Int8ul,
    "instruction_bytes" / Bytes(15),
    "avic_backing_page" / Int64ul,
    Padding(8),
    "avic_logical_table" / Int64ul,
    "avic_physical_table" / Int64ul,
    Padding(8),
    "vmsa_pa" / Int64ul,
    Padding(SAVE_AREA - 0x110),
)
_SEGMENT = Struct("selector" / Int16ul, "attributes" / Int16ul, "limit" / Int32ul, "base" / Int64ul)
_SAVE = Struct(
    *(name / _SEGMENT for name in SEGMENT_NAMES),
    Padding(0xCB - 0xA0),
    "cpl" / Int8ul,
    Padding(4),
    "efer" / Int64ul,
    Padding(0x148 - 0xD8),
    "cr4" / Int64ul,
    "cr3" / Int64ul,
    "cr0" / Int64ul,
    "dr7" / Int64ul,
    "dr6" / Int64ul,
    "rflags" / Int64ul,
    "rip" / Int64ul,
    Padding(0x1D8 - 0x180),
    "rsp" / Int64ul,
    "s_cet" / Int64ul,
    "ssp" / Int64ul,
    "isst_addr" / Int64ul,
    "rax" / Int64ul,
    "star" / Int64ul,
    "lstar" / Int64ul,
    "cstar" / Int64ul,
    "sfmask" / Int64ul,
    "kernel_gs_base" / Int64ul,
    "sysenter_cs" / Int64ul,
    "sysenter_esp" / Int64ul,
    "sysenter_eip" / Int64ul,
    "cr2" / Int64ul,
    Padding(0x268 - 0x248),
    "g_pat" / Int64ul,
    "dbgctl" / Int64ul,
    "br_from" / Int64ul,
    "br_to" / Int64ul,
    "last_excp_from" / Int64ul,
    "last_excp_to" / Int64ul,
    Padding(VMCB_BYTES - SAVE_AREA - 0x298),
)
VMCB_LAYOUT: Final = Struct("control" / _CONTROL, "save" / _SAVE)
"""The whole block; a field of a segment is reached as `save.cs.base`."""


def _places(layout: Struct, base: int) -> dict[str, tuple[int, int]]:
    places: dict[str, tuple[int, int]] = {}
    for part in layout.subcons:
        if part.name:
            places[part.name] = base, part.sizeof()
        base += part.sizeof()
    return places


_IN_CONTROL: Final = _places(_CONTROL, 0)
_IN_SAVE: Final = _places(_SAVE, SAVE_AREA)
_IN_SEGMENT: Final = _places(_SEGMENT, 0)
PLACES: Final[dict[str, tuple[int, int]]] = {
    **_IN_CONTROL,
    **_IN_SAVE,
    **{
        f"{segment}.{name}": (_IN_SAVE[segment][0] + at, size)
        for segment in SEGMENT_NAMES
        for name, (at, size) in _IN_SEGMENT.items()
    },
}
"""Byte offset in the block and size in bytes of each field by name; a segment's parts as `cs.base`."""

_VIEW_OF_SIZE: Final = {1: 0, 2: 1, 4: 2, 8: 3}


def offset_of(name: str) -> int:
    """The byte offset of a field in the block."""
    return PLACES[name][0]


class Field:
    """A field of the block as an attribute that counts how often it is read and written."""

    __slots__ = ("_index", "_view", "size_bytes")

    def __init__(self, name: str) -> None:
        at, self.size_bytes = PLACES[name]
        self._view = _VIEW_OF_SIZE[self.size_bytes]
        self._index = at // self.size_bytes

    @overload
    def __get__(self, block: None, owner: type[Vmcb]) -> Field: ...
    @overload
    def __get__(self, block: Vmcb, owner: type[Vmcb]) -> int: ...
    def __get__(self, block: Vmcb | None, owner: type[Vmcb]) -> int | Field:
        if block is None:
            return self
        block.reads += 1
        return block.views[self._view][self._index]

    def __set__(self, block: Vmcb, value: int) -> None:
        block.writes += 1
        block.views[self._view][self._index] = value


class Vmcb:
    """One control block.

    Attributes:
        page: its 4096 bytes.
        views: of the page, as bytes, words, doublewords and quadwords; what reads them is not counted.
        reads, writes: how often the VMM used a field by name: what each costs on real hardware was published.
    """

    __slots__ = ("page", "reads", "views", "writes")

    intercept_cr = Field("intercept_cr")
    intercept_dr = Field("intercept_dr")
    intercept_exceptions = Field("intercept_exceptions")
    intercept3 = Field("intercept3")
    intercept4 = Field("intercept4")
    intercept5 = Field("intercept5")
    pause_filter_threshold = Field("pause_filter_threshold")
    pause_filter_count = Field("pause_filter_count")
    iopm_base_pa = Field("iopm_base_pa")
    msrpm_base_pa = Field("msrpm_base_pa")
    tsc_offset = Field("tsc_offset")
    guest_asid = Field("guest_asid")
    tlb_control = Field("tlb_control")
    v_intr = Field("v_intr")
    interrupt_state = Field("interrupt_state")
    exitcode = Field("exitcode")
    exitinfo1 = Field("exitinfo1")
    exitinfo2 = Field("exitinfo2")
    exitintinfo = Field("exitintinfo")
    np_control = Field("np_control")
    eventinj = Field("eventinj")
    n_cr3 = Field("n_cr3")
    lbr_control = Field("lbr_control")
    clean_bits = Field("clean_bits")
    nrip = Field("nrip")
    fetched_bytes = Field("fetched_bytes")
    cpl = Field("cpl")
    efer = Field("efer")
    cr0 = Field("cr0")
    cr2 = Field("cr2")
    cr3 = Field("cr3")
    cr4 = Field("cr4")
    dr6 = Field("dr6")
    dr7 = Field("dr7")
    rflags = Field("rflags")
    rip = Field("rip")
    rsp = Field("rsp")
    rax = Field("rax")
    sysenter_cs = Field("sysenter_cs")
    sysenter_esp = Field("sysenter_esp")
    sysenter_eip = Field("sysenter_eip")
    g_pat = Field("g_pat")
    dbgctl = Field("dbgctl")

    def __init__(self) -> None:
        self.page = mmap.mmap(-1, VMCB_BYTES)
        whole = memoryview(self.page)
        self.views = whole, whole.cast("H"), whole.cast("I"), whole.cast("Q")
        self.reads = self.writes = 0

    def clear(self) -> None:
        """Fill the block with zeros."""
        self.views[0][:] = bytes(VMCB_BYTES)

    @property
    def instruction_bytes(self) -> bytes:
        """What the hardware fetched of the instruction that exited, up to 15 bytes."""
        at = offset_of("instruction_bytes")
        return bytes(self.views[0][at : at + min(15, self.fetched_bytes)])

    def set_instruction_bytes(self, code: bytes) -> None:
        """Write them; ValueError for more than 15."""
        if len(code) > 15:
            raise ValueError(f"an instruction has at most 15 bytes, not {len(code)}")
        self.fetched_bytes = len(code)
        at = offset_of("instruction_bytes")
        self.views[0][at : at + 15] = code.ljust(15, b"\0")

    def segment(self, name: str) -> tuple[int, int, int, int]:
        """Selector, base, limit in bytes, attributes of a segment of `SEGMENT_NAMES`."""
        at = offset_of(name)
        _, halves, words, quads = self.views
        return halves[at // 2], quads[at // 8 + 1], words[at // 4 + 1], halves[at // 2 + 1]

    def set_segment(self, name: str, selector: int, base: int, limit: int, attributes: int) -> None:
        """Write a segment of `SEGMENT_NAMES`."""
        at = offset_of(name)
        _, halves, words, quads = self.views
        halves[at // 2], halves[at // 2 + 1] = selector, attributes
        words[at // 4 + 1], quads[at // 8 + 1] = limit, base
