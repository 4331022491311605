"""Whole instructions against this host's CPU in user mode: registers, EIP, all flags, memory, faults, error codes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest

from machine.flags import DF, TF
from machine.instructions.table import ROWS
from machine.state import ECX, EDI, ESI
from tests.machine.instruction_cases import (
    LOCK,
    REP,
    REPNE,
    SEGMENT_PREFIXES,
    Bits,
    Case,
    by_mnemonic,
    decode,
    tail,
)
from tests.machine.instruction_checks import BITS, COMPARED, ELSEWHERE, check, one_of_each
from tests.machine.instruction_jobs import (
    DESTINATION,
    MIDDLE,
    SOURCE,
    SPREAD,
    STRADDLE,
    Layout,
    address_bits,
    build_job,
    some_world,
)
from tests.oracles.usermode import ARENA_PAGES, NONE, PAGE_BYTES, READ, WRITE, Job


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("mnemonic", COMPARED)
def test_a_row_of_the_table(mnemonic: str, bits: Bits) -> None:
    def work() -> Iterator[tuple[Case, Job]]:
        for case in by_mnemonic(bits)[mnemonic]:
            chance = random.Random(case.code)
            yield build_job(case, chance, some_world(case, chance), Layout())

    assert check(work())


def test_every_row_is_compared_or_has_a_reason() -> None:
    assert ROWS.keys() == {*COMPARED, *ELSEWHERE}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("opcode", "step"), [("8b", 1), ("89", 7), ("8d", 5), ("03", 11)], ids=["load", "store", "lea", "add"]
)
def test_all_forms_of_an_address(opcode: str, step: int, bits: Bits) -> None:
    """Every ModRM byte, and each (or each so-manieth) SIB byte, with segments that all have bases of their own."""

    def work() -> Iterator[tuple[Case, Job]]:
        for address_size, modrm in product((16, 32), range(0xC0)):
            prefix = b"" if address_size == bits else b"\x67"
            has_sib = address_size == 32 and modrm & 7 == 4
            if modrm & 0x38 and not has_sib:
                continue  # all values of reg are for the walk
            for sib in range(modrm >> 3 & 7, 256, 8 * step) if has_sib else range(2):
                chance = random.Random(bytes([modrm, sib]))
                reg = chance.randrange(8) << 3
                code = prefix + bytes.fromhex(opcode) + bytes([modrm & 0xC7 | reg, sib]) + tail(chance)
                case = decode(code, bits)
                assert case is not None
                yield build_job(case, chance, SPREAD[bits], Layout())

    assert check(work()) > 100


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("prefix", SEGMENT_PREFIXES, ids=SEGMENT_PREFIXES.values())
def test_segment_prefixes(prefix: int, bits: Bits) -> None:
    def work() -> Iterator[tuple[Case, Job]]:
        for case in one_of_each(bits):
            prefixed = case.with_prefix(prefix)
            assert prefixed is not None
            chance = random.Random(prefixed.code)
            # The last of two segment prefixes counts.
            twice = prefixed.with_prefix(chance.choice([*SEGMENT_PREFIXES]))
            assert twice is not None
            yield build_job(chance.choice((prefixed, twice)), chance, SPREAD[bits], Layout())

    assert check(work()) > 500


# LOCK makes CR8 of CR0 on AMD, and goes unpunished before VERW; to the SDM it is #UD.
LOCKED_ON_AMD = frozenset(("mov_to_cr", "mov_from_cr", "verw"))


@pytest.mark.parametrize("bits", BITS)
def test_lock_is_for_a_write_to_memory_of_some_instructions(bits: Bits) -> None:
    """The bytes behind LOCK may be no instruction to our decoder, so the state is made for the instruction without."""

    def work() -> Iterator[tuple[Case, Job]]:
        for case in one_of_each(bits):
            chance = random.Random(case.code)
            if case.row.mnemonic not in LOCKED_ON_AMD:
                case, job = build_job(case, chance, some_world(case, chance), Layout())
                yield case, replace(job, code=bytes([LOCK]) + job.code)

    assert check(work()) > 500


# With F2 or F3 the host has later instructions in the place of these (TZCNT, LZCNT, RDSSP), or takes the ZF that LOOPcc
# waits for from the prefix (AMD). INS and OUTS are asked for the right to the port there though ECX is 0.
REPLACED_BY_REP = frozenset(("bsf", "bsr", "nop", "loope", "loopne"))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    "prefixes", [(REP,), (REPNE,), (REP, REPNE), (REPNE, REP)], ids=["rep", "repne", "rep repne", "repne rep"]
)
def test_repeat_prefixes(prefixes: tuple[int, ...], bits: Bits) -> None:
    """Without effect on what is no string instruction; the last of them counts for those that compare."""

    def work() -> Iterator[tuple[Case, Job]]:
        for case in one_of_each(bits):
            repeated = case.with_prefix(*prefixes)
            if case.row.mnemonic not in REPLACED_BY_REP and repeated is not None and repeated.row is case.row:
                for turn in range(8 if case.row.string else 1):
                    chance = random.Random(repeated.code + bytes([turn]))
                    case, job = build_job(repeated, chance, some_world(repeated, chance), Layout())
                    if job.gpr[ECX] & 0xFFFF or not case.row.mnemonic.startswith(("ins", "outs")):
                        yield case, job

    assert check(work()) > 500


@pytest.mark.parametrize("bits", BITS)
def test_repeated_strings_in_one_go(bits: Bits) -> None:
    """At full speed: across pages, overlapping, up and down, and into a page that is not there or read-only."""

    def work() -> Iterator[tuple[Case, Job]]:
        for mnemonic in COMPARED:
            for case in by_mnemonic(bits)[mnemonic]:
                if not case.row.string or mnemonic.startswith(("ins", "outs")):
                    continue
                for prefix, turn in product((REP, REPNE), range(8)):
                    repeated = case.with_prefix(prefix)
                    assert repeated is not None
                    chance = random.Random(repeated.code + bytes([turn]))
                    yield _long_string(repeated, chance)

    assert check(work()) > 1000


def _long_string(case: Case, chance: random.Random) -> tuple[Case, Job]:
    distance = chance.choice((1, 2, 3, 4, 7, 64, -1, -2, -5, DESTINATION - SOURCE, DESTINATION - SOURCE - 1))
    source = SOURCE + chance.choice((0, 1, MIDDLE, STRADDLE - 1, STRADDLE - 2))
    world = some_world(case, chance)
    case, job = build_job(case, chance, world, Layout(source=source, destination=source + distance))
    gpr = list(job.gpr)
    narrow = address_bits(case.instruction) == 16
    gpr[ECX] = chance.choice((0, 1, 3, 64, 1000, 1025, 3000)) | (gpr[ECX] & 0xFFFF_0000 if narrow else 0)
    # Runs of equal bytes, so that comparisons go on for a while.
    run_of = chance.choice((0, 0, chance.getrandbits(8)))
    gpr[0] = run_of * 0x0101_0101
    patches = {source: bytes([run_of]) * 16, source + distance: bytes([run_of]) * chance.randrange(1, 17)}
    protection = bytearray([WRITE]) * ARENA_PAGES
    page = chance.choice((gpr[ESI], gpr[EDI])) - world.data_base + chance.choice((0, PAGE_BYTES)) >> 12
    if chance.random() < 0.5:
        protection[page & 0xF] = chance.choice((NONE, READ))
    eflags = job.eflags & ~(TF | DF) | (DF if chance.random() < 0.3 else 0)
    job = replace(job, gpr=tuple(gpr), eflags=eflags, patches=patches, protection=bytes(protection))
    return case, job
