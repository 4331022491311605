"""Operands of more than four bytes whose ends are in pages of different kinds."""

from __future__ import annotations

import pytest

from machine.instructions.wide import load_bytes, store_bytes
from tests.oracles.reference import build_cpu

PAGE = 0x5_0000
DATA = bytes(range(1, 17))


@pytest.mark.parametrize("size", [8, 10, 16])
@pytest.mark.parametrize("known", ["none", "first", "second"])
def test_no_byte_more_and_none_less(size: int, known: str) -> None:
    """A page is known once it was accessed; the other part takes the slow path, in accesses of 1, 2, 4 or 8 bytes."""
    cpu = build_cpu(2)
    cpu.reset()
    try:
        for before in range(1, size):
            cpu.mmu.flush()
            at = PAGE - before
            if known != "none":
                known_at = PAGE - 64 if known == "first" else PAGE + 64
                cpu.mmu.load_linear(known_at, 4, False)
                cpu.mmu.store_linear(known_at, 4, 0, False)
            cpu.memory.write(PAGE - 32, b"\xee" * 64)
            store_bytes(cpu, at, DATA[:size])
            expected = (b"\xee" * (32 - before) + DATA[:size]).ljust(64, b"\xee")
            assert cpu.memory.read(PAGE - 32, 64) == expected
            cpu.mmu.flush()
            if known != "none":
                cpu.mmu.load_linear(PAGE - 64 if known == "first" else PAGE + 64, 4, False)
            assert load_bytes(cpu, at, size) == DATA[:size]
    finally:
        cpu.memory.close()
