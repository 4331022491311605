"""`bt` against `interp` where instructions lie in two pages, of which the second may change, move, or not be there.

The same under `trap`.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from machine.debug import CodeBreakpoint, StopKind
from machine.state import EBX, ECX, EDX
from tests.oracles.assembler import assemble
from tests.vmm.bare import Bare, map_low_memory, set_handler, set_page
from tests.vmm.engines import bt_alone
from tests.vmm.twins import Twins

pytestmark = pytest.mark.usefixtures("native_core")

STEPS = (400, 33)
SECOND = 0x30_1000  # the guests have an instruction over its beginning
COUNT = "1: inc ecx\ncall {entry:#x}\nadd ebp, eax\njmp 1b"


def install(code: str, ahead: int) -> Callable[[Bare], int]:
    """Put code so that so many of its bytes are in the first page."""

    def prepare(bare: Bare) -> int:
        map_low_memory(bare)
        bare.memory.write(SECOND - ahead, assemble(code, origin=SECOND - ahead))
        return SECOND - ahead

    return prepare


INSTRUCTIONS = (
    "add dword ptr [0x50000], 0x12345678", "mov eax, [0x50000]", "mov word ptr [0x50010 + ebx*4], 0x720",
    "add eax, 0x1234567", "jc 2f + 0x200", "jnc 1f", "lea esp, [esp]", "imul edx, [ebx + 0x50000], 0x1000001",
    "push 0x12345678", "call 1f", "xadd [0x50020], edx", "rep stosd", "mov eax, ds", "mov ds, eax", "pushfd",
    "mov dword ptr fs:[ebx*8 + 0x50000], 0x11223344",
)  # fmt: skip


@bt_alone
@pytest.mark.parametrize("instruction", INSTRUCTIONS)
def test_each_way_to_cut_an_instruction(instruction: str) -> None:
    code = f"""
        lea edx, [ecx + ecx*4]
        and edx, 0x7f
        mov edi, 0x50040
        push ecx
        mov eax, 0x10
        mov ebx, ecx
        and ebx, 3
        mov ecx, ebx
        mov ebp, esp
        clc
        {instruction}
        nop
        1: nop
        lea esp, [ebp]
        pop ecx
        adc eax, edx
        ret
        2: ret
    """
    before = len(assemble(code[: code.index(instruction)], origin=SECOND))
    length = len(assemble(instruction.replace("2f + 0x200", "0").replace("1f", "0"), origin=0))
    for ahead in range(before, before + min(length, 12) + 1):
        prepare = install(code, ahead)
        with Twins(COUNT.format(entry=SECOND - ahead), prepare) as twins:
            twins.run(400, STEPS)
            assert twins.count("callouts") <= 1


def test_an_end_that_is_written_to() -> None:
    """The immediate operand's last byte is in the second page."""
    source = f"""
        1: inc ecx
        test ecx, 63
        jnz 2f
        mov [{SECOND:#x}], cl
        2: call {SECOND - 4:#x}
        add ebx, eax
        jmp 1b
    """
    with Twins(source, install("mov eax, 0x01020304\nret", 4)) as twins:
        twins.run(6000, STEPS)
        assert twins.reference.state.gpr[EBX]
        assert twins.count("callouts") < 200


def test_an_end_that_is_written_to_each_time() -> None:
    source = f"1: inc ecx\nmov [{SECOND:#x}], ecx\ncall {SECOND - 1:#x}\nadd ebx, eax\njmp 1b"
    with Twins(source, install("mov eax, 0x01020304\nret", 1)) as twins:
        twins.run(3000, STEPS)
        assert twins.count("translation units") < 60


def test_second_pages_that_take_turns() -> None:
    def prepare(bare: Bare) -> None:
        install("add eax, 0x11111111\nret", 2)(bare)
        for number in range(2):
            bare.memory.write(0x5_0000 + 0x1000 * number, bytes([0x10 * number] * 3) + b"\xc3")

    source = f"""
        1: inc ecx
        mov edx, ecx
        and edx, 1
        shl edx, 12
        add edx, 0x50067
        mov [{0x10_1000 + (SECOND >> 10):#x}], edx
        call {SECOND - 2:#x}
        call {SECOND - 2:#x}
        add ebx, eax
        jmp 1b
    """
    with Twins(source, prepare) as twins:
        twins.run(3000, STEPS)
        assert twins.reference.state.gpr[EBX]


@pytest.mark.parametrize("entry", [0x30_1000, 0x30_1067])
def test_a_second_page_that_is_not_there(entry: int) -> None:
    """The handler maps it, and notes CR2 and the error code; the guest takes it away again now and then."""

    def prepare(bare: Bare) -> None:
        install("mov eax, 0x01020304\nret", 3)(bare)
        set_page(bare, SECOND, entry)
        table = 0x10_1000 + (SECOND >> 10)
        notes = "mov edi, cr2\nadd edx, edi\npop edi\nadd edx, edi"
        set_handler(bare, 14, assemble(f"{notes}\nmov dword ptr [{table:#x}], {entry | 7:#x}\niretd"))

    source = f"""
        1: inc ecx
        test ecx, 31
        jnz 2f
        and dword ptr [{0x10_1000 + (SECOND >> 10):#x}], ~1
        2: call {SECOND - 3:#x}
        add ebx, eax
        jmp 1b
    """
    with Twins(source, prepare) as twins:
        twins.run(3000, STEPS)
        assert twins.reference.state.gpr[EDX]
        assert twins.reference.state.gpr[ECX] > 300


def test_a_breakpoint_there_and_steps() -> None:
    with Twins(COUNT.format(entry=SECOND - 3), install("mov eax, 0x01020304\nret", 3)) as twins:
        twins.run(300, STEPS)
        twins.each(lambda bare: bare.debug.set_breakpoints(frozenset({CodeBreakpoint(SECOND - 3)})))
        stop = twins.run(300)
        assert stop is not None
        assert (stop.kind, stop.linear) == (StopKind.BREAKPOINT, SECOND - 3)
        twins.each(lambda bare: bare.debug.set_breakpoints(frozenset()))
        twins.run(300, STEPS)
