"""Windows against the walk: whatever is mapped is what an access of the guest would get, without setting a bit."""

from __future__ import annotations

import random

import pytest

from machine.alu import build_alu
from machine.clock import Clock
from machine.cpu import Cpu
from machine.faults import PageFault
from machine.lines import CpuLines
from machine.memory import PhysicalMemory
from machine.paging import ACCESSED, DIRTY, PS, RW, US, P, entries, walk
from machine.ports import PortBus
from machine.state import CR0_PE, CR0_PG, CR0_WP, CR4_PAE, CR4_PSE
from vmm.native.regions import READABLE, UNMAPPED, WRITABLE
from vmm.native.windows import Windows

RAM_BYTES = 8 << 20
ROOT = 0x10_0000
TABLES = range(0x10_1000, 0x10_9000, 4096)
LINEAR_BITS = 24  # what is touched lies in the first 16 MiB
FLAG = 0x80


class Rig:
    """A CPU whose tables are made of random entries, with windows over it."""

    def __init__(self, seed: int, *, pae: bool) -> None:
        self.chance = random.Random(seed)
        self.memory = PhysicalMemory(RAM_BYTES)
        self.cpu = Cpu(self.memory, PortBus(), CpuLines(), Clock(), build_alu())
        self.pae = pae
        state = self.cpu.state
        state.cr0 |= CR0_PE | CR0_PG
        state.cr3, state.cr4 = ROOT, CR4_PAE if pae else CR4_PSE
        if pae:
            self.memory.store(ROOT, 4, TABLES[0] | P)
            for index in range(8):
                self.store(TABLES[0], index, self.directory_entry())
        else:
            for index in range(4):
                self.store(ROOT, index, self.directory_entry())
        for table in TABLES[1:]:
            at = 0
            while at < 512:
                # Runs of consecutive pages, which are often mapped at once.
                entry, length = self.page_entry(), self.chance.choice([1, 1, 2, 5, 40])
                for number in range(min(length, 512 - at)):
                    self.store(table, at + number, entry + 4096 * number)
                at += length
        self.windows = Windows(self.cpu)
        self.windows.attach()

    def close(self) -> None:
        self.windows.detach()
        self.memory.close()

    def store(self, table: int, index: int, entry: int) -> None:
        """Write an entry."""
        if self.pae:
            self.memory.store(table + 8 * index, 4, entry & 0xFFFF_FFFF)
            self.memory.store(table + 8 * index + 4, 4, entry >> 32)
        else:
            self.memory.store(table + 4 * index, 4, entry)

    def bits(self) -> int:
        chance = self.chance
        kinds = [P | RW | US | ACCESSED | DIRTY, P | RW | US, P | RW | ACCESSED, P | US | ACCESSED | DIRTY, RW | US]
        return chance.choice(kinds) if chance.random() < 0.9 else chance.randrange(0x80)

    def directory_entry(self) -> int:
        if self.chance.random() < 0.2:
            return self.chance.choice([0, 0x40_0000, 0x80_0000]) | self.bits() | PS
        return self.chance.choice(TABLES[1:]) | self.chance.choice([P | RW | US, P | RW | US | ACCESSED, self.bits()])

    def page_entry(self) -> int:
        chance = self.chance
        page = chance.choice([chance.randrange(0x800), chance.choice(TABLES) >> 12, 0x9F, 0xB8, 0xFF, 0x7FE])
        reserved = 1 << 40 if self.pae and chance.random() < 0.15 else 0
        return page << 12 | self.bits() | reserved

    def snapshot(self) -> bytes:
        """All tables."""
        return self.memory.read(ROOT, TABLES[-1] + 4096 - ROOT)

    def restore(self, tables: bytes) -> None:
        """Put them back, and tell nobody."""
        self.memory.ram8[ROOT : ROOT + len(tables)] = tables

    def check(self) -> int:
        """Every page that is mapped in the current window; returns how many are."""
        found = 0
        window, memory, state = self.windows.current, self.memory, self.cpu.state
        before = self.snapshot()
        for page in range(1 << LINEAR_BITS - 12):
            rights = window.rights(page)
            if rights == UNMAPPED:
                continue
            found += 1
            translation = walk(memory, state, page << 12, write=rights == WRITABLE, user=window.user)
            at = memory.ram_address(translation.physical)
            region = window.regions[page << 12 >> window.region_shift]
            assert region.ram_pages[page - region.first_page] == at >> 12
            assert rights == READABLE or not memory.page_flags[at >> 12]
        assert self.snapshot() == before, "an access that faults nowhere would have set a bit"
        return found


@pytest.mark.parametrize("pae", [False, True], ids=["32-bit", "PAE"])
@pytest.mark.parametrize("seed", range(12))
def test_windows_grant_what_the_walk_grants(seed: int, *, pae: bool) -> None:
    rig = Rig(seed, pae=pae)
    chance, state, memory = rig.chance, rig.cpu.state, rig.memory
    most = 0
    for turn in range(150):
        state.cpl = chance.choice([0, 0, 3])
        state.cr0 = CR0_PE | CR0_PG | chance.choice([0, CR0_WP])
        rig.windows.select()
        linear, write = chance.randrange(1 << LINEAR_BITS), chance.random() < 0.5
        before = rig.snapshot()
        done = rig.windows.fill(linear, write=write)
        after = rig.snapshot()
        rig.restore(before)
        try:
            walk(memory, state, linear, write=write, user=state.cpl == 3)
        except PageFault:
            assert not done
            assert after == before
        assert rig.snapshot() == after or not done, "the bits of the access, and no others"
        rig.restore(after)
        if chance.random() < 0.4:
            table = chance.choice(TABLES[1:])
            rig.store(table, chance.randrange(512), rig.page_entry())
        if chance.random() < 0.1:
            rig.store(TABLES[0] if pae else ROOT, chance.randrange(4), rig.directory_entry())
        if chance.random() < 0.2:
            memory.flag_page(chance.randrange(0x800), FLAG)
        if turn % 10 == 9:
            most = max(most, rig.check())
    assert most > 20
    assert list(entries(memory, state, 0))
    rig.close()
