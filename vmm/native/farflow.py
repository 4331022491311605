"""Translation of far transfers, to routines of the TC: in real mode, and within the ring between flat segments.

All others are callouts. It must not know which code segments have been executed.
"""

from __future__ import annotations

from iced_x86 import Code, Instruction

from vmm.native import guest, segmented
from vmm.native.modes import Mode
from vmm.native.operands import R8D, R9D, Memory
from vmm.native.unit import Draft

_JUMPS = {Code.JMP_PTR1616: 2, Code.JMP_M1616: 2, Code.JMP_PTR1632: 4, Code.JMP_M1632: 4}
_CALLS = {Code.CALL_PTR1616: 2, Code.CALL_M1616: 2, Code.CALL_PTR1632: 4, Code.CALL_M1632: 4}
_RETURNS = {Code.RETFW: 2, Code.RETFW_IMM16: 2, Code.RETFD: 4, Code.RETFD_IMM16: 4}
_OPERAND_BYTES = {**_JUMPS, **_CALLS, **_RETURNS}


def _is_real(mode: Mode) -> bool:
    """Whether it is real mode as it is after reset, but for the bases."""
    is_plain = mode.is_real and not mode.user and mode.is_narrow and mode.has_narrow_stack
    return is_plain and mode.code_limit == segmented.SEGMENT_64K - 1


def _family(mode: Mode, operand_bytes: int) -> str | None:
    """The routines for operands of this size in a mode; None if there are none."""
    if operand_bytes == 4 and mode.is_plain:
        return "far"
    return "real" if operand_bytes == 2 and _is_real(mode) else None


def emit_far(draft: Draft, instruction: Instruction) -> bool:
    """JMP and CALL."""
    size_bytes = _OPERAND_BYTES[instruction.code]
    family = _family(draft.mode, size_bytes)
    if family is None:
        return False
    emit = draft.asm.emit
    if guest.has_memory(instruction):
        segmented.emit_offset(draft, instruction)
        if not guest.has_wide_address(instruction):
            segmented.check_no_wrap(draft, size_bytes + 2)
        segment = guest.segment_number(instruction.memory_segment)
        place = segmented.at_offset(draft, segment, size_bytes + 2, write=False)
        emit("movzx", R9D, Memory(16, place.base, displacement=size_bytes, gs=True))
        emit("mov" if size_bytes == 4 else "movzx", R8D, Memory(8 * size_bytes, place.base, gs=True))
    else:
        emit("mov", R8D, instruction.far_branch32 if size_bytes == 4 else instruction.far_branch16)
        emit("mov", R9D, instruction.far_branch_selector)
    name = "call" if instruction.code in _CALLS else "jump"
    draft.go_to_routine(f"{family} {name}", instruction.ip32, instruction.next_ip32)
    return True


def emit_far_return(draft: Draft, instruction: Instruction) -> bool:
    """RETF, RETF imm16."""
    family = _family(draft.mode, _OPERAND_BYTES[instruction.code])
    if family is None:
        return False
    draft.asm.emit("mov", R9D, instruction.immediate16 if instruction.op_count else 0)
    draft.go_to_routine(f"{family} return", instruction.ip32, instruction.next_ip32)
    return True


def emit_interrupt(draft: Draft, instruction: Instruction) -> bool:
    """INT n in real mode."""
    if not _is_real(draft.mode) or instruction.code != Code.INT_IMM8:
        return False
    draft.asm.emit("mov", R9D, instruction.immediate8)
    draft.go_to_routine("real int", instruction.ip32, instruction.next_ip32)
    return True


def emit_interrupt_return(draft: Draft, instruction: Instruction) -> bool:
    """IRET in real mode."""
    if not _is_real(draft.mode) or instruction.code != Code.IRETW:
        return False
    draft.go_to_routine("real iret", instruction.ip32, instruction.next_ip32)
    return True


EMITTERS = {
    **dict.fromkeys(("jmp_far", "call_far"), emit_far),
    "retf": emit_far_return,
    "int": emit_interrupt,
    "iret": emit_interrupt_return,
}
