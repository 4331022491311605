"""Exceptions that `bt` delivers without leaving the TC, against `interp`: page faults and divide errors, both rings."""

from __future__ import annotations

import random
from functools import cache

import pytest

from machine.debug import CodeBreakpoint, StopKind, Watchpoint
from machine.faults import Vector
from machine.flags import IF
from machine.state import CR0_WP, CR4_PAE, CR4_PSE
from tests.oracles.assembler import assemble
from tests.vmm import rings
from tests.vmm.bare import (
    IDT_BASE,
    LONG_HANDLER_BYTES,
    LONG_HANDLERS,
    PAGE_DIRECTORY,
    PAGE_TABLE,
    STACK_TOP,
    Bare,
    map_low_memory,
    set_handler,
    set_page,
)
from tests.vmm.rings import (
    COUNTER,
    GDT,
    HOLE,
    KERNEL_CODE,
    KERNEL_DATA,
    KERNEL_STACK,
    SLOT_BYTES,
    SLOTS,
    USER_CODE,
    USER_DATA,
    USER_STACK,
)
from tests.vmm.test_bt_floating import floating
from tests.vmm.test_bt_system import Timer
from tests.vmm.twins import Twins
from vmm.native.inspection import Inspectable

READ_ONLY = 0x3_2000
SUPERVISOR = 0x3_4000
CHANGING = 0x3_6000  # what its entry says changes all the time
FAR = 0x40_0000  # a large page, then one with a reserved bit, then no table at all
PAGE_FAULTS = 0x1_4000
STACK_PAGE = STACK_TOP - 0x1000
SLOT_COUNT = 40
GATE = IDT_BASE + 8 * 14


@pytest.fixture(autouse=True)
def known_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A place where an exception came is known from the first one on, and any budget is worth it."""
    monkeypatch.setattr("vmm.native.faultsites.SITE_FAULTS", 1)
    monkeypatch.setattr("vmm.bt.MIN_BUDGET_INSNS", 1)


def place(chance: random.Random) -> int:
    """An address that an access may fault at."""
    page = chance.choice((HOLE, HOLE, READ_ONLY, SUPERVISOR, CHANGING, CHANGING, FAR, FAR + 0x40_0000, FAR + 0x80_0000))
    return page + chance.choice((0, 0, 1, 3, 4, 12, 16, 0x123, 0xFFC, 0xFFE, -1, -2, -4))


def slot(chance: random.Random, address: int) -> str:
    """The source of one slot."""
    pick, at = chance.choice, place(chance)
    following = address + SLOT_BYTES
    entry = PAGE_TABLE + 4 * (CHANGING >> 12)
    return pick(
        (
            f"mov eax, [{at}]",
            f"mov [{at}], ecx",
            f"mov ebx, {at}; mov [ebx], cl; inc esi",
            f"mov ebx, {at}; add [ebx], esi; inc esi",
            f"mov ebx, {at}; cmp esi, [ebx]; pushfd; pop edx",
            f"mov ebx, {at}; movzx edx, word ptr [ebx]; inc esi",
            f"add esi, eax; push eax; push dword ptr [{at}]; pop ecx",
            f"push esi; pop dword ptr [{at}]; inc edx",
            f"push esi; mov ebp, [{at}]; pop ebp",
            f"mov ebx, {at}; xchg [ebx], ecx",
            f"mov ebx, {HOLE + at % 4096}; jmp dword ptr [ebx-1]",
            f"mov edi, {at}; mov ecx, 9; rep stosb",
            f"mov edi, {at - 20}; push 9; pop ecx; rep stosd; adc ebx, ecx",
            f"std; mov edi, {at + 20}; push 9; pop ecx; rep stosd; cld",
            f"mov esi, {at}; lodsd; add edi, eax",
            f"mov esi, {at - 6}; push 5; pop ecx; rep lodsw; inc esi",
            f"sti; mov eax, [{at}]; inc esi",
            f"std; mov ebp, {at}; sub edx, [ebp]; cld",
            "xor ecx, ecx; div ecx; inc esi",
            "mov ecx, 0; add eax, ecx; idiv cx; inc esi",
            "stc; mov edx, 3; mov ecx, 2; div ecx; inc edi",
            "push eax; push 0; div dword ptr [esp]; pop ecx",
            "push esi; xor ecx, ecx; stc; div ecx; pop ecx",
            "mov edx, esi; and edx, 7; push 4; pop ecx; div ecx; adc edi, 1",
            "cdq; push 3; pop ecx; and ecx, esi; idiv ecx; adc edi, 1",
            "push 2; pop edx; xor ecx, ecx; dec ecx; idiv ecx; adc edi, 1",
            f"mov eax, {pick((0, CHANGING | 7, CHANGING | 0x67, CHANGING | 5, CHANGING | 0x63))}; mov [{entry}], eax",
            f"xor byte ptr [{entry}], {pick((1, 2, 4, 0x20, 0x40))}",
            f"mov eax, cr0; xor eax, {CR0_WP}; mov cr0, eax",
            "mov eax, cr2; mov ebp, eax",
            "mov eax, cr3; mov cr3, eax",
            # The gate of #PF: its P bit, trap or interrupt.
            f"xor byte ptr [{GATE + 5}], {pick((0x80, 1, 1, 1))}",
            f"mov dword ptr [{GATE + 4}], {0x10000 | 0x8E00}",
            f"mov word ptr [{IDT_BASE + 4}], {pick((0x8E00, 0x8F00, 0xEF00, 0x8E00))}",
            f"push 2; push {USER_CODE}; push {following}; iretd",
            f"push {IF | 2}; push {KERNEL_CODE}; push {following}; iretd",
            f"push {0x1_0002}; push {KERNEL_CODE}; push {following}; iretd",
            f"push {pick((2, IF | 2, 0x102, 0x4002, 0x4_0002, 0x3202))}; popfd; nop",
            "cli",
            "int 0x90",
            f"mov eax, {chance.randrange(1, 60)}; out 0x50, al",
            f"mov eax, {USER_DATA}; mov ds, ax; mov es, ax",
            f"mov eax, {KERNEL_DATA}; mov ss, ax; mov eax, [{at}]",
            f"mov dword ptr [{GDT + 8 + 4}], {pick((0x00CF9B00, 0x00CF9B00, 0x00CF9A00))}",
        )
    )


# From the last slot to the first one again, with a stack and segments of the ring that it is.
_AGAIN = f"""
    mov ecx, cs
    test cl, 3
    mov eax, {USER_DATA}
    mov ds, ax
    mov es, ax
    mov esp, {USER_STACK}
    jnz {SLOTS}
    mov esp, {KERNEL_STACK - 0x300}
    mov eax, {KERNEL_DATA}
    mov ss, ax
    jmp {SLOTS}
"""


# The counter of `rings` has more room behind it. DS is whatever the guest has loaded.
_PAGE_FAULT = f"""
    push eax
    mov eax, cr2
    rol eax, 8
    add eax, [esp+4]
    add ss:[{COUNTER + 0x40}], eax
    rol dword ptr ss:[{COUNTER + 0x40}], 5
    pop eax
    add esp, 4
    push eax
    mov eax, [esp+4]
    or eax, {SLOT_BYTES - 1}
    inc eax
    mov [esp+4], eax
    and dword ptr [esp+12], 0xffffbeff
    pop eax
    iretd
"""


@cache
def random_slots(seed: int) -> bytes:
    chance = random.Random(seed)
    sources = [slot(chance, SLOTS + SLOT_BYTES * number) for number in range(SLOT_COUNT)]
    code = assemble("\n.balign 16, 0x90\n".join([*sources, _AGAIN]), origin=SLOTS)
    assert len(code) > SLOT_COUNT * SLOT_BYTES
    return code


def prepare(bare: Bare, seed: int) -> None:
    Timer(bare)
    rings.install(bare, seed, random_slots(seed))
    memory, state = bare.memory, bare.state
    set_page(bare, READ_ONLY, READ_ONLY | 5)
    set_page(bare, SUPERVISOR, SUPERVISOR | 3)
    set_page(bare, CHANGING, 0)
    # #PF adds up error codes and addresses before it skips.
    memory.write(PAGE_FAULTS, assemble(_PAGE_FAULT, origin=PAGE_FAULTS))
    memory.store(GATE, 4, PAGE_FAULTS & 0xFFFF | KERNEL_CODE << 16)
    state.cr4 |= CR4_PSE * (seed % 3 > 0)
    memory.store(PAGE_DIRECTORY + 4 * (FAR >> 22), 4, 0x80 | (5 if seed % 2 else 7))
    memory.store(PAGE_DIRECTORY + 4 * (FAR + 0x40_0000 >> 22), 4, 0x2087)
    bare.cpu.mmu.flush()


def delivered(twins: Twins) -> int:
    return twins.count("faults delivered in the TC")


def check_counts(twins: Twins) -> None:
    """Both engines say how many exceptions there were."""
    counts = [side.engine.statistics() for side in (twins.reference, twins.other)]
    for name in {*counts[0], *counts[1]}:
        if name.startswith("exceptions"):
            assert counts[0].get(name) == counts[1].get(name), name


@pytest.mark.parametrize("signals_for_soft_fault", [8, 0])
@pytest.mark.parametrize("seed", range(24))
def test_random_slots(seed: int, signals_for_soft_fault: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmm.native.adaptation.SIGNALS_FOR_SOFT_FAULT", signals_for_soft_fault)
    with Twins("nop", lambda bare: prepare(bare, seed)) as twins:
        twins.run(6000, (1211, 1, 900, 40, 7))
        assert delivered(twins) > 10
        assert signals_for_soft_fault or twins.count("soft forms") > 3
        check_counts(twins)


def skips(bytes_: int, *, coded: bool = True, more: str = "") -> bytes:
    """A handler that goes on behind the instruction, and remembers CR2 and what was pushed."""
    drop = "add edi, [esp]\nadd esp, 4\n" if coded else ""
    source = (
        f"{drop}{more}\nadd edi, [esp+8]\nrol edi, 3\nmov esi, cr2\nadd edi, esi\nadd dword ptr [esp], {bytes_}\niretd"
    )
    return assemble(source)


def absent(bare: Bare) -> None:
    map_low_memory(bare)
    set_page(bare, HOLE, 0)


class TestPageFaults:
    READ = f"1: inc ecx\nmov eax, [{HOLE + 0x123}]\nadc ebx, ecx\njmp 1b"

    def prepare(self, bare: Bare) -> None:
        absent(bare)
        set_handler(bare, 14, skips(5))

    def test_they_are_delivered_by_emitted_code(self) -> None:
        with Twins(self.READ, self.prepare) as twins:
            twins.run(4000, (700, 33, 1))
            assert delivered(twins) > 350
            assert twins.count("callouts") < 30
            check_counts(twins)

    @pytest.mark.parametrize("offset", [0, 1, 15, 0xFFD])
    @pytest.mark.parametrize("around", [(0, 0), (7, 0), (7, 7), (0, 7)])
    def test_at_the_edges_of_a_page(self, offset: int, around: tuple[int, int]) -> None:
        """The page before is there or not, and the one behind: an access may begin in one and fault in the other."""

        def prepare(bare: Bare) -> None:
            self.prepare(bare)
            set_page(bare, HOLE - 4096, HOLE - 4096 | around[0] if around[0] else 0)
            set_page(bare, HOLE + 4096, HOLE + 4096 | around[1] if around[1] else 0)

        for at in (HOLE + offset, HOLE + offset - 4):
            with Twins(f"1: inc ecx\nmov eax, [{at}]\njmp 1b", prepare) as twins:
                twins.run(600, (70, 33, 1))
                check_counts(twins)

    def test_in_pae_mode(self) -> None:
        def prepare(bare: Bare) -> None:
            self.prepare(bare)
            memory, state = bare.memory, bare.state
            pointers, directory, table = 0x10_2000, 0x10_3000, 0x10_4000
            memory.write(pointers, (directory | 1).to_bytes(8, "little"))
            memory.write(directory, (table | 7).to_bytes(8, "little") + (0x20_0000 | 0x87).to_bytes(8, "little"))
            memory.write(table, b"".join((page << 12 | 7).to_bytes(8, "little") for page in range(512)))
            memory.write(table + 8 * (HOLE >> 12), bytes(8))
            state.cr3, state.cr4 = pointers, state.cr4 | CR4_PAE
            bare.cpu.mmu.flush()

        with Twins(self.READ, prepare) as twins:
            twins.run(2000, (700, 33, 1))
            assert delivered(twins) > 150

    def test_a_debugger_that_catches_them(self) -> None:
        with Twins(self.READ, self.prepare) as twins:
            twins.run(400)
            before = delivered(twins)
            twins.each(lambda bare: bare.debug.set_catches(frozenset({Vector.PF})))
            stop = twins.run(400)
            assert stop is not None
            assert stop.kind is StopKind.CATCH
            assert delivered(twins) == before
            twins.each(lambda bare: bare.debug.set_catches(frozenset()))
            assert twins.run(400) is None
            assert delivered(twins) > before

    def test_a_breakpoint_on_the_handler(self) -> None:
        with Twins(self.READ, self.prepare) as twins:
            twins.run(400)
            handler = LONG_HANDLERS + 14 * LONG_HANDLER_BYTES
            twins.each(lambda bare: bare.debug.set_breakpoints(frozenset({CodeBreakpoint(handler)})))
            stop = twins.run(400)
            assert stop is not None
            assert (stop.kind, stop.linear) == (StopKind.BREAKPOINT, handler)

    def test_a_handler_that_faults_for_ever(self) -> None:
        """Nothing retires; a stint ends all the same."""

        def prepare(bare: Bare) -> None:
            absent(bare)
            set_handler(bare, 14, assemble(f"mov eax, [{HOLE}]"))

        with Twins("mov eax, 1\n" + self.READ, prepare) as twins:
            for _ in range(3):
                for bare in (twins.reference, twins.other):
                    assert bare.engine.run(500).kind is StopKind.BUDGET
                    assert bare.clock.icount == 2
            assert twins.count("true faults") > 100

    @pytest.mark.parametrize("entry", [0, STACK_PAGE, STACK_PAGE | 3, STACK_PAGE | 1])
    def test_when_the_delivery_faults(self, entry: int) -> None:
        """The page of the stack goes while the guest runs, and with it all deliveries; or it is mapped anew."""

        def prepare(bare: Bare) -> None:
            self.prepare(bare)
            set_page(bare, STACK_TOP, 0)

        source = f"""
            mov ecx, 40
            1: mov eax, [{HOLE}]
            dec ecx
            jnz 1b
            mov dword ptr [{PAGE_TABLE + 4 * (STACK_PAGE >> 12)}], {entry}
            2: mov eax, [{HOLE}]
            jmp 2b
        """
        with Twins(source, prepare) as twins:
            stop = twins.run(1000, (100,))
            assert (stop and stop.kind) == (None if entry & 1 else StopKind.TRIPLE_FAULT)
            check_counts(twins)

    def test_a_watched_stack(self) -> None:
        with Twins(self.READ, self.prepare) as twins:
            twins.run(400)
            twins.each(
                lambda bare: bare.debug.set_watchpoints(
                    frozenset({Watchpoint(STACK_TOP - 12, 4, on_read=False, on_write=True)})
                )
            )
            stop = twins.run(400)
            assert stop is not None
            assert stop.kind is StopKind.WATCHPOINT

    def test_an_exception_leaves_rf_alone_but_in_the_image(self) -> None:
        """IRETD sets RF, and the instruction faults again: nothing has retired, and RF is clear in the handler."""
        handler = skips(
            0, more="btc dword ptr [0x3000], 0\njc 2f\nadd dword ptr [esp], 5\n2: pushfd\npop edx\nadd edi, edx"
        )

        def prepare(bare: Bare) -> None:
            absent(bare)
            set_handler(bare, 14, handler)

        with Twins(self.READ, prepare) as twins:
            twins.run(3000, (500, 33, 1))
            assert delivered(twins) > 100
            place = CodeBreakpoint(LONG_HANDLERS + 14 * LONG_HANDLER_BYTES)
            twins.each(lambda bare: bare.debug.set_breakpoints(frozenset({place})))
            for _ in range(8):
                twins.each(lambda bare: bare.engine.run(1 << 40, skip_breakpoint=True))
                twins.check()

    @pytest.mark.parametrize("string", ["stosb", "stosd", "rep stosw", "rep stosd", "lodsd", "rep lodsb"])
    @pytest.mark.parametrize("direction", ["cld", "std"])
    def test_strings(self, string: str, direction: str) -> None:
        """A REP faults after some iterations, which stay done."""
        first = HOLE - 14 if direction == "cld" else HOLE + 4096 + 14
        source = f"""
            {direction}
            1: mov esi, {first}
            mov edi, {first - 2}
            mov ecx, 21
            {string}
            add ebx, edi
            sub ebx, esi
            jmp 1b
        """

        def prepare(bare: Bare) -> None:
            absent(bare)
            end = f"add dword ptr [esp], {2 if 'rep' in string else 1}"
            if "w" in string:
                end = end.replace("2", "3")
            set_handler(bare, 14, assemble(f"add esp, 4\nadd ebx, ecx\nrol ebx, 3\n{end}\niretd"))

        with Twins(source, prepare) as twins:
            twins.run(3000, (700, 33, 1))
            check_counts(twins)
            assert delivered(twins) > 50 or "rep" not in string


class TestDivideErrors:
    @pytest.mark.parametrize("division", ["div", "idiv"])
    @pytest.mark.parametrize("divisor", ["ecx", "ebp", "esi", "eax", "edx"])
    def test_a_division_that_looks_at_its_divisor(
        self, division: str, divisor: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With quotients that fit and some that do not; the flags are those of the division."""
        monkeypatch.setattr("vmm.native.adaptation.SIGNALS_FOR_SOFT_FAULT", 0)
        source = f"""
            mov edi, 1
            1: imul edi, edi, 1103515245
            add edi, 12345
            mov edx, edi
            sar edx, 28
            mov eax, edi
            mov {divisor}, edi
            shr {divisor}, 5
            and {divisor}, 15
            cmp edi, 0
            {division} {divisor}
            pushfd
            pop ebx
            add edi, ebx
            jmp 1b
        """

        def prepare(bare: Bare) -> None:
            map_low_memory(bare)
            set_handler(bare, 0, assemble("add dword ptr [esp], 2\niretd"))

        with Twins(source, prepare) as twins:
            twins.run(6000, (1500, 333))
            assert delivered(twins) > 20
            assert twins.count("soft forms") == 1
            check_counts(twins)

    SOURCE = "xor ecx, ecx\n1: inc ebx\nmov eax, ebx\ndiv ecx\nadd esi, edx\njmp 1b"

    def prepare(self, bare: Bare) -> None:
        set_handler(bare, 0, skips(2, coded=False))

    @pytest.mark.parametrize("gate", [0x8E00, 0x8F00, 0xEE00, 0x0E00, 0x8600, 0x8500])
    def test_gates(self, gate: int) -> None:
        """Interrupt and trap gates, of any DPL; not present, of 16 bits, a task gate."""

        def prepare(bare: Bare) -> None:
            self.prepare(bare)
            bare.memory.store(IDT_BASE + 4, 4, bare.memory.load(IDT_BASE + 4, 4) & 0xFFFF_0000 | gate)

        with Twins(self.SOURCE, prepare) as twins:
            twins.run(2000, (500, 33, 1))
            assert bool(delivered(twins)) == (gate in (0x8E00, 0x8F00, 0xEE00))

    def test_the_idt_has_no_entry(self) -> None:
        def prepare(bare: Bare) -> None:
            self.prepare(bare)
            bare.state.idtr.limit = 6

        with Twins(self.SOURCE, prepare) as twins:
            stop = twins.run(100)
            assert stop is not None
            assert stop.kind is StopKind.TRIPLE_FAULT

    @pytest.mark.parametrize("gate", [0x8E00, 0x8F00])
    @pytest.mark.parametrize("offset", range(9))
    def test_interrupts_around_it(self, gate: int, offset: int) -> None:
        """They come due before the instruction, while it faults, and in the handler."""

        def prepare(bare: Bare) -> None:
            Timer(bare)
            self.prepare(bare)
            bare.memory.store(IDT_BASE + 4, 4, bare.memory.load(IDT_BASE + 4, 4) & 0xFFFF_0000 | gate)
            set_handler(bare, 0x20, assemble("add ebp, [esp]\nrol ebp, 5\niretd"))

        source = f"""
            xor ecx, ecx
            sti
            1: mov eax, {20 + offset}
            out 0x50, al
            mov edx, 9
            2: inc ebx
            div ecx
            dec edx
            jnz 2b
            jmp 1b
        """
        with Twins(source, prepare) as twins:
            twins.run(3000, (1000,))
            assert delivered(twins) > 100
            assert (
                twins.reference.engine.statistics()["interrupts"] == twins.other.engine.statistics()["interrupts"] != 0
            )

    def test_a_place_is_forgotten_with_its_code(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The cache is emptied where a debugger has caught the exception of a soft form."""
        monkeypatch.setattr("vmm.native.adaptation.SIGNALS_FOR_SOFT_FAULT", 0)
        with Twins(self.SOURCE, self.prepare) as twins:
            twins.run(500)
            assert twins.count("soft forms") == 1
            twins.each(lambda bare: bare.debug.set_catches(frozenset({Vector.DE})))
            stop = twins.run(100)
            assert stop is not None
            assert stop.kind is StopKind.CATCH
            engine = twins.other.engine
            assert isinstance(engine, Inspectable)
            engine.flush_translations()
            before = twins.count("fault sites")
            twins.each(lambda bare: bare.engine.step(deliver_caught=True))
            assert twins.count("fault sites") == before
            twins.each(lambda bare: bare.debug.set_catches(frozenset()))
            twins.run(500)

    def test_it_is_counted_by_bt_when_another_engine_takes_over(self) -> None:
        with Twins(self.SOURCE, self.prepare) as twins:
            twins.run(500)
            engine = twins.other.engine
            before = engine.statistics()["exceptions #DE"]
            engine.leave()
            assert engine.statistics()["exceptions #DE"] == before
            engine.enter()
            twins.run(500)
            check_counts(twins)
            assert delivered(twins) > 40


@pytest.mark.parametrize(
    "faulting", [f"mov eax, [{HOLE + 0x20}]", f"mov ebx, [{HOLE + 0x20}]\nfld1\nfstp st(0)"], ids=["behind", "before"]
)
def test_x87_pointers_around_a_page_fault(faulting: str) -> None:
    """They are stored before the handler looks, where the fault comes between x87 instructions."""

    def prepare(bare: Bare) -> None:
        floating(bare)
        map_low_memory(bare)
        set_page(bare, HOLE, 0)
        skip = "fnstenv [0x3_0000]\nadd esp, 4\nadd edi, [0x3_000C]\nrol edi, 3\nadd edi, [0x3_0014]\n"
        length = 5 if faulting.startswith("mov eax") else 6
        set_handler(bare, 14, assemble(f"{skip}add dword ptr [esp], {length}\niretd".replace("_", "")))

    source = (
        f"1: fninit\nfld dword ptr [0x30100]\nfmul dword ptr [0x30104]\n{faulting}\nfstp dword ptr [0x30108]\njmp 1b"
    )
    with Twins(source, prepare) as twins:
        twins.run(3000, (700, 33, 1))
        check_counts(twins)
        assert twins.count("true faults") > 100
