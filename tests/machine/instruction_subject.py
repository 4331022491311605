"""Owns the reference CPU as the counterpart of `tests.oracles.usermode`: the same jobs in, outcomes of the same shape.

User mode with paging: what the process has mapped is mapped, and GDT and LDT hold what Linux puts there.
"""

from __future__ import annotations

from collections.abc import Mapping

from iced_x86 import Decoder, Instruction, Mnemonic

from machine.alu import Alu, build_alu
from machine.clock import Clock
from machine.cpu import Cpu
from machine.debug import DebugControl, StopKind
from machine.faults import Vector
from machine.flags import ALWAYS_SET, IF, RF
from machine.lines import CpuLines
from machine.memory import PhysicalMemory
from machine.ports import PortBus
from machine.state import CR0_AM, CR0_PE, CR0_PG, CR0_WP, CS, SEG_DB, SEG_G
from tests.oracles.usermode import (
    ARENA,
    ARENA_BYTES,
    ARENA_PAGES,
    CODE,
    CODE_PAGES,
    EXECUTE,
    NONE,
    PAGE_BYTES,
    USER_CODE,
    USER_DATA,
    WRITE,
    Job,
    LdtSegment,
    Outcome,
    ldt_selector,
    pristine,
)
from vmm.interp import Interpreter

P, RW, US = 1, 2, 4
ACCESSED, DIRTY = 0x20, 0x40
_GDT = 0x1000
_LDT = 0x1800
_TSS = 0x1C00
_DIRECTORY = 0x2000
_TABLE = 0x3000
_SYSTEM_TABLE = 0x4000
_SYSTEM_LINEAR = 0xFFFF_F000  # where the page with GDT and LDT is, for the supervisor alone
_GDT_LIMIT = 0x7F  # Linux's, with 16 entries

_FLAT_CODE = 0xFB | SEG_DB | SEG_G
_FLAT_DATA = 0xF3 | SEG_DB | SEG_G
_INT3 = 0xCC


class Subject:
    """The reference CPU, used again and again.

    Args:
        ldt: as given to `usermode.run`.
        alu: None for the one of AMD_ZEN5.
    """

    def __init__(self, ldt: Mapping[int, LdtSegment], alu: Alu | None = None) -> None:
        self.memory = PhysicalMemory(4 << 20)
        self.cpu = Cpu(self.memory, PortBus(), CpuLines(), Clock(), alu or build_alu())
        self.state = self.cpu.state
        self.debug = DebugControl()
        self.engine = Interpreter(self.cpu, self.debug)
        self.engine.enter()
        self.debug.set_catches(frozenset(range(32)))
        self._segments = {
            **dict.fromkeys((0, 1, 2, 3), (0, 0, 0)),
            USER_CODE: (0, 0xFFFF_FFFF, _FLAT_CODE),
            USER_DATA: (0, 0xFFFF_FFFF, _FLAT_DATA),
            **{ldt_selector(n): (entry.base, entry.limit_bytes, entry.attributes) for n, entry in ldt.items()},
        }
        self._build_tables(ldt)
        state = self.state
        state.cr0 |= CR0_PE | CR0_PG | CR0_WP | CR0_AM
        state.cr3 = _DIRECTORY
        state.gdtr.base, state.gdtr.limit = _SYSTEM_LINEAR, _GDT_LIMIT
        state.ldtr.load(0x50, _SYSTEM_LINEAR + _LDT - _GDT, 8 * (max(ldt, default=0) + 1) - 1, 0x82)
        state.idtr.limit = 0
        # The I/O map begins beyond the limit: no port is allowed.
        state.tr.load(0x40, _SYSTEM_LINEAR + _TSS - _GDT, 0x67, 0x8B)
        self.memory.store(_TSS + 0x66, 2, 0x68)
        self._protection = bytearray(ARENA_PAGES)
        self._code_protection = bytearray(CODE_PAGES)
        self.memory.write(CODE, bytes([_INT3]) * CODE_PAGES * PAGE_BYTES)
        self._code_linear = CODE

    def _build_tables(self, ldt: Mapping[int, LdtSegment]) -> None:
        memory = self.memory
        memory.write(_GDT + USER_CODE - 3, bytes.fromhex("ffff000000fbcf00"))
        memory.write(_GDT + USER_DATA - 3, bytes.fromhex("ffff000000f3cf00"))
        for number, entry in ldt.items():
            memory.write(_LDT + 8 * number, entry.descriptor)
        memory.store(_DIRECTORY, 4, _TABLE | P | RW | US)
        memory.store(_DIRECTORY + 4 * 1023, 4, _SYSTEM_TABLE | P | RW)
        memory.store(_SYSTEM_TABLE + 4 * 1023, 4, _GDT | P | RW)

    def protect(self, linear: int, protection: int) -> None:
        """Set the rights of a page of code or of the arena, and clear its A and D bits."""
        entry = linear | US if protection == NONE else linear | P | US | (RW if protection == WRITE else 0)
        self.memory.store(_TABLE + 4 * (linear >> 12), 4, entry)

    def set_protection(self, linear: int, protection: int) -> None:
        """Change the rights of a page of the arena in the middle of a job."""
        page = (linear - ARENA) // PAGE_BYTES
        if self._protection[page] != protection:
            self._protection[page] = protection
            self.protect(linear, protection)

    def touched(self) -> list[tuple[int, bool]]:
        """The pages of the arena that were accessed since `protect`, and whether they were written to."""
        found = []
        for page in range(ARENA, ARENA + ARENA_BYTES, PAGE_BYTES):
            entry = self.memory.load(_TABLE + 4 * (page >> 12), 4)
            if entry & ACCESSED:
                found.append((page, bool(entry & DIRTY)))
        return found

    def forget_touched(self) -> None:
        """Clear all A and D bits of the arena."""
        for page in range(ARENA_PAGES):
            self.protect(ARENA + page * PAGE_BYTES, self._protection[page])

    def prepare(self, job: Job) -> None:
        """Bring memory, rights and registers to the state that `job` starts from."""
        state, memory = self.state, self.memory
        memory.ram8[ARENA : ARENA + ARENA_BYTES] = pristine()
        for linear, data in job.patches.items():
            memory.write(linear, data)
        memory.write(self._code_linear, bytes([_INT3]) * 16)
        self._code_linear = job.code_linear
        memory.write(job.code_linear, job.code.ljust(16, bytes([_INT3])))
        for page, protection in enumerate(job.protection):
            if protection != self._protection[page]:
                self._protection[page] = protection
                self.protect(ARENA + page * PAGE_BYTES, protection)
        for page, protection in enumerate(job.code_protection):
            if protection != self._code_protection[page]:
                self._code_protection[page] = protection
                assert protection in (NONE, EXECUTE)
                self.protect(CODE + page * PAGE_BYTES, protection)
        for number, selector in enumerate(job.selectors):
            if selector != state.segments[number].selector:
                state.segments[number].load(selector, *self._segments[selector])
        state.gpr[:] = job.gpr
        state.eip = job.eip
        state.eflags = job.eflags | IF | ALWAYS_SET
        state.shadow = state.halted = 0
        self.cpu.pending_debug = 0
        self.cpu.repeating = False
        self.cpu.set_cpl(3)

    def run(self, job: Job) -> Outcome:
        """Run one job from its beginning."""
        self.prepare(job)
        return self.go_on(job)

    def go_on(self, job: Job) -> Outcome:
        """Run from the present state to what ends the job."""
        state, clock = self.state, self.cpu.clock
        iterations = job.iterations
        while True:
            stop = self.engine.run(clock.icount + 1)
            if stop.kind is StopKind.BUDGET:
                continue
            assert stop.kind is StopKind.CATCH, stop
            level = stop.level
            assert level is not None
            iterations -= 1
            if level.vector != Vector.DB or state.eip != job.eip or not iterations or self._at_int1(job):
                break
        eip = state.eip
        if level.vector in (Vector.BP, Vector.OF) or (level.vector == Vector.DB and self._at_int1(job)):
            eip = eip + self._decode(eip).len & 0xFFFF_FFFF
        return Outcome(
            tuple(state.gpr),
            eip - 1 if level.vector == Vector.BP else eip,
            state.eflags & ~RF,
            tuple(segment.selector for segment in state.segments),
            level.vector,
            level.error_code or 0,
            level.cr2 or 0,
            self.changes(),
        )

    def _at_int1(self, job: Job) -> bool:
        return self.state.eip == job.eip and self._decode(job.eip).mnemonic == Mnemonic.INT1

    def _decode(self, eip: int) -> Instruction:
        cs = self.state.segments[CS]
        return Decoder(32 if cs.attributes & SEG_DB else 16, self.memory.read(cs.base + eip, 16)).decode()

    def changes(self) -> dict[int, int]:
        """The bytes of the arena that differ from `pristine`, by linear address."""
        now, before = bytes(self.memory.ram8[ARENA : ARENA + ARENA_BYTES]), pristine()
        found: dict[int, int] = {}
        if now == before:
            return found
        for page in range(0, ARENA_BYTES, PAGE_BYTES):
            if now[page : page + PAGE_BYTES] == before[page : page + PAGE_BYTES]:
                continue
            for line in range(page, page + PAGE_BYTES, 64):
                if now[line : line + 64] != before[line : line + 64]:
                    found.update((ARENA + i, now[i]) for i in range(line, line + 64) if now[i] != before[i])
        return found


def differences(expected: Outcome, seen: Outcome, *, memory: bool = True) -> list[str]:
    """How two outcomes differ, for people; empty if they do not. RF is left out, and of #PF all but P, W and U."""
    found = []
    for name in ("vector", "gpr", "eip", "eflags", "selectors", "error_code", "cr2", "memory"):
        a, b = getattr(expected, name), getattr(seen, name)
        if name == "eflags":
            a, b = a & ~RF, b & ~RF
        elif name == "error_code" and expected.vector == Vector.PF:
            a, b = a & 7, b & 7
        elif name == "memory" and not memory:
            continue
        if a != b:
            found.append(f"{name}: expected {_text(a)}, seen {_text(b)}")
    return found


def _text(value: int | tuple[int, ...] | Mapping[int, int]) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{linear:x}:{byte:02x}" for linear, byte in list(value.items())[:12])
    return f"{value:#x}" if isinstance(value, int) else " ".join(f"{number:x}" for number in value)


def describe(job: Job) -> str:
    """The state that a job starts from, for people."""
    patches = " ".join(f"{linear:x}:{data.hex()}" for linear, data in job.patches.items())
    return f"gpr {_text(job.gpr)} eflags {job.eflags:x} selectors {_text(job.selectors)} memory {patches}"
