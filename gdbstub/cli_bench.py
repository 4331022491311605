"""`trapgate bench`: runs benchmarks from the registry in tools/bench.py, with a progress bar.

It knows how results are shown and written; what is measured is the registry's business.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from gdbstub.cli_options import USAGE_STATUS
from tools.bench import BENCHMARKS, BenchmarkError, Progress, Result

_BAR_CELLS = 24


def run(options: argparse.Namespace) -> int:
    """Carry out `trapgate bench`; status 1 if a benchmark could not be run, 2 for an unknown name."""
    if options.list:
        for name, benchmark in BENCHMARKS.items():
            sys.stdout.write(f"{name:16} {(benchmark.__doc__ or '').strip().splitlines()[0]}\n")
        return 0
    unknown = [name for name in options.names if name not in BENCHMARKS]
    if unknown:
        sys.stderr.write(f"trapgate: there is no benchmark {unknown[0]}; there are: {', '.join(BENCHMARKS)}\n")
        return USAGE_STATUS
    results: list[Result] = []
    failed = False
    for name in options.names or BENCHMARKS:
        try:
            for step in BENCHMARKS[name]():
                if isinstance(step, Progress):
                    _show_bar(name, step)
                else:
                    results.append(step)
                    _clear_bar()
                    sys.stdout.write(f"{step.name:44} {step.value:>14,.6g} {step.unit}\n")
                    sys.stdout.flush()
        except (BenchmarkError, OSError) as error:
            failed = True
            _clear_bar()
            sys.stderr.write(f"trapgate: {name}: {error}\n")
    if options.json:
        rows = [{"name": r.name, "value": r.value, "unit": r.unit} for r in results]
        try:
            Path(options.json).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            sys.stderr.write(f"trapgate: cannot write {options.json}: {error.strerror}\n")
            return USAGE_STATUS
    return 1 if failed else 0


def _show_bar(name: str, progress: Progress) -> None:
    if not sys.stderr.isatty():
        return
    full = round(_BAR_CELLS * min(1.0, max(0.0, progress.fraction)))
    bar = "#" * full + "-" * (_BAR_CELLS - full)
    sys.stderr.write(f"\r\x1b[K{name} [{bar}] {progress.what}")
    sys.stderr.flush()


def _clear_bar() -> None:
    if sys.stderr.isatty():
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()
