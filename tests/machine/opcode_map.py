"""Owns the opcode map as text: which row of the instruction table each opcode has, read back from decoder and table.

`python -m tests.machine.opcode_map` writes the golden files anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from iced_x86 import Code_

from machine.instructions import CODE_NAMES
from tests.machine.instruction_cases import OPCODES, SIZE_PREFIXES, Bits, decode, has_modrm

GOLDEN = Path(__file__).with_name("golden")
MAP = GOLDEN / "opcode_map.txt"
CODES = GOLDEN / "codes.txt"
_REST = bytes(12)
_X87 = tuple(bytes([opcode]) for opcode in range(0xD8, 0xE0))


def _row(code: bytes, bits: Bits) -> str:
    case = decode(code + _REST, bits)
    return case.row.mnemonic if case else "-"


def _group(opcode: bytes, mod: int, bits: Bits, prefix: bytes) -> str:
    rows = [_row(prefix + opcode + bytes([mod << 6 | reg << 3]), bits) for reg in range(8)]
    return rows[0] if len(set(rows)) == 1 else " ".join(rows)


def opcode_map(bits: Bits, prefix: bytes = b"") -> dict[str, str]:
    """By opcode in hex: its row, or those of memory and register operands, or those of ModRM.reg 0 to 7 for each."""
    found = {}
    for opcode in OPCODES:
        memory, register = (_group(opcode, mod, bits, prefix) for mod in (0, 3))
        found[opcode.hex()] = memory if memory == register else f"{memory} | {register}"
    return found


def reachable() -> Iterator[tuple[Code_, Bits]]:
    """Every code that the decoder names for some opcode and form of ModRM, by mode; some several times."""
    bits: Bits
    for bits in (16, 32):
        for prefix in (*SIZE_PREFIXES, b"\xf3"):
            for opcode in OPCODES:
                for modrm in range(0, 256, 1 if opcode in _X87 else 8):
                    if modrm >> 6 in (0, 3):
                        case = decode(prefix + opcode + bytes([modrm]) + _REST, bits)
                        if case is not None:
                            yield case.instruction.code, bits
                            if not has_modrm(case.instruction.code):
                                break


def render_map() -> str:
    """The golden file of the opcode map: 32-bit code, `-` for #UD."""
    lines = [f"{opcode:<4} {rows}" for opcode, rows in opcode_map(32).items()]
    return "\n".join(lines) + "\n"


def render_codes() -> str:
    """The golden file of the decoder's names, each with the modes in which it can be met."""
    modes: dict[str, set[int]] = {}
    for code, bits in reachable():
        modes.setdefault(CODE_NAMES[code], set()).add(bits)
    return "".join(f"{name} {' '.join(map(str, sorted(bits)))}\n" for name, bits in sorted(modes.items()))


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    MAP.write_text(render_map())
    CODES.write_text(render_codes())
