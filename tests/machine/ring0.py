"""A CPU in flat protected mode with small tables, for tests that call the functions of protection directly.

It writes descriptors by the layouts of `machine.descriptors`, whose own tests do not use it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from machine.cpu import Cpu
from machine.descriptors import LDT, TSS32, encode_gate, encode_segment
from machine.faults import GuestFault
from machine.state import CR0_ET, CR0_PE, CS, DS, ES, ESP, FS, GS, SS
from tests.oracles.reference import build_cpu

GDT = 0x1000
GDT_LIMIT = 0xFF
LDT_BASE = 0x1800
IDT = 0x2000
IDT_LIMIT = 0x7FF
TSS = 0x3000
OTHER_TSS = 0x3100
STACK0 = 0x8000
STACK3 = 0xA000

CODE0, DATA0, CODE3, DATA3, TSS_SELECTOR, LDT_SELECTOR, FREE = 0x08, 0x10, 0x1B, 0x23, 0x28, 0x30, 0x38

PRESENT = 0x80
CODE = 0x9B
DATA = 0x93
FLAT = 0xC00  # G and D/B


def dpl(level: int) -> int:
    return level << 5


def set_descriptor(cpu: Cpu, selector: int, raw: int) -> None:
    base = LDT_BASE if selector & 4 else GDT
    cpu.memory.write(base + (selector & 0xFFF8), raw.to_bytes(8, "little"))


def descriptor_of(cpu: Cpu, selector: int) -> int:
    base = LDT_BASE if selector & 4 else GDT
    return int.from_bytes(cpu.memory.read(base + (selector & 0xFFF8), 8), "little")


def set_gate(cpu: Cpu, vector: int, kind: int, selector: int, offset: int, level: int = 0) -> None:
    cpu.memory.write(IDT + vector * 8, encode_gate(kind, selector, offset, level).to_bytes(8, "little"))


def flat(attributes: int) -> int:
    return encode_segment(0, 0xFFFF_FFFF, attributes | FLAT)


def protected_cpu() -> Cpu:
    """At CPL 0 with flat segments, ESP at `STACK0`, a TSS with the same ring 0 stack, and an LDT of eight entries."""
    cpu = build_cpu(1)
    cpu.reset()
    state = cpu.state
    state.cr0 = CR0_PE | CR0_ET
    for selector, attributes in ((CODE0, CODE), (DATA0, DATA), (CODE3, CODE | dpl(3)), (DATA3, DATA | dpl(3))):
        set_descriptor(cpu, selector, flat(attributes))
    set_descriptor(cpu, TSS_SELECTOR, encode_segment(TSS, 0x67, PRESENT | TSS32 | 2))
    set_descriptor(cpu, LDT_SELECTOR, encode_segment(LDT_BASE, 0x3F, PRESENT | LDT))
    state.gdtr.base, state.gdtr.limit = GDT, GDT_LIMIT
    state.idtr.base, state.idtr.limit = IDT, IDT_LIMIT
    state.tr.load(TSS_SELECTOR, TSS, 0x67, PRESENT | TSS32 | 2)
    state.ldtr.load(LDT_SELECTOR, LDT_BASE, 0x3F, PRESENT | LDT)
    cpu.memory.write(TSS + 4, STACK0.to_bytes(4, "little") + DATA0.to_bytes(4, "little"))
    state.segments[CS].load(CODE0, 0, 0xFFFF_FFFF, CODE | FLAT)
    for register in (SS, DS, ES, FS, GS):
        state.segments[register].load(DATA0, 0, 0xFFFF_FFFF, DATA | FLAT)
    state.gpr[ESP] = STACK0
    state.eip = 0x5000
    return cpu


def to_ring_3(cpu: Cpu) -> None:
    """The same CPU at CPL 3, ESP at `STACK3`."""
    state = cpu.state
    state.segments[CS].load(CODE3, 0, 0xFFFF_FFFF, CODE | dpl(3) | FLAT)
    for register in (SS, DS, ES, FS, GS):
        state.segments[register].load(DATA3, 0, 0xFFFF_FFFF, DATA | dpl(3) | FLAT)
    state.gpr[ESP] = STACK3
    cpu.set_cpl(3)


def push(cpu: Cpu, *values: int, size_bytes: int = 4) -> None:
    """The first value deepest."""
    for value in values:
        cpu.push(value, size_bytes)


def stack(cpu: Cpu, count: int, size_bytes: int = 4) -> list[int]:
    """What lies on top of the stack, flat."""
    data = cpu.memory.read(cpu.state.gpr[ESP], count * size_bytes)
    return [int.from_bytes(data[n : n + size_bytes], "little") for n in range(0, len(data), size_bytes)]


@contextmanager
def fault(cpu: Cpu, vector: int, error_code: int | None) -> Iterator[None]:
    """Expect this fault, and that neither a register nor a byte of RAM changes on the way."""
    registers, ram = cpu.state.pack(), bytes(cpu.memory.ram)
    with pytest.raises(GuestFault) as caught:
        yield
    assert (caught.value.vector, caught.value.error_code) == (vector, error_code)
    assert caught.value.return_eip is None
    assert cpu.state.pack() == registers
    assert bytes(cpu.memory.ram) == ram
