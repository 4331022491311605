"""The compute benchmark on one kernel: what is measured where, and what it says when something is missing."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from guests import build, images
from tools import bench, bench_compute, bench_guests
from tools.bench import BenchmarkError, Notice, Result, Step
from tools.bench_guests import Line, LineClock


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """One kernel, for a moment."""
    for name, value in {"_ROUNDS": 1, "_REPEATS": 2, "_UNIT_NS": 3_000_000, "KERNELS": ("fib",)}.items():
        monkeypatch.setattr(bench_compute, name, value)


def results(steps: list[Step]) -> dict[str, Result]:
    return {step.name: step for step in steps if isinstance(step, Result)}


@pytest.mark.usefixtures("short")
def test_three_places_and_their_ratios() -> None:
    found = results(list(bench_compute.compute()))
    for place in ("bt", "native", "QEMU"):
        row = found[f"fib, {place}"]
        assert row.median is not None
        assert 0 < row.value <= row.median
    slower = found["fib, bt's time / native"].value
    assert slower == found["fib, bt"].value / found["fib, native"].value
    assert found["geometric mean, bt's time / native"].value == pytest.approx(slower)
    assert "1.3" in found["geometric mean, bt's time / native"].note
    assert "4" in found["geometric mean, QEMU's time / bt's"].note


@pytest.mark.usefixtures("short")
def test_what_is_missing_is_said_and_the_rest_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_directory: Path) -> Path:
        raise build.BuildError("gcc is not installed\nmore")

    monkeypatch.setattr(build, "build_native_bench", fail)
    monkeypatch.setattr("tools.bench_guests.shutil.which", lambda _name: None)
    steps = list(bench_compute.compute())
    assert [step.text for step in steps if isinstance(step, Notice)] == [
        "no native times: gcc is not installed",
        "no times of QEMU: qemu-system-i386 is not installed",
    ]
    assert set(results(steps)) == {"fib, bt"}


def test_the_kernels_are_those_of_the_guest(tmp_path: Path) -> None:
    program = build.build_native_bench(tmp_path)
    done = subprocess.run([program], capture_output=True, text=True, check=True)
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(bench.KERNELS)


def test_a_run_that_ends_wrongly_is_no_measurement() -> None:
    with pytest.raises(BenchmarkError, match=r"tiny-triple.elf under bt ended with TRIPLE_FAULT"):
        bench_guests.run_engine("bt", images.path("tiny-triple"), "")


def test_a_kernel_that_says_something_else_is_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [Line("start fib", 0, 1), Line("fib 2 0", 5, 6), Line("start fib", 7, 8), Line("fib 3 0", 9, 10)]
    monkeypatch.setattr(bench_compute, "run_qemu", lambda _image, _words: lines)
    with pytest.raises(BenchmarkError, match="fib 3 0"):
        bench_compute._qemu_times("fib", 4)


def test_lines_have_the_times_of_their_first_and_last_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter((10, 20, 30, 40))
    monkeypatch.setattr(bench_guests, "perf_counter_ns", lambda: next(times))
    clock = LineClock()
    for data in (b"st", b"art x\r\n", b"x", b" 1\nrest"):
        clock.take(data)
    assert clock.lines == [Line("start x", 10, 20), Line("x 1", 30, 40)]
    assert [(name, after.text, ns) for name, after, ns in bench_guests.pairs(clock.lines)] == [("x", "x 1", 10)]


def test_means() -> None:
    assert bench_guests.median([3, 1, 2]) == 2
    assert bench_guests.median([4, 1, 2, 3]) == 2.5
    assert bench_guests.geometric_mean([2, 8]) == pytest.approx(4)
