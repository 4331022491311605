"""Segment limits: byte and page granular, expand-down, of data, stacks and code."""

from __future__ import annotations

from collections.abc import Iterator

from tests.system.protected_mode.arena import (
    ARENA,
    CODE,
    DATA,
    EXIT_VECTOR,
    S_CODE0,
    S_FREE,
    S_TSS_DF,
    STACK1,
    descriptor,
    gate,
    segment,
    vector_gate,
)
from tests.system.protected_mode.harness import Case
from tests.system.protected_mode.segments import EXIT

_SHAPES = {
    "up 32": segment(DATA, 0x3F, 0x93),
    "up 16": segment(DATA, 0x3F, 0x93, 0),
    "read-only": segment(DATA, 0x3F, 0x91),
    "code": segment(DATA, 0x3F, 0x9B),
    "execute-only": segment(DATA, 0x3F, 0x99),
    "down 32": segment(DATA - 0x40, 0x3F, 0x97),
    "down 16": segment(DATA - 0x40, 0x3F, 0x97, 0),
    "down read-only": segment(DATA - 0x40, 0x3F, 0x95),
    "page": segment(ARENA, 0, 0x93, 0xC),
    "down page": segment(ARENA - 0x800, 0, 0x97, 0xC),
    "down 16 empty": segment(ARENA, 0xFFFF, 0x97, 0),
    "down 16 page": segment(ARENA, 0xF, 0x97, 8),
}
_NEAR = (0, 0x3C, 0x3D, 0x3E, 0x3F, 0x40, 0x41, 0x1001, 0xFFFFFFFC, 0xFFFFFFFD, 0xFFFFFFFF)
_FAR = (0xFFF, 0x1000, 0xFFFF, 0x10000)
_ACCESSES = (
    "mov al, [ebx]", "mov ax, [ebx]", "mov eax, [ebx]", "mov byte ptr [ebx], 0x5a", "mov dword ptr [ebx], eax",
    "add dword ptr [ebx], 1",
)  # fmt: skip


def data() -> list[Case]:
    """Reads and writes of 1, 2 and 4 bytes at every edge."""
    return [
        Case(
            f"{name} {offset:x} {access}",
            f"mov eax, {S_FREE}; mov ds, eax; mov eax, 0x77665544; mov ebx, {offset}; {access}" + EXIT,
            patches=[descriptor(S_FREE, shape)],
        )
        for name, shape in _SHAPES.items()
        for offset in _NEAR + (_FAR if "page" in name or "down 16" in name else ())
        for access in _ACCESSES
    ]


_STACKS = {
    "up 32": (segment(STACK1 - 0x80, 0x3F, 0x93), (0x40, 0x3F, 0x3E, 8, 4, 3, 2, 1, 0, 0x44)),
    "up 16": (segment(STACK1 - 0x80, 0x3F, 0x93, 0), (0x40, 4, 2, 1, 0, 0x10004, 0x10000)),
    "down 32": (segment(STACK1 - 0xC0, 0x3F, 0x97), (0x80, 0x48, 0x44, 0x43, 0x42, 0x40)),
    "down 16": (segment(STACK1 - 0xC0, 0x3F, 0x97, 0), (0x80, 0x48, 0x44, 0x42, 0x40, 0x10044)),
}
_STACK_USES = (
    "push eax", "push ax", "pop eax", "pop ax", "call .+5", "int 0x31", f"call {S_CODE0}:{CODE + 0x60}", "pushf",
    "push dword ptr [esp]", "leave",
)  # fmt: skip


def stacks() -> list[Case]:
    """Pushes and pops at the edges of a stack; the handlers are tasks with a stack of their own."""
    handlers = [vector_gate(vector, gate(S_TSS_DF, 0, 0x85)) for vector in (12, 13, EXIT_VECTOR)]
    return [
        Case(
            f"{name} {esp:x} {use}",
            f"{use}{EXIT}; .org 0x60" + EXIT,
            registers={"ss": S_FREE, "esp": esp, "ebp": esp},
            patches=[descriptor(S_FREE, shape), vector_gate(0x31, gate(S_CODE0, CODE + 0x60, 0x8F)), *handlers],
        )
        for name, (shape, places) in _STACKS.items()
        for esp in places
        for use in _STACK_USES
    ]


def code() -> Iterator[Case]:
    """Far transfers to offsets at the limit, near jumps and plain execution over it."""
    for limit in (0x1000, 0x103F, 0x1040, 0x1041, 0x1042, 0x1050):
        limited = segment(ARENA, limit, 0x9B)
        for offset in (0x1040, 0x1041, 0x1043, 0x2000):
            for transfer in (
                f"jmp {S_FREE}:{offset}", f"call {S_FREE}:{offset}", f"push {S_FREE}; push {offset}; retf",
                f"pushf; push {S_FREE}; push {offset}; iretd", "int 0x31", f"call {S_FREE + 8}:0",
                f"jmp {S_FREE + 8}:0",
            ):  # fmt: skip
                yield Case(
                    f"limit {limit:x} {transfer} to {offset:x}",
                    f"{transfer}; nop{EXIT}; .org 0x40{EXIT}; nop; nop" + EXIT,
                    patches=[
                        descriptor(S_FREE, limited),
                        descriptor(S_FREE + 8, gate(S_FREE, offset, 0x8C)),
                        vector_gate(0x31, gate(S_FREE, offset, 0x8E)),
                    ],
                )
    for limit in range(0x1000, 0x1014):
        patches = [descriptor(S_FREE, segment(ARENA, limit, 0x9B))]
        onward = f"jmp {S_FREE}:0x1007; mov eax, 0x12345678; mov ebx, eax" + EXIT
        yield Case(f"fetch up to {limit:x}", onward, patches=patches)
        near = f"jmp {S_FREE}:0x1007; mov eax, 0x100e; jmp eax; nop; nop; nop; nop" + EXIT
        yield Case(f"near jump up to {limit:x}", near, patches=patches)
