"""Owns the states in which instruction cases run in user mode: segments, pointers that hit the arena, corner values.

It must not know what an instruction does, only where its operands lie.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from iced_x86 import Instruction, MemorySizeExt, OpKind, Register, RegisterExt

from machine.flags import AF, CF, DF, OF, PF, SF, TF, ZF
from machine.state import EBP, EBX, ECX, EDI, ESI, ESP, MASK32
from tests.machine.instruction_cases import Case, decode
from tests.oracles.usermode import (
    ARENA,
    ARENA_BYTES,
    CODE,
    USER_CODE,
    USER_DATA,
    Job,
    LdtSegment,
    ldt_selector,
)

CORNERS: Final = (
    0, 1, 2, 7, 8, 0xF, 0x10, 0x1F, 0x20, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0x8000, 0xFFFF, 0x1_0000, 0x1234_5678,
    0x7FFF_FFFF, 0x8000_0000, 0x8000_0001, 0xFFFF_FF80, 0xFFFF_FFF8, 0xFFFF_FFFE, 0xFFFF_FFFF, 0x8080_8080, 0x0F0F_0F0F,
)  # fmt: skip
STATUS_FLAGS: Final = (CF, PF, AF, ZF, SF, OF)

# Where the operands of each kind lie: each has its own page, and a page behind it to straddle into.
OPERAND: Final = ARENA + 0x1000
SOURCE: Final = ARENA + 0x4000
DESTINATION: Final = ARENA + 0x6000
STACK: Final = ARENA + 0x9000
FRAME: Final = ARENA + 0xC000
MIDDLE: Final = 0x800  # offset in the first page
STRADDLE: Final = 0x1000  # the first byte of the second page

(
    CODE16, DATA32, DATA16, READ_ONLY, EXECUTE_ONLY, EXPAND_DOWN, SHORT, ABSENT, SHORT_CODE,
    SPREAD_ES, SPREAD_SS, SPREAD_DS, SPREAD_FS, SPREAD_GS,
) = range(14)  # fmt: skip
LDT: Final[Mapping[int, LdtSegment]] = {
    CODE16: LdtSegment(CODE, 0xFFFF, contents=2, big=False),
    DATA32: LdtSegment(ARENA, 0xFFFF),
    DATA16: LdtSegment(ARENA, 0xFFFF, big=False),
    READ_ONLY: LdtSegment(ARENA, 0xF, writable=False, in_pages=True),
    EXECUTE_ONLY: LdtSegment(CODE, 0xFFFF, contents=2, writable=False),
    EXPAND_DOWN: LdtSegment(ARENA, 0x17FF, contents=1, big=False),
    SHORT: LdtSegment(ARENA, 0x1FFF),
    ABSENT: LdtSegment(ARENA, 0xFFFF, present=False),
    SHORT_CODE: LdtSegment(CODE, 0x8FF, contents=2, big=False),
    **{
        number: LdtSegment(ARENA + 0x320 * (number - SPREAD_ES), 0xEFFF)
        for number in (SPREAD_ES, SPREAD_SS, SPREAD_DS, SPREAD_FS, SPREAD_GS)
    },
}
"""The LDT of every job, by entry number."""

SELECTORS: Final = (
    0, 3, USER_CODE, USER_CODE & ~3, USER_DATA, USER_DATA & ~3, USER_DATA & ~1, 0xFFFF, 0xFF8, 0x107,
    *(ldt_selector(number) for number in LDT), ldt_selector(DATA32) & ~3,
)  # fmt: skip
"""Null, valid, of other RPL, of each kind, and beyond the limits of both tables."""


@dataclass(frozen=True, slots=True)
class World:
    """Segments to run in.

    Attributes:
        name: for people.
        selectors: ES CS SS DS FS GS.
        data_base: base of all but CS.
        code_base: base of CS.
        wide_stack: SS.B.
    """

    name: str
    selectors: tuple[int, ...]
    data_base: int
    code_base: int
    wide_stack: bool
    code_linear: int = CODE + 0x800
    arena: range = range(ARENA, ARENA + ARENA_BYTES)


def world(name: str, code: int, stack: int, data: int) -> World:
    """A world of these selectors, of which all but the code's have the same base."""
    selectors = (data, code, stack, data, data, data)
    wide = stack == USER_DATA or LDT[stack >> 3].big
    return World(name, selectors, 0 if stack == USER_DATA else ARENA, 0 if code == USER_CODE else CODE, wide)


_C16, _D16, _D32 = ldt_selector(CODE16), ldt_selector(DATA16), ldt_selector(DATA32)
FLAT: Final = world("flat", USER_CODE, USER_DATA, USER_DATA)
BASED: Final = world("based", USER_CODE, _D32, _D32)
WORLDS: Final = {
    32: (FLAT, BASED, world("narrow stack", USER_CODE, _D16, _D32)),
    16: (world("16-bit", _C16, _D16, _D16), world("wide stack", _C16, _D32, _D32)),
}
"""By the bits of the code."""

_SPREAD: Final = tuple(ldt_selector(number) for number in (SPREAD_SS, SPREAD_DS, SPREAD_FS, SPREAD_GS))
SPREAD: Final = {
    32: World("spread", (ldt_selector(SPREAD_ES), USER_CODE, *_SPREAD), ARENA, 0, wide_stack=True),
    16: World("spread", (ldt_selector(SPREAD_ES), _C16, *_SPREAD), ARENA, CODE, wide_stack=True),
}
"""Worlds in which each segment has a base of its own, so that the wrong one shows."""


def some_world(case: Case, chance: random.Random) -> World:
    """One of the worlds in which the addresses of `case` can reach the arena."""
    worlds = WORLDS[case.bits]
    return chance.choice(worlds[1:] if case.bits == 32 and address_bits(case.instruction) == 16 else worlds)


@dataclass(slots=True)
class Layout:
    """Where a job puts its operands, as linear addresses."""

    operand: int = OPERAND + MIDDLE
    source: int = SOURCE + MIDDLE
    destination: int = DESTINATION + MIDDLE
    stack: int = STACK + MIDDLE
    frame: int = FRAME + MIDDLE
    patches: dict[int, bytes] = field(default_factory=dict)


def address_bits(instruction: Instruction) -> int:
    """16, 32, or 0 without a memory operand: from the operands alone."""
    for n in range(instruction.op_count):
        kind = instruction.op_kind(n)
        if kind in (OpKind.MEMORY_SEG_SI, OpKind.MEMORY_SEG_DI, OpKind.MEMORY_ESDI):
            return 16
        if kind in (OpKind.MEMORY_SEG_ESI, OpKind.MEMORY_SEG_EDI, OpKind.MEMORY_ESEDI):
            return 32
        if kind == OpKind.MEMORY:
            register = instruction.memory_base or instruction.memory_index
            return 8 * (RegisterExt.size(register) if register else instruction.memory_displ_size)
    return 0


def has_modrm_memory(instruction: Instruction) -> bool:
    """Whether an operand is memory with an address that the instruction spells out; XLAT's is implied."""
    kinds = [instruction.op_kind(n) for n in range(instruction.op_count)]
    return OpKind.MEMORY in kinds and instruction.memory_index != Register.AL


def aim(case: Case, gpr: list[int], target: int) -> tuple[Case, int]:
    """Change registers, and a displacement that is the whole address, so that the operand is at offset `target`.

    ESP is left alone. Returns the case and the offset that was reached: with a scaled index it may be a few bytes less.
    """
    instruction = case.instruction
    wide = address_bits(instruction) == 32
    mask = MASK32 if wide else 0xFFFF
    scale = instruction.memory_index_scale
    base, index = (
        RegisterExt.number(register) if register else None
        for register in (instruction.memory_base, instruction.memory_index)
    )
    if base is None and index is None:
        return case.with_displacement(target & mask), target & mask
    if base == ESP and case.displacement_bytes == 4:
        case = case.with_displacement(target - gpr[ESP])
        instruction = case.instruction
    distance = (target - instruction.memory_displacement) & mask

    def put(register: int, value: int) -> None:
        gpr[register] = gpr[register] & ~mask & MASK32 | value & mask

    if base == index:
        assert base is not None
        put(base, distance // (1 + scale))
    elif base == ESP:
        if index is not None:
            put(index, (distance - gpr[ESP] & mask) // scale)
    elif base is not None:
        put(base, distance - (gpr[index] * scale if index is not None else 0))
    else:
        assert index is not None
        put(index, distance // scale)
    reached = instruction.memory_displacement
    reached += gpr[base] if base is not None else 0
    reached += gpr[index] * scale if index is not None else 0
    return case, reached & mask


# Rows whose memory operand or stack must hold a selector for anything but a fault to come of it.
_POINTER_LOADS: Final = frozenset(("lds", "les", "lss", "lfs", "lgs"))
_FAR: Final = frozenset(("jmp_far", "call_far"))
_FAR_RETURNS: Final = frozenset(("retf", "iret", "iretd"))
_LOOKS_AT_SELECTOR: Final = frozenset(("lar", "lsl", "verr", "verw", "arpl", "mov_to_sreg"))
_BITS: Final = frozenset(("bt", "bts", "btr", "btc"))
_INDEXES: Final = (0, 1, 7, 31, 32, 33, 0x3FFF, 0x7FFF, 0xFFFF, 0xFFFE, 0xFFDF, 0x8000)


def build_job(case: Case, chance: random.Random, world: World, layout: Layout) -> tuple[Case, Job]:
    """A state for `case`: values by `chance`, operands by `layout`. The case may get another displacement."""
    mnemonic, instruction = case.row.mnemonic, case.instruction
    gpr = [chance.choice(CORNERS) if chance.random() < 0.6 else chance.getrandbits(32) for _ in range(8)]
    narrow = address_bits(instruction) == 16

    def pointer(linear: int, *, short: bool = narrow) -> int:
        offset = (linear - world.data_base) & MASK32
        return offset & 0xFFFF | chance.getrandbits(16) << 16 if short else offset

    gpr[ESP] = pointer(layout.stack, short=not world.wide_stack)
    if instruction.is_string_instruction:
        gpr[ESI], gpr[EDI] = pointer(layout.source), pointer(layout.destination)
        gpr[ECX] = chance.randrange(6) | (chance.getrandbits(16) << 16 if narrow else 0)
    elif mnemonic == "xlatb":
        gpr[EBX] = pointer(layout.operand - (gpr[0] & 0xFF))
    elif mnemonic in ("enter", "leave"):
        gpr[EBP] = pointer(layout.frame, short=not world.wide_stack)
    elif mnemonic.startswith("loop") or mnemonic.endswith("cxz"):
        gpr[ECX] = chance.choice((0, 1, 2, 0x1_0000, 0x1_0001, 0xFFFF, 0x10_FFFF))
    if mnemonic in _BITS and chance.random() < 0.8:
        source = RegisterExt.number(instruction.op1_register) if instruction.op1_kind == OpKind.REGISTER else 0
        index = chance.choice(_INDEXES)
        wide = RegisterExt.size(instruction.op1_register) == 4
        gpr[source] = index - 0x1_0000 & MASK32 if wide and index >= 0x8000 else index | chance.getrandbits(16) << 16
        if wide and index < 0x8000:
            gpr[source] = index
    if mnemonic in _LOOKS_AT_SELECTOR:
        for n in range(instruction.op_count):
            register = instruction.op_register(n)
            if RegisterExt.is_gpr16(register) or RegisterExt.is_gpr32(register):
                gpr[RegisterExt.number(register)] = chance.choice(SELECTORS) | chance.getrandbits(16) << 16
    if mnemonic in _FAR and not has_modrm_memory(instruction):
        size = 4 if instruction.op0_kind == OpKind.FAR_BRANCH32 else 2
        case = decode(case.code[: -size - 2] + _far_pointer(chance, size, SELECTORS), case.bits) or case
        instruction = case.instruction
    patches = dict(layout.patches)
    if has_modrm_memory(instruction):
        case, reached = aim(case, gpr, layout.operand - world.data_base)
        _patch(patches, world, world.data_base + reached, _contents(case, chance))
    top = world.data_base + (gpr[ESP] if world.wide_stack else gpr[ESP] & 0xFFFF)
    if len(patches) < 2:
        _patch(patches, world, top, _stack_contents(case, chance, world))
    status = sum(chance.sample(STATUS_FLAGS, chance.randrange(7)))
    eflags = status | TF | (DF if chance.random() < 0.3 else 0)
    return case, Job(
        case.code,
        tuple(gpr),
        eflags,
        world.code_linear - world.code_base,
        world.code_linear,
        world.selectors,
        iterations=8,
        patches=patches,
    )


def _patch(patches: dict[int, bytes], world: World, linear: int, data: bytes) -> None:
    """Add what of `data` lies in the arena."""
    linear &= MASK32
    if linear in world.arena:
        patches[linear] = data[: world.arena.stop - linear]


def _words(chance: random.Random) -> bytes:
    if chance.random() < 0.3:
        return chance.randbytes(16)
    return b"".join(chance.choice(CORNERS).to_bytes(4, "little") for _ in range(4))


def _far_pointer(chance: random.Random, offset_bytes: int, selectors: tuple[int, ...]) -> bytes:
    offset = chance.choice((0, 0x123, 0xFFFF, 0x1_0000, 0x12_3456, MASK32)) & (1 << 8 * offset_bytes) - 1
    return offset.to_bytes(offset_bytes, "little") + chance.choice(selectors).to_bytes(2, "little")


def _contents(case: Case, chance: random.Random) -> bytes:
    """The memory operand."""
    mnemonic, instruction = case.row.mnemonic, case.instruction
    if mnemonic in _POINTER_LOADS:
        return _far_pointer(chance, RegisterExt.size(instruction.op0_register), SELECTORS)
    if mnemonic in _FAR:
        return _far_pointer(chance, MemorySizeExt.size(instruction.memory_size) - 2, SELECTORS)
    if mnemonic in _LOOKS_AT_SELECTOR:
        return chance.choice(SELECTORS).to_bytes(2, "little")
    return _words(chance)


def _stack_contents(case: Case, chance: random.Random, world: World) -> bytes:
    """What is on top of the stack."""
    mnemonic = case.row.mnemonic
    size = 4 if (case.bits == 32) != (0x66 in case.code[:2]) else 2
    if mnemonic == "pop_sreg":
        return chance.choice(SELECTORS).to_bytes(4, "little")
    if mnemonic in _FAR_RETURNS:
        offset = chance.choice((0, 0x123, 0x8FF, 0x900, 0xFFFF, 0x1_0000)).to_bytes(4, "little")[:size]
        selector = chance.choice((*SELECTORS, world.selectors[1])).to_bytes(4, "little")[:size]
        return offset + selector + (chance.getrandbits(12) & ~TF).to_bytes(4, "little")[:size]
    return _words(chance)
