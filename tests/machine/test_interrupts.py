"""Delivery called directly: IVT, frames, RF, the double-fault table, the chain of a triple fault, VME."""

from __future__ import annotations

import itertools
import struct

import pytest

from machine.cpu import Cpu
from machine.debug import FaultLevel
from machine.descriptors import (
    INTERRUPT_GATE16,
    INTERRUPT_GATE32,
    TASK_GATE,
    TRAP_GATE32,
    TSS32,
    encode_segment,
)
from machine.faults import EXT, DebugFault, GuestFault, PageFault, Vector, general_protection
from machine.flags import AC, CF, ID, IF, IOPL, NT, RF, TF, VIF, VM
from machine.interrupts import TripleFault, deliver, deliver_event, raise_exception, software_interrupt
from machine.state import CR4_VME, CS, DR6_BD, DR7_GD, DS, EAX, ESP, SHADOW_NONE, SHADOW_STI, SS
from tests.machine.ring0 import (
    CODE,
    CODE0,
    CODE3,
    DATA0,
    DATA3,
    FREE,
    IDT,
    OTHER_TSS,
    PRESENT,
    STACK0,
    STACK3,
    TSS,
    TSS_SELECTOR,
    fault,
    flat,
    protected_cpu,
    set_descriptor,
    set_gate,
    stack,
    to_ring_3,
)
from tests.oracles.reference import build_cpu

HANDLER = 0x6000
EIP = 0x5000


def with_handlers(*vectors: int, kind: int = INTERRUPT_GATE32, level: int = 0) -> Cpu:
    """Handler n is at `HANDLER` + n."""
    cpu = protected_cpu()
    for vector in vectors:
        set_gate(cpu, vector, kind, CODE0, HANDLER + vector, level)
    return cpu


def real_cpu() -> Cpu:
    cpu = build_cpu(1)
    cpu.reset()
    cpu.state.segments[CS].load(0x100, 0x1000, 0xFFFF, 0x93)
    cpu.state.gpr[ESP] = 0x8000
    cpu.state.idtr.limit = 0x3FF
    return cpu


def test_the_ivt() -> None:
    cpu = real_cpu()
    cpu.memory.write(0x21 * 4, struct.pack("<HH", 0x1234, 0x2000))
    cpu.state.eflags = 2 | IF | TF | AC | CF | ID
    cpu.state.shadow = SHADOW_STI
    software_interrupt(cpu, 0x21, 0x56)
    assert (cpu.state.segments[CS].base, cpu.state.eip) == (0x20000, 0x1234)
    assert cpu.memory.read(0x7FFA, 6) == struct.pack("<HHH", 0x56, 0x100, 2 | IF | TF | CF)
    assert cpu.state.eflags == 2 | CF | ID
    assert cpu.state.shadow == SHADOW_NONE


def test_real_mode_exceptions_push_no_error_code() -> None:
    cpu = real_cpu()
    cpu.memory.write(13 * 4, struct.pack("<HH", 0x1234, 0x2000))
    raise_exception(cpu, general_protection(0), 0x77)
    assert cpu.state.gpr[ESP] == 0x8000 - 6
    assert cpu.memory.load(0x7FFA, 2) == 0x77


def test_real_mode_obeys_the_limit_of_the_idt() -> None:
    cpu = real_cpu()
    cpu.state.idtr.limit = 0x21 * 4 + 2
    with fault(cpu, Vector.GP, 0):
        software_interrupt(cpu, 0x21, 0x56)
    cpu.state.idtr.limit += 1
    software_interrupt(cpu, 0x21, 0x56)
    # Without room for vectors 8 and 13 the CPU shuts down.
    cpu.state.idtr.limit = 3
    with pytest.raises(TripleFault) as caught:
        raise_exception(cpu, GuestFault(Vector.UD), 0x77)
    assert [level.vector for level in caught.value.chain] == [Vector.UD, Vector.GP, Vector.GP, Vector.DF, Vector.GP]


@pytest.mark.parametrize(("kind", "size"), [(INTERRUPT_GATE32, 4), (INTERRUPT_GATE16, 2)])
def test_the_frame_of_an_inward_interrupt(kind: int, size: int) -> None:
    cpu = with_handlers(13, kind=kind)
    to_ring_3(cpu)
    cpu.state.eflags = 2 | IF | NT | TF | CF
    raise_exception(cpu, general_protection(0x1234), EIP)
    flags = 2 | IF | NT | TF | CF | (RF if size == 4 else 0)
    assert stack(cpu, 6, size) == [0x1234, EIP, CODE3, flags, STACK3, DATA3]
    assert (cpu.state.cpl, cpu.state.eip, cpu.state.eflags) == (0, HANDLER + 13, 2 | CF)
    assert cpu.state.segments[SS].selector == DATA0
    assert cpu.state.segments[DS].selector == DATA3


def test_a_trap_gate_leaves_interrupts_enabled() -> None:
    cpu = with_handlers(0x80, kind=TRAP_GATE32)
    cpu.state.eflags = 2 | IF
    software_interrupt(cpu, 0x80, EIP)
    assert cpu.state.eflags & IF


def test_out_of_virtual_8086_mode_all_segments_are_saved() -> None:
    cpu = with_handlers(6)
    for number, segment in enumerate(cpu.state.segments):
        segment.load(0x100 + number, 0x1000, 0xFFFF, 0xF3)
    cpu.state.eflags = 2 | VM | IF
    cpu.state.gpr[ESP] = 0x1_0040
    cpu.set_cpl(3)
    raise_exception(cpu, GuestFault(Vector.UD), 0x123)
    assert cpu.state.gpr[ESP] == STACK0 - 36
    assert stack(cpu, 9) == [0x123, 0x101, 2 | VM | IF | RF, 0x1_0040, 0x102, 0x100, 0x103, 0x104, 0x105]
    assert [segment.selector for segment in cpu.state.segments] == [0, CODE0, DATA0, 0, 0, 0]
    assert (cpu.state.cpl, cpu.state.eflags) == (0, 2)


def test_software_may_use_only_gates_of_its_level() -> None:
    cpu = with_handlers(3, 0x80)
    to_ring_3(cpu)
    with fault(cpu, Vector.GP, 0x80 * 8 + 2):
        software_interrupt(cpu, 0x80, EIP)
    with fault(cpu, Vector.GP, 3 * 8 + 2):
        software_interrupt(cpu, 3, EIP, by_int_n=False)
    set_gate(cpu, 1, INTERRUPT_GATE32, CODE0, HANDLER)
    with fault(cpu, Vector.GP, 1 * 8 + 2):
        software_interrupt(cpu, 1, EIP)
    software_interrupt(cpu, 1, EIP, by_int_n=False)  # INT1 asks no DPL
    assert cpu.state.eip == HANDLER


@pytest.mark.parametrize(("external", "software", "ext"), [(True, False, EXT), (False, False, EXT), (False, True, 0)])
def test_ext_says_that_the_program_did_not_ask(external: bool, software: bool, ext: int) -> None:
    cpu = protected_cpu()
    with fault(cpu, Vector.GP, 0x40 * 8 + 2 | ext):
        deliver(cpu, 0x40, software=software, external=external, error_code=None, return_eip=EIP)
    set_gate(cpu, 0x40, INTERRUPT_GATE32, FREE, 0)
    set_descriptor(cpu, FREE, flat(CODE & ~0x80))
    with fault(cpu, Vector.NP, FREE | ext):
        deliver(cpu, 0x40, software=software, external=external, error_code=None, return_eip=EIP)
    set_gate(cpu, 0x40, INTERRUPT_GATE32, 0, 0)
    with fault(cpu, Vector.GP, ext):
        deliver(cpu, 0x40, software=software, external=external, error_code=None, return_eip=EIP)
    set_gate(cpu, 0x40, INTERRUPT_GATE32, CODE0, 0)
    cpu.state.idtr.limit = 0x40 * 8 + 6
    with fault(cpu, Vector.GP, 0x40 * 8 + 2 | ext):
        deliver(cpu, 0x40, software=software, external=external, error_code=None, return_eip=EIP)


def test_room_on_the_stack_includes_the_error_code() -> None:
    cpu = with_handlers(13)
    cpu.state.segments[SS].load(DATA0, 0, 0xFFFF_FFFF, 0xC93)
    cpu.state.gpr[ESP] = 15
    cpu.state.segments[SS].load(DATA0, 0, 0xFFF, 0x493)
    with fault(cpu, Vector.SS, EXT):
        deliver(cpu, 13, software=False, external=False, error_code=0, return_eip=EIP)
    cpu.state.gpr[ESP] = 16
    deliver(cpu, 13, software=False, external=False, error_code=0, return_eip=EIP)
    assert cpu.state.gpr[ESP] == 0


def test_an_inner_stack_needs_room_for_the_whole_frame() -> None:
    cpu = with_handlers(13)
    to_ring_3(cpu)
    set_descriptor(cpu, FREE, encode_segment(0x6000, 0xFFF, 0x493))
    cpu.memory.write(TSS + 4, struct.pack("<II", 23, FREE))
    with fault(cpu, Vector.SS, FREE | EXT):
        deliver(cpu, 13, software=False, external=False, error_code=0, return_eip=EIP)
    cpu.memory.write(TSS + 4, struct.pack("<II", 24, FREE))
    deliver(cpu, 13, software=False, external=False, error_code=0, return_eip=EIP)
    assert cpu.state.gpr[ESP] == 0


FAULTS = (0, 5, 6, 7, 10, 11, 12, 13, 14, 16, 17)


@pytest.mark.parametrize("vector", range(20))
def test_rf_is_saved_for_faults_only(vector: int) -> None:
    cpu = with_handlers(vector)
    code = 0 if vector in (8, 10, 11, 12, 13, 14, 17) else None
    raise_exception(cpu, GuestFault(vector, code), EIP)
    flags = stack(cpu, 4)[2 if code is None else 3]
    assert bool(flags & RF) == (vector in FAULTS or vector in (9, 15, 19))
    assert not cpu.state.eflags & RF


def test_rf_of_interrupts_is_as_it_was() -> None:
    for flags, resume in itertools.product((2, 2 | RF), (None, True)):
        cpu = with_handlers(0x20)
        cpu.state.eflags = flags
        deliver_event(cpu, 0x20, external=True, error_code=None, return_eip=EIP, resume=resume)
        assert bool(stack(cpu, 3)[2] & RF) == bool(flags & RF or resume)
    cpu = with_handlers(0x80)
    cpu.state.eflags = 2 | RF
    software_interrupt(cpu, 0x80, EIP)
    assert not stack(cpu, 3)[2] & RF


def test_a_page_fault_sets_cr2() -> None:
    cpu = with_handlers(14)
    raise_exception(cpu, PageFault(0x1234_5678, 6), EIP)
    assert cpu.state.cr2 == 0x1234_5678
    assert stack(cpu, 2) == [6, EIP]


def test_a_trap_ends_hlt() -> None:
    cpu = with_handlers(1, 0x20)
    for event in (1, 0x20):
        cpu.state.halted = 1
        deliver_event(cpu, event, external=event == 0x20, error_code=None, return_eip=EIP)
        assert not cpu.state.halted


def test_a_debug_exception_says_why_and_lifts_the_guard() -> None:
    cpu = with_handlers(1)
    cpu.state.dr[7] |= DR7_GD
    raise_exception(cpu, DebugFault(DR6_BD), EIP)
    assert cpu.state.dr[6] & DR6_BD
    assert not cpu.state.dr[7] & DR7_GD
    # INT 1 is no debug exception; INT1 is.
    for by_int_n in (True, False):
        cpu.state.dr[7] |= DR7_GD
        software_interrupt(cpu, 1, EIP, by_int_n=by_int_n)
        assert bool(cpu.state.dr[7] & DR7_GD) == by_int_n


def handler_task(eip: int = HANDLER, ds: int = 0) -> bytes:
    """A TSS whose task begins at `eip` on a stack at 7000h."""
    fields = {8: eip, 9: 2, 14: 0x7000, 19: CODE0, 20: DATA0, 21: ds}
    return struct.pack("<26I", *(fields.get(n, 0) for n in range(26)))


BENIGN = (1, 2, 3, 4, 5, 6, 7, 16, 17, 0x20)
CONTRIBUTORY = (0, 10, 11, 12, 13)


def second_of(cpu: Cpu, first: int, second: int) -> None:
    """Make the delivery of `first` raise `second`."""
    if second == Vector.GP:
        cpu.memory.write(IDT + first * 8, bytes(8))
    elif second == Vector.NP:
        set_gate(cpu, first, INTERRUPT_GATE32, FREE, 0)
        set_descriptor(cpu, FREE, flat(CODE & ~0x80))
    elif second == Vector.TS:
        cpu.memory.write(TSS + 8, b"\x23\0")
        to_ring_3(cpu)
        # The others go to a task with a stack of its own, or they would need the bad one too.
        set_descriptor(cpu, FREE, encode_segment(OTHER_TSS, 0x67, PRESENT | TSS32))
        cpu.memory.write(OTHER_TSS, handler_task())
        for vector in (Vector.TS, Vector.DF):
            set_gate(cpu, vector, TASK_GATE, FREE, 0)


PAIRS = [
    (first, second)
    for first in (*BENIGN, *CONTRIBUTORY, Vector.PF)
    for second in (Vector.GP, Vector.NP, Vector.TS)
    if first != second  # the first is delivered through a gate of its own, which is made unusable
]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_the_double_fault_table(first: int, second: int) -> None:
    cpu = with_handlers(*range(0x21))
    second_of(cpu, first, second)
    if first == 0x20:
        deliver_event(cpu, first, external=True, error_code=None, return_eip=EIP)
    elif first == Vector.PF:
        raise_exception(cpu, PageFault(0x1234, 0), EIP)
        assert cpu.state.cr2 == 0x1234
    else:
        raise_exception(cpu, GuestFault(first, 0 if first in (10, 11, 12, 13, 17) else None), EIP)
    wanted = Vector.DF if first in CONTRIBUTORY or first == Vector.PF else second
    if second == Vector.TS:
        assert cpu.state.eip == HANDLER
        code = stack(cpu, 1)[0]
        assert code == (0 if wanted == Vector.DF else DATA3 & ~3 | EXT)
        assert cpu.memory.load(TSS + 0x20, 4) == EIP
    else:
        assert cpu.state.eip == HANDLER + wanted
        assert stack(cpu, 2)[1] == EIP


def test_a_page_fault_after_a_contributory_one_is_delivered_itself() -> None:
    cpu = with_handlers(8, 13, 14)
    cpu.state.idtr.base = IDT
    # The gate of vector 13 leads to a descriptor in an LDT on a page that is not mapped.
    set_gate(cpu, 13, INTERRUPT_GATE32, 0x0C, 0)
    for page in range(32):
        cpu.memory.store(0x1_1000 + page * 4, 4, page << 12 | 7)
    cpu.memory.store(0x1_0000, 4, 0x1_1007)
    cpu.state.ldtr.load(0x30, 0x40_0000, 0x3F, PRESENT | 2)
    cpu.state.cr3 = 0x1_0000
    cpu.state.cr0 |= 1 << 31
    raise_exception(cpu, general_protection(0), EIP)
    assert (cpu.state.eip, cpu.state.cr2) == (HANDLER + 14, 0x40_0008)
    # But a page fault whose delivery page-faults is a double fault, with the second address in CR2.
    set_gate(cpu, 14, INTERRUPT_GATE32, 0x14, 0)
    raise_exception(cpu, PageFault(0x1234, 0), EIP)
    assert (cpu.state.eip, cpu.state.cr2) == (HANDLER + 8, 0x40_0010)


def test_the_chain_of_a_triple_fault() -> None:
    cpu = protected_cpu()
    cpu.state.idtr.limit = 14 * 8 + 7
    set_gate(cpu, 14, INTERRUPT_GATE32, DATA0, 0)
    registers = cpu.state.pack()
    with pytest.raises(TripleFault) as caught:
        raise_exception(cpu, PageFault(0xDEAD_0000, 2), EIP)
    assert caught.value.chain == (
        FaultLevel(Vector.PF, 2, 0xDEAD_0000, CODE0, EIP),
        FaultLevel(Vector.GP, DATA0 | EXT, None, CODE0, EIP),
        FaultLevel(Vector.DF, 0, None, CODE0, EIP),
        FaultLevel(Vector.GP, 8 * 8 + 2 | EXT, None, CODE0, EIP),
    )
    assert str(caught.value).startswith("0xe at 0x0008:0x5000 -> 0xd at 0x0008:0x5000 -> 0x8 at")
    cpu.state.cr2 = 0
    assert cpu.state.pack() == registers


def test_an_interrupt_from_outside_heads_its_chain() -> None:
    cpu = protected_cpu()
    cpu.state.idtr.limit = 0
    with pytest.raises(TripleFault) as caught:
        deliver_event(cpu, 0x20, external=True, error_code=None, return_eip=EIP)
    chain = caught.value.chain
    assert chain[0] == FaultLevel(0x20, None, None, CODE0, EIP, external=True)
    assert [level.vector for level in chain] == [0x20, Vector.GP, Vector.GP, Vector.DF, Vector.GP]
    assert chain[1].error_code == 0x20 * 8 + 2 | EXT


def test_a_task_gate_saves_rf_and_passes_the_error_code() -> None:
    cpu = protected_cpu()
    set_descriptor(cpu, FREE, encode_segment(OTHER_TSS, 0x67, PRESENT | TSS32))
    cpu.memory.write(OTHER_TSS, handler_task())
    set_gate(cpu, 13, TASK_GATE, FREE, 0)
    cpu.state.gpr[EAX] = 0x99
    raise_exception(cpu, general_protection(0x5678), EIP)
    assert (cpu.state.eip, cpu.state.eflags) == (HANDLER, 2 | NT)
    assert stack(cpu, 1) == [0x5678]
    assert cpu.memory.load(TSS + 0x24, 4) == 2 | RF
    assert cpu.memory.load(TSS + 0x20, 4) == EIP
    assert cpu.memory.load(TSS + 0x28, 4) == 0x99
    # The task is busy now.
    with fault(cpu, Vector.GP, FREE | EXT):
        deliver(cpu, 13, software=False, external=False, error_code=0, return_eip=EIP)


def test_a_fault_in_the_new_task_returns_to_its_first_instruction() -> None:
    cpu = with_handlers(10)
    set_descriptor(cpu, FREE, encode_segment(OTHER_TSS, 0x67, PRESENT | TSS32))
    cpu.memory.write(OTHER_TSS, handler_task(0x4444, FREE))
    set_gate(cpu, 0x20, TASK_GATE, FREE, 0)
    deliver_event(cpu, 0x20, external=True, error_code=None, return_eip=EIP)
    assert cpu.state.eip == HANDLER + 10
    assert stack(cpu, 2) == [FREE | EXT, 0x4444]
    assert cpu.memory.load(TSS + 0x20, 4) == EIP


def vme_cpu(level_needed: int, intercepted: bool, flags: int = 0) -> Cpu:
    cpu = with_handlers(0x21, level=3)
    cpu.state.tr.load(TSS_SELECTOR, TSS, 0xFF, PRESENT | TSS32 | 2)
    cpu.memory.store(TSS + 0x66, 2, 0x88)
    cpu.memory.write(TSS + 0x68 + 0x21 // 8, bytes([1 << (0x21 & 7) if intercepted else 0]))
    cpu.memory.write(0x21 * 4, struct.pack("<HH", 0x1234, 0x300))
    for segment in cpu.state.segments:
        segment.load(0x400, 0x4000, 0xFFFF, 0xF3)
    cpu.state.eflags = 2 | VM | level_needed << 12 | flags
    cpu.state.gpr[ESP] = 0x100
    cpu.state.cr4 = CR4_VME
    cpu.set_cpl(3)
    return cpu


@pytest.mark.parametrize("level_needed", [0, 3])
def test_redirected_interrupts_stay_in_virtual_8086_mode(level_needed: int) -> None:
    cpu = vme_cpu(level_needed, intercepted=False, flags=VIF | TF | NT | (IF if level_needed == 3 else 0))
    software_interrupt(cpu, 0x21, 0x56)
    state = cpu.state
    assert (state.segments[CS].fields, state.eip) == ((0x300, 0x3000, 0xFFFF, 0xF3), 0x1234)
    assert cpu.memory.read(0x40FA, 6) == struct.pack("<HHH", 0x56, 0x400, 2 | IOPL | IF | TF | NT)
    assert state.eflags == 2 | VM | NT | (IOPL | VIF if level_needed == 3 else 0)


def test_intercepted_interrupts_need_iopl_3() -> None:
    cpu = vme_cpu(3, intercepted=True)
    software_interrupt(cpu, 0x21, 0x56)
    assert (cpu.state.cpl, cpu.state.eip) == (0, HANDLER + 0x21)
    cpu = vme_cpu(2, intercepted=True)
    with fault(cpu, Vector.GP, 0):
        software_interrupt(cpu, 0x21, 0x56)
    cpu = vme_cpu(2, intercepted=False)
    cpu.state.cr4 = 0
    with fault(cpu, Vector.GP, 0):
        software_interrupt(cpu, 0x21, 0x56)


@pytest.mark.parametrize(
    ("limit", "base", "kind"), [(0x66, 0x88, TSS32), (0xFF, 0x11C, TSS32), (0xFF, 0x10, TSS32), (0xFF, 0x88, 1)]
)
def test_a_redirection_bitmap_out_of_reach(limit: int, base: int, kind: int) -> None:
    cpu = vme_cpu(3, intercepted=False)
    cpu.state.tr.load(TSS_SELECTOR, TSS, limit, PRESENT | kind | 2)
    cpu.memory.store(TSS + 0x66, 2, base)
    with fault(cpu, Vector.GP, 0):
        software_interrupt(cpu, 0x21, 0x56)


def test_nothing_is_written_if_the_frame_runs_into_a_missing_page() -> None:
    cpu = with_handlers(13)
    for page in range(32):
        cpu.memory.store(0x1_1000 + page * 4, 4, page << 12 | (0 if page == 7 else 0x67))
    cpu.memory.store(0x1_0000, 4, 0x1_1027)
    cpu.state.cr3 = 0x1_0000
    cpu.state.cr0 |= 1 << 31
    cpu.state.gpr[ESP] = 0x8008
    with fault(cpu, Vector.PF, 2):
        deliver(cpu, 13, software=False, external=False, error_code=0, return_eip=EIP)
