"""Rows about segments: selectors, far pointers, descriptor tables, and the instructions that look at descriptors.

Operands and the order of accesses are here; what may be loaded, and who may look, is `machine.segmentation`'s.
"""

from __future__ import annotations

from iced_x86 import Instruction, Mnemonic

from machine import control, segmentation
from machine.cpu import Cpu
from machine.faults import invalid_opcode
from machine.flags import VM, ZF
from machine.instructions.operands import (
    MASKS,
    address,
    address_mask,
    gpr_number,
    is_memory,
    read,
    read_register,
    read_word,
    segment_number,
    size_bytes,
    stack_bytes,
    write,
    write_register,
)
from machine.instructions.table import CODE_NAMES, Effect, Operation, Row
from machine.segmentation import load_segment
from machine.state import CR0_PE, DS, ES, ESP, FS, GS, MASK32, SHADOW_MOV_SS, SS

_FAR_POINTERS = {Mnemonic.LES: ES, Mnemonic.LSS: SS, Mnemonic.LDS: DS, Mnemonic.LFS: FS, Mnemonic.LGS: GS}


def build_mov_from_segment(cpu: Cpu, instruction: Instruction) -> Operation:
    """MOV r/m, Sreg: 16 bits into memory; a 32-bit register is zero-extended."""
    selector = read_register(cpu.state, instruction.op_register(1))
    if is_memory(instruction, 0):
        segment, offset = address(cpu, instruction)
        store16 = cpu.mmu.store16
        return lambda: store16(segment, offset(), selector())
    put = write_register(cpu.state, instruction.op_register(0))
    return lambda: put(selector())


def build_mov_to_segment(cpu: Cpu, instruction: Instruction) -> Operation:
    """MOV Sreg, r/m16: interrupts and debug traps are held off for one instruction after a load of SS."""
    number, source = segment_number(instruction.op_register(0)), read_word(cpu, instruction, 1)
    state = cpu.state

    def load() -> None:
        load_segment(cpu, number, source())
        if number == SS:
            state.shadow = SHADOW_MOV_SS

    return load


def build_load_far_pointer(cpu: Cpu, instruction: Instruction) -> Operation:
    """LES, LDS, LSS, LFS, LGS: offset and selector from memory; the register changes only if the selector loads."""
    number = _FAR_POINTERS[instruction.mnemonic]
    size = size_bytes(instruction, 0)
    segment, offset = address(cpu, instruction)
    mmu, mask = cpu.mmu, address_mask(instruction)
    put = write_register(cpu.state, instruction.op_register(0))

    def load() -> None:
        at = offset()
        value = mmu.load(segment, at, size)
        selector = mmu.load16(segment, (at + size) & mask)
        load_segment(cpu, number, selector)
        put(value)

    return load


def build_pop_segment(cpu: Cpu, instruction: Instruction) -> Operation:
    """POP Sreg: the whole operand is read, and ESP moves past it once the selector, its low half, has loaded."""
    size = stack_bytes(instruction)
    number = segment_number(instruction.op_register(0))
    state, mmu = cpu.state, cpu.mmu

    def pop() -> None:
        offset = state.gpr[ESP] & cpu.stack_mask
        selector = mmu.load(state.segments[SS], offset, size) & 0xFFFF
        mask = cpu.stack_mask  # of the stack that was popped: POP SS may change its width
        load_segment(cpu, number, selector)
        state.gpr[ESP] = state.gpr[ESP] & ~mask & MASK32 | (offset + size) & mask
        if number == SS:
            state.shadow = SHADOW_MOV_SS

    return pop


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
    source = read_word(cpu, instruction, 0)

    def load_selector() -> None:
        _need_protected_mode(cpu)
        control.check_privilege(cpu)
        load(cpu, source())

    return load_selector


def build_verify(cpu: Cpu, instruction: Instruction) -> Operation:
    """VERR, VERW: ZF says whether the segment can be read or written."""
    for_writing = CODE_NAMES[instruction.code].startswith("VERW")
    source, state = read_word(cpu, instruction, 0), cpu.state

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
    state, source = cpu.state, read_word(cpu, instruction, 1)

    def look() -> None:
        _need_protected_mode(cpu)
        value = inspect(cpu, source())
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


ROWS = (
    Row("mov_from_sreg", build_mov_from_segment),
    Row("mov_to_sreg", build_mov_to_segment, Effect.SYSTEM),
    Row("pop_sreg", build_pop_segment, Effect.SYSTEM),
    Row("lds", build_load_far_pointer, Effect.SYSTEM),
    Row("les", build_load_far_pointer, Effect.SYSTEM),
    Row("lss", build_load_far_pointer, Effect.SYSTEM),
    Row("lfs", build_load_far_pointer, Effect.SYSTEM),
    Row("lgs", build_load_far_pointer, Effect.SYSTEM),
    Row("sgdt", build_store_table),
    Row("sidt", build_store_table),
    Row("lgdt", build_load_table, Effect.SYSTEM),
    Row("lidt", build_load_table, Effect.SYSTEM),
    Row("sldt", build_store_selector),
    Row("str", build_store_selector),
    Row("lldt", build_load_selector, Effect.SYSTEM),
    Row("ltr", build_load_selector, Effect.SYSTEM),
    Row("verr", build_verify),
    Row("verw", build_verify),
    Row("lar", build_inspect),
    Row("lsl", build_inspect),
    Row("arpl", build_arpl),
)
