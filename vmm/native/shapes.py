"""The shapes of guest encodings that IDENT translation keeps: prefix, opcode and ModRM, by the decoder's codes.

Source: SDM Vol. 2A, "Instruction Format".
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from iced_x86 import Code_, MandatoryPrefix, Mnemonic, OpCodeInfo, OpCodeOperandKind, OpCodeTableKind

_REG_FIELD = frozenset(
    {
        OpCodeOperandKind.R8_REG,
        OpCodeOperandKind.R16_REG,
        OpCodeOperandKind.R32_REG,
        OpCodeOperandKind.R16_REG_MEM,
        OpCodeOperandKind.R32_REG_MEM,
    }
)
_RM_FIELD = frozenset(
    {
        OpCodeOperandKind.MEM,
        OpCodeOperandKind.R8_OR_MEM,
        OpCodeOperandKind.R16_OR_MEM,
        OpCodeOperandKind.R32_OR_MEM,
        OpCodeOperandKind.R16_RM,
        OpCodeOperandKind.R32_RM,
    }
)
_IN_OPCODE = frozenset({OpCodeOperandKind.R8_OPCODE, OpCodeOperandKind.R16_OPCODE, OpCodeOperandKind.R32_OPCODE})
_MOFFS = frozenset({OpCodeOperandKind.MEM_OFFS})
_BIT_STRINGS = frozenset({Mnemonic.BT, Mnemonic.BTS, Mnemonic.BTR, Mnemonic.BTC})


@dataclass(frozen=True, slots=True)
class Shape:
    """What an encoding is made of, apart from redundant prefixes.

    Attributes:
        prefix: the operand-size prefix, or nothing.
        opcode_bytes: 1, 2 or 3.
        modrm: it has a ModRM byte.
        in_reg_field: for each operand, whether ModRM.reg names it (else ModRM.rm or the opcode does).
        implicit: for each operand, whether the opcode implies it (AL, CL, an immediate).
        bit_string: a register index may reach beyond a memory operand.
    """

    prefix: bytes
    opcode_bytes: int
    modrm: bool
    in_reg_field: tuple[bool, ...]
    implicit: tuple[bool, ...]
    bit_string: bool


@cache
def shape_of(code: Code_, mnemonic: int) -> Shape | None:
    """The shape of an encoding in 32-bit code; None if it has a mandatory prefix that IDENT would have to keep."""
    info = OpCodeInfo(code)
    if info.mandatory_prefix != MandatoryPrefix.NONE:
        return None
    kinds = info.op_kinds()
    explicit = _REG_FIELD | _RM_FIELD | _IN_OPCODE | _MOFFS
    in_fields = any(kind in _REG_FIELD or kind in _RM_FIELD for kind in kinds)
    return Shape(
        prefix=b"\x66" if info.operand_size == 16 else b"",
        opcode_bytes=info.op_code_len + (0 if info.table == OpCodeTableKind.NORMAL else 1),
        modrm=in_fields or info.is_group,
        in_reg_field=tuple(kind in _REG_FIELD for kind in kinds),
        implicit=tuple(kind not in explicit for kind in kinds),
        bit_string=mnemonic in _BIT_STRINGS,
    )
