"""`bench translate`: how fast bt translates cold code, and how much larger what it emits is.

The code is what the guests that ship execute: the demo kernel with its shell, tasks and crashes, and the kernels of the
bench guest, each once, so that nearly every translation is the first one. Boot and execution are not in the time.
"""

from __future__ import annotations

from collections.abc import Iterator

from iced_x86 import Decoder

from guests import images
from machine.loaders.elf import parse
from tools.bench import Progress, Result, Step
from tools.bench_guests import median, run_engine

_ROUNDS = 5
_RUNS = (
    ("demo", "quiet run=help;ps;mem;regs;pgfault;div0;ud;gp;bp;stack;uptime;poweroff"),
    ("bench", "paging sieve crc32 fib matrix memory calls sort lz"),
)
_EXECUTABLE = 4  # SHF_EXECINSTR


def translate_speed() -> Iterator[Step]:
    """Run the guests several times, each time with an empty TC."""
    rates: list[float] = []
    unit_us: list[float] = []
    growth = 0.0
    insn_bytes = mean_instruction_bytes()
    for number in range(_ROUNDS):
        yield Progress(number / _ROUNDS, f"round {number + 1} of {_ROUNDS}")
        units, guest_bytes, host_bytes, seconds = 0, 0, 0, 0.0
        for name, command_line in _RUNS:
            counted: dict[str, int | float | str] = {}
            run_engine("bt", images.path(name), command_line, statistics=counted)
            units += int(counted["translation units"])
            guest_bytes += int(counted["guest bytes translated"])
            host_bytes += int(counted["host bytes emitted"])
            seconds += float(counted["seconds in translator"])
        rates.append(guest_bytes / insn_bytes / seconds)
        unit_us.append(seconds * 1e6 / units)
        growth = host_bytes / guest_bytes
    note = f"at {insn_bytes:.2f} bytes an instruction, as these guests have"
    yield Result("translation, guest instructions", max(rates), "1/s", median=median(rates), note=note)
    yield Result("translation, a TU", min(unit_us), "us", median=median(unit_us))
    yield Result("translation, host bytes for a guest byte", growth, "x")


def mean_instruction_bytes() -> float:
    """Length of an instruction in the code of the guests, read from its beginning to its end."""
    total_bytes = insns = 0
    for name, _ in _RUNS:
        data = images.path(name).read_bytes()
        for section in parse(data).sections:
            if section.flags & _EXECUTABLE:
                code = data[section.offset : section.offset + section.size_bytes]
                insns += sum(1 for _ in Decoder(32, code, ip=section.address))
                total_bytes += len(code)
    return total_bytes / insns
