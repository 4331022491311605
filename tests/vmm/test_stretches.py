"""REP MOVS and REP STOS on pages that somebody watches, done at once, against one iteration at a time.

What they write to is code (also their own), page tables that map what they read and write, and ROM.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from machine.debug import StopKind, Watchpoint
from machine.instructions import stretches
from machine.memory import PAGE_SHIFT, READ_ONLY
from machine.state import CR4_PAE, EAX, ECX, EDI, ESI
from tests.engine import trap, verified
from tests.oracles.assembler import assemble
from tests.vmm.bare import ORIGIN, PAGE_DIRECTORY, PAGE_TABLE, Bare, EngineMaker, flat, map_low_memory
from vmm.interp import Interpreter

OTHER_CODE = 0x5000
ENTRIES = 0x4_0000  # a page full of what might be page-table entries
DATA = 0x5_0000
ROM = 0x6_0000
SIZES = {"movsb": 1, "movsw": 2, "movsd": 4, "stosb": 1, "stosw": 2, "stosd": 4}
PLACES = (ORIGIN, OTHER_CODE, PAGE_TABLE, PAGE_DIRECTORY, ENTRIES, DATA, ROM)


@dataclass(frozen=True, slots=True)
class Case:
    """One REP: its registers, and whether it goes down."""

    operation: str
    down: bool
    eax: int
    ecx: int
    esi: int
    edi: int
    pae: bool = False

    def prepare(self, bare: Bare) -> None:
        memory, state = bare.memory, bare.state
        map_low_memory(bare)
        if self.pae:
            # The tables of both formats lie in the same two pages; what is above 2 MiB is not mapped.
            memory.write(PAGE_TABLE, b"".join((page << 12 | 7).to_bytes(8, "little") for page in range(512)))
            memory.write(PAGE_DIRECTORY, (PAGE_TABLE | 7).to_bytes(8, "little"))
            memory.write(0xF000, (PAGE_DIRECTORY | 1).to_bytes(8, "little") * 4)
            state.cr3 = 0xF000
            state.cr4 |= CR4_PAE
            bare.cpu.mmu.flush()
        entries = [page << 12 | (0x67, 7, 6, 5)[page % 4] for page in range(1024)]
        memory.write(ENTRIES, b"".join(entry.to_bytes(4, "little") for entry in entries))
        memory.write(DATA, bytes(number * 7 & 0xFF for number in range(0x3000)))
        memory.write(OTHER_CODE, b"\x43\xc3" * 16)  # inc ebx; ret
        memory.flag_page(ROM >> PAGE_SHIFT, READ_ONLY)
        state.gpr[EAX], state.gpr[ECX], state.gpr[ESI], state.gpr[EDI] = self.eax, self.ecx, self.esi, self.edi

    @property
    def source(self) -> str:
        return f"""
            push eax
            mov eax, {OTHER_CODE:#x}
            call eax
            pop eax
            {"std" if self.down else "cld"}
            rep {self.operation}
            inc ebx
            cld
            mov eax, {OTHER_CODE:#x}
            call eax
            hlt
            .balign 4096, 0x43
        """


def outcome(case: Case, make: EngineMaker) -> tuple[object, ...]:
    bare = flat(case.source, make)
    try:
        case.prepare(bare)
        for _ in range(40):
            stop = bare.engine.run(60)
            if stop.kind is not StopKind.BUDGET or bare.clock.icount >= 60:
                break
        state = bare.state
        return (
            stop.kind, bare.clock.icount, state.eip, tuple(state.gpr), state.eflags, state.cr2, bytes(bare.memory.ram),
        )  # fmt: skip
    finally:
        bare.close()


def plodding(case: Case) -> tuple[object, ...]:
    """What the reference engine makes of it one iteration at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stretches.StringContext, "_span", lambda *_arguments, **_words: (0, 0))
        return outcome(case, Interpreter)


def check(case: Case) -> None:
    expected = plodding(case)
    for make in (Interpreter, verified, trap):
        found = outcome(case, make)
        assert found[:-1] == expected[:-1], make
        assert found[-1] == expected[-1], make


def addresses() -> st.SearchStrategy[int]:
    offsets = st.one_of(st.integers(0, 0x60), st.integers(0xFF0, 0x1010), st.integers(0, 0x1FFF))
    return st.builds(int.__add__, st.sampled_from(PLACES), offsets)


def cases() -> st.SearchStrategy[Case]:
    values = st.one_of(st.integers(0, 0xFFFF_FFFF), st.sampled_from((0, 0x4343_4343, 0x5_0007, PAGE_TABLE | 7)))
    count = st.one_of(st.integers(0, 40), st.integers(0, 2500))
    return st.builds(
        Case, st.sampled_from(sorted(SIZES)), st.booleans(), values, count, addresses(), addresses(), st.booleans()
    )


@given(cases())
@settings(max_examples=25)
@example(Case("stosd", False, 0, 1024, 0, PAGE_TABLE + 0x400))
@example(Case("movsd", True, 0, 1024, ENTRIES + 0xFFC, PAGE_TABLE + 0xFFC))
def test_any(case: Case) -> None:
    check(case)


@given(st.sampled_from(sorted(SIZES)), st.booleans(), st.integers(-40, 40), st.sampled_from((OTHER_CODE, ROM, DATA)))
@settings(max_examples=15)
def test_overlaps(operation: str, down: bool, distance: int, place: int) -> None:
    """The source reaches into the destination, at any distance, so that elements are read that were just written."""
    at = place + 0x800
    check(Case(operation, down, 0x4243_4443, 300, at, at + distance))


@pytest.mark.parametrize("down", [False, True])
@pytest.mark.parametrize("operation", ["movsb", "movsd", "stosw"])
@pytest.mark.parametrize("distance", [-4, 0, 1, 3])
def test_over_itself(operation: str, down: bool, distance: int) -> None:
    """It overwrites itself with INC EBX, in the iteration that comes to it, and is no REP from then on."""
    code = assemble(f"push eax\nmov eax, {OTHER_CODE:#x}\ncall eax\npop eax\ncld", origin=ORIGIN)
    size = SIZES[operation]
    edi = ORIGIN + len(code) + (60 - distance if down else distance - 60) // size * size
    check(Case(operation, down, 0x4343_4343, 64, ORIGIN + 0x800, edi))


class TestSpeed:
    def count_writes(self, case: Case) -> int:
        """How often observers of writes are told."""
        bare = flat(case.source)
        try:
            case.prepare(bare)
            told: list[int] = []
            bare.engine.run(7)
            assert bare.state.gpr[ECX] == case.ecx
            bare.memory.write_observers.append(lambda at, *_: told.append(at))
            bare.run(1)
            assert bare.state.gpr[ECX] == 0
            return len(told)
        finally:
            bare.close()

    @pytest.mark.parametrize("down", [False, True])
    @pytest.mark.parametrize("operation", ["movsd", "stosd"])
    def test_observers_are_told_once_a_page(self, operation: str, down: bool) -> None:
        start = OTHER_CODE + (0xFFC if down else 0)
        case = Case(operation, down, 0x4343_4343, 1024, DATA + (0xFFC if down else 0), start)
        assert self.count_writes(case) <= 3

    def test_of_a_table_up_to_each_entry_that_is_in_use(self) -> None:
        """The first is that of this code; the rest of the page is not of pages that were touched."""
        assert self.count_writes(Case("stosd", False, 0x5_0007, 0x300, 0, PAGE_TABLE + 0x400)) <= 5


@pytest.mark.parametrize("make", [Interpreter, verified, trap], ids=["interp", "bt", "trap"])
@pytest.mark.parametrize("operation", ["movsd", "stosd"])
def test_a_watchpoint_stops_at_its_iteration(make: EngineMaker, operation: str) -> None:
    case = Case(operation, False, 0x4343_4343, 1024, DATA, OTHER_CODE)
    bare = flat(case.source, make)
    try:
        case.prepare(bare)
        bare.debug.set_watchpoints(frozenset({Watchpoint(OTHER_CODE + 0x806, 1, on_read=False, on_write=True)}))
        stop = bare.run(60)
        assert stop.kind is StopKind.WATCHPOINT
        assert (stop.linear, bare.state.gpr[EDI], bare.state.gpr[ECX]) == (
            OTHER_CODE + 0x806, OTHER_CODE + 0x808, 1024 - 0x202,
        )  # fmt: skip
        bare.debug.set_watchpoints(frozenset())
        bare.run(60)
        assert bare.state.gpr[ECX] == 0
    finally:
        bare.close()
