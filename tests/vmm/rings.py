"""A guest of random slots in two rings, for tests of system instructions: whatever a slot does, the next one follows.

Each slot is 16 bytes of code, run in ring 0 or ring 3 as it comes; the handler of an exception goes on at the slot
behind. It must not know engines.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterable, Sequence
from functools import cache

from machine.flags import AC, ID, IF, IOPL, NT, TF, VM
from machine.state import CS, DS, ES, ESP, MASK32, SS
from tests.oracles.assembler import assemble
from tests.vmm.bare import IDT_BASE, Bare, map_low_memory, set_page

SLOTS = 0x4_0000
SLOT_BYTES = 16
SLOT_COUNT = 96
KERNEL_STACK = 0x2_1000  # the page below it is there, the one above is not
USER_STACK = 0x2_8000
GDT = 0x1_0000
TSS = 0x1_1000
STUBS = 0x1_2000
COUNTER = 0x3_0000
HOLE = 0x2_3000  # a page that is not there
SYSENTER_EIP = 0x1_3000

KERNEL_CODE, KERNEL_DATA, USER_CODE, USER_DATA = 0x08, 0x10, 0x1B, 0x23
_FLAT = 0x00CF_0000_0000_FFFF
_DESCRIPTORS = (
    0,
    _FLAT | 0x9B << 40,
    _FLAT | 0x93 << 40,
    _FLAT | 0xFB << 40,
    _FLAT | 0xF3 << 40,
    0x0040_8B01_1000_0067,  # 28h: the TSS
    _FLAT | 0xF2 << 40,  # 30h: not accessed yet
    0x00CF_F311_1100_FFFF,  # 38h: a base
    0x0040_F300_0000_FFFF,  # 40h: 64 KiB
    _FLAT | 0x73 << 40,  # 48h: not present
    _FLAT | 0xF1 << 40,  # 50h: read only
    _FLAT | 0x9F << 40,  # 58h: conforming code
    0x00DF_F300_0000_FFFF,  # 60h: AVL
    _FLAT | 0x9A << 40,  # 68h: code, not accessed yet
    _FLAT | 0xF7 << 40,  # 70h: expand-down
    _FLAT | 0x92 << 40,  # 78h: data of ring 0, not accessed yet
    0x00CF_9B00_0000_FFFF,  # 80h to 98h: what SYSENTER and SYSEXIT expect, though they do not look
    0x00CF_9300_0000_FFFF,
    0x00CF_FB00_0000_FFFF,
    0x00CF_F300_0000_FFFF,
)
_SELECTORS = (
    *(0x10, 0x13, 0x23, 0x20, 0x23, 0x23, 0, 1, 3, 0x33, 0x38, 0x3B, 0x40, 0x4B, 0x53, 0x58, 0x63, 0x73, 0x7B, 0x78),
    *(0x08, 0x1B, 0x28, 0x24, 0xA0, 0xFFFF),
)
_WITH_ERROR_CODE = frozenset({8, 10, 11, 12, 13, 14, 17})
_IMAGES = (0, IF, IF, IF | IOPL, IOPL, 1 << 12, NT, TF, AC, ID, 0xCD5, IF | 0x8D5, VM | IF, 0xFFFF_FFFF, 0x1_0000 | IF)
# Vectors 80h on: type of the gate.
_GATES = (0xEE, 0xEF, 0x8E, 0xE6, 0x6E, 0xEE, 0xEE, 0xEF)
_SKIP = """
    push eax
    mov eax, [esp+4]
    or eax, 15
    inc eax
    mov [esp+4], eax
    and dword ptr [esp+12], 0xffffbeff
    pop eax
    iretd
"""
_SERVE = f"""
    pushad
    push ds
    push es
    mov ax, {KERNEL_DATA}
    mov ds, ax
    mov es, ax
    inc dword ptr [{COUNTER}]
    pop es
    pop ds
    popad
    iretd
"""
# The same, but back to ring 0 whoever called.
_RISE = f"""
    mov eax, [esp]
    mov esp, {KERNEL_STACK - 0x100}
    jmp eax
"""
# Behind the last slot: on at another one, by a linear congruential generator that is stirred with the time.
_WANDER = f"""
    mov eax, {USER_DATA}
    mov ds, ax
    imul eax, dword ptr [{COUNTER + 0x20}], 1103515245
    add eax, 12345
    mov [{COUNTER + 0x20}], eax
    shr eax, 9
    and eax, {SLOT_BYTES * 63}
    add eax, {SLOTS}
    mov esp, {USER_STACK}
    jmp eax
"""


@cache
def _code(source: str, origin: int) -> bytes:
    return assemble(source, origin=origin)


def _slot(chance: random.Random, address: int) -> str:
    """The source of one slot."""
    pick = chance.choice
    selector, image = pick(_SELECTORS), pick(_IMAGES) | 2
    near = pick((chance.randrange(address + 16, SLOTS + SLOT_BYTES * (SLOT_COUNT + 1), SLOT_BYTES), address + 16))
    # In ring 0 a stack that is not there is the end.
    stack = pick((USER_STACK, USER_STACK - 4, KERNEL_STACK - 0x80, USER_STACK + 0x1004))
    if chance.random() < 0.1:
        stack = pick((HOLE + 8, HOLE + 0x1004, 6))
    code = pick((USER_CODE, USER_CODE, USER_CODE, KERNEL_CODE, KERNEL_CODE, 0x0B, 0x58, 0x68, 0, 0x1A, 0x24))
    data = pick((USER_DATA, USER_DATA, USER_DATA, KERNEL_DATA, 0x33, 0x38, 0, 0x20))
    register = pick(("ds", "es", "fs", "gs"))
    vector = 0x80 + chance.randrange(len(_GATES))
    return (
        pick(
            (
                f"push {image}; popfd",
                f"push {image}; popfd; nop",
                "pushfd; pop ecx",
                "cli",
                "sti",
                "sti; nop; nop",
                "sti; pushfd; pop edx",
                "cli; sti; inc ebx",
                "sti; sti; cli",
                f"mov eax, {selector}; mov {register}, ax",
                f"push {selector}; pop {register}",
                f"mov ax, {register}; mov [{COUNTER + 16}], {register}",
                f"push {register}; pop ecx",
                f"mov eax, {USER_DATA}; mov ds, ax; mov es, ax",
                f"push {USER_DATA}; pop ds; push {USER_DATA}; pop es",
                f"int {vector:#x}",
                f"int {vector:#x}; inc esi",
                f"int {vector:#x}",
                "int 0x90",
                "int 0x90; pushad; popad",
                f"push {image}; push {code}; push {near}; iretd",
                f"push {pick((IF, IF, 0x200 | ID)) | 2}; push {KERNEL_CODE}; push {near}; iretd",
                # SS and ESP of an outer ring stand in memory already.
                f"mov esp, {COUNTER + 0x100 + 32 * chance.randrange(16)}; iretd",
                f"mov esp, {COUNTER + 0x100 + 32 * chance.randrange(16)}; iretd",
                f"mov esp, {stack}; inc edi",
                f"mov esp, {stack}; push eax",
                f"mov esp, {stack}; pushad",
                "pushad; popad",
                f"mov esp, {stack}; popad",
                f"mov ecx, {stack}; mov edx, {near}; sysexit",
                f"mov ecx, {stack}; mov edx, {near}; sti; sysexit",
                "sysenter",
                "rdtsc; add ebx, eax",
                f"mov ecx, cr{pick((0, 2, 3, 4))}",
                f"invlpg [{COUNTER}]",
                "mov eax, cr3; mov cr3, eax",
                f"push {SLOTS + SLOT_BYTES * SLOT_COUNT}; ret",
                f"mov eax, {chance.randrange(1, 80)}; out 0x50, al",
                f"mov eax, {chance.randrange(1, 80)}; out 0x50, al",
                "smsw ecx; sgdt [esp-16]",
                f"mov eax, {near}; jmp eax",
                f"push {near}; ret",
                f"mov dword ptr [{GDT + 8 * chance.choice((6, 13, 15)) + 4}], {pick((0x00CFF200, 0x00CF9A00))}",
                f"mov edx, {chance.randrange(1, 9)}",
                data and f"mov eax, {data}; mov ss, ax; nop",
                f"ljmp {code:#x}, {near:#x}",
                f"lcall {code:#x}, {near:#x}",
                f"lcall {code:#x}, {near:#x}",
                f"push {code}; push {near}; retf",
                f"push {code}; push {near}; retf 8",
                f"mov word ptr [{COUNTER + 0x44}], {code}; mov word ptr [{COUNTER + 0x40}], {near & 0xFFFF}",
                f"lcall [{COUNTER + 0x40}]",
            )
        )
        or "nop"
    )


def assemble_slots(sources: Iterable[str]) -> bytes:
    """Slots for `install`, one for each source; NEXT is the address of the slot behind it."""
    slots = bytearray()
    for number, source in enumerate(sources):
        at = SLOTS + SLOT_BYTES * number
        code = _code(source.replace("NEXT", hex(at + SLOT_BYTES)), at)
        assert len(code) <= SLOT_BYTES, source
        slots += code.ljust(SLOT_BYTES, b"\x90")
    return bytes(slots)


def random_guest(seed: int) -> tuple[bytes, Sequence[tuple[int, bytes]]]:
    """The slots' code and further contents of memory, by address, of a guest."""
    chance = random.Random(seed)
    slots = bytearray()
    for number in range(SLOT_COUNT):
        address = SLOTS + SLOT_BYTES * number
        code = _code(_slot(chance, address), address)
        slots += code.ljust(SLOT_BYTES, b"\x90")[:SLOT_BYTES]
    last = SLOTS + SLOT_BYTES * SLOT_COUNT
    slots += _code(_WANDER, last).ljust(80, b"\x90") + 8 * _code(f"mov eax, {last}; jmp eax", last).ljust(SLOT_BYTES)
    frames = bytearray()
    for _ in range(16):
        ring3 = chance.random() < 0.8
        frames += struct.pack(
            "<8I",
            SLOTS + 16 * chance.randrange(SLOT_COUNT),
            chance.choice((USER_CODE, USER_CODE, USER_CODE, 0x6B)) if ring3 else KERNEL_CODE,
            chance.choice((IF, IF, IF, *_IMAGES)) | 2,
            chance.choice((USER_STACK, USER_STACK, HOLE + 4)),
            chance.choice((USER_DATA, USER_DATA, USER_DATA, 0x33, KERNEL_DATA, 0x63)),
            *(0, 0, 0),
        )
    return bytes(slots), [(COUNTER + 0x100, bytes(frames))]


def install(bare: Bare, seed: int, slots: bytes = b"") -> None:
    """Make a flat guest of `tests.vmm.bare` a random one, by `random_guest` or with the caller's slots."""
    map_low_memory(bare)
    memory, state = bare.memory, bare.state
    memory.write(GDT, b"".join(each.to_bytes(8, "little") for each in _DESCRIPTORS))
    state.gdtr.base, state.gdtr.limit = GDT, 8 * len(_DESCRIPTORS) - 1
    memory.write(TSS, struct.pack("<3I", 0, KERNEL_STACK - 0x40 * (seed % 3), KERNEL_DATA).ljust(0x68, b"\0"))
    state.tr.load(0x28, TSS, 0x67, 0x8B)
    stubs = {"skip": _SKIP, "skip error": "add esp, 4" + _SKIP, "serve": _SERVE, "rise": _RISE, "timer": _SERVE}
    at, places = STUBS, {}
    for name, source in stubs.items():
        places[name] = at
        code = _code(source, at)
        memory.write(at, code)
        at += len(code) + 15 & -16
    for vector in range(256):
        name = "skip error" if vector in _WITH_ERROR_CODE else "skip"
        kind = 0x8E
        if 0x80 <= vector < 0x80 + len(_GATES):
            name, kind = "serve", _GATES[vector - 0x80]
        elif vector == 0x90:
            name, kind = "rise", 0xEE
        elif vector == 0x20:
            name = "timer"
        handler = places[name]
        memory.write(
            IDT_BASE + 8 * vector, struct.pack("<HHHH", handler & 0xFFFF, KERNEL_CODE, kind << 8, handler >> 16)
        )
    memory.write(
        SYSENTER_EIP,
        _code(f"mov ecx, {USER_STACK}; mov edx, {SLOTS + 16 * (seed % SLOT_COUNT)}; sysexit", SYSENTER_EIP),
    )
    state.sysenter_cs, state.sysenter_esp, state.sysenter_eip = (
        0x80 if seed % 5 else 0,
        KERNEL_STACK - 0x200,
        SYSENTER_EIP,
    )
    if slots:
        memory.write(SLOTS, slots)
    else:
        slots, contents = random_guest(seed)
        memory.write(SLOTS, slots)
        for address, data in contents:
            memory.write(address, data)
    set_page(bare, HOLE, 0)
    set_page(bare, KERNEL_STACK, 0)
    if seed % 4 == 3:
        set_page(bare, KERNEL_STACK - 0x1000, KERNEL_STACK - 0x1000 | 3)  # for ring 0 only
        set_page(bare, GDT, GDT | 3)
        set_page(bare, TSS, TSS | 3)
        set_page(bare, STUBS, STUBS | 3)
    state.segments[CS].load(KERNEL_CODE, 0, MASK32, 0xC9B)
    for number in (SS, DS, ES):
        state.segments[number].load(KERNEL_DATA, 0, MASK32, 0xC93)
    state.gpr[ESP] = KERNEL_STACK - 0x300
    state.eip = SLOTS
    bare.cpu.mmu.flush()
