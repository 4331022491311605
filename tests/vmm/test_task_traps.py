"""The trap of a TSS's T bit under the reference engine, and a fault of a new task, at instruction boundaries."""

from __future__ import annotations

import struct

import pytest

from machine.cpu import Cpu
from machine.debug import DebugControl, StopKind
from machine.descriptors import INTERRUPT_GATE32, TSS32, encode_segment
from machine.flags import IF
from machine.state import DR6_BT
from tests.machine.ring0 import (
    CODE0,
    DATA0,
    FREE,
    OTHER_TSS,
    PRESENT,
    TSS,
    protected_cpu,
    set_descriptor,
    set_gate,
    stack,
)
from vmm.interp import Interpreter

CODE = 0x5000
NEW_TASK = 0x6000
HANDLER = 0x6800


def machine(trap: int, flags: int, ds: int = DATA0) -> tuple[Cpu, Interpreter]:
    """At `CODE` a far jump to another task, whose code and whose handlers are HLT."""
    cpu = protected_cpu()
    cpu.memory.write(CODE, b"\xea" + struct.pack("<IH", 0, FREE))
    cpu.memory.write(NEW_TASK, b"\xf4")
    for vector in (1, 10, 13, 0x20):
        set_gate(cpu, vector, INTERRUPT_GATE32, CODE0, HANDLER + vector)
        cpu.memory.write(HANDLER + vector, b"\xf4")
    set_descriptor(cpu, FREE, encode_segment(OTHER_TSS, 0x67, PRESENT | TSS32))
    fields = {8: NEW_TASK, 9: flags, 14: 0x7000, 19: CODE0, 20: DATA0, 21: ds, 25: trap}
    cpu.memory.write(OTHER_TSS, struct.pack("<26I", *(fields.get(n, 0) for n in range(26))))
    engine = Interpreter(cpu, DebugControl())
    engine.enter()
    return cpu, engine


@pytest.mark.parametrize("stepping", [False, True])
def test_the_t_bit_traps_before_the_first_instruction_and_before_an_interrupt(stepping: bool) -> None:
    cpu, engine = machine(1, 2 | IF)
    cpu.lines.acknowledge = lambda: 0x20
    cpu.lines.set_intr(True)
    if stepping:
        engine.step()
        engine.step()
    else:
        assert engine.run(10).kind is StopKind.HALTED
    assert cpu.state.dr[6] & DR6_BT
    assert (cpu.state.eip & ~0xFF, cpu.pending_debug) == (HANDLER, 0)
    # The handler has IF = 0: the interrupt waits.
    assert stack(cpu, 1) == [NEW_TASK]
    assert cpu.state.eip - HANDLER in ((2,) if not stepping else (1, 2))


@pytest.mark.parametrize("stepping", [False, True])
def test_a_fault_of_the_new_task_is_delivered_in_it(stepping: bool) -> None:
    cpu, engine = machine(0, 2, ds=FREE)
    if stepping:
        engine.step()
    else:
        engine.run(2)
    assert cpu.state.eip - HANDLER in (10, 11)
    assert stack(cpu, 2) == [FREE, NEW_TASK]
    assert cpu.memory.load(TSS + 0x20, 4) == CODE + 7
    assert cpu.memory.load(TSS + 0x24, 4) == 2
