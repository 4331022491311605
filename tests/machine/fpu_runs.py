"""Runs a batch of floating-point forms on our CPU, Unicorn or QEMU, and says where two of them differ."""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import unicorn
from unicorn import x86_const

from machine.cpu import Cpu
from machine.cpuid import PENTIUM4
from machine.debug import DebugControl, StopKind
from machine.lines import ExitKind, ExitRequest
from machine.memory import MIB
from machine.state import CR0_PE, CR4_OSFXSR, ESP, SEG_DB, SEG_G
from tests.machine.fpu_batch import (
    EAX_AT,
    EFLAGS_AT,
    MEMORY_MIB,
    OPERAND_AT,
    RESULTS,
    SCRATCH,
    SLOT_BYTES,
    STATES,
    State,
    program,
)
from tests.machine.fpu_forms import Form, forms
from tests.oracles import bochs, qemu
from tests.oracles.reference import build_cpu
from vmm.interp import Interpreter
from vmm.native.hostfpu import HostFpu

_STATUS = 0x8D5
_unicorn: Any = unicorn  # its own annotations are partial

AREAS = frozenset({"fxsave", "fxrstor", "fnsave", "frstor", "fldenv", "fnstenv", "ldmxcsr"})
"""Rows whose operand is no plain number: they are tested elsewhere."""


def plain_forms() -> list[Form]:
    """Every form but those of `AREAS`."""
    return [form for form in forms(SCRATCH) if form.row not in AREAS]


@dataclass(frozen=True, slots=True)
class Slot:
    """What an instruction left behind, or started from."""

    data: bytes

    def halfword(self, at: int) -> int:
        return int.from_bytes(self.data[at : at + 2], "little")

    @property
    def fcw(self) -> int:
        return self.halfword(0)

    @property
    def fsw(self) -> int:
        return self.halfword(2)

    @property
    def tags(self) -> int:
        return self.data[4]

    @property
    def mxcsr(self) -> int:
        return int.from_bytes(self.data[24:28], "little")

    def st(self, number: int) -> int:
        at = 32 + 16 * number
        return int.from_bytes(self.data[at : at + 10], "little")

    def xmm(self, number: int) -> int:
        at = 160 + 16 * number
        return int.from_bytes(self.data[at : at + 16], "little")

    @property
    def operand(self) -> bytes:
        return self.data[OPERAND_AT : OPERAND_AT + 16]

    @property
    def eax(self) -> int:
        return int.from_bytes(self.data[EAX_AT : EAX_AT + 4], "little")

    @property
    def eflags(self) -> int:
        return int.from_bytes(self.data[EFLAGS_AT : EFLAGS_AT + 4], "little") & _STATUS

    def __str__(self) -> str:
        registers = " ".join(f"{self.st(n):020x}" for n in range(8))
        xmm = " ".join(f"{self.xmm(n):032x}" for n in range(3))
        return (
            f"fcw {self.fcw:04x} fsw {self.fsw:04x} tags {self.tags:02x} mxcsr {self.mxcsr:04x} st {registers}\n"
            f"    xmm {xmm} operand {self.operand[::-1].hex()} eax {self.eax:08x} eflags {self.eflags:03x}"
        )


Read = Callable[[int, int], bytes]


def _slots(read: Read, count: int) -> list[Slot]:
    return _split(read(RESULTS, count * SLOT_BYTES), count)


def _split(data: bytes, count: int) -> list[Slot]:
    return [Slot(data[n * SLOT_BYTES : (n + 1) * SLOT_BYTES]) for n in range(count)]


def floating_cpu(memory_mib: int = MEMORY_MIB) -> Cpu:
    """Our CPU as the Pentium 4 model, with the host's FPU; its memory is to be closed by the caller."""
    cpu = build_cpu(memory_mib)
    cpu.model = PENTIUM4
    cpu.fpu = HostFpu(cpu.state.fpu)
    return cpu


class _Exit:
    def __init__(self, cpu: Cpu) -> None:
        self._lines = cpu.lines

    def load_port(self, _port: int, _size_bytes: int) -> int:
        return 0

    def store_port(self, _port: int, _size_bytes: int, value: int) -> None:
        self._lines.request_exit(ExitRequest(ExitKind.DEBUG_EXIT, value))


def run_ours(batch: Sequence[Form], states: Sequence[State]) -> list[Slot]:
    """Results by form, then by state."""
    cpu = floating_cpu()
    cpu.ports.register(qemu.EXIT_PORT, qemu.EXIT_PORT, _Exit(cpu))
    cpu.reset()
    state, memory = cpu.state, cpu.memory
    state.cr0 |= CR0_PE
    for number, segment in enumerate(state.segments):
        segment.load(8 if number == 1 else 16, 0, 0xFFFF_FFFF, (0x9B if number == 1 else 0x93) | SEG_DB | SEG_G)
    state.gpr[ESP], state.eip = qemu.ENTRY_ESP, qemu.PROTECTED_ENTRY
    memory.write(qemu.PROTECTED_ENTRY, program(batch, len(states)))
    memory.write(STATES, b"".join(item.pack() for item in states))
    engine = Interpreter(cpu, DebugControl())
    engine.enter()
    try:
        stop = engine.run(1 << 40)
        while stop.kind is StopKind.BUDGET:
            stop = engine.run(1 << 40)
        assert stop.kind is StopKind.EXIT, f"{stop} at {state.eip:#x}"
        return _slots(memory.read, len(batch) * len(states))
    finally:
        engine.leave()
        memory.close()


def run_qemu(batch: Sequence[Form], states: Sequence[State]) -> list[Slot]:
    """The same under QEMU's TCG; its memory is a file that outlives it."""
    with tempfile.TemporaryDirectory(prefix="trapgate-fpu-") as directory:
        file, initial = Path(directory, "ram"), Path(directory, "states")
        initial.write_bytes(b"".join(item.pack() for item in states))
        options = [
            "-object", f"memory-backend-file,id=ram,size={MEMORY_MIB}M,mem-path={file},share=on",
            "-machine", "memory-backend=ram", "-device", f"loader,force-raw=on,file={initial},addr={STATES:#x}",
        ]  # fmt: skip
        run = qemu.run(
            program(batch, len(states)),
            cpu="pentium3,sse2=on,clflush=on",
            memory_mib=MEMORY_MIB,
            timeout_s=120,
            options=options,
        )
        assert run.status == 0
        with file.open("rb") as ram:

            def read(at: int, count: int) -> bytes:
                ram.seek(at)
                return ram.read(count)

            return _slots(read, len(batch) * len(states))


def run_unicorn(batch: Sequence[Form], states: Sequence[State]) -> list[Slot]:
    """The same under Unicorn."""
    engine = _unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_32)
    engine.mem_map(0, MEMORY_MIB * MIB)
    code = program(batch, len(states), end=b"\xf4")
    engine.mem_write(qemu.PROTECTED_ENTRY, code)
    engine.mem_write(STATES, b"".join(item.pack() for item in states))
    engine.reg_write(x86_const.UC_X86_REG_ESP, qemu.ENTRY_ESP)
    engine.reg_write(x86_const.UC_X86_REG_CR4, CR4_OSFXSR)
    engine.emu_start(qemu.PROTECTED_ENTRY, qemu.PROTECTED_ENTRY + len(code) - 1)
    return _slots(lambda at, count: bytes(engine.mem_read(at, count)), len(batch) * len(states))


Difference = tuple[Form, State, Slot, Slot]


def differences(
    batch: Sequence[Form],
    states: Sequence[State],
    ours: Sequence[Slot],
    theirs: Sequence[Slot],
    same: Callable[[Form, State, Slot, Slot], bool],
) -> Iterator[Difference]:
    """Where `same` is false."""
    for n, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        form, state = batch[n // len(states)], states[n % len(states)]
        if not same(form, state, a, b):
            yield form, state, a, b


def report(found: Sequence[Difference], limit: int = 5) -> str:
    """The first few, and how many for each form."""
    counts: dict[str, int] = {}
    for form, *_ in found:
        counts[form.name] = counts.get(form.name, 0) + 1
    lines = [f"{len(found)} differences: {counts}"]
    for form, state, a, b in found[:limit]:
        lines.append(f"{form.name} {form.data.hex()}\n  in  {Slot(state.pack())}\n  ours  {a}\n  theirs {b}")
    return "\n".join(lines)


def run_bochs(batch: Sequence[Form], states: Sequence[State]) -> list[Slot]:
    """The same under Bochs, a part of the forms at a time; its results come out of port E9h."""
    found: list[Slot] = []
    per_run = 600
    for first in range(0, len(batch), per_run):
        part = batch[first : first + per_run]
        count = len(part) * len(states)
        end = b"\xbe" + struct.pack("<I", RESULTS) + b"\xb9" + struct.pack("<I", count * SLOT_BYTES)
        end += b"\x66\xba\xe9\x00\xf3\x6e"  # mov dx, 0E9h; rep outsb
        end += b"\x66\xba\x00\x89" + b"".join(bytes((0xB0, letter, 0xEE)) for letter in b"Shutdown")
        pieces = {
            qemu.PROTECTED_ENTRY: program(part, len(states), end=end),
            STATES: b"".join(item.pack() for item in states),
        }
        output = bochs.run(pieces, cpu="p4_willamette", memory_mib=MEMORY_MIB, timeout_s=300)
        found += _split(output, count)
    return found
