"""Guests whose page tables change all the time, for tests of the software path to memory.

It must not know what is expected of them.
"""

from __future__ import annotations

import pytest

from machine.state import CR4_PAE
from tests.vmm.bare import PAGE_TABLE, Bare, map_low_memory

STEPS = (2000, 333)
PAGE = 0x30_0000  # a linear page whose entry the guests change
ENTRY = PAGE_TABLE + 4 * (PAGE >> 12)
OTHER_DIRECTORY = 0x10_2000
PAE_TABLES = 0x12_0000
PAE_ENTRY = PAE_TABLES + 0x3000 + 8 * 0x100  # that of PAGE there
FRAMES = tuple(range(0x5_0000, 0x5_4000, 0x1000))
ACCESSED_DIRTY = 0x60


def map_with_pae(bare: Bare) -> None:
    """The first 4 MiB at 0 and at 1 GiB by tables of 64-bit entries, the first 2 MiB of them by a large page."""
    memory = bare.memory
    map_low_memory(bare)
    for quarter in range(2):
        memory.store(PAE_TABLES + 8 * quarter, 4, PAE_TABLES + 0x1000 | 1)
    memory.store(PAE_TABLES + 0x1000, 4, 0xE7)
    memory.store(PAE_TABLES + 0x1008, 4, PAE_TABLES + 0x3000 | 0x27)
    for page in range(512):
        memory.store(PAE_TABLES + 0x3000 + 8 * page, 4, 0x20_0000 | page << 12 | 7)
    bare.state.cr3, bare.state.cr4 = PAE_TABLES, CR4_PAE
    bare.cpu.mmu.flush()


def thrash(access: str, bits: int = 7, *, entry: int | str = ENTRY) -> str:
    """A loop that moves a page to and fro by its entry, which a register may say, and accesses it."""
    return f"""
        1: inc ecx
        mov eax, ecx
        and eax, 1
        shl eax, 12
        add eax, {FRAMES[0] | bits:#x}
        mov [{entry}], eax
        invlpg [{PAGE:#x}]
        {access}
        jmp 1b
    """


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapt at once, and look at every 40th access."""
    monkeypatch.setattr("vmm.native.adaptation.SOFT_FAULTS", 2)
    monkeypatch.setattr("vmm.native.adaptation.SOFT_ACCESSES", 40)
    monkeypatch.setattr("vmm.native.adaptation.SOFT_INNOCENT", 3)
    monkeypatch.setattr("vmm.native.volatility.VOLATILE_CHANGES", 2)
    monkeypatch.setattr("vmm.native.volatility.CALM_TOUCHES", 3)


# What is done to the page at ESI, whose tables are changed.
ACCESSES = (
    "mov [esi], ecx", "add ebx, [esi + 4]", "adc [esi], ecx", "xor byte ptr [esi + 1], cl", "mov dx, [esi + 2]",
    "sbb ebx, [esi]", "movzx edx, byte ptr [esi]", "movsx edx, word ptr [esi]", "xchg [esi], edx",
    "inc dword ptr [esi]", "cmpxchg [esi + 8], ecx", "bts dword ptr [esi], 3", "bt dword ptr [esi], ecx",
    "setc byte ptr [esi + 5]", "mov [esi], dh", "add bh, [esi + 3]", "not dword ptr [esi]", "cmp [esi], edx",
    "rcl dword ptr [esi + 4]", "imul edx, [esi]", "cmpxchg8b [esi + 8]", "mov word ptr [esi + 8], 0x1234",
    "test byte ptr [esi], 5", "xadd [esi], edx", "shld [esi], ecx, 5", "cmovc edx, [esi]", "mov [esi + 2], dx",
    "mov byte ptr [esi], 0x77", "neg byte ptr [esi + 9]",
    # Without a soft form.
    "push dword ptr [esi]\npop dword ptr [esi + 4]", "push esi\nmov eax, [esi]\nstosd [edi]\npop esi",
)  # fmt: skip
