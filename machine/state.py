"""The registers of the CPU, and the one declared layout in which engines, snapshots and comparisons exchange them.

Values only: what the bits make the CPU do is known to the modules that execute instructions.

Source: SDM Vol. 3A, "System Architecture Overview" and "IA-32 Processor States Following Power-up, Reset, or INIT".
"""

from __future__ import annotations

from enum import IntEnum

from construct import Array, Bytes, Int16ul, Int32ul, Int64ul, Struct

from machine.fpustate import FXSAVE_BYTES, FpuState

MASK32 = 0xFFFF_FFFF


class Gpr(IntEnum):
    """General-purpose registers by their encoding in ModRM."""

    EAX = 0
    ECX = 1
    EDX = 2
    EBX = 3
    ESP = 4
    EBP = 5
    ESI = 6
    EDI = 7


EAX, ECX, EDX, EBX, ESP, EBP, ESI, EDI = range(8)


class SegmentRegister(IntEnum):
    """Segment registers by their encoding in the Sreg field."""

    ES = 0
    CS = 1
    SS = 2
    DS = 3
    FS = 4
    GS = 5


ES, CS, SS, DS, FS, GS = range(6)

CR0_PE = 1 << 0
CR0_MP = 1 << 1
CR0_EM = 1 << 2
CR0_TS = 1 << 3
CR0_ET = 1 << 4
CR0_NE = 1 << 5
CR0_WP = 1 << 16
CR0_AM = 1 << 18
CR0_NW = 1 << 29
CR0_CD = 1 << 30
CR0_PG = 1 << 31

CR4_VME = 1 << 0
CR4_PVI = 1 << 1
CR4_TSD = 1 << 2
CR4_DE = 1 << 3
CR4_PSE = 1 << 4
CR4_PAE = 1 << 5
CR4_MCE = 1 << 6
CR4_PGE = 1 << 7
CR4_PCE = 1 << 8
CR4_OSFXSR = 1 << 9
CR4_OSXMMEXCPT = 1 << 10

# DR6 says what a #DB happened for; bits 0 to 3 are the breakpoints that matched.
DR6_BD = 1 << 13  # MOV DR while DR7.GD is set
DR6_BS = 1 << 14  # single step
DR6_BT = 1 << 15  # task switch to a TSS with the T bit
DR6_WRITABLE = 0x0000_E00F
DR6_FIXED = 0xFFFF_0FF0
DR7_LOCAL = 0x155  # L0 to L3 and LE: a task switch clears them
DR7_GD = 1 << 13
DR7_WRITABLE = 0xFFFF_23FF
DR7_FIXED = 0x0000_0400

# Segment attributes: descriptor bits 47:40 and 55:52 squeezed into 12 bits, the form in which a VMCB keeps them
# (AMD64 APM Vol. 2, "Segment State in the VMCB").
SEG_TYPE = 0xF
SEG_ACCESSED = 1
SEG_READ_WRITE = 2  # data: writable; code: readable
SEG_CONFORMING_EXPAND_DOWN = 4
SEG_CODE = 8
SEG_S = 0x10  # code or data, not a system segment
SEG_DPL_SHIFT = 5
SEG_DPL = 0x60
SEG_PRESENT = 0x80
SEG_AVL = 0x100
SEG_DB = 0x400
SEG_G = 0x800

NOTHING_LOW = 1 << 32  # a lower bound that no 32-bit offset reaches: the empty range


class Segment:
    """A segment register with its hidden part.

    `read_low`..`read_high` and `write_low`..`write_high` are the offsets (inclusive) that an access may touch; they
    follow from limit and attributes, so that the check on the hot path is one comparison. `hidden` is base, limit and
    attributes in one tuple, a new one with each load.
    """

    __slots__ = (
        "attributes",
        "base",
        "hidden",
        "limit",
        "read_high",
        "read_low",
        "selector",
        "write_high",
        "write_low",
    )

    def __init__(self) -> None:
        self.load(0, 0, 0xFFFF, SEG_PRESENT | SEG_S | SEG_READ_WRITE | SEG_ACCESSED)

    def load(self, selector: int, base: int, limit: int, attributes: int) -> None:
        """Set visible and hidden part; `limit` is in bytes, granularity already applied; `attributes` as `SEG_*`."""
        self.selector = selector
        self.base = base
        self.limit = limit
        self.attributes = attributes
        self._derive()

    def _derive(self) -> None:
        attributes = self.attributes
        self.hidden = (self.base, self.limit, attributes)
        self.read_low = self.write_low = NOTHING_LOW
        self.read_high = self.write_high = 0
        if attributes & (SEG_PRESENT | SEG_S) != SEG_PRESENT | SEG_S:
            return
        if attributes & SEG_CODE:
            if attributes & SEG_READ_WRITE:
                self.read_low, self.read_high = 0, self.limit
            return
        if attributes & SEG_CONFORMING_EXPAND_DOWN:
            low, high = self.limit + 1, MASK32 if attributes & SEG_DB else 0xFFFF
        else:
            low, high = 0, self.limit
        self.read_low, self.read_high = low, high
        if attributes & SEG_READ_WRITE:
            self.write_low, self.write_high = low, high

    def copy_from(self, other: Segment) -> None:
        """Take over all parts of `other`."""
        self.load(other.selector, other.base, other.limit, other.attributes)

    @property
    def fields(self) -> tuple[int, int, int, int]:
        """Selector, base, limit in bytes, attributes."""
        return self.selector, self.base, self.limit, self.attributes

    @property
    def dpl(self) -> int:
        """Descriptor privilege level."""
        return self.attributes >> SEG_DPL_SHIFT & 3

    @property
    def present(self) -> bool:
        """False after a null selector was loaded: every use faults."""
        return bool(self.attributes & SEG_PRESENT)

    @property
    def big(self) -> bool:
        """The D/B bit: 32-bit code, or a 32-bit stack."""
        return bool(self.attributes & SEG_DB)

    def __repr__(self) -> str:
        selector, base, limit, attributes = self.fields
        return f"Segment({selector:#06x}, {base=:#x}, {limit=:#x}, {attributes=:#05x})"


class TableRegister:
    """GDTR or IDTR."""

    __slots__ = ("base", "limit")

    def __init__(self) -> None:
        self.base = 0
        self.limit = 0xFFFF


SEGMENT_LAYOUT = Struct("selector" / Int16ul, "attributes" / Int16ul, "limit" / Int32ul, "base" / Int32ul)
TABLE_LAYOUT = Struct("base" / Int32ul, "limit" / Int32ul)
STATE_LAYOUT = Struct(
    "gpr" / Array(8, Int32ul),
    "eip" / Int32ul,
    "eflags" / Int32ul,
    "segments" / Array(6, SEGMENT_LAYOUT),
    "ldtr" / SEGMENT_LAYOUT,
    "tr" / SEGMENT_LAYOUT,
    "gdtr" / TABLE_LAYOUT,
    "idtr" / TABLE_LAYOUT,
    "cr0" / Int32ul,
    "cr2" / Int32ul,
    "cr3" / Int32ul,
    "cr4" / Int32ul,
    "dr" / Array(8, Int32ul),
    "cpl" / Int32ul,
    "shadow" / Int32ul,
    "halted" / Int32ul,
    "nmi_blocked" / Int32ul,
    "sysenter_cs" / Int32ul,
    "sysenter_esp" / Int32ul,
    "sysenter_eip" / Int32ul,
    "tsc_offset" / Int64ul,
    "fpu" / Bytes(FXSAVE_BYTES),
)

# CpuState.shadow: interrupts are held off for one instruction after STI; debug traps too after MOV SS and POP SS.
SHADOW_NONE = 0
SHADOW_STI = 1
SHADOW_MOV_SS = 2

_SCALARS = (
    "eip", "eflags", "cr0", "cr2", "cr3", "cr4", "cpl", "shadow", "halted", "nmi_blocked",
    "sysenter_cs", "sysenter_esp", "sysenter_eip", "tsc_offset",
)  # fmt: skip


class CpuState:
    """Every architectural register. The lists keep their identity for life: instruction closures hold on to them.

    Attributes:
        gpr: EAX ECX EDX EBX ESP EBP ESI EDI, 32 bits each.
        eip: offset in CS of the next instruction (during a block: of its first instruction).
        eflags: all 32 bits, status flags always up to date, bit 1 set.
        segments: ES CS SS DS FS GS.
        cpl: current privilege level; 3 in virtual-8086 mode, 0 in real mode.
        shadow: SHADOW_*: what the previous instruction holds off.
        halted: 1 between HLT and the next interrupt.
        nmi_blocked: 1 between delivery of an NMI and the next IRET.
        tsc_offset: added to the clock's TSC, modulo 2**64 (WRMSR to the TSC sets it).
        fpu: the registers of x87, MMX and SSE; a CPU model without them leaves them alone.
    """

    def __init__(self) -> None:
        self.gpr = [0] * 8
        self.segments = [Segment() for _ in range(6)]
        self.ldtr = Segment()
        self.tr = Segment()
        self.gdtr = TableRegister()
        self.idtr = TableRegister()
        self.dr = [0] * 8
        self.fpu = FpuState()
        self.reset()

    def reset(self) -> None:
        """Power-up values: real mode at F000:FFF0 with the base of the top 64 KiB."""
        self.gpr[:] = [0, 0, 0x600, 0, 0, 0, 0, 0]
        self.eip = 0xFFF0
        self.eflags = 2
        data = SEG_PRESENT | SEG_S | SEG_READ_WRITE | SEG_ACCESSED
        for segment in self.segments:
            segment.load(0, 0, 0xFFFF, data)
        self.segments[CS].load(0xF000, 0xFFFF_0000, 0xFFFF, data)
        self.ldtr.load(0, 0, 0xFFFF, SEG_PRESENT | 2)
        self.tr.load(0, 0, 0xFFFF, SEG_PRESENT | 0xB)
        for table in (self.gdtr, self.idtr):
            table.base, table.limit = 0, 0xFFFF
        self.cr0 = CR0_CD | CR0_NW | CR0_ET
        self.cr2 = self.cr3 = self.cr4 = 0
        self.dr[:] = [0, 0, 0, 0, 0, 0, DR6_FIXED, DR7_FIXED]
        self.cpl = 0
        self.shadow = SHADOW_NONE
        self.halted = 0
        self.nmi_blocked = 0
        self.sysenter_cs = self.sysenter_esp = self.sysenter_eip = 0
        self.tsc_offset = 0
        self.fpu.reset()

    def pack(self) -> bytes:
        """The state in `STATE_LAYOUT`."""
        values: dict[str, object] = {name: getattr(self, name) for name in _SCALARS}
        values |= {"gpr": self.gpr, "dr": self.dr}
        values["segments"] = [_segment_fields(segment) for segment in self.segments]
        values |= {"ldtr": _segment_fields(self.ldtr), "tr": _segment_fields(self.tr)}
        values["gdtr"] = {"base": self.gdtr.base, "limit": self.gdtr.limit}
        values["idtr"] = {"base": self.idtr.base, "limit": self.idtr.limit}
        values["fpu"] = self.fpu.pack()
        packed: bytes = STATE_LAYOUT.build(values)
        return packed

    def unpack(self, data: bytes) -> None:
        """Load what `pack` made."""
        parsed = STATE_LAYOUT.parse(data)
        for name in _SCALARS:
            setattr(self, name, parsed[name])
        self.gpr[:] = parsed.gpr
        self.dr[:] = parsed.dr
        for segment, fields in zip(
            (*self.segments, self.ldtr, self.tr), (*parsed.segments, parsed.ldtr, parsed.tr), strict=True
        ):
            segment.load(fields.selector, fields.base, fields.limit, fields.attributes)
        for table, fields in ((self.gdtr, parsed.gdtr), (self.idtr, parsed.idtr)):
            table.base, table.limit = fields.base, fields.limit
        self.fpu.unpack(parsed.fpu)


def _segment_fields(segment: Segment) -> dict[str, int]:
    return {name: getattr(segment, name) for name in ("selector", "attributes", "limit", "base")}
