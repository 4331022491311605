"""Soft forms: instructions whose memory operand is found by the software path, and not in the window.

They have the translator's other forms but for the operand, which is memory at R8 in the flat view of RAM. The soft form
of a division looks at the divisor first. It must not know why an instruction gets such a form.
"""

from __future__ import annotations

from iced_x86 import Code, Instruction, MemorySizeExt, Mnemonic, OpKind

from machine.state import CS
from vmm.native import guest, segmented
from vmm.native.modes import Mode
from vmm.native.operands import R8, R8D, R9, R9D, Memory, address
from vmm.native.softroutines import name_of
from vmm.native.stateblock import field
from vmm.native.unit import Draft

DIVISIONS = {Code.DIV_RM32: "divide", Code.IDIV_RM32: "divide signed"}
_SIZES_BYTES = (1, 2, 4, 8)
_BIT_STRINGS = (Mnemonic.BT, Mnemonic.BTS, Mnemonic.BTR, Mnemonic.BTC)


def is_possible(mode: Mode, instruction: Instruction) -> bool:
    """Whether an instruction that IDENT translates can be given a soft form."""
    if not mode.is_plain or not guest.has_memory(instruction) or instruction.mnemonic == Mnemonic.LEA:
        return False
    if instruction.mnemonic in _BIT_STRINGS and instruction.op1_kind == OpKind.REGISTER:
        return False
    return MemorySizeExt.size(instruction.memory_size) in _SIZES_BYTES


def is_division(instruction: Instruction) -> bool:
    """Whether it is a DIV or IDIV of 64 bits by a register, which can be given a soft form that looks at that."""
    return instruction.code in DIVISIONS and instruction.op0_kind == OpKind.REGISTER


def check_division(draft: Draft, instruction: Instruction) -> None:
    """Tell a divide error of DIV, or a division by zero of IDIV, by a routine; R8 and R9 are lost."""
    draft.asm.emit("mov", R9D, guest.register(instruction.op0_register))
    draft.enter_routine(DIVISIONS[instruction.code])


def operand(draft: Draft, instruction: Instruction) -> Memory | None:
    """The memory operand in the flat view of RAM, by R8; R9 is lost.

    R9D = linear address; R9D = offset in RAM, by a routine; R8 = view of RAM + R9

    Returns:
        None if it has to be left to the interpreter.
    """
    segment = guest.segment_number(instruction.memory_segment)
    size_bytes = MemorySizeExt.size(instruction.memory_size)
    write = segmented.is_written(instruction)
    if segment == CS and write:
        return None
    segmented.emit_offset(draft, instruction)
    segmented.at_offset(draft, segment, size_bytes, write=write)
    emit = draft.asm.emit
    emit("mov", R9D, R8D)
    emit("mov", field("soft_last"), size_bytes - 1)
    draft.enter_routine(name_of(user=draft.mode.user, write=write))
    emit("mov", R9D, R9D)
    emit("mov", R8, field("ram_view"))
    emit("lea", R8, address(R8, index=R9))
    return Memory(8 * size_bytes, R8)
