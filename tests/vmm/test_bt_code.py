"""`bt` against `interp` where code changes under it, by whatever writer and address, and where the cache fills up.

The same under `trap`.
"""

from __future__ import annotations

import pytest

from machine.debug import CodeBreakpoint, Stop, StopKind, Watchpoint
from machine.state import EAX, EBX
from tests.engine import chosen
from tests.vmm.bare import ORIGIN, Bare, map_low_memory, set_page
from tests.vmm.twins import Twins

pytestmark = pytest.mark.usefixtures("native_core")


class TestChangingCode:
    @pytest.mark.parametrize("is_adapted", [False, True])
    def test_a_store_into_the_same_fragment(self, is_adapted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        if not is_adapted:
            monkeypatch.setattr("vmm.native.fragmentstore.LONGEST_PATCH_BYTES", 0)
        source = "1: inc ecx\nmov byte ptr [2f + 2], cl\n2: add eax, 0\nadd ebx, eax\njmp 1b"
        with Twins(source) as twins:
            twins.run(2000, (100, 33))
            assert (twins.count("fragments dropped") < 100) is (is_adapted and chosen() == "bt")

    def test_a_store_into_another_fragment_of_the_page(self) -> None:
        source = """
            1: call 2f
            inc ecx
            mov byte ptr [2f + 1], cl
            jmp 1b
            2: mov al, 0
            add ebx, eax
            ret
        """
        with Twins(source) as twins:
            twins.run(3000, (100, 33))

    def test_only_what_was_changed_is_translated_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("vmm.native.fragmentstore.LONGEST_PATCH_BYTES", 0)  # nothing is adapted
        others = "\n".join(f"call {n}f" for n in range(10, 30))
        routines = "\n".join(f"{n}: add ebx, {n}\nret" for n in range(10, 30))
        source = f"""
            1: call 2f
            inc ecx
            mov byte ptr [2f + 1], cl
            {others}
            jmp 1b
            .skip 64
            2: mov al, 0
            add ebx, eax
            ret
            .skip 64
            {routines}
        """
        with Twins(source) as twins:
            twins.run(65 * 200)
            changes = twins.count("invalidations")
            assert changes > 150
            assert 1.2 * changes < twins.count("translation units") < 5 * changes

    def test_code_on_another_page_written_by_string_instructions(self) -> None:
        source = """
            1: mov esi, offset 3f
            test ecx, 1
            jz 2f
            mov esi, offset 4f
            2: push ecx
            mov ecx, 8
            mov edi, 0x5000
            rep movsb
            pop ecx
            mov eax, 0x5000
            call eax
            inc ecx
            jmp 1b
            3: add ebx, 1
            ret
            .balign 8
            4: sub ebx, 3
            ret
            .balign 8
        """
        with Twins(source) as twins:
            twins.run(3000, (100, 33))

    def test_one_page_under_two_addresses(self) -> None:
        """Written through one alias, run through the other, and both hold fragments of the same bytes."""

        def map_alias(bare: Bare) -> None:
            map_low_memory(bare)
            bare.memory.write(0x5000, b"\x83\xc3\x01\xc3")  # add ebx, 1; ret
            set_page(bare, 0x30_0000, 0x5000 | 7)
            set_page(bare, 0x30_1000, 0x5000 | 7)

        source = """
            1: mov eax, 0x300000
            call eax
            mov eax, 0x301000
            call eax
            mov eax, 0x5000
            call eax
            inc ecx
            mov byte ptr [0x300002], cl
            and ecx, 7
            jmp 1b
        """
        with Twins(source, map_alias) as twins:
            twins.run(2000, (100, 33))
            assert twins.reference.state.gpr[EBX] > 1000

    def test_an_instruction_across_two_pages_with_either_half_changing(self) -> None:
        def straddle(bare: Bare) -> None:
            bare.memory.write(0x5FFD, b"\xb8\x78\x56\x34\x12\x01\xc3\xc3")  # mov eax, 12345678h; add ebx, eax; ret

        source = """
            1: mov eax, 0x5ffd
            call eax
            inc byte ptr [0x6000]
            mov eax, 0x5ffd
            call eax
            inc byte ptr [0x5ffe]
            jmp 1b
        """
        with Twins(source, straddle) as twins:
            twins.run(2000, (100, 33))

    def test_a_debugger_or_a_device_writes_code(self) -> None:
        with Twins("1: mov al, 1\nadd ebx, eax\njmp 1b") as twins:
            for value in (1, 9, 200):
                twins.each(lambda bare, value=value: bare.memory.write(ORIGIN + 1, bytes([value])))  # type: ignore[misc]
                twins.run(500, (100,))
            assert twins.reference.state.gpr[EAX] == 200

    def test_data_beside_code_drops_it_ever_more_rarely(self) -> None:
        """The page is taken for data after some stores; but its code is wanted at once."""
        with Twins("1: inc dword ptr [data]\njmp 1b\n.balign 64\ndata: .long 0") as twins:
            twins.run(60)
            assert twins.count("invalidations") == 0
            twins.run(8000)
            assert twins.count("invalidations") == twins.count("code pages given up")
            assert 0 < twins.count("code pages given up") < 8

    def test_a_page_that_was_code_is_filled_with_data(self) -> None:
        source = """
            mov edi, 0x3000
            mov byte ptr [edi], 0x40
            mov byte ptr [edi + 1], 0xc3
            call edi
            1: mov edi, 0x3010
            2: mov [edi], ecx
            inc ecx
            add edi, 4
            cmp edi, 0x4000
            jb 2b
            mov edi, 0x3000
            call edi
            jmp 1b
        """
        with Twins(source) as twins:
            twins.run(5 * 1020 + 100, (700, 33))
            assert twins.count("code pages given up") == 1
            assert twins.count("callouts") + twins.count("faults interpreted") < 200
            twins.run(3 * 5 * 1020, (700, 33))
            assert twins.count("callouts") + twins.count("faults interpreted") < 500

    def test_breakpoints_come_and_go(self) -> None:
        with Twins("1: inc eax\nadd ebx, eax\nx: inc ecx\njmp 1b") as twins:
            twins.run(400)
            breakpoint_ = CodeBreakpoint(ORIGIN + 3)
            for _ in range(3):
                twins.each(lambda bare: bare.debug.set_breakpoints(frozenset({breakpoint_})))
                for _ in range(3):
                    stops = {bare.engine.run(1 << 40, skip_breakpoint=True) for bare in (twins.reference, twins.other)}
                    assert stops == {Stop(StopKind.BREAKPOINT, linear=ORIGIN + 3, breakpoint=breakpoint_)}
                    twins.check()
                twins.each(lambda bare: bare.debug.set_breakpoints(frozenset()))
                twins.run(401)

    def test_a_watchpoint_stops_at_the_same_instruction(self) -> None:
        with Twins("1: inc eax\nmov [0x3000 + eax * 4], eax\njmp 1b") as twins:
            twins.run(300)
            watchpoint = Watchpoint(0x3000 + 4 * 200, 4, on_read=False, on_write=True)
            twins.each(lambda bare: bare.debug.set_watchpoints(frozenset({watchpoint})))
            stop = twins.run(10_000)
            assert stop is not None
            assert (stop.kind, stop.watchpoint) == (StopKind.WATCHPOINT, watchpoint)
            twins.each(lambda bare: bare.debug.set_watchpoints(frozenset()))
            twins.run(300)


class TestCacheFull:
    @pytest.fixture(autouse=True)
    def small(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("vmm.native.cache.TC_BYTES", 68 << 10)

    def test_code_that_does_not_fit(self) -> None:
        """A chain of blocks that fills the cache every few rounds, with calls under way."""
        blocks = "".join(
            f"b{n}: inc eax\nadd ebx, eax\nxor edx, ebx\nrol edx, {n % 31}\njmp b{n + 1}\n" for n in range(120)
        )
        with Twins(f"mov ecx, 9\n1: call b0\ninc edi\njmp 1b\n{blocks}b120: ret") as twins:
            twins.run(6000, (500, 33))
            assert twins.count("translation units") > 500

    def test_the_cache_may_fill_up_at_any_exit(self) -> None:
        for padding in range(0, 40, 3):
            blocks = "".join(f"b{n}: inc eax\njmp b{n + 1}\n" for n in range(60 + padding))
            with Twins(f"1: call b0\njmp 1b\n{blocks}b{60 + padding}: ret") as twins:
                twins.run(800, (200,))
