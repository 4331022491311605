"""Interrupts and exceptions through every gate type, code segment and inner stack, and exceptions on the way."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from tests.system.protected_mode.arena import (
    ARENA,
    CODE,
    CR0,
    CR0_PG,
    DATA,
    S_CODE0,
    S_CODE0_16,
    S_CODE1,
    S_DATA0,
    S_DATA3,
    S_FREE,
    S_LDT,
    S_TSS_B,
    STACK0,
    STUBS,
    TSS_B,
    TSS_MAIN,
    Patch,
    descriptor,
    double_fault_task,
    flat,
    gate,
    segment,
    task_32,
    vector_gate,
)
from tests.system.protected_mode.harness import V86, Case
from tests.system.protected_mode.paging import DIRECTORY, identity_map
from tests.system.protected_mode.segments import EXIT, any_descriptor, each

_SHOW = "; .org 0x40; mov eax, cs; mov ebx, ss; mov ecx, ds; mov edx, es" + EXIT


def gates() -> Iterator[Case]:
    """Every type of gate, for an exception, for INT n, INT3 and INT1, from rings 0 and 3 and virtual-8086 mode."""
    for access in range(256):
        kind = access & 0x1F
        content = {
            0x05: gate(S_TSS_B, 0, access),
            0x06: gate(S_CODE0_16, CODE + 0x40 - ARENA, access),
            0x07: gate(S_CODE0_16, CODE + 0x40 - ARENA, access),
        }.get(kind, gate(S_CODE0, CODE + 0x40, access))
        events = [("ud2", 6), ("int 0x31", 0x31)]
        events += [("int3", 3), (".byte 0xf1", 1)] if kind in (0x05, 0x06, 0x0E, 0x0F) else []
        for event, vector in events:
            for level in (0, 3, V86) if access & 0x80 else (0,):
                yield Case(
                    f"{event} gate {access:02x} cpl {level}",
                    f"{event}; nop{EXIT}; .org 0x40; mov eax, cs" + EXIT,
                    level,
                    patches=[vector_gate(vector, content)],
                )


def code_segments() -> list[Case]:
    """INT n through a gate to every type of segment."""
    return [
        Case(
            f"int through gate to {access:02x} rpl {rpl} cpl {level}",
            "int 0x31" + _SHOW,
            level,
            patches=[
                descriptor(S_FREE, any_descriptor(access)),
                vector_gate(0x31, gate(S_FREE | rpl, CODE + 0x40, 0xEE)),
            ],
        )
        for access, (level, rpl) in each(((0, 0), (3, 0), (V86, 0)))
    ]


def inner_stacks() -> list[Case]:
    """SS1 of the TSS with every type of segment, for an interrupt and for a call gate."""
    return [
        Case(
            f"{event} ss1 {access:02x} rpl {rpl}",
            f"{event}; nop{EXIT}; .org 0x40; mov eax, cs; mov ebx, ss" + EXIT,
            3,
            patches=[
                descriptor(S_FREE, any_descriptor(access)),
                descriptor(S_FREE + 8, gate(S_CODE1, CODE + 0x40, 0xEC, 3)),
                vector_gate(0x31, gate(S_CODE1, CODE + 0x40, 0xEE)),
                Patch(TSS_MAIN + 16, struct.pack("<I", S_FREE | rpl)),
            ],
        )
        for access, (rpl, event) in each(((1, f"call {S_FREE + 8 | 3}:0"), (1, "int 0x31"), (0, "int 0x31")))
    ]


# What raises each exception, or is no exception at all.
_FIRST = {
    0: "xor ecx, ecx; div ecx",
    1: "pushfd; or dword ptr [esp], 0x100; popfd; nop",
    3: "int3",
    4: "mov al, 0x7f; add al, 1; into",
    5: f"mov eax, 0x7fffffff; bound eax, [{DATA}]",
    6: "ud2",
    7: "mov eax, cr0; or eax, 10; mov cr0, eax; fwait",
    10: "int 0x33",
    11: f"mov eax, {S_FREE}; mov ds, eax",
    12: f"mov eax, {S_FREE}; mov ss, eax",
    13: "mov eax, 0x1f8; mov ds, eax",
    14: "mov eax, [0x500000]",
    0x31: "int 0x31",
}
_NEEDS_DPL_3 = (3, 4, 0x31)


def _defects(vector: int) -> dict[str, list[Patch]]:
    """Ways in which the handler of `vector` cannot be reached, by what that raises."""
    entry, user = STUBS + vector * 16, 0x60 if vector in _NEEDS_DPL_3 else 0

    def through(selector: int, access: int = 0x8E, offset: int = entry) -> Patch:
        return vector_gate(vector, gate(selector, offset, access | user))

    def stack(selector: int, esp: int = STACK0) -> Patch:
        return Patch(TSS_MAIN + 4, struct.pack("<II", esp, selector))

    free = S_FREE + 8
    return {
        "#GP gate type": [through(S_CODE0, 0x82)],
        "#NP gate": [through(S_CODE0, 0x0E)],
        "#GP null cs": [through(0)],
        "#GP cs is data": [through(S_DATA0)],
        "#NP cs": [through(free), descriptor(free, flat(0x1B))],
        "#GP eip": [through(free, offset=0x2000), descriptor(free, segment(0, 0xFFF, 0x9B))],
        "#TS ss rpl": [stack(S_DATA3)],
        "#TS ss null": [stack(0)],
        "#SS not present": [stack(free), descriptor(free, flat(0x13))],
        "#SS no room": [stack(free), descriptor(free, segment(0, 0xFF, 0x93))],
        "#PF stack": [stack(S_DATA0, 0x600700)],
        "#PF ldt": [through(0xC), descriptor(S_LDT, segment(0x700000, 0x3F, 0x82, 0))],
        "#GP task gate": [through(S_DATA0, 0x85)],
        "#NP tss": [through(free, 0x85), descriptor(free, segment(TSS_B, 0x67, 0x09, 0))],
        "#TS tss limit": [through(free, 0x85), descriptor(free, segment(TSS_B, 0x66, 0x89, 0))],
        "#TS new cs": [through(S_TSS_B, 0x85), task_32(cs=S_DATA0, cr3=DIRECTORY)],
    }


def double_faults() -> Iterator[Case]:
    """Each exception with each defect of its delivery; what makes a double fault ends in the task of vector 8."""
    for vector, code in _FIRST.items():
        for defect, patches in _defects(vector).items():
            for level in (0, 3):
                if (level == 3 and vector == 7) or (
                    not level and (" ss " in defect or "SS" in defect or "stack" in defect)
                ):
                    continue  # only ring 0 may set TS; only from ring 3 is there another stack
                yield Case(
                    f"vector {vector} {defect} cpl {level}",
                    f"{code}{EXIT}; .org 0x40" + EXIT,
                    level,
                    {"cr0": CR0 | CR0_PG, "cr3": DIRECTORY},
                    [
                        *identity_map(),
                        descriptor(S_FREE, flat(0x13)),
                        vector_gate(0x33, gate(S_FREE + 24, STUBS, 0xEE)),
                        vector_gate(0x31, gate(S_CODE0, STUBS + 0x310, 0xEE)),
                        *patches,
                        double_fault_task(cr3=DIRECTORY),
                    ],
                )
