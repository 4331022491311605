"""`trapgate bench`: runs benchmarks from the registry in tools/bench.py, with a progress bar.

It knows how results are shown and written; what is measured is the registry's business.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path

from gdbstub.cli_options import USAGE_STATUS
from gdbstub.cli_progress import clear_bar, show_bar
from tools.bench import BENCHMARKS, REPORTS, Benchmark, BenchmarkError, Notice, Progress, ReportOptions, Result


def run(options: argparse.Namespace) -> int:
    """Carry out `trapgate bench`; status 1 if a benchmark could not be run, 2 for an unknown name."""
    if options.list:
        for name, benchmark in (*BENCHMARKS.items(), *REPORTS.items()):
            sys.stdout.write(f"{name:16} {(benchmark.__doc__ or '').strip().splitlines()[0]}\n")
        return 0
    wishes = ReportOptions(Path(options.out), options.scale)
    known: dict[str, Benchmark] = {
        **BENCHMARKS,
        **{name: partial(report, wishes) for name, report in REPORTS.items()},
    }
    unknown = [name for name in options.names if name not in known]
    if unknown:
        sys.stderr.write(f"trapgate: there is no benchmark {unknown[0]}; there are: {', '.join(known)}\n")
        return USAGE_STATUS
    results: list[Result] = []
    failed = False
    for name in options.names or BENCHMARKS:
        try:
            for step in known[name]():
                if isinstance(step, Progress):
                    show_bar(name, step.fraction, step.what)
                    continue
                clear_bar()
                if isinstance(step, Notice):
                    sys.stderr.write(f"trapgate: {name}: {step.text}\n")
                    continue
                results.append(step)
                sys.stdout.write(_line(step))
                sys.stdout.flush()
        except (BenchmarkError, OSError) as error:
            failed = True
            clear_bar()
            sys.stderr.write(f"trapgate: {name}: {error}\n")
    if options.json:
        rows = [_row(result) for result in results]
        try:
            Path(options.json).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            sys.stderr.write(f"trapgate: cannot write {options.json}: {error.strerror}\n")
            return USAGE_STATUS
    return 1 if failed else 0


def _line(result: Result) -> str:
    middle = "" if result.median is None else f"  (median {result.median:,.6g})"
    note = f"  ({result.note})" if result.note else ""
    return f"{result.name:44} {result.value:>14,.6g} {result.unit}{middle}{note}\n"


def _row(result: Result) -> dict[str, str | float]:
    row: dict[str, str | float] = {"name": result.name, "value": result.value, "unit": result.unit}
    if result.median is not None:
        row["median"] = result.median
    if result.note:
        row["note"] = result.note
    return row
