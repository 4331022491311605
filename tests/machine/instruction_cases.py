"""Owns the encodings that instruction tests run: both opcode maps, all size prefixes, every ModRM.reg and mod.

They come from the opcode maps rather than from an assembler, so that every way to write an instruction is met. It must
not know registers, memory or oracles.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

from iced_x86 import Code_, Decoder, Instruction, OpCodeInfo

from machine.instructions import Row, lookup
from vmm.blocks import OPTIONS, PREFIXES

Bits = Literal[16, 32]

SIZE_PREFIXES = (b"", b"\x66", b"\x67", b"\x66\x67")
SEGMENT_PREFIXES = {0x26: "ES", 0x2E: "CS", 0x36: "SS", 0x3E: "DS", 0x64: "FS", 0x65: "GS"}
LOCK, REPNE, REP = 0xF0, 0xF2, 0xF3
OPCODES = tuple(
    bytes([n]) for n in range(256) if n != 0x0F and n not in PREFIXES
) + tuple(bytes([0x0F, n]) for n in range(256))  # fmt: skip

_X87 = range(0xD8, 0xE0)

# What immediates and displacements start with, one time in two: signs, counts and bases at which flags change.
_EDGES = (0x00, 0x01, 0x07, 0x08, 0x0A, 0x0F, 0x10, 0x11, 0x1F, 0x20, 0x7F, 0x80, 0x81, 0xFE, 0xFF)


@dataclass(frozen=True, slots=True)
class Case:
    """One encoded instruction.

    Attributes:
        code: its bytes.
        bits: CS.D as 16 or 32.
        instruction: as decoded, at address 0.
        row: of the instruction table.
        displacement_at: where in `code` the displacement is; 0 if it has none.
        displacement_bytes: 0, 1, 2 or 4.
    """

    code: bytes
    bits: Bits
    instruction: Instruction
    row: Row
    displacement_at: int
    displacement_bytes: int

    def __str__(self) -> str:
        return f"{self.bits}-bit {self.code.hex(' ')} ({self.instruction})"

    def with_displacement(self, value: int) -> Case:
        """The same with another displacement of 2 or 4 bytes."""
        at, size = self.displacement_at, self.displacement_bytes
        case = decode(
            self.code[:at] + (value % (1 << 8 * size)).to_bytes(size, "little") + self.code[at + size :], self.bits
        )
        assert case is not None
        return case

    def with_prefix(self, *prefixes: int) -> Case | None:
        """The same behind further prefixes; None if the decoder or the table refuses."""
        return decode(bytes(prefixes) + self.code, self.bits)


def decode(code: bytes, bits: Bits) -> Case | None:
    """The instruction that `code` starts with, cut to its length; None if this CPU has no such instruction."""
    decoder = Decoder(bits, code, OPTIONS, 0)
    instruction = decoder.decode()
    if instruction.is_invalid:
        return None
    row = lookup(instruction.code)
    if row is None:
        return None
    offsets = decoder.get_constant_offsets(instruction)
    return Case(code[: instruction.len], bits, instruction, row, offsets.displacement_offset, offsets.displacement_size)


@cache
def has_modrm(code: Code_) -> bool:
    """Whether a ModRM byte follows the opcode; of x87 instructions with registers the decoder counts it as opcode."""
    info = OpCodeInfo(code)
    return "/" in info.op_code_string or info.op_code >> 8 in _X87 or info.op_code in _X87


def tail(chance: random.Random) -> bytes:
    """Bytes for SIB, displacement and immediate: half of the time the first of them is an edge."""
    data = chance.randbytes(12)
    return data if chance.random() < 0.5 else bytes([chance.choice(_EDGES)]) + chance.choice((data, data[:1] * 12))[:11]


def walk(bits: Bits, *, per_form: int = 1) -> Iterator[Case]:
    """Every opcode with every combination of size prefixes.

    With ModRM, `per_form` cases for each mod and reg; rm and what follows vary. Without, `4 * per_form` cases.
    """
    for prefix in SIZE_PREFIXES:
        for opcode in OPCODES:
            chance = random.Random(prefix + opcode + bytes([bits]))
            for modrm in range(0, 256, 8):
                for _ in range(per_form):
                    code = prefix + opcode + bytes([modrm | chance.randrange(8)]) + tail(chance)
                    case = decode(code, bits)
                    if case is None or (not has_modrm(case.instruction.code) and modrm >= 32):
                        continue
                    if not has_modrm(case.instruction.code):
                        again = decode(prefix + opcode + tail(chance), bits)
                        assert again is not None
                        case = again
                    yield case
    pause = decode(bytes([REP, 0x90]), bits)
    assert pause is not None
    yield pause


@cache
def by_mnemonic(bits: Bits) -> Mapping[str, list[Case]]:
    """The walk, sorted by the rows of the table."""
    found: dict[str, list[Case]] = {}
    for case in walk(bits):
        found.setdefault(case.row.mnemonic, []).append(case)
    return found
