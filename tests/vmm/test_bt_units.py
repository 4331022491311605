"""`bt` against `interp` where a translation unit goes on behind a branch, round a loop, and with ESP not yet moved.

The same under `trap`.
"""

from __future__ import annotations

import pytest

from machine.state import Gpr
from tests.vmm.bare import Bare, map_low_memory, set_page
from tests.vmm.twins import Twins

pytestmark = [
    pytest.mark.usefixtures("other_engine"),
    pytest.mark.parametrize("other_engine", ["bt", "trap"], indirect=True),
]

DEVICE = 0xB_8000  # not RAM: each access is interpreted
MISSING = 0x3_F000  # a page that is not mapped, away from stack and tables
PIECES = (97, 33, 64, 201, 35, 500)


class TestSideExits:
    """What was charged for instructions behind a taken branch is given back, so that the icount stays right."""

    @pytest.mark.parametrize("branch", ["jc 3f", "loop 3f", "jecxz 3f"])
    def test_ways_out_of_a_loop(self, branch: str) -> None:
        source = f"""
            1: mov ecx, 3
            2: add eax, 0x12345678
            {branch}
            inc ebx
            test al, 16
            jz 2b
            inc edx
            jmp 1b
            3: inc esi
            add esi, ebx
            test esi, 1
            jz 1b
            jmp 2b
        """
        with Twins(source) as twins:
            twins.run(20_000, PIECES)
            assert twins.reference.state.gpr[Gpr.EAX]

    def test_a_branch_to_another_page(self) -> None:
        with Twins("1: inc eax\ntest al, 3\njz 2f\ninc ebx\ninc ecx\njmp 1b\n.space 5000\n2: inc edx\njmp 1b") as twins:
            twins.run(20_000, PIECES)
            assert twins.reference.state.gpr[Gpr.EDX] > 500


class TestUnrolledLoops:
    @pytest.mark.parametrize("body", ["", "inc eax\n" * 3, "add [edi], ecx\n" * 7, "adc eax, ecx\n" * 15])
    @pytest.mark.parametrize("rounds", [1, 2, 15, 16, 17, 100])
    def test_any_number_of_rounds(self, body: str, rounds: int) -> None:
        source = f"mov edi, 0x8000\n1: mov ecx, {rounds}\n2: {body}dec ecx\njnz 2b\ninc ebx\njmp 1b"
        with Twins(source) as twins:
            twins.run(6000, PIECES)
            assert twins.reference.state.gpr[Gpr.EBX]

    def test_a_loop_that_patches_itself(self) -> None:
        source = "mov eax, offset 2f\n1: inc byte ptr [eax + 2]\n2: add ebx, 0\ndec ecx\njnz 1b\nhlt"
        with Twins(source, lambda bare: bare.state.gpr.__setitem__(Gpr.ECX, 60)) as twins:
            twins.run(400, (90,))
            assert twins.reference.state.gpr[Gpr.EBX] > 60

    def test_a_fault_in_a_later_round(self) -> None:
        """The first rounds read RAM, the later ones an unmapped page."""

        def prepare(bare: Bare) -> None:
            map_low_memory(bare)
            set_page(bare, MISSING, 0)

        source = f"1: mov esi, {MISSING - 40}\n2: mov eax, [esi]\nadd esi, 8\ncmp esi, {MISSING + 256}\njb 2b\njmp 1b"
        with Twins(source, prepare) as twins:
            stop = twins.run(500, (40,))
            assert stop is not None
            assert twins.reference.state.cr2 == MISSING


class TestStackInARow:
    """Guest ESP is moved once for several pushes and pops; whoever comes between must see it right."""

    @pytest.mark.parametrize("top", [DEVICE + 64, 0xA_0000 + 8, 0xA_0000 + 12])
    def test_accesses_that_are_interpreted(self, top: int) -> None:
        row = "push eax\npush 7\npush ecx\npop edx\npop ebx\npush ebx\npop ecx\npop eax"
        source = f"1: mov esp, {top}\n{row}\ninc eax\njmp 1b"
        with Twins(source) as twins:
            twins.run(3000, PIECES)
            assert twins.count("faults interpreted") > 100

    @pytest.mark.parametrize("access", ["push edx", "pop edx", "call 2f", "ret", "mov eax, [edi]", "push [edi]"])
    def test_a_page_fault_between_them(self, access: str) -> None:
        def prepare(bare: Bare) -> None:
            map_low_memory(bare)
            set_page(bare, MISSING, 0)
            bare.state.gpr[Gpr.EDI] = MISSING + 16

        for offset in (-8, -4, 0, 4, 8, 12, 4096, 4100, 4104):
            row = f"push eax\npush ebx\n{access}\npop eax\n2: pop ebx\nhlt"
            source = f"mov ecx, 9\n1: dec ecx\njnz 1b\nmov esp, {MISSING + offset}\n{row}"
            with Twins(source, prepare) as twins:
                twins.run(400, (90,))

    def test_functions(self) -> None:
        source = """
            1: mov eax, 12
            call 2f
            inc edx
            jmp 1b
            2: push ebp
            mov ebp, esp
            push esi
            push ebx
            cmp eax, 1
            jbe 3f
            mov ebx, eax
            lea eax, [ebx - 1]
            call 2b
            mov esi, eax
            push ebx
            lea eax, [ebx - 2]
            add esp, 4
            call 2b
            add eax, esi
            3: pop ebx
            pop esi
            pop ebp
            ret
        """
        with Twins(source) as twins:
            twins.run(30_000, PIECES)
            assert twins.reference.state.gpr[Gpr.EDX] > 1
