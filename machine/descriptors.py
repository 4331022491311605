"""Descriptors: their eight bytes taken apart and put together, and where GDT, LDT and IDT keep them.

It knows layouts, table limits and the accessed and busy bits; who may use a descriptor for what is not known here.

Source: SDM Vol. 3A, "Segment Descriptors", "System Descriptor Types", "Call Gates" and "IDT Descriptors".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from construct import BitsInteger, BitStruct, ByteSwapped, Flag

from machine.faults import TI
from machine.state import (
    MASK32,
    SEG_ACCESSED,
    SEG_CODE,
    SEG_CONFORMING_EXPAND_DOWN,
    SEG_G,
    SEG_PRESENT,
    SEG_READ_WRITE,
    SEG_S,
    SEG_TYPE,
)

if TYPE_CHECKING:
    from machine.cpu import Cpu

RPL: Final = 3
SELECTOR_INDEX: Final = 0xFFFC  # index and TI: the part of a selector that goes into an error code

# Types of system descriptors, S = 0. Bit 3 says 32-bit.
TSS16: Final = 0x1
LDT: Final = 0x2
TSS16_BUSY: Final = 0x3
CALL_GATE16: Final = 0x4
TASK_GATE: Final = 0x5
INTERRUPT_GATE16: Final = 0x6
TRAP_GATE16: Final = 0x7
TSS32: Final = 0x9
TSS32_BUSY: Final = 0xB
CALL_GATE32: Final = 0xC
INTERRUPT_GATE32: Final = 0xE
TRAP_GATE32: Final = 0xF

BUSY: Final = 0x2
IS_32: Final = 0x8

KINDS: Final = {
    TSS16: "TSS16",
    LDT: "LDT",
    TSS16_BUSY: "TSS16 busy",
    CALL_GATE16: "call gate16",
    TASK_GATE: "task gate",
    INTERRUPT_GATE16: "interrupt gate16",
    TRAP_GATE16: "trap gate16",
    TSS32: "TSS32",
    TSS32_BUSY: "TSS32 busy",
    CALL_GATE32: "call gate32",
    INTERRUPT_GATE32: "interrupt gate32",
    TRAP_GATE32: "trap gate32",
}
GATES: Final = frozenset(
    (CALL_GATE16, TASK_GATE, INTERRUPT_GATE16, TRAP_GATE16, CALL_GATE32, INTERRUPT_GATE32, TRAP_GATE32)
)

SEGMENT_DESCRIPTOR: Final = ByteSwapped(
    BitStruct(
        "base_high" / BitsInteger(8),
        "granularity" / Flag,
        "big" / Flag,
        "reserved" / Flag,
        "available" / Flag,
        "limit_high" / BitsInteger(4),
        "present" / Flag,
        "dpl" / BitsInteger(2),
        "segment" / Flag,
        "type" / BitsInteger(4),
        "base_low" / BitsInteger(24),
        "limit_low" / BitsInteger(16),
    )
)
GATE_DESCRIPTOR: Final = ByteSwapped(
    BitStruct(
        "offset_high" / BitsInteger(16),
        "present" / Flag,
        "dpl" / BitsInteger(2),
        "segment" / Flag,
        "type" / BitsInteger(4),
        "reserved" / BitsInteger(3),
        "parameter_count" / BitsInteger(5),
        "selector" / BitsInteger(16),
        "offset_low" / BitsInteger(16),
    )
)


class Descriptor:
    """Eight bytes of a descriptor table, read once.

    Attributes:
        linear: where they stand.
        low, high: the two doublewords.
        attributes: as in `machine.state.SEG_*`.
        dpl: descriptor privilege level.
        type: the four bits of the type field.
    """

    __slots__ = ("attributes", "dpl", "high", "linear", "low", "type")

    def __init__(self, linear: int, raw: int) -> None:
        self.linear = linear
        self.low = raw & MASK32
        high = raw >> 32
        self.high = high
        self.attributes = (high >> 8 & 0xFF) | (high >> 12 & 0xF00)
        self.dpl = high >> 13 & 3
        self.type = high >> 8 & 0xF

    @property
    def base(self) -> int:
        """Segment base."""
        high = self.high
        return self.low >> 16 | (high & 0xFF) << 16 | high & 0xFF00_0000

    @property
    def limit(self) -> int:
        """Segment limit in bytes: the last valid offset, granularity applied."""
        limit = self.low & 0xFFFF | self.high & 0xF_0000
        return limit << 12 | 0xFFF if self.high & 0x80_0000 else limit

    @property
    def present(self) -> bool:
        """The P bit."""
        return bool(self.high & 0x8000)

    @property
    def system_type(self) -> int:
        """The type of a system descriptor or gate; -1 for code and data."""
        return -1 if self.high & 0x1000 else self.type

    @property
    def is_code(self) -> bool:
        """A code segment."""
        return self.attributes & (SEG_S | SEG_CODE) == SEG_S | SEG_CODE

    @property
    def is_conforming(self) -> bool:
        """A conforming code segment."""
        wanted = SEG_S | SEG_CODE | SEG_CONFORMING_EXPAND_DOWN
        return self.attributes & wanted == wanted

    @property
    def is_readable(self) -> bool:
        """Data, or code that may be read."""
        attributes = self.attributes
        return bool(attributes & SEG_S) and attributes & (SEG_CODE | SEG_READ_WRITE) != SEG_CODE

    @property
    def is_writable(self) -> bool:
        """Data that may be written."""
        return self.attributes & (SEG_S | SEG_CODE | SEG_READ_WRITE) == SEG_S | SEG_READ_WRITE

    @property
    def gate_selector(self) -> int:
        """Of a gate: the selector of the code segment or TSS."""
        return self.low >> 16

    @property
    def gate_offset(self) -> int:
        """Of a gate: the entry point; 16 bits in 16-bit gates."""
        low = self.low & 0xFFFF
        return low | self.high & 0xFFFF_0000 if self.type & IS_32 else low

    @property
    def gate_parameter_count(self) -> int:
        """Of a call gate: words or doublewords to copy."""
        return self.high & 0x1F


def encode_segment(base: int, limit_bytes: int, attributes: int) -> int:
    """The 64 bits of a segment, LDT or TSS descriptor.

    Args:
        base: linear address.
        limit_bytes: the last valid offset; with SEG_G its low 12 bits are lost (they count as ones).
        attributes: `SEG_*`.
    """
    limit = limit_bytes >> 12 if attributes & SEG_G else limit_bytes
    low = limit & 0xFFFF | (base & 0xFFFF) << 16
    high = base >> 16 & 0xFF | (attributes & 0xFF) << 8 | limit & 0xF_0000
    high |= (attributes & 0xF00) << 12 | base & 0xFF00_0000
    return low | high << 32


def encode_gate(kind: int, selector: int, offset: int, dpl: int = 0, parameter_count: int = 0) -> int:
    """The 64 bits of a present gate of type `kind`."""
    low = offset & 0xFFFF | selector << 16
    high = parameter_count | (SEG_PRESENT | dpl << 5 | kind) << 8 | offset & 0xFFFF_0000
    return low | high << 32


def read_descriptor(cpu: Cpu, selector: int) -> Descriptor | None:
    """The descriptor that a non-null `selector` names, or None if it lies beyond the limit of its table.

    Raises:
        PageFault: the table is not mapped.
    """
    state = cpu.state
    index = selector & 0xFFF8
    if selector & TI:
        table = state.ldtr
        if not table.attributes & SEG_PRESENT or index + 7 > table.limit:
            return None
        linear = (table.base + index) & MASK32
    else:
        if index + 7 > state.gdtr.limit:
            return None
        linear = (state.gdtr.base + index) & MASK32
    return Descriptor(linear, cpu.mmu.load_system(linear, 8))


def check_accessed(cpu: Cpu, descriptor: Descriptor) -> None:
    """Raise the PageFault that `mark_accessed` would raise, while nothing has been changed yet."""
    if not descriptor.attributes & SEG_ACCESSED:
        cpu.mmu.check_linear(descriptor.linear + 5, 1, write=True, user=False)


def mark_accessed(cpu: Cpu, descriptor: Descriptor) -> None:
    """Set the accessed bit of a code or data descriptor, in memory and in the copy; a set one costs no write."""
    if not descriptor.attributes & SEG_ACCESSED:
        descriptor.high |= SEG_ACCESSED << 8
        descriptor.attributes |= SEG_ACCESSED
        descriptor.type |= SEG_ACCESSED
        cpu.mmu.store_system(descriptor.linear + 5, 1, descriptor.high >> 8 & 0xFF)


def check_busy(cpu: Cpu, linear: int) -> None:
    """Raise the PageFault that `set_busy` at the descriptor at `linear` would raise."""
    cpu.mmu.check_linear(linear + 5, 1, write=True, user=False)


def set_busy(cpu: Cpu, linear: int, *, busy: bool) -> None:
    """Set or clear the busy bit of the TSS descriptor at `linear`."""
    access = cpu.mmu.load_system(linear + 5, 1)
    cpu.mmu.store_system(linear + 5, 1, access | BUSY if busy else access & ~BUSY)


@dataclass(frozen=True, slots=True)
class TableEntry:
    """One descriptor, for people to read.

    Attributes:
        index: its number in the table: the vector, for the IDT.
        selector: what names it (RPL 0); the vector, for the IDT.
        kind: such as "code32 readable", "data16 writable expand-down", "call gate32"; "reserved" for other types.
        is_gate: `gate_selector` and `gate_offset` mean something; otherwise `base` and `limit` do.
        raw: the 64 bits.
    """

    index: int
    selector: int
    kind: str
    is_gate: bool
    base: int
    limit: int
    gate_selector: int
    gate_offset: int
    parameter_count: int
    dpl: int
    present: bool
    attributes: int
    raw: int


def describe_kind(descriptor: Descriptor) -> str:
    """The type of a descriptor in words."""
    attributes = descriptor.attributes
    if not attributes & SEG_S:
        return KINDS.get(attributes & SEG_TYPE, "reserved")
    width = "32" if attributes & 0x400 else "16"
    if attributes & SEG_CODE:
        words = ["code" + width]
        words += ["readable"] if attributes & SEG_READ_WRITE else []
        words += ["conforming"] if attributes & SEG_CONFORMING_EXPAND_DOWN else []
    else:
        words = ["data" + width]
        words += ["writable"] if attributes & SEG_READ_WRITE else []
        words += ["expand-down"] if attributes & SEG_CONFORMING_EXPAND_DOWN else []
    words += ["accessed"] if attributes & SEG_ACCESSED else []
    return " ".join(words)


def list_table(cpu: Cpu, table: str) -> Iterator[TableEntry | None]:
    """All entries of the "gdt", "ldt" or "idt" (of protected mode), None where memory is not mapped; no side effects.

    Raises:
        ValueError: no such table.
    """
    state = cpu.state
    if table == "gdt":
        base, limit, step = state.gdtr.base, state.gdtr.limit, 8
    elif table == "ldt":
        base, limit, step = state.ldtr.base, state.ldtr.limit if state.ldtr.present else 0, 8
    elif table == "idt":
        base, limit, step = state.idtr.base, min(state.idtr.limit, 256 * 8 - 1), 1
    else:
        raise ValueError(f"there is no table {table!r}")
    for index in range((limit + 1) // 8):
        raw = _peek(cpu, base + index * 8)
        selector = index * step | (TI if table == "ldt" else 0)
        yield None if raw is None else _entry(index, selector, raw)


def _entry(index: int, selector: int, raw: int) -> TableEntry:
    descriptor = Descriptor(0, raw)
    is_gate = descriptor.system_type in GATES
    return TableEntry(
        index,
        selector,
        describe_kind(descriptor),
        is_gate,
        0 if is_gate else descriptor.base,
        0 if is_gate else descriptor.limit,
        descriptor.gate_selector if is_gate else 0,
        descriptor.gate_offset if is_gate else 0,
        descriptor.gate_parameter_count if is_gate else 0,
        descriptor.dpl,
        descriptor.present,
        descriptor.attributes,
        raw,
    )


def _peek(cpu: Cpu, linear: int) -> int | None:
    """Eight bytes of RAM for a debugger; None if a byte of them is not RAM."""
    data = bytearray()
    for at in range(linear, linear + 8):
        physical = cpu.mmu.probe(at & MASK32)
        if physical is None or cpu.memory.ram_address(physical) < 0:
            return None
        data += cpu.memory.read(physical, 1)
    return int.from_bytes(data, "little")
