"""The walk in emitted code does what `machine.paging.walk` does, or leaves it to Python, on random page tables."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from machine.faults import PF_USER, PF_WRITE, PageFault
from machine.memory import HOLE_FIRST, HOLE_LAST, MIB, PhysicalMemory
from machine.paging import PS, P, entries, walk
from machine.state import CR0_PE, CR0_PG, CR0_WP, CR4_PAE, CR4_PSE, CpuState
from vmm.native import stateblock
from vmm.native.cache import Exit, TranslationCache
from vmm.native.operands import EAX, ECX, EDX, R8D, Label
from vmm.native.ramview import RamView
from vmm.native.signals import CORE
from vmm.native.walkroutine import emit_walk

RAM_BYTES = 2 * MIB
DIRECTORY, TABLE = 0x5000, 0x12_3000
FAULTED, UNUSUAL, ALLOWED = range(3)
SETUPS = 12_000


@dataclass(frozen=True, slots=True)
class Outcome:
    kind: int
    value: int = 0


@dataclass(slots=True)
class Bench:
    """Emitted code that walks once, beside the memory and the registers that both walks see."""

    memory: PhysicalMemory
    state: CpuState
    tc: TranslationCache
    start: int

    def emitted(self, linear: int, access: int) -> Outcome:
        words = self.tc.state.words
        for name in ("cr0", "cr3", "cr4"):
            words[stateblock.OFFSETS[name] // 4] = getattr(self.state, name)
        words[0], words[2] = linear, access
        self.tc.state.quads[stateblock.TARGET] = self.tc.host + self.start
        self.tc.enter()
        assert words[stateblock.REASON] == Exit.CALLOUT
        assert words[stateblock.EIP] == linear
        return Outcome(words[1], 0 if words[1] == UNUSUAL else words[0])

    def expected(self, linear: int, access: int) -> Outcome:
        """By `walk`, unless it has more to do than to look at RAM."""
        memory, state = self.memory, self.state
        path = list(entries(memory, state, linear)) if state.cr0 & CR0_PG else []
        for entry in path:
            if not self.is_in_ram(entry.physical):
                return Outcome(UNUSUAL)
            if not entry.value & P or entry.reserved >> 32 or (entry.reserved and entry.level == "PDPTE"):
                break
            if entry.value >> 32:
                return Outcome(UNUSUAL)
            if entry.reserved:
                break
        before = [entry.value for entry in path]
        try:
            found = walk(memory, state, linear, write=bool(access & PF_WRITE), user=bool(access & PF_USER))
        except PageFault as fault:
            return Outcome(FAULTED, fault.error_code or 0)
        if before != [entry.value for entry in entries(memory, state, linear)][: len(before)]:
            return Outcome(UNUSUAL)
        return Outcome(ALLOWED, found.physical)

    def is_in_ram(self, physical: int) -> bool:
        return physical < HOLE_FIRST or HOLE_LAST < physical < RAM_BYTES

    def store(self, at: int, value: int) -> None:
        if self.is_in_ram(at):
            data = value.to_bytes(8, "little")[: RAM_BYTES - at]
            self.memory.ram8[at : at + len(data)] = data


@pytest.fixture
def bench() -> Iterator[Bench]:
    memory = PhysicalMemory(RAM_BYTES)
    tc = TranslationCache()
    view = RamView(memory, tc.state)
    CORE.arm()
    assembler = tc.assembler()
    emit = assembler.emit
    faulted, unusual, done = Label(), Label(), Label()
    emit("mov", R8D, EAX)
    emit_walk(assembler, faulted=faulted, unusual=unusual)
    emit("mov", ECX, ALLOWED)
    emit("jmp", done)
    assembler.bind(faulted)
    emit("mov", EAX, EDX)
    emit("mov", ECX, FAULTED)
    emit("jmp", done)
    assembler.bind(unusual)
    emit("mov", ECX, UNUSUAL)
    assembler.bind(done)
    assembler.jump_to("jmp", tc.host + tc.exits[Exit.CALLOUT])
    yield Bench(memory, CpuState(), tc, tc.place(assembler.finish()))
    CORE.disarm()
    view.close()
    tc.close()
    memory.close()


def entry(chance: random.Random, leads_to: int, *, wide: bool) -> int:
    """An entry that mostly allows what is asked for, with any bit flipped now and then."""
    value = leads_to | (0x67 if chance.random() < 0.8 else chance.getrandbits(12) | P)
    if chance.random() < 0.2:
        value &= ~(1 << chance.choice((0, 1, 2, 5, 6)))
    if chance.random() < 0.15:
        value |= PS
    if chance.random() < 0.05:
        value ^= 1 << chance.randrange(12, 32)
    if wide and chance.random() < 0.1:
        value |= 1 << chance.randrange(32, 64)
    return value


def target(chance: random.Random, usual: int) -> int:
    if chance.random() < 0.9:
        return usual
    return chance.choice((0xA_0000, 0xB_F000, 0xF_F000, RAM_BYTES, RAM_BYTES - 4096, 0xFFFF_F000, 0x9_F000))


def set_up(bench: Bench, chance: random.Random, linear: int, *, wide: bool) -> None:
    """Tables for one linear address."""
    state = bench.state
    state.cr0 = CR0_PE | (CR0_PG if chance.random() < 0.97 else 0) | chance.choice((0, CR0_WP))
    state.cr4 = (CR4_PAE if wide else 0) | chance.choice((0, CR4_PSE, CR4_PSE))
    state.cr3 = target(chance, DIRECTORY) | chance.getrandbits(5)
    page = chance.getrandbits(20) << 12
    if wide:
        state.cr3 |= chance.getrandbits(7) << 5
        at = (state.cr3 & ~0x1F) + (linear >> 30) * 8
        directory = target(chance, TABLE - 0x1000)
        pointer = directory | P if chance.random() < 0.9 else entry(chance, directory, wide=True)
        bench.store(at, pointer)
        upper, shift = directory + (linear >> 21 & 0x1FF) * 8, 9
    else:
        upper, shift = (state.cr3 & ~0xFFF) + (linear >> 22) * 4, 10
    table = target(chance, TABLE)
    value = entry(chance, table, wide=wide)
    if value & PS and chance.random() < 0.7:
        value &= 0x1FF | -1 << 22
    lower = table + (linear >> 12 & (1 << shift) - 1) * (8 if wide else 4)
    bench.store(lower, entry(chance, page, wide=wide))
    bench.store(upper, value)


@pytest.mark.parametrize("wide", [False, True], ids=["32-bit", "PAE"])
def test_random_tables(bench: Bench, wide: bool) -> None:
    chance = random.Random(17)
    seen: Counter[int] = Counter()
    codes: Counter[int] = Counter()
    for _ in range(SETUPS):
        linear = chance.choice((chance.getrandbits(32), 0, 0xFFFF_FFFF, chance.getrandbits(22)))
        set_up(bench, chance, linear, wide=wide)
        access = chance.choice((0, PF_WRITE, PF_USER, PF_WRITE | PF_USER))
        got = bench.emitted(linear, access)
        assert got == bench.expected(linear, access)
        seen[got.kind] += 1
        codes[got.value if got.kind == FAULTED else -1] += 1
    assert min(seen.values()) > SETUPS // 20
    # Not present, not permitted and reserved, for each kind of access that can meet them.
    assert {0, 2, 4, 6, 3, 5, 7, 9, 11, 13, 15} <= set(codes)


def test_nothing_is_looked_at_while_address_line_20_is_low(bench: Bench) -> None:
    bench.state.cr0, bench.state.cr3 = CR0_PE | CR0_PG, DIRECTORY
    bench.store(DIRECTORY, 0)
    assert bench.emitted(0x1234, 0) == Outcome(FAULTED, 0)
    bench.memory.a20_enabled = False
    assert bench.emitted(0x1234, 0) == Outcome(UNUSUAL)
    bench.memory.a20_enabled = True
    assert bench.emitted(0x1234, PF_USER) == Outcome(FAULTED, PF_USER)


def test_the_smallest_ram(bench: Bench) -> None:
    memory = PhysicalMemory(MIB)
    view = RamView(memory, bench.tc.state)
    bench.state.cr0, bench.state.cr3 = CR0_PE | CR0_PG, MIB
    assert bench.emitted(0, 0) == Outcome(UNUSUAL)
    view.close()
    assert bench.emitted(0, 0) == Outcome(UNUSUAL)
    memory.close()
