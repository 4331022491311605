"""Descriptors: masks against the declared layout, table limits, accessed and busy bits, and what a debugger lists."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from machine.descriptors import (
    CALL_GATE16,
    CALL_GATE32,
    GATE_DESCRIPTOR,
    INTERRUPT_GATE32,
    SEGMENT_DESCRIPTOR,
    TASK_GATE,
    TSS32,
    Descriptor,
    TableEntry,
    check_accessed,
    describe_kind,
    encode_gate,
    encode_segment,
    list_table,
    mark_accessed,
    read_descriptor,
    set_busy,
)
from machine.faults import PageFault
from machine.state import CR0_PG, CR0_WP, SEG_ACCESSED, SEG_AVL, SEG_DB, SEG_G, SEG_PRESENT
from tests.machine.ring0 import (
    CODE0,
    DATA0,
    DATA3,
    FREE,
    GDT,
    IDT,
    LDT_BASE,
    TSS,
    TSS_SELECTOR,
    descriptor_of,
    protected_cpu,
    set_descriptor,
    set_gate,
)

RAW = st.integers(0, (1 << 64) - 1)


@given(RAW)
def test_masks_agree_with_the_layout_of_segments(raw: int) -> None:
    parsed = SEGMENT_DESCRIPTOR.parse(raw.to_bytes(8, "little"))
    descriptor = Descriptor(0, raw)
    assert descriptor.base == parsed.base_high << 24 | parsed.base_low
    limit = parsed.limit_high << 16 | parsed.limit_low
    assert descriptor.limit == (limit << 12 | 0xFFF if parsed.granularity else limit)
    assert descriptor.present == parsed.present
    assert descriptor.dpl == parsed.dpl
    assert descriptor.type == parsed.type
    assert descriptor.system_type == (-1 if parsed.segment else parsed.type)
    attributes = descriptor.attributes
    assert bool(attributes & SEG_PRESENT) == parsed.present
    assert bool(attributes & SEG_G) == parsed.granularity
    assert bool(attributes & SEG_DB) == parsed.big
    assert bool(attributes & SEG_AVL) == parsed.available
    is_code = parsed.segment and bool(parsed.type & 8)
    assert descriptor.is_code == is_code
    assert descriptor.is_conforming == (is_code and bool(parsed.type & 4))
    assert descriptor.is_writable == (parsed.segment and not parsed.type & 8 and bool(parsed.type & 2))
    assert descriptor.is_readable == (parsed.segment and (not parsed.type & 8 or bool(parsed.type & 2)))


@given(RAW)
def test_masks_agree_with_the_layout_of_gates(raw: int) -> None:
    parsed = GATE_DESCRIPTOR.parse(raw.to_bytes(8, "little"))
    descriptor = Descriptor(0, raw)
    assert descriptor.gate_selector == parsed.selector
    high = parsed.offset_high << 16 if parsed.type & 8 else 0
    assert descriptor.gate_offset == high | parsed.offset_low
    assert descriptor.gate_parameter_count == parsed.parameter_count


@given(st.integers(0, 0xFFFF_FFFF), st.integers(0, 0xF_FFFF), st.integers(0, 0xFFF).map(lambda bits: bits & ~0x200))
def test_encoding_a_segment_is_undone_by_reading_it(base: int, limit: int, attributes: int) -> None:
    limit_bytes = limit << 12 | 0xFFF if attributes & SEG_G else limit
    descriptor = Descriptor(0, encode_segment(base, limit_bytes, attributes))
    assert (descriptor.base, descriptor.limit, descriptor.attributes) == (base, limit_bytes, attributes)


def test_encoding_a_gate_is_undone_by_reading_it() -> None:
    gate = Descriptor(0, encode_gate(CALL_GATE32, 0x1234, 0x89ABCDEF, 3, 17))
    assert (gate.system_type, gate.gate_selector, gate.gate_offset) == (CALL_GATE32, 0x1234, 0x89ABCDEF)
    assert (gate.dpl, gate.present, gate.gate_parameter_count) == (3, True, 17)
    assert Descriptor(0, encode_gate(CALL_GATE16, 8, 0x89ABCDEF)).gate_offset == 0xCDEF


@pytest.mark.parametrize(("limit", "found"), [(FREE + 7, True), (FREE + 6, False), (FREE - 1, False)])
def test_the_last_byte_of_a_descriptor_must_lie_within_the_table(limit: int, found: bool) -> None:
    cpu = protected_cpu()
    cpu.state.gdtr.limit = limit
    assert (read_descriptor(cpu, FREE | 3) is not None) is found


def test_an_ldt_that_was_never_loaded_has_no_descriptors() -> None:
    cpu = protected_cpu()
    found = read_descriptor(cpu, 0x0C)
    assert found is not None
    assert found.linear == LDT_BASE + 8
    assert read_descriptor(cpu, 0x44) is None
    cpu.state.ldtr.load(0, 0, 0, 0)
    assert read_descriptor(cpu, 0x0C) is None


def test_the_accessed_bit_is_written_once() -> None:
    cpu = protected_cpu()
    raw = encode_segment(0x12345678, 0xFFFFF, 0x92)
    set_descriptor(cpu, FREE, raw)
    descriptor = read_descriptor(cpu, FREE)
    assert descriptor is not None
    mark_accessed(cpu, descriptor)
    assert descriptor.attributes & SEG_ACCESSED
    assert descriptor_of(cpu, FREE) == raw | SEG_ACCESSED << 40
    set_descriptor(cpu, FREE, raw)
    mark_accessed(cpu, descriptor)
    assert descriptor_of(cpu, FREE) == raw, "an accessed one is not written again"


def test_a_table_in_a_read_only_page_faults_before_the_bit_is_set() -> None:
    cpu = protected_cpu()
    set_descriptor(cpu, FREE, encode_segment(0, 0xFFFFF, 0x92))
    cpu.memory.write(0x1_0000, (0x1_1000 | 3).to_bytes(4, "little"))
    for page in range(32):
        cpu.memory.write(0x1_1000 + page * 4, (page << 12 | (1 if page == GDT >> 12 else 3)).to_bytes(4, "little"))
    cpu.state.cr3 = 0x1_0000
    cpu.state.cr0 |= CR0_PG | CR0_WP
    descriptor = read_descriptor(cpu, FREE)
    assert descriptor is not None
    with pytest.raises(PageFault) as caught:
        check_accessed(cpu, descriptor)
    assert (caught.value.linear, caught.value.error_code) == (GDT + FREE + 5, 3)
    accessed = read_descriptor(cpu, DATA0)
    assert accessed is not None
    check_accessed(cpu, accessed)


def test_the_busy_bit_alone_changes() -> None:
    cpu = protected_cpu()
    raw = descriptor_of(cpu, TSS_SELECTOR)
    set_busy(cpu, GDT + TSS_SELECTOR, busy=False)
    assert descriptor_of(cpu, TSS_SELECTOR) == raw & ~(2 << 40)
    set_busy(cpu, GDT + TSS_SELECTOR, busy=True)
    assert descriptor_of(cpu, TSS_SELECTOR) == raw


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        (0xC9B, "code32 readable accessed"),
        (0x09E, "code16 readable conforming"),
        (0x498, "code32"),
        (0x093, "data16 writable accessed"),
        (0x494, "data32 expand-down"),
        (0x08B, "TSS32 busy"),
        (0x082, "LDT"),
        (0x08C, "call gate32"),
        (0x080, "reserved"),
        (0x08D, "reserved"),
    ],
)
def test_kinds_in_words(attributes: int, words: str) -> None:
    assert describe_kind(Descriptor(0, encode_segment(0, 0, attributes))) == words


def entry(entries: list[TableEntry | None], index: int) -> TableEntry:
    found = entries[index]
    assert found is not None
    return found


def test_listing_the_tables_changes_nothing() -> None:
    cpu = protected_cpu()
    set_gate(cpu, 0x80, INTERRUPT_GATE32, CODE0, 0x12345678, 3)
    set_gate(cpu, 8, TASK_GATE, TSS_SELECTOR, 0)
    cpu.state.gdtr.limit = 0x3F
    ram = bytes(cpu.memory.ram)
    gdt = list(list_table(cpu, "gdt"))
    assert len(gdt) == 8
    tss = entry(gdt, TSS_SELECTOR >> 3)
    assert (tss.kind, tss.base, tss.limit, tss.selector, tss.present) == ("TSS32 busy", TSS, 0x67, TSS_SELECTOR, True)
    data = entry(gdt, DATA3 >> 3)
    assert (data.kind, data.dpl, data.limit) == ("data32 writable accessed", 3, 0xFFFF_FFFF)
    idt = list(list_table(cpu, "idt"))
    assert len(idt) == 256
    system_call = entry(idt, 0x80)
    assert (system_call.kind, system_call.gate_selector, system_call.gate_offset) == (
        "interrupt gate32",
        CODE0,
        0x12345678,
    )
    assert (system_call.selector, system_call.dpl, system_call.is_gate) == (0x80, 3, True)
    assert entry(idt, 8).gate_selector == TSS_SELECTOR
    ldt = list(list_table(cpu, "ldt"))
    assert [entry(ldt, n).selector for n in range(3)] == [4, 0xC, 0x14]
    assert bytes(cpu.memory.ram) == ram
    cpu.state.ldtr.load(0, 0, 0, 0)
    assert list(list_table(cpu, "ldt")) == []
    with pytest.raises(ValueError, match="'tss'"):
        list(list_table(cpu, "tss"))


def test_a_table_that_is_not_mapped_is_listed_as_unknown() -> None:
    cpu = protected_cpu()
    cpu.state.cr3 = 0x9000
    cpu.state.cr0 |= CR0_PG
    assert set(list_table(cpu, "gdt")) == {None}
    cpu.state.cr0 &= ~CR0_PG
    cpu.state.idtr.base = 0xFEE0_0000
    assert set(list_table(cpu, "idt")) == {None}


def test_descriptors_wrap_at_the_end_of_the_address_space() -> None:
    cpu = protected_cpu()
    cpu.state.gdtr.base = 0xFFFF_FFF8
    cpu.memory.write(0, encode_segment(1, 2, 0x93).to_bytes(8, "little"))
    found = read_descriptor(cpu, 8)
    assert found is not None
    assert (found.linear, found.base, found.limit) == (0, 1, 2)
    assert TSS32 == 9
    assert IDT != GDT
