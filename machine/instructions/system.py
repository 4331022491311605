"""Rows of system instructions: flags, control and debug registers, MSRs, CPUID, ports, HLT, SYSENTER and SYSEXIT.

Operands and closures are here; the rules of protection are `machine.control`'s.
"""

from __future__ import annotations

from iced_x86 import Code, Instruction, Register

from machine import control
from machine.cpu import Cpu
from machine.faults import GuestFault, general_protection
from machine.flags import CF, DF
from machine.instructions.operands import (
    MASKS,
    address,
    is_memory,
    read,
    read_word,
    size_bytes,
    write,
)
from machine.instructions.table import Build, Effect, Operation, Row
from machine.state import CR0_PE, CR4_TSD, EAX, EBX, ECX, EDX, ESP, MASK32
from machine.transfers import sysenter, sysexit


def build_clear(flag: int) -> Build:
    """CLC, CLD."""

    def build(cpu: Cpu, _instruction: Instruction) -> Operation:
        state, others = cpu.state, ~flag

        def clear() -> None:
            state.eflags &= others

        return clear

    return build


def build_set(flag: int) -> Build:
    """STC, STD."""

    def build(cpu: Cpu, _instruction: Instruction) -> Operation:
        state = cpu.state

        def set_flag() -> None:
            state.eflags |= flag

        return set_flag

    return build


def build_cmc(cpu: Cpu, _instruction: Instruction) -> Operation:
    """CMC."""
    state = cpu.state

    def complement() -> None:
        state.eflags ^= CF

    return complement


def build_cli(cpu: Cpu, _instruction: Instruction) -> Operation:
    """CLI."""
    return lambda: control.clear_interrupts(cpu)


def build_sti(cpu: Cpu, _instruction: Instruction) -> Operation:
    """STI: interrupts are held off for one more instruction."""
    return lambda: control.set_interrupts(cpu)


def build_pushf(cpu: Cpu, instruction: Instruction) -> Operation:
    """PUSHF, PUSHFD."""
    size = 2 if instruction.code == Code.PUSHFW else 4
    return lambda: cpu.push(control.push_flags_image(cpu, size), size)


def build_popf(cpu: Cpu, instruction: Instruction) -> Operation:
    """POPF, POPFD: which flags change depends on CPL and IOPL."""
    size = 2 if instruction.code == Code.POPFW else 4
    state = cpu.state

    def pop() -> None:
        old = state.gpr[ESP]
        value = cpu.pop(size)
        try:
            control.pop_flags(cpu, value, size)
        except GuestFault:
            state.gpr[ESP] = old
            raise

    return pop


def build_hlt(cpu: Cpu, _instruction: Instruction) -> Operation:
    """HLT."""
    state = cpu.state

    def halt() -> None:
        control.check_privilege(cpu)
        state.halted = 1

    return halt


# Control and debug registers.


def build_mov_from_cr(cpu: Cpu, instruction: Instruction) -> Operation:
    """MOV r32, CRn."""
    put, number = write(cpu, instruction, 0), _number(instruction, 1, "CR")

    def move() -> None:
        control.check_privilege(cpu)
        put(control.read_cr(cpu, number))

    return move


def build_mov_to_cr(cpu: Cpu, instruction: Instruction) -> Operation:
    """MOV CRn, r32."""
    source, number = read(cpu, instruction, 1), _number(instruction, 0, "CR")

    def move() -> None:
        control.check_privilege(cpu)
        control.write_cr(cpu, number, source())

    return move


def build_mov_from_dr(cpu: Cpu, instruction: Instruction) -> Operation:
    """MOV r32, DRn; `machine.control` asks for the privilege, after DR4 and DR5."""
    put, number = write(cpu, instruction, 0), _number(instruction, 1, "DR")

    def move() -> None:
        put(control.read_dr(cpu, number))

    return move


def build_mov_to_dr(cpu: Cpu, instruction: Instruction) -> Operation:
    """MOV DRn, r32; as above."""
    source, number = read(cpu, instruction, 1), _number(instruction, 0, "DR")

    def move() -> None:
        control.write_dr(cpu, number, source())

    return move


def _number(instruction: Instruction, n: int, prefix: str) -> int:
    base = {"CR": Register.CR0, "DR": Register.DR0}[prefix]
    return instruction.op_register(n) - base


def build_clts(cpu: Cpu, _instruction: Instruction) -> Operation:
    """CLTS."""

    def clear() -> None:
        control.check_privilege(cpu)
        control.clear_task_switched(cpu)

    return clear


def build_smsw(cpu: Cpu, instruction: Instruction) -> Operation:
    """SMSW: 16 bits into memory; a 32-bit register gets all of CR0. Not privileged."""
    state = cpu.state
    if is_memory(instruction, 0):
        segment, offset = address(cpu, instruction)
        return lambda: cpu.mmu.store16(segment, offset(), state.cr0 & 0xFFFF)
    put, mask = write(cpu, instruction, 0), MASKS[size_bytes(instruction, 0)]
    return lambda: put(state.cr0 & mask)


def build_lmsw(cpu: Cpu, instruction: Instruction) -> Operation:
    """LMSW: PE can be set and not cleared."""
    source = read_word(cpu, instruction, 0)

    def load() -> None:
        control.check_privilege(cpu)
        control.load_msw(cpu, source())

    return load


def build_rdmsr(cpu: Cpu, _instruction: Instruction) -> Operation:
    """RDMSR."""
    gpr = cpu.state.gpr

    def read_msr() -> None:
        control.check_privilege(cpu)
        value = control.read_msr(cpu, gpr[ECX])
        gpr[EAX], gpr[EDX] = value & MASK32, value >> 32

    return read_msr


def build_wrmsr(cpu: Cpu, _instruction: Instruction) -> Operation:
    """WRMSR."""
    gpr = cpu.state.gpr

    def write_msr() -> None:
        control.check_privilege(cpu)
        control.write_msr(cpu, gpr[ECX], gpr[EDX] << 32 | gpr[EAX])

    return write_msr


def build_rdtsc(cpu: Cpu, _instruction: Instruction) -> Operation:
    """RDTSC: privileged if CR4.TSD is set."""
    state, gpr = cpu.state, cpu.state.gpr

    def read_counter() -> None:
        if state.cr4 & CR4_TSD and state.cpl and state.cr0 & CR0_PE:
            raise general_protection()
        value = cpu.tsc
        gpr[EAX], gpr[EDX] = value & MASK32, value >> 32

    return read_counter


def build_cpuid(cpu: Cpu, _instruction: Instruction) -> Operation:
    """CPUID."""
    gpr = cpu.state.gpr

    def identify() -> None:
        gpr[EAX], gpr[EBX], gpr[ECX], gpr[EDX] = cpu.model.leaf(gpr[EAX])

    return identify


def build_cache(cpu: Cpu, _instruction: Instruction) -> Operation:
    """INVD, WBINVD: there is no cache to see."""
    return lambda: control.check_privilege(cpu)


def build_invlpg(cpu: Cpu, instruction: Instruction) -> Operation:
    """INVLPG: the operand's address, whatever its segment allows."""
    segment, offset = address(cpu, instruction)

    def invalidate() -> None:
        control.check_privilege(cpu)
        cpu.mmu.forget_page((segment.base + offset()) & MASK32)

    return invalidate


# Ports and fast system calls.


def build_in(cpu: Cpu, instruction: Instruction) -> Operation:
    """IN AL/AX/EAX from an immediate port or DX."""
    size = size_bytes(instruction, 0)
    put, port = write(cpu, instruction, 0), read(cpu, instruction, 1)

    def read_port() -> None:
        control.check_io(cpu, port(), size)
        put(cpu.ports.load(port(), size))

    return read_port


def build_out(cpu: Cpu, instruction: Instruction) -> Operation:
    """OUT from AL/AX/EAX to an immediate port or DX."""
    size = size_bytes(instruction, 1)
    port, source = read(cpu, instruction, 0), read(cpu, instruction, 1)

    def write_port() -> None:
        control.check_io(cpu, port(), size)
        cpu.ports.store(port(), size, source())

    return write_port


def build_sysenter(cpu: Cpu, _instruction: Instruction) -> Operation:
    """SYSENTER."""
    return lambda: sysenter(cpu)


def build_sysexit(cpu: Cpu, _instruction: Instruction) -> Operation:
    """SYSEXIT."""
    return lambda: sysexit(cpu)


ROWS = (
    Row("clc", build_clear(CF)),
    Row("stc", build_set(CF)),
    Row("cmc", build_cmc),
    Row("cld", build_clear(DF)),
    Row("std", build_set(DF)),
    Row("cli", build_cli, Effect.SYSTEM),
    Row("sti", build_sti, Effect.SYSTEM),
    Row("pushf", build_pushf),
    Row("pushfd", build_pushf),
    Row("popf", build_popf, Effect.SYSTEM),
    Row("popfd", build_popf, Effect.SYSTEM),
    Row("hlt", build_hlt, Effect.SYSTEM),
    Row("mov_from_cr", build_mov_from_cr, Effect.SYSTEM),
    Row("mov_to_cr", build_mov_to_cr, Effect.SYSTEM),
    Row("mov_from_dr", build_mov_from_dr, Effect.SYSTEM),
    Row("mov_to_dr", build_mov_to_dr, Effect.SYSTEM),
    Row("clts", build_clts, Effect.SYSTEM),
    Row("smsw", build_smsw),
    Row("lmsw", build_lmsw, Effect.SYSTEM),
    Row("rdmsr", build_rdmsr, Effect.SYSTEM),
    Row("wrmsr", build_wrmsr, Effect.SYSTEM),
    Row("rdtsc", build_rdtsc, Effect.SYSTEM),
    Row("cpuid", build_cpuid),
    Row("invd", build_cache),
    Row("wbinvd", build_cache),
    Row("invlpg", build_invlpg, Effect.SYSTEM),
    Row("in", build_in, Effect.SYSTEM),
    Row("out", build_out, Effect.SYSTEM),
    Row("sysenter", build_sysenter, Effect.SYSTEM_BRANCH),
    Row("sysexit", build_sysexit, Effect.SYSTEM_BRANCH),
)
