"""Segment loads called directly: hidden parts, real and virtual-8086 mode; every type is compared in tests/system."""

from __future__ import annotations

import pytest

from machine.descriptors import encode_gate, encode_segment
from machine.faults import Vector
from machine.flags import VM
from machine.segmentation import (
    access_rights,
    load_ldt,
    load_segment,
    load_task_register,
    segment_limit,
    verify,
)
from machine.state import CR0_PE, CS, DS, ES, FS, GS, SS
from tests.machine.ring0 import (
    CODE0,
    CODE3,
    DATA,
    DATA0,
    DATA3,
    FREE,
    LDT_BASE,
    LDT_SELECTOR,
    TSS_SELECTOR,
    descriptor_of,
    dpl,
    fault,
    flat,
    protected_cpu,
    set_descriptor,
    to_ring_3,
)


@pytest.mark.parametrize("register", [ES, DS, FS, GS])
def test_the_hidden_part_comes_from_the_descriptor(register: int) -> None:
    cpu = protected_cpu()
    set_descriptor(cpu, FREE, encode_segment(0x12345678, 0xABCD, DATA & ~1))
    load_segment(cpu, register, 0x7_0000 | FREE)
    segment = cpu.state.segments[register]
    assert segment.fields == (FREE, 0x12345678, 0xABCD, DATA)
    assert descriptor_of(cpu, FREE) == encode_segment(0x12345678, 0xABCD, DATA)


def test_a_null_selector_makes_a_segment_unusable_and_keeps_its_rpl() -> None:
    cpu = protected_cpu()
    load_segment(cpu, DS, 2)
    segment = cpu.state.segments[DS]
    assert segment.selector == 2
    assert not segment.present
    with fault(cpu, Vector.GP, 0):
        cpu.mmu.load(segment, 0, 1)
    with fault(cpu, Vector.GP, 0):
        load_segment(cpu, SS, 0)
    with fault(cpu, Vector.GP, 0):
        load_segment(cpu, SS, 3)


def test_cs_cannot_be_loaded_by_a_move() -> None:
    cpu = protected_cpu()
    with fault(cpu, Vector.UD, None):
        load_segment(cpu, CS, CODE0)


@pytest.mark.parametrize(
    ("selector", "vector", "code"),
    [(0x100, Vector.GP, 0x100), (0x103, Vector.GP, 0x100), (0x47, Vector.GP, 0x44), (CODE0, Vector.GP, CODE0)],
)
def test_bad_stacks(selector: int, vector: int, code: int) -> None:
    cpu = protected_cpu()
    with fault(cpu, vector, code):
        load_segment(cpu, SS, selector)


def test_a_missing_stack_is_a_stack_fault_and_missing_data_is_not() -> None:
    cpu = protected_cpu()
    set_descriptor(cpu, FREE, flat(DATA & ~0x80))
    with fault(cpu, Vector.SS, FREE):
        load_segment(cpu, SS, FREE)
    with fault(cpu, Vector.NP, FREE):
        load_segment(cpu, ES, FREE)


def test_rights_come_before_presence() -> None:
    cpu = protected_cpu()
    to_ring_3(cpu)
    set_descriptor(cpu, FREE, flat(DATA & ~0x80))
    with fault(cpu, Vector.GP, FREE):
        load_segment(cpu, DS, FREE | 3)


def test_real_mode_keeps_limit_and_attributes() -> None:
    cpu = protected_cpu()
    cpu.state.cr0 &= ~CR0_PE
    load_segment(cpu, DS, 0x1234)
    assert cpu.state.segments[DS].fields == (0x1234, 0x12340, 0xFFFF_FFFF, 0xC93)
    assert cpu.mmu.load(cpu.state.segments[DS], 0x20000, 4) == cpu.memory.load(0x32340, 4)


def test_real_mode_revives_a_null_segment() -> None:
    cpu = protected_cpu()
    load_segment(cpu, ES, 0)
    cpu.state.cr0 &= ~CR0_PE
    load_segment(cpu, ES, 0xB800)
    assert cpu.state.segments[ES].fields == (0xB800, 0xB8000, 0xFFFF, 0x93)


def test_virtual_8086_mode_always_loads_64_kib() -> None:
    cpu = protected_cpu()
    to_ring_3(cpu)
    cpu.state.eflags |= VM
    for register in (ES, SS, DS, FS, GS):
        load_segment(cpu, register, 0xFFFF)
        assert cpu.state.segments[register].fields == (0xFFFF, 0xFFFF0, 0xFFFF, 0xF3)


def test_ldtr() -> None:
    cpu = protected_cpu()
    load_ldt(cpu, 0)
    assert not cpu.state.ldtr.present
    load_ldt(cpu, LDT_SELECTOR)
    assert (cpu.state.ldtr.base, cpu.state.ldtr.limit) == (LDT_BASE, 0x3F)
    set_descriptor(cpu, FREE, encode_segment(0, 7, 0x02))
    for selector, vector, code in ((FREE, Vector.NP, FREE), (DATA0, Vector.GP, DATA0), (4, Vector.GP, 4)):
        with fault(cpu, vector, code):
            load_ldt(cpu, selector)
    to_ring_3(cpu)
    with fault(cpu, Vector.GP, 0):
        load_ldt(cpu, 0)


def test_a_task_register_load_marks_the_tss_busy() -> None:
    cpu = protected_cpu()
    with fault(cpu, Vector.GP, TSS_SELECTOR):
        load_task_register(cpu, TSS_SELECTOR)
    set_descriptor(cpu, FREE, encode_segment(0x7000, 0x80, 0x89))
    load_task_register(cpu, FREE)
    assert cpu.state.tr.fields == (FREE, 0x7000, 0x80, 0x8B)
    assert descriptor_of(cpu, FREE) == encode_segment(0x7000, 0x80, 0x8B)
    set_descriptor(cpu, FREE, encode_segment(0x7000, 0x80, 0x09))
    for selector, vector, code in ((FREE, Vector.NP, FREE), (0, Vector.GP, 0), (0x2C, Vector.GP, 0x2C)):
        with fault(cpu, vector, code):
            load_task_register(cpu, selector)


def test_looking_changes_nothing_and_never_faults() -> None:
    cpu = protected_cpu()
    to_ring_3(cpu)
    before = cpu.state.pack(), bytes(cpu.memory.ram)
    assert access_rights(cpu, CODE3) == 0x00CF_FB00
    assert segment_limit(cpu, DATA3) == 0xFFFF_FFFF
    assert access_rights(cpu, DATA0) is None
    assert segment_limit(cpu, DATA0) is None
    for selector in (0, 3, 0x100, 0xFFFF):
        assert access_rights(cpu, selector) is None
        assert segment_limit(cpu, selector) is None
        assert not verify(cpu, selector, write=False)
    assert verify(cpu, CODE3, write=False)
    assert not verify(cpu, CODE3, write=True)
    assert verify(cpu, DATA3, write=True)
    assert not verify(cpu, DATA0, write=False)
    assert not verify(cpu, TSS_SELECTOR, write=False)
    assert (cpu.state.pack(), bytes(cpu.memory.ram)) == before


def test_gates_have_rights_but_no_limit() -> None:
    cpu = protected_cpu()
    set_descriptor(cpu, FREE, encode_gate(0xC, CODE0, 0x1234_5678, 3))
    assert access_rights(cpu, FREE) == 0x0034_EC00
    assert segment_limit(cpu, FREE) is None
    set_descriptor(cpu, FREE, encode_gate(0xE, CODE0, 0))
    assert access_rights(cpu, FREE) is None


def test_a_segment_that_is_not_present_can_be_looked_at() -> None:
    cpu = protected_cpu()
    set_descriptor(cpu, FREE, flat(DATA & ~0x80 | dpl(3)))
    assert access_rights(cpu, FREE) == 0x00CF_7300
    assert segment_limit(cpu, FREE) == 0xFFFF_FFFF
    assert verify(cpu, FREE, write=True)
