"""Far transfers called directly: real mode, virtual-8086 mode, atomicity; all descriptor types are in tests/system."""

from __future__ import annotations

import pytest

from machine.cpu import Cpu
from machine.descriptors import CALL_GATE16, CALL_GATE32, TASK_GATE, encode_gate, encode_segment
from machine.faults import Vector
from machine.flags import CF, ID, IF, IOPL, NT, RF, TF, VIF, VIP, VM
from machine.state import CR0_PE, CR0_PG, CS, DS, ESP, SS
from machine.transfers import far_call, far_jump, far_return, interrupt_return, sysenter, sysexit
from tests.machine.ring0 import (
    CODE,
    CODE0,
    CODE3,
    DATA,
    DATA0,
    DATA3,
    FLAT,
    FREE,
    STACK0,
    STACK3,
    TSS,
    descriptor_of,
    dpl,
    fault,
    flat,
    protected_cpu,
    push,
    set_descriptor,
    stack,
    to_ring_3,
)
from tests.oracles.reference import build_cpu

NEXT = 0x5005


def real_cpu(esp: int = 0x8000) -> Cpu:
    cpu = build_cpu(1)
    cpu.reset()
    cpu.state.segments[CS].load(0x100, 0x1000, 0xFFFF, 0x93)
    cpu.state.gpr[ESP] = esp
    return cpu


def test_real_mode_jump_changes_selector_and_base_only() -> None:
    cpu = real_cpu()
    cpu.state.segments[CS].load(0x100, 0x1000, 0xF_FFFF, 0xC9B)
    far_jump(cpu, 0x1234, 0x1_2345, 4, 0)
    assert cpu.state.segments[CS].fields == (0x1234, 0x12340, 0xF_FFFF, 0xC93)
    assert cpu.state.eip == 0x1_2345
    far_jump(cpu, 0x1234, 0x1_2345, 2, 0)
    assert cpu.state.eip == 0x2345


def test_real_mode_offsets_obey_the_limit() -> None:
    cpu = real_cpu()
    with fault(cpu, Vector.GP, 0):
        far_jump(cpu, 0, 0x1_0000, 4, 0)
    with fault(cpu, Vector.GP, 0):
        far_call(cpu, 0, 0x1_0000, 4, 0)
    push(cpu, 0x20, 0x1_0000)
    with fault(cpu, Vector.GP, 0):
        far_return(cpu, 4, 0)


@pytest.mark.parametrize("size", [2, 4])
def test_real_mode_call_and_return(size: int) -> None:
    cpu = real_cpu(0x1234_8000)
    far_call(cpu, 0x200, 0x345, size, 0x678)
    assert (cpu.state.segments[CS].base, cpu.state.eip) == (0x2000, 0x345)
    assert cpu.state.gpr[ESP] == 0x1234_8000 - 2 * size, "the upper half of ESP is not the 16-bit stack's"
    far_return(cpu, size, 6)
    assert (cpu.state.segments[CS].selector, cpu.state.eip) == (0x100, 0x678)
    assert cpu.state.gpr[ESP] == 0x1234_8006


def test_real_mode_stacks_wrap_but_words_do_not_straddle_the_end() -> None:
    cpu = real_cpu(2)
    far_call(cpu, 0x200, 0x345, 2, 0x678)
    assert cpu.state.gpr[ESP] == 0xFFFE
    assert cpu.memory.load(0, 2) == 0x100
    assert cpu.memory.load(0xFFFE, 2) == 0x678
    cpu = real_cpu(1)
    with fault(cpu, Vector.SS, 0):
        far_call(cpu, 0x200, 0x345, 2, 0x678)
    cpu = real_cpu(0xFFFF)
    with fault(cpu, Vector.SS, 0):
        far_return(cpu, 2, 0)


@pytest.mark.parametrize(
    ("size", "image", "kept", "result"),
    [
        (4, 0xFFFF_FFFF, VIF, 0x0025_7FD7 | VIF),
        (4, 0, VIF | VIP | CF, VIF | VIP | 2),
        (2, 0xFFFF, ID, ID | 0x7FD7),
        (2, 0, RF | ID | CF, ID | 2),
    ],
)
def test_real_mode_iret_loads_what_the_sdm_lists(size: int, image: int, kept: int, result: int) -> None:
    cpu = real_cpu()
    push(cpu, image, 0x300, 0x44, size_bytes=size)
    cpu.state.eflags = 2 | kept
    cpu.state.nmi_blocked = 1
    interrupt_return(cpu, size, 0)
    assert cpu.state.eflags == result
    assert (cpu.state.segments[CS].selector, cpu.state.eip, cpu.state.gpr[ESP]) == (0x300, 0x44, 0x8000)
    assert cpu.state.nmi_blocked == 0


def virtual_cpu(level_needed: int) -> Cpu:
    cpu = protected_cpu()
    for segment in cpu.state.segments:
        segment.load(0x200, 0x2000, 0xFFFF, 0xF3)
    cpu.state.eflags = 2 | VM | level_needed << 12
    cpu.state.gpr[ESP] = 0x100
    cpu.set_cpl(3)
    return cpu


def test_virtual_8086_calls_stay_in_the_mode() -> None:
    cpu = virtual_cpu(0)
    far_call(cpu, 0x300, 0x10, 2, 0x20)
    assert cpu.state.segments[CS].fields == (0x300, 0x3000, 0xFFFF, 0xF3)
    assert cpu.memory.read(0x20FC, 4) == b"\x20\x00\x00\x02"
    far_return(cpu, 2, 0)
    assert (cpu.state.segments[CS].selector, cpu.state.eip) == (0x200, 0x20)
    with fault(cpu, Vector.GP, 0):
        interrupt_return(cpu, 2, 0)


def test_a_jump_to_ring_0_code_from_itself() -> None:
    cpu = protected_cpu()
    set_descriptor(cpu, FREE, encode_segment(0x100, 0xFFF, (CODE & ~1) | 0x400))
    with fault(cpu, Vector.GP, 0):
        far_jump(cpu, FREE, 0x1000, 4, NEXT)
    far_jump(cpu, FREE, 0x1_0FFF, 2, NEXT)
    assert cpu.state.segments[CS].fields == (FREE, 0x100, 0xFFF, CODE | 0x400)
    assert cpu.state.eip == 0xFFF
    assert descriptor_of(cpu, FREE) >> 40 & 1


def test_task_gates_and_what_is_no_target() -> None:
    cpu = protected_cpu()
    set_descriptor(cpu, FREE, encode_gate(TASK_GATE, FREE + 8, 0) & ~(0x80 << 40))
    with fault(cpu, Vector.NP, FREE):
        far_jump(cpu, FREE, 0, 4, NEXT)
    for target, code in ((FREE + 8, FREE + 8), (0, 0), (4, 4), (DATA0, DATA0)):
        set_descriptor(cpu, FREE, encode_gate(TASK_GATE, target, 0))
        with fault(cpu, Vector.GP, code):
            far_call(cpu, FREE, 0, 4, NEXT)
    for selector, vector, code in ((0, Vector.GP, 0), (0x100, Vector.GP, 0x100), (DATA0, Vector.GP, DATA0)):
        with fault(cpu, vector, code):
            far_jump(cpu, selector, 0, 4, NEXT)


@pytest.mark.parametrize("words", [2, 3])
def test_returns_check_the_code_segment_and_eip(words: int) -> None:
    cpu = protected_cpu()
    set_descriptor(cpu, FREE, encode_segment(0, 0xFFF, CODE))
    set_descriptor(cpu, FREE + 8, flat(CODE & ~0x80))
    for selector, eip, vector, code in (
        (0, 0, Vector.GP, 0),
        (3, 0, Vector.GP, 0),
        (DATA0, 0, Vector.GP, DATA0),
        (FREE + 8, 0, Vector.NP, FREE + 8),
        (FREE, 0x1000, Vector.GP, 0),
        (0x100, 0, Vector.GP, 0x100),
    ):
        cpu.state.gpr[ESP] = STACK0
        push(cpu, *([2] if words == 3 else []), selector, eip)
        with fault(cpu, vector, code):
            far_return(cpu, 4, 0) if words == 2 else interrupt_return(cpu, 4, 0)
    cpu.state.gpr[ESP] = STACK0
    push(cpu, *([2] if words == 3 else []), FREE, 0xFFF)
    far_return(cpu, 4, 0) if words == 2 else interrupt_return(cpu, 4, 0)
    assert cpu.state.eip == 0xFFF


def test_conforming_code_runs_at_the_callers_level() -> None:
    cpu = protected_cpu()
    set_descriptor(cpu, FREE, flat(CODE | 4))
    to_ring_3(cpu)
    far_call(cpu, FREE, 0x1234, 4, NEXT)
    assert cpu.state.segments[CS].selector == FREE | 3
    assert cpu.state.cpl == 3
    assert stack(cpu, 2) == [NEXT, CODE3]


def gate_cpu(kind: int, count: int) -> Cpu:
    cpu = protected_cpu()
    set_descriptor(cpu, FREE, encode_gate(kind, CODE0, 0x4321, 3, count))
    to_ring_3(cpu)
    return cpu


@pytest.mark.parametrize("count", [0, 1, 31])
def test_an_inward_call_copies_parameters_to_the_new_stack(count: int) -> None:
    cpu = gate_cpu(CALL_GATE32, count)
    push(cpu, *range(100, 100 + count))
    esp = cpu.state.gpr[ESP]
    far_call(cpu, FREE | 3, 0xDEAD_BEEF, 4, NEXT)
    assert (cpu.state.cpl, cpu.state.eip) == (0, 0x4321)
    assert (cpu.state.segments[CS].selector, cpu.state.segments[SS].selector) == (CODE0, DATA0)
    assert cpu.state.gpr[ESP] == STACK0 - 16 - 4 * count
    assert stack(cpu, 4 + count) == [NEXT, CODE3, *reversed(range(100, 100 + count)), esp, DATA3]
    far_return(cpu, 4, 4 * count)
    assert (cpu.state.cpl, cpu.state.eip, cpu.state.gpr[ESP]) == (3, NEXT, STACK3)


def test_a_16_bit_gate_pushes_words() -> None:
    cpu = gate_cpu(CALL_GATE16, 2)
    push(cpu, 0x1111, 0x2222, size_bytes=2)
    far_call(cpu, FREE | 3, 0, 4, 0x1_5005)
    assert stack(cpu, 6, 2) == [0x5005, CODE3, 0x2222, 0x1111, STACK3 - 4, DATA3]


def test_an_inward_call_that_faults_leaves_no_trace() -> None:
    cpu = gate_cpu(CALL_GATE32, 4)
    cpu.memory.write(TSS + 8, b"\x23\0")
    with fault(cpu, Vector.TS, DATA3 & ~3):
        far_call(cpu, FREE | 3, 0, 4, NEXT)
    cpu.memory.write(TSS + 8, b"\x10\0")
    cpu.state.tr.load(cpu.state.tr.selector, TSS, 8, cpu.state.tr.attributes)
    with fault(cpu, Vector.TS, cpu.state.tr.selector):
        far_call(cpu, FREE | 3, 0, 4, NEXT)
    cpu.state.tr.load(cpu.state.tr.selector, TSS, 9, cpu.state.tr.attributes)
    cpu.state.segments[SS].load(DATA3, 0, STACK3 + 7, DATA | dpl(3))
    with fault(cpu, Vector.SS, 0):
        far_call(cpu, FREE | 3, 0, 4, NEXT)
    cpu.state.gpr[ESP] = STACK3 - 8
    far_call(cpu, FREE | 3, 0, 4, NEXT)
    assert cpu.state.cpl == 0


def test_the_new_stack_needs_room_for_all() -> None:
    cpu = gate_cpu(CALL_GATE32, 3)
    set_descriptor(cpu, FREE + 8, encode_segment(0x6000, 0xFFF, DATA | 0x400))
    cpu.memory.write(TSS + 4, (27).to_bytes(4, "little") + (FREE + 8).to_bytes(4, "little"))
    with fault(cpu, Vector.SS, FREE + 8):
        far_call(cpu, FREE | 3, 0, 4, NEXT)
    cpu.memory.write(TSS + 4, (28).to_bytes(4, "little"))
    far_call(cpu, FREE | 3, 0, 4, NEXT)
    assert cpu.state.gpr[ESP] == 0


def test_a_jump_through_a_gate_does_not_change_the_level() -> None:
    cpu = gate_cpu(CALL_GATE32, 0)
    with fault(cpu, Vector.GP, CODE0):
        far_jump(cpu, FREE | 3, 0, 4, NEXT)
    set_descriptor(cpu, FREE, encode_gate(CALL_GATE32, CODE3, 0x4321, 3))
    far_jump(cpu, FREE | 3, 0, 4, NEXT)
    assert (cpu.state.eip, cpu.state.cpl) == (0x4321, 3)


def test_an_outward_return_takes_privileged_segments_away() -> None:
    cpu = protected_cpu()
    set_descriptor(cpu, FREE, flat(CODE | 4))
    cpu.state.segments[3].load(FREE, 0, 0xFFFF_FFFF, CODE | 4 | FLAT)
    push(cpu, DATA3, STACK3, CODE3, 0x77)
    far_return(cpu, 4, 0)
    selectors = [segment.selector for segment in cpu.state.segments]
    assert selectors == [0, CODE3, DATA3, FREE, 0, 0]
    assert not cpu.state.segments[0].present


def test_a_16_bit_stack_outside_keeps_the_upper_half_of_esp() -> None:
    cpu = protected_cpu()
    set_descriptor(cpu, FREE, encode_segment(0, 0xFFFF, DATA | dpl(3)))
    cpu.state.gpr[ESP] = 0x8_8000
    push(cpu, FREE | 3, 0x1234_5678, 2, CODE3, 0x77)
    interrupt_return(cpu, 4, 0)
    assert cpu.state.gpr[ESP] == 0x8_5678


def test_iret_to_virtual_8086_mode() -> None:
    cpu = protected_cpu()
    push(cpu, 6, 5, 4, 3, 2, 0x1234_5678, 2 | VM | IF | IOPL | VIF, 1, 0xFFFF)
    cpu.state.nmi_blocked = 1
    interrupt_return(cpu, 4, NEXT)
    state = cpu.state
    assert [segment.selector for segment in state.segments] == [3, 1, 2, 4, 5, 6]
    assert {segment.attributes for segment in state.segments} == {0xF3}
    assert {segment.limit for segment in state.segments} == {0xFFFF}
    assert (state.gpr[ESP], state.eip, state.cpl, state.nmi_blocked) == (0x1234_5678, 0xFFFF, 3, 0)
    assert state.eflags == 2 | VM | IF | IOPL | VIF


def test_iret_to_virtual_8086_mode_checks_eip_and_the_whole_frame() -> None:
    cpu = protected_cpu()
    push(cpu, 6, 5, 4, 3, 2, 0, 2 | VM, 1, 0x1_0000)
    with fault(cpu, Vector.GP, 0):
        interrupt_return(cpu, 4, NEXT)
    cpu.state.segments[SS].load(DATA0, 0, STACK0 - 2, DATA | 0x400)
    with fault(cpu, Vector.SS, 0):
        interrupt_return(cpu, 4, NEXT)


def test_iret_above_ring_0_ignores_vm_in_the_image() -> None:
    cpu = protected_cpu()
    to_ring_3(cpu)
    push(cpu, 2 | VM | IF | IOPL | CF | TF | NT | RF | ID, CODE3, 0x99)
    interrupt_return(cpu, 4, NEXT)
    assert cpu.state.eflags == 2 | CF | TF | NT | RF | ID


def test_fast_system_calls() -> None:
    cpu = protected_cpu()
    to_ring_3(cpu)
    with fault(cpu, Vector.GP, 0):
        sysenter(cpu)
    with fault(cpu, Vector.GP, 0):
        sysexit(cpu)
    cpu.state.sysenter_cs, cpu.state.sysenter_esp, cpu.state.sysenter_eip = 0x63, 0x1111, 0x2222
    cpu.state.eflags = 2 | IF | RF | CF | NT
    sysenter(cpu)
    state = cpu.state
    assert (state.cpl, state.eip, state.gpr[ESP], state.eflags) == (0, 0x2222, 0x1111, 2 | CF | NT)
    assert state.segments[CS].fields == (0x60, 0, 0xFFFF_FFFF, 0xC9B)
    assert state.segments[SS].fields == (0x68, 0, 0xFFFF_FFFF, 0xC93)
    assert state.segments[DS].selector == DATA3
    state.gpr[1], state.gpr[2] = 0x3333, 0x4444
    sysexit(cpu)
    assert (state.cpl, state.eip, state.gpr[ESP]) == (3, 0x4444, 0x3333)
    assert state.segments[CS].fields == (0x73, 0, 0xFFFF_FFFF, 0xCFB)
    assert state.segments[SS].fields == (0x7B, 0, 0xFFFF_FFFF, 0xCF3)
    state.cr0 &= ~CR0_PE
    cpu.set_cpl(0)
    with fault(cpu, Vector.GP, 0):
        sysenter(cpu)


def test_a_return_frame_on_a_missing_page_changes_nothing() -> None:
    cpu = protected_cpu()
    for page in range(32):
        cpu.memory.store(0x1_1000 + page * 4, 4, page << 12 | (0 if page == 9 else 7))
    cpu.memory.store(0x1_0000, 4, 0x1_1007)
    cpu.state.cr3 = 0x1_0000
    cpu.state.cr0 |= CR0_PG
    cpu.memory.store(0x8FFC, 4, 0x77)
    cpu.state.gpr[ESP] = 0x8FFC
    cpu.mmu.load_system(0x8FFC, 4)
    for page in (1, 8):
        cpu.mmu.load_system(page << 12, 4)
    with fault(cpu, Vector.PF, 0):
        far_return(cpu, 4, 0)
    with fault(cpu, Vector.PF, 0):
        interrupt_return(cpu, 4, 0)
    cpu.state.gpr[ESP] = 0x9008
    with fault(cpu, Vector.PF, 2):
        far_call(cpu, CODE0, 0, 4, 0)
