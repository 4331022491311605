"""`bench nano`: what one operation of a monitor's concern takes, under bt and beside it under QEMU's TCG.

The guest is guests/nano. A figure is the time from the line before many operations to the line after them, warm, less
that of as many rounds of an empty loop, shared out: what a loop costs is not in it, and the work around the operation
that makes it possible (a PTE made not present again, a PUSHF for a POPF) is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from guests import images
from tools.bench import BenchmarkError, Notice, Progress, Result, Step
from tools.bench_guests import QEMU, Line, has_qemu, median, pairs, run_engine, run_qemu

OPERATIONS: dict[str, str] = {
    "syscall_int": "system call from ring 3 by INT 80h, and IRET",
    "syscall_sysenter": "system call from ring 3 by SYSENTER, and SYSEXIT",
    "in": "IN",
    "out": "OUT",
    "mov_cr3": "MOV to CR3",
    "mov_from_cr0": "MOV from CR0",
    "call_ret": "CALL and RET",
    "call_1_target": "indirect call, one target",
    "call_256_targets": "indirect call, 256 targets at random",
    "call_256_sites": "CALL from 256 sites at random, and RET",
    "page_fault": "true page fault, handled by the guest",
    "divide_error": "divide error, handled by the guest",
    "pte": "write to a PTE",
    "pte_invlpg": "write to a PTE, INVLPG, read through it",
    "pushf_popf": "PUSHF and POPF",
    "cli_sti": "CLI and STI",
    "mov_ds": "load of DS",
    "mov_fs": "load of FS",
    "rdtsc": "RDTSC",
    "cpuid": "CPUID",
    "iret": "IRET within ring 0",
    "patched_code": "store to an instruction, and its execution",
    "process_switch": "switch to another process (stack, CR3)",
    "process_switch_40": "switch among 40 processes (CR3), and 8 calls in the kernel",
    "new_process": "new page directory, the same switch and calls, and back",
    "vga_store": "store to VGA memory",
}
_EMPTY_LOOPS = {"syscall_int": "user_empty", "syscall_sysenter": "user_empty"}  # of the others: `empty`
NAMES = ("empty", "user_empty", *OPERATIONS)
_ROUNDS = 3
_RUN_NS = 20_000_000
_WARM_UP = 200
_WARM_UPS = {"call_256_targets": 4000, "call_256_sites": 4000, "process_switch_40": 400}  # until each has come
_SET_UP = 100  # rounds that are done once more, to know how long it takes to begin
_CALIBRATION = 1000
_LEAST, _MOST = 500, 10_000_000
_FLOOR_NS = 0.01  # less than that cannot be told from an empty loop

Run = Callable[[Path, str], list[Line]]


def nano() -> Iterator[Step]:
    """Measure all operations."""
    places: dict[str, Run] = {"bt": partial(run_engine, "bt")}
    if has_qemu():
        places["QEMU"] = run_qemu
    else:
        yield Notice(f"no times of QEMU: {QEMU} is not installed")
    counts: dict[str, dict[str, int]] = {}
    for place, run in places.items():
        yield Progress(0, f"calibration, {place}")
        counts[place] = _calibrate(run)
    times: dict[str, dict[str, list[float]]] = {place: {} for place in places}
    for number in range(_ROUNDS):
        for index, (place, run) in enumerate(places.items()):
            yield Progress((number + index / len(places)) / _ROUNDS, f"round {number + 1} of {_ROUNDS}, {place}")
            for name, ns in _measure(run, counts[place]).items():
                times[place].setdefault(name, []).append(ns)
    slower = []
    for name, what in OPERATIONS.items():
        for place in places:
            yield _result(what, place, name, times[place])
        if "QEMU" in places:
            ratio = _best(name, times["bt"]) / _best(name, times["QEMU"])
            yield Result(f"{what}: bt's time / QEMU's", ratio, "x")
            if ratio > 1:
                slower.append(name)
    if "QEMU" in places:
        yield Result("operations slower than in QEMU", len(slower), f"of {len(OPERATIONS)}", note=" ".join(slower))


def _result(what: str, place: str, name: str, times: Mapping[str, list[float]]) -> Result:
    best = _best(name, times)
    return Result(f"{what}: {place}", best, "ns", median=best + median(times[name]) - min(times[name]))


def _best(name: str, times: Mapping[str, list[float]]) -> float:
    """Nanoseconds an operation, without the loop."""
    return max(_FLOOR_NS, min(times[name]) - min(times[_EMPTY_LOOPS.get(name, "empty")]))


def _calibrate(run: Run) -> dict[str, int]:
    """How often each is to be done, so that it takes _RUN_NS."""
    times = _measure(run, dict.fromkeys(NAMES, _CALIBRATION))
    return {name: min(_MOST, max(_LEAST, int(_RUN_NS / max(ns, _FLOOR_NS)))) for name, ns in times.items()}


def _measure(run: Run, counts: Mapping[str, int]) -> dict[str, float]:
    """One boot: nanoseconds a round for each, after a warm-up; what is set up before the rounds is taken off."""
    words = " ".join(
        f"{name}={_WARM_UPS.get(name, _WARM_UP)} {name}={_SET_UP} {name}={_SET_UP + count}"
        for name, count in counts.items()
    )
    times: dict[str, float] = {}
    before_ns = 0.0
    for name, result, ns in pairs(run(images.path("nano"), words)):
        if not result.text.startswith(f"{name} "):
            raise BenchmarkError(f"the guest says {result.text!r} of {name}")
        times[name] = (ns - before_ns) / counts[name]  # the last one stays
        before_ns = ns
    if list(times) != list(counts):
        raise BenchmarkError(f"the guest ran {', '.join(times)} only")
    return times
