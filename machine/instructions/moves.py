"""Rows that move data: MOV, extensions, the stack, LEA, XLAT, BOUND.

Loads and stores of segment, control and debug registers are elsewhere.
"""

from __future__ import annotations

from iced_x86 import Code, Instruction, OpKind, Register

from machine.cpu import Cpu
from machine.faults import GuestFault, Vector
from machine.instructions.operands import (
    CONDITION_NAMES,
    MASKS,
    address,
    address_mask,
    condition,
    effective_address,
    gpr_number,
    is_memory,
    load_of,
    read,
    size_bytes,
    stack_bytes,
    store_of,
    string_source,
    write,
    write_register,
)
from machine.instructions.table import Operation, Row
from machine.state import EAX, EBP, EBX, ESP, MASK32, SEG_DB, SS


def build_nop(_cpu: Cpu, _instruction: Instruction) -> Operation:
    """NOP, PAUSE and the reserved NOPs: a memory operand is not touched."""
    return _nop


def _nop() -> None:
    return


def build_mov(cpu: Cpu, instruction: Instruction) -> Operation:
    """MOV between general-purpose registers, memory and immediates; segment, control and debug registers elsewhere."""
    gpr = cpu.state.gpr
    first, second = instruction.op_kind(0), instruction.op_kind(1)
    if first == OpKind.REGISTER:
        register = instruction.op_register(0)
        if size_bytes(instruction, 0) == 4:
            d = gpr_number(register)
            if second == OpKind.REGISTER and Register.EAX <= instruction.op_register(1) <= Register.EDI:
                s = gpr_number(instruction.op_register(1))

                def move_register() -> None:
                    gpr[d] = gpr[s]

                return move_register
            if second == OpKind.MEMORY:
                segment, offset = address(cpu, instruction)
                load32 = cpu.mmu.load32

                def load() -> None:
                    gpr[d] = load32(segment, offset())

                return load
            value = read(cpu, instruction, 1)

            def move32() -> None:
                gpr[d] = value()

            return move32
        source, put = read(cpu, instruction, 1), write_register(cpu.state, register)

        def move() -> None:
            put(source())

        return move
    segment, offset = address(cpu, instruction)
    store = store_of(cpu, size_bytes(instruction, 0))
    source = read(cpu, instruction, 1)

    def store_value() -> None:
        store(segment, offset(), source())

    return store_value


def build_extend(cpu: Cpu, instruction: Instruction) -> Operation:
    """MOVZX."""
    source, put = read(cpu, instruction, 1), write(cpu, instruction, 0)
    return lambda: put(source())


def build_extend_sign(cpu: Cpu, instruction: Instruction) -> Operation:
    """MOVSX."""
    source, put = read(cpu, instruction, 1), write(cpu, instruction, 0)
    sign = 1 << 8 * size_bytes(instruction, 1) - 1
    mask = MASKS[size_bytes(instruction, 0)]
    return lambda: put((source() ^ sign) - sign & mask)


def build_lea(cpu: Cpu, instruction: Instruction) -> Operation:
    """LEA: the offset, cut or zero-extended to the operand size; with a register operand it is #UD (the decoder's)."""
    offset = effective_address(cpu.state, instruction)
    put = write_register(cpu.state, instruction.op_register(0))
    mask = MASKS[size_bytes(instruction, 0)]
    return lambda: put(offset() & mask)


def build_cmov(cpu: Cpu, instruction: Instruction) -> Operation:
    """CMOVcc: the source is read, and may fault, whether the condition holds or not."""
    holds = condition(instruction)
    source, put = read(cpu, instruction, 1), write(cpu, instruction, 0)
    state = cpu.state

    def move() -> None:
        value = source()
        if holds(state.eflags):
            put(value)

    return move


def build_set(cpu: Cpu, instruction: Instruction) -> Operation:
    """SETcc."""
    holds = condition(instruction)
    put, state = write(cpu, instruction, 0), cpu.state
    return lambda: put(1 if holds(state.eflags) else 0)


def build_xlat(cpu: Cpu, instruction: Instruction) -> Operation:
    """XLAT: AL = [EBX + AL]."""
    mask, load8, gpr = address_mask(instruction), cpu.mmu.load8, cpu.state.gpr
    segment = string_source(cpu, instruction)

    def translate() -> None:
        gpr[EAX] = gpr[EAX] & 0xFFFF_FF00 | load8(segment, (gpr[EBX] + (gpr[EAX] & 0xFF)) & mask)

    return translate


# The stack.


def build_push(cpu: Cpu, instruction: Instruction) -> Operation:
    """PUSH r/m, imm, Sreg. ESP is read before it is decremented; a selector is zero-extended to a whole slot."""
    size = stack_bytes(instruction)
    state, mmu = cpu.state, cpu.mmu
    gpr, stack = state.gpr, state.segments[SS]
    source = read(cpu, instruction, 0)
    push = cpu.push
    if size == 4:
        store32 = mmu.store32

        def push32() -> None:
            if stack.attributes & SEG_DB:
                value = source()
                offset = (gpr[ESP] - 4) & MASK32
                store32(stack, offset, value)
                gpr[ESP] = offset
            else:
                push(source(), 4)

        return push32
    mask = 0xFFFF
    return lambda: push(source() & mask, 2)


def build_pop(cpu: Cpu, instruction: Instruction) -> Operation:
    """POP r/m. An ESP-based address is computed after the increment; a fault in the write leaves ESP as it was."""
    size = stack_bytes(instruction)
    gpr = cpu.state.gpr
    pop = cpu.pop
    if is_memory(instruction, 0):
        segment, offset = address(cpu, instruction)
        store = store_of(cpu, size)

        def pop_memory() -> None:
            old = gpr[ESP]
            value = pop(size)
            try:
                store(segment, offset(), value)
            except GuestFault:
                gpr[ESP] = old
                raise

        return pop_memory
    put = write_register(cpu.state, instruction.op_register(0))
    if size == 4:
        d = gpr_number(instruction.op_register(0))
        stack, load32 = cpu.state.segments[SS], cpu.mmu.load32

        def pop32() -> None:
            if stack.attributes & SEG_DB:
                offset = gpr[ESP]
                value = load32(stack, offset)
                gpr[ESP] = (offset + 4) & MASK32
                gpr[d] = value
            else:
                put(pop(4))

        return pop32
    return lambda: put(pop(size))


def build_pusha(cpu: Cpu, instruction: Instruction) -> Operation:
    """PUSHA, PUSHAD: the far end is checked first, so that a fault changes nothing."""
    size = stack_bytes(instruction) // 8
    state, mmu = cpu.state, cpu.mmu
    gpr, value_mask = state.gpr, MASKS[size]

    def push_all() -> None:
        mask, stack = cpu.stack_mask, state.segments[SS]
        values = [value & value_mask for value in gpr]
        offsets = [(gpr[ESP] - size * (n + 1)) & mask for n in range(8)]
        for offset in offsets:
            mmu.check(stack, offset, size, write=True)
        for offset, value in zip(offsets, values, strict=True):
            mmu.store(stack, offset, size, value)
        cpu.set_esp(offsets[-1])

    return push_all


def build_popa(cpu: Cpu, instruction: Instruction) -> Operation:
    """POPA, POPAD: the slot of ESP is skipped."""
    size = stack_bytes(instruction) // 8
    state, mmu = cpu.state, cpu.mmu
    gpr, keep = state.gpr, MASK32 & ~MASKS[size]

    def pop_all() -> None:
        mask, stack, top = cpu.stack_mask, state.segments[SS], gpr[ESP]
        values = [mmu.load(stack, (top + size * n) & mask, size) for n in range(8)]
        for n, value in enumerate(reversed(values)):
            if n != ESP:
                gpr[n] = gpr[n] & keep | value
        cpu.set_esp(top + 8 * size)

    return pop_all


def build_enter(cpu: Cpu, instruction: Instruction) -> Operation:
    """ENTER: the accesses are made in order, but every push is only checked at first, so that a fault changes nothing.

    The last check is of the new top of the stack, which must be writable though nothing is pushed there.
    """
    size = 4 if instruction.code == Code.ENTERD_IMM16_IMM8 else 2
    local_bytes, level = instruction.immediate16, instruction.immediate8_2nd & 31
    state, mmu = cpu.state, cpu.mmu
    gpr, value_mask = state.gpr, MASKS[size]

    def enter() -> None:
        mask, stack = cpu.stack_mask, state.segments[SS]
        top, frame = gpr[ESP], gpr[EBP]
        frame_pointer = top & ~mask | (top - size) & mask
        pushes: list[tuple[int, int]] = []
        pushed: dict[int, int] = {}  # byte by byte: the old frame may lie where the new one is pushed

        def push(value: int) -> None:
            offset = (top - size * (len(pushes) + 1)) & mask
            mmu.check(stack, offset, size, write=True)
            pushes.append((offset, value & value_mask))
            pushed.update((offset + n, value >> 8 * n & 0xFF) for n in range(size))

        def load(offset: int) -> int:
            data = mmu.load(stack, offset, size).to_bytes(size, "little")
            return int.from_bytes((pushed.get(offset + n, byte) for n, byte in enumerate(data)), "little")

        push(frame)
        for n in range(1, level):
            push(load((frame - size * n) & mask))
        if level:
            push(frame_pointer)
        new_top = (pushes[-1][0] - local_bytes) & mask
        mmu.check(stack, new_top, size, write=True)
        for offset, value in pushes:
            mmu.store(stack, offset, size, value)
        gpr[EBP] = frame & ~value_mask | frame_pointer & value_mask
        cpu.set_esp(new_top)

    return enter


def build_leave(cpu: Cpu, instruction: Instruction) -> Operation:
    """LEAVE: ESP = EBP, then pop EBP."""
    size = 4 if instruction.code == Code.LEAVED else 2
    state, mmu = cpu.state, cpu.mmu
    gpr, keep = state.gpr, MASK32 & ~MASKS[size]

    def leave() -> None:
        mask = cpu.stack_mask
        offset = gpr[EBP] & mask
        value = mmu.load(state.segments[SS], offset, size)
        cpu.set_esp(offset + size)
        gpr[EBP] = gpr[EBP] & keep | value

    return leave


def build_bound(cpu: Cpu, instruction: Instruction) -> Operation:
    """BOUND: #BR unless lower <= index <= upper, signed."""
    size = size_bytes(instruction, 0)
    segment, offset = address(cpu, instruction)
    load, index = load_of(cpu, size), read(cpu, instruction, 0)
    sign, mask = 1 << 8 * size - 1, address_mask(instruction)

    def check() -> None:
        at = offset()
        lower = load(segment, at)
        upper = load(segment, (at + size) & mask)
        if not lower ^ sign <= index() ^ sign <= upper ^ sign:
            raise GuestFault(Vector.BR)

    return check


ROWS = (
    Row("nop", build_nop),
    Row("pause", build_nop),
    Row("mov", build_mov),
    Row("movzx", build_extend),
    Row("movsx", build_extend_sign),
    Row("lea", build_lea),
    *(Row(f"cmov{name}", build_cmov) for name in CONDITION_NAMES),
    *(Row(f"set{name}", build_set) for name in CONDITION_NAMES),
    Row("xlatb", build_xlat),
    Row("push", build_push),
    Row("pop", build_pop),
    Row("pusha", build_pusha),
    Row("pushad", build_pusha),
    Row("popa", build_popa),
    Row("popad", build_popa),
    Row("enter", build_enter),
    Row("leave", build_leave),
    Row("bound", build_bound),
)
