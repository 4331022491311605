"""The soak: a short one is clean, and what grows is found."""

from __future__ import annotations

import tempfile
from dataclasses import replace

import pytest

from tools import soak
from tools.soak import Holdings, Peaks, SoakError

HELD = Holdings(rss_bytes=100 << 20, mappings=300, descriptors=10)


@pytest.mark.slow
def test_twenty_seconds() -> None:
    lines: list[str] = []
    assert soak.soak(20, lines.append) > 10_000_000
    assert len(lines) > soak.WARM_ROUNDS


@pytest.mark.parametrize(
    ("later", "complaint"),
    [
        (replace(HELD, rss_bytes=HELD.rss_bytes + soak.RSS_SLACK_BYTES + 1), "memory from 100 to 124 MiB"),
        (replace(HELD, mappings=HELD.mappings + soak.MAPPINGS_SLACK + 1), "mappings from 300 to 401"),
        (replace(HELD, descriptors=11), "descriptors from 10 to 11"),
    ],
)
def test_what_grows_after_the_warm_up_is_found(
    monkeypatch: pytest.MonkeyPatch, later: Holdings, complaint: str
) -> None:
    monkeypatch.setattr(soak, "GUESTS", ())
    held = iter([later] * (soak.WARM_ROUNDS - 1) + [HELD, HELD, later])
    with pytest.raises(SoakError, match=complaint):
        soak.soak(3600, lambda _line: None, lambda: next(held))


def test_peaks_have_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(_name: str, _words: str, _end: int, peaks: Peaks) -> int:
        peaks.mappings, peaks.tc_bytes = soak.MAX_MAPPINGS + 1, soak.MAX_TC_BYTES + 1
        return 0

    monkeypatch.setattr(soak, "run_guest", run)
    with pytest.raises(SoakError, match=r"60001 mappings at once; 67108865 bytes of TC"):
        soak.soak(0, lambda _line: None, lambda: HELD)


def test_holdings_are_those_of_the_process() -> None:
    before = Holdings.now()
    assert not before.grown_since(before)
    with tempfile.TemporaryFile():
        after = Holdings.now()
    assert after.descriptors == before.descriptors + 1
    assert after.grown_since(before)
    assert after.mappings > 10
    assert after.rss_bytes > 1 << 20


def test_a_guest_that_fails_is_found() -> None:
    peaks = Peaks()
    assert soak.run_guest("tiny-exit", "", 1 << 62, peaks) > 0
    assert peaks.mappings > 10
    assert 0 < peaks.tc_bytes < soak.MAX_TC_BYTES
    with pytest.raises(SoakError, match="tiny-triple ended with TRIPLE_FAULT: b'triple"):
        soak.run_guest("tiny-triple", "", 1 << 62, peaks)
