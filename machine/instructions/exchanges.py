"""Rows of XCHG, XADD, CMPXCHG and CMPXCHG8B: read and write in one instruction, also where nothing changes.

LOCK is the decoder's to allow, and has no effect on a machine with one CPU.
"""

from __future__ import annotations

from iced_x86 import Instruction

from machine.cpu import Cpu
from machine.flags import ZF
from machine.instructions.operands import address, is_memory, modify_of, read, size_bytes, store_of, write
from machine.instructions.table import Operation, Row
from machine.state import EAX, EBX, ECX, EDX, MASK32


def build_exchange(cpu: Cpu, instruction: Instruction) -> Operation:
    """XCHG; with memory it is a read-modify-write."""
    size = size_bytes(instruction, 0)
    if not is_memory(instruction, 0):
        read_a, read_b = read(cpu, instruction, 0), read(cpu, instruction, 1)
        write_a, write_b = write(cpu, instruction, 0), write(cpu, instruction, 1)

        def swap() -> None:
            a = read_a()
            write_a(read_b())
            write_b(a)

        return swap
    segment, offset = address(cpu, instruction)
    modify, store = modify_of(cpu, size), store_of(cpu, size)
    get, put = read(cpu, instruction, 1), write(cpu, instruction, 1)

    def exchange() -> None:
        at = offset()
        value = modify(segment, at)
        store(segment, at, get())
        put(value)

    return exchange


def build_xadd(cpu: Cpu, instruction: Instruction) -> Operation:
    """XADD: destination = sum, source = old destination."""
    size = size_bytes(instruction, 0)
    compute, state = cpu.alu.binary["add"][8 * size], cpu.state
    get, put = read(cpu, instruction, 1), write(cpu, instruction, 1)
    if not is_memory(instruction, 0):
        get_first, put_first = read(cpu, instruction, 0), write(cpu, instruction, 0)

        def add_registers() -> None:
            old = get_first()
            result, flags = compute(old, get(), state.eflags)
            put(old)
            put_first(result)
            state.eflags = flags

        return add_registers
    segment, offset = address(cpu, instruction)
    modify, store = modify_of(cpu, size), store_of(cpu, size)

    def add_memory() -> None:
        at = offset()
        old = modify(segment, at)
        result, flags = compute(old, get(), state.eflags)
        store(segment, at, result)
        put(old)
        state.eflags = flags

    return add_memory


def build_cmpxchg(cpu: Cpu, instruction: Instruction) -> Operation:
    """CMPXCHG: memory is written also when the comparison fails (with what it held)."""
    size = size_bytes(instruction, 0)
    compute, state = cpu.alu.ternary["cmpxchg"][8 * size], cpu.state
    gpr, mask = state.gpr, (1 << 8 * size) - 1
    keep = ~mask & MASK32
    source = read(cpu, instruction, 1)
    if not is_memory(instruction, 0):
        get, put = read(cpu, instruction, 0), write(cpu, instruction, 0)

        def exchange_register() -> None:
            old = get()
            result, flags = compute(gpr[EAX] & mask, old, source(), state.eflags)
            if flags & ZF:
                put(result)
            else:
                gpr[EAX] = gpr[EAX] & keep | old
            state.eflags = flags

        return exchange_register
    segment, offset = address(cpu, instruction)
    modify, store = modify_of(cpu, size), store_of(cpu, size)

    def exchange_memory() -> None:
        at = offset()
        old = modify(segment, at)
        result, flags = compute(gpr[EAX] & mask, old, source(), state.eflags)
        store(segment, at, result)
        if not flags & ZF:
            gpr[EAX] = gpr[EAX] & keep | old
        state.eflags = flags

    return exchange_memory


def build_cmpxchg8b(cpu: Cpu, instruction: Instruction) -> Operation:
    """CMPXCHG8B: memory is written in either case."""
    compute, state, mmu = cpu.alu.ternary["cmpxchg8b"][64], cpu.state, cpu.mmu
    gpr = state.gpr
    segment, offset = address(cpu, instruction)

    def exchange() -> None:
        at = offset()
        old = mmu.load_to_modify(segment, at, 8)
        result, flags = compute(gpr[EDX] << 32 | gpr[EAX], old, gpr[ECX] << 32 | gpr[EBX], state.eflags)
        mmu.store(segment, at, 8, result)
        if not flags & ZF:
            gpr[EAX], gpr[EDX] = old & MASK32, old >> 32
        state.eflags = flags

    return exchange


ROWS = (
    Row("xchg", build_exchange),
    Row("xadd", build_xadd),
    Row("cmpxchg", build_cmpxchg),
    Row("cmpxchg8b", build_cmpxchg8b),
)
