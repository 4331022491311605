from __future__ import annotations

import pytest

from gdbstub.guest import GuestTarget
from gdbstub.guest_memory import Mapping, mappings
from gdbstub.target import TargetError
from machine.state import CR0_PG, CR4_PAE, CR4_PSE
from tests.gdbstub.pc import CODE, guest, say, write

DIRECTORY = 0x20_0000
TABLE = 0x20_1000
P, RW, US, PS = 1, 2, 4, 0x80


def map_pages(target: GuestTarget, entries: dict[int, int]) -> None:
    """Turn paging on with one page table, for linear 0 on, of these entries by page number."""
    memory = target.machine.memory
    memory.store(DIRECTORY, 4, TABLE | P | RW | US)
    for page, entry in entries.items():
        memory.store(TABLE + 4 * page, 4, entry)
    state = target.machine.cpu.state
    state.cr3 = DIRECTORY
    state.cr4 |= CR4_PSE
    state.cr0 |= CR0_PG
    target.machine.cpu.mmu.flush()


def test_without_paging_linear_is_physical() -> None:
    with guest(b"abcd") as target:
        assert target.read_memory(CODE, 4) == b"abcd"
        target.write_memory(CODE + 1, b"XY")
        assert target.machine.memory.read(CODE, 4) == b"aXYd"


def test_reading_is_cut_at_what_is_not_mapped() -> None:
    with guest(b"abcd") as target:
        map_pages(target, {5: CODE | P, 6: CODE | P})
        assert target.read_memory(0x5000, 4) == b"abcd"
        assert len(target.read_memory(0x5FFE, 0x4000)) == 0x1002
        assert target.read_memory(0x4FFF, 4) == b""
        assert target.read_memory(0x7000, 4) == b""


def test_reading_sets_no_bits_and_needs_no_rights() -> None:
    with guest(b"abcd") as target:
        map_pages(target, {5: CODE | P})
        before = target.machine.memory.read(DIRECTORY, 0x2000)
        target.read_memory(0x5000, 4)
        target.write_memory(0x5000, b"x")
        assert target.machine.memory.read(DIRECTORY, 0x2000) == before
        assert target.machine.memory.read(CODE, 1) == b"x"


def test_writing_is_all_or_nothing() -> None:
    with guest(b"abcd") as target:
        map_pages(target, {5: CODE | P})
        with pytest.raises(TargetError, match="0x00006000 is not mapped"):
            target.write_memory(0x5FFE, b"1234")
        assert target.read_memory(0x5FFE, 2) == bytes(2)


def test_rom_and_nothing_refuse_writes() -> None:
    with guest(b"\x90") as target:
        rom = target.read_memory(0xF_0000, 16)
        with pytest.raises(TargetError, match="ROM"):
            target.write_memory(0xF_0000, b"x")
        assert target.read_memory(0xF_0000, 16) == rom
        with pytest.raises(TargetError, match="Nothing answers"):
            target.write_memory(0xD000_0000, b"x")


def test_writes_go_to_devices_and_drop_decoded_code() -> None:
    with guest(b"\x40\xeb\xfd") as target:
        target.write_memory(0xB_8000, b"H\x07")
        assert target.read_memory(0xB_8000, 2) == b"H\x07"
        assert "H" in say(target, "screen")


def test_end_of_linear_memory() -> None:
    with guest(b"\x90") as target:
        assert len(target.read_memory(0xFFFF_FFF0, 0x100)) == 0x10
        with pytest.raises(TargetError, match="past the end"):
            target.write_memory(0xFFFF_FFFF, b"ab")


def test_physical_on_request() -> None:
    with guest(b"abcd") as target:
        map_pages(target, {5: CODE | P})
        assert target.read_memory(CODE, 4) == b""
        say(target, "memory physical")
        assert target.read_memory(CODE, 4) == b"abcd"
        target.write_memory(CODE, b"z")
        assert target.read_memory(CODE, 1) == b"z"
        say(target, "memory linear")
        assert target.read_memory(0x5000, 4) == b"zbcd"


def test_mappings_join_pages_of_equal_rights() -> None:
    with guest(b"\x90") as target:
        map_pages(target, {1: P, 2: P, 3: P | RW, 4: P | RW | US, 6: P})
        machine = target.machine
        machine.memory.store(DIRECTORY + 4 * 2, 4, P | RW | PS)
        machine.memory.store(DIRECTORY + 4 * 1023, 4, P | RW | PS)
        found = [m for m in mappings(machine.memory, machine.cpu.state) if m is not None]
        assert found == [
            Mapping(0x1000, 0x3000, writable=False, user=False, is_global=False),
            Mapping(0x3000, 0x4000, writable=True, user=False, is_global=False),
            Mapping(0x4000, 0x5000, writable=True, user=True, is_global=False),
            Mapping(0x6000, 0x7000, writable=False, user=False, is_global=False),
            Mapping(0x80_0000, 0xC0_0000, writable=True, user=False, is_global=False),
            Mapping(0xFFC0_0000, 1 << 32, writable=True, user=False, is_global=False),
        ]


def test_mappings_with_pae() -> None:
    with guest(b"\x90") as target:
        machine = target.machine
        memory, state = machine.memory, machine.cpu.state
        memory.store(DIRECTORY + 8 * 3, 4, TABLE | P)
        memory.store(TABLE + 8 * 511, 4, CODE & ~0x1F_FFFF | P | RW | PS)
        state.cr3, state.cr4 = DIRECTORY, CR4_PAE
        state.cr0 |= CR0_PG
        machine.cpu.mmu.flush()
        found = [m for m in mappings(memory, state) if m is not None]
        assert found == [Mapping(0xFFE0_0000, 1 << 32, writable=True, user=False, is_global=False)]
        text = say(target, "page 0xffe12345")
        assert "PDPTE" in text
        assert "2 MiB page" in text


def test_regions() -> None:
    with guest(b"\x90") as target:
        whole = target.region_at(0x1234)
        assert whole is not None
        assert (whole.start, whole.length, whole.permissions) == (0x1000, (1 << 32) - 0x1000, "rwx")
        map_pages(target, {1: P, 2: P, 3: P | RW})
        readable = target.region_at(0x1234)
        hole = target.region_at(0x4000_0000)
        assert readable is not None
        assert hole is not None
        assert (readable.start, readable.length, readable.permissions) == (0x1000, 0x2000, "rx")
        assert hole.permissions == ""
        assert hole.start == 0x4000_0000
        assert target.region_at(1 << 32) is None
        below = target.region_at(0)
        assert below is not None
        assert (below.start, below.length, below.permissions) == (0, 0x1000, "")


def test_the_memory_map_covers_what_paging_could_map() -> None:
    with guest(b"\x90") as target:
        (region,) = target.memory_map()
        assert (region.start, region.length) == (0, 1 << 32)


def test_real_mode_reads_linear_addresses() -> None:
    with guest(b"\x90\x91", bits=16, at=0x7C00) as target:
        write(target, "ds", 0x1000)
        assert target.read_memory(0x7C00, 2) == b"\x90\x91"
