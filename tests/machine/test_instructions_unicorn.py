"""Whole instructions against Unicorn, at CPL 0 in flat 32-bit mode and in real mode; undefined flags are masked.

The host's CPU is the better oracle and has no kernel or real mode to offer; this one has.
"""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache

import pytest
from iced_x86 import RegisterExt

from machine.alu import Binary, Ternary, Unary, build_alu
from machine.clock import Clock
from machine.cpu import Cpu
from machine.debug import DebugControl, StopKind
from machine.faults import Vector
from machine.flags import ALWAYS_SET, DF, STATUS_MASK, TF
from machine.instructions import CODE_NAMES, Effect
from machine.instructions.table import ROWS
from machine.lines import CpuLines
from machine.memory import PhysicalMemory
from machine.ports import PortBus
from machine.state import CR0_PE, CS, MASK32, SEG_DB, SEG_G
from machine.undefined import is_result_undefined, undefined_flags, widest_undefined_flags
from tests.machine.instruction_cases import Bits, Case, by_mnemonic
from tests.machine.instruction_checks import BITS
from tests.machine.instruction_jobs import Layout, World, build_job, has_modrm_memory
from tests.machine.instruction_subject import describe
from tests.oracles.unicorn_cpu import CODE, UnicornCpu
from tests.oracles.usermode import Job
from vmm.interp import Interpreter

# What Unicorn cannot be asked for, or does not do as processors do.
ELSEWHERE = {
    **dict.fromkeys(("cpuid", "rdtsc", "rdmsr", "wrmsr"), "another CPU model"),
    **dict.fromkeys(("in", "out", "insb", "insw", "insd", "outsb", "outsw", "outsd"), "hooks"),
    **dict.fromkeys(("fpu", "wait"), "it has an FPU"),
    **dict.fromkeys(("sgdt", "sidt", "lgdt", "lidt", "sldt", "lldt", "str", "ltr"), "no tables"),
    **dict.fromkeys(("lar", "lsl", "verr", "verw", "arpl"), "no tables"),
    **dict.fromkeys(("mov_from_cr", "mov_to_cr", "mov_from_dr", "mov_to_dr", "smsw", "lmsw", "clts"), "its own CR0"),
    **dict.fromkeys(("jmp_far", "call_far", "retf", "iret", "iretd", "sysenter", "sysexit"), "no tables"),
    **dict.fromkeys(("int", "int1", "int3", "into"), "no IDT"),
    **dict.fromkeys(("hlt", "cli", "sti", "invlpg", "invd", "wbinvd"), "outside of instructions"),
    **dict.fromkeys(("popf", "popfd"), "IOPL and NT at CPL 0"),
    "bswap": "of 16 bits undefined",
    "enter": "16-bit ENTER leaves the upper half of EBP, Unicorn takes it from ESP",
}
LOADS_SEGMENT = frozenset(("mov_to_sreg", "pop_sreg", "lds", "les", "lss", "lfs", "lgs"))
COMPARED = [mnemonic for mnemonic in ROWS if mnemonic not in ELSEWHERE]

# The arena: below 32 KiB, so that 16-bit addresses reach it, and Unicorn's code lies behind.
ARENA = range(0x800, 0x7800)
LAYOUT = Layout(operand=0x1800, source=0x2C00, destination=0x3C00, stack=0x5400, frame=0x6800)
WORLDS = {bits: World("bare", (0,) * 6, 0, 0, wide_stack=bits == 32, code_linear=CODE, arena=ARENA) for bits in BITS}


class Recorder:
    """An ALU that remembers the operations that it was asked for, with their operands."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int, int, int]] = []
        base = build_alu()
        self.alu = replace(
            base,
            unary={name: {w: self._unary(name, w, f) for w, f in row.items()} for name, row in base.unary.items()},
            binary={name: {w: self._binary(name, w, f) for w, f in row.items()} for name, row in base.binary.items()},
            ternary={
                name: {w: self._ternary(name, w, f) for w, f in row.items()} for name, row in base.ternary.items()
            },
        )

    def _unary(self, name: str, width: int, compute: Unary) -> Unary:
        def recorded(a: int, eflags: int) -> tuple[int, int]:
            self.calls.append((name, width, a, 0, 0))
            return compute(a, eflags)

        return recorded

    def _binary(self, name: str, width: int, compute: Binary) -> Binary:
        def recorded(a: int, b: int, eflags: int) -> tuple[int, int]:
            self.calls.append((name, width, a, b, 0))
            return compute(a, b, eflags)

        return recorded

    def _ternary(self, name: str, width: int, compute: Ternary) -> Ternary:
        def recorded(a: int, b: int, c: int, eflags: int) -> tuple[int, int]:
            self.calls.append((name, width, a, b, c))
            return compute(a, b, c, eflags)

        return recorded

    def undefined(self) -> int:
        """The flags that the last instruction left undefined."""
        mask = 0
        for call in self.calls:
            mask |= undefined_flags(*call)
        return mask


class Bare:
    """The reference CPU in the surroundings of `UnicornCpu`: no paging, all segments at 0, memory of the arena."""

    def __init__(self, bits: Bits) -> None:
        self.bits = bits
        self.recorder = Recorder()
        self.memory = PhysicalMemory(2 << 20)
        self.cpu = Cpu(self.memory, PortBus(), CpuLines(), Clock(), self.recorder.alu)
        debug = DebugControl()
        debug.set_catches(frozenset(range(32)))
        self.engine = Interpreter(self.cpu, debug)
        self.engine.enter()
        if bits == 32:
            self.cpu.state.cr0 |= CR0_PE

    def run(self, job: Job, start: int) -> int | None:
        """Run a job whose code is at `start`; the vector of the exception that ended it."""
        state = self.cpu.state
        flat = (0, 0, MASK32)
        for number, segment in enumerate(state.segments):
            if self.bits == 32:
                segment.load(*flat, (0x9B if number == CS else 0x93) | SEG_DB | SEG_G)
            else:
                segment.load(0, 0, 0xFFFF, 0x93)
        self.memory.write(start, job.code.ljust(32, b"\x90"))
        state.gpr[:] = job.gpr
        state.eip, state.eflags = start, job.eflags | ALWAYS_SET
        state.shadow = 0
        self.recorder.calls.clear()
        retired = self.cpu.clock.icount
        while self.cpu.clock.icount == retired:
            stop = self.engine.run(retired + 1)
            if stop.kind is StopKind.CATCH:
                assert stop.level is not None
                return stop.level.vector
            assert stop.kind is StopKind.BUDGET
        return None


@cache
def oracle(bits: Bits) -> UnicornCpu:
    return UnicornCpu(bits)


@cache
def bare(bits: Bits) -> Bare:
    return Bare(bits)


@cache
def pristine() -> bytes:
    return random.Random("arena").randbytes(len(ARENA))


def is_comparable(case: Case) -> bool:
    """Not one of Unicorn's deviations."""
    name = CODE_NAMES[case.instruction.code]
    if name.endswith(("F6R1", "F7R1")):
        return False  # TEST by another opcode: #UD in Unicorn
    if name in ("RETNW_IMM16", "RETND_IMM16") and case.instruction.immediate16 >= 0x8000:
        return False  # signed in Unicorn
    if (
        case.row.mnemonic == "nop"
        and case.code.find(b"\x0f\x18") in (0, 1, 2)
        and not has_modrm_memory(case.instruction)
    ):
        return False  # a prefetch of a register: #UD in Unicorn
    names_segment = any(RegisterExt.is_segment_register(case.instruction.op_register(n)) for n in (0, 1))
    return not (case.bits == 32 and (case.row.mnemonic in LOADS_SEGMENT or names_segment))


def compare(case: Case, job: Job) -> list[str] | None:
    """How Unicorn and the reference CPU differ; None if they cannot be compared."""
    bits = case.bits
    unicorn, subject = oracle(bits), bare(bits)
    memory = {ARENA.start: pristine(), **job.patches}
    if case.row.effect is Effect.BRANCH:
        unicorn.reset()
    repeats = case.row.string and (case.instruction.has_rep_prefix or case.instruction.has_repne_prefix)
    expected = unicorn.run(job.code, job.gpr, job.eflags, memory, instructions=0 if repeats else 1)
    if case.row.mnemonic in LOADS_SEGMENT:
        unicorn.reset()
    start = expected.eip - expected.advance_bytes
    for linear, data in memory.items():
        subject.memory.write(linear, data)
    vector = subject.run(job, start)
    state = subject.cpu.state
    if vector in (Vector.GP, Vector.SS) and bits == 16:
        return None  # Unicorn knows no limits
    if expected.vector == 14 or any(is_result_undefined(*call) for call in subject.recorder.calls):
        return None
    found = []
    if expected.vector != vector:
        return [f"vector: expected {expected.vector}, seen {vector}"]
    if vector is not None:
        return []
    mask = (STATUS_MASK | DF) & ~subject.recorder.undefined()
    ip_mask = 0xFFFF if bits == 16 else MASK32
    for name, a, b in (
        ("gpr", expected.gpr, tuple(state.gpr)),
        ("eflags", expected.eflags & mask, state.eflags & mask),
        ("advance", expected.advance_bytes & ip_mask, state.eip - start & ip_mask),
        ("memory", unicorn.read(ARENA.start, len(ARENA)), subject.memory.read(ARENA.start, len(ARENA))),
    ):
        if a != b:
            found.append(f"{name}: expected {a!r:.400}, seen {b!r:.400}")
    return found


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("mnemonic", COMPARED)
def test_a_row_of_the_table(mnemonic: str, bits: Bits) -> None:
    problems, compared = [], 0
    undefined = 0
    cases = [case for case in by_mnemonic(bits)[mnemonic] if is_comparable(case)]
    for original in cases:
        chance = random.Random(original.code)
        case, job = build_job(original, chance, WORLDS[bits], LAYOUT)
        found = compare(case, replace(job, eflags=job.eflags & ~TF))
        compared += found is not None
        for operation, *_ in bare(bits).recorder.calls:
            undefined |= widest_undefined_flags(operation)
        if found:
            problems.append("\n    ".join([str(case), describe(job), *found]))
    assert not problems, f"{len(problems)} of {len(cases)} differ:\n" + "\n".join(problems[:4])
    assert compared or not cases
    assert undefined == ROWS[mnemonic].undefined or not cases


def test_every_row_is_compared_or_has_a_reason() -> None:
    assert ROWS.keys() == {*COMPARED, *ELSEWHERE}
    assert all(row.effect is not Effect.SYSTEM_BRANCH for row in map(ROWS.__getitem__, COMPARED))
