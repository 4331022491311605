"""Translation for modes that are not plain 32-bit ones, and of 16-bit operands in those: stack, flow, segment loads.

Real mode, virtual-8086 mode, 16-bit protected mode, and 32-bit code whose segments are not flat. Addresses are computed
by `segmented`; guest SP is the low half of R12, and what wraps around its 64 KiB in mid-instruction is a callout. It
must not know when a mode is entered.
"""

from __future__ import annotations

from iced_x86 import Code, Instruction, Mnemonic, OpKind, Register, RegisterExt

from machine.instructions.operands import CONDITION_NAMES
from machine.state import CS, DS, ES, FS, GS, SHADOW_MOV_SS, SS
from vmm.native import guest, segmented, system
from vmm.native.cache import GUEST_ESP, GUEST_REGISTERS
from vmm.native.operands import AL, CX, EBP, ECX, R8, R8D, R8W, R9, R9D, R9W, RSP, Memory, address, qword
from vmm.native.operands import Register as HostRegister
from vmm.native.stateblock import field, segment_base, segment_bound, selector
from vmm.native.unit import Draft

_FAR_POINTERS = {Mnemonic.LES: ES, Mnemonic.LDS: DS, Mnemonic.LSS: SS, Mnemonic.LFS: FS, Mnemonic.LGS: GS}
_STACK_POINTERS = frozenset({Register.SP, Register.ESP})
_NEAR = {OpKind.NEAR_BRANCH16: 2, OpKind.NEAR_BRANCH32: 4}


def _part(register: HostRegister, size_bytes: int) -> HostRegister:
    return HostRegister(register.number, 8 * size_bytes)


# The stack.


def _top(draft: Draft, offset: int) -> None:
    """R8D = ESP + offset, or SP + offset."""
    draft.asm.emit("lea", R8D, address(GUEST_ESP, offset))
    if draft.mode.has_narrow_stack:
        draft.asm.emit("movzx", R8D, R8W)


def _move_top(draft: Draft, offset: int, scratch: HostRegister) -> None:
    """ESP += offset, or SP += offset."""
    emit = draft.asm.emit
    if draft.mode.has_narrow_stack:
        emit("lea", scratch, address(GUEST_ESP, offset))
        emit("mov", _part(GUEST_ESP, 2), _part(scratch, 2))
    else:
        emit("lea", GUEST_ESP, address(GUEST_ESP, offset))


def _push(draft: Draft, value: HostRegister | int, size_bytes: int) -> None:
    """Push a constant or a register; R8 and R9 are clobbered, so what is in R9 is kept aside meanwhile."""
    emit = draft.asm.emit
    if value == R9D:
        emit("mov", field("parked"), R9D)
    _top(draft, -size_bytes)
    slot = segmented.at_offset(draft, SS, size_bytes, write=True)
    if isinstance(value, int):
        emit("mov", slot, value & (1 << 8 * size_bytes) - 1)
    else:
        if value == R9D:
            emit("mov", R9D, field("parked"))
        emit("mov", slot, _part(value, size_bytes))
    _move_top(draft, -size_bytes, R8D)


def _read_top(draft: Draft, size_bytes: int, destination: HostRegister = R9D) -> None:
    """A 32-bit scratch register = what the next pop of `size_bytes` gives."""
    _top(draft, 0)
    slot = segmented.at_offset(draft, SS, size_bytes, write=False)
    draft.asm.emit("mov" if size_bytes == 4 else "movzx", destination, slot)


def emit_push(draft: Draft, instruction: Instruction) -> bool:
    """PUSH of a register, a selector, an immediate or memory."""
    size_bytes = -instruction.stack_pointer_increment
    kind = instruction.op0_kind
    if kind == OpKind.REGISTER and instruction.op0_register not in guest.SEGMENT_REGISTERS:
        _push(draft, guest.register(instruction.op0_register), size_bytes)
        return True
    if kind == OpKind.REGISTER:
        draft.asm.emit("mov", R9D, guest.selector(instruction.op0_register))
    elif kind == OpKind.MEMORY:
        operand = segmented.operand(draft, instruction)
        if operand is None:
            return False
        draft.asm.emit("mov" if size_bytes == 4 else "movzx", R9D, operand)
    else:
        _push(draft, instruction.immediate(0), size_bytes)
        return True
    _push(draft, R9D, size_bytes)
    return True


def emit_pop(draft: Draft, instruction: Instruction) -> bool:
    """POP into a register, which may be ESP or SP, or into memory that is not addressed by ESP."""
    size_bytes = instruction.stack_pointer_increment
    emit = draft.asm.emit
    if instruction.op0_kind == OpKind.REGISTER:
        _read_top(draft, size_bytes)
        _move_top(draft, size_bytes, R8D)
        emit("mov", _part(guest.register(instruction.op0_register), size_bytes), _part(R9D, size_bytes))
        return True
    if instruction.memory_base in _STACK_POINTERS:
        return False
    _read_top(draft, size_bytes)
    emit("mov", field("parked"), R9D)
    operand = segmented.operand(draft, instruction)
    if operand is None:
        return False
    emit("mov", R9D, field("parked"))
    emit("mov", operand, _part(R9D, size_bytes))
    _move_top(draft, size_bytes, R8D)
    return True


def emit_pusha(draft: Draft, instruction: Instruction) -> bool:
    """PUSHA, PUSHAD: the upper end is inverted first, and back, so that a fault changes nothing."""
    size_bytes = 2 if instruction.code == Code.PUSHAW else 4
    emit = draft.asm.emit
    _top(draft, -8 * size_bytes)
    if draft.mode.has_narrow_stack:
        segmented.check_no_wrap(draft, 8 * size_bytes)
    lowest = segmented.at_offset(draft, SS, 8 * size_bytes, write=True)
    slots = [Memory(8 * size_bytes, R8D, displacement=size_bytes * (7 - n), gs=True) for n in range(8)]
    assert lowest.base is R8D
    for _ in range(2):
        emit("not", slots[0])
    for number in range(7, -1, -1):
        emit("mov", slots[number], _part(GUEST_REGISTERS[number], size_bytes))
    _move_top(draft, -8 * size_bytes, R8D)
    return True


def emit_popa(draft: Draft, instruction: Instruction) -> bool:
    """POPA, POPAD: both ends are read before a register changes; the slot of ESP is skipped."""
    size_bytes = 2 if instruction.code == Code.POPAW else 4
    emit = draft.asm.emit
    _top(draft, 0)
    if draft.mode.has_narrow_stack:
        segmented.check_no_wrap(draft, 8 * size_bytes)
    segmented.at_offset(draft, SS, 8 * size_bytes, write=False)
    slots = [Memory(8 * size_bytes, R8D, displacement=size_bytes * (7 - n), gs=True) for n in range(8)]
    emit("mov", _part(R9D, size_bytes), slots[0])
    emit("mov", _part(R9D, size_bytes), slots[7])
    for number in range(7, -1, -1):
        if GUEST_REGISTERS[number] is not GUEST_ESP:
            emit("mov", _part(GUEST_REGISTERS[number], size_bytes), slots[number])
    _move_top(draft, 8 * size_bytes, R8D)
    return True


def emit_leave(draft: Draft, instruction: Instruction) -> bool:
    """LEAVE: ESP = EBP, then pop EBP; SP and BP by stack size and operand size."""
    size_bytes = 4 if instruction.code == Code.LEAVED else 2
    emit = draft.asm.emit
    if draft.mode.has_narrow_stack:
        emit("movzx", R8D, _part(EBP, 2))
    else:
        emit("mov", R8D, EBP)
    slot = segmented.at_offset(draft, SS, size_bytes, write=False)
    emit("mov" if size_bytes == 4 else "movzx", R9D, slot)
    if draft.mode.has_narrow_stack:
        emit("lea", R8D, address(EBP, size_bytes))
        emit("mov", _part(GUEST_ESP, 2), R8W)
    else:
        emit("lea", GUEST_ESP, address(EBP, size_bytes))
    emit("mov", _part(EBP, size_bytes), _part(R9D, size_bytes))
    return True


def emit_pushf(draft: Draft, instruction: Instruction) -> bool:
    """PUSHF, PUSHFD; in virtual-8086 mode IOPL and VME decide."""
    if draft.mode.is_v86:
        return False
    system.emit_flags_image(draft, R9D)
    _push(draft, R9D, 2 if instruction.code == Code.PUSHFW else 4)
    return True


def emit_popf(draft: Draft, instruction: Instruction) -> bool:
    """POPF, POPFD; in virtual-8086 mode IOPL and VME decide."""
    if draft.mode.is_v86:
        return False
    size_bytes = 2 if instruction.code == Code.POPFW else 4
    _read_top(draft, size_bytes)
    draft.call_routine("popf" if size_bytes == 4 else "popfw", instruction.ip32, instruction.next_ip32)
    _move_top(draft, size_bytes, R8D)
    return True


# Segment registers.


def _load_paragraph(draft: Draft, number: int) -> None:
    """Load a data segment register in real or virtual-8086 mode with the selector in R9D; limit and rights stay."""
    emit = draft.asm.emit
    emit("mov", selector(number), R9D)
    emit("lea", R8D, Memory(0, None, R9, 8))
    emit("lea", R8D, Memory(0, None, R8, 2))
    emit("mov", segment_base(number), R8D)
    if number == SS:
        draft.hold_off(SHADOW_MOV_SS)


def _check_present(draft: Draft, number: int) -> None:
    """Fault if a segment cannot be read: a null one gets limit and rights in real mode when it is loaded."""
    draft.asm.emit("mov", R9, segment_bound(number, write=False))
    segmented.fault_unless_negative(draft)


def _can_load(draft: Draft, number: int) -> bool:
    return draft.mode.is_real and number != CS and not draft.in_shadow


def emit_mov_to_segment(draft: Draft, instruction: Instruction) -> bool:
    """MOV Sreg, r/m16."""
    number = guest.segment_number(instruction.op0_register)
    if not draft.mode.is_real:
        return system.emit_mov_to_segment(draft, instruction)
    if not _can_load(draft, number):
        return False
    _check_present(draft, number)
    if instruction.op1_kind == OpKind.REGISTER:
        draft.asm.emit("movzx", R9D, _part(guest.register(instruction.op1_register), 2))
    else:
        operand = segmented.operand(draft, instruction, 2)
        if operand is None:
            return False
        draft.asm.emit("movzx", R9D, operand)
    _load_paragraph(draft, number)
    return True


def emit_pop_segment(draft: Draft, instruction: Instruction) -> bool:
    """POP Sreg."""
    number, size_bytes = guest.segment_number(instruction.op0_register), instruction.stack_pointer_increment
    if not _can_load(draft, number):
        return False
    _check_present(draft, number)
    _read_top(draft, size_bytes)
    draft.asm.emit("movzx", R9D, R9W)
    _move_top(draft, size_bytes, R8D)
    _load_paragraph(draft, number)
    return True


def emit_far_pointer(draft: Draft, instruction: Instruction) -> bool:
    """LES, LDS, LSS, LFS, LGS: both parts are read before anything changes."""
    number = _FAR_POINTERS[instruction.mnemonic]
    if not _can_load(draft, number) or number == SS:
        return False
    size_bytes = RegisterExt.size(instruction.op0_register)
    emit = draft.asm.emit
    _check_present(draft, number)
    segmented.emit_offset(draft, instruction)
    if not guest.has_wide_address(instruction):
        segmented.check_no_wrap(draft, size_bytes + 2)
    source = guest.segment_number(instruction.memory_segment)
    operand = segmented.at_offset(draft, source, size_bytes + 2, write=False)
    emit("movzx", R9D, _sized(operand.at(size_bytes), 2))
    emit("mov" if size_bytes == 4 else "movzx", R8D, _sized(operand, size_bytes))
    emit("mov", _part(guest.register(instruction.op0_register), size_bytes), _part(R8D, size_bytes))
    _load_paragraph(draft, number)
    return True


def _sized(operand: Memory, size_bytes: int) -> Memory:
    return Memory(8 * size_bytes, operand.base, operand.index, operand.scale, operand.displacement, gs=True)


# Near control flow.


def _direct_target(draft: Draft, instruction: Instruction) -> int | None:
    """Where a direct branch goes; None beyond the limit of CS."""
    kind = instruction.op0_kind
    if kind not in _NEAR:
        return None
    target = instruction.near_branch16 if kind == OpKind.NEAR_BRANCH16 else instruction.near_branch32
    return target if target <= draft.mode.code_limit else None


def _check_target(draft: Draft, size_bytes: int) -> None:
    """Fault if the offset in R8D is beyond the limit of CS."""
    limit = draft.mode.code_limit
    if limit >= (1 << 8 * size_bytes) - 1:
        return
    draft.asm.emit("lea", R9, address(R8, -limit - 1))
    segmented.fault_unless_negative(draft)


def emit_jmp(draft: Draft, instruction: Instruction) -> bool:
    """JMP rel, r/m."""
    if instruction.op0_kind in _NEAR:
        target = _direct_target(draft, instruction)
        if target is None:
            return False
        draft.jump(target)
        return True
    if not _emit_target(draft, instruction):
        return False
    draft.dispatch("jmp")
    return True


def emit_jcc(draft: Draft, instruction: Instruction) -> bool:
    """Jcc rel."""
    target, condition = _direct_target(draft, instruction), instruction.condition_code - 1
    if target is None:
        return False
    draft.leave_if(condition, target)
    return True


def emit_call(draft: Draft, instruction: Instruction) -> bool:
    """CALL rel, r/m: the target is read and checked before the return address is pushed."""
    following, emit = instruction.next_ip32, draft.asm.emit
    size_bytes = _NEAR.get(instruction.op0_kind)
    if size_bytes:
        target = _direct_target(draft, instruction)
        if target is None:
            return False
        _push(draft, following, size_bytes)
        if draft.is_in_page(target):
            draft.link("call", target)
        else:
            emit("mov", R8D, target)
            draft.dispatch("call")
    else:
        size_bytes = _emit_target(draft, instruction)
        if not size_bytes:
            return False
        emit("mov", field("target_eip"), R8D)
        _push(draft, following, size_bytes)
        emit("mov", R8D, field("target_eip"))
        draft.dispatch("call")
    draft.land(following)
    return True


def _emit_target(draft: Draft, instruction: Instruction) -> int:
    """R8D = the operand of an indirect branch, within the limit of CS; returns its size in bytes, 0 if it has none."""
    emit = draft.asm.emit
    if instruction.op0_kind == OpKind.REGISTER:
        size_bytes = RegisterExt.size(instruction.op0_register)
        source: HostRegister | Memory = _part(guest.register(instruction.op0_register), size_bytes)
    elif instruction.op0_kind == OpKind.MEMORY:
        operand = segmented.operand(draft, instruction)
        if operand is None:
            return 0
        source, size_bytes = operand, operand.bits // 8
    else:
        return 0
    emit("mov" if size_bytes == 4 else "movzx", R8D, source)
    _check_target(draft, size_bytes)
    return size_bytes


def emit_ret(draft: Draft, instruction: Instruction) -> bool:
    """RET, RET imm16: see `flow.emit_ret`."""
    size_bytes = 2 if instruction.code in (Code.RETNW, Code.RETNW_IMM16) else 4
    emit = draft.asm.emit
    _read_top(draft, size_bytes, R8D)
    _check_target(draft, size_bytes)
    _move_top(draft, size_bytes + (instruction.immediate16 if instruction.op_count else 0), R9D)
    draft.look_up()
    emit("mov", qword(RSP), R9)
    emit("ret")
    return True


def emit_loop(draft: Draft, instruction: Instruction) -> bool:
    """LOOP, LOOPE, LOOPNE, JCXZ, JECXZ: CX or ECX is decremented without flags; JECXZ tests it."""
    target = _direct_target(draft, instruction)
    if target is None or not draft.is_in_page(target):
        return False
    emit, asm = draft.asm.emit, draft.asm
    name = _LOOPS[instruction.mnemonic]
    is_narrow = instruction.code in _NARROW_COUNTS
    size_bytes = 2 if is_narrow else 4
    if name != "jcxz":
        emit("lea", R8D, address(ECX, -1))
        emit("mov", _part(ECX, size_bytes), _part(R8D, size_bytes))
    ends = [asm.jump_to({"loope": "jne", "loopne": "je"}[name], draft.tc.host)] if name in ("loope", "loopne") else []
    if is_narrow:
        emit("mov", R9D, ECX)
        emit("movzx", ECX, CX)
    if name == "jcxz":
        zero = asm.jump_if_ecx_is_zero()
        if is_narrow:
            emit("mov", ECX, R9D)
        ends.append(asm.jump_to("jmp", draft.tc.host))
        asm.bind_rel8(zero)
        if is_narrow:
            emit("mov", ECX, R9D)
        draft.leave("jmp", target)
    else:
        zero = asm.jump_if_ecx_is_zero()
        if is_narrow:
            emit("mov", ECX, R9D)
        draft.leave("jmp", target)
        asm.bind_rel8(zero)
        if is_narrow:
            emit("mov", ECX, R9D)
    for at in ends:
        draft.bind_short(at)
    return True


_LOOPS = {
    Mnemonic.LOOP: "loop", Mnemonic.LOOPE: "loope", Mnemonic.LOOPNE: "loopne", Mnemonic.JCXZ: "jcxz",
    Mnemonic.JECXZ: "jcxz",
}  # fmt: skip
_NARROW_COUNTS = frozenset(
    {
        Code.LOOP_REL8_16_CX, Code.LOOP_REL8_32_CX, Code.LOOPE_REL8_16_CX, Code.LOOPE_REL8_32_CX,
        Code.LOOPNE_REL8_16_CX, Code.LOOPNE_REL8_32_CX, Code.JCXZ_REL8_16, Code.JCXZ_REL8_32,
    }
)  # fmt: skip


def emit_xlat(draft: Draft, instruction: Instruction) -> bool:
    """XLAT: AL = [EBX + AL]."""
    emit = draft.asm.emit
    emit("movzx", R9D, AL)
    emit("lea", R8D, address(guest.register(Register.EBX), index=R9D))
    if instruction.memory_base == Register.BX:
        emit("movzx", R8D, R8W)
    slot = segmented.at_offset(draft, guest.segment_number(instruction.memory_segment), 1, write=False)
    emit("mov", AL, slot)
    return True


EMITTERS = {
    "push": emit_push,
    "pop": emit_pop,
    **dict.fromkeys(("pusha", "pushad"), emit_pusha),
    **dict.fromkeys(("popa", "popad"), emit_popa),
    "leave": emit_leave,
    **dict.fromkeys(("pushf", "pushfd"), emit_pushf),
    **dict.fromkeys(("popf", "popfd"), emit_popf),
    "mov_to_sreg": emit_mov_to_segment,
    "mov_from_sreg": system.emit_mov_from_segment,
    "pop_sreg": emit_pop_segment,
    **dict.fromkeys(("les", "lds", "lss", "lfs", "lgs"), emit_far_pointer),
    "jmp": emit_jmp,
    **{f"j{name}": emit_jcc for name in CONDITION_NAMES},
    "call": emit_call,
    "ret": emit_ret,
    **dict.fromkeys(("loop", "loope", "loopne", "jcxz", "jecxz"), emit_loop),
    "xlatb": emit_xlat,
    "cli": system.emit_cli,
    "sti": system.emit_sti,
    "mov_from_cr": system.emit_mov_from_cr,
    "rdtsc": system.emit_rdtsc,
}
