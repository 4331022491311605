"""The host's CPU in user mode as an oracle: its answers where the SDM leaves no doubt, so that it can be trusted."""

from __future__ import annotations

from dataclasses import replace

import pytest

from machine.faults import PF_PRESENT, PF_USER, PF_WRITE, Vector
from machine.flags import AC, AF, CF, DF, IF, PF, TF, ZF
from tests.oracles.usermode import (
    ARENA,
    ARENA_PAGES,
    CODE,
    EXECUTE,
    NONE,
    PAGE_BYTES,
    READ,
    USER_CODE,
    USER_DATA,
    WRITE,
    Job,
    LdtSegment,
    ldt_selector,
    pristine,
    run,
)

EBX = 3


def job(code: str, *, eflags: int = TF, **registers: int) -> Job:
    names = ("eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi")
    return Job(bytes.fromhex(code), tuple(registers.get(name, 0) for name in names), eflags)


def rights(page: int, protection: int) -> bytes:
    return bytes(protection if n == page else WRITE for n in range(ARENA_PAGES))


def test_one_instruction_and_its_flags() -> None:
    (seen,) = run([job("01c8", eax=0xFFFF_FFFF, ecx=1)])  # add eax, ecx
    assert (seen.vector, seen.eip, seen.gpr) == (Vector.DB, CODE + 0x802, (0, 1, 0, 0, 0, 0, 0, 0))
    assert seen.eflags & ~TF == 2 | IF | CF | PF | AF | ZF
    assert seen.selectors == (USER_DATA, USER_CODE, USER_DATA, USER_DATA, USER_DATA, USER_DATA)
    assert seen.memory == {}


def test_without_the_trap_flag_it_runs_to_the_int3_behind() -> None:
    (seen,) = run([job("41 41 41", eflags=0)])  # inc ecx, three times
    assert (seen.vector, seen.eip, seen.gpr[1]) == (Vector.BP, CODE + 0x803, 3)


def test_stores_are_seen_and_undone() -> None:
    store = job("c70378563412", ebx=ARENA + 0x10)  # mov dword ptr [ebx], 12345678h
    load = job("8b03", ebx=ARENA + 0x10)
    first, second, third = run([store, load, replace(load, patches={ARENA + 0x11: b"\xaa\xbb"})])
    assert first.memory == {ARENA + 0x10 + n: byte for n, byte in enumerate(bytes.fromhex("78563412"))}
    assert second.gpr[0] == int.from_bytes(pristine()[0x10:0x14], "little")
    assert third.gpr[0].to_bytes(4, "little")[1:3] == b"\xaa\xbb"
    assert third.memory.keys() <= {ARENA + 0x11, ARENA + 0x12}


@pytest.mark.parametrize(
    ("code", "protection", "error"),
    [
        ("8b03", NONE, PF_USER),
        ("8903", NONE, PF_USER | PF_WRITE),
        ("8903", READ, PF_USER | PF_WRITE | PF_PRESENT),
        ("0103", READ, PF_USER | PF_WRITE | PF_PRESENT),
    ],
)
def test_page_faults_tell_address_and_reason(code: str, protection: int, error: int) -> None:
    faulting = replace(job(code, ebx=ARENA + 2 * PAGE_BYTES - 2), protection=rights(2, protection))
    (seen,) = run([faulting])
    assert (seen.vector, seen.error_code, seen.cr2) == (Vector.PF, error, ARENA + 2 * PAGE_BYTES)
    assert (seen.eip, seen.gpr, seen.memory) == (faulting.eip, faulting.gpr, {})


def test_a_page_of_code_that_is_missing() -> None:
    linear = CODE + PAGE_BYTES - 1
    (seen,) = run([replace(job("01c8"), eip=linear, code_linear=linear, code_protection=bytes([EXECUTE, NONE]))])
    assert (seen.vector, seen.cr2) == (Vector.PF, CODE + PAGE_BYTES)


@pytest.mark.parametrize(
    ("code", "vector", "error"),
    [("f7f1", Vector.DE, 0), ("0f0b", Vector.UD, 0), ("f4", Vector.GP, 0), ("cd21", Vector.GP, 0x21 * 8 + 2)],
)
def test_other_faults(code: str, vector: Vector, error: int) -> None:
    (seen,) = run([job(code)])
    assert (seen.vector, seen.error_code, seen.eip, seen.cr2) == (vector, error, CODE + 0x800, 0)


def test_alignment_checks() -> None:
    misaligned, aligned = job("8b03", eflags=TF | AC, ebx=ARENA + 2), job("8b03", eflags=TF | AC, ebx=ARENA + 4)
    assert [seen.vector for seen in run([misaligned, aligned])] == [Vector.AC, Vector.DB]


def test_segments_of_the_ldt_have_bases_limits_and_widths() -> None:
    data, code = ldt_selector(0), ldt_selector(1)
    ldt = {0: LdtSegment(ARENA + 0x100, 0xF), 1: LdtSegment(CODE, 0xFFF, contents=2, big=False)}
    inside = replace(job("8b03", ebx=0xC), selectors=(data, USER_CODE, USER_DATA, data, data, data))
    beyond = replace(inside, gpr=(0, 0, 0, 0xD, 0, 0, 0, 0))
    narrow = replace(inside, code=bytes.fromhex("b83412"), eip=0x800, selectors=(data, code, *inside.selectors[2:]))
    first, second, third = run([inside, beyond, narrow], ldt)
    assert first.gpr[0] == int.from_bytes(pristine()[0x10C:0x110], "little")
    assert (second.vector, second.error_code) == (Vector.GP, 0)
    assert (third.gpr[0], third.eip, third.selectors[1]) == (0x1234, 0x803, code)


def test_repeats_go_on_for_so_many_iterations() -> None:
    stos = job("f3aa", ecx=5, edi=ARENA, eax=0x99)
    one, three, all_of_them = run([stos, replace(stos, iterations=3), replace(stos, iterations=9)])
    assert [seen.gpr[1] for seen in (one, three, all_of_them)] == [4, 2, 0]
    assert [seen.eip - CODE for seen in (one, three, all_of_them)] == [0x800, 0x800, 0x802]


def test_flags_that_a_job_leaves_behind_do_not_reach_the_next() -> None:
    image = (0x24_0000 | DF | 2).to_bytes(4, "little")  # ID, AC, DF
    pop = replace(job("9d", esp=ARENA), patches={ARENA: image})  # popfd
    changed, plain = run([pop, job("90")])
    assert changed.eflags & 0x24_0000 == 0x24_0000
    assert plain.eflags == 2 | IF | TF


def test_a_thousand_jobs_come_back_in_order() -> None:
    seen = run([job("43", ebx=n) for n in range(1000)])
    assert [outcome.gpr[EBX] for outcome in seen] == list(range(1, 1001))
