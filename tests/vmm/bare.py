"""A CPU with memory and an empty port bus, in flat 32-bit mode or in real mode, for tests of engines.

It must not know which engines there are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

from machine.clock import Clock
from machine.cpu import Cpu
from machine.debug import DebugControl, Stop, StopKind
from machine.engine import Engine
from machine.lines import CpuLines
from machine.memory import PhysicalMemory
from machine.ports import PortBus
from machine.state import CR0_PE, CR0_PG, CS, ESP, MASK32, SEG_DB, SEG_G, CpuState
from tests.oracles.assembler import assemble
from vmm.hostalu import choose_alu
from vmm.interp import Interpreter

ORIGIN = 0x1000
STACK_TOP = 0x8000
IDT_BASE = 0x9000
GDT_BASE = 0xA000
HANDLERS = 0xB000
HANDLER_BYTES = 16
LONG_HANDLERS = 0xE000
LONG_HANDLER_BYTES = 64
PAGE_DIRECTORY = 0x10_0000
PAGE_TABLE = 0x10_1000
CODE_SELECTOR = 0x08
DATA_SELECTOR = 0x10

EngineMaker = Callable[[Cpu, DebugControl], Engine]

_CODE = 0x9B | SEG_DB | SEG_G
_DATA = 0x93 | SEG_DB | SEG_G

host_alu = cache(choose_alu)


@dataclass(slots=True)
class Bare:
    """The parts, and an engine that has been entered.

    Attributes:
        make: what makes the engine.
    """

    make: EngineMaker = Interpreter
    memory: PhysicalMemory = field(default_factory=lambda: PhysicalMemory(4 << 20))
    ports: PortBus = field(default_factory=PortBus)
    lines: CpuLines = field(default_factory=CpuLines)
    clock: Clock = field(default_factory=Clock)
    debug: DebugControl = field(default_factory=DebugControl)
    cpu: Cpu = field(init=False)
    engine: Engine = field(init=False)

    def __post_init__(self) -> None:
        self.cpu = Cpu(self.memory, self.ports, self.lines, self.clock, host_alu())
        self.engine = self.make(self.cpu, self.debug)
        self.engine.enter()

    def close(self) -> None:
        """Give the engine's and the memory's share of the host back."""
        self.engine.leave()
        self.memory.close()

    @property
    def state(self) -> CpuState:
        return self.cpu.state

    def run(self, insns: int) -> Stop:
        """Run to `insns` more retired instructions, or to what stops before."""
        until = self.clock.icount + insns
        while True:
            stop = self.engine.run(until)
            if stop.kind is not StopKind.BUDGET or self.clock.icount >= until:
                return stop


def flat(source: str, make: EngineMaker = Interpreter) -> Bare:
    """`source` at ORIGIN in flat protected mode at CPL 0, with an IDT whose handlers are `hlt`.

    The handler of vector n is at HANDLERS + n * HANDLER_BYTES.
    """
    bare = Bare(make)
    state, memory = bare.state, bare.memory
    state.cr0 |= CR0_PE
    for number, segment in enumerate(state.segments):
        segment.load(CODE_SELECTOR if number == CS else DATA_SELECTOR, 0, MASK32, _CODE if number == CS else _DATA)
    memory.write(GDT_BASE, bytes(8) + bytes.fromhex("ffff0000009bcf00 ffff00000093cf00"))
    state.gdtr.base, state.gdtr.limit = GDT_BASE, 0x17
    for vector in range(256):
        handler = HANDLERS + vector * HANDLER_BYTES
        gate = (handler & 0xFFFF) | CODE_SELECTOR << 16 | 0x8E00 << 32 | (handler >> 16) << 48
        memory.write(IDT_BASE + 8 * vector, gate.to_bytes(8, "little"))
        memory.write(handler, b"\xf4")
    state.idtr.base, state.idtr.limit = IDT_BASE, 0x7FF
    state.gpr[ESP] = STACK_TOP
    state.eip = ORIGIN
    memory.write(ORIGIN, assemble(source, origin=ORIGIN))
    return bare


def handler_of(vector: int) -> int:
    """Where `flat` puts the handler of a vector."""
    return HANDLERS + vector * HANDLER_BYTES


def set_handler(bare: Bare, vector: int, code: bytes) -> None:
    """Give a vector of `flat` a handler of more than HANDLER_BYTES."""
    at = LONG_HANDLERS + vector * LONG_HANDLER_BYTES
    bare.memory.write(at, code)
    bare.memory.store(IDT_BASE + 8 * vector, 4, at & 0xFFFF | CODE_SELECTOR << 16)
    bare.memory.store(IDT_BASE + 8 * vector + 4, 4, 0x8E00 | at & 0xFFFF_0000)


def map_low_memory(bare: Bare) -> None:
    """Turn paging on, with the first 4 MiB mapped to themselves, for everybody and writable."""
    memory, state = bare.memory, bare.state
    memory.write(PAGE_TABLE, b"".join((page << 12 | 7).to_bytes(4, "little") for page in range(1024)))
    memory.store(PAGE_DIRECTORY, 4, PAGE_TABLE | 7)
    state.cr3 = PAGE_DIRECTORY
    state.cr0 |= CR0_PG
    bare.cpu.mmu.flush()


def set_page(bare: Bare, linear: int, entry: int) -> None:
    """Put an entry into the table of the first 4 MiB."""
    bare.memory.store(PAGE_TABLE + 4 * (linear >> 12), 4, entry)


def real(source: str, make: EngineMaker = Interpreter) -> Bare:
    """`source` at 0:ORIGIN in real mode."""
    bare = Bare(make)
    for segment in bare.state.segments:
        segment.load(0, 0, 0xFFFF, 0x93)
    bare.state.gpr[ESP] = STACK_TOP
    bare.state.eip = ORIGIN
    bare.memory.write(ORIGIN, assemble(source, bits=16, origin=ORIGIN))
    return bare
