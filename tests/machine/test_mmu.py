"""Paging and the coherent TLB: rights, A and D bits, error codes, and stores to page tables that act at once."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import pytest

from machine.faults import PF_PRESENT, PF_RESERVED, PF_USER, PF_WRITE, GuestFault, PageFault, Vector
from machine.memory import HOLDS_TABLE, WATCHED, MemorySizeError, PhysicalMemory
from machine.mmu import Mmu
from machine.paging import ACCESSED, DIRTY, PS, RW, US, P
from machine.state import CR0_AM, CR0_PE, CR0_PG, CR0_WP, CR4_PAE, CR4_PSE, DS, MASK32, SS, CpuState

DIRECTORY, TABLE = 0x1000, 0x2000
LINEAR, FRAME = 0x40_3000, 0x5000  # PDE 1, PTE 3
AC = 1 << 18


@dataclass
class Space:
    """A CPU's MMU with one page table: PDE 1 points to TABLE."""

    memory: PhysicalMemory = field(default_factory=lambda: PhysicalMemory(8 << 20))
    state: CpuState = field(default_factory=CpuState)
    mmu: Mmu = field(init=False)

    def __post_init__(self) -> None:
        self.mmu = Mmu(self.state, self.memory)
        self.state.cr0 = CR0_PE | CR0_PG
        self.state.cr3 = DIRECTORY
        for segment in self.state.segments:
            segment.load(0x10, 0, MASK32, 0xC93)
        self.set_pde(TABLE | P | RW | US)
        self.set_pte(FRAME | P | RW | US)

    def set_pde(self, value: int, index: int = 1) -> None:
        self.memory.store(DIRECTORY + 4 * index, 4, value)

    def set_pte(self, value: int, index: int = 3) -> None:
        self.memory.store(TABLE + 4 * index, 4, value)

    def pte(self, index: int = 3) -> int:
        return self.memory.load(TABLE + 4 * index, 4)

    def pde(self) -> int:
        return self.memory.load(DIRECTORY + 4, 4)

    @property
    def data(self) -> object:
        return self.state.segments[DS]

    def load(self, linear: int = LINEAR) -> int:
        return self.mmu.load32(self.state.segments[DS], linear)

    def store(self, value: int, linear: int = LINEAR) -> None:
        self.mmu.store32(self.state.segments[DS], linear, value)


@pytest.fixture
def space() -> Space:
    return Space()


def error_of(space: Space, *, write: bool, user: bool) -> int | None:
    space.mmu.set_user(user)
    try:
        if write:
            space.store(1)
        else:
            space.load()
    except PageFault as fault:
        return fault.error_code if fault.linear == LINEAR else -1
    return None


RIGHTS = [
    (pde, pte, wp, write, user)
    for pde in (P, P | RW, P | US, P | RW | US)
    for pte in (P, P | RW, P | US, P | RW | US)
    for wp in (False, True)
    for write in (False, True)
    for user in (False, True)
]


@pytest.mark.parametrize(("pde", "pte", "wp", "write", "user"), RIGHTS)
def test_rights_are_those_of_both_levels(pde: int, pte: int, wp: bool, write: bool, user: bool) -> None:
    space = Space()
    space.set_pde(TABLE | pde)
    space.set_pte(FRAME | pte)
    space.state.cr0 |= CR0_WP if wp else 0
    both = pde & pte
    refused = (user and not both & US) or (write and not both & RW and (user or wp))
    expected = PF_PRESENT | (PF_WRITE if write else 0) | (PF_USER if user else 0) if refused else None
    assert error_of(space, write=write, user=user) == expected
    # A page fault sets neither bit; an access sets A at both levels and D at the leaf if it writes.
    assert bool(space.pte() & ACCESSED) == (not refused)
    assert bool(space.pde() & ACCESSED) == (not refused)
    assert bool(space.pte() & DIRTY) == (write and not refused)
    assert not space.pde() & DIRTY


@pytest.mark.parametrize("level", ["pde", "pte"])
@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize("user", [False, True])
def test_a_page_that_is_not_present(space: Space, level: str, write: bool, user: bool) -> None:
    (space.set_pde if level == "pde" else space.set_pte)(0xFFFF_FFFE)
    expected = (PF_WRITE if write else 0) | (PF_USER if user else 0)
    assert error_of(space, write=write, user=user) == expected


def test_a_store_to_a_page_table_acts_at_once(space: Space) -> None:
    space.memory.store(FRAME, 4, 0x1111)
    space.memory.store(FRAME + 0x1000, 4, 0x2222)
    assert space.load() == 0x1111
    space.set_pte(FRAME + 0x1000 | P | RW | US)
    assert space.load() == 0x2222
    space.set_pte(0)
    with pytest.raises(PageFault):
        space.load()


def test_a_table_mapped_into_the_address_space_is_coherent_too(space: Space) -> None:
    space.set_pte(TABLE | P | RW, 4)
    space.memory.store(FRAME + 0x1000, 4, 0x2222)
    space.load()
    space.store(FRAME + 0x1000 | P | RW, LINEAR + 0x1000 + 12)
    assert space.load() == 0x2222


def test_a_byte_store_to_an_entry_counts(space: Space) -> None:
    space.load()
    space.memory.store(TABLE + 12, 1, 0)
    with pytest.raises(PageFault):
        space.load()


def test_rights_taken_away_act_at_once(space: Space) -> None:
    space.mmu.set_user(True)
    space.store(7)
    space.set_pte(FRAME | P | US | ACCESSED | DIRTY)
    assert space.load() == 7
    with pytest.raises(PageFault) as fault:
        space.store(8)
    assert fault.value.error_code == PF_PRESENT | PF_WRITE | PF_USER


def test_a_and_d_cleared_by_the_guest_are_set_again(space: Space) -> None:
    space.store(1)
    assert space.pte() & (ACCESSED | DIRTY) == ACCESSED | DIRTY
    space.set_pte(FRAME | P | RW | US)
    space.load()
    assert space.pte() & (ACCESSED | DIRTY) == ACCESSED
    space.store(1)
    assert space.pte() & (ACCESSED | DIRTY) == ACCESSED | DIRTY


def test_table_pages_lose_their_flag_with_the_last_translation(space: Space) -> None:
    space.load()
    assert space.memory.page_flags[TABLE >> 12] & HOLDS_TABLE
    space.mmu.flush()
    assert not space.memory.page_flags[TABLE >> 12] & HOLDS_TABLE


def test_a_store_to_an_entry_that_nothing_came_from_leaves_translations_alone(space: Space) -> None:
    told: list[bool] = []
    space.mmu.flush_observers.append(told.append)
    space.set_pte(FRAME | P | RW, 9)
    space.set_pde(TABLE | P | RW, 2)
    space.load()
    for at in (TABLE + 4 * 9, TABLE + 4 * 4, DIRECTORY + 4 * 2):
        space.memory.store(at, 4, 0)
        assert space.mmu.reads
    assert not told
    space.memory.store(TABLE + 4 * 3 + 1, 1, 0)
    assert not space.mmu.reads
    assert told == [True]
    space.load()
    space.set_pde(TABLE | P)
    assert not space.mmu.reads


def test_a_page_that_somebody_watches_is_walked_once_and_told_of_each_time(space: Space) -> None:
    told: list[tuple[int, int, bytes, int]] = []
    space.memory.write_observers.append(lambda *write: told.append(write))
    space.memory.flag_page(FRAME >> 12, WATCHED)
    for value in (5, 6, 7):
        space.store(value)
    assert [(at, int.from_bytes(old, "little"), flags) for at, _, old, flags in told if at == FRAME] == [
        (FRAME, 0, WATCHED), (FRAME, 5, WATCHED), (FRAME, 6, WATCHED),
    ]  # fmt: skip
    assert space.mmu.modify32(space.state.segments[DS], LINEAR) == 7
    assert not space.mmu.writes
    # As for any page, what the walk found out does not outlive the entry, the privilege or INVLPG.
    space.set_pte(FRAME | P | RW | US)
    space.store(8)
    assert space.pte() & DIRTY
    assert error_of(space, write=True, user=True) is None
    space.set_pte(FRAME | P | RW)
    assert error_of(space, write=True, user=True) == PF_PRESENT | PF_WRITE | PF_USER
    space.mmu.set_user(False)
    space.store(9)
    space.set_pte(FRAME + 0x1000 | P | RW)
    space.store(10)
    assert (space.memory.load(FRAME, 4), space.memory.load(FRAME + 0x1000, 4)) == (9, 10)
    space.store(11, LINEAR + 2)
    assert space.load(LINEAR + 2) == 11
    space.set_pte(FRAME | P | RW)
    space.store(12)
    space.memory.page_flags[FRAME >> 12] = 0
    count = len(told)
    space.store(13)
    assert len(told) == count
    assert space.load() == 13
    space.mmu.forget_page(LINEAR)
    assert not any(space.mmu._traced)


def test_large_pages(space: Space) -> None:
    space.state.cr4 |= CR4_PSE
    space.set_pde(0x40_0000 | P | RW | PS)
    space.memory.store(0x40_3000, 4, 0x3333)
    assert space.load() == 0x3333
    space.store(1)
    assert space.pde() & (ACCESSED | DIRTY) == ACCESSED | DIRTY


def test_reserved_bits_of_a_large_page(space: Space) -> None:
    space.state.cr4 |= CR4_PSE
    space.set_pde(0x40_2000 | P | RW | PS)
    with pytest.raises(PageFault) as fault:
        space.load()
    assert fault.value.error_code == PF_PRESENT | PF_RESERVED


def test_without_pse_the_bit_means_nothing(space: Space) -> None:
    space.set_pde(TABLE | P | RW | PS)
    space.memory.store(FRAME, 4, 5)
    assert space.load() == 5


class TestPae:
    @pytest.fixture
    def pae(self) -> Space:
        space = Space()
        space.state.cr4 |= CR4_PAE
        memory = space.memory
        memory.write(0x1000, bytes(0x3000))
        memory.store(0x1000, 4, 0x2000 | P)
        memory.store(0x2000 + 8 * 2, 4, 0x3000 | P | RW | US)
        memory.store(0x3000 + 8 * 3, 4, FRAME | P | RW | US)
        return space

    def test_three_levels(self, pae: Space) -> None:
        pae.memory.store(FRAME, 4, 0x77)
        assert pae.load() == 0x77
        pae.store(1)
        assert pae.memory.load(0x3000 + 24, 4) & (ACCESSED | DIRTY) == ACCESSED | DIRTY

    def test_a_two_megabyte_page(self, pae: Space) -> None:
        pae.memory.store(0x2000 + 16, 4, 0x20_0000 | P | RW | PS)
        pae.memory.store(0x20_3000, 4, 9)
        assert pae.load() == 9

    @pytest.mark.parametrize("at", [0x2000 + 16 + 4, 0x3000 + 24 + 4])
    def test_reserved_bits_above_the_physical_address(self, pae: Space, at: int) -> None:
        pae.memory.store(at, 4, 0x8000_0000)
        with pytest.raises(PageFault) as fault:
            pae.load()
        assert fault.value.error_code == PF_PRESENT | PF_RESERVED

    def test_the_upper_half_of_a_neighbour_does_not_matter(self, pae: Space) -> None:
        pae.load()
        pae.memory.store(0x3000 + 8 * 4 + 4, 4, 1)
        assert pae.mmu.reads
        pae.memory.store(0x3000 + 8 * 3 + 4, 4, 1)
        assert not pae.mmu.reads

    def test_the_upper_half_of_an_entry_acts_at_once(self, pae: Space) -> None:
        pae.load()
        pae.memory.store(0x3000 + 24 + 4, 4, 0x10)
        with pytest.raises(PageFault):
            pae.load()


class TestCrossing:
    def test_a_load_takes_each_half_from_its_page(self, space: Space) -> None:
        space.set_pte(0x8000 | P | RW, 4)
        space.memory.write(FRAME + 0xFFE, b"\x11\x22")
        space.memory.write(0x8000, b"\x33\x44")
        assert space.load(LINEAR + 0xFFE) == 0x4433_2211

    def test_a_store_writes_nothing_if_the_second_page_faults(self, space: Space) -> None:
        with pytest.raises(PageFault) as fault:
            space.store(0xAAAA_AAAA, LINEAR + 0xFFE)
        assert fault.value.linear == LINEAR + 0x1000
        assert space.memory.read(FRAME + 0xFFE, 2) == bytes(2)

    def test_an_access_over_four_gibibytes_wraps(self, space: Space) -> None:
        space.set_pde(TABLE | P | RW, 1023)
        space.set_pte(0x8000 | P | RW, 1023)
        space.set_pde(TABLE | P | RW, 0)
        space.set_pte(FRAME | P | RW, 0)
        space.memory.write(0x8FFE, b"\x01\x02")
        space.memory.write(FRAME, b"\x03\x04")
        assert space.load(0xFFFF_FFFE) == 0x0403_0201


class TestSegments:
    @pytest.mark.parametrize(
        ("limit", "attributes", "offset", "allowed"),
        [
            (0xFFFF, 0x93, 0xFFFC, True),
            (0xFFFF, 0x93, 0xFFFD, False),
            (0xFFF, 0x97, 0x1000, True),
            (0xFFF, 0x97, 0xFFF, False),
            (0xFFF, 0x97, 0xFFFC, True),
            (0xFFF, 0x97, 0xFFFD, False),
            (0xFFF, 0x497, 0xFFFF_FFFC, True),
            (0xFFF, 0x497, 0xFFFF_FFFD, False),
            (0xFFFF, 0x13, 0, False),
        ],
    )
    def test_limits(self, limit: int, attributes: int, offset: int, allowed: bool) -> None:
        space = Space()
        space.state.cr0 &= ~CR0_PG
        segment = space.state.segments[DS]
        segment.load(0x10, 0, limit, attributes)
        if allowed:
            space.load(offset)
        else:
            with pytest.raises(GuestFault) as fault:
                space.load(offset)
            assert (fault.value.vector, fault.value.error_code) == (Vector.GP, 0)

    def test_the_stack_segment_faults_as_such(self, space: Space) -> None:
        space.state.segments[SS].load(0x10, 0, 0xFFF, 0x493)
        with pytest.raises(GuestFault) as fault:
            space.mmu.load32(space.state.segments[SS], 0x1000)
        assert (fault.value.vector, fault.value.error_code) == (Vector.SS, 0)

    def test_a_read_only_segment_refuses_writes_and_read_modify_writes(self, space: Space) -> None:
        space.state.segments[DS].load(0x10, 0, MASK32, 0xC91)
        space.load()
        for access in (lambda: space.store(1), lambda: space.mmu.modify32(space.state.segments[DS], LINEAR)):
            with pytest.raises(GuestFault) as fault:
                access()
            assert fault.value.vector == Vector.GP


def test_the_read_half_of_a_read_modify_write_faults_as_a_write(space: Space) -> None:
    space.set_pte(0)
    with pytest.raises(PageFault) as fault:
        space.mmu.modify32(space.state.segments[DS], LINEAR)
    assert fault.value.error_code == PF_WRITE


@pytest.mark.parametrize(("size", "offset", "faults"), [(1, 1, False), (2, 1, True), (4, 2, True), (4, 4, False)])
def test_alignment_checks(space: Space, size: int, offset: int, faults: bool) -> None:
    space.load()  # a cached translation must not hide the check
    space.state.cr0 |= CR0_AM
    space.state.eflags |= AC
    space.state.cpl = 3
    space.mmu.set_user(True)
    segment = space.state.segments[DS]
    access = {1: space.mmu.load8, 2: space.mmu.load16, 4: space.mmu.load32}[size]
    if faults:
        with pytest.raises(GuestFault) as fault:
            access(segment, LINEAR + offset)
        assert (fault.value.vector, fault.value.error_code) == (Vector.AC, 0)
    else:
        access(segment, LINEAR + offset)


class TestPhysical:
    def test_a20_wraps_the_second_megabyte(self) -> None:
        memory = PhysicalMemory(4 << 20)
        memory.store(0x500, 4, 0x1234)
        memory.a20_enabled = False
        assert memory.load(0x10_0500, 4) == 0x1234
        memory.a20_enabled = True
        assert memory.load(0x10_0500, 4) == 0

    def test_the_hole_and_the_end_of_ram_read_ones_and_swallow_writes(self) -> None:
        memory = PhysicalMemory(2 << 20)
        for physical in (0xC_0000, 0x20_0000, 0xFEC0_0000):
            memory.store(physical, 4, 0)
            assert memory.load(physical, 4) == 0xFFFF_FFFF

    def test_rom_is_read_only_and_appears_below_four_gibibytes(self) -> None:
        memory = PhysicalMemory(2 << 20)
        memory.map_rom(bytes(0xFFF0) + b"\xea" + bytes(15))
        memory.store(0xF_FFF0, 1, 0)
        assert memory.load(0xF_FFF0, 1) == memory.load(0xFFFF_FFF0, 1) == 0xEA

    @pytest.mark.parametrize("size", [0, 4096, (1 << 20) + 1, 1 << 40])
    def test_impossible_sizes_are_refused(self, size: int) -> None:
        with pytest.raises(MemorySizeError, match="RAM size"):
            PhysicalMemory(size)


def test_only_what_was_touched_is_in_use() -> None:
    """Holes of the file are not read, so that they stay holes."""
    memory = PhysicalMemory(16 << 20)
    memory.write((5 << 20) + 0x1000, b"here")
    blocks = os.fstat(memory.ram_fd).st_blocks
    extents = list(memory.used_extents())
    assert [first for first, _ in extents] == [(5 << 20) + 0x1000]
    assert memory.ram[slice(*extents[0])].startswith(b"here")
    assert os.fstat(memory.ram_fd).st_blocks == blocks
    memory.close()
