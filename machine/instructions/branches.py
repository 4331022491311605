"""Rows that transfer control: near and far jumps, calls and returns, loops, software interrupts, IRET and UD.

Near transfers are here; what gates, tasks and privilege levels make of the far ones is `machine.transfers`' business.
"""

from __future__ import annotations

from iced_x86 import Code, ConditionCode, Instruction, OpKind

from machine.cpu import Cpu
from machine.faults import SoftwareInterrupt, Vector, general_protection, invalid_opcode
from machine.flags import CF, OF, PF, SF, ZF
from machine.instructions.operands import (
    CONDITION_NAMES,
    MASKS,
    address,
    address_mask,
    condition,
    is_memory,
    read,
    size_bytes,
)
from machine.instructions.table import CODE_NAMES, Effect, Operation, Row
from machine.state import CS, ECX, ESP, MASK32
from machine.transfers import far_call, far_jump, far_return, interrupt_return


def branch_bytes(instruction: Instruction) -> int:
    """2 or 4: the operand size of a near branch, which cuts EIP to 16 bits."""
    kind = instruction.op_kind(0)
    if kind == OpKind.NEAR_BRANCH16:
        return 2
    if kind == OpKind.NEAR_BRANCH32:
        return 4
    return size_bytes(instruction, 0)


def build_jump(cpu: Cpu, instruction: Instruction) -> Operation:
    """JMP rel, r/m."""
    state, cs = cpu.state, cpu.state.segments[CS]
    mask = MASKS[branch_bytes(instruction)]
    if instruction.op_kind(0) in (OpKind.NEAR_BRANCH16, OpKind.NEAR_BRANCH32):
        distance = instruction.near_branch_target

        def jump() -> None:
            target = (state.eip + distance) & mask
            if target > cs.limit:
                raise general_protection()
            state.eip = target

        return jump
    source = read(cpu, instruction, 0)

    def jump_indirect() -> None:
        target = source()
        if target > cs.limit:
            raise general_protection()
        state.eip = target

    return jump_indirect


# Conditions that one bit decides, or that ask whether either of two is set, by the condition code without its lowest
# bit, which turns them round; the others compare SF with OF.
_FLAGS_OF_CONDITION = {0: OF, 2: CF, 4: ZF, 6: CF | ZF, 8: SF, 10: PF}


def build_jump_if(cpu: Cpu, instruction: Instruction) -> Operation:
    """Jcc."""
    state, cs = cpu.state, cpu.state.segments[CS]
    mask = MASKS[branch_bytes(instruction)]
    distance, following = instruction.near_branch_target, instruction.next_ip32
    code = instruction.condition_code - ConditionCode.O
    flags = _FLAGS_OF_CONDITION.get(code & ~1)
    if flags is None:
        holds = condition(instruction)

        def jump_if() -> None:
            if holds(state.eflags):
                target = (state.eip + distance) & mask
                if target > cs.limit:
                    raise general_protection()
                state.eip = target
            else:
                state.eip = (state.eip + following) & MASK32

        return jump_if
    if code & 1:

        def jump_if_clear() -> None:
            if state.eflags & flags:
                state.eip = (state.eip + following) & MASK32
            else:
                target = (state.eip + distance) & mask
                if target > cs.limit:
                    raise general_protection()
                state.eip = target

        return jump_if_clear

    def jump_if_set() -> None:
        if state.eflags & flags:
            target = (state.eip + distance) & mask
            if target > cs.limit:
                raise general_protection()
            state.eip = target
        else:
            state.eip = (state.eip + following) & MASK32

    return jump_if_set


def build_loop(cpu: Cpu, instruction: Instruction) -> Operation:
    """LOOP, LOOPE, LOOPNE, JCXZ, JECXZ: the count is CX or ECX by the address size."""
    state, cs = cpu.state, cpu.state.segments[CS]
    gpr = state.gpr
    mask = MASKS[branch_bytes(instruction)]
    distance, following = instruction.near_branch_target, instruction.next_ip32
    name = CODE_NAMES[instruction.code]
    count_mask = 0xFFFF if name.startswith("JCXZ") or name.endswith("_CX") else MASK32
    decrement = 0 if name.startswith("J") else 1
    wanted_zf = {"LOOPE": ZF, "LOOPN": 0}.get(name[:5])

    def loop() -> None:
        count = (gpr[ECX] - decrement) & count_mask
        taken = bool(count) if decrement else not count
        if taken and wanted_zf is not None:
            taken = state.eflags & ZF == wanted_zf
        if taken:
            target = (state.eip + distance) & mask
            if target > cs.limit:
                raise general_protection()
        else:
            target = (state.eip + following) & MASK32
        if decrement:
            gpr[ECX] = gpr[ECX] & ~count_mask | count
        state.eip = target

    return loop


def build_call(cpu: Cpu, instruction: Instruction) -> Operation:
    """CALL rel, r/m: the target is read and checked before the return address is pushed."""
    state, cs = cpu.state, cpu.state.segments[CS]
    size = branch_bytes(instruction)
    mask, following = MASKS[size], instruction.next_ip32
    push = cpu.push
    if instruction.op_kind(0) in (OpKind.NEAR_BRANCH16, OpKind.NEAR_BRANCH32):
        distance = instruction.near_branch_target

        def call() -> None:
            eip = state.eip
            target = (eip + distance) & mask
            if target > cs.limit:
                raise general_protection()
            push((eip + following) & mask, size)
            state.eip = target

        return call
    source = read(cpu, instruction, 0)

    def call_indirect() -> None:
        target = source()
        if target > cs.limit:
            raise general_protection()
        push((state.eip + following) & mask, size)
        state.eip = target

    return call_indirect


def build_return(cpu: Cpu, instruction: Instruction) -> Operation:
    """RET, RET imm16."""
    state, cs = cpu.state, cpu.state.segments[CS]
    size = 2 if CODE_NAMES[instruction.code].startswith("RETNW") else 4
    release = instruction.immediate16 if instruction.op_count else 0

    def ret() -> None:
        old = state.gpr[ESP]
        target = cpu.pop(size)
        if target > cs.limit:
            state.gpr[ESP] = old
            raise general_protection()
        if release:
            cpu.set_esp(state.gpr[ESP] + release)
        state.eip = target

    return ret


def build_far(cpu: Cpu, instruction: Instruction) -> Operation:
    """JMP and CALL far: pointer in the instruction or in memory."""
    state, mmu = cpu.state, cpu.mmu
    transfer = far_call if CODE_NAMES[instruction.code].startswith("CALL") else far_jump
    following = instruction.next_ip32
    if not is_memory(instruction, 0):
        size = 4 if instruction.op_kind(0) == OpKind.FAR_BRANCH32 else 2
        target = instruction.far_branch32 if size == 4 else instruction.far_branch16
        selector = instruction.far_branch_selector
        return lambda: transfer(cpu, selector, target, size, (state.eip + following) & MASK32)
    size = 2 if CODE_NAMES[instruction.code].endswith("M1616") else 4
    segment, offset = address(cpu, instruction)
    mask = address_mask(instruction)

    def transfer_indirect() -> None:
        at = offset()
        target = mmu.load(segment, at, size)
        selector = mmu.load16(segment, (at + size) & mask)
        transfer(cpu, selector, target, size, (state.eip + following) & MASK32)

    return transfer_indirect


def build_far_return(cpu: Cpu, instruction: Instruction) -> Operation:
    """RETF, RETF imm16."""
    size = 2 if CODE_NAMES[instruction.code].startswith("RETFW") else 4
    release = instruction.immediate16 if instruction.op_count else 0
    return lambda: far_return(cpu, size, release)


def build_iret(cpu: Cpu, instruction: Instruction) -> Operation:
    """IRET, IRETD."""
    state = cpu.state
    size, following = 2 if instruction.code == Code.IRETW else 4, instruction.next_ip32
    return lambda: interrupt_return(cpu, size, (state.eip + following) & MASK32)


def build_int(_cpu: Cpu, instruction: Instruction) -> Operation:
    """INT n; delivered by whoever runs the CPU, who knows the address of the next instruction."""
    vector = instruction.immediate8

    def interrupt() -> None:
        raise SoftwareInterrupt(vector, by_int_n=True)

    return interrupt


def build_int3(_cpu: Cpu, _instruction: Instruction) -> Operation:
    """INT3, opcode CC: #BP."""

    def breakpoint_trap() -> None:
        raise SoftwareInterrupt(Vector.BP)

    return breakpoint_trap


def build_into(cpu: Cpu, instruction: Instruction) -> Operation:
    """INTO: #OF if OF is set."""
    state = cpu.state
    following = instruction.next_ip32

    def overflow_trap() -> None:
        if state.eflags & OF:
            raise SoftwareInterrupt(Vector.OF)
        state.eip = (state.eip + following) & MASK32

    return overflow_trap


def build_int1(_cpu: Cpu, _instruction: Instruction) -> Operation:
    """INT1 (ICEBP), opcode F1: #DB that no gate's DPL forbids."""

    def debug_trap() -> None:
        raise SoftwareInterrupt(Vector.DB)

    return debug_trap


def build_undefined(_cpu: Cpu, _instruction: Instruction) -> Operation:
    """UD0, UD1, UD2: #UD; a memory operand of UD0 or UD1 is not read."""

    def undefined() -> None:
        raise invalid_opcode()

    return undefined


ROWS = (
    Row("jmp", build_jump, Effect.BRANCH),
    *(Row(f"j{name}", build_jump_if, Effect.BRANCH) for name in CONDITION_NAMES),
    *(Row(name, build_loop, Effect.BRANCH) for name in ("loop", "loope", "loopne", "jcxz", "jecxz")),
    Row("call", build_call, Effect.BRANCH),
    Row("ret", build_return, Effect.BRANCH),
    Row("jmp_far", build_far, Effect.SYSTEM_BRANCH),
    Row("call_far", build_far, Effect.SYSTEM_BRANCH),
    Row("retf", build_far_return, Effect.SYSTEM_BRANCH),
    Row("iret", build_iret, Effect.SYSTEM_BRANCH),
    Row("iretd", build_iret, Effect.SYSTEM_BRANCH),
    Row("int", build_int, Effect.SYSTEM_BRANCH),
    Row("int3", build_int3, Effect.SYSTEM_BRANCH),
    Row("into", build_into, Effect.SYSTEM_BRANCH),
    Row("int1", build_int1, Effect.SYSTEM_BRANCH),
    Row("ud0", build_undefined),
    Row("ud1", build_undefined),
    Row("ud2", build_undefined),
)
