"""`bt` and `trap` against `interp` outside plain 32-bit code: real, virtual-8086 and 16-bit protected mode, segments.

A program is a row of random encodings. A fault stops before its delivery, and both guests go on at the next
instruction with fresh registers, so that one program meets many.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from functools import cache

import pytest
from iced_x86 import OpKind

from machine.faults import Vector
from machine.flags import DF, VM
from machine.state import CR0_PE, CS, DS, ECX, ES, ESP, FS, GS, MASK32, SEG_DB, SEG_G, SS
from tests.machine.instruction_cases import Bits, Case, by_mnemonic, decode
from tests.vmm.bare import Bare, map_low_memory, real
from tests.vmm.twins import Twins
from vmm.native.ident import IDENT
from vmm.native.translator import NARROW_EMITTERS

_CODE = 0x2_8E30  # linear; a page ends within the program
_DATA = 0x3_0000
_STEPS = 48
_SKIPPED = frozenset({"hlt"})
_RELATIVE = frozenset({OpKind.NEAR_BRANCH16, OpKind.NEAR_BRANCH32})
_EDGES = (0, 1, 2, 0xFFFC, 0xFFFD, 0xFFFE, 0xFFFF)
_ALL_FAULTS = frozenset(Vector) - {Vector.NMI}
_DATA_RIGHTS, _CODE_RIGHTS = 0x93, 0x9B


@dataclass(frozen=True, slots=True)
class Surroundings:
    """The mode that a program runs in.

    Attributes:
        bits: of the code.
        protected, v86: real mode is neither.
        code, stack, data, extra, others: base, limit and attributes of CS, SS, DS, ES, and FS with GS.
    """

    bits: Bits
    code: tuple[int, int, int]
    stack: tuple[int, int, int]
    data: tuple[int, int, int]
    extra: tuple[int, int, int]
    others: tuple[int, int, int]
    protected: bool = False
    v86: bool = False

    def apply(self, bare: Bare) -> None:
        """Bring a CPU into it."""
        state = bare.state
        if self.protected:
            state.cr0 |= CR0_PE
        if self.v86:
            map_low_memory(bare)
        for number, hidden in (
            (CS, self.code), (SS, self.stack), (DS, self.data), (ES, self.extra), (FS, self.others), (GS, self.others)
        ):  # fmt: skip
            base, limit, attributes = hidden
            state.segments[number].load(base >> 4 & 0xFFFF, base, limit, attributes | (0x60 if self.v86 else 0))
        if self.v86:
            state.eflags |= VM
            bare.cpu.set_cpl(3)


_REAL = (_DATA, 0xFFFF, _DATA_RIGHTS)
_BIG = _DATA_RIGHTS | SEG_DB | SEG_G
SURROUNDINGS = {
    "real": Surroundings(16, (_CODE & ~15, 0xFFFF, _DATA_RIGHTS), _REAL, _REAL, _REAL, _REAL),
    "unreal": Surroundings(
        16, (_CODE & ~15, 0xFFFF, _DATA_RIGHTS), _REAL, (_DATA, MASK32, _BIG), (0, MASK32, _BIG), (_DATA, 0x8000, 0x93)
    ),
    "real, null and short": Surroundings(
        16, (_CODE & ~15, 0xFFFF, 0x93), (_DATA, MASK32, 0x93), (_DATA, 0xFFFD, 0x93), (_DATA, 0xFFFE, 0x93), (0, 0, 0)
    ),
    "virtual-8086": Surroundings(
        16, (_CODE & ~15, 0xFFFF, 0x93), _REAL, _REAL, _REAL, _REAL, protected=True, v86=True
    ),
    "16-bit protected": Surroundings(
        16, (_CODE - 7, 0x7FFF, _CODE_RIGHTS), (_DATA, 0xEFFF, 0x93), (_DATA + 1, 0xFFFE, 0x93),
        (_DATA, 0xFFFF, 0x91), (_DATA, 0x7FFF, 0x97), protected=True,
    ),
    "16-bit code, 32-bit stack": Surroundings(
        16, (_CODE, 0xFFFF, _CODE_RIGHTS), (0, MASK32, _BIG), (0, MASK32, _BIG), (0, MASK32, _BIG), (0, 0, 0),
        protected=True,
    ),
    "32-bit code, 16-bit stack": Surroundings(
        32, (_CODE - 3, 0x3_FFFF, _CODE_RIGHTS | SEG_DB), (_DATA, 0xFFFF, 0x93), (_DATA, 0xFFFF, 0x93 | SEG_DB),
        (0, MASK32, _BIG), (_DATA, 0x10, 0x93), protected=True,
    ),
    "32-bit code with bases": Surroundings(
        32, (_CODE & ~0xFFF, MASK32, _CODE_RIGHTS | SEG_DB | SEG_G), (_DATA, MASK32, _BIG), (_DATA, MASK32, _BIG),
        (_DATA, 0xFFFF, _BIG), (0, 0x3FFFF, 0x97 | SEG_DB), protected=True,
    ),
    "plain but for a 16-bit stack": Surroundings(
        32, (0, MASK32, _CODE_RIGHTS | SEG_DB | SEG_G), (0, MASK32, 0x93 | SEG_G), (0, MASK32, _BIG),
        (0, MASK32, _BIG), (_DATA, 0xFFFF, 0x93), protected=True,
    ),
    "plain": Surroundings(
        32, (0, MASK32, _CODE_RIGHTS | SEG_DB | SEG_G), (0, MASK32, _BIG), (0, MASK32, _BIG), (0, MASK32, _BIG),
        (_DATA, 0xFFFF, 0x93), protected=True,
    ),
}  # fmt: skip


@cache
def cases(bits: Bits) -> tuple[Case, ...]:
    """What may be emitted in such modes."""
    names = (IDENT | set(NARROW_EMITTERS)) - _SKIPPED
    return tuple(case for name, found in sorted(by_mnemonic(bits).items()) for case in found if name in names)


def _write_program(bare: Bare, chance: random.Random, around: Surroundings) -> list[int]:
    """Put a program at _CODE; returns linear addresses of its instructions, and of what follows."""
    strings = [case for case in cases(around.bits) if case.row.string]
    chosen = [chance.choice(strings if chance.random() < 0.2 else cases(around.bits)) for _ in range(_STEPS)]
    codes = []
    for case in chosen:
        code = case.code
        prefix = chance.choice((b"",) * 6 + (b"\x26", b"\x2e", b"\x36", b"\x3e", b"\x64", b"\x65"))
        if case.row.string and chance.random() < 0.6:
            prefix += chance.choice((b"\xf2", b"\xf3"))
        if case.instruction.op0_kind not in _RELATIVE and not case.instruction.has_lock_prefix:
            code = prefix + code
            if decode(code, around.bits) is None:
                code = case.code
        if case.row.string:  # an ECX that comes by chance may mean hours
            count = chance.choice((0, 1, 2, 3, 40, chance.randrange(0x800), 0x1_0000 if chance.random() < 0.2 else 9))
            code = (b"\x66" if around.bits == 16 else b"") + b"\xb9" + count.to_bytes(4, "little") + code
        codes.append(code)
    starts = [_CODE]
    for code in codes:
        starts.append(starts[-1] + len(code))
    for n, case in enumerate(chosen):
        if case.instruction.op0_kind in _RELATIVE:
            is_word = case.instruction.op0_kind == OpKind.NEAR_BRANCH16
            opcode_bytes = codes[n][:-1] if len(codes[n]) <= 3 and codes[n][0] not in (0xE8, 0xE9) else b""
            size = 1 if opcode_bytes else 2 if is_word else 4
            relative = chance.choice(starts) - starts[n + 1]
            if size == 1:
                relative = max(-128, min(127, relative))
            codes[n] = codes[n][:-size] + (relative & (1 << 8 * size) - 1).to_bytes(size, "little")
    bare.memory.write(_CODE, b"".join(codes) + b"\xeb\xfe")
    return starts


def _set_registers(bare: Bare, chance: random.Random, around: Surroundings) -> None:
    state = bare.state
    for number in range(8):
        value = chance.choice((chance.choice(_EDGES), chance.randrange(0x1_0000)))
        if around.bits == 32 and number != ESP:
            value += chance.choice((0, _DATA - around.data[0], 0x1_0000))
        elif chance.random() < 0.5:
            value |= chance.getrandbits(16) << 16
        state.gpr[number] = value
    state.gpr[ECX] &= 0x7FF
    state.eflags = state.eflags & ~DF | chance.choice((0, 0, 0, DF))
    if state.segments[SS].big:
        state.gpr[ESP] = _DATA - around.stack[0] + 0x8000


@pytest.mark.parametrize("name", SURROUNDINGS)
@pytest.mark.parametrize(
    ("other_engine", "tu_insns", "seed"),
    [*itertools.product(["bt"], [1, 32], range(4)), ("trap", 32, 4), ("trap nested", 32, 5)],
    indirect=["other_engine"],
)
@pytest.mark.usefixtures("other_engine")
def test_random_programs(name: str, seed: int, tu_insns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmm.bt.MIN_BUDGET_INSNS", 1)
    monkeypatch.setattr("vmm.native.translator.MAX_TU_INSTRUCTIONS", tu_insns)
    # Whether a REP is under way shows at a fault; with 64 KiB at once it never is.
    monkeypatch.setattr("machine.instructions.strings.CHUNK_ITERATIONS", 1 << 20)
    around = SURROUNDINGS[name]
    seed = seed + 100 * tu_insns + 1000 * sorted(SURROUNDINGS).index(name)
    starts: list[int] = []

    def prepare(bare: Bare) -> None:
        chance = random.Random(seed)
        around.apply(bare)
        bare.memory.write(_DATA, bytes((7 * at) & 0xFF for at in range(256)) * 0x110)
        starts[:] = _write_program(bare, chance, around)
        _set_registers(bare, chance, around)
        bare.state.eip = _CODE - around.code[0]
        bare.debug.caught_vectors = _ALL_FAULTS

    with Twins("hlt", prepare, make_guest=real) as twins:
        for turn in range(3 * _STEPS):
            stop = twins.run(12, (5, 1, 6))
            state = twins.reference.state
            linear = state.segments[CS].base + state.eip
            following = next((start for start in starts if start > linear), _CODE)
            if stop is None and _CODE <= linear < starts[-1] and turn % 3:  # or else it may go round for ever
                continue

            def go_on(bare: Bare, following: int = following, turn: int = turn) -> None:
                bare.state.halted = 0
                around.apply(bare)
                bare.state.eip = following - around.code[0]
                _set_registers(bare, random.Random(turn), around)

            twins.each(go_on)
        assert twins.count("translation units")


@pytest.mark.parametrize("limit", [0xFFFF, MASK32])
@pytest.mark.parametrize("offset", [*range(0x0C, 0x16), *range(0xFFEC, 0x1_0000)])
def test_what_wraps_in_mid_instruction(offset: int, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """PUSHA and POPA around both ends of a 64 KiB stack, LES around the end of a segment."""
    monkeypatch.setattr("vmm.bt.MIN_BUDGET_INSNS", 1)

    def prepare(bare: Bare) -> None:
        for number in (SS, DS):
            bare.state.segments[number].load(_DATA >> 4, _DATA, limit, _DATA_RIGHTS)
        bare.memory.write(_DATA, bytes(range(1, 256)) * 0x104)
        bare.debug.caught_vectors = _ALL_FAULTS

    for source in ("pusha", "popa", f"mov bx, {offset}\nles cx, [bx]", f"mov bx, {offset}\n.byte 0x66\nlds cx, [bx]"):
        with Twins(f"mov sp, {offset}\n{source}\n1: jmp 1b", prepare, make_guest=real) as twins:
            twins.run(20)
