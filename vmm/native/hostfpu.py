"""The host's FPU as the guest's: one decoded x87, MMX, SSE or SSE2 instruction at a time, run natively.

It must never run bytes of a guest: an instruction is encoded anew from its code and its registers, its memory operand
and general-purpose register are replaced by places of ours, and what the tables of `machine.instructions` do not name
is refused. What exceptions a result raises in the guest is not known here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, Final

from iced_x86 import CpuidFeature, Encoder, Instruction, OpCodeInfo, OpKind, Register, RegisterExt

from machine.fpu import Computation
from machine.fpustate import ENGINE, FLAGS, GPR, OPERAND, FpuState
from machine.instructions import fpu as x87
from machine.instructions import simd
from machine.instructions.table import features_of, row_name
from vmm.native import hostmemory
from vmm.native.assembler import Assembler
from vmm.native.operands import EAX, RAX, RBX, Memory, dword, qword, word

_HOST_MXCSR: Final = ENGINE
_HOST_FCW: Final = ENGINE + 4

_NATIVE: Final = x87.COMPUTED | simd.COMPUTED
_FEATURES: Final = frozenset(
    {
        CpuidFeature.FPU,
        CpuidFeature.FPU387,
        CpuidFeature.CMOV,
        CpuidFeature.MMX,
        CpuidFeature.SSE,
        CpuidFeature.SSE2,
    }
)
_READS_FLAGS: Final = x87.USES_FLAGS | x87.SETS_FLAGS
_WRITES_FLAGS: Final = x87.SETS_FLAGS | {"comiss", "ucomiss", "comisd", "ucomisd"}

# Registers, immediates of one byte and the rest make some 170,000 instructions, most of them shuffles; each takes some
# 40 bytes here, and only touched pages cost memory.
_CODE_BYTES: Final = 16 << 20
_ROUTINE: Final = ctypes.PYFUNCTYPE(None)


class HostFpuError(Exception):
    """No code can be made for an instruction: a mistake of ours."""


class _Code(hostmemory.DualMapping):
    """The memory of the computations; it lives as long as any of them."""

    def __init__(self) -> None:
        super().__init__(_CODE_BYTES, "host-fpu")
        self.position = 0

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """See `DualMapping`; nothing happens the second time."""
        if self.host:
            super().close()
            self.host = 0

    def place(self, emit: Callable[[Assembler], None]) -> int:
        """Append code; returns its host address."""
        self.position = (self.position + 15) & -16
        assembler = Assembler(self.host + self.position)
        emit(assembler)
        code = assembler.finish()
        if self.position + len(code) > self.length_bytes:
            raise HostFpuError("the room for computations is used up")
        self.data[self.position : self.position + len(code)] = code
        self.position += len(code)
        return assembler.origin


class HostFpu:
    """An `FpuPort` that computes with the host's FPU, on one `FpuState`, whose address is in the code.

    The host's own FPU state is kept as its calling convention wants it: control words and an empty x87 stack.
    """

    present = True

    def __init__(self, fpu: FpuState) -> None:
        self._fpu = fpu
        self._host = ctypes.addressof(ctypes.c_char.from_buffer(fpu.page))
        self._code = _Code()
        self._computations: dict[bytes, Computation] = {}
        self._prologue = self._code.place(self._emit_prologue)
        self._epilogue = self._code.place(_emit_epilogue)

    def close(self) -> None:
        """See `FpuPort`."""
        self._code.close()

    def computation(self, instruction: Instruction) -> Computation:
        """See `FpuPort`."""
        name = row_name(instruction.code)
        if name not in _NATIVE or not features_of(instruction.code) <= _FEATURES:
            raise ValueError(f"{instruction} is not computed by the host")
        body, source, target = encode(instruction)
        known = self._computations.get(body)
        if known is not None:
            return known
        reads, writes = name in _READS_FLAGS, name in _WRITES_FLAGS

        def emit(assembler: Assembler) -> None:
            """Push rbx; prologue; operands; the instruction; results; go to the epilogue."""
            assembler.emit("push", RBX)
            assembler.jump_to("call", self._prologue)
            if source:
                assembler.emit("mov", EAX, dword(RBX, GPR))
            if reads:
                assembler.emit("push", qword(RBX, FLAGS))
                assembler.emit("popfq")
            assembler.raw(body)
            if target:
                assembler.emit("mov", dword(RBX, GPR), EAX)
            if writes:
                assembler.emit("pushfq")
                assembler.emit("pop", RAX)
                assembler.emit("mov", dword(RBX, FLAGS), EAX)
            assembler.jump_to("jmp", self._epilogue)

        routine: Any = _ROUTINE(self._code.place(emit))
        routine.needs = self._code, self._fpu  # both must live as long as it does
        computation: Computation = routine
        self._computations[body] = computation
        return computation

    def _emit_prologue(self, assembler: Assembler) -> None:
        """RBX = the page; keep the host's control words; load the guest's registers.

        XMM8 to XMM15 are loaded from, and stored to, a part of the page that the guest never sees.
        """
        emit = assembler.emit
        emit("mov", RBX, self._host)
        emit("stmxcsr", dword(RBX, _HOST_MXCSR))
        emit("fnstcw", word(RBX, _HOST_FCW))
        emit("fxrstor", Memory(0, RBX))
        emit("ret")


def _emit_epilogue(assembler: Assembler) -> None:
    """Store the guest's registers; go back to the host's control words, x87 stack empty; return."""
    emit = assembler.emit
    emit("fxsave", Memory(0, RBX))
    emit("fninit")
    emit("fldcw", word(RBX, _HOST_FCW))
    emit("ldmxcsr", dword(RBX, _HOST_MXCSR))
    emit("pop", RBX)
    emit("ret")


def encode(instruction: Instruction) -> tuple[bytes, bool, bool]:
    """The host's encoding: memory at RBX + OPERAND, general-purpose registers in EAX.

    Returns:
        The bytes; whether EAX is read; whether it is written.

    Raises:
        ValueError: an operand is of no kind that is known.
    """
    fresh = Instruction()
    fresh.code = instruction.code
    source = target = False
    for n in range(OpCodeInfo(instruction.code).op_count):
        kind = instruction.op_kind(n)
        if kind == OpKind.REGISTER:
            register = instruction.op_register(n)
            if RegisterExt.is_gpr32(register):
                register = Register.EAX
                source, target = source or n > 0, target or n == 0
            elif not (RegisterExt.is_mm(register) or RegisterExt.is_st(register) or _is_xmm(register)):
                raise ValueError(f"{instruction} has a register that is not computed with")
            fresh.set_op_kind(n, OpKind.REGISTER)
            fresh.set_op_register(n, register)
        elif kind == OpKind.MEMORY:
            fresh.set_op_kind(n, OpKind.MEMORY)
            fresh.memory_base = Register.RBX
            fresh.memory_displ_size = 8
            fresh.memory_displacement = OPERAND
        elif kind == OpKind.IMMEDIATE8:
            fresh.set_op_kind(n, OpKind.IMMEDIATE8)
            fresh.immediate8 = instruction.immediate8
        else:
            raise ValueError(f"{instruction} has an operand that is not computed with")
    encoder = Encoder(64)
    encoder.encode(fresh, 0)
    return encoder.take_buffer(), source, target


def _is_xmm(register: int) -> bool:
    return Register.XMM0 <= register <= Register.XMM7
