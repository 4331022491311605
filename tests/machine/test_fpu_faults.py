"""What each floating-point instruction refuses, and that it changes nothing then: #UD, #NM, #MF, #GP, #AC, #PF."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from machine.cpu import Cpu
from machine.cpuid import P6_NO_FPU
from machine.faults import GuestFault, PageFault, Vector
from machine.flags import AC
from machine.state import (
    CR0_AM,
    CR0_EM,
    CR0_MP,
    CR0_NE,
    CR0_PE,
    CR0_PG,
    CR0_TS,
    CR0_WP,
    CR4_OSFXSR,
    CR4_PSE,
    EDI,
    SEG_DB,
    SEG_G,
)
from tests.machine.fpu_batch import image
from tests.machine.fpu_forms import Form, forms
from tests.machine.fpu_runs import AREAS, floating_cpu
from vmm.blocks import BlockCache

END_OF_RAM = 0x40_0000
OPERAND = 0x10_0000
UNMAPPED = 0x70_0000

NO_STATE = frozenset({"sfence", "lfence", "mfence", "prefetchnta", "prefetcht0", "prefetcht1", "prefetcht2", "movnti"})
"""Rows that ask for no FPU."""
NOT_WAITING = frozenset(
    {"fninit", "fnclex", "fnstsw", "fnstcw", "fnstenv", "fnsave", "fneni", "fndisi", "fnsetpm", "fxsave", "fxrstor"}
)
# What FNSTCW and its like store without computing, and what only loads control state.
UNALIGNED_16 = frozenset({"movups", "movupd", "movdqu", "maskmovdqu"})


@dataclass(slots=True)
class Bench:
    """A CPU in flat protected mode, and a way to execute one instruction at EIP 0 of no memory at all."""

    cpu: Cpu = field(default_factory=lambda: floating_cpu(4))

    def __post_init__(self) -> None:
        state = self.cpu.state
        self.cpu.reset()
        state.cr0 |= CR0_PE | CR0_NE
        state.cr4 |= CR4_OSFXSR
        for number, segment in enumerate(state.segments):
            segment.load(8 if number == 1 else 16, 0, 0xFFFF_FFFF, (0x9B if number == 1 else 0x93) | SEG_DB | SEG_G)

    def page(self) -> None:
        """Map RAM as a user's read-only page, above it nothing; honour CR0.WP."""
        self.cpu.memory.write(0x1000, (0x85).to_bytes(4, "little"))
        self.cpu.state.cr3, self.cpu.state.cr4 = 0x1000, CR4_OSFXSR | CR4_PSE
        self.cpu.state.cr0 |= CR0_PG | CR0_WP
        self.cpu.mmu.flush()

    def make_writable(self) -> None:
        self.cpu.memory.write(0x1000, (0x87).to_bytes(4, "little"))
        self.cpu.mmu.flush()

    def execute(self, code: bytes, *, big: bool = True) -> GuestFault | None:
        block = BlockCache(self.cpu)._decode(code, big, cut=False, limit=1)
        try:
            block.operations[0]()
        except GuestFault as fault:
            return fault
        return None

    def vector(self, code: bytes, *, big: bool = True) -> int | None:
        fault = self.execute(code, big=big)
        return None if fault is None else fault.vector


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.cpu.memory.close()


def _is_x87(form: Form) -> bool:
    return form.row.startswith("f") or form.row == "wait"


def _uses_xmm(form: Form) -> bool:
    return "XMM" in form.name or form.row in ("ldmxcsr", "stmxcsr")


def _uses_mmx(form: Form) -> bool:
    return "_MM" in form.name or form.row == "emms"


def _needs_nothing(form: Form) -> bool:
    return form.row in NO_STATE or form.row == "clflush"


def test_task_switched_is_device_not_available(bench: Bench) -> None:
    bench.cpu.state.cr0 |= CR0_TS
    before = bench.cpu.state.pack()
    for form in forms(OPERAND):
        expected = None if _needs_nothing(form) else Vector.NM
        assert bench.vector(form.data) == expected, form.name
    assert bench.cpu.state.pack() == before


def test_emulation_is_device_not_available_for_x87_and_an_undefined_opcode_for_the_rest(bench: Bench) -> None:
    bench.cpu.state.cr0 |= CR0_EM | CR0_TS
    for form in forms(OPERAND):
        expected = None if _needs_nothing(form) else Vector.NM if _is_x87(form) else Vector.UD
        assert bench.vector(form.data) == expected, form.name


def test_without_osfxsr_xmm_instructions_are_undefined(bench: Bench) -> None:
    bench.cpu.state.cr4 = 0
    bench.cpu.state.gpr[EDI] = OPERAND
    for form in forms(OPERAND):
        expected = Vector.UD if _uses_xmm(form) and not _needs_nothing(form) else None
        assert bench.vector(form.data) == expected, form.name
        bench.cpu.state.fpu.unpack(image())
        bench.cpu.memory.write(OPERAND, bytes(512))


def test_wait_looks_at_mp_and_ts(bench: Bench) -> None:
    for cr0, expected in ((0, None), (CR0_TS, None), (CR0_MP, None), (CR0_MP | CR0_TS, Vector.NM), (CR0_EM, None)):
        bench.cpu.state.cr0 = CR0_PE | CR0_NE | cr0
        assert bench.vector(b"\x9b") == expected


def test_a_pending_error_is_told_by_what_waits_and_by_nothing_else(bench: Bench) -> None:
    pending = image(fcw=0x37B, fsw=0x0004, st=[0x3FFF_8000_0000_0000_0000] * 8)
    bench.cpu.state.gpr[EDI] = OPERAND
    wait = bench.vector
    for form in forms(OPERAND):
        bench.cpu.state.fpu.unpack(pending)
        bench.cpu.memory.write(OPERAND, pending)
        before = bench.cpu.state.pack()
        x87_waits = _is_x87(form) and form.row not in NOT_WAITING
        # With a memory operand these two leave the x87 registers alone.
        mmx_waits = _uses_mmx(form) and not (form.row in ("cvtpi2ps", "cvtpi2pd") and form.has_memory)
        expected = Vector.MF if x87_waits or mmx_waits else None
        if form.row != "ldmxcsr":
            assert wait(form.data) == expected, form.name
        if expected is not None:
            assert bench.cpu.state.pack() == before, form.name
    bench.cpu.state.fpu.unpack(pending)
    assert wait(b"\x9b") == Vector.MF


def _memory_forms(address: int) -> list[Form]:
    """Those that access their operand."""
    return [form for form in forms(address) if form.has_memory and not form.row.startswith("prefetch")]


_FULL_STATE = image(
    fcw=0x37F,
    fsw=0x1800,
    tags=0x1F,
    st=[0x4000_8000_0000_0000_0001 + n for n in range(8)],
    xmm=[(1 << 128) - 1 - n for n in range(8)],
)


def _check_page_fault(bench: Bench, form: Form, linear: int, error_code: int) -> None:
    bench.cpu.state.fpu.unpack(_FULL_STATE)
    # All bytes are chosen by MASKMOVQ too.
    for number in range(8):
        bench.cpu.state.fpu.set_st(number, 0x4000_FFFF_FFFF_FFFF_FFFF)
    before = bench.cpu.state.pack()
    fault = bench.execute(form.data)
    assert isinstance(fault, PageFault), (form.name, fault)
    assert (fault.linear, fault.error_code) == (linear, error_code), form.name
    assert bench.cpu.state.pack() == before, form.name


def test_a_missing_page_changes_nothing(bench: Bench) -> None:
    bench.page()
    bench.make_writable()
    bench.cpu.state.gpr[EDI] = UNMAPPED
    for form in _memory_forms(UNMAPPED):
        _check_page_fault(bench, form, UNMAPPED, 2 if form.is_store else 0)


def test_an_operand_that_runs_into_a_missing_page_changes_nothing(bench: Bench) -> None:
    bench.page()
    bench.make_writable()
    for form in _memory_forms(END_OF_RAM - 1):
        if form.row in ("clflush", "fxsave", "fxrstor", "maskmovq", "maskmovdqu"):
            continue
        if bench.vector(form.data) == Vector.GP:
            continue
        before = bench.cpu.memory.read(END_OF_RAM - 1, 1)
        _check_page_fault(bench, form, END_OF_RAM, 2 if form.is_store else 0)
        assert bench.cpu.memory.read(END_OF_RAM - 1, 1) == before, form.name


def test_areas_that_run_into_a_missing_page_are_not_begun(bench: Bench) -> None:
    bench.page()
    bench.make_writable()
    for form in _memory_forms(END_OF_RAM - 16):
        if form.row in AREAS - {"ldmxcsr", "fldenv", "fnstenv"}:
            _check_page_fault(bench, form, END_OF_RAM, 2 if form.is_store else 0)
    assert bench.cpu.memory.read(END_OF_RAM - 16, 16) == bytes(16)


def test_a_read_only_page_stops_stores_and_nothing_else(bench: Bench) -> None:
    bench.page()
    bench.cpu.state.gpr[EDI] = OPERAND
    for form in _memory_forms(OPERAND):
        if form.is_store:
            _check_page_fault(bench, form, OPERAND, 3)
        else:
            bench.cpu.state.fpu.unpack(image())
            assert bench.execute(form.data) is None, form.name


def test_sixteen_byte_operands_are_aligned_but_for_the_moves_that_say_otherwise(bench: Bench) -> None:
    kinds = {True: 0, False: 0}
    for at in (OPERAND + 8, OPERAND + 1):
        for form in _memory_forms(at):
            is_wide = "XMMM128" in form.name or "M128_XMM" in form.name or form.row in ("fxsave", "fxrstor")
            must_be_aligned = is_wide and form.row not in UNALIGNED_16
            bench.cpu.state.fpu.unpack(image())
            before = bench.cpu.state.pack()
            fault = bench.execute(form.data)
            assert (fault is not None) == must_be_aligned, (form.name, fault)
            if fault is not None:
                assert (fault.vector, fault.error_code) == (Vector.GP, 0)
                assert bench.cpu.state.pack() == before
            kinds[must_be_aligned] += 1
    assert min(kinds.values()) > 100


def test_misaligned_operands_above_the_stack_segment_are_still_general_protection(bench: Bench) -> None:
    bench.cpu.state.gpr[5] = OPERAND + 4
    assert bench.vector(b"\x0f\x28\x45\x00") == Vector.GP  # movaps xmm0, [ebp]


@pytest.mark.parametrize(
    ("code", "offsets"),
    [
        # instruction at [OPERAND + offset], and which offsets of 0, 1, 2, 4, 8 raise #AC: measured on a processor
        ("0f10 05", (1, 2, 4, 8)),  # movups load
        ("0f11 05", (1, 2, 4, 8)),  # movups store
        ("f30f6f 05", (1, 2, 4, 8)),  # movdqu
        ("db 2d", (1, 2, 4)),  # fld m80
        ("db 3d", (1, 2, 4)),  # fstp m80
        ("dd 05", (1, 2, 4)),  # fld m64
        ("d9 05", (1, 2)),  # fld m32
        ("df 05", (1,)),  # fild m16
        ("df 25", (1, 2, 4)),  # fbld
        ("d9 25", (1, 2)),  # fldenv
        ("d9 35", (1, 2)),  # fnstenv
        ("66 d9 35", (1,)),  # 16-bit fnstenv
        ("dd 35", (1, 2)),  # fnsave
        ("dd 25", (1, 2)),  # frstor
        ("d9 2d", (1,)),  # fldcw
        ("d9 3d", (1,)),  # fnstcw
        ("0f6f 05", (1, 2, 4)),  # movq mm
        ("0f12 05", (1, 2, 4)),  # movlps
        ("0fae 1d", (1, 2)),  # stmxcsr
        ("f20f10 05", (1, 2, 4)),  # movsd
        ("f30f10 05", (1, 2)),  # movss
        ("0f60 05", (1, 2)),  # punpcklbw mm, m32
        ("0fc3 05", (1, 2)),  # movnti
        ("660ff7 ca", (1, 2, 4)),  # maskmovdqu xmm1, xmm2
    ],
)
def test_alignment_check_asks_for_natural_alignment(bench: Bench, code: str, offsets: tuple[int, ...]) -> None:
    state = bench.cpu.state
    state.cr0 |= CR0_AM
    state.eflags |= AC
    bench.cpu.set_cpl(3)
    data = bytes.fromhex(code)
    found = []
    for offset in (0, 1, 2, 4, 8):
        state.gpr[EDI] = OPERAND + offset
        state.fpu.unpack(image(xmm=[(1 << 128) - 1] * 8))
        bench.cpu.memory.write(OPERAND, image() * 2)
        address = b"" if data[-1] == 0xCA else (OPERAND + offset).to_bytes(4, "little")
        before = state.pack()
        fault = bench.execute(data + address)
        if fault is not None:
            assert state.pack() == before
            assert (fault.vector, fault.error_code) == (Vector.AC, 0), (offset, fault)
            found.append(offset)
    assert tuple(found) == offsets


def test_alignment_of_fxsave_and_aligned_moves_under_alignment_check(bench: Bench) -> None:
    state = bench.cpu.state
    state.cr0 |= CR0_AM
    state.eflags |= AC
    bench.cpu.set_cpl(3)
    expected = {0: None, 1: Vector.AC, 2: Vector.AC, 4: Vector.GP, 8: Vector.GP}
    for offset, vector in expected.items():
        assert bench.vector(b"\x0f\xae\x05" + (OPERAND + offset).to_bytes(4, "little")) == vector
    for offset in (1, 2, 4, 8):
        assert bench.vector(b"\x0f\x28\x05" + (OPERAND + offset).to_bytes(4, "little")) == Vector.GP


def test_an_operand_on_two_pages_that_lie_apart(bench: Bench) -> None:
    """Linear 10_0000 is physical 20_0000, and 10_1000 is 10_0000: what is behind the first page is not the second."""
    memory = bench.cpu.memory
    bench.page()
    memory.write(0x1000, (0x2007).to_bytes(4, "little"))
    memory.write(0x2000 + 4 * 0x100, (0x20_0007).to_bytes(4, "little") + (0x10_0007).to_bytes(4, "little"))
    bench.cpu.mmu.flush()
    pattern = bytes(range(1, 129))
    for code, size in (
        ("dd05 dd1d", 8),
        ("db2d db3d", 10),
        ("0f1005 0f1105", 16),
        ("0f6f05 0f7f05", 8),
        ("dd25 dd35", 108),
    ):
        load, store = map(bytes.fromhex, code.split())
        for inside in (1, 4, 5, 7, size - 1):
            linear = (0x10_1000 - inside).to_bytes(4, "little")
            memory.write(0x20_1000 - inside, pattern[:inside] + b"\xcc" * 128)
            memory.write(0x10_0000, pattern[inside:size] + b"\xcc" * 128)
            if size == 108:
                bench.cpu.state.fpu.initialize()
            else:
                bench.cpu.state.fpu.unpack(image(tags=0))
            assert bench.execute(load + linear) is None
            bench.cpu.state.fpu.fsw &= 0x7F00
            memory.write(0x20_1000 - inside, bytes(inside))
            memory.write(0x10_0000, bytes(size - inside))
            assert bench.execute(store + linear) is None
            found = memory.read(0x20_1000 - inside, inside) + memory.read(0x10_0000, size - inside)
            # Of an environment the reserved and derived bits come out otherwise.
            assert found[28:] == pattern[28:size] if size == 108 else found == pattern[:size], (code, inside)
            assert memory.read(0x20_1000, 128) == b"\xcc" * 128
            assert memory.read(0x10_0000 + size - inside, 16) == b"\xcc" * 16


def test_masked_stores_use_the_address_size(bench: Bench) -> None:
    state = bench.cpu.state
    state.gpr[EDI] = 0x12_8000
    for prefix, at in ((b"", 0x12_8000), (b"\x67", 0x8000)):
        state.fpu.unpack(image(xmm=[0, 0x1122, 0x8000, *[0] * 5]))
        assert bench.execute(prefix + bytes.fromhex("660ff7ca")) is None
        assert bench.cpu.memory.read(at, 4) == b"\0\x11\0\0"
        bench.cpu.memory.write(at, bytes(4))


def test_segment_limits_count_the_whole_operand(bench: Bench) -> None:
    ds = bench.cpu.state.segments[3]
    for form in _memory_forms(OPERAND):
        if "maskmov" in form.row:
            continue
        ds.load(16, 0, OPERAND, 0x93 | SEG_DB | SEG_G)
        bench.cpu.state.fpu.unpack(_FULL_STATE)
        before = bench.cpu.state.pack()
        fault = bench.execute(form.data)
        if form.row == "clflush":
            assert fault is None
            continue
        assert fault is not None, form.name
        assert (fault.vector, fault.error_code) == (Vector.GP, 0), form.name
        assert bench.cpu.state.pack() == before


def test_a_model_without_fpu_has_none_of_it(bench: Bench) -> None:
    bench.cpu.model = P6_NO_FPU
    before = bench.cpu.state.pack()
    for form in forms(OPERAND):
        is_nop = form.row.startswith("prefetch")
        expected = None if (_is_x87(form) and not form.row.startswith("fx")) or is_nop else Vector.UD
        if form.row in ("fxam", "fxch", "fxtract"):
            expected = None
        assert bench.vector(form.data) == expected, form.name
    assert bench.cpu.state.pack() == before


def test_sse3_and_later_are_undefined(bench: Bench) -> None:
    for code in ("f20ff0 05 00001000", "f20f7cc1", "0f3801c1", "660f3a0fc101", "df 0d 00001000", "0f01c8"):
        assert bench.vector(bytes.fromhex(code)) == Vector.UD, code
