"""The short walk of two levels against the rules of the SDM, over random tables: results, faults and bits.

Whether it would fault, asked without setting any bit, is compared, too.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from machine.faults import PF_PRESENT, PF_RESERVED, PF_USER, PF_WRITE, PageFault
from machine.memory import PhysicalMemory
from machine.paging import ACCESSED, DIRTY, PS, RW, US, P, Translation, entries, permits, walk
from machine.state import CR0_PG, CR0_WP, CR4_PGE, CR4_PSE, CpuState

ROOT = 0x1_0000
TABLES = range(ROOT, ROOT + 0x4000, 4096)
G = 0x100


@pytest.fixture
def memory() -> Iterator[PhysicalMemory]:
    made = PhysicalMemory(1 << 20)
    yield made
    made.close()


def fill(memory: PhysicalMemory, chance: random.Random) -> None:
    """Directory entries that point to tables, and to the directory itself; a few large pages; anything in tables."""
    for table in TABLES:
        values = []
        for _ in range(1024):
            bits = chance.choice([P | RW | US, P | RW, P | US | ACCESSED, P | RW | US | ACCESSED | DIRTY, RW | US])
            value = chance.choice(TABLES) | bits | chance.choice([0, 0, G, DIRTY])
            if chance.random() < 0.2:
                value = chance.randrange(4) << 22 | bits | PS | chance.choice([0, 0, 0x2000])
            values.append(value.to_bytes(4, "little"))
        memory.write(table, b"".join(values))


def expected(
    memory: PhysicalMemory, state: CpuState, linear: int, *, write: bool, user: bool
) -> tuple[Translation | int, dict[int, int]]:
    """What the walk returns, or the error code of its fault, and the bits that it sets in entries by their address."""
    error = (PF_WRITE if write else 0) | (PF_USER if user else 0)
    path = list(entries(memory, state, linear))
    for entry in path:
        if not entry.value & P:
            return error, {}
        if entry.reserved:
            return error | PF_PRESENT | PF_RESERVED, {}
    leaf = path[-1]
    writable = all(entry.value & RW for entry in path)
    allowed = all(entry.value & US for entry in path)
    protects = user or bool(state.cr0 & CR0_WP)
    if (user and not allowed) or (write and not writable and protects):
        return error | PF_PRESENT, {}
    bits = {entry.physical: ACCESSED for entry in path}
    if write:
        bits[leaf.physical] |= DIRTY
    translation = Translation(
        leaf.value & 0xFFFF_FFFF & -leaf.page_bytes | linear & (leaf.page_bytes - 1),
        leaf.page_bytes,
        writable=writable,
        user=allowed,
        dirty=write or bool(leaf.value & DIRTY),
        is_global=bool(leaf.value & G) and bool(state.cr4 & CR4_PGE),
        tables=tuple(entry.physical for entry in path),
    )
    return translation, bits


def outcome(memory: PhysicalMemory, state: CpuState, linear: int, *, write: bool, user: bool) -> Translation | int:
    """What the walk returns, or the error code of its fault."""
    try:
        return walk(memory, state, linear, write=write, user=user)
    except PageFault as fault:
        return fault.error_code if fault.linear == linear and fault.error_code is not None else -1


@pytest.mark.parametrize("seed", range(4))
def test_it_does_what_the_rules_say(memory: PhysicalMemory, seed: int) -> None:
    chance = random.Random(seed)
    state = CpuState()
    fill(memory, chance)
    faults = set()
    for _ in range(3000):
        state.cr0 = CR0_PG | chance.choice([0, CR0_WP])
        state.cr3 = chance.choice(TABLES) | chance.randrange(0x1000)
        state.cr4 = chance.choice([0, CR4_PSE]) | chance.choice([0, CR4_PGE])
        linear = chance.randrange(1 << 32)
        write, user = chance.random() < 0.5, chance.random() < 0.5
        before = memory.read(ROOT, len(TABLES) * 4096)
        wanted, bits = expected(memory, state, linear, write=write, user=user)
        after = bytearray(before)
        for at, mask in bits.items():
            if ROOT <= at < ROOT + len(after):  # what large pages would be tables for without PSE is left alone
                after[at - ROOT] |= mask
        is_permitted = permits(memory, state, linear, write=write, user=user)
        assert is_permitted is isinstance(wanted, Translation)
        assert memory.read(ROOT, len(TABLES) * 4096) == before
        assert outcome(memory, state, linear, write=write, user=user) == wanted
        if isinstance(wanted, int):
            faults.add(wanted)
        assert memory.read(ROOT, len(TABLES) * 4096) == after
    assert len(faults) > 8
