"""What bt counts: it adds up, and every number moves for the reason that its name says."""

from __future__ import annotations

import pytest

from tests.engine import verified
from tests.vmm.bare import Bare, flat
from vmm.bt import BinaryTranslator
from vmm.native import tally
from vmm.native.tally import Tally

LOOP = "1: inc eax\ncpuid\njmp 1b"


def run(source: str, insns: int) -> Bare:
    bare = flat(source, verified)
    bare.run(insns)
    return bare


def count(bare: Bare, name: str) -> float:
    value = bare.engine.statistics()[name]
    assert not isinstance(value, str)
    return value


def test_chains_break_with_what_they_lead_to() -> None:
    subject = Tally()
    for target in (100, 100, 200):
        subject.chained(target)
    assert (subject.chains_made, subject.chains_to(100)) == (3, 2)
    subject.drop(100)
    assert (subject.chains_broken, subject.dropped) == (2, 1)
    subject.drop(300)
    assert subject.chains_broken == 2
    subject.flush()
    assert (subject.chains_broken, subject.flushes) == (3, 1)


def test_callouts_are_counted_by_instruction_and_by_place() -> None:
    bare = run(f"{LOOP}", 3000)
    try:
        statistics = bare.engine.statistics()
        assert int(statistics["callouts of cpuid"]) == int(statistics["callouts"]) > 500
        assert isinstance(bare.engine, BinaryTranslator)
        (site,) = bare.engine.tally.hottest(5)
        assert (site.eip, site.row, site.count) == (0x1001, "cpuid", statistics["callouts"])
    finally:
        bare.close()


def test_places_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tally, "MAX_SITES", 2)
    bare = flat("in al, 0x50\nout 0x50, al\nhlt")
    try:
        subject = Tally()
        for eip in (0x1000, 0x1002, 0x1004, 0x1004, 0x9999_0000):
            subject.call_out(bare.cpu, eip)
        assert subject.callouts_by_row() == {"in": 1, "out": 1, "unknown": 3}
        assert subject.report()["callouts"] == 5
    finally:
        bare.close()


def test_what_cannot_be_read_or_decoded_has_no_name() -> None:
    bare = flat("hlt")
    try:
        bare.memory.write(0x2000, b"\x0f\x04\xff")
        subject = Tally()
        for eip in (0x2000, 0xF000_0000, 0x1000):
            subject.call_out(bare.cpu, eip)
        assert subject.callouts_by_row() == {"unknown": 2, "hlt": 1}
    finally:
        bare.close()


def test_translation_chains_and_drops() -> None:
    bare = run("1: inc eax\ncmp eax, 100\njnz 1b\nmov byte ptr [1b], 0x90\nmov eax, 99\njmp 1b", 3000)
    try:
        assert count(bare, "translation units") >= 2
        assert count(bare, "guest bytes translated") < count(bare, "host bytes emitted")
        assert count(bare, "chains made") >= count(bare, "chains broken") >= 1
        assert count(bare, "fragments dropped") >= 1
        assert 0 < count(bare, "fragments") <= count(bare, "translation units")
        assert count(bare, "TC bytes used") > count(bare, "host bytes emitted")
    finally:
        bare.close()


def test_time_is_shared_out() -> None:
    bare = run(LOOP, 3000)
    try:
        assert isinstance(bare.engine, BinaryTranslator)
        parts = [count(bare, f"seconds in {name}") for name in ("TC", "translator", "VMM")]
        assert min(parts) > 0
        assert sum(parts) == pytest.approx(bare.engine.tally.seconds_in_run, abs=1e-5)
    finally:
        bare.close()
