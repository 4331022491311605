"""Translation of the stack's instructions with 32-bit operands: PUSH, POP, PUSHAD, POPAD, LEAVE, on guest ESP in R12.

ESP moves after the access that can fault; what has no emitter here is a callout.
"""

from __future__ import annotations

from iced_x86 import Code, Instruction, OpKind, Register

from vmm.native import guest, segmented
from vmm.native.cache import GUEST_ESP, GUEST_REGISTERS
from vmm.native.operands import R8D, R9D, Memory, address
from vmm.native.unit import Draft

_GUEST_EBP = GUEST_REGISTERS[5]


def emit_push(draft: Draft, instruction: Instruction) -> bool:
    """PUSH of a register, an immediate or memory; ESP itself is pushed as it was."""
    if instruction.stack_pointer_increment != -4:
        return False
    kind = instruction.op0_kind
    if kind == OpKind.REGISTER:
        if instruction.op0_register in guest.SEGMENT_REGISTERS:
            draft.asm.emit("mov", R8D, guest.selector(instruction.op0_register))
            draft.push(R8D)
        else:
            draft.push(guest.register(instruction.op0_register))
    elif kind == OpKind.MEMORY:
        operand = segmented.operand(draft, instruction)
        if operand is None:
            return False
        draft.asm.emit("mov", R8D, operand)
        draft.push(R8D)
    else:
        draft.push(instruction.immediate(0) & 0xFFFF_FFFF)
    return True


def emit_pop(draft: Draft, instruction: Instruction) -> bool:
    """POP into a register or memory; POP ESP leaves what was read, and an address by ESP is that after the POP."""
    if instruction.stack_pointer_increment != 4:
        return False
    if instruction.op0_kind != OpKind.REGISTER:
        if instruction.memory_base == Register.ESP:
            instruction = instruction.copy()
            instruction.memory_displacement = instruction.memory_displacement + 4 & 0xFFFF_FFFF
        operand = segmented.operand(draft, instruction)
        if operand is None:
            return False
        draft.asm.emit("mov", R9D, Memory(32, GUEST_ESP, gs=True))
        draft.asm.emit("mov", operand, R9D)
        draft.asm.emit("lea", GUEST_ESP, address(GUEST_ESP, 4))
        return True
    destination = guest.register(instruction.op0_register)
    if destination is GUEST_ESP:
        draft.asm.emit("mov", destination, Memory(32, GUEST_ESP, gs=True))
    else:
        draft.pop(destination)
    return True


def emit_leave(draft: Draft, instruction: Instruction) -> bool:
    """ESP = EBP; pop EBP."""
    if instruction.code != Code.LEAVED:
        return False
    emit = draft.asm.emit
    emit("mov", R8D, Memory(32, _GUEST_EBP, gs=True))
    emit("lea", GUEST_ESP, address(_GUEST_EBP, 4))
    emit("mov", _GUEST_EBP, R8D)
    return True


def emit_pushad(draft: Draft, _instruction: Instruction) -> bool:
    """PUSHAD: both ends are written to before anything that shows; the upper one is inverted, and back.

    A read would set the A bit of a page that cannot be written to.
    """
    emit = draft.asm.emit
    for _ in range(2):
        emit("not", _slot(-4))
    for number in range(7, -1, -1):
        emit("mov", _slot(-4 - 4 * number), GUEST_REGISTERS[number])
    emit("lea", GUEST_ESP, address(GUEST_ESP, -32))
    return True


def emit_popad(draft: Draft, _instruction: Instruction) -> bool:
    """POPAD: both ends are read before a register changes; the value of ESP is skipped."""
    emit = draft.asm.emit
    emit("mov", R8D, _slot(0))
    emit("mov", R8D, _slot(28))
    for number in range(7, -1, -1):
        if GUEST_REGISTERS[number] is not GUEST_ESP:
            emit("mov", GUEST_REGISTERS[number], _slot(28 - 4 * number))
    emit("lea", GUEST_ESP, address(GUEST_ESP, 32))
    return True


def _slot(offset: int) -> Memory:
    return Memory(32, GUEST_ESP, displacement=offset, gs=True)
