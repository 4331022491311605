"""The software path to memory: `bt` against `interp` where page tables change all the time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from machine.debug import StopKind, Watchpoint
from machine.faults import Vector
from machine.memory import HOLDS_TABLE
from machine.state import CR0_WP, CR4_PAE, CR4_PSE, EBP, EBX, ESI
from tests.engine import restless, trap, trap_nested
from tests.oracles.assembler import assemble
from tests.vmm.bare import (
    PAGE_DIRECTORY,
    PAGE_TABLE,
    STACK_TOP,
    Bare,
    EngineMaker,
    map_low_memory,
    set_handler,
    set_page,
)
from tests.vmm.test_bt_memory import Port, gate_for_users, skip_handler, user_mode
from tests.vmm.twins import Twins

STEPS = (2000, 333)
PAGE = 0x30_0000  # a linear page whose entry the guests change
ENTRY = PAGE_TABLE + 4 * (PAGE >> 12)
OTHER_DIRECTORY = 0x10_2000
PAE_TABLES = 0x12_0000
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


def thrash(access: str, bits: int = 7) -> str:
    """A loop that moves a page to and fro, and accesses it."""
    return f"""
        1: inc ecx
        mov eax, ecx
        and eax, 1
        shl eax, 12
        add eax, {FRAMES[0] | bits:#x}
        mov [{ENTRY:#x}], eax
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


class TestOnePage:
    @pytest.mark.parametrize("bits", [7, 0x67])
    @pytest.mark.parametrize("access", ACCESSES[:-1])
    def test_it_is_accessed(self, access: str, bits: int) -> None:
        with Twins(f"mov esi, {PAGE + 0x840:#x}\n" + thrash(access, bits), map_low_memory) as twins:
            twins.run(4000, STEPS)
            if access in ACCESSES[:-2] and access != "bt dword ptr [esi], ecx":
                assert twins.count("soft forms") == 2
                assert twins.count("volatile pages") == 1
                assert twins.count("soft fallbacks") < 12
                assert twins.count("hidden faults") < 60

    @pytest.mark.parametrize("access", ["mov eax, [{0}]", "mov [{0}], al", "add [{0}], ecx", "cmp byte ptr [{0}], 3"])
    def test_the_address_is_a_constant(self, access: str) -> None:
        with Twins(thrash(f"{access.format(hex(PAGE + 0x840))}\nadc ebx, eax"), map_low_memory) as twins:
            twins.run(4000, STEPS)
            assert twins.count("soft forms") == 2
            assert twins.count("soft fallbacks") < 12

    @pytest.mark.parametrize("access", ["mov eax, [esp - 8]", "add [esp + ecx * 4 - 8], esp", "sub esp, [esp - 4]"])
    def test_by_esp_with_pushes_around(self, access: str) -> None:
        source = f"mov ebp, {PAGE + 0x800:#x}\n" + thrash(
            f"mov ebx, ecx\nmov ecx, 1\npush edx\npush eax\npop edi\nmov edi, esp\nmov esp, ebp\n{access}\n"
            "mov edx, esp\nmov esp, edi\npop ebx\nmov ecx, ebx\nmov ecx, [0x60000]\ninc ecx\nmov [0x60000], ecx"
        )
        with Twins(source, map_low_memory) as twins:
            twins.run(6000, STEPS)
            assert twins.count("soft forms") >= 2

    def test_flags_survive(self) -> None:
        """Each of the flags that a loop can have, before a soft load and a soft store."""
        source = f"mov esi, {PAGE:#x}\n" + thrash(
            "mov ah, cl\nsahf\nmov edx, [esi]\npushfd\npop edi\nxor ebx, edi\nadd edi, 0x7fffffff\nmov [esi], ebx\n"
            "pushfd\npop edi\nadd ebx, edi\nstd\nmov edx, [esi]\npushfd\npop edi\ncld\nadd ebx, edi"
        )
        with Twins(source, map_low_memory) as twins:
            twins.run(12_000, STEPS)
            assert twins.count("soft forms") == 4
            assert twins.count("soft fallbacks") < 20

    @pytest.mark.parametrize("offset", [0xFFC, 0xFFD, 0xFFE, 0xFFF])
    def test_the_end_of_the_page(self, offset: int) -> None:
        with Twins(f"mov esi, {PAGE + offset:#x}\n" + thrash("add [esi], ecx\nadd bl, [esi]"), map_low_memory) as twins:
            twins.run(4000, STEPS)
            assert twins.count("soft forms") == 3
            assert (twins.count("soft fallbacks") > 100) is (offset > 0xFFC)

    @pytest.mark.parametrize("frame", [0xB_8000, 0xF_F000, 0x40_0000, 0xFFFF_F000, 0x10_0000, 0x10_1000, 0x1000])
    def test_now_and_then_it_is_something_else(self, frame: int) -> None:
        """A device, ROM, nothing, a page table, and code: all but RAM is called out."""
        source = thrash(f"""
            mov edx, [{PAGE + 0x800:#x}]
            mov [{PAGE + 0x804:#x}], ecx
            test cl, 7
            jnz 1b
            mov dword ptr [{ENTRY:#x}], {frame | 7:#x}
            xor ebx, [{PAGE + 0x800:#x}]
            mov [{PAGE + 0x808:#x}], ebx
        """)
        with Twins(source, map_low_memory) as twins:
            twins.run(9000, STEPS)
            assert twins.count("soft forms") >= 4
            assert twins.count("faults interpreted") < 100

    def test_accessed_and_dirty_bits_are_set_by_the_access_that_needs_them(self) -> None:
        source = thrash(f"""
            mov edx, [{PAGE:#x}]
            mov edi, [{ENTRY:#x}]
            mov ebp, ecx
            and ebp, 0xff
            mov [0x60000 + ebp * 8], edi
            mov [{PAGE:#x}], ecx
            mov edi, [{ENTRY:#x}]
            mov [0x60004 + ebp * 8], edi
        """)
        with Twins(source, map_low_memory) as twins:
            twins.run(6000, STEPS)
            assert twins.reference.memory.load(0x6_0000, 4) & ACCESSED_DIRTY == 0x20
            assert twins.reference.memory.load(0x6_0004, 4) & ACCESSED_DIRTY == 0x60
            assert twins.count("soft fallbacks") < 20

    @pytest.mark.parametrize("large_bit", [0, 0x80])
    def test_the_accessed_bit_of_the_directory(self, large_bit: int) -> None:
        """Of the second 4 MiB, which the first ones' table maps, also where PS has no meaning."""

        def prepare(bare: Bare) -> None:
            map_low_memory(bare)
            bare.memory.store(PAGE_DIRECTORY + 4, 4, PAGE_TABLE | large_bit | 7)

        source = thrash(f"""
            add ebx, [{PAGE + 0x40_0000:#x}]
            mov edx, [{PAGE_DIRECTORY + 4:#x}]
            add ebx, edx
            mov [{PAGE + 0x40_0004:#x}], ecx
            test cl, 7
            jnz 1b
            mov dword ptr [{PAGE_DIRECTORY + 4:#x}], {PAGE_TABLE | large_bit | 7:#x}
        """)
        with Twins(source, prepare) as twins:
            twins.run(9000, STEPS)
            assert twins.count("soft forms") >= 3
            assert twins.reference.memory.load(FRAMES[0] + 4, 4)

    def test_now_and_then_it_is_code(self) -> None:
        """The immediate operand of an instruction, which is aligned as an entry is, is written to through the page."""

        def prepare(bare: Bare) -> None:
            map_low_memory(bare)
            bare.memory.write(FRAMES[1] + 0x8FF, b"\x05\5\0\0\0\xc3")  # add eax, 5; ret

        source = thrash(f"""
            mov edx, [{PAGE + 0x900:#x}]
            mov [{PAGE + 0x900:#x}], ecx
            mov eax, {FRAMES[1] + 0x8FF:#x}
            call eax
            imul ebx, 3
            add ebx, eax
        """)
        with Twins(source, prepare) as twins:
            twins.run(9000, STEPS)
            assert twins.count("soft forms") >= 3


class TestRights:
    @pytest.mark.parametrize("protect", [0, CR0_WP])
    def test_a_page_that_may_be_written_to_every_other_time(self, protect: int) -> None:
        def prepare(bare: Bare) -> None:
            map_low_memory(bare)
            bare.state.cr0 |= protect
            set_handler(bare, Vector.PF, skip_handler(6))

        source = f"""
            1: inc ecx
            mov eax, ecx
            and eax, 3
            shl eax, 1
            add eax, {FRAMES[0] | 1:#x}
            mov [{ENTRY:#x}], eax
            mov edx, [{PAGE:#x}]
            mov [{PAGE:#x}], ecx
            add [{PAGE + 4:#x}], ecx
            jmp 1b
        """
        with Twins(source, prepare) as twins:
            twins.run(6000, STEPS)
            assert twins.count("soft forms") >= 3
            assert (twins.reference.state.gpr[EBX] > 100) is bool(protect)

    def test_write_protection_comes_and_goes(self) -> None:
        def prepare(bare: Bare) -> None:
            map_low_memory(bare)
            set_handler(bare, Vector.PF, skip_handler(6))

        source = f"mov eax, cr0\nxor eax, {CR0_WP:#x}\nmov cr0, eax\n" + thrash(f"""
            mov [{PAGE:#x}], ecx
            test cl, 63
            jnz 1b
            mov eax, cr0
            xor eax, {CR0_WP:#x}
            mov cr0, eax
        """, 5)  # fmt: skip
        with Twins(source, prepare) as twins:
            twins.run(9000, STEPS)
            assert twins.count("soft forms") >= 2
            assert twins.reference.state.gpr[EBX] > 100

    def test_a_user_and_a_kernel_touch_what_the_kernel_changes(self) -> None:
        """In ring 3 a loop reads and writes a page; in ring 0 its frame, U/S and R/W change."""

        def prepare(bare: Bare) -> None:
            user_mode(bare)
            bare.memory.write(0x8_0000, assemble(f"""
                1: inc ecx
                mov eax, [{PAGE:#x}]
                add [{PAGE + 4:#x}], ecx
                add ebx, [{PAGE + 8:#x}]
                int 0x30
                jmp 1b
            """, origin=0x8_0000))  # fmt: skip
            handler = f"push eax\nmov eax, [{ENTRY:#x}]\nor eax, 6\nmov [{ENTRY:#x}], eax\npop eax\nadd esp, 4\niretd"
            set_handler(bare, Vector.PF, assemble(handler))
            gate_for_users(bare, 0x30, f"""
                mov eax, ecx
                and eax, 7
                shl eax, 10
                and eax, 0x1000
                mov edx, ecx
                and edx, 6
                lea eax, [eax + edx + {FRAMES[0] | 1:#x}]
                mov [{ENTRY:#x}], eax
                add dword ptr [{PAGE:#x}], 7
                iretd
            """)  # fmt: skip

        with Twins("hlt", prepare) as twins:
            twins.run(12_000, STEPS)
            assert twins.count("soft forms") >= 5


class TestTables:
    def test_an_entry_in_use_is_called_out_and_one_that_is_not_is_not(self) -> None:
        """Of two entries stored to in turn one belongs to the running code's data, the other to nothing."""
        source = f"""
            mov esi, {ENTRY:#x}
            1: inc ecx
            mov eax, {PAGE | 7:#x}
            test cl, 1
            jz 2f
            add eax, 0x1000
            2: mov [esi], eax
            cmp ecx, 300
            jb 1b
            mov dword ptr [{ENTRY:#x}], {PAGE | 0x67:#x}
            add ebx, [{PAGE:#x}]
            jmp 1b
        """
        with Twins(source, map_low_memory) as twins:
            twins.run(7 * 290, (7 * 290,))
            assert twins.count("soft forms") == 1
            fallbacks = twins.count("soft fallbacks")
            assert fallbacks < 5
            twins.run(4000, STEPS)
            assert twins.count("soft fallbacks") > fallbacks

    def test_a_store_to_an_entry_that_reaches_into_one_in_use(self) -> None:
        """The entry of the page at EDI, which a plain instruction has had mapped, is hit in its middle now and then."""
        source = f"""
            mov edi, {PAGE:#x}
            mov esi, {ENTRY - 4:#x}
            1: inc ecx
            mov eax, {PAGE + 0x1007:#x}
            mov ebp, ecx
            and ebp, 31
            cmp ebp, 31
            jne 2f
            mov eax, [{ENTRY - 2:#x}]
            xor eax, 0x10000000
            2: mov edx, esi
            cmp ebp, 31
            jne 3f
            add edx, 2
            3: mov [edx], eax
            add ebx, [edi]
            add [edi + 4], ecx
            jmp 1b
        """

        def prepare(bare: Bare) -> None:
            map_low_memory(bare)
            set_page(bare, PAGE, FRAMES[0] | 0x67)

        with Twins(source, prepare) as twins:
            assert twins.run(13 * 25, STEPS) is None
            assert twins.count("soft forms") == 1
            twins.run(12_000, STEPS)
            assert twins.reference.memory.load(FRAMES[1] + 4, 4)

    def test_code_moves_to_and_fro_under_a_loop_that_never_leaves_its_page(self) -> None:
        """The loop's own entry is stored to, by an instruction that has become soft with other entries."""

        def prepare(bare: Bare) -> None:
            map_low_memory(bare)
            for number, work in enumerate(("inc ebx", "dec edx")):
                code = f"""
                    1: inc ecx
                    mov esi, {ENTRY + 8:#x}
                    mov eax, {FRAMES[number] | 7:#x}
                    test cl, 63
                    jnz 2f
                    mov esi, {ENTRY:#x}
                    xor eax, 0x1000
                    2: mov [esi], eax
                    {work}
                    jmp 1b
                """
                bare.memory.write(FRAMES[number], assemble(code, origin=PAGE))
            set_page(bare, PAGE, FRAMES[0] | 7)

        with Twins(f"mov esi, {PAGE:#x}\njmp esi", prepare) as twins:
            twins.run(20_000, STEPS)
            assert twins.count("soft forms") >= 1
            gpr = twins.reference.state.gpr
            assert gpr[EBX] > 100
            assert gpr[2] > 100

    def test_code_in_a_volatile_page(self) -> None:
        def prepare(bare: Bare) -> None:
            map_low_memory(bare)
            for number, work in enumerate(("add ebx, 3", "sub edx, 5")):
                bare.memory.write(FRAMES[number] + 0x100, assemble(f"{work}\nret"))

        with Twins(f"mov esi, {PAGE + 0x100:#x}\n" + thrash("call esi\nadd edi, [esi]"), prepare) as twins:
            twins.run(6000, STEPS)
            assert twins.reference.state.gpr[EBX] > 500

    @pytest.mark.parametrize("table", [PAGE_TABLE, 0xFFC0_0000])
    def test_a_table_seen_through_itself(self, table: int) -> None:
        def prepare(bare: Bare) -> None:
            map_low_memory(bare)
            bare.memory.store(PAGE_DIRECTORY + 4 * 1023, 4, PAGE_DIRECTORY | 3)

        entry = table + 4 * (PAGE >> 12)
        source = f"""
            1: inc ecx
            mov eax, [{entry:#x}]
            xor eax, 0x1000
            mov [{entry:#x}], eax
            add [{PAGE:#x}], ecx
            add ebx, [{PAGE + 4:#x}]
            mov edx, [0xfffff000]
            add edx, [0xffc00000]
            mov edi, [{entry:#x}]
            jmp 1b
        """
        with Twins(source, prepare) as twins:
            twins.run(9000, STEPS)
            assert twins.count("soft forms") >= 3

    def test_a_page_maps_its_own_table(self) -> None:
        """The entry that is changed is that of the page through which it is changed."""
        source = f"""
            mov esi, {PAGE + (PAGE >> 10 & 0xFFF):#x}
            mov dword ptr [{ENTRY:#x}], {PAGE_TABLE | 3:#x}
            1: inc ecx
            mov eax, [esi]
            add ebx, eax
            mov dword ptr [esi], {PAGE_TABLE | 7:#x}
            xor dword ptr [esi], 0x10
            mov edx, [esi + 4]
            mov [esi + 8], ecx
            jmp 1b
        """
        with Twins(source, map_low_memory) as twins:
            twins.run(6000, STEPS)
            assert twins.count("soft forms") >= 1

    def test_an_alias_by_a_large_page(self) -> None:
        """The second 4 MiB are all of RAM once more, page tables included; their entry is changed, too."""

        def prepare(bare: Bare) -> None:
            map_low_memory(bare)
            bare.state.cr4 = CR4_PSE
            bare.memory.store(PAGE_DIRECTORY + 4, 4, 0x87)

        source = f"""
            1: inc ecx
            xor dword ptr [0x400000 + {ENTRY:#x}], 0x1000
            add [{PAGE:#x}], ecx
            add ebx, [0x400000 + {PAGE:#x}]
            test cl, 31
            jnz 1b
            xor dword ptr [{PAGE_DIRECTORY + 4:#x}], 0x40
            mov [0x400000 + {PAGE + 8:#x}], ecx
            mov edx, [{PAGE_DIRECTORY + 4:#x}]
            jmp 1b
        """
        with Twins(source, prepare) as twins:
            twins.run(9000, STEPS)
            assert twins.count("soft forms") >= 2

    def test_address_spaces_that_share_a_table(self) -> None:
        def prepare(bare: Bare) -> None:
            map_low_memory(bare)
            bare.memory.store(OTHER_DIRECTORY, 4, PAGE_TABLE | 7)
            bare.memory.store(OTHER_DIRECTORY + 4, 4, PAGE_TABLE | 7)
            bare.memory.store(PAGE_DIRECTORY + 4, 4, PAGE_TABLE | 7)

        source = thrash(f"""
            add [{PAGE:#x}], ecx
            mov eax, cr3
            xor eax, {PAGE_DIRECTORY ^ OTHER_DIRECTORY:#x}
            mov cr3, eax
            add ebx, [{PAGE:#x}]
            add ebx, [{PAGE + 0x40_0000:#x}]
        """)
        with Twins(source, prepare) as twins:
            twins.run(9000, STEPS)
            assert twins.count("soft forms") >= 3
            assert twins.count("soft fallbacks") < 60

    @pytest.mark.parametrize(
        ("bits", "other_bits"), [(0xE7, 0xE3), (0xE7, 0x20E7), (0xE7, 0xA7), (0xE7, 0x87), (0xE7, 0xC5), (0xE7, 0xE6)]
    )
    def test_a_large_page(self, bits: int, other_bits: int) -> None:
        """The accesses to it, and the stores to the directory, have become soft with a volatile small page.

        Now and then it is not a user's, a reserved bit is set, D or A is clear, it is read-only, or is not there.
        """

        def prepare(bare: Bare) -> None:
            map_low_memory(bare)
            bare.state.cr4, bare.state.cr0 = CR4_PSE, bare.state.cr0 | CR0_WP
            set_handler(bare, Vector.PF, assemble("add esp, 4\nadd dword ptr [esp], 2\ninc ebp\niretd"))

        source = f"""
            1: inc ecx
            mov edi, {ENTRY:#x}
            mov esi, {PAGE:#x}
            mov eax, ecx
            and eax, 1
            shl eax, 12
            add eax, {FRAMES[0] | 7:#x}
            test cl, 64
            jz 2f
            mov esi, 0x700000
            mov edi, {PAGE_DIRECTORY + 4:#x}
            mov eax, {bits:#x}
            test cl, 7
            jnz 2f
            mov eax, {other_bits:#x}
            2: mov [edi], eax
            add [esi], ecx
            add ebx, [esi]
            mov edx, [{PAGE_DIRECTORY + 4:#x}]
            mov [0x60000], edx
            jmp 1b
        """
        with Twins(source, prepare) as twins:
            twins.run(12_000, STEPS)
            assert twins.count("soft forms") >= 3
            if other_bits == 0xE3:
                assert twins.count("soft fallbacks") < 40

    def test_pae(self) -> None:
        """Where tables of two levels would be there is something that looks like them."""
        page, entry = 0x230_0000, PAE_TABLES + 0x3000 + 8 * 0x100

        def prepare(bare: Bare) -> None:
            map_with_pae(bare)
            bare.memory.store(PAE_TABLES + 0x1000 + 8 * 17, 4, PAE_TABLES + 0x3000 | 7)
            bare.memory.store(PAE_TABLES + 4 * 8, 4, PAGE_TABLE | 0x27)
            set_page(bare, PAGE, FRAMES[3] | 0x67)

        source = f"""
            1: inc ecx
            mov eax, ecx
            and eax, 1
            shl eax, 12
            add eax, {FRAMES[0] | 7:#x}
            mov [{entry:#x}], eax
            add [{page:#x}], ecx
            add ebx, [{page:#x}]
            mov edx, [{entry:#x}]
            mov [0x60000], edx
            jmp 1b
        """
        with Twins(source, prepare) as twins:
            twins.run(6000, STEPS)
            assert twins.reference.memory.load(FRAMES[1], 4)
            assert twins.count("soft forms") == 3
            assert twins.count("soft fallbacks") < 20

    @pytest.mark.parametrize(
        ("at", "value"),
        [
            (0x3000 + 8 * 0x100 + 4, 1), (0x3000 + 8 * 0x100 + 4, 0x10), (0x1000 + 8, 0xE7), (0x1000 + 8, 0x20E7),
            (0x1000 + 8, PAE_TABLES + 0x3000 | 7), (0x1000 + 12, 0x8000_0000), (8, PAE_TABLES + 0x1000),
            (8, PAE_TABLES + 0x1000 | 3), (12, 1),
        ],
    )  # fmt: skip
    def test_pae_with_something_else_now_and_then(self, at: int, value: int) -> None:
        """An upper half, a large page, a reserved bit, no A bit, no PDPTE: in the entries above, too."""
        page, entry = 0x4030_0000, PAE_TABLES + 0x3000 + 8 * 0x100

        def prepare(bare: Bare) -> None:
            map_with_pae(bare)
            set_handler(bare, Vector.PF, assemble(f"""
                add esp, 4
                push dword ptr [0x60000]
                pop dword ptr [{PAE_TABLES + at:#x}]
                inc ebx
                iretd
            """))  # fmt: skip

        source = f"""
            mov eax, [{PAE_TABLES + at:#x}]
            mov [0x60000], eax
            mov esi, {page:#x}
            1: inc ecx
            mov eax, ecx
            and eax, 1
            shl eax, 12
            add eax, {FRAMES[0] | 7:#x}
            mov [{entry:#x}], eax
            test cl, 15
            jnz 2f
            mov dword ptr [{PAE_TABLES + at:#x}], {value:#x}
            2: add [esi], ecx
            add ebx, [esi + 4]
            push dword ptr [0x60000]
            pop dword ptr [{PAE_TABLES + at:#x}]
            jmp 1b
        """
        with Twins(source, prepare) as twins:
            twins.run(9000, STEPS)
            assert twins.count("soft forms") >= 3

    @pytest.mark.parametrize(
        ("at", "access"), [(0x1008, "add ebx, [esi]"), (0x3000 + 8 * 0x100, "sgdt [esi]"), (0x1008, "sgdt [esi]")]
    )
    def test_pae_with_upper_halves_in_use(self, at: int, access: str) -> None:
        """By a window, or by the interpreter alone; the store has become soft with entries of no use."""

        def prepare(bare: Bare) -> None:
            map_with_pae(bare)
            handler = f"add esp, 4\nmov dword ptr [{PAE_TABLES + at + 4:#x}], 0\ninc ebp\niretd"
            set_handler(bare, Vector.PF, assemble(handler))

        source = f"""
            mov esi, 0x40300000
            1: inc ecx
            mov edi, {PAE_TABLES + 0x3800 + 8 * 0x80:#x}
            mov eax, {PAGE | 7:#x}
            mov edx, ecx
            and edx, 63
            jnz 2f
            mov edi, {PAE_TABLES + at + 4:#x}
            mov eax, 0x10
            2: mov [edi], eax
            {access}
            jmp 1b
        """
        with Twins(source, prepare) as twins:
            twins.run(9000, STEPS)
            assert twins.count("soft forms") >= 1
            assert twins.reference.state.gpr[EBP] > 10


class TestFromOutside:
    def test_a_device_writes_to_the_table(self) -> None:
        def prepare(bare: Bare) -> None:
            map_low_memory(bare)

            def transfer(value: int) -> None:
                set_page(bare, PAGE, FRAMES[value & 3] | 7)
                bare.memory.write(PAGE_TABLE + 0x800, bytes([value]) * 0x100)

            bare.ports.register(0x50, 0x50, Port(transfer))

        source = thrash(f"""
            mov [{PAGE:#x}], ecx
            add ebx, [{PAGE + 4:#x}]
            test cl, 7
            jnz 1b
            mov eax, ecx
            out 0x50, al
            add [{PAGE + 4:#x}], ecx
            add ebx, [{PAGE + 0x1000:#x}]
        """)
        with Twins(source, prepare) as twins:
            twins.run(9000, STEPS)
            assert twins.count("soft forms") >= 3

    def test_a_debugger_writes_to_the_table(self) -> None:
        with Twins(thrash(f"add [{PAGE:#x}], ecx\nmov edx, [{PAGE:#x}]"), map_low_memory) as twins:
            twins.run(3000, STEPS)
            for turn in range(20):
                twins.run(200 + turn)
                twins.each(partial(set_page, linear=PAGE, entry=FRAMES[turn & 3] | 7))
                twins.each(lambda bare: bare.memory.store(PAGE_DIRECTORY, 4, PAGE_TABLE | 7))
            assert twins.count("soft forms") == 3

    @pytest.mark.parametrize("place", [PAGE, ENTRY])
    def test_what_a_soft_form_touches_is_watched_from_now_on(self, place: int) -> None:
        with Twins(thrash(f"add [{PAGE:#x}], ecx\nmov edx, [{PAGE + 4:#x}]"), map_low_memory) as twins:
            twins.run(3000, STEPS)
            assert twins.count("soft forms") == 3
            watch = Watchpoint(place, 4, on_read=False, on_write=True)
            for _ in range(3):
                twins.each(lambda bare: bare.debug.set_watchpoints(frozenset({watch})))
                for _ in range(5):
                    stop = twins.run(100)
                    assert stop is not None
                    assert stop.kind is StopKind.WATCHPOINT
                twins.each(lambda bare: bare.debug.set_watchpoints(frozenset()))
                twins.run(1000, STEPS)

    def test_the_gate_of_a20(self) -> None:
        """Held low, it lets what is in an odd megabyte answer one megabyte below; the tables are in an even one."""
        directory, table = 0x20_0000, 0x20_1000

        def prepare(bare: Bare) -> None:
            map_low_memory(bare)
            bare.memory.write(table, bare.memory.read(PAGE_TABLE, 4096))
            bare.memory.store(directory, 4, table | 7)
            bare.state.cr3 = directory
            bare.cpu.mmu.flush()

            def gate(value: int) -> None:
                bare.memory.a20_enabled = bool(value & 1)

            bare.ports.register(0x92, 0x92, Port(gate))

        source = thrash(f"""
            add [{PAGE:#x}], ecx
            add dword ptr [{table + (ENTRY & 0xFFF):#x}], 0x100000
            add ebx, [{PAGE:#x}]
            mov eax, ecx
            shr eax, 6
            test cl, 63
            jnz 1b
            out 0x92, al
        """).replace(f"{ENTRY:#x}", f"{table + (ENTRY & 0xFFF):#x}")
        with Twins(source, prepare) as twins:
            twins.run(12_000, STEPS)
            assert twins.count("soft forms") >= 3
            assert twins.count("soft fallbacks") > 100


class TestOtherEngines:
    @pytest.mark.parametrize("prepare", [map_low_memory, map_with_pae])
    @pytest.mark.parametrize("make", [trap, trap_nested])
    def test_trap_has_no_soft_forms(self, make: EngineMaker, prepare: Callable[[Bare], None]) -> None:
        entry = PAE_TABLES + 0x3000 + 8 * 0x100 if prepare is map_with_pae else ENTRY
        source = thrash(f"add [{PAGE:#x}], ecx\nadd ebx, [{PAGE + 4:#x}]").replace(f"{ENTRY:#x}", f"{entry:#x}")
        with Twins(source, prepare, engine=make) as twins:
            twins.run(3000, STEPS)
            for name in ("soft forms", "soft fallbacks", "volatile pages"):
                assert twins.count(name) == 0
            traces = twins.count("exits EXCP_PF trace")
            assert traces > 250 if make is trap else not traces

    @pytest.mark.usefixtures("hasty")
    def test_hybrid_goes_to_and_fro(self) -> None:
        """What one engine keeps out of the windows that they share the other one has mapped."""
        with Twins(thrash(f"add [{PAGE:#x}], ecx\nadd ebx, [{PAGE + 4:#x}]"), map_low_memory, engine=restless) as twins:
            twins.run(20_000, STEPS)


class TestAdaptation:
    def test_who_need_not_be_soft_any_more_is_plain_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("vmm.native.adaptation.SOFT_ACCESSES", 50)
        source = f"mov esi, {PAGE:#x}\nmov edi, {ENTRY:#x}\n" + thrash("add ebx, [esi]").replace(
            f"[{ENTRY:#x}]", "[edi]"
        )
        with Twins(source, map_low_memory) as twins:
            twins.run(3000, STEPS)
            assert twins.count("soft forms") == 2
            assert twins.count("reversions") == 0
            assert twins.count("soft accesses looked at") > 5
            twins.each(lambda bare: bare.state.gpr.__setitem__(ESI, 0x6_0000))
            twins.each(lambda bare: bare.state.gpr.__setitem__(7, 0x6_1000))
            twins.run(9 * 2000, STEPS)
            assert twins.count("reversions") == 2
            looks = twins.count("soft accesses looked at")
            callouts = twins.count("callouts")
            twins.run(6000, STEPS)
            assert twins.count("soft accesses looked at") == looks
            assert twins.count("callouts") == callouts

    def test_a_page_that_calms_down_comes_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("vmm.native.adaptation.SOFT_ACCESSES", 50)
        source = f"mov edi, {ENTRY:#x}\n" + thrash(f"add ebx, [{PAGE:#x}]").replace(f"[{ENTRY:#x}]", "[edi]")
        with Twins(source, map_low_memory) as twins:
            twins.run(3000, STEPS)
            assert twins.count("soft forms") == 2
            twins.each(lambda bare: bare.state.gpr.__setitem__(7, 0x6_1000))
            twins.run(9 * 2000, STEPS)
            assert twins.count("reversions") == 2
            assert twins.count("volatile pages calmed") == 1
            hidden, callouts = twins.count("hidden faults"), twins.count("callouts")
            twins.run(6000, STEPS)
            assert twins.count("hidden faults") == hidden
            assert twins.count("callouts") == callouts

    def test_a_string_instruction_has_its_page_mapped(self) -> None:
        """It has no soft form, and would be slow if it were interpreted."""
        with Twins(thrash(f"mov edi, {PAGE:#x}\nmov eax, ecx\nmov edx, ecx\nmov ecx, 256\nrep stosd\nmov ecx, edx"),
                   map_low_memory) as twins:  # fmt: skip
            twins.run(6000, STEPS)
            assert twins.count("callouts of stosd") == 0
            assert twins.count("faults interpreted") < 40

    def test_a_page_that_changes_seldom_is_mapped(self) -> None:
        source = thrash(f"mov edx, 2000\n2: add ebx, [{PAGE:#x}]\ndec edx\njnz 2b")
        with Twins(source, map_low_memory) as twins:
            twins.run(200_000, (40_000,))
            assert twins.count("volatile pages") == 0

    def test_what_nothing_depends_on_is_not_marked_as_used(self) -> None:
        with Twins(thrash(f"mov [{PAGE:#x}], ecx"), map_low_memory) as twins:
            twins.run(6000, STEPS)
            uses = twins.other.cpu.mmu.entry_uses
            assert uses is not None
            assert not uses[ENTRY >> 2]
            assert uses[PAGE_DIRECTORY >> 2]
            assert twins.other.memory.page_flags[PAGE_TABLE >> 12] & ~HOLDS_TABLE


CODE = 0x1_0000
SLOT_BYTES = 48
_ENTRIES = tuple(
    frame | bits
    for frame in (*FRAMES, PAGE_TABLE, PAGE_DIRECTORY, 0xB_8000, 0x50_0000)
    for bits in (7, 3, 1, 0x67, 0x27, 0x21, 0)
)
_PLACES = tuple(
    page + offset
    for page in (PAGE, PAGE + 0x1000, PAGE + 0x2000, PAGE + 0x40_0000, PAGE + 0x40_1000, 0x5_0000)
    for offset in (0xC00, 0xC04, 0xC08, 0xFFE)
)
_TABLES = (PAGE_TABLE, 0xFFC0_0000, 0x40_0000 + PAGE_TABLE)
_OPERATIONS = st.one_of(
    st.builds(lambda access, place: f"mov esi, {place:#x}\n{access}",
              st.sampled_from(ACCESSES[:-1]), st.sampled_from(_PLACES)),
    st.builds(lambda table, number, entry: f"mov dword ptr [{table + 0xC00 + 4 * number:#x}], {entry:#x}",
              st.sampled_from(_TABLES), st.integers(0, 3), st.sampled_from(_ENTRIES)),
    st.builds(lambda table, number, bits: f"xor dword ptr [{table + 0xC00 + 4 * number:#x}], {bits:#x}",
              st.sampled_from(_TABLES), st.integers(0, 3), st.sampled_from((1, 2, 0x1000, 0x20, 0x40, 0x1001))),
    st.builds(lambda entry: f"mov dword ptr [{PAGE_DIRECTORY + 4:#x}], {entry:#x}",
              st.sampled_from((PAGE_TABLE | 7, PAGE_TABLE | 0x25, 0x87, 0xE7, 0xC5, 0))),
    st.just(f"and dword ptr [{PAGE_DIRECTORY:#x}], ~0x20"),
    st.just(f"mov eax, cr0\nxor eax, {CR0_WP:#x}\nmov cr0, eax"),
    st.just(f"mov eax, cr3\nxor eax, {PAGE_DIRECTORY ^ OTHER_DIRECTORY:#x}\nmov cr3, eax"),
    st.just(f"mov esi, {PAGE + 0xD00:#x}\ncall esi"),
    st.just("mov eax, ecx\nout 0x50, al"),
)  # fmt: skip


# The same with PAE, where entries have an upper half.
_PAE_ENTRY = PAE_TABLES + 0x3000 + 8 * 0x100
_PAE_OPERATIONS = st.one_of(
    st.builds(lambda access, place: f"mov esi, {place:#x}\n{access}",
              st.sampled_from(ACCESSES[:-1]), st.sampled_from([each & ~0x40_0000 for each in _PLACES])),
    st.builds(lambda number, entry: f"mov dword ptr [{_PAE_ENTRY + 8 * number:#x}], {entry:#x}",
              st.integers(0, 3), st.sampled_from(_ENTRIES)),
    st.builds(lambda number, bits: f"xor dword ptr [{_PAE_ENTRY + 4 * number:#x}], {bits:#x}",
              st.integers(0, 7), st.sampled_from((1, 2, 0x10, 0x1000, 0x20, 0x40))),
    st.builds(lambda entry: f"mov dword ptr [{PAE_TABLES + 0x1008:#x}], {entry:#x}",
              st.sampled_from((PAE_TABLES + 0x3000 | 7, PAE_TABLES + 0x3000 | 0x25, 0x2000E7, 0xE7, 0x20E7, 0))),
    st.builds(lambda value: f"mov dword ptr [{PAE_TABLES + 0x100C:#x}], {value}", st.sampled_from((0, 1, 0x8000_0000))),
    st.just(f"mov eax, cr0\nxor eax, {CR0_WP:#x}\nmov cr0, eax"),
    st.just("mov eax, cr3\nmov cr3, eax"),
    st.just(f"mov esi, {PAGE + 0xD00:#x}\ncall esi"),
)  # fmt: skip


def random_guest(operations: list[str]) -> tuple[bytes, bytes]:
    """The code of the operations, over and over; and a page-fault handler that goes on with the next one, at EDI."""
    at, parts = CODE, []
    for number, operation in enumerate(operations):
        following = CODE + SLOT_BYTES * ((number + 1) % len(operations))
        source = (
            f"mov edi, {following:#x}\nmov esp, {STACK_TOP:#x}\ninc ecx\n{operation}\nmov edi, {following:#x}\njmp edi"
        )
        parts.append(assemble(source, origin=at).ljust(SLOT_BYTES, b"\xf4"))
        at += SLOT_BYTES
    return b"".join(parts), assemble("add esp, 4\nmov [esp], edi\nadd ebx, 13\niretd")


@pytest.mark.usefixtures("hasty")
class TestRandomStreams:
    @settings(max_examples=12, deadline=None)
    @given(operations=st.lists(_OPERATIONS, min_size=3, max_size=30))
    def test_tables_are_changed_and_pages_accessed_at_random(self, operations: list[str]) -> None:
        code, handler = random_guest(operations)

        def prepare(bare: Bare) -> None:
            map_low_memory(bare)
            memory = bare.memory
            bare.state.cr4 = CR4_PSE
            for directory in (PAGE_DIRECTORY, OTHER_DIRECTORY):
                memory.store(directory, 4, PAGE_TABLE | 7)
                memory.store(directory + 4, 4, 0x87)
                memory.store(directory + 4 * 1023, 4, directory | 3)
            for number, frame in enumerate(FRAMES):
                memory.write(frame + 0xD00, assemble(f"add ebx, {number}\nret"))
                set_page(bare, PAGE + 0x1000 * number, frame | 7)
            memory.write(CODE, code)
            set_handler(bare, Vector.PF, handler)
            bare.ports.register(0x50, 0x50, Port(lambda value: set_page(bare, PAGE, FRAMES[value & 3] | 7)))
            bare.state.eip = CODE

        with Twins("hlt", prepare) as twins:
            twins.run(len(operations) * 6 * 60, (701, 97))

    @settings(max_examples=12, deadline=None)
    @given(operations=st.lists(_PAE_OPERATIONS, min_size=3, max_size=30))
    def test_the_same_with_pae(self, operations: list[str]) -> None:
        code, handler = random_guest(operations)

        def prepare(bare: Bare) -> None:
            map_with_pae(bare)
            memory = bare.memory
            for number, frame in enumerate(FRAMES):
                memory.write(frame + 0xD00, assemble(f"add ebx, {number}\nret"))
                memory.store(_PAE_ENTRY + 8 * number, 4, frame | 7)
            memory.write(CODE, code)
            set_handler(bare, Vector.PF, handler)
            bare.state.eip = CODE

        with Twins("hlt", prepare) as twins:
            twins.run(len(operations) * 6 * 60, (701, 97))
