"""Undefined flags: the table of spots against the SDM, the choice of rules against made-up CPUs, and this host."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from machine.alu import Alu, build_alu
from machine.faults import GuestFault
from machine.flags import AF, CF, OF, PF, SF, STATUS_MASK, ZF
from machine.undefined import (
    AMD_ZEN5,
    HOST,
    INTEL_P6,
    PROFILES,
    RESULT,
    SPOTS,
    Key,
    UndefinedFlags,
    is_result_undefined,
    keys,
    measure,
    undefined_flags,
    widest_undefined_flags,
)
from machine.undefinedprobes import Operands, probes
from machine.undefinedrules import RULES
from tests.machine.alu_cases import OPERATIONS, cases, run
from tests.oracles.host import require_host_alu

SZAP = SF | ZF | AF | PF

SPOT_NAMES = [f"{key[0]}{key[1]} {key[2]} {key[3]:#x}" for key, _ in keys()]


class AluAsHost:
    """A host made of an ALU, so that its rules are known."""

    def __init__(self, alu: Alu, operation: str | None = None) -> None:
        self.alu = alu
        self.operation = operation
        self.asked = 0

    def can_run(self, operation: str, _width: int) -> bool:
        return self.operation in (None, operation)

    def results(self, operation: str, width: int, cases: Sequence[Operands]) -> list[tuple[int, int]]:
        self.asked += 1
        plain = [run(self.alu, operation, width, (a, b, c, eflags & STATUS_MASK)) for a, b, c, eflags in cases]
        return [(result, out | 0x202) for result, out in plain]  # bit 1 and IF, as a process sees them


class OddHost(AluAsHost):
    """A CPU that sets AF after AND as the parity of both operands' bit 1 and the old CF: no rule says that."""

    def results(self, operation: str, width: int, cases: Sequence[Operands]) -> list[tuple[int, int]]:
        plain = super().results(operation, width, cases)
        if operation != "and":
            return plain
        return [
            (result, out & ~AF | ((a ^ b) >> 1 ^ eflags) % 2 * AF)
            for (a, b, _c, eflags), (result, out) in zip(cases, plain, strict=True)
        ]


# Operands from the SDM's instruction pages; the manual's words are in the comments where a count decides.
@pytest.mark.parametrize(
    ("operation", "width", "operands", "flags"),
    [
        ("add", 32, (1, 2, 0), 0),
        ("cmpxchg8b", 64, (1, 2, 3), 0),
        ("and", 8, (1, 2, 0), AF),
        ("test", 32, (1, 2, 0), AF),
        ("mul", 16, (1, 2, 0), SZAP),
        ("imul2", 32, (1, 2, 0), SZAP),
        ("div", 8, (1, 2, 0), STATUS_MASK),
        ("shl", 32, (1, 0, 0), 0),  # count 0: flags are not affected
        ("shl", 32, (1, 32, 0), 0),  # the count is masked to 5 bits
        ("shl", 32, (1, 1, 0), AF),
        ("shl", 32, (1, 2, 0), AF | OF),
        ("shl", 8, (1, 7, 0), AF | OF),
        ("shl", 8, (1, 8, 0), AF | OF | CF),  # counts from the operand size on
        ("shr", 16, (1, 16, 0), AF | OF | CF),
        ("sar", 8, (1, 9, 0), AF | OF),  # CF is the sign
        ("rol", 8, (1, 1, 0), 0),
        ("rol", 8, (1, 8, 0), OF),
        ("rcl", 8, (1, 9, 0), OF),
        ("rcr", 16, (1, 33, 0), 0),
        ("shld", 16, (1, 2, 1), AF),
        ("shld", 16, (1, 2, 16), AF | OF),
        ("shrd", 16, (1, 2, 17), STATUS_MASK),
        ("shrd", 32, (1, 2, 31), AF | OF),
        ("bt", 16, (1, 2, 0), OF | SF | AF | PF),
        ("bsf", 32, (1, 2, 0), STATUS_MASK & ~ZF),
        ("bsr", 32, (1, 0, 0), STATUS_MASK & ~ZF),
        ("aaa", 16, (1, 0, 0), OF | SF | ZF | PF),
        ("das", 16, (1, 0, 0), OF),
        ("aam", 16, (1, 10, 0), OF | AF | CF),
        ("aad", 16, (1, 10, 0), OF | AF | CF),
    ],
)
def test_undefined_flags_are_those_of_the_manual(
    operation: str, width: int, operands: tuple[int, int, int], flags: int
) -> None:
    assert undefined_flags(operation, width, *operands) == flags


def test_undefined_results_are_those_of_the_manual() -> None:
    undefined = [("shld", 16, (1, 2, 17)), ("shrd", 16, (1, 2, 31)), ("bsf", 16, (1, 0, 0)), ("bswap", 16, (1, 0, 0))]
    defined = [("shld", 16, (1, 2, 16)), ("shrd", 32, (1, 2, 31)), ("bsf", 16, (1, 8, 0)), ("bswap", 32, (1, 0, 0))]
    assert all(is_result_undefined(operation, width, *operands) for operation, width, operands in undefined)
    assert not any(is_result_undefined(operation, width, *operands) for operation, width, operands in defined)


def test_widest_mask_covers_every_condition() -> None:
    assert widest_undefined_flags("shl") == AF | OF | CF
    assert widest_undefined_flags("shld") == STATUS_MASK
    assert widest_undefined_flags("add") == 0


@pytest.mark.parametrize(("key", "rules"), [(key, spot.rules[key[3]]) for key, spot in keys()], ids=SPOT_NAMES)
def test_candidates_are_rules_and_the_first_is_zen5s(key: Key, rules: tuple[str, ...]) -> None:
    assert set(rules) <= set(RULES)
    assert len(rules) == len(set(rules)) > 1
    assert AMD_ZEN5.rules[key] == rules[0]


def test_every_spot_belongs_to_an_operation_of_the_alu() -> None:
    assert {key[:2] for key, _ in keys()} <= set(OPERATIONS)


@pytest.mark.parametrize(("key", "rules"), [(key, spot.rules[key[3]]) for key, spot in keys()], ids=SPOT_NAMES)
def test_measuring_finds_whatever_candidate_a_cpu_follows(key: Key, rules: tuple[str, ...]) -> None:
    operation, width = key[:2]
    sample = cases(operation, width, random_cases=120)[::37]
    for rule in rules:
        host = AluAsHost(build_alu(UndefinedFlags("made up", {**AMD_ZEN5.rules, key: rule})), operation)
        found = measure(host)
        assert found.rules[key] != HOST
        measured = build_alu(found)
        for case in sample:
            try:
                expected = run(host.alu, operation, width, case)
            except GuestFault:
                continue
            assert run(measured, operation, width, case) == expected, (rule, found.rules[key], case)


def test_a_rule_is_applied_on_top_of_the_plain_functions() -> None:
    key = ("and", 32, "always", AF)
    alu = build_alu(UndefinedFlags("made up", {**AMD_ZEN5.rules, key: "set"}))
    assert alu.binary["and"][32](6, 3, CF) == (2, AF)
    assert alu.binary["and"][16](6, 3, CF) == (2, 0)
    assert alu.binary["or"] == build_alu().binary["or"]


def test_flags_of_an_undefined_result_follow_the_result() -> None:
    key = ("shld", 16, "count over size", RESULT)
    alu = build_alu(UndefinedFlags("made up", {**AMD_ZEN5.rules, key: "destination again"}))
    # Bits 0000:8000:0000, 16 more are the source again (AMD) or the destination again (here).
    assert build_alu().ternary["shld"][16](0, 0x8000, 17, 0) == (1, AF)
    assert alu.ternary["shld"][16](0, 0x8000, 17, 0) == (0, AF | ZF | PF)


def test_what_no_rule_explains_is_asked_of_the_host() -> None:
    host = OddHost(build_alu())
    found = measure(host)
    assert found.host_operations == ("and",)
    assert "by asking the host: and" in found.describe()
    with pytest.raises(ValueError, match="need a host: and"):
        build_alu(found)
    alu = build_alu(found, host)
    for case in cases("and", 16, random_cases=120)[::53]:
        others = 0x3002
        (expected,) = host.results("and", 16, [case])
        asked = host.asked
        wanted = (expected[0], expected[1] & STATUS_MASK | others)
        assert alu.binary["and"][16](case[0], case[1], case[3] | others) == wanted
        assert host.asked == asked + 1
    asked = host.asked
    alu.binary["or"][16](1, 2, 0)
    assert host.asked == asked


def test_operations_that_a_host_lacks_are_assumed_and_said() -> None:
    class NoDecimals(AluAsHost):
        def can_run(self, operation: str, _width: int) -> bool:
            return operation not in ("aaa", "aas", "aam", "aad", "daa", "das")

    found = measure(NoDecimals(build_alu(INTEL_P6)))
    assert found.unprobed == ("aaa", "aas", "daa", "das", "aam", "aad")
    assert found.rules[("aaa", 16, "always", SF)] == AMD_ZEN5.rules[("aaa", 16, "always", SF)]
    assert found.rules[("shl", 8, "count over 0", AF)] == "unchanged"
    assert "assumed: aaa aas daa das aam aad" in found.describe()


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
def test_a_cpu_that_follows_a_known_model_behaves_as_it_when_measured(profile: UndefinedFlags) -> None:
    original = build_alu(profile)
    measured = build_alu(measure(AluAsHost(original)))
    for operation, width in OPERATIONS:
        for case in cases(operation, width, random_cases=60)[::211]:
            try:
                expected = run(original, operation, width, case)
            except GuestFault:
                continue
            assert run(measured, operation, width, case) == expected


@pytest.mark.parametrize(
    ("operation", "width", "operands", "eflags", "expected"),
    # sandpile.org/x86/flags.htm, column "P6 core": U is unchanged, 0 cleared, M by the manual.
    [
        ("and", 8, (0xF0, 0x0F, 0), STATUS_MASK, (0, ZF | PF)),
        ("mul", 8, (2, 3, 0), SZAP, (6, SZAP)),
        ("imul2", 32, (0x10000, 0x10000, 0), 0, (0, CF | OF)),
        ("div", 8, (7, 2, 0), STATUS_MASK, (0x103, STATUS_MASK)),
        ("shl", 8, (0x81, 1, 0), 0, (2, CF | OF)),
        ("shl", 8, (0x81, 2, 0), AF, (4, AF)),
        ("shl", 8, (0x41, 2, 0), OF, (4, OF | CF)),
        ("rol", 8, (0x81, 2, 0), OF, (6, OF)),
        ("ror", 8, (0x02, 2, 0), 0, (0x80, CF)),
        ("bsf", 32, (5, 8, 0), STATUS_MASK, (3, STATUS_MASK & ~ZF)),
        ("bsr", 32, (5, 0, 0), 0, (5, ZF)),
        ("bt", 32, (5, 2, 0), SZAP | OF, (5, STATUS_MASK)),
        ("aaa", 16, (0x80FA, 0, 0), OF, (0x8200, OF | PF | AF | CF)),
        ("daa", 16, (0x7F, 0, 0), 0, (0x85, AF | SF)),
    ],
)
def test_intel_p6_follows_the_published_table(
    operation: str, width: int, operands: tuple[int, int, int], eflags: int, expected: tuple[int, int]
) -> None:
    assert run(build_alu(INTEL_P6), operation, width, (*operands, eflags)) == expected


def test_probes_are_the_same_on_every_call_and_fit_the_width() -> None:
    first = {(operation, width): probes(operation, width) for operation, width in OPERATIONS if operation in SPOTS}
    probes.cache_clear()
    for (operation, width), wanted in first.items():
        assert probes(operation, width) == wanted
        limit = 2 * width if operation in ("div", "idiv") else width
        assert all(a >> limit == 0 and b >> max(width, 8) == 0 for a, b, _c, _eflags in wanted)


def test_every_operation_of_this_host_is_explained_by_a_rule_or_asked_for() -> None:
    host = require_host_alu()
    found = measure(host)
    assert set(found.rules) == set(AMD_ZEN5.rules)
    build_alu(found, host)


def test_this_host_is_recognised_if_it_is_the_model_that_was_measured() -> None:
    cpu = Path("/proc/cpuinfo").read_text()
    family = re.search(r"^cpu family\s*: (\d+)$", cpu, re.MULTILINE)
    if "AuthenticAMD" not in cpu or family is None or family[1] != "26":
        pytest.skip("/proc/cpuinfo says that this is no AMD CPU of family 1Ah")
    host = require_host_alu()
    found = measure(host)
    unprobed = tuple(key[0] for key, _ in keys() if not host.can_run(*key[:2]))
    assert replace(found, unprobed=()) == AMD_ZEN5
    assert set(found.unprobed) == set(unprobed)
