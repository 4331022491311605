"""Far transfers within the ring under `bt` against `interp`: plain ones stay in the TC, others are as right."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import pytest

from machine.state import EDX, ESI
from tests.oracles.assembler import assemble
from tests.vmm.bare import GDT_BASE, STACK_TOP, Bare, map_low_memory, set_handler, set_page
from tests.vmm.engines import bt_alone
from tests.vmm.rings import GDT, SLOT_BYTES, SLOTS, USER_CODE, USER_DATA, USER_STACK, assemble_slots, install
from tests.vmm.twins import Twins

pytestmark = pytest.mark.usefixtures("native_core")

POINTER = 0x6000
FUNCTION = 0x5000
HOLE = 0x3_0000
UNTOUCHED = 0x3_2000
FRAME = 0x3_4000
# Behind null, and code and data of ring 0.
_DESCRIPTORS = (
    "ffff000000fbcf00",  # 18h: code of ring 3
    "ffff000000f3cf00",  # 20h: data of ring 3
    "ffff0000009bdf00",  # 28h: AVL
    "ffff0000009acf00",  # 30h: not accessed yet
    "ffff0000009fcf00",  # 38h: conforming
    "ffff0000001bcf00",  # 40h: not present
    "ffff0010009bcf00",  # 48h: a base
    "ffff0000009b0f00",  # 50h: 16 bits
)
TRANSFERS = {
    "jump": "ljmp CODE, offset 2f\nud2\n2:",
    "jump by memory": "mov dword ptr [0x6000], offset 2f\nljmp [0x6000]\nud2\n2:",
    "call": "lcall CODE, FUNCTION",
    "call by memory": "mov dword ptr [0x6000], FUNCTION\nmov ebp, 0x5ffc\nlcall [ebp + 4]",
    "return": "push CODE\nmov eax, offset 2f\npush eax\nretf\nud2\n2:",
    "return that releases": "push eax\npush eax\npush CODE\nmov eax, offset 2f\npush eax\nretf 8\nud2\n2:",
    "return of 16 bits of selector": "push 0xabcd0000 + CODE\nmov eax, offset 2f\npush eax\nretf\nud2\n2:",
}


# Ring 0 has been used in the address space, or emitted code could not read descriptors with its rights.
TO_RING_3 = f"""
    mov eax, 0x23
    mov ds, ax
    mov es, ax
    push eax
    push {STACK_TOP:#x}
    push 2
    push 0x1b
    mov eax, offset 1f
    push eax
    iretd
"""


def prepare(bare: Bare, code: int = 8) -> None:
    """Paging, a hole, segments for both rings, a function that returns far, and handlers that go on at 1400h."""
    map_low_memory(bare)
    memory, state = bare.memory, bare.state
    set_page(bare, HOLE, 0)
    memory.write(GDT_BASE + 0x18, bytes.fromhex("".join(_DESCRIPTORS)))
    state.gdtr.limit = 0x17 + 8 * len(_DESCRIPTORS)
    memory.store(POINTER + 4, 2, code)
    memory.write(FUNCTION, assemble("pushfd\nadd edi, [esp + 8]\nrol edi, 3\nxor edi, [esp + 4]\npopfd\nretf"))
    skip = assemble("mov esp, 0x8000\nadd ebx, [esp - 12]\njmp 0x1400")
    for vector in (11, 12, 13, 14):
        set_handler(bare, vector, skip)


@bt_alone
@pytest.mark.parametrize("code", [0x08, 0x1B], ids=["ring 0", "ring 3"])
@pytest.mark.parametrize("name", TRANSFERS)
def test_plain_ones_stay_in_the_translation_cache(name: str, code: int) -> None:
    transfer = TRANSFERS[name].replace("CODE", f"{code:#x}").replace("FUNCTION", f"{FUNCTION:#x}")
    enter = "" if code == 8 else TO_RING_3
    source = f"{enter}\n1: inc esi\nsub ecx, 0x12345678\n{transfer}\nadc edx, esi\njmp 1b"
    with Twins(source, lambda bare: prepare(bare, code)) as twins:
        twins.run(2000, (300, 41, 1))
        assert twins.reference.state.gpr[ESI] > 100
        assert not any(twins.count(f"callouts of {each}") for each in ("jmp_far", "call_far", "retf"))


# What a jump, a call and a return do with each selector; after most of them comes an exception.
SELECTORS = [*range(8, 0x60, 8), 0, 0x0B, 0x0A, 0x19, 0x1B, 0x2C, 0xFFF8]


@pytest.mark.parametrize("selector", SELECTORS, ids=hex)
def test_selectors(selector: int) -> None:
    """The loop goes on at 1400h, where a transfer or the handler leads."""
    source = f"""
        1:  inc edx
            mov eax, edx
            and eax, 3
            cmp eax, 1
            je 2f
            ja 3f
            ljmp {selector:#x}, 0x1400
        2:  lcall {selector:#x}, 0x1400
        3:  push {selector:#x}
            push 0x1400
            retf
        .org 0x400
            mov esp, {STACK_TOP:#x}
            ljmp 8, 0x1000
    """
    with Twins(source, prepare) as twins:
        twins.run(800, (240, 3))
        assert twins.reference.state.gpr[EDX] > 30


@pytest.mark.parametrize(
    ("esp", "selector"),
    [(HOLE + 4, 8), (HOLE + 0x1004, 8), (HOLE + 0x1006, 8), (6, 8), (UNTOUCHED + 8, 8), (UNTOUCHED + 8, 0x40)],
)
def test_stacks(esp: int, selector: int) -> None:
    """One that is not there, one that wraps, and one that only a call that succeeds has written to."""
    source = f"""
        1:  inc edx
            mov esp, {esp:#x}
            lcall {selector:#x}, 0x1400
        .org 0x400
            mov esp, {esp:#x}
            mov eax, offset 2f
            cmp edx, 20
            jb 2f
            retf
        2:  mov esp, {STACK_TOP:#x}
            jmp 1b
    """
    with Twins(source, prepare) as twins:
        twins.run(300, (90, 2))


def test_a_code_segment_that_changes() -> None:
    """The descriptor is read each time, as the CPU does."""
    source = f"""
        1:  inc edx
            lcall 8, {FUNCTION:#x}
            test edx, 15
            jnz 1b
            xor byte ptr [{GDT_BASE + 8 + 6:#x}], 0x10
            jmp 1b
    """
    with Twins(source, prepare) as twins:
        twins.run(3000, (500, 77))
        assert twins.reference.state.gpr[EDX] > 100


def in_ring_3(selectors: Sequence[int]) -> Sequence[str]:
    """Slots of `tests.vmm.rings` that enter ring 3 and do all transfers with each selector, over and over."""
    begin = [f"mov eax, {USER_DATA}; mov ds, ax; mov es, ax", f"mov esp, {FRAME}; iretd"]
    loop = [f"mov esp, {UNTOUCHED + 8}", "lcall 0x4b, 0"]
    for selector in selectors:
        for transfer in ("ljmp {}, NEXT", "lcall {}, NEXT", "push {}; push NEXT; retf"):
            loop += [f"mov esp, {USER_STACK}; inc edx", transfer.format(selector), f"mov ecx, [{GDT}]"]
    first = SLOTS + SLOT_BYTES * len(begin)
    return [*begin, *loop, f"mov eax, {first}; jmp eax"]


@pytest.mark.parametrize("selectors", [(0x1B, 0x18, 0x1A, 0x19), (0x0B, 0x08, 0x5B, 0x6B), (0xA3, 0x23, 0, 3, 0xFFFF)])
def test_ring_3(selectors: Sequence[int]) -> None:
    """Descriptors are read with the rights of ring 0, all else with those of ring 3, which may not read the GDT."""
    code = assemble_slots(in_ring_3(selectors))

    def prepare_slots(bare: Bare) -> None:
        install(bare, 3, code)
        bare.memory.write(FRAME, struct.pack("<5I", SLOTS + 2 * SLOT_BYTES, USER_CODE, 2, USER_STACK, USER_DATA))

    with Twins("nop", prepare_slots) as twins:
        twins.run(3000, (700, 61, 1))
        assert twins.reference.state.gpr[EDX] > 60
