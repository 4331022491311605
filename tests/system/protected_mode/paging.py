"""Paging rights, sizes and faults, page faults in the middle of system operations, and alignment checks."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from tests.system.protected_mode.arena import (
    AC,
    ARENA,
    CODE,
    CR0,
    CR0_AM,
    CR0_PG,
    CR0_WP,
    CR4_PAE,
    CR4_PSE,
    DATA,
    EXIT_VECTOR,
    GDT_BYTES,
    IDT,
    IDT_BYTES,
    RESET_EFLAGS,
    S_CODE0,
    S_FREE,
    S_LDT,
    S_TSS_B,
    S_TSS_DF,
    STACK0,
    STACK3,
    STUBS,
    TSS_B,
    TSS_MAIN,
    VM,
    Patch,
    descriptor,
    double_fault_task,
    flat,
    gate,
    iopl,
    segment,
    task_32,
    vector_gate,
)
from tests.system.protected_mode.harness import V86, Case
from tests.system.protected_mode.segments import EXIT

DIRECTORY = 0x3_0000
TABLE = 0x3_1000
POINTERS = 0x3_2000  # PDPTEs
OTHER_TABLE = 0x3_4000
PAGE = 0x4_0000
WINDOW = 0x40_0000  # linear: what the second entry of the directory maps

_NEEDED = ((0x17, 0x23, 7), (0x100, 0x110, 3))  # pages of the arena, stacks and harness, and their rights

_ACCESSES = {
    "read": "mov eax, [ebx]",
    "write": "mov [ebx], eax",
    "modify": "add dword ptr [ebx], 1",
    "straddling read": "mov eax, [ebx + 0xffe]",
    "straddling write": "mov [ebx + 0xffe], eax",
    "fetch": "jmp ebx",
    "exchange": "xchg eax, [ebx]",
    "bit": "bts dword ptr [ebx], 3",
}
_CONTENT = (
    Patch(PAGE, b"\xcd\x30" * 4),  # int 0x30
    Patch(PAGE + 0xFF8, bytes(range(8))),
    Patch(PAGE + 0x1000, bytes(range(16, 24))),
)


def identity_map() -> list[Patch]:
    """32-bit page tables that map what a case needs onto itself."""
    patches = [Patch(DIRECTORY, struct.pack("<4I", TABLE | 7, 0, 0, 0))]
    for first, end, rights in _NEEDED:
        patches.append(
            Patch(TABLE + first * 4, b"".join(struct.pack("<I", n << 12 | rights) for n in range(first, end)))
        )
    return patches


def _identity_map_pae() -> list[Patch]:
    patches = [Patch(POINTERS, struct.pack("<4Q", DIRECTORY | 1, 0, 0, 0))]
    patches.append(Patch(DIRECTORY, struct.pack("<4Q", TABLE | 7, 0, 0, 0)))
    for first, end, rights in _NEEDED:
        patches.append(
            Patch(TABLE + first * 8, b"".join(struct.pack("<Q", n << 12 | rights) for n in range(first, end)))
        )
    return patches


def _window(directory_flags: int, first: int, second: int = 7) -> list[Patch]:
    """The second directory entry, and a table whose first two entries map the two pages of `PAGE`."""
    return [
        Patch(DIRECTORY + 4, struct.pack("<I", OTHER_TABLE | directory_flags)),
        Patch(OTHER_TABLE, struct.pack("<II", PAGE | first, PAGE + 0x1000 | second)),
    ]


_DUMPS = ((DIRECTORY, 2), (OTHER_TABLE, 2), (PAGE, 1), (PAGE + 0xFF8, 2), (PAGE + 0x1000, 1), (TABLE + 0x80, 3))


def _paged(wp: int, cr4: int = 0, cr3: int = DIRECTORY) -> dict[str, int]:
    return {"cr0": CR0 | CR0_PG | wp, "cr3": cr3, "cr4": cr4}


def rights_32() -> Iterator[Case]:
    """4 KiB pages: P, R/W and U/S of both levels, CR0.WP, both privileges, A and D bits afterwards."""
    for level in (0, 3):
        for wp in (0, CR0_WP):
            for upper in (0, 1, 3, 5, 7):
                for lower in (0, 1, 3, 5, 7, 0x67, 6) if upper else (7,):
                    for name, access in _ACCESSES.items():
                        second = 7 if "straddling" in name else lower
                        yield Case(
                            f"{name} pde {upper:x} pte {lower:x} wp {bool(wp)} cpl {level}",
                            f"mov ebx, {WINDOW}; {access}" + EXIT,
                            level,
                            _paged(wp),
                            [*identity_map(), *_CONTENT, *_window(upper, lower, second)],
                            _DUMPS,
                        )
                for second in (0, 1, 5, 7) if upper == 7 else ():
                    for name in ("straddling read", "straddling write"):
                        yield Case(
                            f"{name} second pte {second:x} wp {bool(wp)} cpl {level}",
                            f"mov ebx, {WINDOW}; {_ACCESSES[name]}" + EXIT,
                            level,
                            _paged(wp),
                            [*identity_map(), *_CONTENT, *_window(upper, 7, second)],
                            _DUMPS,
                        )


def large_pages() -> list[Case]:
    """4 MiB pages with and without CR4.PSE, their reserved bits, and G."""
    return [
        Case(
            f"{name} pde {entry:x} wp {bool(wp)} cr4 {cr4:x} cpl {level}",
            f"mov ebx, {WINDOW + PAGE}; {_ACCESSES[name]}" + EXIT,
            level,
            _paged(wp, cr4),
            [*identity_map(), *_CONTENT, Patch(DIRECTORY + 4, struct.pack("<I", entry)), Patch(OTHER_TABLE, bytes(8))],
            ((DIRECTORY, 2), (PAGE, 1)),
        )
        for level in (0, 3)
        for wp in (0, CR0_WP)
        for cr4 in (0, CR4_PSE, CR4_PSE | 0x80)
        for entry in (0x80, 0x81, 0x83, 0x85, 0x87, 0xA7, 0xE7, 0x187, 0x1087, 0x200087)
        for name in ("read", "write", "modify", "fetch")
    ]


_BAD_PAE = (1 << 62, 1 << 63)


def pae() -> list[Case]:
    """PAE: 4 KiB and 2 MiB pages, reserved bits; PDPTEs as CR0, CR3 and CR4 loads check them."""
    return [*_pae_pages(), *_pae_pointers()]


def _pae_pages() -> Iterator[Case]:
    small = [(7, 7), (1, 7), (3, 7), (5, 7), (0, 7), (6, 7), (7, 1), (7, 3), (7, 5), (7, 0), (7, 0x67)]
    small += [(7 | bit, 7) for bit in _BAD_PAE] + [(7, 7 | bit) for bit in (1 << 35, *_BAD_PAE)]
    large = [(entry, 0) for entry in (0x80, 0x81, 0x83, 0x85, 0x87, 0xE7, 0x187, 0x1087, 0x2087, 0x100087)]
    large += [(0x87 | bit, 0) for bit in _BAD_PAE]
    for level in (0, 3):
        for wp in (0, CR0_WP):
            for is_large, entries in ((False, small), (True, large)):
                for upper, lower in entries:
                    for name in ("read", "write", "modify", "fetch"):
                        linear = 0x200000 + (PAGE if is_large else 0)
                        yield Case(
                            f"pae {name} pde {upper:x} pte {lower:x} wp {bool(wp)} cpl {level}",
                            f"mov ebx, {linear}; {_ACCESSES[name]}" + EXIT,
                            level,
                            _paged(wp, CR4_PAE, POINTERS),
                            [
                                *_identity_map_pae(),
                                *_CONTENT,
                                Patch(DIRECTORY + 8, struct.pack("<Q", upper | (0 if is_large else OTHER_TABLE))),
                                Patch(OTHER_TABLE, struct.pack("<QQ", PAGE | lower, PAGE + 0x1000 | 7)),
                            ],
                            ((POINTERS, 2), (DIRECTORY, 4), (OTHER_TABLE, 4), (PAGE, 1)),
                        )


def _pae_pointers() -> Iterator[Case]:
    second = POINTERS + 0x20
    for entry in (0, 1, 2, 3, 5, 9, 0x19, 0x21, 0x41, 0x81, 0x101, 0x201, 0xE01, 1 << 63 | 1):
        for load, registers in (
            ("mov eax, 0x80000011; mov cr0, eax", {"cr0": CR0, "cr3": POINTERS, "cr4": CR4_PAE}),
            (f"mov eax, {POINTERS}; mov cr3, eax", {"cr0": CR0 | CR0_PG, "cr3": second, "cr4": CR4_PAE}),
        ):
            yield Case(
                f"{load} pdpte {entry:x}",
                f"{load}; nop" + EXIT,
                0,
                registers,
                [
                    *_identity_map_pae(),
                    Patch(POINTERS + 8, struct.pack("<Q", entry)),
                    Patch(second, struct.pack("<4Q", DIRECTORY | 1, 0, 0, 0)),
                ],
            )


def system_faults() -> list[Case]:
    """Page faults on inner stacks, GDT, LDT, IDT, TSSs and ordinary stacks, which leave the instruction restartable."""
    return [case for flags in (0, 1, 3, 5, 7, 0x67) for wp in (0, CR0_WP) for case in _system_faults(flags, wp)]


def _system_faults(flags: int, wp: int) -> Iterator[Case]:
    name = f"pte {flags:x} wp {bool(wp)}"
    dumps = ((OTHER_TABLE, 2), (DIRECTORY, 2))
    in_df_task = [vector_gate(vector, gate(S_TSS_DF, 0, 0xE5)) for vector in (14, EXIT_VECTOR)]

    def arena_at_window(first: int, second: int = 7) -> list[Patch]:
        return [
            *identity_map(),
            Patch(DIRECTORY + 4, struct.pack("<I", OTHER_TABLE | 7)),
            Patch(OTHER_TABLE, struct.pack("<II", ARENA | first, ARENA + 0x1000 | second)),
            double_fault_task(cr3=DIRECTORY),
        ]

    alias = arena_at_window(flags)
    stack = Patch(TSS_MAIN + 4, struct.pack("<I", WINDOW + 0x700))
    outer = [stack, *in_df_task, vector_gate(0x31, gate(S_CODE0, STUBS + 0x310, 0xEE))]
    yield Case(f"inner stack of int, {name}", "int 0x31" + EXIT, 3, _paged(wp), [*alias, *outer], dumps)
    call_gate = descriptor(S_FREE, gate(S_CODE0, CODE + 0x40, 0xEC, 4))
    code = f"call {S_FREE | 3}:0{EXIT}; .org 0x40" + EXIT
    yield Case(f"inner stack of call, {name}", code, 3, _paged(wp), [*alias, *outer, call_gate], dumps)
    for access in (0x92, 0x93):
        if flags:
            gdt = [descriptor(S_FREE, flat(access)), Patch(DATA, struct.pack("<HI", GDT_BYTES - 1, WINDOW))]
            code = f"lgdt [{DATA}]; mov eax, {S_FREE}; mov ds, eax" + EXIT
            yield Case(f"gdt access {access:x}, {name}", code, 0, _paged(wp), [*alias, *gdt], dumps)
        ldt = [descriptor(S_LDT, segment(WINDOW + 0x200, 0x3F, 0x82, 0)), descriptor(0xC, flat(access | 0x60))]
        code = "mov eax, 0xf; mov ds, eax" + EXIT
        yield Case(f"ldt access {access:x}, {name}", code, 3, _paged(wp), [*alias, *ldt], dumps)
    if flags:
        idt = Patch(DATA, struct.pack("<HI", IDT_BYTES - 1, WINDOW + IDT - ARENA))
        yield Case(f"idt, {name}", f"lidt [{DATA}]; ud2", 0, _paged(wp), [*alias, idt], dumps)
    for push in ("push eax", "pusha", "call .+5", "enter 0x20, 3", "pushf", "int 0x30"):
        for offset in (0x1000, 0x1002, 0x1004, 0x1010):
            registers = {**_paged(wp), "esp": WINDOW + offset, "ebp": WINDOW + offset}
            yield Case(f"{push} at {offset:x}, {name}", push + EXIT, 3, registers, alias, dumps)
    for pop in ("pop eax", "popa", "leave", "pop dword ptr [esp + 4]"):
        for offset in (0x7FC, 0xFF0, 0xFFE):
            registers = {**_paged(wp), "esp": WINDOW + offset, "ebp": WINDOW + offset}
            yield Case(f"{pop} at {offset:x}, {name}", pop + EXIT, 3, registers, arena_at_window(flags, 0), dumps)
    for way in (f"jmp {S_FREE}:0", f"call {S_FREE}:0", "int 0x31"):
        new = [
            descriptor(S_FREE, segment(WINDOW + TSS_B - ARENA, 0x67, 0x89, 0)),
            vector_gate(0x31, gate(S_FREE, 0, 0x85)),
        ]
        patches = [*alias, *new, task_32(cr3=DIRECTORY)]
        yield Case(f"{way} to a tss, {name}", f"{way}{EXIT}; .org 0x40" + EXIT, 0, _paged(wp), patches, dumps)
    code = f"jmp {S_TSS_B}:0{EXIT}; .org 0x40; mov eax, [{WINDOW}]" + EXIT
    yield Case(f"read after a switch, {name}", code, 0, _paged(wp), [*alias, task_32(cr3=DIRECTORY)], dumps)


_ALIGNED = (
    "mov al, [D]", "mov ax, [D]", "mov eax, [D]", "mov [D], ax", "mov [D], eax", "add dword ptr [D], 1",
    "push dword ptr [D]", "cmpxchg8b [D]", "lds ebx, [D]", "bound eax, [D]", "movsd",
)  # fmt: skip
_STACKED = ("push eax", "pop eax", "pusha", "popa", "enter 4, 0", "leave", "pushf", "int 0x31")
_FAULTING_ONLY = ("ret", "retf", "iretd")  # without the fault they would go anywhere


def alignment() -> Iterator[Case]:
    """#AC: with CR0.AM and EFLAGS.AC and at CPL 3 only."""
    for level in (0, 3, V86):
        width = ".code16; " if level == V86 else ""
        data = 0 if level == V86 else DATA
        top = {0: STACK0, 3: STACK3, V86: 0x100}[level]
        for am in (0, CR0_AM):
            for ac in (0, AC):
                flags = RESET_EFLAGS | ac | (VM | iopl(3) if level == V86 else 0)
                for offset in range(4):
                    name = f"offset {offset} am {bool(am)} ac {bool(ac)} cpl {level}"
                    setup = (
                        f"mov eax, 0xDA7A0004; mov edx, [{data}]; mov esi, {data + offset}; mov edi, {data + 0x20}; "
                    )
                    for access in _ALIGNED:
                        code = width + setup + access.replace("D", str(data + offset + 8)) + "; nop" + EXIT
                        yield Case(f"{access} {name}", code, level, {"cr0": CR0 | am, "eflags": flags})
                    faults = am and ac and level == 3 and offset
                    for access in _STACKED + (_FAULTING_ONLY if faults else ()):
                        esp = top - 0x40 + offset
                        registers = {"cr0": CR0 | am, "eflags": flags, "esp": esp, "ebp": esp}
                        yield Case(f"{access} {name}", width + access + "; nop" + EXIT, level, registers)
