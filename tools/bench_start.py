"""`bench start`: how long a user waits from `trapgate run` to the guest's first instructions, and for which imports.

The guest writes to COM1 within its first hundred instructions; the figure ends when that arrives. Byte code is cached,
as it is after the first run of an installed package.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from time import perf_counter

from guests import images
from tools.bench import BenchmarkError, Progress, Result, Step
from tools.bench_guests import median

GOAL_S = 0.4
_RUNS = 9
_IMPORTS_SHOWN = 8


def start() -> Iterator[Step]:
    """Measure the whole, the interpreter alone, and the imports by package."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
        environment["PYTHONPYCACHEPREFIX"] = cache
        run = ["-m", "gdbstub.cli", "run", str(images.path("tiny-loop")), "--gdb", "none"]
        rows = {
            "to the first output of a guest, bt": [*run, "--vmm", "bt"],
            "to the first output of a guest, interp": [*run, "--vmm", "interp"],
            "Python alone": ["-c", "print(1, flush=True)"],
        }
        for number, (name, words) in enumerate(rows.items()):
            yield Progress(number / 4, name)
            _first_byte(words, environment)  # fills the cache
            times = [_first_byte(words, environment) for _ in range(_RUNS)]
            wall, processor = ([time[part] for time in times] for part in (0, 1))
            note = f"goal: less than {GOAL_S}" if name != "Python alone" else ""
            yield Result(f"start {name}", min(wall), "s", median=median(wall), note=note)
            yield Result(f"start {name}, processor time", min(processor), "s", median=median(processor))
        yield Progress(3 / 4, "imports")
        for name, microseconds in import_times(environment)[:_IMPORTS_SHOWN]:
            yield Result(f"imports of {name}", microseconds / 1e6, "s", note="under -X importtime, which slows them")


def _first_byte(words: Sequence[str], environment: dict[str, str]) -> tuple[float, float]:
    """Seconds from the start of a Python to its first byte of output, and processor seconds of it until then."""
    begun = perf_counter()
    process = subprocess.Popen(
        [sys.executable, *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
    )
    with process:
        assert process.stdout is not None
        first = os.read(process.stdout.fileno(), 1)
        elapsed = perf_counter() - begun
        os.kill(process.pid, signal.SIGKILL)  # `Popen.kill` would reap one that has ended, and its times be lost
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if not first:
        raise BenchmarkError(f"no output of {' '.join(words)}")
    return elapsed, usage.ru_utime + usage.ru_stime


def import_times(environment: dict[str, str]) -> list[tuple[str, int]]:
    """Microseconds in the modules that `trapgate run` imports, by top-level package, most first."""
    command = [sys.executable, "-X", "importtime", "-c", "import gdbstub.cli_run, vmm.bt"]
    text = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stderr
    totals: dict[str, int] = {}
    for line in text.splitlines():
        _, _, row = line.partition("import time:")
        own, _, rest = row.partition("|")
        name = rest.partition("|")[2].strip().partition(".")[0]
        if own.strip().isdecimal():
            totals[name] = totals.get(name, 0) + int(own)
    return sorted(totals.items(), key=lambda item: -item[1])
