"""IDENT translation: instructions that keep their bytes, but for the window's prefixes and guest ESP in R12.

It must not know control flow, the stack's own instructions, or anything privileged.
"""

from __future__ import annotations

from dataclasses import replace

from iced_x86 import Code, Decoder, Instruction, Mnemonic, OpKind, RegisterExt

from machine.instructions.operands import CONDITION_NAMES
from vmm.blocks import PREFIXES
from vmm.native import guest, segmented, soft
from vmm.native.assembler import modrm
from vmm.native.operands import R8D, R9D, Memory, address
from vmm.native.operands import Register as HostRegister
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
# MOV between AL, AX or EAX and an offset: the same with a ModRM byte.
_MOFFS = {b"\xa0": b"\x8a", b"\xa1": b"\x8b", b"\xa2": b"\x88", b"\xa3": b"\x89"}
# Operations between a byte in memory and one in a register, without TEST and XCHG: ModRM.reg is the register.
_BYTE_OPERATIONS = frozenset({*range(0x00, 0x40, 8), *range(0x02, 0x40, 8), 0x88, 0x8A})
_ALIAS_OF_80 = b"\x82"
_BIT_OPERATIONS = {Mnemonic.BTS: "bts", Mnemonic.BTR: "btr", Mnemonic.BTC: "btc"}
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
        return _emit_bit_string(draft, instruction)
    if instruction.ip32 in draft.soft and not draft.straddles and soft.is_division(instruction):
        soft.check_division(draft, instruction)
    rex, high = _extension(instruction, shape)
    is_lea = instruction.mnemonic == Mnemonic.LEA
    if is_lea and not guest.has_wide_address(instruction):
        return _emit_narrow_lea(draft, instruction)
    body = raw[prefix_count(raw) :]
    opcode, rest = body[: shape.opcode_bytes], body[shape.opcode_bytes :]
    if opcode == _ALIAS_OF_80:
        opcode = b"\x80"  # the host refuses the alias
    out = bytearray()
    if has_memory:
        operand = guest.memory(instruction) if is_lea else _operand(draft, instruction)
        if operand is None:
            return False
        is_computed = operand.base is not None and operand.base.number == R8D.number
        if high and is_computed:
            return _emit_high(draft, instruction, opcode, operand)
        if is_computed and opcode in _MOFFS:
            opcode, rest, shape = _MOFFS[opcode], b"\0", replace(shape, modrm=True)
        out += _prefixes(operand)
        if shape.modrm:
            rex |= 1 if operand.base is not None and operand.base.number >= 8 else 0
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


def _operand(draft: Draft, instruction: Instruction) -> Memory | None:
    """The memory operand in the window, or by the software path."""
    if instruction.ip32 in draft.soft and not draft.straddles and soft.is_possible(draft.mode, instruction):
        return soft.operand(draft, instruction)
    return segmented.operand(draft, instruction)


def _prefixes(operand: Memory) -> bytes:
    """Those that a memory operand asks for."""
    is_place = operand.base is not None and operand.base.bits == 64
    return b"\x65\x67" if operand.gs else b"" if is_place else b"\x67"


def _emit_bit_string(draft: Draft, instruction: Instruction) -> bool:
    """BT, BTS, BTR, BTC with the index in a register, which reaches beyond the operand, modulo 4 GiB.

    R8D = address + 4 * (index >> 5); BT: R9D = [R8]; op R9D, index
    Others: [R8] = ~[R8], the one access that can fault, as a write should, without flags; R9D = ~[R8]; op R9D, index;
        [R8] = R9D
    """
    operand = guest.memory(instruction)
    if operand is None or operand.bits != 32 or not draft.mode.is_plain or not guest.is_flat(instruction):
        return False
    emit = draft.asm.emit
    index = guest.register(instruction.op1_register)
    emit("lea", R8D, operand._replace(bits=0, gs=False))
    emit("mov", R9D, 5)
    emit("sarx", R9D, index, R9D)
    emit("lea", R8D, address(R8D, index=R9D, scale=4))
    place = Memory(32, R8D, gs=True)
    if instruction.mnemonic == Mnemonic.BT:
        emit("mov", R9D, place)
        emit("bt", R9D, index)
        return True
    emit("not", place)
    emit("mov", R9D, place)
    emit("not", R9D)
    emit(_BIT_OPERATIONS[instruction.mnemonic], R9D, index)
    emit("mov", place, R9D)
    return True


def _emit_short(draft: Draft, instruction: Instruction, digit: int) -> bool:
    """40 to 4F mean REX prefixes to the host: FF /0 and FF /1 say the same."""
    host = guest.register(instruction.op0_register)
    prefix = b"\x66" if RegisterExt.size(instruction.op0_register) == 2 else b""
    rex = b"\x41" if host.number >= 8 else b""
    draft.asm.raw(prefix + rex + bytes([0xFF, 0xC0 | digit << 3 | host.number & 7]))
    return True


def _emit_narrow_lea(draft: Draft, instruction: Instruction) -> bool:
    """LEA with a 16-bit address."""
    segmented.emit_offset(draft, instruction)
    destination = guest.register(instruction.op0_register)
    bits = 8 * RegisterExt.size(instruction.op0_register)
    draft.asm.emit("mov", HostRegister(destination.number, bits), HostRegister(R8D.number, bits))
    return True


def _emit_high(draft: Draft, instruction: Instruction, opcode: bytes, operand: Memory) -> bool:
    """AH to BH cannot stand beside R8: the byte goes by way of R9, or of AL to BL.

    op [R8], AH: R9D = EAX >> 8; op [R8], R9B
    op AH, [R8]: R9B = [R8]; exchange AL, AH; op AL, R9B; exchange AL, AH
    """
    if len(opcode) != 1 or opcode[0] not in _BYTE_OPERATIONS:
        return False
    emit = draft.asm.emit
    is_source = instruction.op0_kind == OpKind.MEMORY
    named = instruction.op1_register if is_source else instruction.op0_register
    number = RegisterExt.number(named) - 4
    if is_source:
        emit("rorx", R9D, HostRegister(number, 32), 8)
        draft.asm.raw(_prefixes(operand) + b"\x45" + opcode + modrm(1, operand))
        return True
    emit("movzx", R9D, operand)
    exchange = b"\x86" + bytes([0xC0 | number + 4 << 3 | number])
    draft.asm.raw(exchange + b"\x44" + bytes([opcode[0] & ~2, 0xC8 | number]) + exchange)
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
