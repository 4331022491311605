"""`bt` against `interp` where address spaces have page tables in common: what one knows of the code, the others do."""

from __future__ import annotations

import errno

import pytest

from machine.state import CR4_PAE, CR4_PSE, EBX, EDX, ESI
from tests.oracles.assembler import assemble
from tests.vmm.bare import PAGE_TABLE, Bare, map_low_memory
from tests.vmm.engines import bt_alone
from tests.vmm.twins import Twins
from vmm.native import sharing, windows

pytestmark = [pytest.mark.usefixtures("native_core"), bt_alone]

STEPS = (1000, 333)
SPACES = 6
DIRECTORIES = 0x11_0000
TABLES = 0x12_0000  # two that map CODE
CODE = 0x40_0000
CODE_PAGES = 16
FRAMES = 0x5_0000  # with one function in each page: 16 for the first table, 16 for the second
ACCESSED = 0x20
SEED = 0x7_8000


def prepare_spaces(bare: Bare, *, second: tuple[int, ...] = ()) -> None:
    """SPACES page directories with low memory and CODE in common; some of them have the second table at CODE."""
    map_low_memory(bare)
    memory = bare.memory
    for page in range(2 * CODE_PAGES):
        function = assemble(f"add ebx, {page + 1}\nrol ebx, 1\nret", origin=CODE)
        memory.write(FRAMES + 0x1000 * page, function)
        memory.store(TABLES + 0x1000 * (page // CODE_PAGES) + 4 * (page % CODE_PAGES), 4, FRAMES + 0x1000 * page | 7)
    for space in range(SPACES):
        memory.store(DIRECTORIES + 0x1000 * space, 4, PAGE_TABLE | 7 | ACCESSED)
        memory.store(DIRECTORIES + 0x1000 * space + 4, 4, TABLES + 0x1000 * (space in second) | 7 | ACCESSED)


def visit(work: str) -> str:
    """A loop over the spaces: in each the function of every page is called, then comes `work`."""
    return f"""
        again: xor esi, esi
        next: mov eax, esi
        shl eax, 12
        add eax, {DIRECTORIES:#x}
        mov cr3, eax
        xor edi, edi
        each: mov eax, edi
        shl eax, 12
        add eax, {CODE:#x}
        call eax
        inc edi
        cmp edi, {CODE_PAGES}
        jne each
        inc esi
        cmp esi, {SPACES}
        jne next
        {work}
        jmp again
    """


def misses(twins: Twins) -> int:
    return twins.count("dispatch misses")


VISIT_INSNS = SPACES * (5 + CODE_PAGES * 9 + 3)


class TestSharing:
    def test_a_space_is_warm_where_another_was(self) -> None:
        with Twins(visit(""), prepare_spaces) as twins:
            twins.run(VISIT_INSNS // SPACES)
            first = misses(twins)
            assert first >= CODE_PAGES
            twins.run(2 * VISIT_INSNS, STEPS)
            assert misses(twins) - first < 8  # the second space has to say that it is like the first

    def test_with_pae_and_large_pages(self) -> None:
        def prepare(bare: Bare) -> None:
            prepare_spaces(bare)
            memory = bare.memory
            bare.state.cr4 |= CR4_PAE | CR4_PSE
            bare.state.cr3 = DIRECTORIES
            for space in range(SPACES):
                at = DIRECTORIES + 0x1000 * space
                memory.write(at, (at + 0x3_0000 | 1).to_bytes(8, "little"))
                for number, value in enumerate((0xE7, 0x20_00E7, 0xE7)):  # CODE is physical memory from 0 on, too
                    memory.write(at + 0x3_0000 + 8 * number, value.to_bytes(8, "little"))
            bare.cpu.mmu.flush()

        with Twins(visit("").replace(f"{CODE:#x}", f"{CODE + FRAMES:#x}"), prepare) as twins:
            twins.run(VISIT_INSNS // SPACES)
            first = misses(twins)
            assert first >= CODE_PAGES
            twins.run(2 * VISIT_INSNS, STEPS)
            assert misses(twins) - first < 8

    def test_a_process_that_may_open_no_more_files(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Everybody goes on alone."""

        def refuse(_name: str) -> int:
            raise OSError(errno.EMFILE, "too many open files")

        with Twins(visit(""), prepare_spaces) as twins:
            monkeypatch.setattr("os.memfd_create", refuse)
            twins.run(2 * VISIT_INSNS, STEPS)
            assert misses(twins) >= SPACES * CODE_PAGES

    def test_only_where_the_entry_is_the_same(self) -> None:
        with Twins(visit(""), lambda bare: prepare_spaces(bare, second=(1, 4))) as twins:
            twins.run(3 * VISIT_INSNS, STEPS)
            assert twins.reference.state.gpr[EBX]


class TestChanges:
    @pytest.mark.parametrize("space", range(SPACES))
    def test_an_entry_of_one_directory(self, space: int) -> None:
        """It says the other table and back; the others go on with what they have."""
        entry = DIRECTORIES + 0x1000 * space + 4
        work = f"xor dword ptr [{entry:#x}], 0x1000"
        with Twins(visit(work), prepare_spaces) as twins:
            twins.run(6 * VISIT_INSNS, STEPS)
            assert misses(twins) < 2 * SPACES * CODE_PAGES

    def test_an_entry_of_the_common_table(self) -> None:
        """All spaces come to the other page, whoever of them it was mapped in."""
        work = f"""
            inc edx
            mov eax, edx
            and eax, 15
            lea ecx, [{TABLES:#x} + eax * 4]
            xor dword ptr [ecx], 0x30000
        """
        with Twins(visit(work), prepare_spaces) as twins:
            twins.run(20 * VISIT_INSNS, STEPS)
            assert twins.reference.state.gpr[EDX] > 15

    def test_common_code(self) -> None:
        work = f"""
            inc edx
            mov eax, edx
            and eax, 15
            shl eax, 12
            xor byte ptr [eax + {FRAMES + 2:#x}], 0x15
        """
        with Twins(visit(work), prepare_spaces) as twins:
            twins.run(20 * VISIT_INSNS, STEPS)

    @pytest.mark.parametrize("most_windows", [2, 4, windows.MAX_WINDOWS])
    @pytest.mark.parametrize("most_slices", [0, 2, sharing.MAX_SLICES])
    def test_everything_at_random(self, monkeypatch: pytest.MonkeyPatch, most_windows: int, most_slices: int) -> None:
        """Spaces in any order, a few pages in each; entries of both levels and code change now and then."""
        monkeypatch.setattr(windows, "MAX_WINDOWS", most_windows)
        monkeypatch.setattr(sharing, "MAX_SLICES", most_slices)
        source = f"""
            again: call random
            xor edx, edx
            mov ecx, {SPACES}
            div ecx
            mov esi, edx
            shl edx, 12
            add edx, {DIRECTORIES:#x}
            mov cr3, edx
            mov ebp, 5
            each: call random
            and eax, 0xf000
            add eax, {CODE:#x}
            call eax
            dec ebp
            jne each
            call random
            and eax, 15
            je upper
            cmp eax, 3
            jb lower
            je patch
            jmp again
            upper: call random
            xor edx, edx
            mov ecx, {SPACES}
            div ecx
            shl edx, 12
            xor dword ptr [edx + {DIRECTORIES + 4:#x}], 0x1000
            jmp again
            lower: call random
            mov ecx, eax
            shr ecx, 12
            and eax, 31
            mov edx, eax
            and edx, 15
            shr eax, 4
            shl eax, 12
            and ecx, 0x1f000
            add ecx, {FRAMES | 7:#x}
            mov [eax + edx * 4 + {TABLES:#x}], ecx
            jmp again
            patch: call random
            and eax, 0x1f000
            xor byte ptr [eax + {FRAMES + 2:#x}], 0x15
            jmp again
            random: mov eax, [{SEED:#x}]
            imul eax, eax, 1664525
            add eax, 1013904223
            mov [{SEED:#x}], eax
            shr eax, 8
            ret
        """
        with Twins(source, prepare_spaces) as twins:
            twins.run(60_000, (3000, 777))
            assert twins.reference.state.gpr[ESI] < SPACES
