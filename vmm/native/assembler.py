"""An assembler for the forms of `vmm.native.encodings`: operands in, bytes out, with labels and fixups.

It writes into a buffer of its own that will stand at a known host address; where that is and what the code does is the
caller's business.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cache, lru_cache

from vmm.native.encodings import ENCODINGS
from vmm.native.operands import Label, Memory, Operand, Register

_IMMEDIATES = {"ib": 1, "iw": 2, "id": 4, "iq": 8}
_RANGES = {
    "imm8": (-0x80, 0xFF),
    "imm8s": (-0x80, 0x7F),
    "imm16": (-0x8000, 0xFFFF),
    "imm32": (-0x8000_0000, 0xFFFF_FFFF),
    "imm32s": (-0x8000_0000, 0x7FFF_FFFF),
    "imm64": (-(1 << 63), (1 << 64) - 1),
}
# Where the ranges begin and end.
_RANGE_EDGES = sorted({edge for low, high in _RANGES.values() for edge in (low, high + 1)})
_VEX_PREFIXES = {"NP": 0, "66": 1, "F3": 2, "F2": 3}
_VEX_MAPS = {"0F": 1, "0F38": 2, "0F3A": 3}


_JECXZ = b"\x67\xe3\x00"


class EncodingError(ValueError):
    """No form of the table takes these operands: a mistake of ours."""


@dataclass(frozen=True, slots=True)
class Form:
    """One parsed line of the table.

    Attributes:
        operands: their kinds.
        prefixes: mandatory prefixes.
        rex_w: REX.W or VEX.W.
        opcode: after the prefixes.
        digit: the opcode extension, -1 for /r, None without ModRM.
        in_opcode: a register is added to the opcode.
        immediate_bytes: 0, 1, 2, 4, 8; rel32 counts as 4.
        vex: prefix and map numbers, or None.
    """

    operands: tuple[str, ...]
    prefixes: bytes
    rex_w: bool
    opcode: bytes
    digit: int | None
    in_opcode: bool
    immediate_bytes: int
    vex: tuple[int, int] | None


def parse(text: str) -> Form:
    """Parse `operands: opcode`."""
    kinds, _, rest = text.partition(":")
    prefixes, opcode = bytearray(), bytearray()
    rex_w = in_opcode = False
    digit, immediate, vex = None, 0, None
    for token in rest.split():
        if token == "REX.W":
            rex_w = True
        elif token.startswith("VEX."):
            _, prefix, map_, w = token.split(".")
            vex, rex_w = (_VEX_PREFIXES[prefix], _VEX_MAPS[map_]), w == "W1"
        elif token == "/r":
            digit = -1
        elif token.startswith("/"):
            digit = int(token[1])
        elif token == "+r":
            in_opcode = True
        elif token in _IMMEDIATES:
            immediate = _IMMEDIATES[token]
        elif token == "cd":
            immediate = 4
        elif token in ("66", "F2", "F3") and not opcode:
            prefixes.append(int(token, 16))
        else:
            opcode.append(int(token, 16))
    operands = tuple(kind.strip() for kind in kinds.split(",") if kind.strip())
    return Form(operands, bytes(prefixes), rex_w, bytes(opcode), digit, in_opcode, immediate, vex)


@cache
def forms(name: str) -> tuple[Form, ...]:
    """The forms of an instruction; KeyError for one that is not in the table."""
    return tuple(parse(text) for text in ENCODINGS[name])


def _matches(kind: str, operand: Operand) -> bool:
    if isinstance(operand, Register):
        if kind == "cl":
            return operand == Register(1, 8)
        return kind in (f"r{operand.bits}", f"rm{operand.bits}")
    if isinstance(operand, Memory):
        return kind == "m" or (kind.startswith("rm") and int(kind[2:]) == operand.bits)
    if isinstance(operand, Label):
        return kind == "rel32"
    low, high = _RANGES.get(kind, (1, 0))
    return low <= operand <= high


class Assembler:
    """Code that will stand at host address `origin`."""

    def __init__(self, origin: int) -> None:
        self.origin = origin
        self.code = bytearray()
        self._fixups: list[tuple[int, Label]] = []

    @property
    def here(self) -> int:
        """The host address of the next byte."""
        return self.origin + len(self.code)

    def bind(self, label: Label) -> None:
        """Let `label` be the next byte; it is bound once."""
        if label.offset is not None:
            raise EncodingError("a label is bound twice")
        label.offset = len(self.code)

    def raw(self, data: bytes) -> None:
        """Append bytes that were made elsewhere."""
        self.code += data

    def align(self, boundary: int) -> None:
        """Pad with NOPs until the host address is a multiple of `boundary`."""
        while self.here % boundary:
            self.code.append(0x90)

    def jump_to(self, name: str, target: int) -> int:
        """JMP, CALL or Jcc to a host address; returns the offset of its rel32 in the code."""
        code = self.code
        code += _branch(name)
        at = len(code)
        code += (target - (self.origin + at + 4)).to_bytes(4, "little", signed=True)
        return at

    def jump_if_ecx_is_zero(self) -> int:
        """JECXZ forward, which asks without flags; returns the offset for `bind_rel8`."""
        self.code += _JECXZ
        return len(self.code) - 1

    def bind_rel8(self, at: int) -> None:
        """Let the jump whose rel8 is at offset `at` come here."""
        self.code[at] = len(self.code) - (at + 1)

    def finish(self) -> bytes:
        """The code, every label resolved."""
        for at, label in self._fixups:
            if label.offset is None:
                raise EncodingError("a label was used and never bound")
            self.code[at : at + 4] = (label.offset - (at + 4)).to_bytes(4, "little", signed=True)
        self._fixups.clear()
        return bytes(self.code)

    def emit(self, name: str, *operands: Operand) -> None:
        """Append one instruction: the first form of the table that takes the operands.

        Raises:
            EncodingError: there is none.
        """
        if not operands:
            self.code += encode(name)
            return
        last = operands[-1]
        if isinstance(last, int):
            # Numbers seldom come again, unlike the rest.
            start, size_bytes = _start(name, bisect_right(_RANGE_EDGES, last), *operands[:-1])
            self.code += start
            self.code += (last & (1 << 8 * size_bytes) - 1).to_bytes(size_bytes, "little")
        elif isinstance(last, Label):
            self.code += _branch(name)
            self._fixups.append((len(self.code), last))
            self.code += bytes(4)
        else:
            self.code += encode(name, *operands)


@cache
def _branch(name: str) -> bytes:
    """What comes before the rel32 of a direct branch."""
    for form in forms(name):
        if form.operands == ("rel32",):
            return form.prefixes + form.opcode
    raise EncodingError(f"{name} is no direct branch")


@lru_cache(maxsize=1 << 12)
def _start(name: str, place: int, *operands: Operand) -> tuple[bytes, int]:
    """An instruction that ends in a number, but for that number, and how many bytes it takes.

    Args:
        name: as in the table.
        place: where the number is among the edges of all ranges: each form takes all of one place, or none.
        operands: those before the number.
    """
    example = _RANGE_EDGES[place - 1] if place else _RANGE_EDGES[0] - 1
    form = _form(name, (*operands, example))
    code = _encode(form, (*operands, example))
    return code[: len(code) - form.immediate_bytes], form.immediate_bytes


@lru_cache(maxsize=1 << 15)
def encode(name: str, *operands: Operand) -> bytes:
    """The bytes of one instruction without labels, remembered, since most are emitted again and again.

    Raises:
        EncodingError: no form of the table takes the operands.
    """
    return _encode(_form(name, operands), operands)


def _form(name: str, operands: tuple[Operand, ...]) -> Form:
    for form in forms(name):
        if len(form.operands) == len(operands) and all(map(_matches, form.operands, operands)):
            return form
    raise EncodingError(f"no form of {name} takes {operands}")


def _encode(form: Form, operands: tuple[Operand, ...]) -> bytes:
    code = bytearray()
    register: Register | None = None
    rm: Register | Memory | None = None
    third: Register | None = None
    immediate: int | None = None
    for kind, operand in zip(form.operands, operands, strict=True):
        assert not isinstance(operand, Label)
        if isinstance(operand, int):
            immediate = operand
        elif kind == "cl":
            continue
        elif isinstance(operand, Memory) or kind.startswith("rm"):
            rm = operand
        elif register is None:
            register = operand
        else:
            third = operand
    if rm is None:
        # The only register is in the opcode, or in ModRM.rm beside an opcode extension.
        rm, register = register, None
    code += _prefixes(form, register, rm, third)
    if form.in_opcode and isinstance(rm, Register):
        code += form.opcode[:-1] + bytes([form.opcode[-1] + (rm.code & 7)])
    else:
        code += form.opcode
    if form.digit is not None and rm is not None:
        code += modrm(register.code if form.digit < 0 and register else max(form.digit, 0), rm)
    if form.immediate_bytes:
        mask = (1 << 8 * form.immediate_bytes) - 1
        code += ((immediate or 0) & mask).to_bytes(form.immediate_bytes, "little")
    return bytes(code)


def _prefixes(form: Form, register: Register | None, rm: Register | Memory | None, third: Register | None) -> bytes:
    code = bytearray()
    if isinstance(rm, Memory):
        if rm.gs:
            code.append(0x65)
        if rm.address_bits == 32:
            code.append(0x67)
    code += form.prefixes
    r = register.number >> 3 if register else 0
    x = rm.index.number >> 3 if isinstance(rm, Memory) and rm.index else 0
    b_register = rm.base if isinstance(rm, Memory) else rm
    b = b_register.number >> 3 if b_register else 0
    if form.vex:
        prefix, map_ = form.vex
        source = third.number if third else 0
        code += bytes(
            (
                0xC4,
                (1 - r) << 7 | (1 - x) << 6 | (1 - b) << 5 | map_,
                form.rex_w << 7 | (~source & 15) << 3 | prefix,
            )
        )
        return bytes(code)
    rex = form.rex_w << 3 | r << 2 | x << 1 | b
    bytes8 = [operand for operand in (register, rm) if isinstance(operand, Register) and operand.bits == 8]
    needs_rex = rex or any(operand.number >= 4 and not operand.high for operand in bytes8)
    if needs_rex and any(operand.high for operand in bytes8):
        raise EncodingError("a high byte register cannot stand beside a REX prefix")
    if needs_rex:
        code.append(0x40 | rex)
    return bytes(code)


def modrm(reg: int, rm: Register | Memory) -> bytes:
    """ModRM, SIB and displacement."""
    reg = (reg & 7) << 3
    if isinstance(rm, Register):
        return bytes([0xC0 | reg | rm.code & 7])
    displacement = rm.displacement
    if not -0x8000_0000 <= displacement <= 0xFFFF_FFFF:
        raise EncodingError(f"displacement {displacement:#x} does not fit")
    wide = (displacement & 0xFFFF_FFFF).to_bytes(4, "little")
    if rm.address_bits == 64 and displacement > 0x7FFF_FFFF:
        raise EncodingError(f"displacement {displacement:#x} would be sign-extended")
    scale = rm.scale.bit_length() - 1 << 6
    if rm.base is None:
        # Without a base a SIB byte is needed: the short form would be relative to RIP.
        index = (rm.index.number & 7) << 3 if rm.index else 0x20
        return bytes([reg | 4, scale | index | 5]) + wide
    base = rm.base.number & 7
    if rm.index is not None and rm.index.number == 4:
        raise EncodingError("the stack pointer cannot be an index")
    if displacement == 0 and base != 5:
        mod, tail = 0, b""
    elif -0x80 <= displacement <= 0x7F:
        mod, tail = 0x40, (displacement & 0xFF).to_bytes(1, "little")
    else:
        mod, tail = 0x80, wide
    if rm.index is None and base != 4:
        return bytes([mod | reg | base]) + tail
    index = (rm.index.number & 7) << 3 if rm.index else 0x20
    return bytes([mod | reg | 4, scale | index | base]) + tail
