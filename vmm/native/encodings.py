"""The host instructions that the native core may emit, as data in the SDM's own notation.

Each form is `operands: opcode`; nothing else is ever encoded, so this table is also where the verifier starts.

Operands: r8 r16 r32 r64 (ModRM.reg or the opcode's low bits), rm8 ... rm64 (register or memory), m (memory of any
size), imm8 imm8s (sign-extended) imm16 imm32 imm32s imm64, rel32, cl. Opcode: bytes in hex; `/r` or `/digit` for ModRM,
`+r` for a register in the opcode, `ib iw id iq` for immediates, `cd` for rel32, REX.W, and VEX forms for BMI2.

Source: SDM Vol. 2, "Instruction Set Reference".
"""

from __future__ import annotations

_ALU = ("add", "or", "adc", "sbb", "and", "sub", "xor", "cmp")
_SHIFTS = ("rol", "ror", "rcl", "rcr", "shl", "shr", None, "sar")
CONDITIONS = ("o", "no", "b", "ae", "e", "ne", "be", "a", "s", "ns", "p", "np", "l", "ge", "le", "g")


def _alu(number: int) -> tuple[str, ...]:
    base = number << 3
    return (
        f"rm8, r8: {base:02X} /r",
        f"rm16, r16: 66 {base + 1:02X} /r",
        f"rm32, r32: {base + 1:02X} /r",
        f"rm64, r64: REX.W {base + 1:02X} /r",
        f"r8, rm8: {base + 2:02X} /r",
        f"r16, rm16: 66 {base + 3:02X} /r",
        f"r32, rm32: {base + 3:02X} /r",
        f"r64, rm64: REX.W {base + 3:02X} /r",
        f"rm8, imm8: 80 /{number} ib",
        f"rm16, imm8s: 66 83 /{number} ib",
        f"rm32, imm8s: 83 /{number} ib",
        f"rm64, imm8s: REX.W 83 /{number} ib",
        f"rm16, imm16: 66 81 /{number} iw",
        f"rm32, imm32: 81 /{number} id",
        f"rm64, imm32s: REX.W 81 /{number} id",
    )


def _shift(number: int) -> tuple[str, ...]:
    return (
        f"rm32, imm8: C1 /{number} ib",
        f"rm64, imm8: REX.W C1 /{number} ib",
        f"rm32, cl: D3 /{number}",
    )


ENCODINGS: dict[str, tuple[str, ...]] = {
    "mov": (
        "rm8, r8: 88 /r",
        "rm16, r16: 66 89 /r",
        "rm32, r32: 89 /r",
        "rm64, r64: REX.W 89 /r",
        "r8, rm8: 8A /r",
        "r16, rm16: 66 8B /r",
        "r32, rm32: 8B /r",
        "r64, rm64: REX.W 8B /r",
        "r8, imm8: B0 +r ib",
        "r16, imm16: 66 B8 +r iw",
        "r32, imm32: B8 +r id",
        "rm8, imm8: C6 /0 ib",
        "rm16, imm16: 66 C7 /0 iw",
        "rm32, imm32: C7 /0 id",
        "rm64, imm32s: REX.W C7 /0 id",
        "r64, imm64: REX.W B8 +r iq",
    ),
    "lea": ("r32, m: 8D /r", "r64, m: REX.W 8D /r"),
    "movzx": ("r32, rm8: 0F B6 /r", "r32, rm16: 0F B7 /r"),
    "movsx": ("r32, rm8: 0F BE /r", "r32, rm16: 0F BF /r"),
    "movsxd": ("r64, rm32: REX.W 63 /r",),
    "bswap": ("r32: 0F C8 +r",),
    "push": ("r64: 50 +r", "rm64: FF /6"),
    "pop": ("r64: 58 +r", "rm64: 8F /0"),
    "pushfq": (": 9C",),
    "popfq": (": 9D",),
    "test": (
        "rm8, r8: 84 /r",
        "rm32, r32: 85 /r",
        "rm64, r64: REX.W 85 /r",
        "rm8, imm8: F6 /0 ib",
        "rm32, imm32: F7 /0 id",
    ),
    "bt": ("rm32, r32: 0F A3 /r", "rm32, imm8: 0F BA /4 ib", "rm64, imm8: REX.W 0F BA /4 ib"),
    "bts": ("rm32, r32: 0F AB /r",),
    "btr": ("rm32, r32: 0F B3 /r",),
    "btc": ("rm32, r32: 0F BB /r",),
    "jmp": ("rel32: E9 cd", "rm64: FF /4"),
    "call": ("rel32: E8 cd", "rm64: FF /2"),
    "ret": (": C3",),
    "nop": (": 90",),
    "lahf": (": 9F",),
    "sahf": (": 9E",),
    "cld": (": FC",),
    "std": (": FD",),
    "syscall": (": 0F 05",),
    "wrgsbase": ("r64: F3 REX.W 0F AE /3",),
    "rdgsbase": ("r64: F3 REX.W 0F AE /1",),
    "fxsave": ("m: 0F AE /0",),
    "fxrstor": ("m: 0F AE /1",),
    "fninit": (": DB E3",),
    "fldcw": ("m: D9 /5",),
    "fnstcw": ("m: D9 /7",),
    "ldmxcsr": ("m: 0F AE /2",),
    "stmxcsr": ("m: 0F AE /3",),
    "sarx": ("r32, rm32, r32: VEX.F3.0F38.W0 F7 /r", "r64, rm64, r64: VEX.F3.0F38.W1 F7 /r"),
    "shrx": ("r32, rm32, r32: VEX.F2.0F38.W0 F7 /r", "r64, rm64, r64: VEX.F2.0F38.W1 F7 /r"),
    "shlx": ("r32, rm32, r32: VEX.66.0F38.W0 F7 /r", "r64, rm64, r64: VEX.66.0F38.W1 F7 /r"),
    "rorx": ("r32, rm32, imm8: VEX.F2.0F3A.W0 F0 /r ib",),
    "not": ("rm16: 66 F7 /2", "rm32: F7 /2", "r64: REX.W F7 /2"),
    "mulx": ("r64, r64, rm64: VEX.F2.0F38.W1 F6 /r",),
    **{name: _alu(number) for number, name in enumerate(_ALU)},
    **{name: _shift(number) for number, name in enumerate(_SHIFTS) if name},
    **{f"j{name}": (f"rel32: 0F 8{number:X} cd",) for number, name in enumerate(CONDITIONS)},
    **{f"set{name}": (f"rm8: 0F 9{number:X} /0",) for number, name in enumerate(CONDITIONS)},
    **{f"cmov{name}": (f"r32, rm32: 0F 4{number:X} /r",) for number, name in enumerate(CONDITIONS)},
}
