"""A flat program that runs every floating-point form on many states and leaves the results in memory.

Whoever can run IA-32 code can run it: our CPU, Unicorn, QEMU. It must not know who, nor what is right.

A state, in and out, is a slot: an FXSAVE image, then 16 bytes of memory operand, EAX, and EFLAGS.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from tests.machine.fpu_forms import Form
from tests.oracles.qemu import EXIT_PORT, PROTECTED_ENTRY

SLOT_BYTES = 544
OPERAND_AT, EAX_AT, EFLAGS_AT = 512, 528, 532
SCRATCH = 0x0008_0000
STATES = 0x0040_0000
RESULTS = 0x0080_0000
MEMORY_MIB = 64

SIGN32, SIGN64 = 1 << 31, 1 << 63
SINGLES = (
    0, 1, 0x7F_FFFF, 0x80_0000, 0x80_0001, 0x3F80_0000, 0x3F80_0001, 0x3FC0_0000, 0x4000_0000, 0x4049_0FDB,
    0x4B80_0001, 0x4F00_0000, 0x4EFF_FFFF, 0x5F00_0000, 0x7F7F_FFFF, 0x7F80_0000, 0x7F80_0001, 0x7FC0_0000, 0x7FFF_FFFF,
    0x3EAA_AAAB, 0x2000_0000, 0x1F80_0000, 0x6000_0000, 0x3F7F_FFFF, 0x3F00_0000, 0x4B00_0001,
)  # fmt: skip
DOUBLES = (
    0, 1, 0xF_FFFF_FFFF_FFFF, 0x10_0000_0000_0000, 0x10_0000_0000_0001, 0x3FF0_0000_0000_0000, 0x3FF0_0000_0000_0001,
    0x3FF8_0000_0000_0000, 0x4009_21FB_5444_2D18, 0x41E0_0000_0000_0000, 0x41DF_FFFF_FFC0_0000, 0x41DF_FFFF_FFE0_0000,
    0x43E0_0000_0000_0000, 0x7FEF_FFFF_FFFF_FFFF, 0x7FF0_0000_0000_0000, 0x7FF0_0000_0000_0001, 0x7FF8_0000_0000_0000,
    0x7FFF_FFFF_FFFF_FFFF, 0x3FD5_5555_5555_5555, 0x1FF0_0000_0000_0000, 0x2000_0000_0000_0001, 0x5FF0_0000_0000_0000,
    0x36A0_0000_0000_0000, 0x3690_0000_0000_0000, 0x380F_FFFF_FFFF_FFFF, 0x47EF_FFFF_F000_0000, 0x47F0_0000_0000_0000,
    0x3FE0_0000_0000_0000, 0x40DF_FFE0_0000_0000,
)  # fmt: skip
_ONE = 0x3FFF_8000_0000_0000_0000
EXTENDEDS = (
    0, 1, 0x7FFF_FFFF_FFFF_FFFF, 0x8000_0000_0000_0000, 0x1_8000_0000_0000_0000, _ONE, _ONE | 1,
    0x3FFF_C000_0000_0000_0000,
    0x4000_C90F_DAA2_2168_C235, 0x3FFD_AAAA_AAAA_AAAA_AAAB, 0x3FFE_FFFF_FFFF_FFFF_FFFF, 0x3FFE_8000_0000_0000_0000,
    0x400D_FFFE_0000_0000_0000, 0x401E_8000_0000_0000_0000, 0x401D_FFFF_FFFF_0000_0000, 0x403E_8000_0000_0000_0000,
    0x403A_DE0B_6B3A_763F_FFF0, 0x403D_FFFF_FFFF_FFFF_FFFF, 0x7FFE_FFFF_FFFF_FFFF_FFFF, 0x7FFF_8000_0000_0000_0000,
    0x7FFF_8000_0000_0000_0001, 0x7FFF_C000_0000_0000_0000, 0x7FFF_FFFF_FFFF_FFFF_FFFF, 0x3F80_8000_0000_0000_0000,
    0x3F69_8000_0000_0000_0001, 0x407E_FFFF_FF00_0000_0000, 0x407F_8000_0000_0000_0000, 0x3BCD_8000_0000_0000_0000,
    0x43FE_FFFF_FFFF_FFFF_F800, 0x43FF_8000_0000_0000_0000, 0x4005_C800_0000_0000_0000, 0x3FBF_8000_0000_0000_0000,
    0x4000_8000_0000_0000_0000, 0x4001_A000_0000_0000_0000,
)  # fmt: skip
UNSUPPORTED = (0x3FFF_0000_0000_0000_0000, 0x7FFF_0000_0000_0000_0000, 0x4001_4000_0000_0000_0000)
"""Unnormals and pseudo-infinities: no current processor takes them for numbers."""
DECIMALS = tuple(int(text, 16) for text in ("0", "123456789012345678", "80000000000000000001", "999999999999999999"))
INTEGERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFF_FFFF, SIGN32, 0xFFFF_FFFF, SIGN64, SIGN64 - 1)

PRECISIONS = (0x0000, 0x0200, 0x0300)
ROUNDINGS = (0x0000, 0x0400, 0x0800, 0x0C00)


@dataclass(frozen=True, slots=True)
class State:
    """What an instruction starts from.

    Attributes:
        image: 512 bytes in the format of FXSAVE.
        operand: 16 bytes of memory.
        eax: general-purpose register operand.
        eflags: status flags.
    """

    image: bytes
    operand: bytes
    eax: int
    eflags: int

    def pack(self) -> bytes:
        return (self.image + self.operand + struct.pack("<II", self.eax, self.eflags)).ljust(SLOT_BYTES, b"\0")


def image(
    *,
    fcw: int = 0x37F,
    fsw: int = 0,
    tags: int = 0xFF,
    mxcsr: int = 0x1F80,
    st: Sequence[int] = (0,) * 8,
    xmm: Sequence[int] = (0,) * 8,
) -> bytes:
    """An FXSAVE image."""
    data = struct.pack("<HHBBHIIIIII", fcw, fsw, tags, 0, 0, 0, 0, 0, 0, mxcsr, 0xFFFF)
    data += b"".join(value.to_bytes(16, "little") for value in (*st, *xmm))
    return data.ljust(512, b"\0")


def _lanes(chance: random.Random, values: Sequence[int], width: int) -> int:
    value = 0
    for lane in range(128 // width):
        value |= (chance.choice(values) | chance.choice((0, 1 << (width - 1)))) << lane * width
    return value


def _is_ordinary(value: int, exponent_bits: int, significand_bits: int) -> bool:
    """Zero or a finite normal number."""
    exponent = value >> significand_bits & (1 << exponent_bits) - 1
    return not value or 0 < exponent < (1 << exponent_bits) - 1


def ordinary_states(seed: int, count: int) -> list[State]:
    """States with zeros and finite normal numbers, every rounding, and all x87 registers full but one for a load."""
    chance = random.Random(seed)
    singles = [value for value in SINGLES if _is_ordinary(value, 8, 23)]
    doubles = [value for value in DOUBLES if _is_ordinary(value, 11, 52)]
    extendeds = [value for value in EXTENDEDS if _is_ordinary(value, 15, 64)]
    found = []
    for n in range(count):
        rounding, top = ROUNDINGS[n % 4], chance.randrange(8)
        values, width = ((singles, 32), (doubles, 64))[n // 4 & 1]
        found.append(
            State(
                image(
                    fcw=0x37F | rounding,
                    fsw=top << 11,
                    tags=0xFF & ~(1 << (top - 1 & 7)),
                    mxcsr=0x1F80 | rounding << 3,
                    st=[chance.choice(extendeds) | chance.choice((0, 1 << 79)) for _ in range(8)],
                    xmm=[_lanes(chance, values, width) for _ in range(8)],
                ),
                _lanes(chance, values, width).to_bytes(16, "little"),
                chance.choice(INTEGERS) & 0xFFFF_FFFF,
                chance.getrandbits(12) & 0x8D5,
            )
        )
    return found


def states(seed: int, count: int, *, unmasked: bool = False) -> list[State]:
    """States with corner operands of all formats, every rounding and precision, full and empty x87 registers.

    Args:
        seed: of the pseudo-random choices.
        count: how many.
        unmasked: x87 exceptions are unmasked in some.
    """
    chance = random.Random(seed)
    controls = list(product(PRECISIONS, ROUNDINGS))
    found = []
    for n in range(count):
        precision, rounding = controls[n % len(controls)]
        kind = n // len(controls) % 4
        masks = chance.getrandbits(6) if unmasked and chance.random() < 0.5 else 0x3F
        values = EXTENDEDS + UNSUPPORTED
        st = [chance.choice(values) | chance.choice((0, 1 << 79)) for _ in range(8)]
        tags = 0xFF if chance.random() < 0.7 else chance.choice((0, 0x7F, 0x81, 0x0F, 0x01))
        fsw = chance.randrange(8) << 11 | chance.choice((0, 0x4700))
        if kind == 0:
            xmm = [_lanes(chance, SINGLES, 32) for _ in range(8)]
            operand = _lanes(chance, SINGLES, 32)
        elif kind == 1:
            xmm = [_lanes(chance, DOUBLES, 64) for _ in range(8)]
            operand = _lanes(chance, DOUBLES, 64)
        elif kind == 2:
            xmm = [_lanes(chance, INTEGERS, chance.choice((16, 32, 64))) & (1 << 128) - 1 for _ in range(8)]
            operand = chance.choice(INTEGERS) | chance.getrandbits(64) << 64
        else:
            xmm = [chance.getrandbits(128) for _ in range(8)]
            operand = chance.choice((*EXTENDEDS, *DECIMALS)) | chance.choice((0, 1 << 79))
        mxcsr = 0x1F80 | rounding << 3 | chance.choice((0, 0, 0x8000, 0x40, 0x8040))
        found.append(
            State(
                image(fcw=0x40 | precision | rounding | masks, fsw=fsw, tags=tags, mxcsr=mxcsr, st=st, xmm=xmm),
                (operand & (1 << 128) - 1).to_bytes(16, "little"),
                chance.choice(INTEGERS) & 0xFFFF_FFFF,
                chance.getrandbits(12) & 0x8D5,
            )
        )
    return found


def _store32(register_offset: int, address: int) -> bytes:
    """mov ecx, [address]; mov [edi + offset], ecx"""
    return b"\x8b\x0d" + struct.pack("<I", address) + b"\x89\x8f" + struct.pack("<I", register_offset)


def _load32(register_offset: int, address: int) -> bytes:
    """mov ecx, [ebx + offset]; mov [address], ecx"""
    return b"\x8b\x8b" + struct.pack("<I", register_offset) + b"\x89\x0d" + struct.pack("<I", address)


def program(forms: Sequence[Form], state_count: int, *, end: bytes = b"") -> bytes:
    """The program; it is entered at `PROTECTED_ENTRY` in flat 32-bit mode at CPL 0.

    Results go to RESULTS, `state_count` slots for each form.

    Args:
        forms: encoded for the memory operand at SCRATCH.
        state_count: how many slots there are at STATES.
        end: code to end with; nothing: a write to the exit port.
    """
    code = bytearray(b"\x0f\x20\xe0\x0d\x00\x06\x00\x00\x0f\x22\xe0")  # CR4.OSFXSR and OSXMMEXCPT
    code += b"\xbd" + struct.pack("<I", RESULTS)  # mov ebp, RESULTS
    for form in forms:
        code += b"\xbb" + struct.pack("<I", STATES)  # mov ebx, STATES
        loop = len(code)
        for n in range(4):
            code += _load32(OPERAND_AT + 4 * n, SCRATCH + 4 * n)
        code += b"\x0f\xae\x0b"  # fxrstor [ebx]
        code += b"\xbf" + struct.pack("<I", SCRATCH)  # mov edi, SCRATCH
        code += b"\x8b\x83" + struct.pack("<I", EAX_AT)  # mov eax, [ebx + EAX_AT]
        code += b"\xff\xb3" + struct.pack("<I", EFLAGS_AT) + b"\x9d"  # push [ebx + EFLAGS_AT]; popf
        code += form.data
        code += b"\x9c"  # pushf
        code += b"\x89\xef"  # mov edi, ebp
        code += b"\x8f\x87" + struct.pack("<I", EFLAGS_AT)  # pop [edi + EFLAGS_AT]
        code += b"\x89\x87" + struct.pack("<I", EAX_AT)  # mov [edi + EAX_AT], eax
        for n in range(4):
            code += _store32(OPERAND_AT + 4 * n, SCRATCH + 4 * n)
        code += b"\x0f\xae\x07"  # fxsave [edi]
        code += b"\x81\xc5" + struct.pack("<I", SLOT_BYTES)  # add ebp, SLOT_BYTES
        code += b"\x81\xc3" + struct.pack("<I", SLOT_BYTES)  # add ebx, SLOT_BYTES
        code += b"\x81\xfb" + struct.pack("<I", STATES + state_count * SLOT_BYTES)  # cmp ebx, end
        code += b"\x0f\x85" + struct.pack("<i", loop - (len(code) + 6))  # jne loop
    return bytes(code) + (end or b"\xb0\x00\xe6" + bytes([EXIT_PORT]))


assert PROTECTED_ENTRY < STATES < RESULTS < MEMORY_MIB << 20
