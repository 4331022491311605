"""Rows of system instructions: flags, control and debug registers, descriptor tables, ports, CPUID, MSRs, HLT.

Operands and closures are here; the rules of protection are `machine.control`'s and `machine.segmentation`'s.
"""

from __future__ import annotations

from iced_x86 import Code, Instruction, Register

from machine import control, segmentation
from machine.cpu import Cpu
from machine.faults import GuestFault, general_protection, invalid_opcode
from machine.flags import CF, DF, VM, ZF
from machine.instructions.operands import (
    MASKS,
    Read,
    address,
    address_mask,
    gpr_number,
    is_memory,
    read,
    size_bytes,
    write,
)
from machine.instructions.table import CODE_NAMES, Effect, Operation, Row
from machine.state import CR0_PE, CR4_TSD, EAX, EBX, ECX, EDX, ESP, MASK32
from machine.transfers import sysenter, sysexit


def build_clc(cpu: Cpu, _instruction: Instruction) -> Operation:
    """CLC."""
    state = cpu.state

    def clear() -> None:
        state.eflags &= ~CF

    return clear


def build_stc(cpu: Cpu, _instruction: Instruction) -> Operation:
    """STC."""
    state = cpu.state

    def set_carry() -> None:
        state.eflags |= CF

    return set_carry


def build_cmc(cpu: Cpu, _instruction: Instruction) -> Operation:
    """CMC."""
    state = cpu.state

    def complement() -> None:
        state.eflags ^= CF

    return complement


def build_cld(cpu: Cpu, _instruction: Instruction) -> Operation:
    """CLD."""
    state = cpu.state

    def clear() -> None:
        state.eflags &= ~DF

    return clear


def build_std(cpu: Cpu, _instruction: Instruction) -> Operation:
    """STD."""
    state = cpu.state

    def set_direction() -> None:
        state.eflags |= DF

    return set_direction


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
    source = _word(cpu, instruction)

    def load() -> None:
        control.check_privilege(cpu)
        control.load_msw(cpu, source())

    return load


def _word(cpu: Cpu, instruction: Instruction) -> Read:
    """A closure that reads operand 0, of which 16 bits count whatever the operand size is."""
    if is_memory(instruction, 0):
        segment, offset = address(cpu, instruction)
        return lambda: cpu.mmu.load16(segment, offset())
    register = read(cpu, instruction, 0)
    return lambda: register() & 0xFFFF


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


# Descriptor tables and selectors.


def build_store_table(cpu: Cpu, instruction: Instruction) -> Operation:
    """SGDT, SIDT: with a 16-bit operand the base's top byte is stored too, as current processors do."""
    table = cpu.state.gdtr if CODE_NAMES[instruction.code].startswith("SGDT") else cpu.state.idtr
    segment, offset = address(cpu, instruction)
    mmu, mask = cpu.mmu, address_mask(instruction)

    def store() -> None:
        at = offset()
        base_at = (at + 2) & mask
        mmu.check(segment, at, 2, write=True)
        mmu.check(segment, base_at, 4, write=True)
        mmu.store16(segment, at, table.limit)
        mmu.store32(segment, base_at, table.base)

    return store


def build_load_table(cpu: Cpu, instruction: Instruction) -> Operation:
    """LGDT, LIDT: a 16-bit operand size loads 24 bits of the base."""
    name = CODE_NAMES[instruction.code]
    table = cpu.state.gdtr if name.startswith("LGDT") else cpu.state.idtr
    base_mask = 0xFF_FFFF if name.endswith("_16") else MASK32
    segment, offset = address(cpu, instruction)
    mmu, mask = cpu.mmu, address_mask(instruction)

    def load() -> None:
        control.check_privilege(cpu)
        at = offset()
        limit = mmu.load16(segment, at)
        base = mmu.load32(segment, (at + 2) & mask)
        table.limit, table.base = limit, base & base_mask

    return load


def _need_protected_mode(cpu: Cpu) -> None:
    if not cpu.state.cr0 & CR0_PE or cpu.state.eflags & VM:
        raise invalid_opcode()


def build_store_selector(cpu: Cpu, instruction: Instruction) -> Operation:
    """SLDT, STR: 16 bits into memory, zero-extended into a register."""
    source = cpu.state.ldtr if CODE_NAMES[instruction.code].startswith("SLDT") else cpu.state.tr
    if is_memory(instruction, 0):
        segment, offset = address(cpu, instruction)

        def store() -> None:
            _need_protected_mode(cpu)
            cpu.mmu.store16(segment, offset(), source.selector)

        return store
    put = write(cpu, instruction, 0)

    def move() -> None:
        _need_protected_mode(cpu)
        put(source.selector)

    return move


def build_load_selector(cpu: Cpu, instruction: Instruction) -> Operation:
    """LLDT, LTR."""
    is_ldt = CODE_NAMES[instruction.code].startswith("LLDT")
    load = segmentation.load_ldt if is_ldt else segmentation.load_task_register
    source = _word(cpu, instruction)

    def load_selector() -> None:
        _need_protected_mode(cpu)
        control.check_privilege(cpu)
        load(cpu, source())

    return load_selector


def build_verify(cpu: Cpu, instruction: Instruction) -> Operation:
    """VERR, VERW: ZF says whether the segment can be read or written."""
    for_writing = CODE_NAMES[instruction.code].startswith("VERW")
    source, state = _word(cpu, instruction), cpu.state

    def verify() -> None:
        _need_protected_mode(cpu)
        allowed = segmentation.verify(cpu, source(), for_writing)
        state.eflags = state.eflags | ZF if allowed else state.eflags & ~ZF

    return verify


def build_inspect(cpu: Cpu, instruction: Instruction) -> Operation:
    """LAR, LSL: ZF says whether there is an answer; without one the register keeps its value."""
    is_lar = CODE_NAMES[instruction.code].startswith("LAR")
    inspect = segmentation.access_rights if is_lar else segmentation.segment_limit
    put, mask = write(cpu, instruction, 0), MASKS[size_bytes(instruction, 0)]
    state = cpu.state
    if is_memory(instruction, 1):
        segment, offset = address(cpu, instruction)

        def source() -> int:
            return cpu.mmu.load16(segment, offset())
    else:
        source = read(cpu, instruction, 1)

    def look() -> None:
        _need_protected_mode(cpu)
        value = inspect(cpu, source() & 0xFFFF)
        if value is None:
            state.eflags &= ~ZF
        else:
            put(value & mask)
            state.eflags |= ZF

    return look


def build_arpl(cpu: Cpu, instruction: Instruction) -> Operation:
    """ARPL r/m16, r16: raises the RPL of the first to that of the second; ZF says whether it had to.

    Memory is written, and needs to be writable, only if the RPL changes.
    """
    source, state, mmu = read(cpu, instruction, 1), cpu.state, cpu.mmu
    if is_memory(instruction, 0):
        segment, offset = address(cpu, instruction)

        def adjust_memory() -> None:
            _need_protected_mode(cpu)
            at = offset()
            selector, rpl = mmu.load16(segment, at), source() & 3
            if selector & 3 < rpl:
                mmu.store16(segment, at, selector & ~3 | rpl)
                state.eflags |= ZF
            else:
                state.eflags &= ~ZF

        return adjust_memory
    gpr, n = state.gpr, gpr_number(instruction.op_register(0))

    def adjust() -> None:
        _need_protected_mode(cpu)
        selector, rpl = gpr[n], source() & 3
        if selector & 3 < rpl:
            gpr[n] = selector & ~3 & MASK32 | rpl
            state.eflags |= ZF
        else:
            state.eflags &= ~ZF

    return adjust


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
    Row("clc", build_clc),
    Row("stc", build_stc),
    Row("cmc", build_cmc),
    Row("cld", build_cld),
    Row("std", build_std),
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
    Row("sgdt", build_store_table),
    Row("sidt", build_store_table),
    Row("lgdt", build_load_table),
    Row("lidt", build_load_table),
    Row("sldt", build_store_selector),
    Row("str", build_store_selector),
    Row("lldt", build_load_selector),
    Row("ltr", build_load_selector, Effect.SYSTEM),
    Row("verr", build_verify),
    Row("verw", build_verify),
    Row("lar", build_inspect),
    Row("lsl", build_inspect),
    Row("arpl", build_arpl),
    Row("in", build_in, Effect.SYSTEM),
    Row("out", build_out, Effect.SYSTEM),
    Row("sysenter", build_sysenter, Effect.SYSTEM_BRANCH),
    Row("sysexit", build_sysexit, Effect.SYSTEM_BRANCH),
)
