"""`bt` with floating point: when the guest's registers are in the host's, what is refused, how errors show.

The same under `trap`.
"""

from __future__ import annotations

import pytest

from machine.cpuid import P6_NO_FPU
from machine.debug import StopKind
from machine.faults import Vector
from machine.fpustate import FDP, FIP
from machine.state import CR0_NE, CR4_OSFXSR, CR4_OSXMMEXCPT, EAX, ECX, EDI, FS, GS, MASK32
from tests.oracles.assembler import assemble
from tests.vmm.bare import ORIGIN, Bare, map_low_memory, set_handler, set_page
from tests.vmm.float_streams import give_fpu
from tests.vmm.twins import Twins
from vmm.bt import BinaryTranslator
from vmm.native import stateblock

pytestmark = pytest.mark.usefixtures("other_engine")

DATA = 0x2_0000
HIDDEN = 0x3_0000


@pytest.fixture(autouse=True)
def _enter_for_every_instruction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmm.bt.MIN_BUDGET_INSNS", 1)


def floating(bare: Bare) -> None:
    """An FPU and SSE that may be used, paging with a page that is not there, and numbers at DATA."""
    give_fpu(bare)
    map_low_memory(bare)
    set_page(bare, HIDDEN, 0)
    bare.state.cr0 |= CR0_NE
    bare.state.cr4 |= CR4_OSFXSR | CR4_OSXMMEXCPT
    bare.state.fpu.initialize()
    bare.memory.write(DATA, b"".join((0x3FF0_0000_0000_0000 + (n << 50)).to_bytes(8, "little") for n in range(64)))


def live(twins: Twins) -> int:
    """What the state block says of the registers."""
    engine = twins.other.engine
    assert isinstance(engine, BinaryTranslator)
    assert engine._tc is not None
    value: int = engine._tc.state.quads[stateblock.FPU_LIVE]
    return value


def skipping(length: int) -> bytes:
    """A handler without error code that goes on behind an instruction of so many bytes."""
    return assemble(f"add dword ptr [esp], {length}\niretd")


LOOP = f"""
    mov ecx, 500
1:  fld qword ptr [{DATA}+8]
    fmul qword ptr [{DATA}+16]
    faddp
    fst qword ptr [{DATA}+0x100]
    movsd xmm0, [{DATA}+24]
    addsd xmm0, xmm1
    sqrtpd xmm1, xmm0
    movq mm3, [{DATA}]
    paddd mm3, mm2
    emms
    fldz
    fcomip st, st(1)
    ja 2f
    fldz
2:  cvtsi2sd xmm4, ecx
    cvttsd2si eax, xmm4
    fnstcw [{DATA}+0x200]
    fldcw [{DATA}+0x200]
    dec ecx
    jnz 1b
    hlt
"""


def test_it_runs_without_leaving_the_cache() -> None:
    with Twins(LOOP, floating) as twins:
        twins.run(3000, (700,))
        assert live(twins)
        before = twins.count("callouts")
        twins.run(4000)
        assert twins.count("callouts") == before
        assert twins.reference.state.fpu.words[FIP // 4]


def test_nothing_is_swapped_without_floating_point_code() -> None:
    source = f"1: inc eax\ncmp eax, 100\njne 1b\njmp 2f\n2: fld qword ptr [{DATA}]\nhlt"
    with Twins(source, floating) as twins:
        twins.run(200)
        assert not live(twins)
        twins.run(110)
        assert live(twins)


def test_a_cpu_without_fpu_has_none_natively() -> None:
    def without(bare: Bare) -> None:
        floating(bare)
        bare.cpu.model = P6_NO_FPU

    with Twins("1: fwait\nfld1\ninc eax\njmp 1b", without) as twins:
        twins.run(100)
        assert not live(twins)
        assert twins.count("callouts") > 40


class TestPointers:
    """What FNSTENV would show, after a fault in the middle of a TU; each run ends with the handler of #PF."""

    @pytest.mark.parametrize(
        ("source", "last", "operand"),
        [
            (f"fld qword ptr [{DATA}+8]\nmov eax, [{HIDDEN}]", 0, DATA + 8),
            (f"fld qword ptr [{DATA}+8]\nfld1\nmov eax, [{HIDDEN}]", 1, DATA + 8),
            (f"fld qword ptr [{DATA}+8]\nfadd qword ptr [{HIDDEN}]", 0, DATA + 8),
            (f"fld1\nfst qword ptr [{DATA}+24]\nfld1\nmov [{HIDDEN}], eax", 2, DATA + 24),
            (f"mov ecx, {DATA}\nfld qword ptr [ecx+8]\nadd ecx, 8\nfld1\nmov eax, [{HIDDEN}]", 3, DATA + 8),
            (f"mov ecx, {DATA}\nfld qword ptr [ecx+8]\nmov cl, 9\nmov eax, [{HIDDEN}]", 1, DATA + 8),
            (f"mov ecx, {DATA}\nfld qword ptr [ecx+8]\ninc ecx\nsub ecx, 300\nmov eax, [{HIDDEN}]", 1, DATA + 8),
            (f"xor eax, eax\nfld qword ptr [{DATA}+16]\njz .+3\nnop\nmov eax, [{HIDDEN}]", 1, DATA + 16),
            (f"xor eax, eax\nfld qword ptr [{DATA}+16]\njnz .+3\nnop\nmov eax, [{HIDDEN}]", 1, DATA + 16),
            (f"mov ecx, {DATA}\nfld qword ptr [ecx]\nadd ecx, 8\njnz .+3\nnop\nmov eax, [{HIDDEN}]", 1, DATA),
            (f"mov eax, {DATA}\nfld qword ptr [eax]\nfnstsw ax\nfld1\nmov eax, [{HIDDEN}]", 3, DATA),
            (f"mov edx, 4\nmov ecx, {DATA}\nfld qword ptr [ecx+edx*8+8]\nmov eax, [{HIDDEN}]", 2, DATA + 40),
            (f"push {DATA}\nfld dword ptr [esp]\npush eax\nmov eax, [{HIDDEN}]", 1, 0x7FFC),
            (f"fld qword ptr [{DATA}]\njmp .+2\nfld1\nmov eax, [{HIDDEN}]", 2, DATA),
        ],
    )
    def test_after_a_page_fault(self, source: str, last: int, operand: int) -> None:
        with Twins(source, floating) as twins:
            before = assemble("\n".join(["nop", *source.split("\n")[:last]]))
            twins.run(40)
            fpu = twins.other.state.fpu
            assert (fpu.words[FIP // 4], fpu.words[FDP // 4]) == (ORIGIN + len(before) - 1, operand)

    def test_after_every_instruction(self) -> None:
        with Twins(LOOP, floating) as twins:
            twins.run(300, (1, 2, 3, 5, 7))

    def test_areas_show_them(self) -> None:
        source = f"""
        1:  fld qword ptr [{DATA}+8]
            fnstenv [{DATA}+0x200]
            fldpi
            fnsave [{DATA}+0x300]
            frstor [{DATA}+0x300]
            fldenv [{DATA}+0x200]
            movaps [{DATA}+0x400], xmm1
            fst dword ptr [{DATA}+0x404]
            fxsave [{DATA}+0x500]
            addps xmm1, [{DATA}+0x400]
            fxrstor [{DATA}+0x500]
            fninit
            jmp 1b
        """
        with Twins(source, floating) as twins:
            twins.run(300, (7, 30))


class TestRights:
    def test_a_kernel_switches_lazily(self) -> None:
        """#NM clears TS; the code sets it again and again, as a switch of tasks does."""
        source = f"""
        1:  fld qword ptr [{DATA}]
            addps xmm0, xmm1
            fstp qword ptr [{DATA}+8]
            mov eax, cr0
            or eax, 8
            mov cr0, eax
            movaps xmm2, xmm0
            fwait
            jmp 1b
        """

        def prepare(bare: Bare) -> None:
            floating(bare)
            set_handler(bare, Vector.NM, assemble("clts\niretd"))

        with Twins(source, prepare) as twins:
            twins.run(500, (40, 3))
            assert twins.count("exceptions #NM") > 30

    @pytest.mark.parametrize(("cr0", "cr4", "vector"), [(8, CR4_OSFXSR, 7), (4, CR4_OSFXSR, 6), (0, 0, 6)])
    def test_sse_is_refused(self, cr0: int, cr4: int, vector: int) -> None:
        def prepare(bare: Bare) -> None:
            floating(bare)
            set_handler(bare, Vector(vector), assemble(f"mov eax, cr4\nxor eax, {CR4_OSFXSR}\nmov cr4, eax\nhlt"))

        # The fragment is entered first while it may run.
        source = f"mov ecx, 3\n1: addps xmm0, xmm1\nloop 1b\nmov eax, cr0\nor eax, {cr0}\nmov cr0, eax\n"
        source += f"mov eax, cr4\nand eax, {~CR4_OSFXSR | cr4:#x}\nmov cr4, eax\nmov ecx, 3\njmp 1b"
        with Twins(source, prepare) as twins:
            stop = twins.run(200)
            assert stop is not None
            assert stop.kind is StopKind.HALTED
            assert twins.other.state.gpr[ECX] == 3

    def test_mmx_needs_no_osfxsr(self) -> None:
        def prepare(bare: Bare) -> None:
            floating(bare)
            bare.state.cr4 = 0

        with Twins("1: paddd mm0, mm1\npcmpeqd mm2, mm2\npsubd mm1, mm2\njmp 1b", prepare) as twins:
            twins.run(400)
            assert twins.count("callouts") < 3
            assert twins.reference.state.fpu.mmx(1) == 100 << 32 | 100


class TestErrors:
    def test_an_x87_error_is_told_by_the_next_instruction_that_waits(self) -> None:
        source = f"""
            mov word ptr [{DATA}+0x200], 0x37b
            fldcw [{DATA}+0x200]
        1:  fldz
            fld1
            fdiv st, st(1)
            inc ecx
            fnstsw ax
            fst qword ptr [{DATA}+8]
            fninit
            fldcw [{DATA}+0x200]
            jmp 1b
        """

        def prepare(bare: Bare) -> None:
            floating(bare)
            set_handler(bare, Vector.MF, assemble("fnclex\ninc ebx\niretd"))

        with Twins(source, prepare) as twins:
            twins.run(400, (60, 1))
            assert twins.count("exceptions #MF") > 20
            assert twins.reference.state.gpr[EAX] & 0x84

    def test_without_ne_the_cpu_stands_still(self) -> None:
        """FERR# is up then, which lets the interpreter execute all that may lower it."""
        source = f"""
            mov word ptr [{DATA}+0x200], 0x37b
            mov ecx, 5
        1:  fninit
            fld1
            loop 1b
            fldcw [{DATA}+0x200]
            fldz
            fdivp
            fld1
            hlt
        """

        def prepare(bare: Bare) -> None:
            floating(bare)
            bare.state.cr0 &= ~CR0_NE

        with Twins(source, prepare) as twins:
            stop = twins.run(100)
            assert stop is not None
            assert stop.kind is StopKind.HALTED
            assert all(side.cpu.fpu_error.ferr for side in (twins.reference, twins.other))
            for side in (twins.reference, twins.other):
                side.state.halted = 0
                side.state.eip = DATA + 0x300
                side.memory.write(DATA + 0x300, assemble("fnclex\nfld1\nfld1\nhlt"))
            twins.run(3)
            assert not any(side.cpu.fpu_error.ferr for side in (twins.reference, twins.other))

    @pytest.mark.parametrize(("cr4", "vector"), [(CR4_OSXMMEXCPT, Vector.XM), (0, Vector.UD)])
    def test_an_sse_error_is_told_at_once(self, cr4: int, vector: Vector) -> None:
        source = f"""
            mov dword ptr [{DATA}+0x200], 0x1d80
            ldmxcsr [{DATA}+0x200]
            xorps xmm0, xmm0
        1:  inc ecx
            divps xmm1, xmm0
            jmp 1b
        """

        def prepare(bare: Bare) -> None:
            floating(bare)
            bare.state.fpu.set_xmm(1, int.from_bytes(b"\0\0\x80\x3f" * 4, "little"))
            bare.state.cr4 = CR4_OSFXSR | cr4
            set_handler(bare, vector, skipping(3))

        with Twins(source, prepare) as twins:
            twins.run(300)
            assert twins.count(f"exceptions #{vector.name}") > 40
            assert twins.reference.state.fpu.mxcsr == 0x1D84

    def test_what_is_not_aligned(self) -> None:
        source = f"1: movaps xmm0, [{DATA}+8]\nmovups xmm1, [{DATA}+8]\naddps xmm1, [{DATA}+4]\njmp 1b"

        def prepare(bare: Bare) -> None:
            floating(bare)
            set_handler(bare, Vector.GP, assemble("add esp, 4\nadd dword ptr [esp], 7\niretd"))

        with Twins(source, prepare) as twins:
            twins.run(300)
            assert twins.count("exceptions #GP") > 60


def test_a_debugger_writes_registers_between_runs() -> None:
    with Twins("1: fadd st, st\naddps xmm0, xmm0\njmp 1b", floating) as twins:
        twins.run(200)
        for number in range(20):

            def write(bare: Bare, number: int = number) -> None:
                bare.state.fpu.set_st(0, 0x3FFF_8000_0000_0000_0000 + number)
                bare.state.fpu.set_xmm(0, 0x3F80_0000 + number)
                bare.state.fpu.tags = 0xFFFC | number
                bare.state.fpu.mxcsr = 0x1F80 | number << 13 & 0x6000

            twins.each(write)
            twins.run(31)


def test_the_hosts_own_arithmetic_goes_on_as_before() -> None:
    """The guest rounds to zero, with 24 bits and a full stack."""

    def prepare(bare: Bare) -> None:
        floating(bare)
        bare.state.fpu.mxcsr = 0x7F80 | 0x8040
        bare.state.fpu.fcw = 0xC7F
        bare.state.fpu.tags = 0

    with Twins("1: fadd st, st(1)\nmulss xmm0, xmm1\njmp 1b", prepare) as twins:
        twins.run(100)
        third, tiny = 0.1, 5e-324
        assert third + 0.2 == 0.30000000000000004
        assert tiny / 2 == 0.0
        assert tiny + 0.0 == tiny
        assert live(twins)


@pytest.mark.parametrize("instruction", ["fld qword ptr [0x20008]", "paddd mm3, [0x20008]", "addsd xmm0, [0x20010]"])
def test_an_instruction_that_lies_in_two_pages(instruction: str) -> None:
    for ahead in range(1, len(assemble(instruction))):
        at = 0x30_1000 - ahead

        def prepare(bare: Bare, at: int = at) -> None:
            floating(bare)
            bare.memory.write(at, assemble(f"{instruction}\nfnstenv [0x20100]\nffree st\nfincstp\nret"))

        with Twins(f"movsd xmm0, [{DATA}]\n1: call {at}\nmovsd [0x20200], xmm0\njmp 1b", prepare) as twins:
            twins.run(300, (33, 4))


def with_segments(bare: Bare) -> None:
    """FS with a base and a limit, GS that may be read only."""
    floating(bare)
    bare.state.segments[FS].load(0x18, DATA - 0x1000, 0x11FF, 0x493)
    bare.state.segments[GS].load(0x20, DATA, MASK32, 0xC91)
    set_handler(bare, 13, skipping_with_code(8))


def skipping_with_code(length: int) -> bytes:
    """A handler with error code that goes on behind an instruction of so many bytes, and counts in EDI."""
    return assemble(f"inc edi\nadd esp, 4\nadd dword ptr [esp], {length}\niretd")


def test_operands_in_segments_with_bases() -> None:
    source = """
        mov ecx, 100
    1:  fld qword ptr fs:[0x1008]
        fmul qword ptr gs:[ecx * 8]
        movsd xmm0, fs:[ecx + 0x1000]
        movupd xmm1, gs:[0x20]
        addpd xmm1, xmm0
        movupd fs:[0x1100], xmm1
        fstp qword ptr fs:[0x1110]
        fild dword ptr cs:[0x1000]
        fistp dword ptr fs:[0x1118]
        stmxcsr fs:[0x1120]
        ldmxcsr fs:[0x1120]
        fxsave fs:[0x0e00]
        mov eax, 5
        fxrstor fs:[0x0e00]
        dec ecx
        jnz 1b
        hlt
    """
    with Twins(source, with_segments) as twins:
        twins.run(400, (170, 3))
        before = twins.count("callouts")
        twins.run(1000)
        assert twins.count("callouts") == before


@pytest.mark.parametrize(
    "access",
    [
        "fld qword ptr fs:[0x11f9]",
        "movsd xmm1, fs:[eax + 0x11fa]",
        "fstp qword ptr gs:[8]",
        "movupd gs:[ebx], xmm0",
        "fadd dword ptr fs:[0xfffffffe]",
        "fxsave fs:[0x1010]",
        "movq fs:[ecx], mm0",
    ],
)
def test_operands_beyond_limits_and_rights(access: str) -> None:
    """#GP of the instruction, which has changed nothing; prefixes make each of them eight bytes long."""
    length = len(assemble(access))
    source = f"""
        mov ecx, 0x1300
    1:  fld qword ptr [{DATA}]
        .skip {8 - length}, 0x3e
        {access}
        ffree st(0)
        fincstp
        inc esi
        jmp 1b
    """
    with Twins(source, with_segments) as twins:
        twins.run(300, (90, 2))
        assert twins.reference.state.gpr[EDI] > 10
