"""Translation of far transfers in real mode, to routines of the TC; others are callouts.

It must not know which code segments have been executed.
"""

from __future__ import annotations

from iced_x86 import Code, Instruction

from vmm.native import guest, segmented
from vmm.native.operands import R8D, R9D, Memory
from vmm.native.unit import Draft

_POINTERS = (Code.JMP_PTR1616, Code.CALL_PTR1616)
_INDIRECT = (Code.JMP_M1616, Code.CALL_M1616)


def _can(draft: Draft) -> bool:
    """Whether the routines are for this mode: real mode as it is after reset, but for the bases."""
    mode = draft.mode
    is_plain = mode.is_real and not mode.user and mode.is_narrow and mode.has_narrow_stack
    return is_plain and mode.code_limit == segmented.SEGMENT_64K - 1


def emit_far(draft: Draft, instruction: Instruction) -> bool:
    """JMP and CALL, with 16-bit offsets."""
    if not _can(draft):
        return False
    emit = draft.asm.emit
    if instruction.code in _POINTERS:
        emit("mov", R8D, instruction.far_branch16)
        emit("mov", R9D, instruction.far_branch_selector)
    elif instruction.code in _INDIRECT:
        segmented.emit_offset(draft, instruction)
        if not guest.has_wide_address(instruction):
            segmented.check_no_wrap(draft, 4)
        place = segmented.at_offset(draft, guest.segment_number(instruction.memory_segment), 4, write=False)
        emit("movzx", R9D, Memory(16, place.base, displacement=2, gs=True))
        emit("movzx", R8D, Memory(16, place.base, gs=True))
    else:
        return False
    is_call = instruction.is_call_far or instruction.is_call_far_indirect
    draft.go_to_routine("real call" if is_call else "real jump", instruction.ip32, instruction.next_ip32)
    return True


def emit_far_return(draft: Draft, instruction: Instruction) -> bool:
    """RETF, RETF imm16."""
    if not _can(draft) or instruction.code not in (Code.RETFW, Code.RETFW_IMM16):
        return False
    draft.asm.emit("mov", R9D, instruction.immediate16 if instruction.op_count else 0)
    draft.go_to_routine("real return", instruction.ip32, instruction.next_ip32)
    return True


def emit_interrupt(draft: Draft, instruction: Instruction) -> bool:
    """INT n."""
    if not _can(draft) or instruction.code != Code.INT_IMM8:
        return False
    draft.asm.emit("mov", R9D, instruction.immediate8)
    draft.go_to_routine("real int", instruction.ip32, instruction.next_ip32)
    return True


def emit_interrupt_return(draft: Draft, instruction: Instruction) -> bool:
    """IRET."""
    if not _can(draft) or instruction.code != Code.IRETW:
        return False
    draft.go_to_routine("real iret", instruction.ip32, instruction.next_ip32)
    return True


EMITTERS = {
    **dict.fromkeys(("jmp_far", "call_far"), emit_far),
    "retf": emit_far_return,
    "int": emit_interrupt,
    "iret": emit_interrupt_return,
}
