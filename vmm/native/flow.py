"""Translation of near control flow: branches are chained inside a page and looked up out of it; CALL and RET are the
host's own, so that the host predicts returns.

A far transfer, an interrupt or a 16-bit branch has no emitter here and is a callout.
"""

from __future__ import annotations

from iced_x86 import Code, Instruction, OpKind, RegisterExt

from vmm.native import guest, segmented
from vmm.native.operands import ECX, R8D, R9, RCX, RSP, address, qword
from vmm.native.unit import Draft

_JECXZ_OVER_JMP = b"\x67\xe3\x05"  # jecxz over the five bytes of a jmp rel32
_JECXZ_ELSE_OVER_JMP = b"\x67\xe3\x02\xeb\x05"  # jecxz to the jmp rel32 behind, else over it


def emit_jmp(draft: Draft, instruction: Instruction) -> bool:
    """JMP rel32, r32, m32."""
    if instruction.op0_kind == OpKind.NEAR_BRANCH32:
        draft.jump(instruction.near_branch32)
        return True
    if not _emit_target(draft, instruction):
        return False
    draft.dispatch("jmp")
    return True


def emit_jcc(draft: Draft, instruction: Instruction) -> bool:
    """Jcc rel32: what follows it is in the TU too; of a loop that is the TU, the first instruction again."""
    if instruction.op0_kind != OpKind.NEAR_BRANCH32:
        return False
    target, condition = instruction.near_branch32, instruction.condition_code - 1
    if target == draft.eip and draft.has_room_for_round:
        draft.goes_round = True
        target, condition = instruction.next_ip32, condition ^ 1
    draft.leave_if(condition, target)
    return True


def emit_call(draft: Draft, instruction: Instruction) -> bool:
    """CALL rel32, r32, m32: the target is read before the return address is pushed."""
    following = instruction.next_ip32
    if instruction.op0_kind == OpKind.NEAR_BRANCH32:
        target = instruction.near_branch32
        draft.push(following)
        draft.settle_stack()
        if draft.is_in_page(target):
            draft.link("call", target)
        else:
            draft.asm.emit("mov", R8D, target)
            draft.dispatch("call")
    elif _emit_target(draft, instruction):
        draft.push(following)
        draft.settle_stack()
        draft.dispatch("call")
    else:
        return False
    draft.land(following)
    return True


def emit_ret(draft: Draft, instruction: Instruction) -> bool:
    """R8D = pop; the host's return address = the fragment for R8D; return."""
    if instruction.code not in (Code.RETND, Code.RETND_IMM16):
        return False
    emit = draft.asm.emit
    draft.pop(R8D)
    draft.stack_offset += instruction.immediate16 if instruction.op_count else 0
    draft.settle_stack()
    draft.look_up()
    emit("mov", qword(RSP), R9)
    emit("ret")
    return True


def emit_loop(draft: Draft, instruction: Instruction) -> bool:
    """LOOP with ECX: decrement, jump if it is not zero, no flags."""
    if instruction.code != Code.LOOP_REL8_32_ECX or not draft.is_in_page(instruction.near_branch32):
        return False
    draft.asm.emit("lea", ECX, address(RCX, -1))
    draft.asm.raw(_JECXZ_OVER_JMP)
    draft.leave("jmp", instruction.near_branch32)
    return True


def emit_jecxz(draft: Draft, instruction: Instruction) -> bool:
    """JECXZ."""
    if instruction.code != Code.JECXZ_REL8_32 or not draft.is_in_page(instruction.near_branch32):
        return False
    draft.asm.raw(_JECXZ_ELSE_OVER_JMP)
    draft.leave("jmp", instruction.near_branch32)
    return True


def _emit_target(draft: Draft, instruction: Instruction) -> bool:
    """R8D = the operand of an indirect branch."""
    if instruction.op0_kind == OpKind.REGISTER:
        if RegisterExt.size(instruction.op0_register) != 4:
            return False
        draft.asm.emit("mov", R8D, guest.register(instruction.op0_register))
        return True
    if instruction.op0_kind != OpKind.MEMORY:
        return False
    operand = segmented.operand(draft, instruction)
    if operand is None or operand.bits != 32:
        return False
    draft.asm.emit("mov", R8D, operand)
    return True
