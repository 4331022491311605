"""The translation benchmark: what it divides by what."""

from __future__ import annotations

import pytest

from tools import bench_translate
from tools.bench import Result


def test_figures_follow_from_what_the_engine_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(_engine: str, _image: object, _words: str, statistics: dict[str, int | float | str]) -> None:
        statistics.update(
            {"translation units": 10, "guest bytes translated": 300, "host bytes emitted": 900,
             "seconds in translator": 0.001}
        )  # fmt: skip

    monkeypatch.setattr(bench_translate, "run_engine", run)
    monkeypatch.setattr(bench_translate, "mean_instruction_bytes", lambda: 3.0)
    rows = [step.value for step in bench_translate.translate_speed() if isinstance(step, Result)]
    assert rows == pytest.approx([100_000, 100, 3])


def test_guests_are_translated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_translate, "_ROUNDS", 1)
    monkeypatch.setattr(bench_translate, "_RUNS", (("bench", "fib"),))
    rows = [step.value for step in bench_translate.translate_speed() if isinstance(step, Result)]
    assert all(value > 0 for value in rows)
    assert 2 < bench_translate.mean_instruction_bytes() < 6
