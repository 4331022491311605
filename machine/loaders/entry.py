"""The state in which a loaded image finds the CPU at its first instruction.

It owns the register values that the boot protocols ask for; it must not know where the image came from, nor run it.
"""

from dataclasses import dataclass

from machine.memory import PhysicalMemory
from machine.state import (
    CR0_ET,
    CR0_PE,
    CS,
    EDX,
    SEG_ACCESSED,
    SEG_CODE,
    SEG_DB,
    SEG_G,
    SEG_PRESENT,
    SEG_READ_WRITE,
    SEG_S,
    CpuState,
)

#: Where the BIOS ROM keeps descriptor tables for entries in protected mode: code 08h, data 10h, all flat.
FLAT_GDT = 0xF0020
FLAT_GDT_BYTES = 5 * 8
#: The Linux boot protocol wants code at 10h and data at 18h.
LINUX_GDT = 0xF0048
LINUX_GDT_BYTES = 4 * 8

#: ESP where the boot protocol leaves it undefined: a kernel that pushes too early gets away with it, as under a BIOS.
STACK_TOP = 0x7C00

_DATA = SEG_PRESENT | SEG_S | SEG_READ_WRITE | SEG_ACCESSED
_FLAT_DATA = _DATA | SEG_DB | SEG_G
_FLAT_CODE = _FLAT_DATA | SEG_CODE


@dataclass(frozen=True, slots=True)
class SegmentEntry:
    """One segment register: selector, base, limit in bytes, attributes as `machine.state.SEG_*`."""

    selector: int
    base: int
    limit: int
    attributes: int


@dataclass(frozen=True, slots=True)
class EntryState:
    """Registers at the first instruction of an image; what is not named here is as after reset.

    Attributes:
        gpr: EAX ECX EDX EBX ESP EBP ESI EDI.
        segments: ES CS SS DS FS GS.
        gdtr: base and limit in bytes.
        idtr: base and limit in bytes.
        a20: the gate of address line 20 is open.
    """

    gpr: tuple[int, int, int, int, int, int, int, int]
    eip: int
    segments: tuple[SegmentEntry, ...]
    cr0: int
    eflags: int = 2
    gdtr: tuple[int, int] = (0, 0xFFFF)
    idtr: tuple[int, int] = (0, 0x3FF)
    a20: bool = True

    @property
    def protected(self) -> bool:
        """True for an entry in 32-bit protected mode, False for real mode."""
        return bool(self.cr0 & CR0_PE)

    @property
    def linear(self) -> int:
        """Linear address of the first instruction."""
        return (self.segments[CS].base + self.eip) & 0xFFFF_FFFF


def flat_entry(eip: int, *, eax: int = 0, ebx: int = 0, esp: int = 0) -> EntryState:
    """32-bit protected mode without paging, flat 4 GiB segments at CPL 0, interrupts off, A20 open.

    GDTR points at the table in the BIOS ROM, so that reloading the selectors works, as under QEMU.

    Source: Multiboot Specification 0.6.96, "Machine state".
    """
    return EntryState(
        gpr=(eax, 0, 0, ebx, esp, 0, 0, 0),
        eip=eip,
        segments=_flat_segments(0x08, 0x10),
        cr0=CR0_PE | CR0_ET,
        gdtr=(FLAT_GDT, FLAT_GDT_BYTES - 1),
    )


def linux_entry(eip: int, boot_params: int) -> EntryState:
    """The 32-bit Linux boot protocol: flat segments 10h and 18h, ESI at the boot parameters, EBP, EDI and EBX zero.

    Source: Linux kernel documentation, "The Linux/x86 Boot Protocol", 32-bit boot protocol.
    """
    return EntryState(
        gpr=(0, 0, 0, 0, STACK_TOP, 0, boot_params, 0),
        eip=eip,
        segments=_flat_segments(0x10, 0x18),
        cr0=CR0_PE | CR0_ET,
        gdtr=(LINUX_GDT, LINUX_GDT_BYTES - 1),
    )


def real_entry(linear: int) -> EntryState:
    """Real mode at a linear address below 1 MiB; the data segments are CS, SP is 7C00h, interrupts are on.

    Below 64 KiB CS is 0, so that 7C00h is entered as a boot sector is; above, CS is the 64 KiB block.
    """
    selector = linear >> 4 & 0xF000
    segment = SegmentEntry(selector, selector << 4, 0xFFFF, _DATA)
    return EntryState(
        gpr=(0, 0, 0, 0, STACK_TOP, 0, 0, 0),
        eip=linear & 0xFFFF,
        segments=(segment,) * 6,
        cr0=CR0_ET,
        eflags=0x202,
    )


def reset_entry() -> EntryState:
    """The reset vector of the BIOS, F000:FFF0 with the base of the top 64 KiB."""
    data = SegmentEntry(0, 0, 0xFFFF, _DATA)
    code = SegmentEntry(0xF000, 0xFFFF_0000, 0xFFFF, _DATA)
    after_reset = CpuState()
    return EntryState(
        gpr=(0, 0, after_reset.gpr[EDX], 0, 0, 0, 0, 0),
        eip=0xFFF0,
        segments=(data, code, data, data, data, data),
        cr0=after_reset.cr0,
        idtr=(0, 0xFFFF),
    )


def apply(entry: EntryState, cpu: CpuState, memory: PhysicalMemory) -> None:
    """Reset `cpu` and give it the entry's registers; set the A20 gate."""
    cpu.reset()
    cpu.gpr[:] = entry.gpr
    cpu.eip = entry.eip
    cpu.eflags = entry.eflags
    cpu.cr0 = entry.cr0
    for segment, values in zip(cpu.segments, entry.segments, strict=True):
        segment.load(values.selector, values.base, values.limit, values.attributes)
    cpu.gdtr.base, cpu.gdtr.limit = entry.gdtr
    cpu.idtr.base, cpu.idtr.limit = entry.idtr
    memory.a20_enabled = entry.a20


def _flat_segments(code: int, data: int) -> tuple[SegmentEntry, ...]:
    flat_data = SegmentEntry(data, 0, 0xFFFF_FFFF, _FLAT_DATA)
    flat_code = SegmentEntry(code, 0, 0xFFFF_FFFF, _FLAT_CODE)
    return (flat_data, flat_code, flat_data, flat_data, flat_data, flat_data)
