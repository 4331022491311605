"""The benchmarks by name: each yields progress and results, and measures what a user would wait for.

How they are shown is the command line's business; what is compared is run in the same session on the same host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from guests import images
from machine.cpuid import PENTIUM4
from machine.debug import StopKind
from machine.loaders.image import LoadOptions
from machine.pc import Machine, MachineOptions
from vmm.interp import Interpreter
from vmm.native.hostfpu import HostFpu

KERNELS = ("sieve", "crc32", "fib", "matrix", "memory", "calls", "sort", "lz", "nbody", "mandelbrot")
_WARM_UP_INSNS = 300_000
_MEASURED_INSNS = 2_000_000
_SLICE_INSNS = 100_000


class BenchmarkError(Exception):
    """A benchmark cannot be run here; the text says why."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a benchmark is, from 0 to 1, and what it does now."""

    fraction: float
    what: str


@dataclass(frozen=True, slots=True)
class Notice:
    """What the user should know before the figures: something is missing, and the rest is measured."""

    text: str


@dataclass(frozen=True, slots=True)
class Result:
    """One figure; where it is the best of several, their median; and what is to be known of it, such as its goal."""

    name: str
    value: float
    unit: str
    median: float | None = None
    note: str = ""


Step = Progress | Result | Notice
Benchmark = Callable[[], Iterator[Step]]


@dataclass(frozen=True, slots=True)
class ReportOptions:
    """What a user may say about a report: the directory it goes to, and how many times as long as usual to measure."""

    directory: Path
    scale: float = 1.0


Report = Callable[[ReportOptions], Iterator[Step]]


def interp_speed() -> Iterator[Step]:
    """Thousand guest instructions a second of the reference engine, on each compute kernel and on the demo kernel."""
    rates = []
    for number, kernel in enumerate(KERNELS):
        yield Progress(number / (len(KERNELS) + 1), kernel)
        rate = measure_rate("bench", f"{kernel}=1000000")
        rates.append(rate)
        yield Result(f"interp {kernel}", rate / 1000, "k insn/s")
    yield Progress(len(KERNELS) / (len(KERNELS) + 1), "demo kernel")
    yield Result("interp demo kernel", measure_rate("demo", "quiet") / 1000, "k insn/s")
    mean = 1.0
    for rate in rates:
        mean *= rate ** (1 / len(rates))
    yield Result("interp, geometric mean of the kernels", mean / 1000, "k insn/s")


def measure_rate(image: str, command_line: str) -> float:
    """Instructions a second of a run that does not end before some millions."""
    options = MachineOptions(
        image=images.path(image), model=PENTIUM4, make_fpu=HostFpu, loading=LoadOptions(command_line=command_line)
    )
    machine = Machine(options, {"interp": lambda pc: Interpreter(pc.cpu, pc.debug)}, "interp")
    try:
        _run(machine, _WARM_UP_INSNS)
        begun_s, begun_insns = perf_counter(), machine.clock.icount
        _run(machine, begun_insns + _MEASURED_INSNS)
        return (machine.clock.icount - begun_insns) / (perf_counter() - begun_s)
    finally:
        machine.close()


def _run(machine: Machine, until_icount: int) -> None:
    while machine.clock.icount < until_icount:
        stop = machine.engine.run(min(until_icount, machine.clock.icount + _SLICE_INSNS))
        if stop.kind is not StopKind.BUDGET:
            raise BenchmarkError(f"the guest stopped after {machine.clock.icount} instructions: {stop.kind.name}")


def _compute() -> Iterator[Step]:
    """Compute kernels under bt, beside QEMU's TCG and beside the same object code run natively."""
    from tools.bench_compute import compute

    yield from compute()


def _nano() -> Iterator[Step]:
    """Single operations (system calls, exceptions, paging, patched code) under bt, beside QEMU's TCG."""
    from tools.bench_nano import nano

    yield from nano()


def _translate() -> Iterator[Step]:
    """Guest instructions that bt translates a second, microseconds a TU, and how much larger the code becomes."""
    from tools.bench_translate import translate_speed

    yield from translate_speed()


def _start() -> Iterator[Step]:
    """Seconds from `trapgate run` to the guest's first output, and the imports that they are spent on."""
    from tools.bench_start import start

    yield from start()


def _server_speed() -> Iterator[Step]:
    """Steps, breakpoint stops and MB of memory a second through the server, beside QEMU's gdbstub in the same run."""
    from tools.bench_server import server_speed

    yield from server_speed()


BENCHMARKS: dict[str, Benchmark] = {
    "interp": interp_speed,
    "compute": _compute,
    "nano": _nano,
    "translate": _translate,
    "start": _start,
    "server": _server_speed,
}


def _paper(options: ReportOptions) -> Iterator[Step]:
    """The experiment of Adams and Agesen, bt against trap beside their figures; writes a report with charts (--out)."""
    from tools.bench_paper import paper

    yield from paper(options)


# These write files, so they run only when they are named.
REPORTS: dict[str, Report] = {"paper": _paper}
