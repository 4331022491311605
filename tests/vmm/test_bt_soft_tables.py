"""The software path to memory, through tables of every kind: shared, seen through themselves, with large pages, PAE."""

from __future__ import annotations

import pytest

from machine.faults import Vector
from machine.state import CR0_WP, CR4_PSE, EBP, EBX
from tests.oracles.assembler import assemble
from tests.vmm.bare import PAGE_DIRECTORY, PAGE_TABLE, Bare, map_low_memory, set_handler, set_page
from tests.vmm.soft import ENTRY, FRAMES, OTHER_DIRECTORY, PAE_ENTRY, PAE_TABLES, PAGE, STEPS, map_with_pae, thrash
from tests.vmm.twins import Twins


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
        page = 0x230_0000

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
            mov [{PAE_ENTRY:#x}], eax
            add [{page:#x}], ecx
            add ebx, [{page:#x}]
            mov edx, [{PAE_ENTRY:#x}]
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
        page = 0x4030_0000

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
            mov [{PAE_ENTRY:#x}], eax
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
