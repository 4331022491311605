"""The memory in which protected-mode cases run: where tables, stacks and code stand, and what they hold before patches.

It knows the layouts from the SDM and nothing of our machine.

Source: SDM Vol. 3A, "Segment Descriptors", "System Descriptor Types", "Task Management" and "IDT Descriptors".
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

ENTRY = 0x10_0000
BLOB = 0x20_0000
STUBS = ENTRY + 0x1000

ARENA = 0x2_0000
ARENA_BYTES = 0x980
GDT = ARENA
GDT_BYTES = 0x200
LDT = ARENA + 0x200
LDT_BYTES = 0x40
TSS_MAIN = ARENA + 0x240
TSS_B = ARENA + 0x2E0
TSS_16 = ARENA + 0x350
TSS_DF = ARENA + 0x380
IDT = ARENA + 0x400
IDT_BYTES = 0x200
STACK0 = ARENA + 0x700  # the tops; they grow down
STACK1 = ARENA + 0x780
STACK2 = ARENA + 0x800
STACK3 = ARENA + 0x900
DATA = ARENA + 0x900
DATA_BYTES = 0x80
CODE = ARENA + 0x1000  # a page of its own, outside the arena
CODE_BYTES = 0x80
DF_STACK = 0x1_9000

# Selectors of the GDT that every case finds.
S_CODE0 = 0x08
S_DATA0 = 0x10
S_CODE1 = 0x19
S_DATA1 = 0x21
S_CODE2 = 0x2A
S_DATA2 = 0x32
S_CODE3 = 0x3B
S_DATA3 = 0x43
S_TSS = 0x48
S_TSS_B = 0x50
S_TSS_16 = 0x58
S_TSS_DF = 0x60
S_LDT = 0x68
S_CONFORMING0 = 0x70
S_CODE0_16 = 0x78  # base ARENA, 64 KiB
S_DATA0_16 = 0x80
S_CODE3_16 = 0x8B
S_DATA3_16 = 0x93
S_CONFORMING3 = 0x98
S_READ_ONLY3 = 0xA3
S_EXECUTE_ONLY0 = 0xA8
S_DATA0_COPY = 0xB0
S_FREE = 0xC0  # the first of the selectors that cases define

EXIT_VECTOR = 0x30
V86_CODE = CODE >> 4  # paragraph of the code, the data and the stack in virtual-8086 mode
V86_DATA = DATA >> 4
V86_STACK = (STACK3 - 0x100) >> 4

RESET_EFLAGS = 2
CF, ZF, TF, IF, OF, NT, RF, VM, AC, VIF, VIP = (1 << n for n in (0, 6, 8, 9, 11, 14, 16, 17, 18, 19, 20))
CR0 = 0x11  # PE and ET
CR0_TS, CR0_WP, CR0_AM, CR0_PG = 8, 1 << 16, 1 << 18, 1 << 31
CR4_VME, CR4_PVI, CR4_TSD, CR4_DE, CR4_PSE, CR4_PAE = (1 << n for n in range(6))


TSS32_FIELDS = (
    "link", "esp0", "ss0", "esp1", "ss1", "esp2", "ss2", "cr3", "eip", "eflags", "eax", "ecx", "edx", "ebx", "esp",
    "ebp", "esi", "edi", "es", "cs", "ss", "ds", "fs", "gs", "ldt", "trap_io",
)  # fmt: skip
TSS16_FIELDS = (
    "link", "sp0", "ss0", "sp1", "ss1", "sp2", "ss2", "ip", "flags", "ax", "cx", "dx", "bx", "sp", "bp", "si", "di",
    "es", "cs", "ss", "ds", "ldt",
)  # fmt: skip


def iopl(level: int) -> int:
    """EFLAGS.IOPL."""
    return level << 12


def segment(base: int, limit: int, access: int, flags: int = 0x4) -> bytes:
    """A descriptor: `limit` is the 20-bit field, `access` the byte with P, DPL, S and type, `flags` G, D/B, L, AVL."""
    return struct.pack(
        "<HHBBBB",
        limit & 0xFFFF,
        base & 0xFFFF,
        base >> 16 & 0xFF,
        access,
        flags << 4 | limit >> 16 & 0xF,
        base >> 24,
    )


def gate(selector: int, offset: int, access: int, count: int = 0) -> bytes:
    """A gate; `access` as in `segment`."""
    return struct.pack("<HHBBH", offset & 0xFFFF, selector, count, access, offset >> 16)


def flat(access: int) -> bytes:
    """A 4 GiB segment with 32-bit defaults."""
    return segment(0, 0xF_FFFF, access, 0xC)


def tss32(**fields: int) -> bytes:
    """A 32-bit TSS of 104 bytes: `esp0`, `ss0`, ... by the SDM's names, zero where not given."""
    return struct.pack("<26I", *_pick(TSS32_FIELDS, fields))


def tss16(**fields: int) -> bytes:
    """A 16-bit TSS of 44 bytes."""
    return struct.pack("<22H", *_pick(TSS16_FIELDS, fields))


def _pick(names: Sequence[str], fields: Mapping[str, int]) -> list[int]:
    assert fields.keys() <= set(names), fields
    return [fields.get(name, 0) for name in names]


@dataclass(frozen=True, slots=True)
class Patch:
    """Bytes that a case puts somewhere before it starts."""

    address: int
    data: bytes


def descriptor(selector: int, data: bytes) -> Patch:
    """A descriptor of the GDT, or of the LDT if `selector` says so."""
    return Patch((LDT if selector & 4 else GDT) + (selector & ~7), data)


def vector_gate(vector: int, data: bytes) -> Patch:
    """A gate of the IDT."""
    return Patch(IDT + vector * 8, data)


_STACKS = {"esp0": STACK0, "ss0": S_DATA0, "esp1": STACK1, "ss1": S_DATA1, "esp2": STACK2, "ss2": S_DATA2}
_TASK_32 = {
    **_STACKS, "eip": CODE + 0x40, "eflags": RESET_EFLAGS, "cs": S_CODE0, "ss": S_DATA0, "ds": S_DATA0, "es": S_DATA0,
    "fs": S_DATA3, "esp": STACK1, "ldt": S_LDT, "eax": 0x1111, "ecx": 0x2222, "edx": 0x3333, "ebx": 0x4444,
    "ebp": 0x5555, "esi": 0x6666, "edi": 0x7777, "trap_io": 0x68 << 16,
}  # fmt: skip
_TASK_16 = {
    "sp0": STACK0 - ARENA, "ss0": S_DATA0_16, "sp1": STACK1 - ARENA, "ss1": S_DATA1, "ip": CODE + 0x40 - ARENA,
    "flags": RESET_EFLAGS, "cs": S_CODE0_16, "ss": S_DATA0_16, "ds": S_DATA0_16, "es": S_DATA0_16, "sp": STACK1 - ARENA,
    "ldt": S_LDT, "ax": 0x8181, "cx": 0x8282, "dx": 0x8383, "bx": 0x8484, "bp": 0x8585, "si": 0x8686, "di": 0x8787,
}  # fmt: skip


def task_32(**changes: int) -> Patch:
    """The other 32-bit task, which starts at `CODE` + 40h in ring 0."""
    return Patch(TSS_B, tss32(**{**_TASK_32, **changes}))


def task_16(**changes: int) -> Patch:
    """The 16-bit task, which starts at `CODE` + 40h in ring 0, in segments based at the arena."""
    return Patch(TSS_16, tss16(**{**_TASK_16, **changes}))


def double_fault_task(**changes: int) -> Patch:
    """The task that vector 8 switches to: the guest's own entry point, on a stack that no case touches."""
    fields = {"eip": STUBS + 8 * 16, "eflags": RESET_EFLAGS, "cs": S_CODE0, "ss": S_DATA0, "ds": S_DATA0, "es": S_DATA0}
    return Patch(TSS_DF, tss32(**{**_STACKS, **fields, "esp": DF_STACK, **changes}))


@cache
def arena() -> bytes:
    """The arena before patches."""
    data = bytearray(ARENA_BYTES)

    def put(address: int, content: bytes) -> None:
        data[address - ARENA : address - ARENA + len(content)] = content

    descriptors = {
        S_CODE0: flat(0x9B), S_DATA0: flat(0x93), S_CODE1: flat(0xBB), S_DATA1: flat(0xB3), S_CODE2: flat(0xDB),
        S_DATA2: flat(0xD3), S_CODE3: flat(0xFB), S_DATA3: flat(0xF3),
        S_TSS: segment(TSS_MAIN, 0x9F, 0x89, 0), S_TSS_B: segment(TSS_B, 0x67, 0x89, 0),
        S_TSS_16: segment(TSS_16, 0x2B, 0x81, 0), S_TSS_DF: segment(TSS_DF, 0x67, 0x89, 0),
        S_LDT: segment(LDT, LDT_BYTES - 1, 0x82, 0), S_CONFORMING0: flat(0x9F),
        S_CODE0_16: segment(ARENA, 0xFFFF, 0x9B, 0), S_DATA0_16: segment(ARENA, 0xFFFF, 0x93, 0),
        S_CODE3_16: segment(ARENA, 0xFFFF, 0xFB, 0), S_DATA3_16: segment(ARENA, 0xFFFF, 0xF3, 0),
        S_CONFORMING3: flat(0xFF), S_READ_ONLY3: flat(0xF1), S_EXECUTE_ONLY0: flat(0x99), S_DATA0_COPY: flat(0x93),
    }  # fmt: skip
    for selector, content in descriptors.items():
        put(GDT + (selector & ~7), content)
    put(LDT + 0x08, flat(0x9B))
    put(LDT + 0x10, flat(0x93))
    put(LDT + 0x18, flat(0xFB))
    put(LDT + 0x20, flat(0xF3))
    put(TSS_MAIN, tss32(**_STACKS, trap_io=0x88 << 16))
    put(TSS_MAIN + 0x68 + EXIT_VECTOR // 8, b"\x01")  # not redirected in virtual-8086 mode
    put(TSS_MAIN + 0x88, b"\0" * 0x17 + b"\xff")
    put(TSS_B, task_32().data)
    put(TSS_16, task_16().data)
    put(TSS_DF, double_fault_task().data)
    for vector in range(IDT_BYTES // 8):
        access = 0xEE if vector in (3, 4, EXIT_VECTOR) else 0x8E
        put(IDT + vector * 8, gate(S_CODE0, STUBS + vector * 16, access))
    put(IDT + 8 * 8, gate(S_TSS_DF, 0, 0x85))
    for offset in range(0, DATA_BYTES, 4):
        put(DATA + offset, struct.pack("<I", 0xDA7A0000 | offset))
    return bytes(data)
