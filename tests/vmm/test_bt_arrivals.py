"""Interrupts from outside under `bt` against `interp`: delivered by emitted code, or refused by it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from machine.state import CS, DS, EBX, ES, ESP, MASK32, SS
from tests.oracles.assembler import assemble
from tests.vmm.bare import IDT_BASE, LONG_HANDLERS, PAGE_TABLE, Bare, map_low_memory, set_handler, set_page
from tests.vmm.rings import GDT, KERNEL_CODE, KERNEL_STACK, TSS, USER_CODE, USER_DATA, USER_STACK
from tests.vmm.rings import install as install_rings
from tests.vmm.twins import Twins
from vmm.native import stateblock
from vmm.native.cache import Exit, TranslationCache

PERIOD_NS = 97
VECTORS = (0x20, 0x21)
HANDLER = "inc ebx\ninc dword ptr [0x30000]\niretd"
LOOP = "sti\n1: inc ecx\nadd edx, ecx\nmov [0x30004], edx\njmp 1b"


class Metronome:
    """Interrupts time and again; several at a time, of which each waits until the one before was taken."""

    def __init__(self, bare: Bare, vectors: tuple[int, ...] = VECTORS, *, nmi: bool = False) -> None:
        self.bare = bare
        self.vectors = vectors
        self.nmi = nmi
        self.waiting: list[int] = []
        bare.lines.acknowledge = self.acknowledge
        bare.clock.schedule(PERIOD_NS, self.beat)

    def acknowledge(self) -> int:
        vector = self.waiting.pop(0)
        self.bare.lines.set_intr(bool(self.waiting))
        return vector

    def beat(self) -> None:
        self.bare.clock.schedule(self.bare.clock.now_ns + PERIOD_NS, self.beat)
        if self.nmi:
            self.bare.lines.raise_nmi()
        elif not self.waiting:
            self.waiting = [*self.vectors]
            self.bare.lines.set_intr(True)


@pytest.fixture
def refusals(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Entries and refusals of the routine."""
    counts = [0, 0]
    init = TranslationCache.__init__

    def counting(tc: TranslationCache) -> None:
        init(tc)
        enter = tc.enter

        def entering() -> None:
            counts[0] += tc.state.quads[stateblock.TARGET] == tc.host + tc.routines["arrive"]
            enter()
            counts[1] += tc.state.words[stateblock.REASON] == Exit.REFUSAL

        tc.enter = entering

    monkeypatch.setattr(TranslationCache, "__init__", counting)
    return counts


def handlers(source: str, kind: int = 0x8E) -> Callable[[Bare], None]:
    def prepare(bare: Bare) -> None:
        for vector in (*VECTORS, 2):
            set_handler(bare, vector, assemble(source, origin=LONG_HANDLERS + 64 * vector))
            bare.memory.store(IDT_BASE + 8 * vector + 5, 1, kind)

    return prepare


def ring0(source: str = HANDLER, kind: int = 0x8E) -> Callable[[Bare], None]:
    def prepare(bare: Bare) -> None:
        map_low_memory(bare)
        handlers(source, kind)(bare)
        Metronome(bare)

    return prepare


def test_in_ring_0(refusals: list[int]) -> None:
    with Twins(LOOP, ring0()) as twins:
        twins.run(6000, (1000, 333))
        assert refusals[0] > 50
        assert not refusals[1]
        assert twins.reference.state.gpr[EBX] > 100


def test_short_pieces_and_steps() -> None:
    with Twins(LOOP, ring0()) as twins:
        twins.run(2000, (97, 40, 1, 33))
        for _ in range(300):
            twins.each(lambda bare: bare.engine.step())
            twins.check()


def test_a_trap_gate_leaves_interrupts_on(refusals: list[int]) -> None:
    """So the one that waits is taken before the handler's first instruction."""
    with Twins(LOOP, ring0("inc ebx\nmov eax, cr0\nmov cr0, eax\niretd", 0x8F)) as twins:
        twins.run(4000, (1000, 333))
        assert refusals[0] > 30


@pytest.mark.parametrize("kind", [0x86, 0x0E, 0x8C, 0xEE])
def test_gates_that_are_not_plain(kind: int) -> None:
    """16 bits (the return then fails), not present, none at all, and one for ring 3."""

    def prepare(bare: Bare) -> None:
        ring0(HANDLER, kind)(bare)
        for vector in (11, 13):
            set_handler(bare, vector, assemble("add esp, 4\ninc edi\niretd"))

    with Twins(LOOP, prepare) as twins:
        twins.run(3000, (1000, 333))


@pytest.mark.parametrize(("entry", "goes"), [(7, False), (0x67, False), (7, True), (0, False)])
@pytest.mark.parametrize("privilege", [0, 4])
def test_in_ring_3(entry: int, *, goes: bool, privilege: int, refusals: list[int]) -> None:
    """The page of the inner stack is new, known, taken away later, or absent; tables are for ring 0 only or for all."""
    stack = KERNEL_STACK - 0x1000
    taking = f"cmp ecx, 500\njne 2f\nand dword ptr [{PAGE_TABLE + (stack >> 10):#x}], ~1\n2:" if goes else ""
    loop = LOOP.replace("inc ecx", f"inc ecx\n{taking}")

    def prepare(bare: Bare) -> None:
        install_rings(bare, 0)
        bare.memory.write(USER_STACK - 0x1000, assemble(loop, origin=USER_STACK - 0x1000))
        set_page(bare, stack, stack | entry)
        for page in (GDT, TSS, IDT_BASE & ~0xFFF):
            set_page(bare, page, page | 0x63 | privilege)
        handlers("inc ebx\niretd")(bare)
        state = bare.state
        state.segments[CS].load(USER_CODE, 0, MASK32, 0xCFB)
        for number in (SS, DS, ES):
            state.segments[number].load(USER_DATA, 0, MASK32, 0xCF3)
        for vector in (*VECTORS, 8, 14):
            bare.memory.store(IDT_BASE + 8 * vector + 2, 2, KERNEL_CODE)
        state.eflags |= 0x3200
        state.gpr[ESP] = USER_STACK
        state.eip = USER_STACK - 0x1000
        bare.cpu.set_cpl(3)
        bare.cpu.mmu.flush()
        Metronome(bare, VECTORS[:1])

    with Twins("nop", prepare) as twins:
        stop = twins.run(5000, (1000, 333))
        assert (stop is None) == (bool(entry) and not goes)
        if entry:
            assert refusals[0] > (20 if goes else 40)
            assert refusals[1] == 1, "ring 0 of this address space is not known yet"


def test_nmi() -> None:
    def prepare(bare: Bare) -> None:
        map_low_memory(bare)
        handlers("inc ebx\nmov [0x30008], esp\niretd")(bare)
        Metronome(bare, nmi=True)

    with Twins(LOOP, prepare) as twins:
        twins.run(4000, (1000, 333))
        assert twins.reference.state.gpr[EBX] > 30


def test_waking_from_hlt(refusals: list[int]) -> None:
    with Twins("sti\n1: inc ecx\nhlt\nadd edx, ecx\njmp 1b", ring0()) as twins:
        twins.run(1500, (1000, 333))
        assert refusals[0] > 100
        assert not refusals[1]
