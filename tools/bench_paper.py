"""`bench paper`: the experiment of Adams and Agesen on this host, with our engines in the roles of their monitors.

It measures and hands a `Study` to `tools.bench_paper_report`, which writes the report; the paper's figures and the
model are in `tools.bench_paper_data`. A figure is the CPU time from the line before many operations to the line
after them, on a guest that has done them before; of several rounds, the shortest.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gdbstub.cli_engine import make_factories
from guests import build, images
from machine.engine import EngineError
from tools.bench import BenchmarkError, Notice, Progress, ReportOptions, Result, Step
from tools.bench_paper_data import NANO, WORKLOADS
from tools.bench_paper_run import Factories, Metered, run, why_not

NATIVE = "native"
# In the order of the report: engines by the names that a user types, and what the report calls them.
PLACES: dict[str, str] = {
    NATIVE: "native",
    "bt": "bt",
    "trap": "trap, shadow",
    "trap nested": "trap, nested",
    "hybrid": "hybrid",
    "trap kvm": "trap, KVM",
    "interp": "interp",
}
NANO_NAMES: dict[str, str] = {
    "syscall_int": "syscall",
    "syscall_sysenter": "sysenter",
    "in": "in",
    "mov_cr3": "mov cr3",
    "call_ret": "call/ret",
    "page_fault": "pgfault",
    "divide_error": "divzero",
    "pte": "pte write",
    "pte_invlpg": "pte+invlpg",
    "process_switch": "switch",
}
WORKLOAD_NAMES = ("forkwait", "compute", "syscalls", "ptchurn", "io", "mix")
_EMPTY = {"syscall_int": "user_empty", "syscall_sysenter": "user_empty"}  # the loop around it; of the others: `empty`
_FLOOR_NS = 0.01  # less than that cannot be told from an empty loop
_RUN_NS = 300_000_000
_ROUNDS = 3
_PASSES = 4  # of the calibration
_GROWTH = 40  # from one pass to the next: what a few operations take says little of many
_SURE = 2  # when the last pass was within this of the time that was asked for
_FACTS = ("kvm",)
# What a choice of engines is for: code that changes before each execution, then ports, in turns; at scale 1.
_IN_TURNS = {"patched_code": 40_000, "in": 20_000}
_TURNS = 3
_MOST = {"forkwait": 40_000}
_MOST_OTHERS = 20_000_000
_FIRST_COUNTS = {
    "nano": dict.fromkeys(("empty", "user_empty", *NANO_NAMES), 200),
    "fork": {"forkwait": 20, "compute": 10, "syscalls": 200, "ptchurn": 50, "io": 50, "mix": 5},
}


@dataclass(slots=True)
class Study:
    """What was measured.

    Attributes:
        metered: by place and name, the shortest of all rounds.
        lacks: why a place has no figures.
        in_turns: by place, the parts of a guest of which one suits trap, the other bt, in turns.
        rounds, run_ns: how often and how long each was measured.
    """

    metered: dict[str, dict[str, Metered]] = field(default_factory=dict)
    lacks: dict[str, str] = field(default_factory=dict)
    in_turns: dict[str, Sequence[Metered]] = field(default_factory=dict)
    rounds: int = _ROUNDS
    run_ns: float = _RUN_NS

    @property
    def places(self) -> list[str]:
        """Those with figures, in the order of the report."""
        return [place for place in PLACES if self.metered.get(place)]

    def add(self, place: str, metered: Metered) -> None:
        """One more round."""
        known = self.metered.setdefault(place, {})
        if metered.name not in known or metered.ns < known[metered.name].ns:
            known[metered.name] = metered

    def drop(self, place: str, why: str) -> None:
        """This place has no figures."""
        self.metered.pop(place, None)
        self.lacks[place] = why

    def ns(self, place: str, name: str) -> float | None:
        """Nanoseconds an operation, without the loop around it; None if it was not measured."""
        known = self.metered.get(place, {})
        if name not in known:
            return None
        loop = known.get(_EMPTY.get(name, "empty")) if name in NANO_NAMES else None
        return max(_FLOOR_NS, known[name].ns - (loop.ns if loop else 0.0))

    def facts(self, place: str) -> list[str]:
        """What an engine says of this host."""
        texts = {
            text for metered in self.metered[place].values() for key, text in metered.facts.items() if key in _FACTS
        }
        return sorted(texts)

    def ratio(self, name: str, over: str = "bt", under: str = "trap") -> float | None:
        """How many times as long it took at `over` as at `under`."""
        longer, shorter = self.ns(over, name), self.ns(under, name)
        return None if longer is None or shorter is None else longer / shorter


def paper(options: ReportOptions) -> Iterator[Step]:
    """Measure bt and trap on nanobenchmarks and workloads, and write the report with its charts."""
    from tools.bench_paper_report import write_report

    factories = make_factories(verify=False)
    study = Study(run_ns=_RUN_NS * options.scale)
    for place in (place for place in PLACES if place != NATIVE):
        lack = why_not(factories, place)
        if lack is not None:
            study.drop(place, lack)
            yield Notice(f"{PLACES[place]} is not available: {lack}")
    yield from _measure_engines(factories, study)
    yield from _measure_in_turns(factories, study)
    yield from _measure_native(study)
    yield from _results(study)
    files = write_report(study, options.directory)
    yield Notice(f"wrote {', '.join(file.name for file in files)} in {options.directory}")


def _measure_engines(factories: Factories, study: Study) -> Iterator[Step]:
    engines = [place for place in PLACES if place != NATIVE and place not in study.lacks]
    steps, step = len(engines) * len(_FIRST_COUNTS) * (study.rounds + 1), 0
    results: dict[tuple[str, int], str] = {}
    for guest in _FIRST_COUNTS:
        counts: dict[str, Mapping[str, int]] = {}
        for number in range(study.rounds + 1):
            for place in engines:
                what = f"round {number} of {study.rounds}" if number else "calibration"
                yield Progress(step / steps, f"{guest}, {what}, {PLACES[place]}")
                step += 1
                if place in study.lacks:
                    continue
                try:
                    if number:
                        _measure(factories, study, place, guest, counts[place])
                    else:
                        counts[place] = _calibrate(factories, study, place, guest, results)
                except (BenchmarkError, EngineError) as error:
                    study.drop(place, str(error))
                    yield Notice(f"no figures of {PLACES[place]}: {error}")


def _measure_in_turns(factories: Factories, study: Study) -> Iterator[Step]:
    scale = study.run_ns / _RUN_NS
    words = " ".join(f"{name}={max(100, int(count * scale))}" for name, count in _IN_TURNS.items())
    for place in ("bt", "trap", "hybrid"):
        if place in study.lacks:
            continue
        yield Progress(1.0, f"nano, phases in turns, {PLACES[place]}")
        try:
            study.in_turns[place] = run(factories, place, images.path("nano"), " ".join([words] * _TURNS))
        except (BenchmarkError, EngineError) as error:
            yield Notice(f"no phases in turns under {PLACES[place]}: {error}")


def _calibrate(
    factories: Factories,
    study: Study,
    place: str,
    guest: str,
    results: dict[tuple[str, int], str],
) -> Mapping[str, int]:
    """How often each is to be done to last as long as was asked for; every engine has to get the same results."""
    first_counts = _FIRST_COUNTS[guest]
    counts = dict(first_counts)
    unsure = dict(first_counts)
    for number in range(_PASSES):
        runs = _run_warm(factories, place, guest, {name: counts[name] for name in unsure})
        if [metered.name for metered in runs] != list(unsure):
            raise BenchmarkError(f"the guest ran {', '.join(metered.name for metered in runs)} only")
        for metered in runs:
            name = metered.name
            if number == 0:
                expected = results.setdefault((name, metered.count), metered.result)
                if metered.result != expected:
                    raise BenchmarkError(f"{name} {metered.count} gives {metered.result}, elsewhere {expected}")
            factor = study.run_ns / max(metered.elapsed_ns, 1)
            wanted = int(metered.count * min(factor, _GROWTH))
            counts[name] = max(first_counts[name], min(_MOST.get(name, _MOST_OTHERS), wanted))
            if factor < _SURE:
                unsure.pop(name)
        if not unsure:
            break
    return counts


def _measure(factories: Factories, study: Study, place: str, guest: str, counts: Mapping[str, int]) -> None:
    for metered in _run_warm(factories, place, guest, counts):
        study.add(place, metered)


def _run_warm(factories: Factories, place: str, guest: str, counts: Mapping[str, int]) -> Sequence[Metered]:
    """One boot; of each workload what comes after a warm-up."""
    first_counts = _FIRST_COUNTS[guest]
    words = " ".join(f"{name}={first_counts[name]} {name}={count}" for name, count in counts.items())
    return run(factories, place, images.path(guest), words)[1::2]


def _measure_native(study: Study) -> Iterator[Step]:
    """The computation of the guest `fork` as a program of this host: the only workload that needs no kernel."""
    yield Progress(1.0, "native")
    count = max(metered["compute"].count for metered in study.metered.values()) if study.metered else 100
    with tempfile.TemporaryDirectory() as scratch:
        try:
            program = build.build_native_compute(Path(scratch))
        except build.BuildError as error:
            study.drop(NATIVE, str(error).splitlines()[0])
            yield Notice(f"no native times: {study.lacks[NATIVE]}")
            return
        words = [str(count)] * (study.rounds + 1)
        done = subprocess.run([program, *words], capture_output=True, text=True, check=True)
    for line, ns in list(zip(done.stdout.splitlines(), done.stderr.splitlines(), strict=True))[1:]:
        name, _, result = line.split()
        study.add(NATIVE, Metered(name, count, result, float(ns)))


def _results(study: Study) -> Iterator[Step]:
    for name in (*NANO_NAMES, *WORKLOAD_NAMES):
        what = NANO_NAMES.get(name, name)
        for place in study.places:
            ns = study.ns(place, name)
            if ns is not None:
                yield Result(f"{what}, {PLACES[place]}", ns, "ns")
        ratio = study.ratio(name)
        if ratio is not None:
            there = NANO.get(name) or WORKLOADS.get(name)
            note = f"paper: {there.bt_over_vt:.3g}" if there else ""
            yield Result(f"{what}, bt / trap with shadow paging", ratio, "x", note=note)
