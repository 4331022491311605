"""Task switches called directly: what is saved and loaded, the commit point, and old TSSs that are too small."""

from __future__ import annotations

import struct

import pytest

from machine.cpu import Cpu
from machine.descriptors import LDT, TSS16, TSS32, Descriptor, encode_segment, read_descriptor
from machine.faults import EXT, GuestFault, Vector
from machine.flags import IF, IOPL, NT, VIF, VIP, VM
from machine.state import CR0_PG, CR0_TS, CR4_PVI, CR4_VME, CS, DR6_BT, EAX, ESP, FS, SS
from machine.tasks import SwitchKind, check_virtual_interrupt, inner_stack, switch_task
from tests.machine.ring0 import (
    CODE0,
    CODE3,
    DATA,
    DATA0,
    DATA3,
    FREE,
    LDT_SELECTOR,
    OTHER_TSS,
    PRESENT,
    STACK3,
    TSS,
    TSS_SELECTOR,
    descriptor_of,
    fault,
    flat,
    protected_cpu,
    set_descriptor,
    stack,
)

FIELDS_32 = (
    "link", "esp0", "ss0", "esp1", "ss1", "esp2", "ss2", "cr3", "eip", "eflags", "eax", "ecx", "edx", "ebx", "esp",
    "ebp", "esi", "edi", "es", "cs", "ss", "ds", "fs", "gs", "ldt", "trap",
)  # fmt: skip
RETURN_EIP = 0x1234_5678


def two_tasks(kind: int = TSS32, limit: int = 0x67, **changes: int) -> tuple[Cpu, Descriptor]:
    """A CPU, and a second task that would run at CPL 0."""
    cpu = protected_cpu()
    set_descriptor(cpu, FREE, encode_segment(OTHER_TSS, limit, PRESENT | kind))
    fields = {
        "eip": 0x6000, "eflags": 2, "eax": 0xE0E0_E0E0, "esp": 0x7000, "es": DATA0, "cs": CODE0, "ss": DATA0,
        "ds": DATA0, "fs": DATA3, "ldt": LDT_SELECTOR,
    }  # fmt: skip
    values = {**fields, **changes}
    cpu.memory.write(OTHER_TSS, struct.pack("<26I", *(values.get(name, 0) for name in FIELDS_32)))
    target = read_descriptor(cpu, FREE)
    assert target is not None
    return cpu, target


def saved(cpu: Cpu, offset: int, size_bytes: int = 4) -> int:
    return cpu.memory.load(TSS + offset, size_bytes)


def is_busy(cpu: Cpu, selector: int) -> bool:
    return bool(descriptor_of(cpu, selector) >> 41 & 1)


def test_a_call_saves_the_old_task_and_links_back() -> None:
    cpu, target = two_tasks()
    state = cpu.state
    state.gpr[:] = [1, 2, 3, 4, 0x8000, 6, 7, 8]
    state.eflags = 0x203
    switch_task(cpu, FREE, target, SwitchKind.CALL, RETURN_EIP)
    assert [saved(cpu, 0x28 + 4 * n) for n in range(8)] == [1, 2, 3, 4, 0x8000, 6, 7, 8]
    assert (saved(cpu, 0x20), saved(cpu, 0x24)) == (RETURN_EIP, 0x203)
    assert [saved(cpu, 0x48 + 4 * n) for n in range(6)] == [DATA0, CODE0, DATA0, DATA0, DATA0, DATA0]
    assert saved(cpu, 0x60) == 0, "LDTR and CR3 are not saved"
    assert cpu.memory.load(OTHER_TSS, 2) == TSS_SELECTOR
    assert (state.eip, state.eflags, state.gpr[EAX], state.gpr[ESP]) == (0x6000, 2 | NT, 0xE0E0_E0E0, 0x7000)
    assert state.cr0 & CR0_TS
    assert state.tr.fields == (FREE, OTHER_TSS, 0x67, PRESENT | TSS32 | 2)
    assert is_busy(cpu, FREE)
    assert is_busy(cpu, TSS_SELECTOR)
    assert state.segments[FS].selector == DATA3


def test_a_jump_frees_the_old_task() -> None:
    cpu, target = two_tasks()
    switch_task(cpu, FREE, target, SwitchKind.JUMP, RETURN_EIP)
    assert is_busy(cpu, FREE)
    assert not is_busy(cpu, TSS_SELECTOR)
    assert not cpu.state.eflags & NT
    assert cpu.memory.load(OTHER_TSS, 2) == 0


def test_a_return_frees_the_old_task_and_clears_its_nt() -> None:
    cpu, target = two_tasks(TSS32 | 2, eflags=2 | NT)
    cpu.state.eflags = 2 | NT | IF
    switch_task(cpu, FREE, target, SwitchKind.RETURN, RETURN_EIP)
    assert saved(cpu, 0x24) == 2 | IF
    assert cpu.state.eflags == 2 | NT
    assert not is_busy(cpu, TSS_SELECTOR)
    assert is_busy(cpu, FREE)


def test_a_16_bit_task_has_halves() -> None:
    cpu, _ = two_tasks()
    set_descriptor(cpu, FREE, encode_segment(OTHER_TSS, 0x2B, PRESENT | TSS16))
    words = [0] * 22
    words[7], words[8], words[9], words[13] = 0x6000, 2, 0xAAAA, 0x7000
    words[17:22] = [DATA0, CODE0, DATA0, DATA0, 0]
    cpu.memory.write(OTHER_TSS, struct.pack("<22H", *words))
    target = read_descriptor(cpu, FREE)
    assert target is not None
    switch_task(cpu, FREE, target, SwitchKind.CALL, RETURN_EIP)
    state = cpu.state
    assert (state.gpr[EAX], state.gpr[ESP], state.eip) == (0xFFFF_AAAA, 0xFFFF_7000, 0x6000)
    assert not state.segments[FS].present
    assert not state.ldtr.present
    # And back out of it: 16 bits are saved.
    state.gpr[EAX] = 0x1234_5678
    back = read_descriptor(cpu, TSS_SELECTOR)
    assert back is not None
    switch_task(cpu, TSS_SELECTOR, back, SwitchKind.RETURN, RETURN_EIP)
    assert cpu.memory.load(OTHER_TSS + 0x12, 2) == 0x5678
    assert cpu.memory.load(OTHER_TSS + 0x0E, 2) == RETURN_EIP & 0xFFFF
    assert cpu.memory.load(OTHER_TSS + 0x10, 2) == 2
    assert state.segments[CS].selector == CODE0


@pytest.mark.parametrize(("kind", "limit"), [(TSS32, 0x66), (TSS16, 0x2A)])
def test_a_tss_that_is_too_small(kind: int, limit: int) -> None:
    cpu, target = two_tasks(kind, limit)
    for ext in (0, EXT):
        with fault(cpu, Vector.TS, FREE | ext):
            switch_task(cpu, FREE, target, SwitchKind.JUMP, RETURN_EIP, ext=ext)


def test_a_tss_that_is_not_present() -> None:
    cpu, _ = two_tasks()
    set_descriptor(cpu, FREE, encode_segment(OTHER_TSS, 0x67, TSS32))
    target = read_descriptor(cpu, FREE)
    assert target is not None
    with fault(cpu, Vector.NP, FREE):
        switch_task(cpu, FREE, target, SwitchKind.JUMP, RETURN_EIP)


def test_the_old_tss_must_hold_what_is_saved() -> None:
    cpu, target = two_tasks()
    cpu.state.tr.load(TSS_SELECTOR, TSS, 0x5E, cpu.state.tr.attributes)
    with fault(cpu, Vector.TS, TSS_SELECTOR):
        switch_task(cpu, FREE, target, SwitchKind.JUMP, RETURN_EIP)
    cpu.state.tr.load(TSS_SELECTOR, TSS, 0x5F, cpu.state.tr.attributes)
    switch_task(cpu, FREE, target, SwitchKind.JUMP, RETURN_EIP)
    assert cpu.state.tr.selector == FREE


@pytest.mark.parametrize(
    ("changes", "vector", "code"),
    [
        ({"ldt": DATA0}, Vector.TS, DATA0),
        ({"ldt": 4}, Vector.TS, 4),
        ({"ldt": FREE + 16}, Vector.TS, FREE + 16),
        ({"ldt": FREE + 16, "cs": 0}, Vector.TS, FREE + 16),
        ({"ldt": FREE + 16, "eflags": 2 | VM}, Vector.TS, FREE + 16),
        ({"ldt": DATA0, "eflags": 2 | VM}, Vector.TS, DATA0),
        ({"cs": 0}, Vector.TS, 0),
        ({"cs": DATA0}, Vector.TS, DATA0),
        ({"cs": CODE0 | 3}, Vector.TS, CODE0),
        ({"cs": CODE3}, Vector.TS, DATA0),
        ({"ss": 0}, Vector.TS, 0),
        ({"ss": DATA3}, Vector.TS, DATA3 & ~3),
        ({"ds": FREE}, Vector.TS, FREE),
        ({"es": 0x1FF}, Vector.TS, 0x1FC),
        ({"gs": FREE + 8}, Vector.NP, FREE + 8),
        ({"ss": FREE + 8}, Vector.SS, FREE + 8),
    ],
)
def test_after_the_commit_point_faults_are_the_new_tasks(changes: dict[str, int], vector: int, code: int) -> None:
    cpu, target = two_tasks(**changes)
    set_descriptor(cpu, FREE + 8, flat(DATA & ~0x80))
    set_descriptor(cpu, FREE + 16, encode_segment(0x1800, 0x3F, LDT))
    with pytest.raises(GuestFault) as caught:
        switch_task(cpu, FREE, target, SwitchKind.CALL, RETURN_EIP, ext=EXT)
    assert (caught.value.vector, caught.value.error_code) == (vector, code | EXT)
    assert caught.value.return_eip == 0x6000
    assert cpu.state.tr.selector == FREE
    assert saved(cpu, 0x20) == RETURN_EIP


def test_what_is_good_is_loaded_beside_what_is_bad() -> None:
    cpu, target = two_tasks(ds=FREE)
    with pytest.raises(GuestFault):
        switch_task(cpu, FREE, target, SwitchKind.JUMP, RETURN_EIP)
    present = [segment.present for segment in cpu.state.segments]
    assert present == [True, True, True, False, True, False]
    assert cpu.state.segments[3].selector == FREE


def test_the_error_code_goes_to_the_new_stack_with_the_new_rights() -> None:
    cpu, target = two_tasks(cs=CODE3, ss=DATA3, ds=DATA3, es=DATA3, esp=STACK3)
    switch_task(cpu, FREE, target, SwitchKind.CALL, RETURN_EIP, ext=EXT, error_code=0xABC)
    assert cpu.state.cpl == 3
    assert cpu.state.gpr[ESP] == STACK3 - 4
    assert stack(cpu, 1) == [0xABC]


def test_no_room_for_the_error_code() -> None:
    cpu, target = two_tasks(esp=3, ss=FREE + 8)
    set_descriptor(cpu, FREE + 8, encode_segment(0, 0xFFF, DATA | 0x400))
    with pytest.raises(GuestFault) as caught:
        switch_task(cpu, FREE, target, SwitchKind.CALL, RETURN_EIP, ext=EXT, error_code=0xABC)
    assert (caught.value.vector, caught.value.error_code, caught.value.return_eip) == (Vector.SS, EXT, 0x6000)


def test_eip_must_be_within_the_new_code_segment() -> None:
    cpu, target = two_tasks(cs=FREE + 8)
    set_descriptor(cpu, FREE + 8, encode_segment(0, 0x5FFF, 0x9B))
    with pytest.raises(GuestFault) as caught:
        switch_task(cpu, FREE, target, SwitchKind.JUMP, RETURN_EIP)
    assert (caught.value.vector, caught.value.error_code, caught.value.return_eip) == (Vector.GP, 0, 0x6000)
    cpu, target = two_tasks(cs=FREE + 8)
    set_descriptor(cpu, FREE + 8, encode_segment(0, 0x6000, 0x9B))
    switch_task(cpu, FREE, target, SwitchKind.JUMP, RETURN_EIP)
    assert cpu.state.eip == 0x6000


@pytest.mark.parametrize(
    ("flags", "cr4", "level", "faults"),
    [
        (VIF | VIP, CR4_PVI, 3, True),
        (VIF | VIP, CR4_VME, 3, False),
        (VIF | VIP, CR4_PVI, 2, False),
        (VIF | VIP | VM, CR4_VME, 3, True),
        (VIF | VIP | VM, CR4_PVI, 3, True),
        (VIF | VIP | VM, 0, 3, False),
        (VIF | VIP | IOPL, CR4_PVI | CR4_VME, 3, False),
        (VIF | VIP | 2 << 12, CR4_PVI, 3, True),
        (VIF, CR4_PVI, 3, False),
        (VIP, CR4_PVI, 3, False),
    ],
)
def test_a_virtual_interrupt_that_is_pending_and_enabled(flags: int, cr4: int, level: int, faults: bool) -> None:
    cpu = protected_cpu()
    cpu.state.eflags, cpu.state.cr4 = 2 | flags, cr4
    cpu.set_cpl(level)
    if faults:
        with fault(cpu, Vector.GP, 0):
            check_virtual_interrupt(cpu)
    else:
        check_virtual_interrupt(cpu)


def test_the_t_bit_makes_a_trap_and_local_breakpoints_stay_behind() -> None:
    cpu, target = two_tasks(trap=1)
    cpu.state.dr[7] = 0x7FF
    switch_task(cpu, FREE, target, SwitchKind.JUMP, RETURN_EIP)
    assert cpu.pending_debug == DR6_BT
    assert cpu.state.dr[7] == 0x7FF & ~0x155


def test_a_virtual_8086_task() -> None:
    cpu, target = two_tasks(eflags=2 | VM, cs=0x123, ss=0x456, gs=0xFFFF)
    switch_task(cpu, FREE, target, SwitchKind.JUMP, RETURN_EIP)
    assert cpu.state.cpl == 3
    assert cpu.state.segments[CS].fields == (0x123, 0x1230, 0xFFFF, 0xF3)
    assert cpu.state.segments[SS].fields == (0x456, 0x4560, 0xFFFF, 0xF3)
    assert cpu.state.ldtr.present


def test_cr3_is_loaded_only_with_paging() -> None:
    cpu, target = two_tasks(cr3=0x1_0000)
    switch_task(cpu, FREE, target, SwitchKind.JUMP, RETURN_EIP)
    assert cpu.state.cr3 == 0
    cpu, target = two_tasks(cr3=0x1_0000)
    for directory in (0x1_0000, 0x2_0000):
        cpu.memory.store(directory, 4, 0x1_1003)
    for page in range(32):
        cpu.memory.store(0x1_1000 + page * 4, 4, page << 12 | 3)
    cpu.state.cr3 = 0x2_0000
    cpu.state.cr0 |= CR0_PG
    switch_task(cpu, FREE, target, SwitchKind.JUMP, RETURN_EIP)
    assert cpu.state.cr3 == 0x1_0000


def test_a_page_that_misses_stops_the_switch_before_it_begins() -> None:
    for missing, write in ((OTHER_TSS >> 12, False), (TSS >> 12, True)):
        cpu, _ = two_tasks()
        # The other TSS on a page of its own.
        cpu.memory.write(0x4F00, cpu.memory.read(OTHER_TSS, 0x68))
        set_descriptor(cpu, FREE, encode_segment(0x4F00, 0x67, PRESENT | TSS32))
        absent = 4 if not write else missing
        for page in range(32):
            cpu.memory.store(0x1_1000 + page * 4, 4, page << 12 | (0 if page == absent else 0x63))
        cpu.memory.store(0x1_0000, 4, 0x1_1023)
        cpu.state.cr3 = 0x1_0000
        cpu.state.cr0 |= CR0_PG
        target = read_descriptor(cpu, FREE)
        assert target is not None
        with fault(cpu, Vector.PF, 2 if write else 0):
            switch_task(cpu, FREE, target, SwitchKind.CALL, RETURN_EIP)


def test_inner_stacks_of_both_formats() -> None:
    cpu = protected_cpu()
    cpu.memory.write(TSS, struct.pack("<7I", 0, 0x1111_1111, 0x10, 0x2222_2222, 0x21, 0x3333_3333, 0x32))
    wide = [(0x10, 0x1111_1111), (0x21, 0x2222_2222), (0x32, 0x3333_3333)]
    assert [inner_stack(cpu, level, 0) for level in range(3)] == wide
    cpu.memory.write(TSS, struct.pack("<7H", 0, 0x1111, 0x10, 0x2222, 0x21, 0x3333, 0x32))
    cpu.state.tr.load(TSS_SELECTOR, TSS, 0x2B, PRESENT | TSS16 | 2)
    assert [inner_stack(cpu, level, 0) for level in range(3)] == [(0x10, 0x1111), (0x21, 0x2222), (0x32, 0x3333)]


@pytest.mark.parametrize(("kind", "level", "limit"), [(TSS32, 0, 9), (TSS32, 2, 25), (TSS16, 0, 5), (TSS16, 2, 13)])
def test_inner_stacks_beyond_the_limit(kind: int, level: int, limit: int) -> None:
    cpu = protected_cpu()
    cpu.state.tr.load(TSS_SELECTOR, TSS, limit, PRESENT | kind | 2)
    inner_stack(cpu, level, 0)
    cpu.state.tr.load(TSS_SELECTOR, TSS, limit - 1, PRESENT | kind | 2)
    with fault(cpu, Vector.TS, TSS_SELECTOR | EXT):
        inner_stack(cpu, level, EXT)
