"""The Unicorn oracle itself: it reports exceptions, forgets them, and runs both modes."""

from __future__ import annotations

import pytest

from machine.flags import CF, STATUS_MASK, ZF
from tests.oracles.unicorn_cpu import UnicornCpu

REGISTERS = (1, 2, 3, 4, 0x1000, 6, 7, 8)


@pytest.fixture
def cpu() -> UnicornCpu:
    return UnicornCpu(32)


def test_runs_one_instruction(cpu: UnicornCpu) -> None:
    outcome = cpu.run(b"\x01\xc8\x01\xc8", REGISTERS, CF)  # add eax, ecx, twice
    assert outcome.gpr == (3, *REGISTERS[1:])
    assert (outcome.advance_bytes, outcome.vector) == (2, None)
    assert outcome.eflags & CF == 0


def test_runs_to_the_end_of_a_sequence(cpu: UnicornCpu) -> None:
    assert cpu.run(b"\x01\xc8\x01\xc8", REGISTERS, 0, instructions=0).gpr[0] == 5


def test_16_bit_mode_has_16_bit_operands_and_addresses() -> None:
    cpu = UnicornCpu(16)
    outcome = cpu.run(b"\x01\xc8", (0x1_FFFF, 1, *REGISTERS[2:]), 0)  # add ax, cx
    assert outcome.gpr[0] == 0x1_0000
    assert outcome.eflags & STATUS_MASK & (CF | ZF) == CF | ZF
    outcome = cpu.run(b"\x8b\x07", (0, 0, 0, 0x2000, 0x1000, 0, 0, 0), 0, {0x2000: b"\x34\x12"})  # mov ax, [bx]
    assert outcome.gpr[0] == 0x1234


def test_memory_is_written_before_and_read_after(cpu: UnicornCpu) -> None:
    cpu.run(b"\x01\x03", (5, 0, 0, 0x2000, 0x1000, 0, 0, 0), 0, {0x2000: b"\x02\0\0\0"})  # add [ebx], eax
    assert cpu.read(0x2000, 4) == b"\x07\0\0\0"


@pytest.mark.parametrize(
    ("code", "vector"),
    [(b"\xf7\xf1", 0), (b"\x0f\x0b", 6), (b"\x8b\x00", 14), (b"\xcc", 3), (b"\xcd\x21", 0x21)],
    ids=["div ecx", "ud2", "mov eax, [eax]", "int3", "int 21h"],
)
def test_exceptions_are_reported_each_time_and_forgotten(cpu: UnicornCpu, code: bytes, vector: int) -> None:
    for _ in range(3):
        assert cpu.run(code, (0xF000_0000, 0, *REGISTERS[2:]), 0).vector == vector
        assert cpu.run(b"\x01\xc8", REGISTERS, 0).gpr[0] == 3


def test_code_slots_are_used_again(cpu: UnicornCpu) -> None:
    for value in range(1100):
        assert cpu.run(b"\xb8" + value.to_bytes(4, "little"), REGISTERS, 0).gpr[0] == value
    assert cpu.run(b"\xb8\0\0\0\0", REGISTERS, 0).gpr[0] == 0
