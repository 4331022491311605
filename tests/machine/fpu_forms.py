"""Every x87, MMX, SSE and SSE2 instruction of the table, in its register and memory forms, as machine code.

It knows encodings only; what they do, and what is compared, is the tests' business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from iced_x86 import (
    Code_,
    Encoder,
    Instruction,
    OpCodeInfo,
    OpCodeOperandKind,
    OpCodeOperandKind_,
    OpKind,
    Register,
    Register_,
)

from machine.cpuid import P6_INSTRUCTIONS, PENTIUM4_INSTRUCTIONS
from machine.instructions import CODE_NAMES, codes, lookup

_K = OpCodeOperandKind
_XMM = frozenset((_K.XMM_REG, _K.XMM_RM))
_MM = frozenset((_K.MM_REG, _K.MM_RM))
_OR_MEMORY = {_K.XMM_OR_MEM: Register.XMM2, _K.MM_OR_MEM: Register.MM2, _K.R32_OR_MEM: Register.EAX}


@dataclass(frozen=True, slots=True)
class Form:
    """One instruction.

    Attributes:
        code: the decoder's name for it.
        name: the same as text, with what varies.
        row: of the instruction table.
        data: its bytes.
        has_memory: its operand is the memory at the address that `forms` was given.
        is_store: which it writes.
    """

    code: Code_
    name: str
    row: str
    data: bytes
    has_memory: bool
    is_store: bool


@cache
def floating_codes() -> tuple[Code_, ...]:
    """The codes that the Pentium 4 model has because it has an FPU."""
    without = {code: lookup(code, P6_INSTRUCTIONS) for code in codes(PENTIUM4_INSTRUCTIONS)}
    return tuple(code for code, row in without.items() if row is None or row.mnemonic == "fpu")


@cache
def forms(address: int) -> tuple[Form, ...]:
    """Each of them without memory operand and with one at `address`; several registers and immediates."""
    found = []
    for code in floating_codes():
        kinds = OpCodeInfo(code).op_kinds()
        row = lookup(code, PENTIUM4_INSTRUCTIONS)
        assert row is not None
        if OpCodeOperandKind.SEG_RDI in kinds:
            found.append(_form(code, row.mnemonic, kinds, address, variant=0, memory=False))
            continue
        can_be_memory = any(kind in _OR_MEMORY or kind == _K.MEM for kind in kinds)
        must_be_memory = any(kind == _K.MEM for kind in kinds)
        variants = _variants(kinds)
        if not must_be_memory:
            found += [_form(code, row.mnemonic, kinds, address, variant=n, memory=False) for n in range(variants)]
        if can_be_memory:
            found += [_form(code, row.mnemonic, kinds, address, variant=n, memory=True) for n in range(variants)]
    return tuple(found)


# Of the instructions whose only operand is memory.
_STORES = frozenset(
    {
        "fst", "fstp", "fist", "fistp", "fbstp", "fnstcw", "fnstsw", "fnstenv", "fnsave", "fxsave", "stmxcsr",
    }
)  # fmt: skip
_IMMEDIATES = (0x00, 0x1B, 0xE4, 0x07, 0x21, 0xFF)
_STACK_REGISTERS = (Register.ST0, Register.ST1, Register.ST5)


def _variants(kinds: Sequence[OpCodeOperandKind_]) -> int:
    if _K.IMM8 in kinds:
        return len(_IMMEDIATES)
    return len(_STACK_REGISTERS) if _K.STI_OPCODE in kinds else 1


def _form(
    code: Code_, row: str, kinds: Sequence[OpCodeOperandKind_], address: int, *, variant: int, memory: bool
) -> Form:
    instruction = Instruction()
    instruction.code = code
    is_store = False
    for n, kind in enumerate(kinds):
        if kind == _K.IMM8:
            instruction.set_op_kind(n, OpKind.IMMEDIATE8)
            instruction.immediate8 = _IMMEDIATES[variant]
        elif kind == _K.SEG_RDI:
            instruction.set_op_kind(n, OpKind.MEMORY_SEG_EDI)
            is_store = True
        elif kind == _K.MEM or (memory and kind in _OR_MEMORY):
            instruction.set_op_kind(n, OpKind.MEMORY)
            instruction.memory_displacement = address
            instruction.memory_displ_size = 4
            is_store = n == 0 and (len(kinds) > 1 or row in _STORES)
        else:
            instruction.set_op_register(n, _register(kind, n, variant))
    encoder = Encoder(32)
    encoder.encode(instruction, 0)
    name = f"{CODE_NAMES[code]}{'/m' if memory else ''}/{variant}"
    return Form(code, name, row, encoder.take_buffer(), memory or _K.MEM in kinds or _K.SEG_RDI in kinds, is_store)


def _register(kind: OpCodeOperandKind_, n: int, variant: int) -> Register_:
    if kind in _OR_MEMORY:
        return _OR_MEMORY[kind]
    if kind in _XMM:
        return Register.XMM2 if n else Register.XMM1
    if kind in _MM:
        return Register.MM2 if n else Register.MM1
    if kind == _K.R32_REG:
        return Register.EAX
    if kind == _K.AX:
        return Register.AX
    return Register.ST0 if kind == _K.ST0 else _STACK_REGISTERS[variant]
