"""Instructions at every edge: 15 bytes, the order of prefixes, the ends of pages, of segments and of 4 GiB.

All but the last is compared with this host's CPU.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import permutations

import pytest

from machine.faults import Vector
from machine.flags import TF
from machine.instructions import Effect
from machine.state import CR0_PG, EAX, EBX, MASK32
from tests import engine
from tests.machine.instruction_cases import LOCK, REP, SEGMENT_PREFIXES, Bits, Case, decode
from tests.machine.instruction_checks import BITS, check, one_of_each
from tests.machine.instruction_jobs import (
    LDT,
    SHORT_CODE,
    WORLDS,
    Layout,
    World,
    build_job,
    some_world,
)
from tests.oracles.usermode import CODE, EXECUTE, NONE, PAGE_BYTES, Job, ldt_selector
from tests.vmm.bare import Bare, flat, handler_of

SIZE = (0x66, 0x67)
# A handful that differ in what may stand before them: plain, LOCK-able, a string, a branch, no ModRM, #UD, a far load.
SOME = tuple(bytes.fromhex(code) for code in ("01c8", "8703", "a5", "7402", "90", "0f0b", "8b4301", "c40b", "0fb7c1"))
UNDEFINED_FORMS = tuple(bytes.fromhex(code) for code in ("8dc0", "fff8", "feff", "8ec8", "8cf8", "f001c8", "f0a5"))


def cases(bits: Bits) -> Iterator[Case]:
    for code in SOME:
        case = decode(code.ljust(16, b"\x90"), bits)
        assert case is not None
        yield case


def with_code(case: Case, code: bytes, bits: Bits) -> tuple[Case, Job]:
    """A state for `case`, but with other bytes to run, of which it may be only the end."""
    chance = random.Random(code)
    world = WORLDS[bits][-1]
    case, job = build_job(case, chance, world, Layout())
    return case, replace(job, code=code[:16])


@pytest.mark.parametrize("bits", BITS)
def test_fifteen_bytes_are_the_limit(bits: Bits) -> None:
    def work() -> Iterator[tuple[Case, Job]]:
        for case in cases(bits):
            for length in range(8, 17):
                for kinds in ((0x66,), (0x67,), (0x2E,), (0x66, 0x67), (0x3E, 0x66, 0x26), (0x67, 0x36)):
                    fill = length - len(case.code)
                    yield with_code(case, (bytes(kinds) * 16)[:fill] + case.code, bits)

    assert check(work()) == len(SOME) * 9 * 6


@pytest.mark.parametrize("bits", BITS)
def test_the_limit_comes_before_undefined_forms(bits: Bits) -> None:
    """Forms that do not exist of opcodes that do; where the opcode is undefined nobody knows its length."""

    def work() -> Iterator[tuple[Case, Job]]:
        case = next(cases(bits))
        for code in UNDEFINED_FORMS:
            for prefixes in range(8, 16):
                yield with_code(case, b"\x67" * prefixes + code, bits)

    assert check(work()) == len(UNDEFINED_FORMS) * 8


@pytest.mark.parametrize("bits", BITS)
def test_what_is_too_long_is_not_fetched_to_its_end(bits: Bits) -> None:
    """Prefixes up to the end of a page that nothing follows: #GP if they are 15 by then, else #PF."""

    def work() -> Iterator[tuple[Case, Job]]:
        for case in cases(bits):
            for prefixes in range(12, 17):
                for before in range(12, 18):
                    code = b"\x67" * prefixes + case.code
                    linear = CODE + PAGE_BYTES - before
                    case, job = with_code(case, code, bits)
                    eip = linear - WORLDS[bits][-1].code_base
                    rights = bytes([EXECUTE, NONE])
                    yield case, replace(job, eip=eip, code_linear=linear, code_protection=rights)

    assert check(work()) == len(SOME) * 5 * 6


@pytest.mark.parametrize("bits", BITS)
def test_the_order_of_prefixes_means_nothing(bits: Bits) -> None:
    def work() -> Iterator[tuple[Case, Job]]:
        for case in cases(bits):
            for kinds in ((0x66, 0x67, 0x2E, LOCK), (0x66, 0x67, 0x64, REP), (0x66, 0x67, LOCK, REP)):
                if REP in kinds and case.code[:1] == b"\x0f":
                    continue  # F3 may be part of another opcode there
                for order in permutations(kinds):
                    yield with_code(case, bytes(order) + case.code, bits)

    assert check(work()) > 400


@pytest.mark.parametrize("bits", BITS)
def test_a_prefix_counts_once(bits: Bits) -> None:
    def work() -> Iterator[tuple[Case, Job]]:
        for case in cases(bits):
            for prefix in (*SIZE, *SEGMENT_PREFIXES, LOCK, REP):
                if prefix != REP or case.code[:1] != b"\x0f":
                    yield with_code(case, bytes([prefix]) + case.code, bits)
                    yield with_code(case, bytes([prefix] * 2) + case.code, bits)
                    yield with_code(case, bytes([prefix] * 5) + case.code, bits)

    assert check(work()) > 200


def test_the_code_segment_ends_within_an_instruction() -> None:
    """In a segment of 900h bytes: up to its last byte all is well, beyond it is #GP(0)."""
    limit = LDT[SHORT_CODE].limit

    def work() -> Iterator[tuple[Case, Job]]:
        for original in one_of_each(16):
            if original.row.mnemonic in ("ud0", "ud1"):
                continue  # to AMD they have no ModRM byte
            chance = random.Random(original.code)
            usual = some_world(original, chance)
            selectors = (usual.selectors[0], ldt_selector(SHORT_CODE), *usual.selectors[2:])
            world = World("short code", selectors, usual.data_base, CODE, usual.wide_stack)
            case, job = build_job(original, chance, world, Layout())
            for inside in range(1, len(case.code) + 1):
                if inside == len(case.code) and case.row.effect is Effect.BRANCH:
                    continue  # a taken branch there faults on AMD's Zen 5 at times, at times not, by its prediction
                eip = limit + 1 - inside
                moved = replace(job, eip=eip, code_linear=CODE + eip)
                yield case, moved
                # Without TF, the next instruction is fetched as well.
                if inside == len(case.code) and case.row.mnemonic in ("mov", "add", "nop"):
                    yield case, replace(moved, eflags=moved.eflags & ~TF)

    assert check(work()) > 2000


class TestFourGibibytes:
    """Flat code at the top of the address space, mapped by paging: the last page, and then page 0."""

    @pytest.fixture(autouse=True, params=engine.MAKERS)
    def _engine(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.setattr("vmm.bt.MIN_BUDGET_INSNS", 1)
        self.made: list[Bare] = []
        with engine.choice(request.param):
            yield
        for bare in self.made:
            bare.close()

    def machine(self, code: str, before: int) -> Bare:
        bare = flat("nop", engine.make)
        self.made.append(bare)
        memory, state = bare.memory, bare.state
        directory, table = 0x20_0000, 0x20_1000
        memory.store(directory, 4, table | 3)
        memory.store(directory + 4 * 1023, 4, table | 3)
        for page in range(256):
            memory.store(table + 4 * page, 4, page << 12 | 3)
        memory.store(table + 4 * 1023, 4, 0x21_0000 | 3)
        state.cr3 = directory
        state.cr0 |= CR0_PG
        bare.cpu.mmu.flush()
        data = bytes.fromhex(code)
        memory.write(0x21_1000 - before, data[:before])
        memory.write(0, data[before:] + b"\x90" * 16)
        state.eip = MASK32 + 1 - before
        return bare

    @pytest.mark.parametrize("before", range(1, 6))
    def test_an_instruction_runs_on_at_0(self, before: int) -> None:
        bare = self.machine("b878563412", before)  # mov eax, 12345678h
        bare.run(1)
        assert (bare.state.gpr[EAX], bare.state.eip) == (0x1234_5678, 5 - before)

    @pytest.mark.parametrize("before", range(1, 6))
    def test_so_it_does_step_by_step(self, before: int) -> None:
        bare = self.machine("b878563412", before)
        bare.engine.step()
        assert (bare.state.gpr[EAX], bare.state.eip) == (0x1234_5678, 5 - before)

    @pytest.mark.parametrize(("code", "target"), [("ebfe", -2), ("eb10", 0x10), ("e9f0ffffff", -0x10 + 3)])
    def test_branches_wrap(self, code: str, target: int) -> None:
        bare = self.machine(code, 2)
        bare.run(1)
        assert bare.state.eip == target & MASK32

    def test_a_return_address_wraps(self) -> None:
        bare = self.machine("e8fb0f0000", 5)  # call 0FFBh, from the last five bytes
        bare.run(1)
        assert bare.state.eip == 0xFFB
        assert bare.memory.load(bare.state.gpr[4], 4) == 0

    @pytest.mark.parametrize("offset", range(1, 4))
    def test_data_wraps(self, offset: int) -> None:
        bare = self.machine("90", 1)
        bare.memory.write(0x21_1000 - offset, b"\x11" * offset)
        bare.memory.write(0, b"\x22" * 4)
        bare.state.gpr[EBX] = MASK32 + 1 - offset
        bare.memory.write(0x1000, bytes.fromhex("8b03"))
        bare.state.eip = 0x1000
        bare.run(1)
        expected = (b"\x11" * offset + b"\x22" * 4)[:4]
        assert bare.state.gpr[EAX] == int.from_bytes(expected, "little")

    def test_a_segment_that_is_shorter_ends_there(self) -> None:
        bare = self.machine("b878563412", 2)
        segment = bare.state.segments[1]
        segment.load(segment.selector, 0, MASK32 - 1, segment.attributes)
        bare.engine.run(1)
        assert bare.state.eip == handler_of(Vector.GP) + 1
