"""`bt` against `interp` while something is watched: by the debugger, and by the guest itself with DR0 to DR7.

The same under `trap`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from machine.debug import CodeBreakpoint, Stop, StopKind, Watchpoint
from machine.faults import Vector
from machine.state import EAX, EBX, ECX, EDI, ESI, ESP
from tests.oracles.assembler import assemble
from tests.vmm.bare import (
    GDT_BASE,
    IDT_BASE,
    ORIGIN,
    PAGE_TABLE,
    STACK_TOP,
    Bare,
    map_low_memory,
    set_handler,
    set_page,
)
from tests.vmm.streams import SANDBOX, SANDBOX_PAGES, Program, programs
from tests.vmm.twins import Twins

pytestmark = [
    pytest.mark.usefixtures("native_core"),
    pytest.mark.parametrize("native_core", ["budget-32", "budget-1", "trap"], indirect=True),
]

DATA = 0x30_0000
STEPS = (1000, 100, 33, 1, 250)
KINDS = [(False, True), (True, False), (True, True)]
EACH_KIND = pytest.mark.parametrize(("on_read", "on_write"), KINDS, ids=["write", "read", "access"])

# R/W and LEN of DR7 for each length that there is.
_LENGTHS = {1: 0, 2: 1, 4: 3}
_WRITE, _ACCESS = 1, 3


def watch(twins: Twins, *watchpoints: Watchpoint) -> None:
    twins.each(lambda bare: bare.debug.set_watchpoints(frozenset(watchpoints)))


def stop_at(twins: Twins, place: CodeBreakpoint) -> None:
    twins.each(lambda bare: bare.debug.set_breakpoints(frozenset({place})))


def dr7(number: int, kind: int, length: int) -> int:
    return 2 << 2 * number | (_LENGTHS[length] << 2 | kind) << 16 + 4 * number


def go_on(twins: Twins, insns: int, steps: Sequence[int] = STEPS) -> list[Stop]:
    """Run, past watchpoints and breakpoints; returns the stops."""
    end = twins.reference.clock.icount + insns
    stops: list[Stop] = []
    while (left := end - twins.reference.clock.icount) > 0:
        stop = twins.run(left, steps)
        if stop is None:
            break
        stops.append(stop)
        if stop.kind is StopKind.BREAKPOINT:
            twins.each(lambda bare: bare.engine.step())
            twins.check()
        elif stop.kind is not StopKind.WATCHPOINT:
            break
    return stops


NEIGHBOURS = f"""
    1: inc ecx
    mov [{DATA:#x}], ecx
    mov eax, [{DATA + 4:#x}]
    add [{DATA + 8:#x}], ecx
    add ebx, [{DATA + 0xC:#x}]
    mov byte ptr [{DATA + 0xB:#x}], cl
    test byte ptr [{DATA + 7:#x}], 1
    mov [{DATA + 0x1000:#x}], ebx
    push dword ptr [{DATA + 8:#x}]
    pop dword ptr [{DATA + 0xC:#x}]
    jmp 1b
"""


class TestWatchpoints:
    @EACH_KIND
    @pytest.mark.parametrize(("offset", "length"), [(0, 4), (3, 1), (7, 2), (0xA, 4), (0xFFC, 8)])
    def test_beside_other_variables(self, offset: int, length: int, *, on_read: bool, on_write: bool) -> None:
        with Twins(NEIGHBOURS) as twins:
            twins.run(100)
            watch(twins, Watchpoint(DATA + offset, length, on_read=on_read, on_write=on_write))
            stops = go_on(twins, 1000)
            assert (len(stops) > 80) == (on_write or offset in (7, 0xA))
            watch(twins)
            assert twins.run(1000, STEPS) is None

    @EACH_KIND
    def test_a_physical_one_under_another_address(self, *, on_read: bool, on_write: bool) -> None:
        def prepare(bare: Bare) -> None:
            map_low_memory(bare)
            set_page(bare, DATA, 0x5_0007)

        with Twins(NEIGHBOURS, prepare) as twins:
            twins.run(100)
            watch(twins, Watchpoint(0x5_0008, 4, on_read=on_read, on_write=on_write, physical=True))
            assert len(go_on(twins, 500)) > 40
            watch(twins, Watchpoint(DATA + 8, 4, on_read=on_read, on_write=on_write, physical=True))
            assert twins.run(500, STEPS) is None

    def test_one_for_another_address_space(self) -> None:
        with Twins(NEIGHBOURS, map_low_memory) as twins:
            watch(twins, Watchpoint(DATA, 4, on_read=True, on_write=True, cr3=0x5000))
            assert twins.run(500, STEPS) is None

    @EACH_KIND
    def test_the_stack(self, *, on_read: bool, on_write: bool) -> None:
        source = (
            "1: inc ecx\npush ecx\ncall 2f\npop edx\nadd ebx, edx\njmp 1b\n2: push ebx\ncall 3f\npop ebx\nret\n3: ret"
        )
        with Twins(source) as twins:
            watch(twins, Watchpoint(STACK_TOP - 12, 4, on_read=on_read, on_write=on_write))
            assert len(go_on(twins, 1100)) > 90
            watch(twins, Watchpoint(STACK_TOP - 16, 4, on_read=on_read, on_write=on_write))
            assert len(go_on(twins, 1100)) > 90

    @EACH_KIND
    @pytest.mark.parametrize("backwards", [False, True])
    @pytest.mark.parametrize(
        "operation", ["rep movsd", "rep movsb", "rep stosw", "rep lodsd", "repe cmpsb", "repne scasw"]
    )
    def test_iterations_of_a_rep(self, operation: str, *, backwards: bool, on_read: bool, on_write: bool) -> None:
        """Each stop is after the iteration that touched it, and the icount stands still until the last one is done."""

        def prepare(bare: Bare) -> None:
            size = {"b": 1, "w": 2, "d": 4}[operation[-1]]
            bare.state.gpr[ECX] = 5000
            start = 4999 * size if backwards else 0
            bare.state.gpr[ESI], bare.state.gpr[EDI] = DATA + start, DATA + 0x2_0000 + start
            bare.state.gpr[EAX] = 0x1234 if "scas" in operation else 0

        with Twins(f"{'std' if backwards else 'cld'}\nnop\n{operation}\nhlt", prepare) as twins:
            watch(
                twins,
                Watchpoint(DATA + 0xFFD, 6, on_read=on_read, on_write=on_write),
                Watchpoint(DATA + 0x2_0FFD, 6, on_read=on_read, on_write=on_write),
            )
            stops = go_on(twins, 100)
            assert stops.pop().kind is StopKind.HALTED
            writes, reads = operation[-5:-1] in ("movs", "stos"), "stos" not in operation
            assert bool(stops) == ((on_read and reads) or (on_write and writes))
            if "movsb" in operation:
                assert len(stops) == 6

    @EACH_KIND
    @pytest.mark.parametrize(
        "address", [STACK_TOP - 4, STACK_TOP - 12, IDT_BASE + 8 * 0x80, GDT_BASE + 0x10, DATA], ids=hex
    )
    def test_what_the_processor_itself_reads_and_writes(self, address: int, *, on_read: bool, on_write: bool) -> None:
        def prepare(bare: Bare) -> None:
            set_handler(bare, 0x80, assemble("inc ebx\npush ds\npop ds\niretd"))
            bare.memory.store(DATA, 4, 0x10)

        with Twins(f"1: inc ecx\nsti\nint 0x80\npushfd\npopfd\nmov fs, [{DATA:#x}]\ncli\njmp 1b", prepare) as twins:
            watch(twins, Watchpoint(address, 4, on_read=on_read, on_write=on_write))
            go_on(twins, 600)

    def test_they_come_and_go(self) -> None:
        chance = random.Random(1)
        with Twins(NEIGHBOURS, map_low_memory) as twins:
            for _ in range(60):
                kind = chance.choice(KINDS)
                count = chance.randrange(4)
                addresses = [chance.choice((DATA, PAGE_TABLE, ORIGIN, STACK_TOP - 16)) for _ in range(count)]
                watch(
                    twins,
                    *(
                        Watchpoint(
                            address + chance.randrange(16),
                            chance.choice((1, 2, 4, 8)),
                            on_read=kind[0],
                            on_write=kind[1],
                            physical=chance.random() < 0.3,
                        )
                        for address in addresses
                    ),
                )
                if chance.random() < 0.3:
                    place = CodeBreakpoint(ORIGIN + chance.choice((0, 1, 12)))
                    stop_at(twins, place)
                go_on(twins, chance.randrange(1, 300))

    def test_code_in_a_page_that_cannot_be_read(self) -> None:
        """It runs, and a change of its mapping is seen all the same."""

        def prepare(bare: Bare) -> None:
            map_low_memory(bare)
            bare.memory.write(0x5_0000, assemble("add ebx, 3\nret", origin=DATA).ljust(64, b"\x90") + b"\1\0\0\0")
            bare.memory.write(0x5_1000, assemble("sub edx, ebx\nret", origin=DATA).ljust(64, b"\x90") + b"\2\0\0\0")

        source = f"""
            mov esi, {DATA:#x}
            1: inc ecx
            mov eax, ecx
            and eax, 1
            shl eax, 12
            add eax, 0x50007
            mov [{PAGE_TABLE + 4 * (DATA >> 12):#x}], eax
            call esi
            add edi, [esi + 64]
            call esi
            jmp 1b
        """
        with Twins(source, prepare) as twins:
            watch(twins, Watchpoint(DATA + 0x80, 4, on_read=True, on_write=True))
            assert twins.run(2000, STEPS) is None
            watch(twins, Watchpoint(DATA + 0x40, 4, on_read=True, on_write=True))
            assert len(go_on(twins, 500)) > 30

    def test_most_of_it_runs_as_emitted_code(self) -> None:
        source = (
            f"1: inc ecx\nadd eax, ecx\nmov [{DATA:#x}], eax\ncmp ecx, 5000\njne 1b\nmov [{DATA + 0x1000:#x}], eax\nhlt"
        )
        with Twins(source) as twins:
            watch(twins, Watchpoint(DATA + 0x1000, 4, on_read=False, on_write=True))
            stop = twins.run(100_000)
            assert stop is not None
            assert (stop.kind, stop.linear) == (StopKind.WATCHPOINT, DATA + 0x1000)
            assert twins.count("faults interpreted") == 1


def count_traps(bare: Bare) -> None:
    """A handler of #DB that counts in EBX and sets RF, so that an instruction breakpoint does not hit again."""
    handler = "inc ebx\nor dword ptr [esp + 8], 0x10000\niretd"
    set_handler(bare, Vector.DB, assemble(handler))


class TestDebugRegisters:
    @pytest.mark.parametrize("kind", [_WRITE, _ACCESS])
    @pytest.mark.parametrize(("offset", "length"), [(0, 4), (2, 2), (7, 1), (8, 4), (0x20, 4)])
    def test_data(self, kind: int, offset: int, length: int) -> None:
        def prepare(bare: Bare) -> None:
            count_traps(bare)
            bare.state.dr[1], bare.state.dr[7] = DATA + offset, dr7(1, kind, length)

        with Twins(NEIGHBOURS.replace("ebx", "edx"), prepare) as twins:
            twins.run(2000, STEPS)
            hits = twins.reference.state.gpr[EBX]
            assert (hits > 100) == (offset < 0x20 and (kind == _ACCESS or offset != 7))

    @pytest.mark.parametrize("offset", range(14))
    def test_instructions(self, offset: int) -> None:
        def prepare(bare: Bare) -> None:
            count_traps(bare)
            bare.state.dr[2], bare.state.dr[7] = ORIGIN + offset, 2 << 4

        with Twins(
            "1: inc ecx\nadd eax, ecx\nxor edx, eax\npush eax\npop edi\nloop 2f\n2: nop\njmp 1b", prepare
        ) as twins:
            twins.run(1000, STEPS)

    def test_an_instruction_that_is_translated_already(self) -> None:
        def stop(bare: Bare) -> None:
            bare.state.dr[0], bare.state.dr[7] = ORIGIN + 3, 2

        def go(bare: Bare) -> None:
            bare.state.dr[7] = 0

        with Twins("1: inc ecx\nadd eax, ecx\nxor edx, eax\njmp 1b", count_traps) as twins:
            for turn in range(1, 4):
                twins.run(400)
                twins.each(stop)
                twins.run(400, STEPS)
                assert twins.reference.state.gpr[EBX] > 50 * turn
                twins.each(go)

    def test_a_write_held_off_by_mov_ss(self) -> None:
        def prepare(bare: Bare) -> None:
            count_traps(bare)
            bare.memory.store(DATA, 4, 0x10)
            bare.state.dr[0], bare.state.dr[7] = DATA, dr7(0, _ACCESS, 4)

        source = f"1: inc ecx\nmov ss, [{DATA:#x}]\nmov eax, [{DATA:#x}]\nnop\nmov ss, [{DATA:#x}]\nint 3\nnop\njmp 1b"

        def resume(bare: Bare) -> None:
            prepare(bare)
            set_handler(bare, Vector.BP, b"\xcf")

        with Twins(source, resume) as twins:
            twins.run(2000, STEPS)
            assert twins.reference.state.gpr[EBX] > 100

    @pytest.mark.parametrize("operation", ["rep movsd", "rep stosb", "repe cmpsd", "repne scasb"])
    def test_iterations_of_a_rep(self, operation: str) -> None:
        def prepare(bare: Bare) -> None:
            count_traps(bare)
            bare.state.gpr[ECX], bare.state.gpr[ESI], bare.state.gpr[EDI] = 3000, DATA, DATA + 0x1_0000
            bare.state.gpr[EAX] = 1 if "scas" in operation else 0
            bare.state.dr[0] = DATA + 0x1_0404
            bare.state.dr[7] = dr7(0, _ACCESS, 4)

        with Twins(f"nop\n{operation}\nhlt", prepare) as twins:
            assert twins.run(100, (40,)) == Stop(StopKind.HALTED)
            assert twins.reference.state.gpr[EBX] == (4 if operation.endswith("b") else 1)

    def test_the_guest_changes_them_all_the_time(self) -> None:
        source = f"""
            1: inc ecx
            mov eax, ecx
            and eax, 7
            lea eax, [eax * 4 + {DATA:#x}]
            mov dr0, eax
            mov eax, {dr7(0, _WRITE, 4):#x}
            test cl, 8
            jz 2f
            xor eax, eax
            2: mov dr7, eax
            mov [{DATA:#x}], ecx
            inc dword ptr [{DATA + 8:#x}]
            mov dword ptr [{DATA + 16:#x}], 5
            test cl, 3
            jnz 1b
            mov eax, offset 3f
            mov dr1, eax
            mov eax, 8
            mov dr7, eax
            nop
            3: inc edx
            jmp 1b
        """
        with Twins(source, count_traps) as twins:
            twins.run(6000, STEPS)
            assert twins.reference.state.gpr[EBX] > 100

    def test_together_with_watchpoints_and_a_step_flag(self) -> None:
        def prepare(bare: Bare) -> None:
            count_traps(bare)
            bare.state.dr[3], bare.state.dr[7] = DATA + 8, dr7(3, _WRITE, 4)

        source = NEIGHBOURS.replace("ebx", "edx").replace(
            "1: inc ecx", "1: inc ecx\npushfd\nxor dword ptr [esp], 0x100\npopfd"
        )
        with Twins(source, prepare) as twins:
            watch(twins, Watchpoint(DATA + 8, 4, on_read=True, on_write=True))
            stops = go_on(twins, 1500)
            assert len(stops) > 100
            assert twins.reference.state.gpr[EBX] > 300


@st.composite
def watches(draw: st.DrawFn) -> tuple[list[Watchpoint], int, list[int]]:
    """Watchpoints and debug registers on the sandbox of random programs."""
    address = st.integers(0, SANDBOX_PAGES * 0x1000 - 1).map(lambda offset: SANDBOX + offset)
    edges = st.integers(1, SANDBOX_PAGES).map(lambda page: SANDBOX + 0x1000 * page - 2)
    places = draw(st.lists(st.one_of(address, edges), min_size=1, max_size=3))
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=3, max_size=3))
    length = draw(st.sampled_from((1, 4, 0x800)))
    found = [
        Watchpoint(place, length, on_read=kind[0], on_write=kind[1]) for place, kind in zip(places, kinds, strict=False)
    ]
    return found, draw(st.sampled_from((0, 0, dr7(0, _WRITE, 4), dr7(0, _ACCESS, 1), 2))), places


@given(programs(), watches())
@settings(max_examples=60)
def test_random_programs(program: Program, wanted: tuple[list[Watchpoint], int, list[int]]) -> None:
    watchpoints, control, places = wanted

    def prepare(bare: Bare) -> None:
        program.prepare(bare)
        bare.state.dr[0], bare.state.dr[7] = places[-1], control

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vmm.bt.MIN_BUDGET_INSNS", 1)
        with Twins("hlt", prepare) as twins:
            watch(twins, *watchpoints)
            go_on(twins, 200, (5, 1, 40, 2, 13))


def test_the_stack_pointer_stays_right_when_a_push_is_watched() -> None:
    with Twins(f"mov esp, {DATA + 0x100:#x}\n1: push eax\npop ebx\npushad\npopad\njmp 1b") as twins:
        watch(twins, Watchpoint(DATA + 0xFC, 4, on_read=False, on_write=True))
        assert len(go_on(twins, 300)) > 60
        assert twins.reference.state.gpr[ESP] in (DATA + 0x100, DATA + 0xFC, DATA + 0xE0)
