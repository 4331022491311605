"""System instructions under `bt` against `interp`: in both rings, plain and not plain, with interrupts in between.

The same under `trap`.
"""

from __future__ import annotations

import itertools
import struct

import pytest

from machine.debug import Stop
from machine.state import EDI
from tests.oracles.assembler import assemble
from tests.vmm.bare import (
    IDT_BASE,
    PAGE_DIRECTORY,
    PAGE_TABLE,
    Bare,
    handler_of,
    map_low_memory,
    set_handler,
    set_page,
)
from tests.vmm.engines import bt_alone
from tests.vmm.rings import (
    KERNEL_CODE,
    KERNEL_DATA,
    SLOT_BYTES,
    SLOTS,
    USER_CODE,
    USER_DATA,
    USER_STACK,
    assemble_slots,
    install,
)
from tests.vmm.twins import Twins
from vmm.bt import BinaryTranslator
from vmm.native.modes import Mode

pytestmark = pytest.mark.usefixtures("native_core")

FRAMES = 0x3_4000


class Timer:
    """A device on port 50h: a write asks for interrupt 20h, so many nanoseconds later."""

    def __init__(self, bare: Bare) -> None:
        self.bare = bare
        bare.lines.acknowledge = self.acknowledge
        bare.ports.register(0x50, 0x50, self)

    def acknowledge(self) -> int:
        self.bare.lines.set_intr(False)
        return 0x20

    def raise_intr(self) -> None:
        self.bare.lines.set_intr(True)

    def load_port(self, _port: int, _size_bytes: int) -> int:
        return 0

    def store_port(self, _port: int, _size_bytes: int, value: int) -> None:
        self.bare.clock.schedule(self.bare.clock.now_ns + value, self.raise_intr)


def prepared(seed: int) -> Twins:
    def prepare(bare: Bare) -> None:
        Timer(bare)
        install(bare, seed)

    return Twins("nop", prepare)


@pytest.mark.parametrize(
    ("native_core", "seed"),
    [*itertools.product(("budget-32", "budget-1"), range(16)), *itertools.product(("trap", "trap nested"), (4, 8, 12))],
    indirect=["native_core"],
)
def test_random_slots(seed: int) -> None:
    with prepared(seed) as twins:
        twins.run(1200, (211, 1, 300, 40, 7))


def test_segments_that_ring_3_may_keep() -> None:
    """IRETD to ring 3 makes FS and GS null if they are of ring 0, but for conforming code: SDM Vol. 2, "IRET"."""
    selectors = (KERNEL_DATA, USER_DATA, KERNEL_CODE, USER_CODE, 0x58, 0x63, 0, 3)
    sources = [f"mov eax, {USER_DATA}; mov ds, ax; mov es, ax"]
    frames = b""
    for number, selector in enumerate(selectors):
        sources += [
            f"mov eax, {selector}; mov gs, ax; mov fs, ax",
            f"mov esp, {FRAMES + 32 * number}; iretd",
            "mov ecx, gs; lea edi, [edi + ecx * 2]; int 0x90",
        ]
        user_eip = SLOTS + SLOT_BYTES * (len(sources) - 1)
        frames += struct.pack("<5I12x", user_eip, USER_CODE, 2, USER_STACK, USER_DATA)
    sources += [f"mov eax, {SLOTS}; jmp eax"]
    code = assemble_slots(sources)

    def prepare(bare: Bare) -> None:
        install(bare, 0, code)
        bare.memory.write(FRAMES, frames)

    with Twins("nop", prepare) as twins:
        for _ in range(60):
            twins.run(37, (36, 1))
        assert twins.reference.state.gpr[EDI] > 2 * 0x58


@bt_alone
@pytest.mark.parametrize("leaf", [0, 1])
def test_cpuid_stays_in_the_translation_cache(leaf: int) -> None:
    with Twins(f"1: mov eax, {leaf}\ncpuid\nadd esi, eax\nxor edi, ebx\nadd edi, ecx\nxor ebp, edx\njmp 1b") as twins:
        twins.run(500)
        assert not twins.count("callouts")


@bt_alone
def test_polling_a_port_while_an_interrupt_waits_that_is_disabled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As kernels do that measure the TSC: they must not be asked at each access whether they want it now."""
    entered = 0
    execute = BinaryTranslator._execute_native

    def count(self: BinaryTranslator, limit_icount: int, mode: Mode | None) -> Stop | None:
        nonlocal entered
        entered += 1
        return execute(self, limit_icount, mode)

    def prepare(bare: Bare) -> None:
        Timer(bare)
        set_handler(bare, 0x20, assemble("add edi, ecx\niretd"))

    monkeypatch.setattr(BinaryTranslator, "_execute_native", count)
    source = """
        1:  mov eax, 40
            out 0x50, eax
            mov esi, 200
        2:  in al, 0x50
            inc ecx
            dec esi
            jnz 2b
            sti
            nop
            cli
            jmp 1b
    """
    with Twins(source, prepare) as twins:
        twins.run(8100)
        assert twins.reference.state.gpr[EDI] > 1000
        assert 5 < entered < 200


def test_an_interrupt_that_comes_in_the_midst_of_a_rep() -> None:
    """From a key, say: it waits until the REP is done, and no longer."""

    def prepare(bare: Bare) -> None:
        map_low_memory(bare)
        Timer(bare)
        set_handler(bare, 0x20, assemble("add ebp, ecx\nadd esi, [esp]\nrol ebp, 3\niretd"))

    source = """
        sti
        1: mov ecx, 100
        mov edi, 0x30000
        rep stosb
        mov edx, 50
        2: inc ebx
        dec edx
        jnz 2b
        jmp 1b
    """
    with Twins(source, prepare) as twins:
        twins.run(1000)
        for _ in range(3):
            while not twins.reference.cpu.repeating:
                twins.each(lambda bare: bare.engine.step())
            twins.each(lambda bare: bare.lines.set_intr(True))
            twins.run(40)
            twins.run(500)


@pytest.mark.parametrize("kind", [0x8E, 0x8F], ids=["interrupt gate", "trap gate"])
def test_an_nmi_in_the_midst_of_a_rep(kind: int) -> None:
    """In its handler there is no REP under way that an interrupt would have to wait for."""

    def prepare(bare: Bare) -> None:
        map_low_memory(bare)
        Timer(bare)
        set_handler(bare, 2, assemble("add ebp, ecx\n1: inc edi\nadd edx, 3\njnc 1b\nrol ebp, 3\niretd"))
        bare.memory.store(IDT_BASE + 8 * 2 + 5, 1, kind)
        set_handler(bare, 0x20, assemble("add ebp, ecx\nadd ebp, edi\nadd esi, [esp]\nrol ebp, 3\niretd"))

    with Twins("sti\n1: mov ecx, 100\nmov edi, 0x30000\nmov edx, -60\nrep stosb\ninc ebx\njmp 1b", prepare) as twins:
        for _ in range(5):
            while not twins.reference.cpu.repeating:
                twins.each(lambda bare: bare.engine.step())
            twins.each(lambda bare: bare.lines.raise_nmi())
            twins.each(lambda bare: bare.lines.set_intr(True))
            twins.run(3)
            in_handler = twins.reference.lines.intr
            twins.run(200)
            assert in_handler == (kind == 0x8E), "a trap gate leaves IF alone"


class TestAddressSpaces:
    """Two page directories that differ in one page of data, or in one page of code."""

    SECOND = 0x10_2000

    def prepare(self, bare: Bare) -> None:
        map_low_memory(bare)
        memory = bare.memory
        memory.write(self.SECOND + 0x1000, memory.read(PAGE_TABLE, 4096))
        memory.store(self.SECOND, 4, self.SECOND + 0x1000 | 7)
        memory.store(self.SECOND + 0x1000 + 4 * 0x300, 4, 0x31_0007)
        memory.store(self.SECOND + 0x1000 + 4 * 0x301, 4, 0x31_1007)
        memory.write(0x30_1000, b"\x83\xc6\x03\xc3")  # add esi, 3; ret
        memory.write(0x31_1000, b"\x83\xc6\x05\xc3")  # add esi, 5; ret

    @bt_alone
    def test_switching_between_them(self) -> None:
        source = f"""
            mov ebx, {PAGE_DIRECTORY}
            mov ecx, {self.SECOND}
        1:  mov cr3, ebx
            inc dword ptr [0x300000]
            add edx, [0x300000]
            call 0x301000
            mov cr3, ecx
            add dword ptr [0x300000], 7
            add edi, [0x300000]
            call 0x301000
            mov eax, cr3
            add edi, eax
            jmp 1b
        """
        with Twins(source, self.prepare) as twins:
            twins.run(3000, (400, 33))
            assert twins.count("callouts") < 50
            assert twins.reference.memory.load(0x30_0000, 4) * 7 >= twins.reference.memory.load(0x31_0000, 4) > 100

    def test_one_with_two_values_of_cr3(self) -> None:
        """PCD and PWT are read back as they were loaded, whoever carries the loads out."""
        source = f"""
            mov ebx, {PAGE_DIRECTORY}
            mov ecx, {PAGE_DIRECTORY | 0x18}
        1:  mov cr3, ebx
            mov cr3, ecx
            mov cr3, ebx
            sldt eax
            mov eax, cr3
            add edi, eax
            rol edi, 3
            jmp 1b
        """
        with Twins(source, map_low_memory) as twins:
            twins.run(2000, (400, 33))

    def test_more_of_them_than_are_remembered(self) -> None:
        def prepare(bare: Bare) -> None:
            self.prepare(bare)
            for number in range(1, 24):
                directory = 0x20_0000 + 0x1000 * number
                bare.memory.write(directory, bare.memory.read(PAGE_DIRECTORY, 4096))

        source = """
        1:  inc ecx
            and ecx, 15
            mov eax, ecx
            shl eax, 12
            add eax, 0x201000
            mov cr3, eax
            add [0x300000], eax
            jmp 1b
        """
        with Twins(source, prepare) as twins:
            twins.run(3000, (400, 33))

    def test_a_directory_that_is_used_again_for_other_pages(self) -> None:
        """CR3 is the same and remembered; the entry that was changed meanwhile acts."""
        source = f"""
            mov ebx, {PAGE_DIRECTORY}
            mov ecx, {self.SECOND}
        1:  mov cr3, ecx
            add edi, [0x300000]
            mov cr3, ebx
            xor dword ptr [{self.SECOND + 0x1000 + 4 * 0x300}], 0x10000
            inc dword ptr [0x300000]
            jmp 1b
        """
        with Twins(source, self.prepare) as twins:
            twins.run(2000, (400, 33))

    def test_write_protection_comes_and_goes(self) -> None:
        def prepare(bare: Bare) -> None:
            self.prepare(bare)
            set_page(bare, 0x30_0000, 0x30_0005)
            bare.memory.write(handler_of(14), b"\x83\xc4\x04\x83\x04\x24\x07\x46\xcf")  # past seven bytes

        source = f"""
            mov ebx, {PAGE_DIRECTORY}
        1:  mov cr3, ebx
            add dword ptr [0x300000], 7
            mov eax, cr0
            xor eax, 0x10000
            mov cr0, eax
            mov cr3, ebx
            add dword ptr [0x300000], 9
            jmp 1b
        """
        with Twins(source, prepare) as twins:
            twins.run(1000, (400, 33))
            assert twins.reference.state.gpr[6] > 20

    def test_what_one_has_run_another_need_not_look_for(self) -> None:
        """Forty functions in a page, each come to by an indirect call, in two address spaces."""

        def prepare(bare: Bare) -> None:
            self.prepare(bare)
            bare.memory.write(0x32_0000, b"\x46\xc3".ljust(16, b"\x90") * 40)  # inc esi; ret

        source = f"""
            mov edi, {PAGE_DIRECTORY}
            mov ebp, {self.SECOND}
        1:  xchg edi, ebp
            mov cr3, edi
            mov ecx, 40
            mov ebx, 0x320000
        2:  call ebx
            add ebx, 16
            dec ecx
            jnz 2b
            jmp 1b
        """
        with Twins(source, prepare) as twins:
            twins.run(4000)
            assert 40 <= twins.count("dispatch misses") < 60
