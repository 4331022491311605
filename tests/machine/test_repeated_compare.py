"""REPE CMPS compares many elements at once; the outcome must be that of one iteration after the other."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from machine.cpu import Cpu
from machine.debug import DebugControl
from machine.state import CS, EAX, ECX, EDI, ES, ESI
from tests.oracles.reference import build_cpu
from vmm.interp import Interpreter

CODE = 0x7C00
HANDLER = 0x7B00  # of #GP; like the code it ends with HLT


@dataclass(frozen=True, slots=True)
class Trial:
    size: int
    elements: int
    equal: int
    source: int
    destination: int
    backwards: bool
    flipped: int
    limit: int


def trials() -> list[Trial]:
    generator = random.Random(7)
    found = []
    for _ in range(120):
        size = generator.choice((1, 2, 4))
        elements = generator.choice((0, 1, 2, 3, 7, 33, 700, 2500))
        # Pages are crossed by either operand, and by a single element of it.
        source, destination = 0x8000 + generator.randrange(4096), 0xC000 + generator.randrange(4096)
        found.append(
            Trial(
                size,
                elements,
                equal=generator.randrange(elements + 2),
                source=source,
                destination=destination,
                backwards=generator.random() < 0.1,
                flipped=generator.choice((1, 0x80, 0xFF)) << 8 * generator.choice((0, size - 1)),
                # Of ES: now and then the last elements are beyond it.
                limit=generator.choice((0xFFFF, 0xFFFF, destination + elements * size * 2 // 3)),
            )
        )
    return found


def prepare(trial: Trial) -> Cpu:
    cpu = build_cpu(1)
    code = b"\xf3\x66\xa7" if trial.size == 4 else b"\xf3" + (b"\xa6" if trial.size == 1 else b"\xa7")
    cpu.memory.write(CODE, (b"\xfd" if trial.backwards else b"\xfc") + code + b"\xf4")
    generator = random.Random(trial.elements)
    data = generator.randbytes(trial.elements * trial.size)
    other = bytearray(data)
    if trial.equal < trial.elements:
        place = slice(trial.equal * trial.size, (trial.equal + 1) * trial.size)
        other[place] = (int.from_bytes(other[place], "little") ^ trial.flipped).to_bytes(trial.size, "little")
    cpu.memory.write(trial.source, data)
    cpu.memory.write(trial.destination, bytes(other))
    state = cpu.state
    state.segments[CS].load(0, 0, 0xFFFF, 0x93)
    state.segments[ES].load(0, 0, trial.limit, 0x93)
    cpu.memory.write(13 * 4, HANDLER.to_bytes(4, "little"))
    cpu.memory.write(HANDLER, b"\xf4")
    state.eip = CODE
    last = max(trial.elements - 1, 0) * trial.size if trial.backwards else 0
    state.gpr[EAX : EDI + 1] = [0, trial.elements, 0, 0, 0x7000, 0, trial.source + last, trial.destination + last]
    return cpu


@pytest.mark.parametrize("trial", trials(), ids=str)
def test_at_once_and_one_by_one(trial: Trial) -> None:
    outcomes = []
    for one_by_one in (False, True):
        cpu = prepare(trial)
        engine = Interpreter(cpu, DebugControl())
        engine.enter()
        while not cpu.state.halted:
            if one_by_one:
                engine.step()
            else:
                engine.run(cpu.clock.icount + 2)
        gpr = cpu.state.gpr
        outcomes.append((gpr[ECX], gpr[ESI], gpr[EDI], cpu.state.eflags, cpu.state.eip, cpu.clock.icount))
        engine.leave()
        cpu.memory.close()
    assert outcomes[0] == outcomes[1]
