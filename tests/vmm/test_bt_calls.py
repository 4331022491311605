"""`bt` against `interp` in control flow: calls and returns in any order and number, loops, jumps to nowhere.

The same under `trap`.
"""

from __future__ import annotations

import pytest

from machine.state import EBX, ECX
from tests.vmm.bare import ORIGIN
from tests.vmm.twins import Twins

pytestmark = pytest.mark.usefixtures("native_core")


class TestCalls:
    @pytest.mark.parametrize("depth", [10, 7000, 20_000])
    def test_deep_recursion(self, depth: int) -> None:
        """Each call takes eight bytes of the 64 KiB that hold the host's return addresses."""
        source = f"mov esp, 0x200000\n1: mov ecx, {depth}\ncall 2f\njmp 1b\n2: dec ecx\njz 3f\ncall 2b\ninc ebx\n3: ret"
        with Twins(source) as twins:
            twins.run(12 * depth + 100, (5 * depth + 33,))
            assert twins.reference.state.gpr[EBX] > depth // 2

    def test_more_returns_than_calls(self) -> None:
        source = """
            1: mov esp, 0x200000
            mov ecx, 20000
            2: push offset 3f
            loop 2b
            ret
            3: inc ebx
            cmp esp, 0x200000
            jae 1b
            ret
        """
        with Twins(source) as twins:
            twins.run(100_000, (30_000,))
            assert twins.reference.state.gpr[EBX] > 10_000

    def test_more_calls_than_returns(self) -> None:
        with Twins("1: mov esp, 0x8000\n2: call 3f\n3: inc ebx\ntest bh, 4\njz 2b\njmp 1b") as twins:
            twins.run(100_000, (30_000,))

    def test_returns_to_where_nobody_called_from(self) -> None:
        """A longjmp: frames are left without a return."""
        source = """
            1: mov edi, esp
            call 2f
            9: mov esp, edi
            inc ebx
            jmp 1b
            2: call 3f
            ud2
            3: inc ecx
            test cl, 3
            jz 4f
            push offset 9b
            ret
            4: call 2b
            ud2
        """
        with Twins(source) as twins:
            twins.run(5000, (500, 33))
            assert twins.reference.state.gpr[EBX] > 300

    def test_a_return_address_that_was_changed(self) -> None:
        source = "1: call 2f\ninc ecx\ninc ebx\njmp 1b\n2: xor dword ptr [esp], 1\nadd dword ptr [esp], 2\nret"
        with Twins(source) as twins:
            twins.run(2000, (100, 33))
            assert twins.reference.state.gpr[ECX] == 0
            assert twins.reference.state.gpr[EBX] > 200

    def test_forms_of_call_and_return(self) -> None:
        source = """
            mov ebp, offset table
            1: push ecx
            push ecx
            call [ebp + ecx * 4]
            mov edx, [table + ecx * 4]
            push 1
            call edx
            inc ecx
            and ecx, 3
            jmp 1b
            2: inc eax
            ret 4
            3: add eax, 2
            ret 0
            table: .long 2b, 2b, 2b, 2b
        """
        with Twins(source) as twins:
            twins.run(3000, (100, 33))

    def test_call_through_esp_reads_before_it_pushes(self) -> None:
        with Twins("1: push offset 2f\ncall [esp]\nadd esp, 4\ninc ecx\njmp 1b\n2: inc ebx\nret") as twins:
            twins.run(1000, (100, 33))
            assert twins.reference.state.gpr[EBX] > 100

    def test_jumps_to_garbage(self) -> None:
        """Where there is no RAM, at the very end of the address space, and in the middle of an instruction."""
        for target in (0x0050_0000, 0xFFFF_FFFF, 0xFFFF_FFF0, 0xA_0000, ORIGIN + 1):
            with Twins(f"mov ecx, 50\n1: dec ecx\njnz 1b\nmov eax, {target:#x}\njmp eax") as twins:
                twins.run(400, (33,))

    def test_a_loop_of_every_kind(self) -> None:
        source = """
            1: mov ecx, 5
            2: inc eax
            loop 2b
            mov ecx, 5
            3: inc eax
            cmp eax, ebx
            loopne 3b
            mov ecx, 4
            4: dec ecx
            jecxz 5f
            jmp 4b
            5: lea ebx, [ebx + eax * 2]
            cmp eax, eax
            mov ecx, 3
            6: loope 6b
            jmp 1b
        """
        with Twins(source) as twins:
            twins.run(4000, (100, 33))
