"""The software path to memory: `bt` against `interp` where page tables change all the time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from machine.debug import StopKind, Watchpoint
from machine.faults import Vector
from machine.memory import HOLDS_TABLE
from machine.state import CR0_WP, EBX, ESI
from tests.engine import restless, trap, trap_nested
from tests.oracles.assembler import assemble
from tests.vmm.bare import PAGE_DIRECTORY, PAGE_TABLE, Bare, EngineMaker, map_low_memory, set_handler, set_page
from tests.vmm.soft import ACCESSED_DIRTY, ACCESSES, ENTRY, FRAMES, PAE_ENTRY, PAGE, STEPS, map_with_pae, thrash
from tests.vmm.test_bt_memory import Port, gate_for_users, skip_handler, user_mode
from tests.vmm.twins import Twins


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
        """, entry=table + (ENTRY & 0xFFF))  # fmt: skip
        with Twins(source, prepare) as twins:
            twins.run(12_000, STEPS)
            assert twins.count("soft forms") >= 3
            assert twins.count("soft fallbacks") > 100


class TestOtherEngines:
    @pytest.mark.parametrize("prepare", [map_low_memory, map_with_pae])
    @pytest.mark.parametrize("make", [trap, trap_nested])
    def test_trap_has_no_soft_forms(self, make: EngineMaker, prepare: Callable[[Bare], None]) -> None:
        entry = PAE_ENTRY if prepare is map_with_pae else ENTRY
        source = thrash(f"add [{PAGE:#x}], ecx\nadd ebx, [{PAGE + 4:#x}]", entry=entry)
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
        source = f"mov esi, {PAGE:#x}\nmov edi, {ENTRY:#x}\n" + thrash("add ebx, [esi]", entry="edi")
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
        source = f"mov edi, {ENTRY:#x}\n" + thrash(f"add ebx, [{PAGE:#x}]", entry="edi")
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
