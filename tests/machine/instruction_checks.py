"""Owns the comparison of instruction cases between this host's CPU and the reference CPU, and what is excused in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

from iced_x86 import Mnemonic

from machine.faults import Vector
from machine.instructions.table import ROWS
from tests.machine.instruction_cases import Bits, Case, by_mnemonic
from tests.machine.instruction_jobs import LDT, address_bits, has_modrm_memory
from tests.machine.instruction_subject import Subject, describe, differences
from tests.oracles.usermode import Job, Outcome, run
from vmm.hostalu import choose_alu

BITS: tuple[Bits, ...] = (32, 16)

# What a user program cannot be asked for: the kernel has a say in it, or the host has what this CPU has not.
ELSEWHERE = {
    "cpuid": "another CPU model",
    "rdtsc": "time",
    "fpu": "the host has one",
    "wait": "the host has an FPU",
    "sysenter": "a system call",
    "int1": "hypervisors that intercept it report the address of INT1 itself",
    "sgdt": "UMIP",
    "sidt": "UMIP",
    "sldt": "UMIP",
    "str": "UMIP",
    "smsw": "UMIP",
}
COMPARED = [mnemonic for mnemonic in ROWS if mnemonic not in ELSEWHERE]

# These check several things, and the SDM's order of the checks is not this host's, or the host has written part of its
# pushes before the fault. Nothing of that is architectural.
ORDER_DIFFERS = frozenset(("call", "call_far", "retf", "iret", "iretd"))
WRITES_BEFORE_A_FAULT = frozenset(("enter", "pusha", "pushad", "call_far"))
LOADS_BEFORE_A_FAULT = frozenset(("popa", "popad"))


@cache
def host_vendor() -> str:
    """What CPUID says of this host, as Linux reports it: "AuthenticAMD", "GenuineIntel"; empty if it does not."""
    lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    return next((line.split()[-1] for line in lines if line.startswith("vendor_id")), "")


@cache
def subject() -> Subject:
    """The reference CPU of this test process, with the undefined flags of this host."""
    return Subject(LDT, choose_alu())


def is_comparable(case: Case) -> bool:
    """Not a system call, nor a gate that Linux opens to everybody."""
    return case.instruction.mnemonic != Mnemonic.INT or case.instruction.immediate8 not in (3, 4, 0x80)


def _nothing_more(_case: Case, _job: Job, _seen: Outcome) -> list[str]:
    return []


def check(work: Iterable[tuple[Case, Job]], more: Callable[[Case, Job, Outcome], list[str]] = _nothing_more) -> int:
    """Run all on the host and on the reference CPU and fail for the first few differences.

    Args:
        work: cases, each in its state.
        more: what else is wrong with the outcome on the reference CPU, which is in the state it was left in.

    Returns:
        The number of cases.
    """
    cases = [(case, job) for case, job in work if is_comparable(case)]
    problems = []
    for (case, job), expected in zip(cases, run([job for _, job in cases], LDT), strict=True):
        seen = subject().run(job)
        found = differences(expected, seen)
        if _is_excused(case, expected.vector, seen.vector, found):
            found = []
        found += more(case, job, seen)
        if found:
            problems.append("\n    ".join([str(case), describe(job), *found]))
    assert not problems, f"{len(problems)} of {len(cases)} differ:\n" + "\n".join(problems[:5])
    return len(cases)


def _is_excused(case: Case, expected_vector: int, seen_vector: int, found: list[str]) -> bool:
    mnemonic = case.row.mnemonic
    faults = not {expected_vector, seen_vector} & {Vector.DB, Vector.BP, Vector.OF}
    parts = {line.partition(":")[0] for line in found}
    allowed = set()
    if faults and mnemonic in ORDER_DIFFERS:
        allowed |= {"vector", "error_code", "cr2"}
    if faults and mnemonic in WRITES_BEFORE_A_FAULT:
        allowed |= {"memory"}
    if faults and mnemonic in LOADS_BEFORE_A_FAULT:
        allowed |= {"gpr"}
    return parts <= allowed


@cache
def one_of_each(bits: Bits) -> tuple[Case, ...]:
    """A case with memory and one without for each code and address size that there are."""
    found: dict[tuple[int, int, bool], Case] = {}
    for mnemonic in COMPARED:
        for case in by_mnemonic(bits)[mnemonic]:
            key = case.instruction.code, address_bits(case.instruction), has_modrm_memory(case.instruction)
            found.setdefault(key, case)
    return tuple(found.values())
