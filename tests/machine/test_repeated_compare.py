"""REPE CMPS compares many elements at once; the outcome must be that of one iteration after the other."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from machine.cpu import Cpu
from machine.debug import DebugControl
from machine.state import EAX, ECX, EDI, ESI
from tests.oracles.reference import build_cpu
from vmm.interp import Interpreter

CODE = 0x7C00


@dataclass(frozen=True, slots=True)
class Trial:
    size: int
    elements: int
    equal: int
    source: int
    destination: int
    backwards: bool


def trials() -> list[Trial]:
    generator = random.Random(7)
    found = []
    for _ in range(120):
        size = generator.choice((1, 2, 4))
        elements = generator.choice((0, 1, 2, 3, 7, 33, 700, 2500))
        # Pages are crossed by either operand, and by a single element of it.
        source, destination = 0x8000 + generator.randrange(4096), 0xC000 + generator.randrange(4096)
        found.append(
            Trial(size, elements, generator.randrange(elements + 2), source, destination, generator.random() < 0.1)
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
        other[trial.equal * trial.size + generator.randrange(trial.size)] ^= generator.randrange(1, 256)
    cpu.memory.write(trial.source, data)
    cpu.memory.write(trial.destination, bytes(other))
    state = cpu.state
    state.segments[1].load(0, 0, 0xFFFF, 0x93)
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
        if one_by_one:
            while not cpu.state.halted:
                engine.step()
        else:
            engine.run(3)
        gpr = cpu.state.gpr
        outcomes.append((gpr[ECX], gpr[ESI], gpr[EDI], cpu.state.eflags, cpu.clock.icount))
        engine.leave()
        cpu.memory.close()
    assert outcomes[0] == outcomes[1]
