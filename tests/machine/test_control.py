"""Control, debug and model-specific registers, flags and ports, called directly."""

from __future__ import annotations

import pytest

from machine.control import (
    MSRS,
    check_io,
    check_privilege,
    clear_interrupts,
    clear_task_switched,
    load_msw,
    pop_flags,
    push_flags_image,
    read_cr,
    read_dr,
    read_msr,
    set_interrupts,
    write_cr,
    write_dr,
    write_msr,
)
from machine.cpu import Cpu
from machine.faults import DebugFault, Vector
from machine.flags import AC, CF, DF, ID, IF, IOPL, NT, OF, RF, STATUS_MASK, TF, VIF, VIP, VM
from machine.state import (
    CR0_AM,
    CR0_CD,
    CR0_ET,
    CR0_NW,
    CR0_PE,
    CR0_PG,
    CR0_TS,
    CR0_WP,
    CR4_DE,
    CR4_MCE,
    CR4_PAE,
    CR4_PSE,
    CR4_PVI,
    CR4_VME,
    CS,
    DR6_BD,
    DR7_GD,
    SHADOW_NONE,
    SHADOW_STI,
)
from tests.machine.ring0 import PRESENT, TSS, TSS_SELECTOR, fault, protected_cpu, to_ring_3
from tests.oracles.reference import build_cpu


def test_cr0_keeps_what_exists() -> None:
    cpu = protected_cpu()
    write_cr(cpu, 0, 0x7FFF_FFFF)
    assert read_cr(cpu, 0) == 0x6005_003F
    write_cr(cpu, 0, CR0_PE)
    assert read_cr(cpu, 0) == CR0_PE | CR0_ET


@pytest.mark.parametrize("value", [CR0_PG, CR0_PG | CR0_CD, CR0_PE | CR0_NW, CR0_PE | CR0_PG | CR0_NW])
def test_impossible_combinations_in_cr0(value: int) -> None:
    cpu = protected_cpu()
    with fault(cpu, Vector.GP, 0):
        write_cr(cpu, 0, value)


@pytest.mark.parametrize("number", [1, 5, 6, 7])
def test_control_registers_that_do_not_exist(number: int) -> None:
    cpu = protected_cpu()
    with fault(cpu, Vector.UD, None):
        read_cr(cpu, number)
    with fault(cpu, Vector.UD, None):
        write_cr(cpu, number, 0)


def test_entering_and_leaving_protected_mode_keeps_the_code_segment_usable() -> None:
    cpu = build_cpu(1)
    cpu.reset()
    write_cr(cpu, 0, CR0_PE | CR0_ET)
    assert cpu.state.segments[CS].fields == (0xF000, 0xFFFF_0000, 0xFFFF, 0x93)
    cpu.state.segments[CS].load(8, 0x1000, 0xFFFF_FFFF, 0xC9B)
    write_cr(cpu, 0, CR0_ET)
    assert cpu.state.segments[CS].fields == (8, 0x1000, 0xFFFF_FFFF, 0xC93)
    cpu.mmu.store(cpu.state.segments[CS], 0, 1, 0x5A)
    assert cpu.state.cpl == 0


def test_cr4_has_the_bits_of_the_model() -> None:
    cpu = protected_cpu()
    for bit in range(32):
        if cpu.model.cr4_mask >> bit & 1:
            write_cr(cpu, 4, 1 << bit)
            assert read_cr(cpu, 4) == 1 << bit
        else:
            with fault(cpu, Vector.GP, 0):
                write_cr(cpu, 4, 1 << bit)
    assert not cpu.model.cr4_mask & CR4_MCE


@pytest.mark.parametrize(
    ("entry", "good"),
    [(0, True), (0x1019, True), (0xE01, True), (2, True), (0x103, False), (0x21, False), (1 << 36 | 1, False)],
)
def test_pdptes_are_checked_when_paging_would_use_them(entry: int, good: bool) -> None:
    cpu = protected_cpu()
    cpu.memory.write(0x1_0020, entry.to_bytes(8, "little"))
    cpu.state.cr3 = 0x1_0020
    cpu.state.cr4 = CR4_PAE
    if good:
        write_cr(cpu, 0, cpu.state.cr0 | CR0_PG)
        write_cr(cpu, 3, 0x1_0020)
        write_cr(cpu, 4, CR4_PAE | CR4_PSE)
        return
    with fault(cpu, Vector.GP, 0):
        write_cr(cpu, 0, cpu.state.cr0 | CR0_PG)
    cpu.state.cr0 |= CR0_PG
    with fault(cpu, Vector.GP, 0):
        write_cr(cpu, 3, 0x1_0020)
    with fault(cpu, Vector.GP, 0):
        write_cr(cpu, 4, CR4_PAE | CR4_PSE)
    cpu.state.cr4 = 0
    with fault(cpu, Vector.GP, 0):
        write_cr(cpu, 4, CR4_PAE)
    write_cr(cpu, 4, CR4_DE)


@pytest.mark.parametrize("bit", [CR0_PG, CR0_WP])
def test_cached_translations_go_with_the_bits_they_rest_on(bit: int) -> None:
    cpu = protected_cpu()
    cpu.mmu.load_system(0x5000, 4)
    assert cpu.mmu.entries
    write_cr(cpu, 0, cpu.state.cr0 | bit)
    assert not cpu.mmu.entries


def test_alignment_checks_follow_cr0_and_popf() -> None:
    cpu = protected_cpu()
    write_cr(cpu, 0, CR0_PE | CR0_AM)
    to_ring_3(cpu)
    pop_flags(cpu, AC, 4)
    assert cpu.mmu.aligned_only
    pop_flags(cpu, 0, 4)
    assert not cpu.mmu.aligned_only


def test_lmsw_cannot_leave_protected_mode() -> None:
    cpu = build_cpu(1)
    cpu.reset()
    load_msw(cpu, 0xFFF1)
    assert read_cr(cpu, 0) & 0xF == 1
    load_msw(cpu, 0xE)
    assert read_cr(cpu, 0) & 0xF == 0xF
    load_msw(cpu, 0)
    assert read_cr(cpu, 0) & 0xF == 1
    clear_task_switched(cpu)
    cpu.state.cr0 |= CR0_TS
    clear_task_switched(cpu)
    assert not cpu.state.cr0 & CR0_TS


def test_debug_registers_have_fixed_bits() -> None:
    cpu = protected_cpu()
    for number in range(4):
        write_dr(cpu, number, 0x1111_1111 * (number + 1))
    assert [read_dr(cpu, number) for number in range(4)] == [0x1111_1111 * n for n in range(1, 5)]
    for value, six, seven in ((0, 0xFFFF_0FF0, 0x400), (0xFFFF_DFFF, 0xFFFF_CFFF, 0xFFFF_07FF)):
        write_dr(cpu, 4, value)
        write_dr(cpu, 5, value)
        assert (read_dr(cpu, 6), read_dr(cpu, 7)) == (six, seven)
    cpu.state.cr4 = CR4_DE
    for number in (4, 5):
        with fault(cpu, Vector.UD, None):
            read_dr(cpu, number)


def test_guarded_debug_registers() -> None:
    cpu = protected_cpu()
    write_dr(cpu, 7, DR7_GD)
    for number in range(8):
        with pytest.raises(DebugFault) as caught:
            read_dr(cpu, number)
        assert caught.value.conditions == DR6_BD
    assert not cpu.state.dr[6] & DR6_BD, "delivery sets it"
    to_ring_3(cpu)
    with fault(cpu, Vector.GP, 0):
        read_dr(cpu, 7)


def test_the_msrs() -> None:
    cpu = protected_cpu()
    for number, name in ((0x174, "sysenter_cs"), (0x175, "sysenter_esp"), (0x176, "sysenter_eip")):
        write_msr(cpu, number, 0xAAAA_AAAA_1234_5678 + number)
        assert read_msr(cpu, number) == 0x1234_5678 + number
        assert getattr(cpu.state, name) == 0x1234_5678 + number
    for number in (0, 1, 0x8B):
        write_msr(cpu, number, 5)
        assert read_msr(cpu, number) == 0
    for number in (2, 0x1B, 0xC000_0080):
        with fault(cpu, Vector.GP, 0):
            read_msr(cpu, number)
        with fault(cpu, Vector.GP, 0):
            write_msr(cpu, number, 0)
    assert set(MSRS) == {0, 1, 0x10, 0x8B, 0x174, 0x175, 0x176}
    to_ring_3(cpu)
    with fault(cpu, Vector.GP, 0):
        read_msr(cpu, 0x174)


def test_writing_the_time_stamp_counter_moves_it() -> None:
    cpu = protected_cpu()
    cpu.clock.icount = 1000
    for value in (0, 5, 0xFFFF_FFFF_FFFF_FFFF, 1 << 63):
        write_msr(cpu, 0x10, value)
        assert read_msr(cpu, 0x10) == value
        cpu.clock.icount += 7
        assert read_msr(cpu, 0x10) == (value + 7 * cpu.clock.ns_per_insn) & 0xFFFF_FFFF_FFFF_FFFF


def test_privilege() -> None:
    cpu = protected_cpu()
    check_privilege(cpu)
    cpu.set_cpl(1)
    with fault(cpu, Vector.GP, 0):
        check_privilege(cpu)


def with_bitmap(cpu: Cpu, bitmap: bytes, limit: int, base: int = 0x68) -> Cpu:
    cpu.state.tr.load(TSS_SELECTOR, TSS, limit, PRESENT | 0xB)
    cpu.memory.store(TSS + 0x66, 2, base)
    cpu.memory.write(TSS + base, bitmap)
    to_ring_3(cpu)
    return cpu


def test_ports_by_the_bitmap() -> None:
    cpu = with_bitmap(protected_cpu(), b"\x00\x81\x00\xff", 0x6B)
    for port, size in ((0, 4), (4, 4), (9, 4), (11, 4), (16, 4), (20, 4)):
        check_io(cpu, port, size)
    for port, size in ((5, 4), (7, 2), (8, 1), (12, 4), (14, 2), (15, 1), (15, 4), (21, 4), (24, 1), (0xFFFF, 1)):
        with fault(cpu, Vector.GP, 0):
            check_io(cpu, port, size)
    cpu.state.eflags |= IOPL
    check_io(cpu, 0xFFFF, 4)
    cpu.state.eflags |= VM
    with fault(cpu, Vector.GP, 0):
        check_io(cpu, 8, 1)


def test_ports_without_a_bitmap() -> None:
    cpu = with_bitmap(protected_cpu(), b"", 0x66)
    with fault(cpu, Vector.GP, 0):
        check_io(cpu, 0, 1)
    cpu.state.tr.load(TSS_SELECTOR, TSS, 0xFF, PRESENT | 3)
    with fault(cpu, Vector.GP, 0):
        check_io(cpu, 0, 1)
    real = build_cpu(1)
    real.reset()
    check_io(real, 0xFFFF, 4)


def flags_cpu(level: int, level_needed: int, flags: int = 0, cr4: int = 0) -> Cpu:
    """`level` 4 is virtual-8086 mode."""
    cpu = protected_cpu()
    cpu.state.cr4 = cr4
    cpu.state.eflags = 2 | level_needed << 12 | flags | (VM if level == 4 else 0)
    cpu.set_cpl(min(level, 3))
    return cpu


def test_popf_in_real_mode() -> None:
    cpu = build_cpu(1)
    cpu.reset()
    cpu.state.eflags = 2 | RF | VIF
    pop_flags(cpu, 0xFFFF_FFFF, 4)
    assert cpu.state.eflags == STATUS_MASK | TF | IF | DF | IOPL | NT | AC | ID | VIF | 2
    pop_flags(cpu, 0, 2)
    assert cpu.state.eflags == AC | ID | VIF | 2


@pytest.mark.parametrize(
    ("level", "level_needed", "changed"),
    [(0, 0, IF | IOPL), (1, 1, IF), (1, 0, 0), (3, 2, 0), (3, 3, IF), (4, 3, IF)],
)
def test_popf_changes_what_cpl_and_iopl_allow(level: int, level_needed: int, changed: int) -> None:
    cpu = flags_cpu(level, level_needed)
    pop_flags(cpu, 0xFFFF_FFFF, 4)
    kept = IOPL if changed & IOPL else level_needed << 12
    expected = 2 | STATUS_MASK | TF | DF | NT | AC | ID | changed & IF | kept | (VM if level == 4 else 0)
    assert cpu.state.eflags == expected


def test_popf_in_virtual_8086_mode_with_vme() -> None:
    cpu = flags_cpu(4, 0, cr4=CR4_VME)
    pop_flags(cpu, 0xFFFF & ~TF, 2)
    assert cpu.state.eflags == 2 | VM | VIF | STATUS_MASK | DF | NT
    pop_flags(cpu, 0, 2)
    assert cpu.state.eflags == 2 | VM
    for value, flags, size in ((TF, 0, 2), (IF, VIP, 2), (0, 0, 4)):
        cpu = flags_cpu(4, 0, flags, CR4_VME)
        with fault(cpu, Vector.GP, 0):
            pop_flags(cpu, value, size)
    cpu = flags_cpu(4, 2)
    with fault(cpu, Vector.GP, 0):
        pop_flags(cpu, 0, 2)


def test_pushf() -> None:
    assert push_flags_image(flags_cpu(0, 2, RF | VIF | CF), 4) == 2 | VIF | CF | 2 << 12
    assert push_flags_image(flags_cpu(4, 3, IF), 4) == 2 | IOPL | IF
    assert push_flags_image(flags_cpu(4, 3, IF | VIF), 2) == 2 | IOPL | IF
    assert push_flags_image(flags_cpu(4, 1, IF, CR4_VME), 2) == 2 | IOPL
    assert push_flags_image(flags_cpu(4, 1, VIF, CR4_VME), 2) == 2 | IOPL | IF
    for cpu, size in ((flags_cpu(4, 1, 0, CR4_VME), 4), (flags_cpu(4, 1), 2)):
        with fault(cpu, Vector.GP, 0):
            push_flags_image(cpu, size)


@pytest.mark.parametrize(
    ("level", "level_needed", "cr4", "flag"),
    [
        (0, 0, 0, IF), (3, 3, 0, IF), (3, 2, 0, 0), (3, 2, CR4_PVI, VIF), (1, 0, CR4_PVI, 0), (3, 0, CR4_VME, 0),
        (4, 3, 0, IF), (4, 2, 0, 0), (4, 2, CR4_VME, VIF), (4, 2, CR4_PVI, 0),
    ],
)  # fmt: skip
def test_cli_and_sti(level: int, level_needed: int, cr4: int, flag: int) -> None:
    cpu = flags_cpu(level, level_needed, cr4=cr4)
    before = cpu.state.eflags
    if not flag:
        for operation in (set_interrupts, clear_interrupts):
            with fault(cpu, Vector.GP, 0):
                operation(cpu)
        return
    set_interrupts(cpu)
    assert cpu.state.eflags == before | flag
    assert cpu.state.shadow == (SHADOW_STI if flag == IF else SHADOW_NONE)
    clear_interrupts(cpu)
    assert cpu.state.eflags == before
    cpu.state.eflags |= VIP
    if flag == VIF:
        with fault(cpu, Vector.GP, 0):
            set_interrupts(cpu)
    else:
        set_interrupts(cpu)


def test_sti_holds_interrupts_off_only_if_they_were_off() -> None:
    cpu = flags_cpu(0, 0, IF | OF)
    set_interrupts(cpu)
    assert cpu.state.shadow == SHADOW_NONE
