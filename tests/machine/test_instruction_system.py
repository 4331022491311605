"""System instructions, one at a time: who may run them in which mode, and what they do at CPL 0.

Gates, tasks and descriptors have tests of their own; here are the instructions' operands and order of checks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

import pytest

from machine.control import MSRS
from machine.debug import Stop, StopKind
from machine.faults import Vector
from machine.flags import DF, IF, IOPL, VM
from machine.instructions import Effect
from machine.instructions.table import ROWS
from machine.state import (
    CR0_EM,
    CR0_ET,
    CR0_MP,
    CR0_NE,
    CR0_NW,
    CR0_PE,
    CR0_PG,
    CR0_TS,
    CR0_WP,
    CR4_DE,
    CR4_PSE,
    CR4_TSD,
    CS,
    DR7_GD,
    DS,
    EAX,
    EBX,
    ECX,
    EDI,
    EDX,
    ESI,
    ESP,
    MASK32,
    SEG_DB,
    SEG_G,
    SS,
)
from tests import engine
from tests.machine.instruction_checks import ELSEWHERE
from tests.vmm.bare import ORIGIN, Bare

DATA = 0x3000
BEYOND = 0x9_0000  # behind the limit of DS where a test sets one
GP0 = (Vector.GP, 0)
UD = (Vector.UD, None)
Fault = tuple[Vector, int | None]


class Mode(Enum):
    """Where an instruction is tried; all segments are flat, or at 0 with 64 KiB."""

    RING0 = "ring 0"
    RING3 = "ring 3"
    REAL = "real mode"
    V86 = "virtual-8086 mode"


@dataclass(slots=True)
class Ports:
    """Some ports: reads count up, accesses are remembered as (port, size, value or None)."""

    log: list[tuple[int, int, int | None]] = field(default_factory=list)

    def load_port(self, port: int, size_bytes: int) -> int:
        self.log.append((port, size_bytes, None))
        return 0x11111111 * len(self.log) & (1 << 8 * size_bytes) - 1

    def store_port(self, port: int, size_bytes: int, value: int) -> None:
        self.log.append((port, size_bytes, value))


_made: list[Bare] = []


@pytest.fixture(autouse=True, params=["interp", "trap"])
def _engine(request: pytest.FixtureRequest) -> Iterator[None]:
    """What intercepts, and what does not: emitted code is not entered for one instruction. Labs end with the test."""
    with engine.choice(request.param):
        yield
    while _made:
        _made.pop().close()


class Lab:
    """A CPU in one mode, that tells how an instruction ended."""

    def __init__(self, mode: Mode = Mode.RING0) -> None:
        self.bare = Bare(engine.make)
        _made.append(self.bare)
        self.mode = mode
        self.state, self.memory, self.cpu = self.bare.state, self.bare.memory, self.bare.cpu
        self.ports = Ports()
        for first, last in ((0x10, 0x7F), (0x3F8, 0x3FF)):
            self.bare.ports.register(first, last, self.ports, (1, 2, 4))
        self.bare.debug.set_catches(frozenset(range(32)), software=True)
        state = self.state
        level = 3 if mode in (Mode.RING3, Mode.V86) else 0
        if mode is not Mode.REAL:
            state.cr0 |= CR0_PE
        for number, segment in enumerate(state.segments):
            attributes = (0x9B if number == CS else 0x93) | level << 5
            if mode in (Mode.RING0, Mode.RING3):
                segment.load(0x10 | level, 0, MASK32, attributes | SEG_DB | SEG_G)
            else:
                segment.load(0, 0, 0xFFFF, 0x93 | level << 5)
        if mode is Mode.V86:
            state.eflags |= VM
        self.cpu.set_cpl(level)
        # A TSS without I/O bitmap, in which every port is forbidden.
        state.tr.load(0x40, 0x2000, 0x67, 0x8B)
        self.memory.store(0x2066, 2, 0x68)
        state.gpr[ESP] = 0x8000

    def run(self, code: str, **registers: int) -> Fault | None:
        """Execute the instruction `code` (hex, of 32-bit code) once; the fault that it ended with, if any.

        In 16-bit modes the size prefixes are turned round, so that the same bytes mean the same.
        """
        data = bytes.fromhex(code)
        if self.mode in (Mode.REAL, Mode.V86):
            data = b"\x67" + (data[1:] if data[0] == 0x66 else b"\x66" + data)
        self.memory.write(ORIGIN, data.ljust(16, b"\x90"))
        self.state.eip = ORIGIN
        for name, value in registers.items():
            self.state.gpr[("eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi").index(name)] = value
        stop = self.once()
        if stop.level is None:
            assert stop.kind in (StopKind.BUDGET, StopKind.HALTED), stop
            return None
        assert self.state.eip == ORIGIN
        return Vector(stop.level.vector), stop.level.error_code

    def once(self) -> Stop:
        retired = self.bare.clock.icount
        while self.bare.clock.icount == retired:
            stop = self.bare.engine.run(retired + 1)
            if stop.kind is not StopKind.BUDGET:
                return stop
        return stop

    def gpr(self, number: int) -> int:
        return self.state.gpr[number]


@dataclass(frozen=True, slots=True)
class Try:
    """An instruction and how it ends in each mode: None for well."""

    row: str
    code: str
    ring0: Fault | None = None
    ring3: Fault | None = None
    real: Fault | None = None
    v86: Fault | None = None
    registers: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.row} {self.code.replace(' ', '')}"


def privileged(row: str, code: str, **registers: int) -> Try:
    """For CPL 0 alone, which real mode is and virtual-8086 mode is not."""
    return Try(row, code, ring3=GP0, v86=GP0, registers=registers)


def protected_only(
    row: str, code: str, *, ring0: Fault | None = None, ring3: Fault | None = None, **registers: int
) -> Try:
    """Not recognised in real and virtual-8086 mode."""
    return Try(row, code, ring0, ring3, UD, UD, registers)


TRIES = (
    Try("clc", "f8"),
    Try("stc", "f9"),
    Try("cmc", "f5"),
    Try("cld", "fc"),
    Try("std", "fd"),
    privileged("cli", "fa"),
    privileged("sti", "fb"),
    Try("pushf", "66 9c", v86=GP0),
    Try("pushfd", "9c", v86=GP0),
    Try("popf", "66 9d", v86=GP0),
    Try("popfd", "9d", v86=GP0),
    privileged("hlt", "f4"),
    privileged("mov_from_cr", "0f 20 c0"),
    privileged("mov_from_cr", "0f 20 e0"),
    Try("mov_from_cr", "0f 20 c8", UD, UD, UD, UD),
    privileged("mov_to_cr", "0f 22 d8", eax=0x5000),
    Try("mov_to_cr", "0f 22 e8", UD, UD, UD, UD),
    Try("mov_to_cr", "0f 22 e0", GP0, GP0, GP0, GP0, {"eax": 1 << 31}),
    privileged("mov_from_dr", "0f 21 c0"),
    privileged("mov_to_dr", "0f 23 c0"),
    privileged("clts", "0f 06"),
    Try("smsw", "0f 01 e0"),
    Try("smsw", "0f 01 23", registers={"ebx": DATA}),
    privileged("lmsw", "0f 01 f0", eax=1),
    privileged("lmsw", "0f 01 33", ebx=DATA),
    privileged("rdmsr", "0f 32", ecx=0x174),
    privileged("wrmsr", "0f 30", ecx=0x174),
    Try("rdmsr", "0f 32", GP0, GP0, GP0, GP0, {"ecx": 0x1234}),
    Try("rdtsc", "0f 31"),
    Try("cpuid", "0f a2"),
    privileged("invd", "0f 08"),
    privileged("wbinvd", "0f 09"),
    privileged("invlpg", "0f 01 3b", ebx=DATA),
    Try("invlpg", "0f 01 f8", UD, UD, UD, UD),
    Try("sgdt", "0f 01 03", registers={"ebx": DATA}),
    Try("sidt", "0f 01 0b", registers={"ebx": DATA}),
    Try("sgdt", "0f 01 c3", UD, UD, UD, UD),
    privileged("lgdt", "0f 01 13", ebx=DATA),
    privileged("lidt", "0f 01 1b", ebx=DATA),
    Try("lidt", "0f 01 d8", UD, UD, UD, UD),
    protected_only("sldt", "0f 00 c0"),
    protected_only("str", "0f 00 c8"),
    protected_only("lldt", "0f 00 d0", ring3=GP0, eax=0),
    protected_only("ltr", "0f 00 d8", ring0=GP0, ring3=GP0, eax=0),
    protected_only("verr", "0f 00 e0", eax=0),
    protected_only("verw", "0f 00 e8", eax=0),
    protected_only("lar", "0f 02 c0", eax=0),
    protected_only("lsl", "0f 03 c0", eax=0),
    protected_only("arpl", "63 c0"),
    privileged("in", "e4 10"),
    privileged("in", "ed"),
    privileged("out", "e7 10"),
    privileged("out", "ee"),
    privileged("insb", "6c", edi=DATA),
    privileged("outsd", "6f", esi=DATA),
    privileged("insw", "66 6d", edi=DATA),
    privileged("insd", "6d", edi=DATA),
    privileged("outsb", "6e", esi=DATA),
    privileged("outsw", "66 6f", esi=DATA),
    Try("sysenter", "0f 34", GP0, GP0, GP0, GP0),  # SYSENTER_CS is 0
    Try("sysexit", "0f 35", GP0, GP0, GP0, GP0),
    Try("int1", "f1", (Vector.DB, None), (Vector.DB, None), (Vector.DB, None), (Vector.DB, None)),
    Try("int3", "cc", (Vector.BP, None), (Vector.BP, None), (Vector.BP, None), (Vector.BP, None)),
    Try("into", "ce"),
    Try("ud0", "0f ff c0", UD, UD, UD, UD),
    Try("ud0", "0f ff 03", UD, UD, UD, UD, {"ebx": BEYOND}),
    Try("ud1", "0f b9 c0", UD, UD, UD, UD),
    Try("ud1", "0f b9 03", UD, UD, UD, UD, {"ebx": BEYOND}),
    Try("ud2", "0f 0b", UD, UD, UD, UD),
    Try("fpu", "d9 ee"),
    Try("fpu", "d8 03", registers={"ebx": BEYOND}),  # no FPU: memory is not looked at
    Try("wait", "9b"),
)

# Far transfers and segment loads: `tests.machine.test_instructions_host`, and the tests of protected mode.
TRANSFERS = frozenset(
    (
        "jmp_far",
        "call_far",
        "retf",
        "iret",
        "iretd",
        "int",
        "mov_to_sreg",
        "pop_sreg",
        "lds",
        "les",
        "lss",
        "lfs",
        "lgs",
    )
)


def test_every_row_with_rules_of_its_own_is_tried() -> None:
    wanted = {mnemonic for mnemonic, row in ROWS.items() if row.effect in (Effect.SYSTEM, Effect.SYSTEM_BRANCH)}
    tried = {attempt.row for attempt in TRIES}
    assert (wanted | ELSEWHERE.keys()) - TRANSFERS <= tried
    assert all(ROWS[row] for row in tried)


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("attempt", TRIES, ids=str)
def test_who_may_run_it(attempt: Try, mode: Mode) -> None:
    lab = Lab(mode)
    expected = {Mode.RING0: attempt.ring0, Mode.RING3: attempt.ring3, Mode.REAL: attempt.real, Mode.V86: attempt.v86}
    untouched = Lab(mode)
    untouched.run("90", **attempt.registers)
    assert lab.run(attempt.code, **attempt.registers) == expected[mode]
    if expected[mode] is not None:
        lab.state.eip = untouched.state.eip
        assert lab.state.pack() == untouched.state.pack()
        assert lab.memory.read(DATA, 16) == bytes(16)
        assert lab.ports.log == []


WITH_OPERAND = [attempt for attempt in TRIES if attempt.ring3 == GP0 and "ebx" in attempt.registers]


@pytest.mark.parametrize("mode", [Mode.RING0, Mode.RING3])
@pytest.mark.parametrize("attempt", WITH_OPERAND, ids=str)
def test_privilege_comes_before_the_operand(attempt: Try, mode: Mode) -> None:
    """An operand beyond the limit of the stack segment: #SS(0) at CPL 0, where it is looked at."""
    lab = Lab(mode)
    lab.state.segments[SS].load(lab.state.segments[SS].selector, 0, 0xFFF, lab.state.segments[SS].attributes & ~SEG_G)
    expected: Fault | None = (Vector.SS, 0)
    if attempt.row == "invlpg":
        expected = None  # it makes no access
    assert lab.run("36" + attempt.code, ebx=BEYOND) == (expected if mode is Mode.RING0 else GP0)


class TestIopl:
    @pytest.mark.parametrize("code", ["fa", "fb", "66 9c", "9c", "66 9d", "9d", "e4 10", "ee", "6c"])
    def test_3_lets_a_user_in(self, code: str) -> None:
        lab = Lab(Mode.RING3)
        lab.state.eflags |= IOPL
        assert lab.run(code, edi=DATA) is None

    @pytest.mark.parametrize("code", ["fa", "fb", "66 9c", "9c", "66 9d", "9d"])
    def test_3_lets_a_virtual_8086_program_change_flags(self, code: str) -> None:
        lab = Lab(Mode.V86)
        lab.state.eflags |= IOPL
        assert lab.run(code) is None

    @pytest.mark.parametrize("code", ["e4 10", "ee", "6c", "6e"])
    def test_ports_of_a_virtual_8086_program_go_by_the_bitmap_alone(self, code: str) -> None:
        lab = Lab(Mode.V86)
        lab.state.eflags |= IOPL
        assert lab.run(code, edi=DATA) == GP0

    @pytest.mark.parametrize("mode", [Mode.RING3, Mode.V86])
    @pytest.mark.parametrize(("code", "bit"), [("e4 10", 0x10), ("66 e5 10", 0x11), ("e7 10", 0x13), ("6c", 0x10)])
    def test_the_bitmap_has_a_bit_for_each_port_of_an_access(self, code: str, bit: int, mode: Mode) -> None:
        lab = Lab(mode)
        lab.state.tr.load(0x40, 0x2000, 0x200, 0x8B)
        assert lab.run(code, edx=0x10, edi=DATA) is None
        lab.memory.store(0x2068 + bit // 8, 1, 1 << bit % 8)
        count = len(lab.ports.log)
        assert lab.run(code, edx=0x10, edi=DATA) == GP0
        assert len(lab.ports.log) == count


class TestControlRegisters:
    def test_smsw_stores_a_word_and_loads_a_doubleword(self) -> None:
        lab = Lab()
        lab.state.cr0 = CR0_PG >> 1 | 0x1_0000 | CR0_NE | CR0_ET | CR0_PE
        lab.memory.write(DATA, b"\xff" * 4)
        lab.run("0f 01 23", ebx=DATA)
        assert lab.memory.load(DATA, 4) == 0xFFFF_0000 | CR0_NE | CR0_ET | CR0_PE
        lab.run("0f 01 e0", eax=MASK32)
        assert lab.gpr(EAX) == lab.state.cr0
        lab.run("66 0f 01 e0", eax=MASK32)
        assert lab.gpr(EAX) == 0xFFFF_0000 | lab.state.cr0 & 0xFFFF

    @pytest.mark.parametrize("code", ["0f 01 f0", "66 0f 01 f0", "0f 01 33"])
    def test_lmsw_loads_four_bits_and_keeps_pe(self, code: str) -> None:
        lab = Lab()
        before = lab.state.cr0
        lab.memory.store(DATA, 2, 0xFFFF)
        lab.run(code, eax=MASK32, ebx=DATA)
        assert lab.state.cr0 == before | CR0_MP | CR0_EM | CR0_TS
        lab.memory.store(DATA, 2, 0)
        lab.run(code, eax=0, ebx=DATA)
        assert lab.state.cr0 == before

    def test_lmsw_enters_protected_mode(self) -> None:
        lab = Lab(Mode.REAL)
        lab.run("0f 01 f0", eax=1)
        assert lab.state.cr0 & CR0_PE

    def test_lmsw_reads_a_word(self) -> None:
        lab = Lab()
        lab.state.segments[DS].load(0x10, 0, DATA + 1, 0x93 | SEG_DB)
        assert lab.run("0f 01 33", ebx=DATA) is None
        assert lab.run("0f 01 33", ebx=DATA + 1) == GP0

    def test_clts_clears_ts_alone(self) -> None:
        lab = Lab()
        lab.state.cr0 |= CR0_TS | CR0_MP
        before = lab.state.cr0
        lab.run("0f 06")
        assert lab.state.cr0 == before & ~CR0_TS

    @pytest.mark.parametrize(
        ("number", "value"), [(0, CR0_PE | CR0_WP | CR0_ET), (2, 0x1234_5678), (3, 0x5018), (4, CR4_PSE)]
    )
    def test_mov_there_and_back(self, number: int, value: int) -> None:
        lab = Lab()
        assert lab.run(f"0f 22 {0xC1 | number << 3:02x}", ecx=value) is None  # mov crN, ecx
        assert (lab.state.cr0, lab.state.cr2, lab.state.cr3, lab.state.cr4)[(0, 2, 3, 4).index(number)] == value
        assert lab.run(f"0f 20 {0xC2 | number << 3:02x}") is None  # mov edx, crN
        assert lab.gpr(EDX) == value

    @pytest.mark.parametrize("prefix", ["66", "67", "2e"])
    def test_prefixes_and_mod_mean_nothing(self, prefix: str) -> None:
        lab = Lab()
        lab.state.cr2 = 0x89AB_CDEF
        lab.run(f"{prefix} 0f 20 13")  # mod 0, CR2, rm 3
        assert lab.gpr(EBX) == 0x89AB_CDEF
        lab.run(f"{prefix} 0f 22 51", ecx=0x1234_5678)  # mod 1, CR2, rm 1
        assert lab.state.cr2 == 0x1234_5678

    @pytest.mark.parametrize(
        ("number", "value"),
        [(0, CR0_PG), (0, CR0_PE | CR0_NW), (4, 1 << 9), (4, 1 << 6), (4, 1 << 8)],
        ids=["PG without PE", "NW without CD", "OSFXSR", "MCE", "PCE"],
    )
    def test_what_cannot_be_set(self, number: int, value: int) -> None:
        lab = Lab()
        assert lab.run(f"0f 22 {0xC0 | number << 3:02x}", eax=value) == GP0
        lab.state.gpr[EAX], lab.state.eip = 0, 0
        clean = Lab().state
        clean.eip = 0
        assert lab.state.pack() == clean.pack()

    def test_et_is_always_set(self) -> None:
        lab = Lab()
        lab.run("0f 22 c0", eax=CR0_PE)
        assert lab.state.cr0 & CR0_ET


class TestDebugRegisters:
    @pytest.mark.parametrize("number", range(8))
    def test_mov_there_and_back(self, number: int) -> None:
        lab = Lab()
        value = {6: 0xFFFF_0FF0 | 0xE00F, 7: 0x400}.get(number if number < 4 else number | 2, 0x1234_5678)
        assert lab.run(f"0f 23 {0xC1 | number << 3:02x}", ecx=value) is None
        assert lab.run(f"0f 21 {0xC2 | number << 3:02x}") is None
        assert lab.gpr(EDX) == value
        assert lab.state.dr[number if number < 4 else number | 2] == value

    @pytest.mark.parametrize("number", [4, 5])
    def test_with_de_there_are_no_dr4_and_dr5(self, number: int) -> None:
        lab = Lab()
        lab.state.cr4 |= CR4_DE
        assert lab.run(f"0f 23 {0xC1 | number << 3:02x}") == UD
        assert lab.run(f"0f 21 {0xC1 | number << 3:02x}") == UD

    def test_gd_guards_them(self) -> None:
        lab = Lab()
        lab.state.dr[7] |= DR7_GD
        assert lab.run("0f 21 c0", eax=5) == (Vector.DB, None)
        assert lab.gpr(EAX) == 5


class TestDescriptorTables:
    @pytest.mark.parametrize(("load", "store", "name"), [("10", "00", "gdtr"), ("18", "08", "idtr")])
    def test_the_operand_size_cuts_the_base_that_is_loaded(self, load: str, store: str, name: str) -> None:
        lab = Lab()
        lab.memory.write(DATA, bytes.fromhex("2301 78563412"))
        table = getattr(lab.state, name)
        lab.run(f"0f 01 {load}", eax=DATA)
        assert (table.limit, table.base) == (0x123, 0x1234_5678)
        lab.run(f"66 0f 01 {load}", eax=DATA)
        assert (table.limit, table.base) == (0x123, 0x34_5678)
        table.base = 0x89AB_CDEF
        for prefix in ("", "66"):
            lab.memory.write(DATA, b"\xff" * 8)
            lab.run(f"{prefix} 0f 01 {store}", eax=DATA)
            assert lab.memory.read(DATA, 8).hex() == "2301efcdab89ffff"

    @pytest.mark.parametrize("reg", range(4))
    def test_six_bytes_are_accessed(self, reg: int) -> None:
        lab = Lab()
        lab.state.segments[DS].load(0x10, 0, DATA + 5, 0x93 | SEG_DB)
        tables = lab.state.gdtr.base, lab.state.gdtr.limit, lab.state.idtr.base, lab.state.idtr.limit
        for beyond in range(1, 6):
            assert lab.run(f"0f 01 {reg << 3:02x}", eax=DATA + beyond) == GP0
        assert (lab.state.gdtr.base, lab.state.gdtr.limit, lab.state.idtr.base, lab.state.idtr.limit) == tables
        assert lab.memory.read(DATA, 16) == bytes(16)
        assert lab.run(f"0f 01 {reg << 3:02x}", eax=DATA) is None

    @pytest.mark.parametrize("reg", range(4))
    def test_the_second_part_wraps_at_the_address_size(self, reg: int) -> None:
        lab = Lab(Mode.REAL)
        lab.memory.write(0xFFFE, b"\x34\x12")
        lab.memory.write(0, b"\x78\x56\x34\x12")
        lab.state.gdtr.limit = lab.state.idtr.limit = 0x4321
        lab.state.gpr[EBX] = 0xFFFE
        lab.memory.write(ORIGIN, bytes.fromhex(f"66 0f 01 {0x07 | reg << 3:02x}"))  # [bx]
        lab.state.eip = ORIGIN
        lab.once()
        if reg >= 2:
            table = (lab.state.gdtr, lab.state.idtr)[reg - 2]
            assert (table.limit, table.base) == (0x1234, 0x1234_5678)
        else:
            assert lab.memory.load(0xFFFE, 2) == 0x4321
            assert lab.memory.load(0, 4) == 0

    @pytest.mark.parametrize(("reg", "name"), [(0, "ldtr"), (1, "tr")])
    def test_sldt_and_str_zero_extend_into_registers_and_store_a_word(self, reg: int, name: str) -> None:
        lab = Lab()
        getattr(lab.state, name).selector = 0x1234
        lab.run(f"0f 00 {0xC0 | reg << 3:02x}", eax=MASK32)
        assert lab.gpr(EAX) == 0x1234
        lab.run(f"66 0f 00 {0xC0 | reg << 3:02x}", eax=MASK32)
        assert lab.gpr(EAX) == 0xFFFF_1234
        lab.memory.write(DATA, b"\xff" * 4)
        lab.run(f"0f 00 {reg << 3:02x}", eax=DATA)
        assert lab.memory.load(DATA, 4) == 0xFFFF_1234


class TestPorts:
    @pytest.mark.parametrize(
        ("code", "port", "size"),
        [
            ("e4 21", 0x21, 1),
            ("66 e5 21", 0x21, 2),
            ("e5 21", 0x21, 4),
            ("ec", 0x3F8, 1),
            ("66 ed", 0x3F8, 2),
            ("ed", 0x3F8, 4),
        ],
    )
    def test_in(self, code: str, port: int, size: int) -> None:
        lab = Lab()
        lab.run(code, eax=0xAAAA_AAAA, edx=0x1_03F8)
        assert lab.ports.log == [(port, size, None)]
        mask = (1 << 8 * size) - 1
        assert lab.gpr(EAX) == 0xAAAA_AAAA & ~mask | 0x1111_1111 & mask

    @pytest.mark.parametrize(
        ("code", "port", "size"),
        [
            ("e6 21", 0x21, 1),
            ("66 e7 21", 0x21, 2),
            ("e7 21", 0x21, 4),
            ("ee", 0x3F8, 1),
            ("66 ef", 0x3F8, 2),
            ("ef", 0x3F8, 4),
        ],
    )
    def test_out(self, code: str, port: int, size: int) -> None:
        lab = Lab()
        lab.run(code, eax=0x1234_5678, edx=0x1_03F8)
        assert lab.ports.log == [(port, size, 0x1234_5678 & (1 << 8 * size) - 1)]

    @pytest.mark.parametrize(("code", "size"), [("6c", 1), ("66 6d", 2), ("6d", 4)])
    @pytest.mark.parametrize("flags", [0, DF])
    def test_ins(self, code: str, size: int, flags: int) -> None:
        lab = Lab()
        lab.state.eflags |= flags
        lab.run("f3" + code, ecx=2, edx=0x60, edi=DATA)
        step = -size if flags else size
        assert lab.ports.log == [(0x60, size, None)] * 2
        assert (lab.gpr(ECX), lab.gpr(EDI)) == (0, DATA + 2 * step)
        assert lab.memory.read(DATA, size) == b"\x11" * size
        assert lab.memory.read(DATA + step, size) == b"\x22" * size

    @pytest.mark.parametrize(("code", "size"), [("6e", 1), ("66 6f", 2), ("6f", 4)])
    @pytest.mark.parametrize("flags", [0, DF])
    def test_outs(self, code: str, size: int, flags: int) -> None:
        lab = Lab()
        lab.state.eflags |= flags
        lab.memory.write(DATA - 4, bytes(range(1, 13)))
        lab.run("f3" + code, ecx=2, edx=0x60, esi=DATA)
        step = -size if flags else size
        values = [int.from_bytes(lab.memory.read(DATA + n * step, size), "little") for n in (0, 1)]
        assert lab.ports.log == [(0x60, size, value) for value in values]
        assert (lab.gpr(ECX), lab.gpr(ESI)) == (0, DATA + 2 * step)

    @pytest.mark.parametrize(("code", "size"), [("6c", 1), ("66 6d", 2), ("6d", 4), ("6e", 1), ("66 6f", 2), ("6f", 4)])
    def test_a_fault_in_memory_comes_before_the_port(self, code: str, size: int) -> None:
        lab = Lab()
        for register in (0, DS):
            lab.state.segments[register].load(0x10, 0, DATA + size - 1, 0x93 | SEG_DB)
        assert lab.run("f3" + code, ecx=3, edx=0x60, esi=DATA, edi=DATA) == GP0
        assert len(lab.ports.log) == 1
        assert (lab.gpr(ECX), lab.gpr(ESI) + lab.gpr(EDI)) == (2, 2 * DATA + size)


class TestIdentification:
    @pytest.mark.parametrize("leaf", [0, 1, 2, 0x7FFF_FFFF, 0x8000_0000, 0x8000_0002, 0x8000_0004, 0x8000_0005, MASK32])
    def test_cpuid_answers_by_the_model(self, leaf: int) -> None:
        lab = Lab()
        lab.run("0f a2", eax=leaf, ebx=1, ecx=2, edx=3)
        assert (lab.gpr(EAX), lab.gpr(EBX), lab.gpr(ECX), lab.gpr(EDX)) == lab.cpu.model.leaf(leaf)

    def test_the_vendor_is_spelled_ebx_edx_ecx(self) -> None:
        lab = Lab()
        lab.run("0f a2", eax=0)
        text = b"".join(lab.gpr(number).to_bytes(4, "little") for number in (EBX, EDX, ECX))
        assert text == b"GenuineIntel"

    @pytest.mark.parametrize(
        ("mode", "expected"), [(Mode.RING0, None), (Mode.RING3, GP0), (Mode.REAL, None), (Mode.V86, GP0)]
    )
    def test_tsd_makes_rdtsc_privileged(self, mode: Mode, expected: Fault | None) -> None:
        lab = Lab(mode)
        lab.state.cr4 |= CR4_TSD
        assert lab.run("0f 31") == expected

    def test_rdtsc_and_the_msr_agree(self) -> None:
        lab = Lab()
        lab.run("0f 30", ecx=0x10, eax=0x89AB_CDEF, edx=0x1234_5678)
        retired = lab.bare.clock.icount
        lab.run("0f 31")
        assert lab.gpr(EDX) == 0x1234_5678
        assert lab.gpr(EAX) == 0x89AB_CDEF + lab.bare.clock.icount - retired
        lab.run("0f 32", ecx=0x10)
        assert lab.gpr(EDX) << 32 | lab.gpr(EAX) == 0x1234_5678_89AB_CDEF + 2

    @pytest.mark.parametrize("number", [0x174, 0x175, 0x176])
    def test_msrs_of_sysenter_keep_32_bits(self, number: int) -> None:
        lab = Lab()
        assert lab.run("0f 30", ecx=number, eax=0x89AB_CDEF, edx=0x1234_5678) is None
        assert lab.run("0f 32", ecx=number) is None
        assert (lab.gpr(EAX), lab.gpr(EDX)) == (0x89AB_CDEF, 0)

    @pytest.mark.parametrize("number", MSRS)
    def test_every_msr_can_be_read_and_written(self, number: int) -> None:
        lab = Lab()
        assert lab.run("0f 32", ecx=number) is None
        assert lab.run("0f 30", ecx=number) is None


class TestInvlpg:
    @pytest.mark.parametrize("address", [0, DATA, BEYOND, MASK32])
    def test_it_makes_no_access(self, address: int) -> None:
        lab = Lab()
        lab.state.segments[DS].load(0, 0, 0, 0)  # null
        assert lab.run("0f 01 3b", ebx=address) is None


class TestFpuEscapes:
    """Without an FPU an escape does nothing, unless CR0 says that it is to be emulated or that a task has to change."""

    ESCAPES = ("d8 c0", "d9 03", "dd 03", "db e3", "df e0", "dd 3b", "da e9")

    @pytest.mark.parametrize("code", ESCAPES)
    @pytest.mark.parametrize("flags", [CR0_EM, CR0_TS, CR0_EM | CR0_TS, CR0_EM | CR0_MP])
    def test_em_and_ts_trap_them(self, code: str, flags: int) -> None:
        lab = Lab()
        lab.state.cr0 |= flags
        assert lab.run(code, eax=7, ebx=DATA) == (Vector.NM, None)

    @pytest.mark.parametrize("code", ESCAPES)
    @pytest.mark.parametrize("flags", [0, CR0_MP, CR0_NE])
    def test_nothing_answers(self, code: str, flags: int) -> None:
        lab = Lab()
        lab.state.cr0 |= flags
        lab.memory.write(DATA, b"\x5a\x5a")
        assert lab.run(code, eax=0x5A5A, ebx=DATA) is None
        assert lab.gpr(EAX) == 0x5A5A
        assert lab.memory.read(DATA, 4) == b"\x5a\x5a\0\0"

    @pytest.mark.parametrize(
        ("flags", "expected"),
        [(0, None), (CR0_TS, None), (CR0_MP, None), (CR0_EM, None), (CR0_MP | CR0_TS, (Vector.NM, None))],
    )
    def test_wait_goes_by_mp_and_ts(self, flags: int, expected: Fault | None) -> None:
        lab = Lab()
        lab.state.cr0 |= flags
        assert lab.run("9b") == expected


def test_hlt_stops_at_the_next_instruction() -> None:
    lab = Lab()
    lab.run("f4")
    assert lab.state.halted
    assert lab.state.eip == ORIGIN + 1


@pytest.mark.parametrize("mode", Mode)
def test_into_traps_only_with_of(mode: Mode) -> None:
    lab = Lab(mode)
    assert lab.run("ce") is None
    lab.state.eflags |= 1 << 11
    assert lab.run("ce") == (Vector.OF, None)


def test_sti_and_cli_change_if_alone() -> None:
    lab = Lab()
    before = lab.state.eflags
    lab.run("fb")
    assert lab.state.eflags == before | IF
    lab.run("fa")
    assert lab.state.eflags == before


@dataclass(slots=True)
class Window:
    """Device memory that reads 5 everywhere and remembers accesses: L or S with the size, and the offset if not 0."""

    log: list[str] = field(default_factory=list)

    def load(self, offset: int, size_bytes: int) -> int:
        self.log.append(f"L{size_bytes}" + (f"+{offset}" if offset else ""))
        return 5

    def store(self, offset: int, size_bytes: int, value: int) -> None:
        assert 0 <= value < 1 << 8 * size_bytes
        self.log.append(f"S{size_bytes}" + (f"+{offset}" if offset else ""))


@pytest.mark.parametrize(
    ("code", "accesses"),
    [
        ("8b 03", "L4"),
        ("66 8b 03", "L2"),
        ("8a 03", "L1"),
        ("89 03", "S4"),
        ("66 89 03", "S2"),
        ("88 03", "S1"),
        ("c6 03 07", "S1"),
        ("01 03", "L4 S4"),
        ("80 03 07", "L1 S1"),
        ("03 03", "L4"),
        ("39 03", "L4"),
        ("66 85 03", "L2"),
        ("f6 13", "L1 S1"),
        ("d3 23", "L4 S4"),  # SHL by 0
        ("c0 23 00", "L1 S1"),
        ("0f a5 03", "L4 S4"),
        ("87 03", "L4 S4"),
        ("86 03", "L1 S1"),
        ("0f c1 03", "L4 S4"),
        ("0f b1 03", "L4 S4"),  # CMPXCHG, different
        ("0f b0 03", "L1 S1"),
        ("0f c7 0b", "L4 L4+4 S4 S4+4"),  # CMPXCHG8B, different
        ("0f ba 23 01", "L4"),
        ("0f ba 2b 00", "L4 S4"),  # BTS of a bit that is set
        ("66 0f ba 33 01", "L2 S2"),
        ("0f 94 03", "S1"),
        ("0f 44 03", "L4"),  # CMOVZ with ZF clear
        ("0f b6 03", "L1"),
        ("66 0f b6 03", "L1"),
        ("0f bf 03", "L2"),
        ("0f bc 03", "L4"),
        ("f7 23", "L4"),
        ("f6 2b", "L1"),
        ("69 03 07 00 00 00", "L4"),
        ("ff 33", "L4"),
        ("8f 03", "S4"),
        ("66 8f 03", "S2"),
        ("8c 1b", "S2"),
        ("0f 01 23", "S2"),
        ("0f 01 03", "S2 S4+2"),
        ("0f 01 13", "L2 L4+2"),
        ("0f 00 03", "S2"),
        ("0f 00 23", "L2"),
        ("63 03", "L2"),  # ARPL, RPL high enough
        ("62 03", "L4 L4+4"),
        ("a1 00 00 00 e0", "L4"),
        ("a2 00 00 00 e0", "S1"),
        ("d7", "L1"),
        ("a5", "L4+256 S4"),
        ("66 a5", "L2+256 S2"),
        ("a7", "L4+256 L4"),
        ("ab", "S4"),
        ("ad", "L4+256"),
        ("ae", "L1"),
        ("f3 a4", "L1+256 S1 L1+257 S1+1"),
        ("0f 0b", ""),
        ("8d 03", ""),
        ("0f 1f 03", ""),
        ("0f 01 3b", ""),
    ],
)
def test_what_a_device_sees(code: str, accesses: str) -> None:
    lab = Lab()
    window = Window()
    lab.memory.map_device(0xE000_0000, 0x1000, window)
    lab.run(code, eax=0xE000_0000 & 0xFF, ecx=0, edx=0, ebx=0xE000_0000, esi=0xE000_0100, edi=0xE000_0000)
    if code.startswith("f3"):
        window.log.clear()
        lab.run(code, ecx=2, esi=0xE000_0100, edi=0xE000_0000)
    assert " ".join(window.log) == accesses
