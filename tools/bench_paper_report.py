"""The report of `bench paper`: Markdown and charts from a `Study`, with the paper's figures beside ours.

It must not measure anything; every number in it comes from the study, from the published figures, or from the model.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from tools.bench_paper import NANO_NAMES, NATIVE, PLACES, WORKLOAD_NAMES, Study
from tools.bench_paper_data import CORE2, NANO, WORKLOADS, Triple, exits_for, paper_overhead_cycles
from tools.bench_paper_run import Metered
from tools.chart import Series, log_bars, share_bars, short
from vmm.prices import PARTS, exits_cycles, software_cycles

REPORT = "README.md"
FINDINGS = "findings.md"  # written by people, and kept
_REASONS_SHOWN = 6
_RARE = 0.05  # of an operation: from the ends of a run, not from what it consists of
_TIE = 0.1
_CLOCKS = ("guest", "VMM", "emulation of hardware")
# What bt does instead of exits, by the names of its statistics.
_BT_COUNTERS = {
    "callouts": "callouts",
    "dispatch misses": "dispatch misses",
    "true faults": "true faults",
    "hidden faults": "hidden faults",
    "trace faults": "trace faults",
    "adaptations": "adaptations",
}
_CHOSEN = ("bt", "trap", "hybrid")
_WALKS = "nested page walks"
_REFERENCES = {
    "nested walk references": "two-dimensional",
    "nested walk references of guest tables alone": "native",
    "nested walk references with a page-walk cache": "with a page-walk cache",
}


def write_report(study: Study, directory: Path) -> Sequence[Path]:
    """Write the report and its charts into a directory, which is made if it is not there.

    Returns:
        The files.

    Raises:
        OSError: they cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    charts = dict(_charts(study))
    report = markdown(study, set(charts))
    if (directory / FINDINGS).exists():
        report += f"\n[What differs from the paper, and why]({FINDINGS})\n"
    texts = {**charts, REPORT: report}
    files = []
    for name, text in texts.items():
        files.append(directory / name)
        files[-1].write_text(text, encoding="utf-8")
    return files


def _charts(study: Study) -> Iterator[tuple[str, str]]:
    engines = [place for place in study.places if place != NATIVE]
    if not engines:
        return
    yield (
        "nano.svg",
        log_bars(
            "Nanobenchmarks here: time of an operation",
            "nanoseconds",
            list(NANO_NAMES.values()),
            [Series(PLACES[place], tuple(study.ns(place, name) for name in NANO_NAMES)) for place in engines],
        ),
    )
    yield (
        "nano-paper.svg",
        log_bars(
            "Nanobenchmarks in the paper: cycles of an operation, P4 672",
            "cycles",
            [row.name for row in NANO.values()],
            [
                Series("native", tuple(row.native for row in NANO.values())),
                Series("software VMM", tuple(row.bt for row in NANO.values())),
                Series("hardware VMM", tuple(row.vt for row in NANO.values())),
            ],
        ),
    )
    yield (
        "workloads.svg",
        log_bars(
            "Workloads here: time of an operation",
            "microseconds",
            list(WORKLOAD_NAMES),
            [
                Series(PLACES[place], tuple(_microseconds(study.ns(place, name)) for name in WORKLOAD_NAMES))
                for place in study.places
            ],
        ),
    )
    rows = [
        (f"{NANO_NAMES.get(name, name)}, {PLACES[place]}", (clocks.guest, clocks.vmm, clocks.hardware))
        for name, place, metered in _all(study)
        if (clocks := metered.clocks) is not None
    ]
    if rows:
        yield "clocks.svg", share_bars("Overhead by cause: where the time of a workload goes", _CLOCKS, rows)


def _all(study: Study, names: Iterable[str] = WORKLOAD_NAMES) -> Iterator[tuple[str, str, Metered]]:
    """Name, place and measurement, in the order of the report."""
    for name in names:
        for place in study.places:
            if name in study.metered[place]:
                yield name, place, study.metered[place][name]


def _microseconds(ns: float | None) -> float | None:
    return None if ns is None else ns / 1000


def markdown(study: Study, charts: Iterable[str]) -> str:
    """The report as Markdown, with links to those charts that there are."""
    charts = set(charts)
    sections = [
        _opening(study),
        _times(study, "Nanobenchmarks", "ns", NANO_NAMES, NANO),
        _picture("nano.svg", charts) + _picture("nano-paper.svg", charts),
        _times(study, "Workloads", "µs", {name: name for name in WORKLOAD_NAMES}, WORKLOADS),
        _picture("workloads.svg", charts),
        _core2(study),
        _clocks(study),
        _picture("clocks.svg", charts),
        _exits(study),
        _software(study),
        _walks(study),
        _model(study),
        _hybrid(study),
        _REPEATING,
    ]
    return "\n".join(section for section in sections if section)


def _picture(name: str, charts: set[str]) -> str:
    return f"![{name.removesuffix('.svg')}]({name})\n" if name in charts else ""


def _opening(study: Study) -> str:
    lines = [
        "# The paper's comparison, on this machine",
        "",
        "K. Adams and O. Agesen compared a software VMM (binary translation) with a hardware VMM (trap and emulate, by",
        "VT) in 2006. Here `bt` stands for the first, `trap` for the second. Written by `trapgate bench paper`.",
        "",
        f"Host: {host()}.",
        f"Each figure is the shortest of {study.rounds}, each of some {study.run_ns / 1e6:,.0f} ms of CPU time, warm.",
        "",
        "**What the times of `trap` mean.** Guest mode is emulated here, so its wall time is that of software: compare",
        "the exits, and the clocks apart; the model below prices exits as hardware did.",
        "",
    ]
    for place in study.places:
        lines += [f"- {PLACES[place]}: {fact}" for fact in study.facts(place)]
    for place, why in study.lacks.items():
        lines.append(f"- {PLACES[place]}: not available: {why}")
    return "\n".join(lines) + "\n"


def host() -> str:
    """This machine in a few words."""
    name = platform.machine()
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    for line in text.splitlines():
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
            break
    processors = text.count("processor\t")
    return (
        f"{name}, {processors or '?'} processors, Linux, {platform.python_implementation()} {platform.python_version()}"
    )


def _times(study: Study, title: str, unit: str, names: Mapping[str, str], published: Mapping[str, Triple]) -> str:
    """Times by place, the ratio, the paper's ratio, and whether both have the same winner."""
    places = [place for place in study.places if any(study.ns(place, name) is not None for name in names)]
    divisor = {"ns": 1, "µs": 1000}[unit]
    rows = []
    for name, shown in names.items():
        cells = [_cell(study.ns(place, name), divisor) for place in places]
        ratio, there = study.ratio(name), published.get(name)
        cells.append("" if ratio is None else f"{ratio:.3g}")
        cells.append(f"{there.bt_over_vt:.3g} ({there.name})" if there else "")
        cells.append("" if ratio is None or there is None else _same_winner(ratio, there.bt_over_vt))
        rows.append([shown, *cells])
    head = ["", *(f"{PLACES[place]}, {unit}" for place in places), "bt : trap", "paper, BT : VT", "same winner"]
    return f"## {title}\n\n{table(head, rows)}{_CR8_NOTE if 'mov_cr3' in names else ''}"


def _cell(ns: float | None, divisor: float) -> str:
    return "" if ns is None else short(ns / divisor)


def _same_winner(ours: float, theirs: float) -> str:
    """In words; two that are within a tenth of each other have no winner."""
    if any(abs(ratio - 1) < _TIE for ratio in (ours, theirs)):
        return "a tie in one"
    return "yes" if (ours < 1) == (theirs < 1) else "no"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown: text on the left in the first column, numbers on the right in the others."""
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _core2(study: Study) -> str:
    rows = []
    for name, row in CORE2.items():
        ratio = study.ratio(name)
        ours = "" if ratio is None else f"{ratio:.3g}"
        rows.append([row.name, f"{WORKLOADS[name].bt_over_vt:.3g}", f"{row.bt_over_vt:.3g}", ours])
    head = ["BT : VT, whole workloads", "P4 672", "Core 2", f"bt : trap of `{'`, `'.join(CORE2)}` here"]
    return table(head, rows)


def _clocks(study: Study) -> str:
    rows = []
    for name, place, metered in _all(study):
        clocks = metered.clocks
        cells = (
            ["not kept"] * 3
            if clocks is None
            else [short(ns / metered.count / 1000) for ns in (clocks.guest, clocks.vmm, clocks.hardware)]
        )
        if place != NATIVE:
            rows.append([f"{name}, {PLACES[place]}", *cells])
    return (
        "## Three clocks\n\n"
        "Microseconds of an operation: the guest's own instructions; the VMM (for `bt` translation, callouts and\n"
        "faults; for `trap` what it does about exits); and what only the emulation of a CPU with guest mode takes.\n"
        "For `trap` on KVM the VMM's clock has what was interpreted there.\n\n"
        + table(["", "guest", "VMM", "emulation of hardware"], rows)
    )


def _exits(study: Study) -> str:
    rows = []
    for name, place, metered in _all(study, (*NANO_NAMES, *WORKLOAD_NAMES)):
        if metered.counters.get("exits", 0) == 0:
            continue
        often = [item for item in grouped(metered.exits).items() if item[1] >= _RARE * metered.count]
        reasons = sorted(often, key=lambda item: -item[1])[:_REASONS_SHOWN]
        text = ", ".join(f"{reason} {short(count / metered.count)}" for reason, count in reasons)
        rows.append(
            [
                f"{NANO_NAMES.get(name, name)}, {PLACES[place]}",
                _count(metered.counters["exits"] / metered.count),
                text,
            ]
        )
    if not rows:
        return ""
    return (
        "## Exits of an operation\n\n"
        "The most frequent reasons first; fewer than one in twenty operations are not shown.\n\n"
        + table(["", "exits", "of these"], rows)
    )


def _count(value: float) -> str:
    """How often something happens in an operation."""
    return "0" if value == 0 else short(value) if value >= _RARE else f"< {_RARE}"


def grouped(exits: Mapping[str, float]) -> dict[str, float]:
    """Exits by reason, ports taken together."""
    groups: dict[str, float] = {}
    for reason, count in exits.items():
        word = reason.split(maxsplit=1)[0]
        name = "port I/O" if word in ("IN", "OUT") else reason
        groups[name] = groups.get(name, 0.0) + count
    return groups


def _software(study: Study) -> str:
    rows = [
        [NANO_NAMES.get(name, name), *(_count(metered.counters.get(key, 0) / metered.count) for key in _BT_COUNTERS)]
        for name, place, metered in _all(study, (*NANO_NAMES, *WORKLOAD_NAMES))
        if place == "bt"
    ]
    return "## What bt does instead, an operation\n\n" + table(["", *_BT_COUNTERS.values()], rows) if rows else ""


def _walks(study: Study) -> str:
    """What nested paging costs where no exit shows it: memory references of its page walks."""
    rows = []
    for name, _, metered in _all(study):
        walks = metered.counters.get(_WALKS, 0)
        if walks:
            references = (short(metered.counters.get(key, 0) / walks) for key in _REFERENCES)
            rows.append([name, short(walks / metered.count), *references])
    if not rows:
        return ""
    head = ["", "walks of an operation", *(f"references of a walk, {name}" for name in _REFERENCES.values())]
    return "## Page walks under nested paging\n\n" + table(head, rows)


def _model(study: Study) -> str:
    rows = []
    for name, place, metered in _all(study, (*NANO_NAMES, *WORKLOAD_NAMES)):
        if place not in ("trap", "trap nested") or metered.counters.get("exits", 0) < _RARE * metered.count:
            continue
        exits, reads, writes = (
            value / metered.count for value in (metered.counters["exits"], metered.reads, metered.writes)
        )
        paper = paper_overhead_cycles(name) if place == "trap" else None
        cells = [short(part.cycles(exits, reads, writes)) for part in PARTS]
        theirs = "" if paper is None else f"{short(paper)} (= {short(exits_for(paper))} exits)"
        rows.append([f"{NANO_NAMES.get(name, name)}, {PLACES[place]}", short(exits), *cells, theirs])
    if not rows:
        return ""
    sources = "; ".join(
        sorted({f"{part.source}: {', '.join(p.name for p in PARTS if p.source == part.source)}" for part in PARTS})
    )
    return (
        "## Model: what these exits would cost on hardware\n\n"
        "**A model, not a measurement**: the exits counted above times the published cycles of world switches, and\n"
        "for P4 672 and Core 2 the accesses of the VMCB counted here times theirs. It leaves out what the VMM\n"
        "computes and what caches lose. The last column is what the hardware VMM added in the paper on a P4 672, and\n"
        "how many typical exits (with ten reads of the VMCB) that would be.\n"
        f"Cycles an operation; sources: {sources}.\n\n"
        + table(["", "exits", *(part.name for part in PARTS), "paper, VT - native"], rows)
    )


def _hybrid(study: Study) -> str:
    """What hybrid chooses by: the overhead of each engine in one currency."""
    rows = [
        [NANO_NAMES.get(name, name), *(_overhead(study.metered.get(place, {}).get(name), place) for place in _CHOSEN)]
        for name in (*NANO_NAMES, *WORKLOAD_NAMES)
    ]
    parts = study.in_turns.get("hybrid", ())
    if parts:
        rows.append(["phases in turns", *(_overhead_of_all(study.in_turns.get(place, ()), place) for place in _CHOSEN)])
    if not any(row[-1] for row in rows):
        return ""
    switches = sum(part.counters.get("switches", 0) for part in parts)
    return (
        "## Hybrid: the overhead that it chooses by\n\n"
        f"**A model, not a measurement**: cycles of a {PARTS[0].name} for an operation, beside executing the guest's\n"
        "own instructions. For `bt` callouts, faults and translation at what the paper's software VMM took, for\n"
        "`trap` exits at what they took, with ten reads of the VMCB each; a switch of engines costs as much as an\n"
        "exit. Trials of the engine that is not chosen are in the figures of `hybrid`: the shorter the run, the more\n"
        "they weigh. The last row is code that changes before each execution, then ports, and so on in turns, from\n"
        f"the start: {len(parts)} parts, in which hybrid changed engines {switches:.0f} times.\n\n"
        + table(["", *(f"{PLACES[place]}, cycles" for place in _CHOSEN)], rows)
    )


def _overhead(metered: Metered | None, place: str) -> str:
    return "" if metered is None else _count(_cycles(metered, place) / metered.count)


def _overhead_of_all(parts: Sequence[Metered], place: str) -> str:
    count = sum(part.count for part in parts)
    return _count(sum(_cycles(part, place) for part in parts) / count) if count else ""


def _cycles(metered: Metered, place: str) -> float:
    """What was counted, at its price."""
    if place == "hybrid":
        return sum(rise for name, rise in metered.counters.items() if name.startswith("estimated cycles"))
    if place == "bt":
        return sum(software_cycles(metered.counters).values())
    return sum(exits_cycles(metered.exits, PARTS[0]).values())


_CR8_NOTE = (
    "\nThe paper's `cr8wr` needs no exit under VT, as MOV to CR3 does; shadow paging cannot do without that one.\n"
)
_REPEATING = """## How to repeat it

`trapgate bench paper --out DIRECTORY` on an idle machine; `--scale 10` measures ten times as long, `--scale 0.1`
a tenth. The guests are `nano` and `fork` (guests/README.md). An engine that gets other results than the first one has
no figures.
"""
