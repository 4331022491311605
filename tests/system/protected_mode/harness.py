"""Protected-mode cases, the guest that runs them, and the records that it prints.

It must not know which engine runs the guest.

Each case starts from the same arena, to which its patches are applied. Its code runs until an exception or `int 0x30`
comes to one of the 64 entry points; what is found then, and the dwords of the arena that changed, make its record.
"""

from __future__ import annotations

import struct
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from tests.system.protected_mode.arena import (
    ARENA,
    ARENA_BYTES,
    BLOB,
    CODE,
    CODE_BYTES,
    CR0,
    ENTRY,
    GDT_BYTES,
    IDT,
    IDT_BYTES,
    RESET_EFLAGS,
    S_CODE0,
    S_CODE1,
    S_CODE2,
    S_CODE3,
    S_DATA0,
    S_DATA1,
    S_DATA2,
    S_DATA3,
    S_LDT,
    S_TSS,
    STACK0,
    STACK1,
    STACK2,
    STACK3,
    V86_CODE,
    V86_DATA,
    V86_STACK,
    VM,
    Patch,
    arena,
    iopl,
)


@dataclass(frozen=True, slots=True)
class Case:
    """One case.

    Attributes:
        name: what a failure is reported by.
        code: assembly, Intel syntax, at `CODE`; it ends with `int 0x30` unless it faults.
        level: 0 enters by a far jump, 1 to 3 by IRET with flat segments; `V86` in virtual-8086 mode with IP 0.
        registers: by name, of those that differ: eax to edi, eip, cs, eflags, ss, es, ds, fs, gs, ldtr, cr0, cr3, cr4.
        patches: what differs in memory.
        dumps: address and number of dwords to be printed at the end.
    """

    name: str
    code: str
    level: int = 0
    registers: Mapping[str, int] = field(default_factory=dict)
    patches: Sequence[Patch] = ()
    dumps: Sequence[tuple[int, int]] = ()


V86 = 86

_LEVELS = {
    0: {"cs": S_CODE0, "ss": S_DATA0, "ds": S_DATA0, "es": S_DATA0, "fs": 0, "gs": 0, "esp": STACK0},
    1: {"cs": S_CODE1, "ss": S_DATA1, "ds": S_DATA1, "es": S_DATA1, "fs": 0, "gs": 0, "esp": STACK1},
    2: {"cs": S_CODE2, "ss": S_DATA2, "ds": S_DATA2, "es": S_DATA2, "fs": 0, "gs": 0, "esp": STACK2},
    3: {"cs": S_CODE3, "ss": S_DATA3, "ds": S_DATA3, "es": S_DATA3, "fs": 0, "gs": 0, "esp": STACK3},
    V86: {
        "cs": V86_CODE, "ss": V86_STACK, "ds": V86_DATA, "es": V86_DATA, "fs": 0x1111, "gs": 0x2222, "esp": 0x100,
        "eip": 0, "eflags": RESET_EFLAGS | VM | iopl(3),
    },
}  # fmt: skip

_COMMON = {
    "ldtr": S_LDT, "cr0": CR0, "cr3": 0, "cr4": 0, "eip": CODE, "eflags": RESET_EFLAGS, "eax": 0xA0A1A2A3,
    "ecx": 0xC0C1C2C3, "edx": 0xD0D1D2D3, "ebx": 0xB0B1B2B3, "ebp": 0xBFB1B2B3, "esi": 0x51525354, "edi": 0xD1D2D3D4,
}  # fmt: skip

# harness.S, R_KIND to R_GS.
_RECORD = (
    "kind", "cr0", "cr3", "cr4", "ldtr", "eax", "ecx", "edx", "ebx", "esp", "ss", "ebp", "esi", "edi", "eip", "cs",
    "eflags", "es", "ds", "fs", "gs",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Record:
    """What a case came to.

    Attributes:
        number: of the case, from 0 on.
        registers: by name; `esp` is the handler's, the frame still to be popped, and `vector` says who was called.
        changes: dwords of the arena that differ from before: offset and new value.
        dumps: what the case asked to see.
    """

    number: int
    registers: Mapping[str, int]
    changes: Mapping[int, int]
    dumps: bytes


# harness.S, o_vector to o_dr7.
_OUTPUT = (
    "vector", "eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi", "es", "ss", "ds", "fs", "gs", "ldtr", "tr",
    "eflags", "cr0", "cr2", "cr3", "cr4", "dr6", "dr7",
)  # fmt: skip


def parse(output: bytes) -> list[Record]:
    """The records of a batch's output."""
    records = []
    at = 0
    while at + 8 <= len(output):
        length, number = struct.unpack_from("<II", output, at)
        if not length or at + length > len(output):
            break
        values = struct.unpack_from(f"<{len(_OUTPUT) + 1}I", output, at + 8)
        end = at + 8 + 4 * len(values)
        count = values[-1]
        words = struct.unpack_from(f"<{2 * count}I", output, end)
        changes = dict(zip(words[::2], words[1::2], strict=True))
        registers = dict(zip(_OUTPUT, values[:-1], strict=True))
        records.append(Record(number - 1, registers, changes, output[end + 8 * count : at + length]))
        at += length
    return records


def describe(record: Record) -> str:
    """A record for people, one line."""
    registers = " ".join(f"{name}={value:x}" for name, value in record.registers.items())
    changes = " ".join(f"{ARENA + offset:x}:{value:08x}" for offset, value in record.changes.items())
    return f"{registers} | {changes} | {record.dumps.hex()}"


def build(cases: Sequence[Case]) -> bytes:
    """The flat program, for `ENTRY`, that runs `cases` and prints their records."""
    codes = _assemble([case.code for case in cases])
    blob = bytearray(arena())
    for case, code in zip(cases, codes, strict=True):
        blob += _encode(case, code)
    blob += struct.pack("<I", 0)
    harness = _harness()
    return harness.ljust(BLOB - ENTRY, b"\0") + bytes(blob)


def _encode(case: Case, code: bytes) -> bytes:
    level = _LEVELS[case.level]
    assert case.registers.keys() <= _COMMON.keys() | level.keys(), case.registers
    values = {**_COMMON, **level, **case.registers}
    values["kind"] = {0: 0, V86: 2}.get(case.level, 1)
    patches = [Patch(CODE, code), *case.patches]
    data = struct.pack(f"<{len(_RECORD)}I", *(values[name] & 0xFFFF_FFFF for name in _RECORD))
    data += struct.pack("<II", len(patches), len(case.dumps))
    for patch in patches:
        data += struct.pack("<II", patch.address, len(patch.data)) + patch.data + bytes(-len(patch.data) % 4)
    for address, count in case.dumps:
        data += struct.pack("<II", address, count)
    return struct.pack("<I", len(data) + 4) + data


def _run_tool(*command: str | Path) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@cache
def _harness() -> bytes:
    symbols = {
        "ARENA": ARENA,
        "ARENA_DWORDS": ARENA_BYTES // 4,
        "GDT_LIMIT": GDT_BYTES - 1,
        "IDT_LIMIT": IDT_BYTES - 1,
        "IDT_OFFSET": IDT - ARENA,
        "TSS_MAIN": S_TSS,
        "CODE": CODE,
        "CODE_BYTES": CODE_BYTES,
    }
    with tempfile.TemporaryDirectory(prefix="trapgate-harness-") as directory:
        object_file, binary = Path(directory, "harness.o"), Path(directory, "harness.bin")
        defines = [f"-Wa,--defsym,{name}={value}" for name, value in symbols.items()]
        _run_tool("gcc", "-m32", "-c", *defines, "-o", object_file, Path(__file__).with_suffix(".S"))
        _run_tool("ld", "-m", "elf_i386", f"-Ttext={ENTRY:#x}", "--oformat", "binary", "-o", binary, object_file)
        return binary.read_bytes()


def _assemble(codes: Sequence[str]) -> list[bytes]:
    """Machine code of each, linked for `CODE`."""
    distinct = list(dict.fromkeys(codes))
    lines = [".intel_syntax noprefix", '.section .index, "a"', ".text"]
    for number, code in enumerate(distinct):
        lines += [f'.section .c{number}, "ax"', ".code32", f"b{number}:", code, f"e{number}:"]
        lines += [".section .index", f".long e{number} - b{number}"]
    script = "SECTIONS {\n . = 0x1000;\n .index : { *(.index) }\n"
    # Each piece of code runs at the same address, but is stored behind the one before.
    script += "".join(
        f" .c{n} {CODE:#x} : AT(0x{0x10000 + n * CODE_BYTES:x}) {{ *(.c{n}) }}\n" for n in range(len(distinct))
    )
    script += "}\n"
    with tempfile.TemporaryDirectory(prefix="trapgate-cases-") as directory:
        source, linker = Path(directory, "cases.s"), Path(directory, "cases.ld")
        object_file, binary = Path(directory, "cases.o"), Path(directory, "cases.bin")
        source.write_text("\n".join(lines) + "\n")
        linker.write_text(script)
        _run_tool("gcc", "-m32", "-c", "-o", object_file, source)
        _run_tool(
            "ld",
            "-m",
            "elf_i386",
            "--no-check-sections",
            "-T",
            linker,
            "--oformat",
            "binary",
            "-o",
            binary,
            object_file,
        )
        image = binary.read_bytes()
    lengths = struct.unpack_from(f"<{len(distinct)}I", image, 0)
    assert max(lengths) <= CODE_BYTES, [
        code for code, length in zip(distinct, lengths, strict=True) if length > CODE_BYTES
    ]
    start = 0x10000 - 0x1000
    found = {
        code: image[start + n * CODE_BYTES : start + n * CODE_BYTES + length]
        for n, (code, length) in enumerate(zip(distinct, lengths, strict=True))
    }
    return [found[code] for code in codes]
