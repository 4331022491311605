"""The trap of a TSS's T bit, and faults of a new task and of deliveries, at instruction boundaries."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

import pytest

from machine.cpu import Cpu
from machine.debug import DebugControl, StopKind
from machine.descriptors import INTERRUPT_GATE32, TASK_GATE, TSS32, encode_segment
from machine.engine import Engine
from machine.flags import IF, NT, TF
from machine.state import CR0_PG, DR6_BS, DR6_BT, ESP
from tests import engine as engines
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

CODE = 0x5000
NEW_TASK = 0x6000
HANDLER = 0x6800
DIRECTORY, TABLE = 0x2_0000, 0x2_1000


Make = Callable[..., tuple[Cpu, Engine]]


@pytest.fixture
def machine(each_engine: str) -> Iterator[Make]:  # noqa: ARG001 - which `engines.make` asks for
    """What makes a CPU and the engine of the test; both are given back at its end."""
    made: list[tuple[Cpu, Engine]] = []

    def make(trap: int, flags: int, ds: int = DATA0) -> tuple[Cpu, Engine]:
        """At `CODE` a far jump to another task, whose code and whose handlers are HLT; it handles #UD, too."""
        cpu = protected_cpu()
        cpu.memory.write(CODE, b"\xea" + struct.pack("<IH", 0, FREE))
        cpu.memory.write(NEW_TASK, b"\xf4")
        for vector in (1, 8, 10, 13, 14, 0x20):
            set_gate(cpu, vector, INTERRUPT_GATE32, CODE0, HANDLER + vector)
            cpu.memory.write(HANDLER + vector, b"\xf4")
        set_gate(cpu, 6, TASK_GATE, FREE, 0)
        set_descriptor(cpu, FREE, encode_segment(OTHER_TSS, 0x67, PRESENT | TSS32))
        fields = {8: NEW_TASK, 9: flags, 14: 0x7000, 19: CODE0, 20: DATA0, 21: ds, 25: trap}
        cpu.memory.write(OTHER_TSS, struct.pack("<26I", *(fields.get(n, 0) for n in range(26))))
        engine = engines.make(cpu, DebugControl())
        engine.enter()
        made.append((cpu, engine))
        return cpu, engine

    yield make
    for cpu, engine in made:
        engine.leave()
        cpu.memory.close()


def run(engine: Engine) -> None:
    while (stop := engine.run(10)).kind is StopKind.BUDGET:
        pass
    assert stop.kind is StopKind.HALTED


@pytest.mark.parametrize("stepping", [False, True])
def test_the_t_bit_traps_before_the_first_instruction_and_before_an_interrupt(machine: Make, stepping: bool) -> None:
    cpu, engine = machine(1, 2 | IF)
    cpu.lines.acknowledge = lambda: 0x20
    cpu.lines.set_intr(True)
    if stepping:
        engine.step()
        engine.step()
    else:
        run(engine)
    assert cpu.state.dr[6] & DR6_BT
    assert (cpu.state.eip & ~0xFF, cpu.pending_debug) == (HANDLER, 0)
    # The handler has IF = 0: the interrupt waits.
    assert stack(cpu, 1) == [NEW_TASK]
    assert cpu.state.eip - HANDLER in ((2,) if not stepping else (1, 2))


@pytest.mark.parametrize("stepping", [False, True])
def test_a_fault_of_the_new_task_is_delivered_in_it(machine: Make, stepping: bool) -> None:
    cpu, engine = machine(0, 2, ds=FREE)
    if stepping:
        engine.step()
    else:
        run(engine)
    assert cpu.state.eip - HANDLER in (10, 11)
    assert stack(cpu, 2) == [FREE, NEW_TASK]
    assert cpu.memory.load(TSS + 0x20, 4) == CODE + 7
    assert cpu.memory.load(TSS + 0x24, 4) == 2


@pytest.mark.parametrize("flags", [2, 2 | TF])
def test_the_t_bit_of_a_task_that_handles_an_exception(machine: Make, flags: int) -> None:
    """TF is no trap of the switch: it counts from the first instruction of the new task on."""
    cpu, engine = machine(1, flags)
    cpu.memory.write(CODE, b"\x0f\x0b")
    run(engine)
    assert cpu.state.dr[6] & (DR6_BT | DR6_BS) == DR6_BT
    assert cpu.state.eip == HANDLER + 2
    assert stack(cpu, 3) == [NEW_TASK, CODE0, flags | NT]
    assert cpu.memory.load(TSS + 0x20, 4) == CODE
    assert cpu.clock.icount == 1, "the HLT of the handler"


def test_a_page_fault_in_the_delivery_of_another(machine: Make) -> None:
    """CR2 is of the second one, and the handler that of the double fault."""
    cpu, engine = machine(0, 2)
    memory, state = cpu.memory, cpu.state
    memory.write(TABLE, struct.pack("<256I", *(page << 12 | 3 for page in range(256))))
    memory.store(DIRECTORY, 4, TABLE | 3)
    memory.store(OTHER_TSS + 0x1C, 4, DIRECTORY)
    memory.write(CODE, b"\xa1" + struct.pack("<I", 0x50_0000))
    set_gate(cpu, 8, TASK_GATE, FREE, 0)
    state.cr3, state.gpr[ESP] = DIRECTORY, 0x60_0000
    state.cr0 |= CR0_PG
    run(engine)
    assert state.cr2 == 0x5F_FFFC
    assert state.eip == NEW_TASK + 1
    assert memory.load(TSS + 0x20, 4) == CODE
    assert stack(cpu, 1) == [0], "the error code of #DF"
