"""Translation of x87, MMX, SSE and SSE2: the same instruction for the host, on the guest's registers in the host's own.

Which of them a CPU model has, and what they do, is the instruction table's business. What is wrong with an operand, an
unmasked exception among it, shows as a host signal; the instruction is then interpreted.

An emitted instruction may only run while the guest's FPU state is loaded, and CR0 and CR4 allow it: each fragment reads
through a pointer, a gate, that leads nowhere otherwise (`fpulive`).
"""

from __future__ import annotations

from typing import Final

from iced_x86 import (
    Code,
    Encoder,
    Instruction,
    InstructionInfoFactory,
    Mnemonic,
    OpAccess,
    OpCodeInfo,
    OpCodeOperandKind,
    OpKind,
    Register,
    RegisterExt,
)

from machine.instructions import fpu as x87
from machine.instructions import simd
from machine.instructions.operands import CONDITION_NAMES
from vmm.native import guest, segmented
from vmm.native.fpupointers import LastInstruction, LastOperand
from vmm.native.ident import IDENT
from vmm.native.operands import R9, R9D, Memory, dword
from vmm.native.stateblock import field
from vmm.native.unit import Draft

# Rows that are none of the port's and are the host's own all the same: they touch nothing but the FPU and its operand.
_CONTROL: Final = frozenset({"wait", "fldcw", "fnstcw", "fnstsw", "fnclex", "stmxcsr"})
_UNGATED: Final = frozenset({"movnti"})
# With an unmasked exception processors differ in whether the x87 registers have become MMX registers by then.
_CALLOUTS: Final = frozenset({"cvtpi2ps", "cvtpi2pd", "cvtps2pi", "cvttps2pi", "cvtpd2pi", "cvttpd2pi"})
FLOATING: Final = (x87.COMPUTED | simd.COMPUTED | _CONTROL | _UNGATED) - _CALLOUTS
"""The rows that are emitted; the others of the FPU save and load more than the host should see, and are callouts."""

TRANSFERS: Final = {
    Mnemonic.FXSAVE: "fxsave",
    Mnemonic.FXRSTOR: "fxrstor",
    Mnemonic.LDMXCSR: "ldmxcsr",
    Mnemonic.FNINIT: "fninit",
}
"""What saves or loads state in the TC: the routines by mnemonic."""

_XMM_KINDS: Final = frozenset({OpCodeOperandKind.XMM_REG, OpCodeOperandKind.XMM_RM, OpCodeOperandKind.XMM_OR_MEM})
# Their ways out of the TU store the pointers themselves.
_BRANCHES: Final = frozenset(f"j{name}" for name in CONDITION_NAMES)
_STEPS: Final = {"inc": 1, "dec": -1, "add": 1, "sub": -1}
_IMMEDIATES: Final = frozenset({OpKind.IMMEDIATE8TO32, OpKind.IMMEDIATE32})
_WRITES: Final = frozenset({OpAccess.WRITE, OpAccess.COND_WRITE, OpAccess.READ_WRITE, OpAccess.READ_COND_WRITE})
# Undocumented encodings of documented instructions, which the decoder names by their opcode bytes.
_CANONICAL: Final = {
    Code.FCOM_ST0_STI_DCD0: Code.FCOM_ST0_STI,
    Code.FCOMP_ST0_STI_DCD8: Code.FCOMP_ST0_STI,
    Code.FCOMP_ST0_STI_DED0: Code.FCOMP_ST0_STI,
    Code.FXCH_ST0_STI_DDC8: Code.FXCH_ST0_STI,
    Code.FXCH_ST0_STI_DFC8: Code.FXCH_ST0_STI,
    Code.FSTP_STI_DFD0: Code.FSTP_STI,
    Code.FSTP_STI_DFD8: Code.FSTP_STI,
}
_HOST_32: Final = (
    Register.EAX, Register.ECX, Register.EDX, Register.EBX, Register.ESP, Register.EBP, Register.ESI, Register.EDI,
    Register.R8D, Register.R9D, Register.R10D, Register.R11D, Register.R12D, Register.R13D, Register.R14D,
    Register.R15D,
)  # fmt: skip
_factory: Final = InstructionInfoFactory()


def emit_floating(draft: Draft, instruction: Instruction, name: str) -> bool:
    """The gate, if this TU has not passed it yet; the instruction; what is known of the pointers that it leaves."""
    offset = operand = None
    if guest.has_memory(instruction):
        offset, operand = guest.memory(instruction), _in_window(draft, instruction)
        if offset is None or operand is None:
            return False
    code = encode(instruction, operand)
    if name not in _UNGATED:
        _emit_gate(draft, "sse_gate" if name == "stmxcsr" or _uses_xmm(instruction) else "fpu_gate")
    draft.asm.raw(code)
    if name in x87.COMPUTED:
        last = LastInstruction(instruction.ip32, x87.opcode_of(instruction))
        place = None if offset is None else LastOperand(offset, guest.segment_number(instruction.memory_segment))
        draft.pointers.note(len(draft.hosts) - 1, last, place)
    return True


def _in_window(draft: Draft, instruction: Instruction) -> Memory | None:
    """The memory operand; it may use R8, and R9 is lost, if its segment is not flat."""
    return guest.memory(instruction) if guest.is_flat(instruction) else segmented.operand(draft, instruction)


def emit_state(draft: Draft, instruction: Instruction) -> bool:
    """FXSAVE, FXRSTOR, LDMXCSR and FNINIT: the gate, and a routine."""
    name = TRANSFERS[instruction.mnemonic]
    if instruction.op_count:
        place = _in_window(draft, instruction)
        if place is None:
            return False
    _emit_gate(draft, "fpu_gate" if name == "fninit" else "sse_gate")
    if instruction.op_count:
        assert place is not None
        draft.asm.emit("lea", R9D, place._replace(bits=0, gs=False))
    draft.call_routine(name, instruction.ip32, instruction.next_ip32)
    return True


def prepare_pointers(draft: Draft, instruction: Instruction, name: str) -> None:
    """Before an instruction: store the pointers if it may leave the TU, the operand's if it changes its address."""
    index = len(draft.hosts)
    if name in _BRANCHES or (name in FLOATING and name != "fnstsw"):
        return
    if name not in IDENT and name != "fnstsw":
        draft.store_pointers()
        return
    delta = _constant_step(instruction, name)
    if delta is not None:
        draft.pointers.shift(index, RegisterExt.number(instruction.op0_register), delta)
    elif draft.pointers.needs(_written(instruction)):
        draft.pointers.store_operand(draft.asm, index)


def _constant_step(instruction: Instruction, name: str) -> int | None:
    """What INC, DEC, ADD or SUB with a constant adds to a 32-bit register; None for anything else."""
    if (
        name not in _STEPS
        or instruction.op0_kind != OpKind.REGISTER
        or not RegisterExt.is_gpr32(instruction.op0_register)
    ):
        return None
    if instruction.op_count == 1:
        return _STEPS[name]
    return _STEPS[name] * instruction.immediate(1) if instruction.op1_kind in _IMMEDIATES else None


def _written(instruction: Instruction) -> set[int]:
    """The general registers that an instruction writes, wholly or in part."""
    return {
        RegisterExt.number(RegisterExt.full_register32(used.register))
        for used in _factory.info(instruction).used_registers()
        if used.access in _WRITES and RegisterExt.is_gpr(used.register)
    }


def _uses_xmm(instruction: Instruction) -> bool:
    return not _XMM_KINDS.isdisjoint(OpCodeInfo(instruction.code).op_kinds())


def _emit_gate(draft: Draft, name: str) -> None:
    """R9D = [state.gate]: a fault if the guest cannot use its FPU (its SSE) as things are."""
    if name in draft.gates:
        return
    draft.gates.add(name)
    if name == "sse_gate":
        draft.gates.add("fpu_gate")
    draft.asm.emit("mov", R9, field(name))
    draft.asm.emit("mov", R9D, dword(R9))


def encode(instruction: Instruction, operand: Memory | None) -> bytes:
    """The host's encoding: guest registers where they live, `operand` in the window.

    Raises:
        ValueError: an operand is of no kind that these instructions have.
    """
    fresh = Instruction()
    fresh.code = _CANONICAL.get(instruction.code, instruction.code)
    for n in range(OpCodeInfo(instruction.code).op_count):
        kind = instruction.op_kind(n)
        if kind == OpKind.REGISTER:
            register = instruction.op_register(n)
            fresh.set_op_kind(n, OpKind.REGISTER)
            if RegisterExt.is_gpr32(register):
                register = _HOST_32[guest.register(register).number]
            fresh.set_op_register(n, register)
        elif kind == OpKind.MEMORY and operand is not None:
            fresh.set_op_kind(n, OpKind.MEMORY)
            fresh.segment_prefix = Register.GS
            named = operand.base is not None or operand.index is not None
            if operand.base is not None:
                fresh.memory_base = _HOST_32[operand.base.number]
            if operand.index is not None:
                fresh.memory_index = _HOST_32[operand.index.number]
                fresh.memory_index_scale = operand.scale
            fresh.memory_displacement = operand.displacement & 0xFFFF_FFFF
            fresh.memory_displ_size = 4 if not named else 1 if operand.displacement else 0
        elif kind == OpKind.IMMEDIATE8:
            fresh.set_op_kind(n, OpKind.IMMEDIATE8)
            fresh.immediate8 = instruction.immediate8
        else:
            raise ValueError(f"{instruction} has an operand of an unexpected kind")
    encoder = Encoder(64)
    encoder.encode(fresh, 0)
    return encoder.take_buffer()
