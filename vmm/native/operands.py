"""Typed operands of the host's x86-64 instructions: registers by size, memory with segment and address size, labels.

It must not know how instructions are encoded.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple, Self


class Register:
    """A general-purpose register: `number` 0 to 15, `bits` 8, 16, 32 or 64; `high` for AH CH DH BH.

    There is one object for each, so that comparing and hashing them, which translation does all the time, is quick.
    """

    __slots__ = ("bits", "high", "number")
    _all: ClassVar[dict[tuple[int, int, bool], Self]] = {}

    number: int
    bits: int
    high: bool

    def __new__(cls, number: int, bits: int, high: bool = False) -> Self:
        """The one object."""
        known = cls._all.get((number, bits, high))
        if known is None:
            known = cls._all[number, bits, high] = super().__new__(cls)
            known.number, known.bits, known.high = number, bits, high
        return known

    def __repr__(self) -> str:
        return f"Register({self.number}, {self.bits}{', high=True' if self.high else ''})"

    @property
    def code(self) -> int:
        """The number in the encoding, 0 to 15."""
        return self.number + 4 if self.high else self.number


class Memory(NamedTuple):
    """A memory operand: `[segment: base + index * scale + displacement]`.

    Attributes:
        bits: size of what is accessed; 0 where the instruction alone says it (LEA, FXSAVE).
        base, index: registers of 64 bits, or of 32 for an effective address that is cut to 32 bits (prefix 67h).
        gs: the GS base is added: the guest's window.
    """

    bits: int
    base: Register | None = None
    index: Register | None = None  # type: ignore[assignment]  # no operand is searched as a tuple
    scale: int = 1
    displacement: int = 0
    gs: bool = False

    @property
    def address_bits(self) -> int:
        """64 or 32, by the registers; without any it is 64, or 32 in the window."""
        register = self.base or self.index
        return register.bits if register else 32 if self.gs else 64

    def at(self, offset: int) -> Memory:
        """The operand `offset` bytes further on."""
        return self._replace(displacement=self.displacement + offset)


class Label:
    """A place in the code, known once it is bound."""

    __slots__ = ("offset",)

    def __init__(self) -> None:
        self.offset: int | None = None


Operand = Register | Memory | Label | int

RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8, R9, R10, R11, R12, R13, R14, R15 = (Register(n, 64) for n in range(16))
EAX, ECX, EDX, EBX, ESP, EBP, ESI, EDI, R8D, R9D, R10D, R11D, R12D, R13D, R14D, R15D = (
    Register(n, 32) for n in range(16)
)
AX, CX, DX, BX, SP, BP, SI, DI, R8W, R9W, R10W, R11W, R12W, R13W, R14W, R15W = (Register(n, 16) for n in range(16))
AL, CL, DL, BL, SPL, BPL, SIL, DIL, R8B, R9B, R10B, R11B, R12B, R13B, R14B, R15B = (Register(n, 8) for n in range(16))
AH, CH, DH, BH = (Register(n, 8, high=True) for n in range(4))


def qword(base: Register, displacement: int = 0) -> Memory:
    """64 bits at `base + displacement`."""
    return Memory(64, base, displacement=displacement)


def dword(base: Register, displacement: int = 0) -> Memory:
    """32 bits at `base + displacement`."""
    return Memory(32, base, displacement=displacement)


def word(base: Register, displacement: int = 0) -> Memory:
    """16 bits at `base + displacement`."""
    return Memory(16, base, displacement=displacement)


def byte(base: Register, displacement: int = 0) -> Memory:
    """8 bits at `base + displacement`."""
    return Memory(8, base, displacement=displacement)


def address(base: Register, displacement: int = 0, *, index: Register | None = None, scale: int = 1) -> Memory:
    """An address for LEA."""
    return Memory(0, base, index, scale, displacement)
