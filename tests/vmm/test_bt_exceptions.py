"""Exceptions that `bt` delivers without leaving the TC, against `interp`: page faults and divide errors, both rings."""

from __future__ import annotations

import random
from functools import cache

import pytest

from machine.flags import IF
from machine.state import CR0_WP, CR4_PSE
from tests.oracles.assembler import assemble
from tests.vmm import rings
from tests.vmm.bare import IDT_BASE, PAGE_DIRECTORY, PAGE_TABLE, Bare, set_page
from tests.vmm.rings import (
    GDT,
    HOLE,
    KERNEL_CODE,
    KERNEL_DATA,
    KERNEL_STACK,
    SLOT_BYTES,
    SLOTS,
    USER_CODE,
    USER_DATA,
    USER_STACK,
)
from tests.vmm.test_bt_system import Timer
from tests.vmm.twins import Twins

READ_ONLY = 0x3_2000
SUPERVISOR = 0x3_4000
CHANGING = 0x3_6000  # what its entry says changes all the time
FAR = 0x40_0000  # a large page, then one with a reserved bit, then no table at all
SLOT_COUNT = 40
GATE = IDT_BASE + 8 * 14


@pytest.fixture(autouse=True)
def known_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A place where an exception came is known from the first one on, and any budget is worth it."""
    monkeypatch.setattr("vmm.native.faultsites.SITE_FAULTS", 1)
    monkeypatch.setattr("vmm.bt.MIN_BUDGET_INSNS", 1)


def place(chance: random.Random) -> int:
    """An address that an access may fault at."""
    page = chance.choice((HOLE, HOLE, READ_ONLY, SUPERVISOR, CHANGING, CHANGING, FAR, FAR + 0x40_0000, FAR + 0x80_0000))
    return page + chance.choice((0, 0, 1, 3, 4, 12, 16, 0x123, 0xFFC, 0xFFE, -1, -2, -4))


def slot(chance: random.Random, address: int) -> str:
    """The source of one slot."""
    pick, at = chance.choice, place(chance)
    following = address + SLOT_BYTES
    entry = PAGE_TABLE + 4 * (CHANGING >> 12)
    return pick(
        (
            f"mov eax, [{at}]",
            f"mov [{at}], ecx",
            f"mov ebx, {at}; mov [ebx], cl; inc esi",
            f"mov ebx, {at}; add [ebx], esi; inc esi",
            f"mov ebx, {at}; cmp esi, [ebx]; pushfd; pop edx",
            f"mov ebx, {at}; movzx edx, word ptr [ebx]; inc esi",
            f"add esi, eax; push eax; push dword ptr [{at}]; pop ecx",
            f"push esi; pop dword ptr [{at}]; inc edx",
            f"push esi; mov ebp, [{at}]; pop ebp",
            f"mov ebx, {at}; xchg [ebx], ecx",
            f"mov ebx, {HOLE + at % 4096}; jmp dword ptr [ebx-1]",
            f"mov edi, {at}; mov ecx, 9; rep stosb",
            f"sti; mov eax, [{at}]; inc esi",
            f"std; mov ebp, {at}; sub edx, [ebp]; cld",
            "xor ecx, ecx; div ecx; inc esi",
            "mov ecx, 0; add eax, ecx; idiv cx; inc esi",
            "stc; mov edx, 3; mov ecx, 2; div ecx; inc edi",
            "push eax; push 0; div dword ptr [esp]; pop ecx",
            f"mov eax, {pick((0, CHANGING | 7, CHANGING | 0x67, CHANGING | 5, CHANGING | 0x63))}; mov [{entry}], eax",
            f"xor byte ptr [{entry}], {pick((1, 2, 4, 0x20, 0x40))}",
            f"mov eax, cr0; xor eax, {CR0_WP}; mov cr0, eax",
            "mov eax, cr2; mov ebp, eax",
            "mov eax, cr3; mov cr3, eax",
            # The gate of #PF: its P bit, trap or interrupt.
            f"xor byte ptr [{GATE + 5}], {pick((0x80, 1, 1, 1))}",
            f"mov dword ptr [{GATE + 4}], {0x10000 | 0x8E00}",
            f"mov word ptr [{IDT_BASE + 4}], {pick((0x8E00, 0x8F00, 0xEF00, 0x8E00))}",
            f"push 2; push {USER_CODE}; push {following}; iretd",
            f"push {IF | 2}; push {KERNEL_CODE}; push {following}; iretd",
            f"push {0x1_0002}; push {KERNEL_CODE}; push {following}; iretd",
            f"push {pick((2, IF | 2, 0x102, 0x4002, 0x4_0002, 0x3202))}; popfd; nop",
            "cli",
            "int 0x90",
            f"mov eax, {chance.randrange(1, 60)}; out 0x50, al",
            f"mov eax, {USER_DATA}; mov ds, ax; mov es, ax",
            f"mov eax, {KERNEL_DATA}; mov ss, ax; mov eax, [{at}]",
            f"mov dword ptr [{GDT + 8 + 4}], {pick((0x00CF9B00, 0x00CF9B00, 0x00CF9A00))}",
        )
    )


# From the last slot to the first one again, with a stack and segments of the ring that it is.
_AGAIN = f"""
    mov ecx, cs
    test cl, 3
    mov eax, {USER_DATA}
    mov ds, ax
    mov es, ax
    mov esp, {USER_STACK}
    jnz {SLOTS}
    mov esp, {KERNEL_STACK - 0x300}
    mov eax, {KERNEL_DATA}
    mov ss, ax
    jmp {SLOTS}
"""


@cache
def random_slots(seed: int) -> bytes:
    chance = random.Random(seed)
    sources = [slot(chance, SLOTS + SLOT_BYTES * number) for number in range(SLOT_COUNT)]
    code = assemble("\n.balign 16, 0x90\n".join([*sources, _AGAIN]), origin=SLOTS)
    assert len(code) > SLOT_COUNT * SLOT_BYTES
    return code


def prepare(bare: Bare, seed: int) -> None:
    Timer(bare)
    rings.install(bare, seed, random_slots(seed))
    memory, state = bare.memory, bare.state
    set_page(bare, READ_ONLY, READ_ONLY | 5)
    set_page(bare, SUPERVISOR, SUPERVISOR | 3)
    set_page(bare, CHANGING, 0)
    state.cr4 |= CR4_PSE * (seed % 3 > 0)
    memory.store(PAGE_DIRECTORY + 4 * (FAR >> 22), 4, 0x80 | (5 if seed % 2 else 7))
    memory.store(PAGE_DIRECTORY + 4 * (FAR + 0x40_0000 >> 22), 4, 0x2087)
    bare.cpu.mmu.flush()


@pytest.mark.parametrize("seed", range(24))
def test_random_slots(seed: int) -> None:
    with Twins("nop", lambda bare: prepare(bare, seed)) as twins:
        twins.run(6000, (1211, 1, 900, 40, 7))
        assert int(twins.count("faults delivered in the TC")) > 30
