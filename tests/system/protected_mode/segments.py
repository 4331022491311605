"""Loads of segment registers, LDTR and TR with every descriptor type, LAR, LSL, VERR and VERW, table limits."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tests.system.protected_mode.arena import (
    ARENA,
    CODE,
    DATA,
    GDT,
    IDT,
    LDT,
    S_CODE0,
    S_CODE0_16,
    S_CODE3,
    S_CODE3_16,
    S_FREE,
    S_LDT,
    S_TSS_B,
    TSS_16,
    TSS_B,
    Patch,
    descriptor,
    flat,
    gate,
    segment,
)
from tests.system.protected_mode.harness import Case

Combination = TypeVar("Combination")

EXIT = "; int 0x30"
CODE0_BY_WIDTH = {S_CODE0: S_CODE0_16, S_CODE3: S_CODE3_16}


def each(combinations: Iterable[Combination]) -> Iterator[tuple[int, Combination]]:
    """Every access byte with the first of `combinations`, and those with P set with the others."""
    for number, combination in enumerate(combinations):
        for access in range(128 if number else 0, 256):
            yield access, combination


def any_descriptor(access: int, code: int = S_CODE0, count: int = 0) -> bytes:
    """A useful descriptor for each of the 256 access bytes: gates lead to `CODE` + 40h in segment `code`."""
    kind = access & 0x1F
    if kind in (0x4, 0x6, 0x7):
        return gate(CODE0_BY_WIDTH.get(code, S_CODE0_16), CODE + 0x40 - ARENA, access, count)
    if kind in (0xC, 0xE, 0xF):
        return gate(code, CODE + 0x40, access, count)
    if kind == 0x5:
        return gate(S_TSS_B, 0, access)
    if kind in (0x1, 0x3):
        return segment(TSS_16, 0x2B, access, 0)
    if kind in (0x9, 0xB):
        return segment(TSS_B, 0x67, access, 0)
    if kind == 0x2:
        return segment(LDT, 0x3F, access, 0)
    return flat(access)


def _loads(instructions: str, levels: tuple[tuple[int, int], ...]) -> list[Case]:
    """`instructions` with EAX a selector of each descriptor type, by (CPL, RPL)."""
    return [
        Case(
            f"{instructions} access {access:02x} rpl {rpl} cpl {level}",
            f"mov eax, {S_FREE | rpl}; {instructions}" + EXIT,
            level,
            patches=[descriptor(S_FREE, any_descriptor(access))],
        )
        for access, (level, rpl) in each(levels)
    ]


def data_segments() -> list[Case]:
    """MOV DS."""
    return _loads("mov ds, eax", ((0, 0), (0, 3), (3, 0), (3, 3)))


def stack_segments() -> list[Case]:
    """MOV SS."""
    return _loads("mov ss, eax; nop", ((0, 0), (0, 3), (1, 1), (3, 3)))


def system_segments() -> list[Case]:
    """LLDT and LTR."""
    return _loads("lldt ax", ((0, 0),)) + _loads("ltr ax", ((0, 0), (3, 3)))


def looks() -> list[Case]:
    """LAR, LSL, VERR, VERW."""
    code = (
        "mov ebx, eax; xor ecx, ecx; lar eax, bx; setz cl; lsl edx, bx; setz ch; verr bx; lahf; mov esi, eax; verw bx"
    )
    return _loads(code + "; lahf; mov edi, eax", ((0, 0), (0, 3), (3, 0), (3, 3)))


def tables() -> Iterator[Case]:
    """Selectors at and beyond the limits of GDT, LDT and IDT, and null ones."""
    for limit in (0xC0, 0xC6, 0xC7, 0xC8, 0x1FF):
        for selector in (0xC0, 0xC3, 0xC8):
            for use in ("mov ds, eax", "lsl ecx, eax; sete dl", f"jmp {selector}:{CODE + 0x40}"):
                yield Case(
                    f"gdt limit {limit:x} selector {selector:x} {use}",
                    f"lgdt [{DATA}]; mov eax, {selector}; {use}{EXIT}; .org 0x40{EXIT}",
                    patches=[descriptor(S_FREE, flat(0x9B)), Patch(DATA, struct.pack("<HI", limit, GDT))],
                )
    for selector in (0, 1, 2, 3, *range(4, 0x58, 8)):
        for ldtr in (S_LDT, 0, 3):
            for register in ("ds", "ss"):
                yield Case(
                    f"{register}={selector:x} ldtr {ldtr:x}",
                    f"mov eax, {selector}; mov {register}, eax; nop" + EXIT,
                    registers={"ldtr": ldtr},
                )
    for limit in (0x67, 0x6E, 0x6F, 0x7F, 0x180, 0x186, 0x187, 0x188):
        for event in ("int 0x31", "int 0x32", "ud2", "int 0x30"):
            patch = Patch(DATA, struct.pack("<HI", limit, IDT))
            yield Case(f"idt limit {limit:x} {event}", f"lidt [{DATA}]; {event}" + EXIT, patches=[patch])
