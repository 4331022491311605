"""Monitor commands that read memory: physical dumps in gdb's formats, and what gdb's own addresses mean.

They must not know page tables beyond the functions that read through them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from gdbstub.guest_memory import read_physical
from gdbstub.monitor.command import Command, parse_physical, usage_error
from gdbstub.target import TargetError
from machine.state import CS

if TYPE_CHECKING:
    from gdbstub.guest import GuestTarget

_FORMAT = re.compile(r"/([0-9]{0,9})([a-z]*)$")
_SIZES_BYTES = {"b": 1, "h": 2, "w": 4, "g": 8}
_LETTERS = "xduotcsi"
_LINE_BYTES = 16
_MAX_COUNT = 65536
_LONGEST_INSTRUCTION_BYTES = 15
_MAX_STRING_BYTES = 200


def show_physical(guest: GuestTarget, words: list[str]) -> Iterator[str]:
    """`xp /FMT ADDRESS`."""
    count, letter, size_bytes = 1, "x", 4
    if words and words[0].startswith("/"):
        count, letter, size_bytes = _parse_format(words[0])
        words = words[1:]
    if len(words) != 1:
        raise usage_error("xp")
    physical = parse_physical(guest, words[0])
    if letter == "i":
        yield from _disassemble(guest, physical, count)
    elif letter == "s":
        yield from _strings(guest, physical, count)
    else:
        yield from _dump(guest, physical, count, letter, size_bytes)


def _parse_format(text: str) -> tuple[int, str, int]:
    match = _FORMAT.match(text)
    if match is None:
        raise usage_error("xp")
    count = int(match[1] or "1")
    if not 1 <= count <= _MAX_COUNT:
        raise TargetError(f"The count of a dump is 1 to {_MAX_COUNT}.")
    letter, size_bytes = "x", 0
    for char in match[2]:
        if char in _SIZES_BYTES:
            size_bytes = _SIZES_BYTES[char]
        elif char in _LETTERS:
            letter = char
        else:
            raise TargetError(f"`{char}` is neither a format ({', '.join(_LETTERS)}) nor a size (b, h, w, g).")
    return count, letter, size_bytes or (1 if letter == "c" else 4)


def _dump(guest: GuestTarget, physical: int, count: int, letter: str, size_bytes: int) -> Iterator[str]:
    in_line = max(1, _LINE_BYTES // size_bytes) if letter != "c" else 8
    for first in range(0, count, in_line):
        here = min(in_line, count - first)
        at = physical + first * size_bytes
        data = read_physical(guest.machine.memory, at, here * size_bytes)
        cells = [
            _format(int.from_bytes(data[i : i + size_bytes], "little"), letter, size_bytes)
            for i in range(0, len(data) - size_bytes + 1, size_bytes)
        ]
        yield f"{at:#010x}: {' '.join(cells)}\n"


def _format(value: int, letter: str, size_bytes: int) -> str:
    bits = 8 * size_bytes
    signed = value - (1 << bits) if value >> bits - 1 else value
    if letter == "x":
        return f"{value:#0{2 + 2 * size_bytes}x}"
    if letter == "d":
        return f"{signed:{len(str(1 << bits)) + 1}d}"
    if letter == "u":
        return f"{value:{len(str(1 << bits))}d}"
    if letter == "o":
        return f"{value:#o}"
    if letter == "t":
        return f"{value:0{bits}b}"
    char = chr(value & 0xFF)
    return f"{signed} {char!r}" if char.isprintable() and char.isascii() else f"{signed} '\\x{value & 0xFF:02x}'"


def _strings(guest: GuestTarget, physical: int, count: int) -> Iterator[str]:
    for _ in range(count):
        data = read_physical(guest.machine.memory, physical, _MAX_STRING_BYTES)
        text, end, _ = data.partition(b"\0")
        shown = text.decode("latin-1").encode("unicode_escape").decode().replace('"', '\\"')
        yield f'{physical:#010x}: "{shown}"{"" if end else "..."}\n'
        physical += len(text) + len(end)


def _disassemble(guest: GuestTarget, physical: int, count: int) -> Iterator[str]:
    from capstone import CS_ARCH_X86, CS_MODE_16, CS_MODE_32, Cs

    big = guest.machine.cpu.state.segments[CS].big
    decoder = Cs(CS_ARCH_X86, CS_MODE_32 if big else CS_MODE_16)
    for _ in range(count):
        data = read_physical(guest.machine.memory, physical, _LONGEST_INSTRUCTION_BYTES)
        instruction = next(decoder.disasm(data, physical, 1), None)
        if instruction is None:
            yield f"{physical:#010x}: {data[:1].hex()}  (bad)\n"
            physical += 1
        else:
            text = f"{instruction.mnemonic} {instruction.op_str}".rstrip()
            yield f"{physical:#010x}: {instruction.bytes.hex(' '):30} {text}\n"
            physical += instruction.size


def select_memory(guest: GuestTarget, words: list[str]) -> Iterator[str]:
    """`memory [physical|linear]`."""
    if words:
        if words not in (["physical"], ["linear"]):
            raise usage_error("memory")
        guest.physical = words == ["physical"]
    yield f"gdb's addresses mean {'physical' if guest.physical else 'linear'} memory.\n"


COMMANDS = (
    Command(
        "xp",
        "[/FORMAT] ADDRESS",
        "a dump of physical memory, with gdb's formats: `xp /8xw 0x1000`, `xp /5i 0x7c00`",
        show_physical,
        details="FORMAT is a count, one of x d u o t c s i, and a size b h w g, each optional, as in gdb's `x`.",
    ),
    Command(
        "memory",
        "[physical|linear]",
        "what the addresses in gdb's own commands mean (`x`, `print *`, `set var`, `find`)",
        select_memory,
        changes=True,
        bare=True,
        details="Linear addresses go through the page tables in CR3 and stop at what is not mapped; no right is asked\n"
        "and no accessed or dirty bit is set. Breakpoints stay linear. gdb keeps what it has read until the guest\n"
        "runs; `maintenance flush dcache` makes it read again.",
    ),
)
