"""`bt` and `trap` against `interp` in time and in faults: interrupts at every icount, exceptions at every operand."""

from __future__ import annotations

import pytest

from machine.debug import SLACK_SHIFT, STINT_SLACK_INSNS, Stop, StopKind
from machine.faults import Vector
from machine.state import EAX, EBX, ECX, EDI, ESI
from tests.engine import verified
from tests.vmm.bare import Bare, flat, handler_of, map_low_memory, set_handler, set_page
from tests.vmm.twins import Twins

INC_EBX_IRET = b"\x43\xcf"


pytestmark = pytest.mark.usefixtures("native_core")


class Timer:
    """A device on port 50h: a write asks for an interrupt, so many nanoseconds later."""

    def __init__(self, bare: Bare) -> None:
        self.bare = bare
        bare.lines.acknowledge = self.acknowledge
        bare.memory.write(handler_of(0x20), INC_EBX_IRET)
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


class TestTime:
    @pytest.mark.parametrize("delay", [1, 2, 3, 31, 33, 64, 200])
    def test_an_interrupt_asked_for_on_the_way_comes_at_its_icount(self, delay: int) -> None:
        with Twins(f"sti\nmov al, {delay}\nout 0x50, al\n1: inc ecx\nadd edx, ecx\njmp 1b", Timer) as twins:
            twins.run(1000)
            assert twins.reference.state.gpr[EBX] == 1

    @pytest.mark.parametrize("steps", [(1,), (7,), (33,), (1, 40, 3), (1000,)])
    def test_interrupts_at_every_place_of_a_loop(self, steps: tuple[int, ...]) -> None:
        source = (
            "sti\n1: mov al, cl\nand al, 31\nout 0x50, al\ninc ecx\npush ecx\npop edx\ncall 2f\njmp 1b\n2: nop\nret"
        )
        with Twins(source, Timer) as twins:
            twins.run(1500, steps)
            assert twins.reference.state.gpr[EBX] > 50

    def test_cli_and_sti_hold_and_release_it(self) -> None:
        source = "1: cli\nmov al, 3\nout 0x50, al\nmov ecx, 20\n2: loop 2b\nsti\nnop\nnop\njmp 1b"
        with Twins(source, Timer) as twins:
            twins.run(2000, (100, 3, 39))
            assert twins.reference.state.gpr[EBX] > 20

    def test_rdtsc_is_exact(self) -> None:
        with Twins("1: inc ecx\nrdtsc\nadd ebx, eax\ncmp ecx, 3\njne 1b\nxor ecx, ecx\njmp 1b") as twins:
            twins.run(3000, (100, 37))

    def test_most_of_it_ran_as_emitted_code(self) -> None:
        with Twins("1: inc eax\nadd ebx, eax\njmp 1b") as twins:
            twins.run(100_000)
            assert twins.count("instructions decoded") < 100


class TestFaults:
    def test_a_divide_error_among_other_instructions(self) -> None:
        def resume(bare: Bare) -> None:
            bare.memory.write(handler_of(Vector.DE), b"\x83\x04\x24\x02\x43\xcf")  # add dword [esp], 2; inc ebx; iretd

        source = "1: mov eax, 100\nmov edx, 1\nadd edi, 7\nstc\ndiv ecx\nadc esi, eax\ninc ecx\nand ecx, 3\njmp 1b"
        with Twins(source, resume) as twins:
            twins.run(2000, (100, 33))
            assert twins.reference.state.gpr[EBX] > 50

    def test_an_opcode_that_only_the_host_refuses(self) -> None:
        """82h is an alias of 80h in 32-bit code, and undefined in 64-bit code."""
        with Twins(
            "1: inc ecx\n.byte 0x82, 0xc1, 0x05\n.byte 0x82, 0xb8, 0, 0x30, 0, 0, 7\nadc ebx, ecx\njmp 1b"
        ) as twins:
            twins.run(1000, (100, 33))

    def test_undefined_instructions(self) -> None:
        def resume(bare: Bare) -> None:
            bare.memory.write(handler_of(Vector.UD), b"\x83\x04\x24\x02\x43\xcf")

        with Twins("1: inc ecx\nud2\nadd edx, ecx\n.byte 0x0f, 0xff\njmp 1b", resume) as twins:
            twins.run(1000, (100, 33))

    def test_a_stack_that_is_not_there(self) -> None:
        with Twins("mov ecx, 50\n1: loop 1b\nmov esp, 0xa0000010\npush eax") as twins:
            twins.run(300, (33,))

    @pytest.mark.parametrize(
        "operation", ["rep movsd", "rep movsb", "rep stosd", "rep lodsb", "repe cmpsb", "repne scasb"]
    )
    @pytest.mark.parametrize("backwards", [False, True])
    @pytest.mark.parametrize("missing", [0x30_1000, 0x30_2000, 0x31_1000, 0x31_2000])
    def test_a_fault_at_each_operand_of_a_rep(self, operation: str, missing: int, *, backwards: bool) -> None:
        """The handler maps the page that is missing, and the instruction goes on."""

        def prepare(bare: Bare) -> None:
            map_low_memory(bare)
            set_page(bare, missing, 0)
            # mov edx, cr2; shr edx, 12; lea ebp, [edx * 4 + 101000h]; shl edx, 12; or edx, 7; mov [ebp], edx;
            # inc ebx; add esp, 4; iretd
            code = "0f20d2 c1ea0c 8d2c9500101000 c1e20c 83ca07 895500 43 83c404 cf"
            set_handler(bare, Vector.PF, bytes.fromhex(code))
            bare.memory.write(0x30_0000, bytes(range(256)) * 12)
            bare.state.gpr[ESI], bare.state.gpr[EDI] = (0x30_2801, 0x31_2803) if backwards else (0x30_0801, 0x31_0803)
            bare.state.gpr[ECX] = 1500 if operation.endswith("d") else 6000
            bare.state.gpr[EAX] = 0xFFFF_FFEE if "scas" in operation else 0

        with Twins(f"{'std' if backwards else 'cld'}\nnop\n{operation}\npushfd\nhlt", prepare) as twins:
            stop = twins.run(200, (40,))
            assert stop == Stop(StopKind.HALTED)

    def test_every_fault_leaves_the_flags_of_the_instruction_before(self) -> None:
        def prepare(bare: Bare) -> None:
            map_low_memory(bare)
            set_page(bare, 0x30_0000, 0)
            bare.memory.write(handler_of(Vector.PF), b"\x83\xc4\x04\x83\x04\x24\x06\x43\xcf")  # past six bytes

        source = "1: inc ecx\nadd eax, ecx\nadd [0x300000], ecx\nadc edx, 0\nxor eax, ecx\nmov [0x300004], ecx\njmp 1b"
        with Twins(source, prepare) as twins:
            twins.run(2000, (100, 33))
            assert twins.reference.state.gpr[EBX] > 100


class TestSlack:
    """Who need not stop at an exact icount gets there without the interpreter."""

    SOURCE = "1: inc eax\nadd ebx, eax\nxor edx, ebx\nadd edx, 7\nrol edx, 3\ncmp eax, 0x1000000\njne 1b\nhlt"

    def test_it_stops_short_but_not_far(self) -> None:
        bare = flat(self.SOURCE, verified)
        try:
            bare.debug.slack_insns = STINT_SLACK_INSNS
            bare.run(1)
            decoded = bare.engine.statistics()["instructions decoded"]
            for stint_insns in (1, 2, 40, 63, 64, 65, 200, 10_001, 77_777):
                before = bare.clock.icount
                assert bare.engine.run(before + stint_insns) == Stop(StopKind.BUDGET)
                least = stint_insns - min(STINT_SLACK_INSNS, stint_insns >> SLACK_SHIFT)
                assert before + least <= bare.clock.icount <= before + stint_insns
            for _ in range(20):
                bare.engine.run(bare.clock.icount + 5000)
            assert int(bare.engine.statistics()["instructions decoded"]) <= int(decoded) + 7
        finally:
            bare.close()

    def test_what_the_guest_does_is_the_same(self) -> None:
        with Twins(self.SOURCE) as twins:
            twins.other.debug.slack_insns = STINT_SLACK_INSNS
            for _ in range(5):
                twins.other.engine.run(twins.other.clock.icount + 1000)
                twins.reference.run(twins.other.clock.icount - twins.reference.clock.icount)
                twins.check()

    def test_an_event_comes_at_its_icount(self) -> None:
        bare = flat("1: inc eax\nadd ebx, eax\njmp 1b", verified)
        try:
            seen: list[int] = []
            bare.debug.slack_insns = STINT_SLACK_INSNS
            bare.clock.schedule(5000, lambda: seen.append(bare.clock.icount))
            while bare.clock.icount < 6000:
                bare.engine.run(bare.clock.icount + 1990)
            assert seen == [5000]
        finally:
            bare.close()
