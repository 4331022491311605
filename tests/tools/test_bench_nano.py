"""The nanobenchmarks: what is subtracted, how often each runs, and that guest and tool know the same names."""

from __future__ import annotations

from pathlib import Path

import pytest

from guests import images
from tests.guests.behaviours import NANO_NAMES
from tools import bench_nano
from tools.bench import BenchmarkError, Notice, Result
from tools.bench_guests import Line


def lines(text: str) -> list[Line]:
    """Each line takes a nanosecond, and the next begins as many later as it has characters."""
    made, now = [], 0
    for line in text.splitlines():
        made.append(Line(line, now, now + 1))
        now += 1 + len(line)
    return made


def test_the_tool_knows_what_the_guest_can_do() -> None:
    assert sorted(bench_nano.NAMES) == sorted(NANO_NAMES)


def took(name: str, *each_ns: int) -> list[Line]:
    """An operation, done as often as there are times."""
    made, now = [], 0
    for ns in each_ns:
        made += [Line(f"start {name}", now, now + 1), Line(f"{name} 1 0", now + 1 + ns, now + 2 + ns)]
        now += 2 + ns
    return made


def test_one_boot_measures_the_last_run_of_each_without_what_is_set_up() -> None:
    seen: list[tuple[Path, str]] = []

    def run(image: Path, words: str) -> list[Line]:
        seen.append((image, words))
        return took("in", 900, 500, 540)

    assert bench_nano._measure(run, {"in": 4}) == {"in": 10}
    assert seen == [(images.path("nano"), "in=200 in=100 in=104")]
    with pytest.raises(BenchmarkError, match="ran in only"):
        bench_nano._measure(run, {"in": 4, "out": 4})


def test_a_wrong_answer_is_no_measurement() -> None:
    with pytest.raises(BenchmarkError, match="'panic' of in"):
        bench_nano._measure(lambda _image, _words: lines("start in\npanic"), {"in": 4})


def test_the_loop_around_is_subtracted() -> None:
    times = {"empty": [3.0, 2.0], "user_empty": [1.0], "in": [7.0, 5.0], "syscall_int": [9.0], "rdtsc": [1.0]}
    assert bench_nano._best("in", times) == 3
    assert bench_nano._best("syscall_int", times) == 8
    assert bench_nano._best("rdtsc", times) == bench_nano._FLOOR_NS
    row = bench_nano._result("IN", "bt", "in", times)
    assert (row.value, row.median) == (3, 4)


def test_all_operations_beside_qemu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"_ROUNDS": 1, "_RUN_NS": 1000, "_WARM_UP": 2, "_WARM_UPS": {}, "_CALIBRATION": 20}.items():
        monkeypatch.setattr(bench_nano, name, value)
    monkeypatch.setattr(bench_nano, "_LEAST", 20)
    steps = list(bench_nano.nano())
    rows = {step.name: step for step in steps if isinstance(step, Result)}
    assert not [step for step in steps if isinstance(step, Notice)]
    for what in bench_nano.OPERATIONS.values():
        assert rows[f"{what}: bt's time / QEMU's"].value == rows[f"{what}: bt"].value / rows[f"{what}: QEMU"].value
    slower = rows["operations slower than in QEMU"]
    assert slower.value == len(slower.note.split())


def test_without_qemu_the_rest_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.bench_guests.shutil.which", lambda _name: None)
    monkeypatch.setattr(bench_nano, "_ROUNDS", 1)
    text = "".join(f"start {name}\n{name} 1 0\n" for name in bench_nano.NAMES)
    monkeypatch.setattr(bench_nano, "run_engine", lambda _engine, _image, _words: lines(text))
    steps = list(bench_nano.nano())
    assert [step.text for step in steps if isinstance(step, Notice)] == [
        "no times of QEMU: qemu-system-i386 is not installed"
    ]
    assert len([step for step in steps if isinstance(step, Result)]) == len(bench_nano.OPERATIONS)
