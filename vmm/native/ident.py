"""IDENT translation: instructions that keep their bytes, but for the window's prefixes and guest ESP in R12.

It must not know control flow, the stack's own instructions, or anything privileged.
"""

from __future__ import annotations

from iced_x86 import Code, Decoder, Instruction, OpKind, RegisterExt

from machine.instructions.operands import CONDITION_NAMES
from vmm.blocks import PREFIXES
from vmm.native import guest
from vmm.native.assembler import modrm
from vmm.native.cache import GUEST_ESP
from vmm.native.shapes import Shape, shape_of
from vmm.native.unit import Draft

# Rows of the instruction table. Flags that the SDM leaves undefined are the host's, as in every engine.
IDENT = frozenset(
    {
        "add", "or", "adc", "sbb", "and", "sub", "xor", "cmp", "test", "mov", "movzx", "movsx", "xchg", "lea",
        "inc", "dec", "neg", "not", "mul", "imul", "div", "idiv", "rol", "ror", "rcl", "rcr", "shl", "sal", "shr",
        "sar", "shld", "shrd", "bt", "bts", "btr", "btc", "bsf", "bsr", "bswap", "xadd", "cmpxchg", "cmpxchg8b",
        "cbw", "cwde", "cwd", "cdq", "clc", "stc", "cmc", "cld", "std", "lahf", "sahf",
        *(f"set{name}" for name in CONDITION_NAMES), *(f"cmov{name}" for name in CONDITION_NAMES),
    }
)  # fmt: skip
_ALIAS_OF_80 = b"\x82"
_SHORT_INC = frozenset({Code.INC_R16, Code.INC_R32})
_SHORT_DEC = frozenset({Code.DEC_R16, Code.DEC_R32})


def emit_ident(draft: Draft, instruction: Instruction, raw: bytes, decoder: Decoder) -> bool:
    """The same instruction without redundant prefixes; False for the few encodings that the host has no room for."""
    if instruction.code in _SHORT_INC:
        return _emit_short(draft, instruction, 0)
    if instruction.code in _SHORT_DEC:
        return _emit_short(draft, instruction, 1)
    shape = shape_of(instruction.code, instruction.mnemonic)
    if shape is None:
        return False
    has_memory = guest.has_memory(instruction)
    if has_memory and shape.bit_string and instruction.op1_kind == OpKind.REGISTER:
        return False  # the bit index reaches beyond the operand, modulo 4 GiB
    rex, high = _extension(instruction, shape)
    body = raw[prefix_count(raw) :]
    opcode, rest = body[: shape.opcode_bytes], body[shape.opcode_bytes :]
    if opcode == _ALIAS_OF_80:
        opcode = b"\x80"  # the host refuses the alias
    out = bytearray()
    if has_memory:
        operand = guest.memory(instruction)
        if operand is None:
            return False
        out += b"\x65\x67" if operand.gs else b"\x67"
        if shape.modrm:
            rex |= 1 if operand.base is GUEST_ESP else 0
            constants = decoder.get_constant_offsets(instruction)
            immediate_bytes = constants.immediate_size + constants.immediate_size2
            rest = modrm(rest[0] >> 3 & 7, operand) + rest[len(rest) - immediate_bytes :]
    if rex and high:
        return False
    out += shape.prefix
    if rex:
        out.append(0x40 | rex)
    draft.asm.raw(bytes(out) + opcode + rest)
    return True


def _emit_short(draft: Draft, instruction: Instruction, digit: int) -> bool:
    """40 to 4F mean REX prefixes to the host: FF /0 and FF /1 say the same."""
    host = guest.register(instruction.op0_register)
    prefix = b"\x66" if RegisterExt.size(instruction.op0_register) == 2 else b""
    rex = b"\x41" if host.number >= 8 else b""
    draft.asm.raw(prefix + rex + bytes([0xFF, 0xC0 | digit << 3 | host.number & 7]))
    return True


def prefix_count(raw: bytes) -> int:
    """How many prefix bytes an instruction starts with."""
    count = 0
    while raw[count] in PREFIXES:
        count += 1
    return count


def _extension(instruction: Instruction, shape: Shape) -> tuple[int, bool]:
    """The REX bits that put R12 for guest ESP into the register operands, and whether AH to BH rule REX out."""
    rex, high = 0, False
    for n in range(instruction.op_count):
        if instruction.op_kind(n) != OpKind.REGISTER or shape.implicit[n]:
            continue
        operand = instruction.op_register(n)
        if RegisterExt.number(operand) < 4:
            continue
        if RegisterExt.size(operand) == 1:
            high = True
        elif RegisterExt.number(operand) == 4:
            rex |= 4 if shape.in_reg_field[n] else 1
    return rex, high
