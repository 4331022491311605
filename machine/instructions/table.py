"""The one instruction table, read by the reference interpreter, the translator and the tests.

A row says what an instruction does by building a closure for a decoded instance of it. It must not know how
instructions are fetched, ordered or counted. What no row names does not exist on this CPU: #UD.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import cast

from iced_x86 import Code, Code_, CpuidFeature, Instruction, Mnemonic, OpCodeInfo, OpCodeOperandKind

from machine.cpu import Cpu
from machine.cpuid import P6_INSTRUCTIONS

# Executes one instance of an instruction on the CPU that it was built for. It may raise GuestFault before it changes
# state. A control transfer sets state.eip; everything else leaves it alone. Until then state.eip is the start of the
# block, and `Instruction.ip` counts from there.
Operation = Callable[[], None]
Build = Callable[[Cpu, Instruction], Operation]


class Effect(Enum):
    """What the end of an instruction means to whoever runs a block of them."""

    NEXT = auto()  # go on with the following instruction
    BRANCH = auto()  # state.eip was set
    SYSTEM = auto()  # anything may have changed: mode, rights, interrupts, time; state.eip is left alone
    SYSTEM_BRANCH = auto()  # both
    REPEAT = auto()  # a string instruction with REP: sets state.eip, to itself while iterations are left


@dataclass(frozen=True, slots=True)
class Row:
    """One row.

    Attributes:
        mnemonic: iced's name in lower case, such as "add".
        build: makes the operation.
        effect: see `Effect`; REP turns NEXT into REPEAT for string instructions.
        undefined: the EFLAGS bits that the SDM leaves undefined, in the widest case.
        string: takes REP prefixes.
    """

    mnemonic: str
    build: Build
    effect: Effect = Effect.NEXT
    undefined: int = 0
    string: bool = False


FPU_FEATURES = frozenset({CpuidFeature.FPU, CpuidFeature.FPU287, CpuidFeature.FPU387})

_MNEMONICS: dict[int, str] = {value: name.lower() for name, value in vars(Mnemonic).items() if isinstance(value, int)}
CODE_NAMES = {cast("Code_", value): name for name, value in vars(Code).items() if isinstance(value, int)}

# The table, in two parts: what every CPU has, and what comes with an FPU.
ROWS: dict[str, Row] = {}
FPU_ROWS: dict[str, Row] = {}
_by_model: dict[frozenset[int], dict[Code_, Row | None]] = {}


def add_rows(*rows: Row, part: dict[str, Row] = ROWS) -> None:
    """Put rows into a part of the table; a mnemonic has one."""
    for row in rows:
        if row.mnemonic in ROWS or row.mnemonic in FPU_ROWS:
            message = f"the instruction table has {row.mnemonic} already"
            raise ValueError(message)
        part[row.mnemonic] = row


def features_of(code: Code_) -> frozenset[int]:
    """The CPUID features that an instruction needs."""
    instance = Instruction()
    instance.code = code
    return frozenset(instance.cpuid_features())


def lookup(code: Code_, features: frozenset[int] = P6_INSTRUCTIONS) -> Row | None:
    """The row for one of the decoder's codes; None if a CPU with these features has no such instruction.

    Args:
        code: what the decoder names.
        features: a CPU model's `CpuModel.instructions`.
    """
    by_code = _by_model.setdefault(features, {})
    try:
        return by_code[code]
    except KeyError:
        row = by_code[code] = _find(code, features)
        return row


def _find(code: Code_, present: frozenset[int]) -> Row | None:
    info = OpCodeInfo(code)
    if not info.is_instruction or not (info.mode16 or info.mode32):
        return None
    features = features_of(code)
    if features & FPU_FEATURES and not present & FPU_FEATURES:
        return ROWS["fpu"]
    if CODE_NAMES[code] in NOT_HERE or not features <= present:
        return None
    if info.is_reserved_nop:
        return ROWS["nop"]
    name = row_name(code)
    return ROWS.get(name) or FPU_ROWS.get(name)


def row_name(code: Code_) -> str:
    """The mnemonic; for the forms of MOV, POP, CALL, JMP and RET that differ in kind, a name of our own.

    MOVSD and CMPSD are string instructions, and of SSE2.
    """
    instance = Instruction()
    instance.code = code
    mnemonic = _MNEMONICS[instance.mnemonic]
    kinds = OpCodeInfo(code).op_kinds()
    if mnemonic == "mov":
        for n, kind in enumerate(kinds):
            if kind in _MOV_FORMS:
                return _MOV_FORMS[kind] if n else _MOV_FORMS[kind].replace("from", "to")
    if mnemonic in ("movsd", "cmpsd") and CpuidFeature.SSE2 in instance.cpuid_features():
        return mnemonic + "_sse2"
    if mnemonic == "pop" and kinds[0] in _SEGMENT_KINDS:
        return "pop_sreg"
    if instance.is_call_far or instance.is_call_far_indirect:
        return "call_far"
    if instance.is_jmp_far or instance.is_jmp_far_indirect:
        return "jmp_far"
    return mnemonic


_MOV_FORMS = {
    OpCodeOperandKind.SEG_REG: "mov_from_sreg",
    OpCodeOperandKind.CR_REG: "mov_from_cr",
    OpCodeOperandKind.DR_REG: "mov_from_dr",
    OpCodeOperandKind.TR_REG: "mov_from_tr",
}
_SEGMENT_KINDS = frozenset(
    {OpCodeOperandKind.ES, OpCodeOperandKind.SS, OpCodeOperandKind.DS, OpCodeOperandKind.FS, OpCodeOperandKind.GS}
)


# Opcodes whose features this CPU has and that it does not have all the same: POP CS ended with the 8086, 0F 0D came
# later.
NOT_HERE = frozenset({"POPW_CS", "RESERVEDNOP_RM16_R16_0F0D", "RESERVEDNOP_RM32_R32_0F0D", "RESERVEDNOP_RM64_R64_0F0D"})


def codes(features: frozenset[int] = P6_INSTRUCTIONS) -> list[Code_]:
    """Every code that has a row on a CPU with these features: what a test must cover."""
    return [code for code in CODE_NAMES if lookup(code, features) is not None]
