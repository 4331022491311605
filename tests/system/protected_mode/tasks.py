"""Hardware task switches: every way in and back, 32-bit and 16-bit, and every check on the way."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from tests.system.protected_mode.arena import (
    ARENA,
    CF,
    CR4_VME,
    DF_STACK,
    IF,
    NT,
    RESET_EFLAGS,
    S_CODE0,
    S_CODE3,
    S_DATA3,
    S_FREE,
    S_TSS,
    S_TSS_16,
    S_TSS_B,
    S_TSS_DF,
    STACK3,
    TF,
    TSS_16,
    TSS_B,
    TSS_MAIN,
    V86_CODE,
    V86_STACK,
    VIF,
    VIP,
    VM,
    ZF,
    Patch,
    descriptor,
    flat,
    gate,
    iopl,
    segment,
    task_16,
    task_32,
    vector_gate,
)
from tests.system.protected_mode.harness import Case
from tests.system.protected_mode.segments import EXIT, any_descriptor

_RING_3 = {"cs": S_CODE3, "ss": S_DATA3, "ds": S_DATA3, "es": S_DATA3, "fs": S_DATA3}
_SHOW = "; .org 0x40; mov eax, cs; mov ebx, ss; mov ecx, ds; mov edx, es" + EXIT
_GATE_32, _GATE_16 = S_FREE + 8, S_FREE + 16
_GATES = (
    descriptor(_GATE_32, gate(S_TSS_B, 0, 0xE5)),
    descriptor(_GATE_16, gate(S_TSS_16, 0, 0xE5)),
    vector_gate(0x31, gate(S_TSS_B, 0, 0xE5)),
    vector_gate(0x32, gate(S_TSS_16, 0, 0xE5)),
    vector_gate(6, gate(S_TSS_B, 0, 0x85)),
)
_WAYS = (
    f"jmp {S_TSS_B}:0", f"call {S_TSS_B}:0", f"jmp {_GATE_32}:0", f"call {_GATE_32}:0", "int 0x31", "ud2",
    f"jmp {S_TSS_16}:0", f"call {S_TSS_16}:0", f"jmp {_GATE_16}:0", f"call {_GATE_16}:0", "int 0x32",
)  # fmt: skip


def switches() -> list[Case]:
    """Every way into a task, from rings 0 and 3, into rings 0 and 3, with what becomes of NT and the other flags."""
    return [
        Case(
            f"{way} cpl {level} flags {old:x} to {new:x} ring {3 if ring else 0}",
            f"{way}; nop{EXIT}" + _SHOW,
            level,
            {"eflags": RESET_EFLAGS | old},
            [*_GATES, task_32(eflags=new, **ring), task_16(flags=new & 0xFFFF)],
        )
        for way in _WAYS
        for level in (0, 3)
        for old in (0, NT | CF | iopl(2), NT | IF | ZF)
        for new in (RESET_EFLAGS, RESET_EFLAGS | NT | CF, 0x3FFFFF & ~(VM | TF | VIF | VIP))
        for ring in ({}, _RING_3)
    ]


def returns() -> Iterator[Case]:
    """CALL or INT n into a task and IRET back out of it."""
    for way in _WAYS:
        if way.startswith("jmp") or way == "ud2":  # the exception would come back to itself for ever
            continue
        is_16 = way in (f"call {S_TSS_16}:0", f"call {_GATE_16}:0", "int 0x32")
        for level in (0, 3):
            for back in ("iretd", "iretw"):
                code = ".byte 0xcf" if (back == "iretw") == is_16 else ".byte 0x66, 0xcf"
                yield Case(
                    f"{way} cpl {level} {back}",
                    f"{way}; mov edi, 0x99{EXIT}; .org 0x40; nop; {code}; mov esi, 0x77" + EXIT,
                    level,
                    patches=_GATES,
                )


def back_links() -> Iterator[Case]:
    """IRET with NT: the back link names every type of descriptor, and selectors that are none."""
    nest = "pushfd; or dword ptr [esp], 0x4000; popfd; iretd; mov eax, 5" + EXIT
    for access in range(256):
        for limit in (0x67, 0x66, 0x2B, 0x2A) if access & 0x17 == 3 else (0x67,):
            tss = segment(TSS_16 if access & 0x1D == 1 else TSS_B, limit, access, 0)
            patches = [descriptor(S_FREE, tss), Patch(TSS_MAIN, struct.pack("<I", S_FREE))]
            yield Case(f"iret to {access:02x} limit {limit:x}", nest + _SHOW, patches=patches)
    for selector in (0, 1, 3, 4, 7, S_TSS, S_CODE0, 0xC, 0x68, 0x1F8, 0x200):
        patch = Patch(TSS_MAIN, struct.pack("<I", selector))
        yield Case(f"iret to selector {selector:x}", nest + _SHOW, patches=[patch])


def tss_descriptors() -> Iterator[Case]:
    """JMP, CALL, INT n and an exception to every type of descriptor, directly and through a task gate."""
    for access in range(256):
        kind = access & 0x1F
        ways = [("int 0x31", 3), ("ud2", 0), (f"jmp {S_FREE + 8}:0", 3)]
        if kind in (1, 2, 3, 9, 0xB):
            ways += [(f"jmp {S_FREE}:0", 0), (f"call {S_FREE | 3}:0", 3)]
        for way, level in ways:
            for limit in (0x67, 0x66, 0x2B, 0x2A) if kind in (1, 9) else (0x67,):
                yield Case(
                    f"{way} to {access:02x} limit {limit:x} cpl {level}",
                    f"{way}; nop{EXIT}" + _SHOW,
                    level,
                    patches=[
                        descriptor(S_FREE, segment(TSS_16 if kind in (1, 3) else TSS_B, limit, access, 0)),
                        descriptor(S_FREE + 8, gate(S_FREE, 0, 0xE5)),
                        vector_gate(0x31, gate(S_FREE | 3, 0, 0xE5)),
                        vector_gate(6, gate(S_FREE, 0, 0x85)),
                    ],
                )


def new_segments() -> Iterator[Case]:
    """CS, SS, DS and LDT of the new task with every type of descriptor; all registers with odd selectors.

    The handlers of what goes wrong are tasks: with which CPL and stack a gate would find the new task is the model's
    own business.
    """
    handlers = [vector_gate(vector, gate(S_TSS_DF, 0, 0x85)) for vector in (10, 11, 12)]
    dumps = ((DF_STACK - 8, 2),)
    for name in ("cs", "ss", "ds", "ldt"):
        for access in range(256):
            for ring, rpl in (({}, 0),) if name == "ldt" else ((_RING_3, 3),):
                patches = [
                    descriptor(S_FREE, any_descriptor(access)),
                    task_32(**{**ring, name: S_FREE | rpl}),
                    *handlers,
                ]
                yield Case(f"new {name} {access:02x} rpl {rpl}", f"jmp {S_TSS_B}:0" + _SHOW, 0, {}, patches, dumps)
    for name in ("cs", "ss", "ds", "es", "fs", "gs", "ldt"):
        for selector in (0, 1, 2, 3, 4, 5, 7, 0xC, 0x14, 0x24, S_TSS, 0x1F8, 0x1FB, 0x200, 0xFFF8, 0xFFFF):
            for ring in ({}, _RING_3):
                for way in (f"jmp {S_TSS_B}:0", "ud2"):
                    to_task = vector_gate(6, gate(S_TSS_B, 0, 0x85))
                    patches = [task_32(**{**ring, name: selector}), to_task, *handlers]
                    full_name = f"{way} new {name} selector {selector:x} ring {3 if ring else 0}"
                    yield Case(full_name, way + _SHOW, 0, {}, patches, dumps)


def endings() -> Iterator[Case]:
    """What comes last: the error code on the new stack, the limit of EIP, the T bit, TF, virtual-8086 tasks."""
    for tss in (S_TSS_B, S_TSS_16):
        for event, vector in (
            ("mov eax, 0xfff0; mov ds, eax", 13),
            ("int 0x3f", 13),
            (f"mov eax, {S_FREE}; mov ds, eax", 11),
        ):
            for stack in ({}, {"esp": STACK3, **_RING_3}):
                for level in (0, 3):
                    patches = [
                        vector_gate(vector, gate(tss, 0, 0x85)),
                        descriptor(S_FREE, flat(0x13)),
                        task_32(**stack),
                        vector_gate(0x3F, gate(S_CODE0, 0, 0xE8)),
                    ]
                    name = f"error code of {event} in {tss:x} ring {3 if stack else 0} cpl {level}"
                    yield Case(name, event + EXIT + _SHOW, level, patches=patches)
    for way in (f"jmp {S_TSS_B}:0", f"call {S_TSS_B}:0", "ud2"):
        to_task = vector_gate(6, gate(S_TSS_B, 0, 0x85))
        for trap in (0, 1):
            trap_io = 0x68 << 16 | trap
            for flags in (RESET_EFLAGS, RESET_EFLAGS | TF):
                task = task_32(trap_io=trap_io, eflags=flags)
                yield Case(f"{way} T {trap} flags {flags:x}", way + EXIT + _SHOW, patches=[task, to_task])
            for flags in (VM | iopl(3), VM, VM | VIF | VIP, VM | IF):
                for cr4 in (0, CR4_VME):
                    task = task_32(
                        trap_io=trap_io, eflags=RESET_EFLAGS | flags, cs=V86_CODE, eip=0x40, ss=V86_STACK, esp=0x100,
                        ds=0x1234, es=0x5678, fs=0xFFFF, gs=3,
                    )  # fmt: skip
                    yield Case(
                        f"{way} T {trap} virtual-8086 flags {flags:x} cr4 {cr4}",
                        f"{way}{EXIT}; .org 0x40; .code16; nop; hlt",
                        registers={"cr4": cr4},
                        patches=[task, to_task],
                    )
        for offset in (0x103F, 0x1040):
            limited = descriptor(S_FREE, segment(ARENA, 0x103F, 0x9B))
            patches = [limited, task_32(cs=S_FREE, eip=offset), to_task]
            yield Case(f"{way} eip {offset:x} of 103f", way + EXIT + _SHOW, patches=patches)
