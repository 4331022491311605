"""Memory of the display adapter under every engine: plain memory as long as the adapter has it on, else its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from machine.debug import StopKind, Watchpoint
from machine.devices import vga
from machine.devices.vga import Vga
from tests.engine import trap, trap_nested, verified
from tests.vmm.bare import Bare, EngineMaker, flat, map_low_memory
from tests.vmm.engines import bt_alone
from tests.vmm.twins import Twins
from vmm.interp import Interpreter

pytestmark = [pytest.mark.usefixtures("native_core"), bt_alone]

STEPS = (400, 33)


def no_paging(_bare: Bare) -> None:
    """As `flat` leaves it: the window is in a large page."""


def plug(paging: Callable[[Bare], object]) -> Callable[[Bare], None]:
    def prepare(bare: Bare) -> None:
        adapter = Vga(bare.clock, bare.memory)
        bare.memory.map_device(vga.WINDOW_FIRST, vga.WINDOW_BYTES, adapter)
        for first, last in vga.PORT_RANGES:
            bare.ports.register(first, last, adapter)
        paging(bare)

    return prepare


@pytest.fixture(params=[no_paging, map_low_memory], ids=["no paging", "paging"])
def prepare(request: pytest.FixtureRequest) -> Callable[[Bare], None]:
    return plug(request.param)


def test_writing_and_scrolling_leave_emitted_code_for_no_store(prepare: Callable[[Bare], None]) -> None:
    source = """
        1: inc ecx
        mov edi, ecx
        and edi, 0x7FE
        mov [0xb8000 + edi], cx
        add eax, [0xb8000 + edi]
        test ecx, 63
        jnz 1b
        push ecx
        mov esi, 0xb80a0
        mov edi, 0xb8000
        mov ecx, 0x3c0
        rep movsd
        pop ecx
        jmp 1b
    """
    with Twins(source, prepare) as twins:
        twins.run(5000, STEPS)
        assert twins.reference.memory.load(0xB_8002, 4) != 0x0720_0720
        assert not twins.count("device faults")
        assert not twins.count("callouts of mov")


def test_windows_that_the_graphics_controller_moves(prepare: Callable[[Bare], None]) -> None:
    """Both text windows, the one at A0000h and the bytes that nothing answers for, under code that touches them all."""
    source = """
        1: inc ecx
        mov edx, 0x3ce
        mov eax, ecx
        and eax, 0x0c
        shl eax, 8
        mov al, 6
        mov ah, cl
        and ah, 0x0c
        out dx, al
        inc edx
        mov al, ah
        out dx, al
        mov edi, 8
        2: mov [0xb8000 + edi*4], ecx
        add ebx, [0xb8000 + edi*4]
        add [0xb0004 + edi*4], ebx
        add ebp, [0xa0000 + edi*4]
        inc dword ptr [0xa0010 + edi*4]
        dec edi
        jnz 2b
        jmp 1b
    """
    with Twins(source, prepare) as twins:
        twins.run(6000, STEPS)
        contents = {twins.reference.memory.ram[at] for at in (0xB_8010, 0xB_8014, 0xA_0010)}
        assert len(contents) == 3


def test_code_there_that_is_written_to(prepare: Callable[[Bare], None]) -> None:
    source = """
        mov byte ptr [0xb8000], 0x40
        mov byte ptr [0xb8001], 0xc3
        mov edi, 0xb8000
        1: call edi
        inc ecx
        test ecx, 31
        jnz 1b
        xor byte ptr [0xb8000], 8   # inc eax, dec eax
        jmp 1b
    """
    with Twins(source, prepare) as twins:
        twins.run(3000, STEPS)
        assert not twins.count("device faults")


def test_a_debugger_sees_it_and_watches_it() -> None:
    source = "1: inc ecx\nmov [0xb8004], ecx\nnop\nnop\njmp 1b"
    for make in (Interpreter, verified):
        bare = flat(source, make)
        plug(map_low_memory)(bare)
        bare.run(5 * 100)
        assert bare.memory.read(0xB_8004, 4) == (100).to_bytes(4, "little")
        bare.memory.write(0xB_8008, b"\x41\x1e")
        assert bare.memory.ram[0xB_8008:0xB_800A] == b"\x41\x1e"
        bare.debug.set_watchpoints(frozenset({Watchpoint(0xB_8004, 4, on_read=False, on_write=True)}))
        stop = bare.run(1000)
        assert (stop.kind, stop.linear) == (StopKind.WATCHPOINT, 0xB_8004)
        bare.close()


@pytest.mark.parametrize("make", [trap, trap_nested], ids=["shadow", "nested"])
def test_a_trapping_vmm_sees_each_store(make: EngineMaker) -> None:
    source = "1: inc ecx\nmov [0xb8000], ecx\nadd ebx, [0xb8000]\njmp 1b"
    with Twins(source, plug(map_low_memory), engine=make) as twins:
        twins.run(4 * 200 + 1)
        reasons = ("NPF read 0xb8000", "NPF write 0xb8000") if make is trap_nested else ("EXCP_PF device",)
        assert sum(twins.count(f"exits {reason}") for reason in reasons) == 400
        assert twins.reference.memory.load(0xB_8000, 4) == 200
