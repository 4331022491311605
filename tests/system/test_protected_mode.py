"""Protected mode, case by case, against what Bochs made of the same cases and, where it knows about them, QEMU's TCG.

Bochs' results are recorded (`tests/system/protected_mode/bochs.json`): it is nothing that a test machine needs, and of
the two it alone has segment limits, EXT, VME and PVI. Where one departs from the SDM,
`tests/system/protected_mode/deviations.py` says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache

import pytest

from tests.oracles import qemu, reference
from tests.system.protected_mode import deviations
from tests.system.protected_mode.arena import CR0, CR0_PG, DATA, S_CODE0, STUBS, TSS_MAIN, Patch, gate, vector_gate
from tests.system.protected_mode.harness import Case, Record, build, describe, parse
from tests.system.protected_mode.paging import DIRECTORY, TABLE, identity_map
from tests.system.protected_mode.record import RECORDED
from tests.system.protected_mode.suites import SUITES, Suite, batches


@cache
def recorded() -> Mapping[str, str]:
    suites: Mapping[str, str] = json.loads(RECORDED.read_text())["suites"]
    return suites


def expect_like_bochs(suite: Suite, records: list[tuple[Case, Record]]) -> None:
    row = recorded()[suite.name]
    digests = [row[at : at + deviations.DIGITS] for at in range(0, len(row), deviations.DIGITS)]
    assert len(digests) == len(records), "the record is of other cases: renew it with Bochs"
    unlike = [
        f"{case.name}: {describe(record)}"
        for (case, record), digest in zip(records, digests, strict=True)
        if digest not in (deviations.UNKNOWN, deviations.digest(record))
    ]
    assert not unlike, f"{len(unlike)} of {len(records)} are not as Bochs has them, such as\n" + "\n".join(unlike[:3])


def expect_like_qemu(suite: Suite, ours: list[tuple[Case, Record]], theirs: list[Record]) -> None:
    unlike = []
    for (case, record), other in zip(ours, theirs, strict=True):
        excused = deviations.reason(deviations.QEMU, suite.name, case.name)
        found = deviations.unlike_qemu(suite.name, record, other)
        if found and not excused:
            unlike.append(f"{case.name}: {', '.join(found)}")
    assert not unlike, f"{len(unlike)} of {len(ours)} are not as QEMU has them, such as\n" + "\n".join(unlike[:3])


@pytest.mark.usefixtures("each_engine")
@pytest.mark.parametrize("suite", SUITES, ids=[suite.name for suite in SUITES])
def test_suite(suite: Suite) -> None:
    ours: list[tuple[Case, Record]] = []
    theirs: list[Record] = []
    for batch in batches(suite.cases()):
        program = build(batch)
        done = reference.run(program)
        found = parse(done.run.output)
        assert len(found) == len(batch), f"{batch[len(found)].name!r} ended the run: {done.chain}"
        ours += zip(batch, found, strict=True)
        if suite.by_qemu:
            theirs += parse(qemu.run(program).output)
    expect_like_bochs(suite, ours)
    if suite.by_qemu:
        expect_like_qemu(suite, ours, theirs)


def unmapped_tables() -> list[Patch]:
    """Page tables without the page of GDT and IDT."""
    return [*identity_map(), Patch(TABLE + (DATA >> 12) * 4, bytes(4))]


SHUTDOWNS = {
    "no idt": (Case("no idt", f"lidt [{DATA}]; ud2", patches=[Patch(DATA, bytes(6))]), [6, 13, 13, 8, 13]),
    "no handlers": (
        Case("no handlers", "ud2", 3, patches=[vector_gate(vector, bytes(8)) for vector in (6, 8, 11, 13)]),
        [6, 13, 13, 8, 13],
    ),
    "no stack": (
        Case(
            "no stack",
            "ud2",
            3,
            patches=[Patch(TSS_MAIN + 8, bytes(4)), vector_gate(8, gate(S_CODE0, STUBS, 0x8E))],
        ),
        [6, 10, 10, 8, 10],
    ),
    "no page": (
        Case("no page", "ud2", registers={"cr0": CR0 | CR0_PG, "cr3": DIRECTORY}, patches=unmapped_tables()),
        [14, 14, 8, 14],
    ),
}


@pytest.mark.usefixtures("each_engine")
@pytest.mark.parametrize("name", SHUTDOWNS)
def test_shutdown(name: str) -> None:
    case, vectors = SHUTDOWNS[name]
    program = build([case])
    ours, theirs = reference.run(program), qemu.run(program)
    assert ours.run == theirs
    assert ours.run.status is None
    assert [level.vector for level in ours.chain] == vectors


def test_case_names_tell_cases_apart() -> None:
    for suite in SUITES:
        names = [case.name for case in suite.cases()]
        assert len(names) == len(set(names)), suite.name


def test_excuses_are_needed() -> None:
    # Each names a case that exists, so that a renamed one does not leave an excuse that nobody sees.
    names = {suite.name: [case.name for case in suite.cases()] for suite in SUITES}
    for table in (deviations.BOCHS, deviations.QEMU):
        for suite, beginning in table:
            assert any(name.startswith(beginning) for name in names[suite]), (suite, beginning)
