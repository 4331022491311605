"""`bench compute`: the kernels of guests/bench under bt, under QEMU's TCG, and natively from the same object code.

A figure is the time from the line `start NAME` to the line after it, on a guest that has run the kernel before: boot,
translation and first touches are not in it. The three take turns, so that what else the host does hits them alike.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from guests import build, images
from tools.bench import KERNELS, BenchmarkError, Notice, Progress, Result, Step
from tools.bench_guests import QEMU, Line, geometric_mean, has_qemu, median, pairs, run_engine, run_qemu

NATIVE_GOAL = 1.3  # at most so many times the native time
QEMU_GOAL = 4.0  # at least so many times QEMU's speed
# On an AMD EPYC, REPNE SCASB takes 93 ns for 64 bytes in a 32-bit program and 27 ns in a 64-bit one, as bt's code is.
STRINGS = "memory"
_ROUNDS = 3  # each a new process or machine
_REPEATS = 3  # in each of them, after a warm-up
_UNIT_NS = 15_000_000  # how long one of them lasts natively
_WARM_UP_UNITS = 2
_CALIBRATION_UNITS = 20

Measure = Callable[[str, int], list[float]]


@dataclass(slots=True)
class Times:
    """The times of one kernel in nanoseconds a unit, by where it ran."""

    by_place: dict[str, list[float]] = field(default_factory=dict)

    def best(self, place: str) -> float | None:
        """The shortest: what the work takes when nobody else disturbs it."""
        times = self.by_place.get(place)
        return min(times) if times else None

    def ratio(self, over: str, under: str) -> float | None:
        """How many times as long it took at `over` as at `under`."""
        longer, shorter = self.best(over), self.best(under)
        return None if longer is None or shorter is None else longer / shorter


def compute() -> Iterator[Step]:
    """Measure all kernels; without a compiler for -m32 or without QEMU, what remains."""
    with tempfile.TemporaryDirectory() as scratch:
        places: dict[str, Measure] = {"bt": _engine_times}
        try:
            program = build.build_native_bench(Path(scratch))
            places["native"] = lambda kernel, units: _native_times(program, kernel, units)
        except build.BuildError as error:
            yield Notice(f"no native times: {str(error).splitlines()[0]}")
        if has_qemu():
            places["QEMU"] = _qemu_times
        else:
            yield Notice(f"no times of QEMU: {QEMU} is not installed")
        yield from _compare(places)


def _compare(places: dict[str, Measure]) -> Iterator[Step]:
    ratios: dict[str, list[float]] = {"native": [], "QEMU": []}
    without_strings: list[float] = []
    steps, step = len(KERNELS) * _ROUNDS * len(places), 0
    for kernel in KERNELS:
        times = Times()
        units = _calibrate(places, kernel)
        for _ in range(_ROUNDS):
            for place, measure in places.items():
                yield Progress(step / steps, f"{kernel}, {place}")
                step += 1
                times.by_place.setdefault(place, []).extend(measure(kernel, units))
        for place, values in times.by_place.items():
            yield Result(f"{kernel}, {place}", min(values), "ns/unit", median=median(values))
        slower, faster = times.ratio("bt", "native"), times.ratio("QEMU", "bt")
        if slower is not None:
            ratios["native"].append(slower)
            if kernel != STRINGS:
                without_strings.append(slower)
            yield Result(f"{kernel}, bt's time / native", slower, "x")
        if faster is not None:
            ratios["QEMU"].append(faster)
            yield Result(f"{kernel}, QEMU's time / bt's", faster, "x")
    if ratios["native"]:
        mean = geometric_mean(ratios["native"])
        yield Result("geometric mean, bt's time / native", mean, "x", note=f"goal: at most {NATIVE_GOAL}")
    if ratios["QEMU"]:
        yield Result(
            "geometric mean, QEMU's time / bt's",
            geometric_mean(ratios["QEMU"]),
            "x",
            note=f"goal: at least {QEMU_GOAL}",
        )
        yield Result("slowest kernel, QEMU's time / bt's", min(ratios["QEMU"]), "x", note="goal: at least 1")


def _calibrate(places: dict[str, Measure], kernel: str) -> int:
    """How many units last _UNIT_NS, natively if that can be had."""
    measure = places.get("native", places["bt"])
    return max(1, int(_UNIT_NS / min(measure(kernel, _CALIBRATION_UNITS))))


def _words(kernel: str, units: int) -> str:
    return " ".join([f"{kernel}={_WARM_UP_UNITS}", *[f"{kernel}={units}"] * _REPEATS])


def _guest_times(run: Callable[[Path, str], list[Line]], kernel: str, units: int) -> list[float]:
    """Nanoseconds a unit of each run but the first, which is the warm-up."""
    times = []
    for name, result, ns in list(pairs(run(images.path("bench"), f"paging {_words(kernel, units)}")))[1:]:
        if name != kernel or not result.text.startswith(f"{kernel} {units} "):
            raise BenchmarkError(f"the guest says {result.text!r} of {kernel}")
        times.append(ns / units)
    if len(times) != _REPEATS:
        raise BenchmarkError(f"the guest ran {kernel} {len(times)} times")
    return times


def _engine_times(kernel: str, units: int) -> list[float]:
    return _guest_times(partial(run_engine, "bt"), kernel, units)


def _qemu_times(kernel: str, units: int) -> list[float]:
    return _guest_times(run_qemu, kernel, units)


def _native_times(program: Path, kernel: str, units: int) -> list[float]:
    """The program's own times, of which the first is the warm-up's."""
    words = _words(kernel, units).split()
    done = subprocess.run([program, *words], capture_output=True, text=True, check=False)
    rows = [line.split() for line in done.stderr.splitlines()]
    if done.returncode != 0 or len(rows) != _REPEATS + 1:
        raise BenchmarkError(f"{program.name}: {done.stderr.strip() or done.returncode}")
    return [int(ns) / units for _, ns in rows[1:]]
