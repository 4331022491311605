"""The start benchmark: the whole is longer than Python alone, and imports are named."""

from __future__ import annotations

import os

import pytest

from tools import bench_start
from tools.bench import BenchmarkError, Result


def test_the_whole_takes_longer_than_python_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_start, "_RUNS", 1)
    rows = {step.name: step for step in bench_start.start() if isinstance(step, Result)}
    for suffix in ("", ", processor time"):
        alone = rows[f"start Python alone{suffix}"].value
        for engine in ("bt", "interp"):
            assert rows[f"start to the first output of a guest, {engine}{suffix}"].value > alone > 0
    assert "0.4" in rows["start to the first output of a guest, bt"].note
    assert {"imports of machine", "imports of gdbstub", "imports of trio"} <= set(rows)


def test_a_command_without_output_is_no_measurement() -> None:
    with pytest.raises(BenchmarkError, match="no output of -c pass"):
        bench_start._first_byte(["-c", "pass"], dict(os.environ))
