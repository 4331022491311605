"""Runs a multiboot guest under one of our engines or under QEMU, and notes when each line of its COM1 came.

What a guest does between two lines is timed from outside, so that neither start-up nor the guest's own clock is in it.
It must not know what is measured.

QEMU's lines come through a pipe: on a busy host we may see the first one late, never early, which makes QEMU look
faster, so what is between should last many milliseconds.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from time import perf_counter_ns

from machine.cpuid import PENTIUM4
from machine.debug import STINT_SLACK_INSNS, StopKind
from machine.devices.board import BoardOptions
from machine.loaders.image import LoadOptions
from machine.pc import EngineFactory, Machine, MachineOptions
from tools.bench import BenchmarkError
from vmm.bt import BinaryTranslator
from vmm.hostalu import choose_alu
from vmm.interp import Interpreter
from vmm.native.hostfpu import HostFpu

QEMU = "qemu-system-i386"
ENGINES: dict[str, EngineFactory] = {
    "bt": lambda machine: BinaryTranslator(machine.cpu, machine.debug),
    "interp": lambda machine: Interpreter(machine.cpu, machine.debug),
}
_RAM_BYTES = 64 << 20
_STINT_INSNS = 20_000_000  # the most that the server gives a guest at once: some milliseconds
_QEMU_WORDS = (
    *("-accel", "tcg", "-nodefaults", "-no-user-config", "-vga", "std", "-display", "none", "-no-reboot"),
    *("-serial", "stdio", "-device", "isa-debug-exit,iobase=0xf4,iosize=1", "-m", "64"),
)


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the guest's output, without its end, and when its first and its last byte came."""

    text: str
    begun_ns: int
    ended_ns: int


@dataclass(slots=True)
class LineClock:
    """Cuts a stream of bytes into lines as they come."""

    lines: list[Line] = field(default_factory=list)
    _text: bytearray = field(default_factory=bytearray)
    _begun_ns: int = 0

    def take(self, data: bytes) -> None:
        """Some bytes came just now."""
        now_ns = perf_counter_ns()
        for byte in data:
            if not self._text:
                self._begun_ns = now_ns
            if byte == 0x0A:
                text = self._text.decode("latin-1").rstrip("\r")
                self.lines.append(Line(text, self._begun_ns, now_ns))
                self._text.clear()
            else:
                self._text.append(byte)


def machine_options(image: Path, command_line: str = "", take: Callable[[bytes], None] | None = None) -> MachineOptions:
    """What every measured guest runs on: a Pentium 4 with 64 MiB, whose output on COM1 goes to `take`."""
    return MachineOptions(
        image=image,
        model=PENTIUM4,
        make_fpu=HostFpu,
        loading=LoadOptions(ram_bytes=_RAM_BYTES, command_line=command_line),
        board=BoardOptions(serial=(take, None)),
    )


def run_engine(
    engine: str, image: Path, command_line: str, *, statistics: dict[str, int | float | str] | None = None
) -> list[Line]:
    """Run an image to its end in this process, under one of ENGINES.

    Raises:
        BenchmarkError: it ended otherwise than by turning the machine off or by the debug exit.
    """
    clock = LineClock()
    options = machine_options(image, command_line, clock.take)
    machine = Machine(options, ENGINES, engine, choose_alu())
    machine.debug.slack_insns = STINT_SLACK_INSNS
    try:
        kind = StopKind.BUDGET
        while kind is StopKind.BUDGET:
            kind = machine.engine.run(machine.clock.icount + _STINT_INSNS).kind
        if statistics is not None:
            statistics.update(machine.statistics())
    finally:
        machine.close()
    if kind is not StopKind.EXIT:
        raise BenchmarkError(f"{image.name} under {engine} ended with {kind.name}: {_last(clock.lines)}")
    return clock.lines


def has_qemu() -> bool:
    """Whether there is a QEMU to compare with."""
    return shutil.which(QEMU) is not None


def run_qemu(image: Path, command_line: str, timeout_s: float = 120.0) -> list[Line]:
    """Run an image to its end under QEMU's TCG, in real time, without -icount, as a user would.

    Raises:
        BenchmarkError: QEMU says that something is wrong, or takes too long.
    """
    command = [QEMU, *_QEMU_WORDS, "-kernel", str(image), "-append", command_line]
    clock = LineClock()
    end_ns = perf_counter_ns() + int(timeout_s * 1e9)
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            while data := os.read(process.stdout.fileno(), 4096):
                clock.take(data)
                if perf_counter_ns() > end_ns:
                    raise BenchmarkError(f"{image.name} under QEMU takes more than {timeout_s:.0f} s")
            process.wait()
            if process.returncode < 0 or (process.returncode == 1 and not clock.lines):
                assert process.stderr is not None
                message = process.stderr.read().decode(errors="replace").strip()
                raise BenchmarkError(f"QEMU: {message or process.returncode}")
        finally:
            process.kill()
    return clock.lines


def pairs(lines: Sequence[Line], start: str = "start ") -> Iterator[tuple[str, Line, int]]:
    """What came after each line `start NAME`: NAME, the next line, and the nanoseconds between the two."""
    for before, after in pairwise(lines):
        if before.text.startswith(start):
            yield before.text.removeprefix(start), after, after.begun_ns - before.ended_ns


def median(values: Iterable[float]) -> float:
    """The middle one, or the mean of the middle two."""
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def geometric_mean(values: Sequence[float]) -> float:
    """The n-th root of the product."""
    product = 1.0
    for value in values:
        product *= value ** (1 / len(values))
    return product


def _last(lines: Sequence[Line]) -> str:
    return lines[-1].text if lines else "no output"
