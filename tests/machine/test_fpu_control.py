"""Control and state instructions of the FPU: pointers, environments and images to the byte, pending errors, FERR#."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest

from machine.cpuid import MODELS, PENTIUM4
from machine.debug import StopKind
from machine.faults import GuestFault, Vector
from machine.flags import IF, VM
from machine.fpu import FpuFrozen, is_pending
from machine.fpustate import (
    FCS,
    FDP,
    FDS,
    FIP,
    FOP,
    SSE_REGISTERS,
    X87_REGISTERS,
    FpuState,
    read_register,
    write_register,
)
from machine.state import CR0_NE, CR0_PE, CR4_OSFXSR, CR4_OSXMMEXCPT, CpuState
from tests.machine.fpu_batch import image
from tests.machine.test_fpu_faults import OPERAND, Bench
from tests.vmm.bare import Bare, flat, handler_of
from vmm.native.hostfpu import HostFpu

ONE = 0x3FFF_8000_0000_0000_0000
TWO = 0x4000_8000_0000_0000_0000


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.cpu.memory.close()


def _at(code: str, address: int = OPERAND) -> bytes:
    return bytes.fromhex(code) + address.to_bytes(4, "little")


def _pointers(fpu: FpuState) -> tuple[int, int, int, int, int]:
    words = fpu.words
    return words[FIP // 4], words[FCS // 4], words[FDP // 4], words[FDS // 4], words[FOP // 4]


# The state.


def test_reset_leaves_zeros_that_are_not_empty() -> None:
    state = CpuState()
    state.fpu.unpack(image(fcw=0, st=[ONE] * 8, xmm=[5] * 8, mxcsr=0))
    state.reset()
    expected = image(fcw=0x40, tags=0xFF)
    assert state.fpu.pack() == expected
    assert (state.fpu.tags, state.fpu.mxcsr) == (0x5555, 0x1F80)


def test_pack_and_unpack_are_inverse_and_the_cpu_state_holds_them() -> None:
    given = bytearray(image(fcw=0x27F, fsw=0x3041, tags=0x5A, st=[ONE + n for n in range(8)], xmm=range(8)))
    struct.pack_into("<HIHHIHH", given, 6, 0x7AB, 0x1122_3344, 0x55, 0, 0x6677_8899, 0xAA, 0)
    first, second = CpuState(), CpuState()
    first.fpu.unpack(bytes(given))
    second.unpack(first.pack())
    assert second.fpu.pack() == bytes(given)
    assert _pointers(second.fpu) == (0x1122_3344, 0x55, 0x6677_8899, 0xAA, 0x7AB)


def test_what_no_register_has_is_dropped_from_an_image() -> None:
    fpu = FpuState()
    fpu.unpack(b"\xff" * 512)
    packed = fpu.pack()
    assert (fpu.fcw, fpu.mxcsr, _pointers(fpu)[4]) == (0x1F7F, 0xFFFF, 0x7FF)
    assert packed[5] == 0
    assert packed[42:48] == bytes(6)
    assert packed[14:16] == bytes(2)
    assert packed[288:] == bytes(224)


def test_summary_bits_follow_from_flags_and_masks() -> None:
    fpu = FpuState()
    for fcw, fsw, expected in (
        (0x37F, 0x0001, 0x0001),
        (0x37E, 0x0001, 0x8081),
        (0x37F, 0x8081, 0x0001),
        (0x37E, 0x8080, 0x0000),
        (0x35F, 0x0020, 0x80A0),
    ):
        fpu.unpack(image(fcw=fcw, fsw=fsw))
        assert fpu.fsw == expected
        assert is_pending(fpu) == bool(expected & 0x80)


def test_tags_are_worked_out_from_the_contents() -> None:
    fpu = FpuState()
    contents = [ONE, 0, 1 << 79, 1, 0x7FFF_8000_0000_0000_0000, 0x3FFF_0000_0000_0000_0001, 1 << 63, ONE]
    # TOP is 2, so ST(0) is register 2; register 1, which is ST(7), is empty.
    fpu.unpack(image(fsw=2 << 11, tags=0xFD, st=contents))
    #      register:  7    6    5    4    3    2    1    0
    assert fpu.tags == 0b10_10_10_01_01_00_11_10
    assert read_register(fpu, "ftag") == fpu.tags
    fpu.tags = 0b11_00_00_11_01_10_00_11
    assert fpu.pack()[4] == 0b0110_1110


def test_debuggers_read_and_write_every_register() -> None:
    fpu = FpuState()
    for n, name in enumerate((*X87_REGISTERS, *SSE_REGISTERS)):
        value = {"fctrl": 0x27F, "fstat": 0x3800, "ftag": 0xFFFF, "mxcsr": 0x9FC0}.get(name, 0x101 + n)
        write_register(fpu, name, value)
        assert read_register(fpu, name) == value
    write_register(fpu, "st3", (1 << 80) - 1)
    write_register(fpu, "xmm7", (1 << 128) - 1)
    write_register(fpu, "fop", 0xFFFF)
    write_register(fpu, "fioff", 0xFFFF_FFFF)
    assert [read_register(fpu, name) for name in ("st3", "xmm7", "fop", "fioff")] == [
        (1 << 80) - 1,
        (1 << 128) - 1,
        0x7FF,
        0xFFFF_FFFF,
    ]
    with pytest.raises(KeyError):
        write_register(fpu, "nothing", 0)


# Pointers.


def test_pointers_are_those_of_the_last_instruction_that_is_no_control_instruction(bench: Bench) -> None:
    fpu, state = bench.cpu.state.fpu, bench.cpu.state
    fpu.initialize()
    assert _pointers(fpu) == (0, 0, 0, 0, 0)
    state.eip = 0x1234
    assert bench.execute(b"\x2e" + _at("d905")) is None  # fld dword cs:[OPERAND]
    assert _pointers(fpu) == (0x1234, 8, OPERAND, 8, 0x105)
    state.eip = 0x2000
    assert bench.execute(b"\xd9\xe8") is None  # fld1: no operand, so that the operand's pointer stays
    assert _pointers(fpu) == (0x2000, 8, OPERAND, 8, 0x1E8)
    state.eip = 0x3000
    for code in ("9b", "dbe2", "d9 3d 00001000", "d9 2d 00001000", "dfe0", "dd 3d 00001000", "dbe0"):
        bench.cpu.memory.write(OPERAND, b"\x7f\x03")
        assert bench.execute(bytes.fromhex(code)) is None
    for code in ("0fefc0", "0f58c0", "0f77"):  # MMX and SSE
        assert bench.execute(bytes.fromhex(code)) is None
    assert _pointers(fpu) == (0x2000, 8, OPERAND, 8, 0x1E8)
    state.gpr[3] = OPERAND
    assert bench.execute(b"\xdd\x5b\x08") is None  # fstp qword [ebx+8]
    assert _pointers(fpu) == (0x3000, 8, OPERAND + 8, 16, 0x55B)
    assert bench.execute(b"\xdb\xe3") is None
    assert _pointers(fpu) == (0, 0, 0, 0, 0)


def test_a_store_that_faults_leaves_the_pointers(bench: Bench) -> None:
    bench.page()
    bench.cpu.state.fpu.initialize()
    bench.execute(b"\xd9\xe8")
    before = bench.cpu.state.pack()
    assert bench.vector(_at("dd1d")) == Vector.PF
    assert bench.cpu.state.pack() == before


# Environments.


def _pointing(bench: Bench) -> None:
    """A state with all fields different: TOP 5, three registers in use."""
    fpu = bench.cpu.state.fpu
    fpu.unpack(image(fcw=0x272, fsw=0x2901, tags=0xE0, st=[ONE, 0, 1, 7, 8, 9, 10, 11]))
    for name, value in (("fioff", 0x1234_5678), ("fiseg", 8), ("fooff", 0x9ABC_DEF0), ("foseg", 16), ("fop", 0x5AB)):
        write_register(fpu, name, value)


_TAGS = 0b10_01_00_11_11_11_11_11
_REAL_FIP, _REAL_FDP = 0x1234_5678 + 0x80, 0x9ABC_DEF0 + 0x100
ENVIRONMENTS = {
    (32, True): struct.pack(
        "<7I", 0xFFFF_0272, 0xFFFF_A981, 0xFFFF_0000 | _TAGS, 0x1234_5678, 0x5AB << 16 | 8, 0x9ABC_DEF0, 0xFFFF_0010
    ),
    (16, True): struct.pack("<7H", 0x272, 0xA981, _TAGS, 0x5678, 8, 0xDEF0, 16),
    (32, False): struct.pack(
        "<7I", 0xFFFF_0272, 0xFFFF_A981, 0xFFFF_0000 | _TAGS, 0xFFFF_0000 | _REAL_FIP & 0xFFFF,
        (_REAL_FIP >> 16) << 12 | 0x5AB, 0xFFFF_0000 | _REAL_FDP & 0xFFFF, (_REAL_FDP >> 16) << 12,
    ),
    (16, False): struct.pack(
        "<7H", 0x272, 0xA981, _TAGS, _REAL_FIP & 0xFFFF, (_REAL_FIP >> 16 & 0xF) << 12 | 0x5AB, _REAL_FDP & 0xFFFF,
        (_REAL_FDP >> 16 & 0xF) << 12,
    ),
}  # fmt: skip


def _enter(bench: Bench, protected: bool) -> None:
    if not protected:
        bench.cpu.state.cr0 &= ~CR0_PE


@pytest.mark.parametrize(("bits", "protected"), ENVIRONMENTS)
def test_fnstenv_in_its_four_formats(bench: Bench, bits: int, protected: bool) -> None:
    _pointing(bench)
    _enter(bench, protected)
    prefix = b"\x66" if bits == 16 else b""
    expected = ENVIRONMENTS[bits, protected]
    bench.cpu.memory.write(OPERAND, b"\xcc" * 40)
    assert bench.execute(prefix + _at("d935")) is None
    assert bench.cpu.memory.read(OPERAND, 40) == expected + b"\xcc" * (40 - len(expected))
    assert (bench.cpu.state.fpu.fcw, bench.cpu.state.fpu.fsw) == (0x27F, 0x2901), "all exceptions are masked afterwards"


def test_virtual_8086_mode_has_the_formats_of_real_mode(bench: Bench) -> None:
    _pointing(bench)
    bench.cpu.state.eflags |= VM
    assert bench.execute(_at("66d935")) is None
    assert bench.cpu.memory.read(OPERAND, 14) == ENVIRONMENTS[16, False]


@pytest.mark.parametrize(("bits", "protected"), ENVIRONMENTS)
def test_fnsave_and_frstor_in_four_formats(bench: Bench, bits: int, protected: bool) -> None:
    _pointing(bench)
    _enter(bench, protected)
    fpu = bench.cpu.state.fpu
    prefix = b"\x66" if bits == 16 else b""
    registers = b"".join(fpu.st(n).to_bytes(10, "little") for n in range(8))
    values = [fpu.st(n) for n in range(8)]
    assert bench.execute(prefix + _at("dd35")) is None
    expected = ENVIRONMENTS[bits, protected] + registers
    assert bench.cpu.memory.read(OPERAND, 120) == expected.ljust(120, b"\0")
    assert (fpu.fcw, fpu.fsw, fpu.tags, _pointers(fpu)) == (0x37F, 0, 0xFFFF, (0, 0, 0, 0, 0))
    # Register 5 was ST(0); with TOP 0 it is ST(5).
    assert [fpu.st(n) for n in range(8)] == values[3:] + values[:3]
    assert bench.execute(prefix + _at("dd25")) is None
    assert (fpu.fcw, fpu.fsw, fpu.tags) == (0x272, 0xA981, _TAGS)
    assert [fpu.st(n) for n in range(8)] == values
    fpu.fcw |= 0x3F
    fpu.fsw &= 0x7F00
    # What was stored and loaded once comes out the same again, as far as a format holds it.
    assert bench.execute(prefix + _at("d935", OPERAND + 0x200)) is None
    first, size = struct.unpack("<7I" if bits == 32 else "<7H", expected[: bits * 7 // 8]), bits * 7 // 8
    again = struct.unpack("<7I" if bits == 32 else "<7H", bench.cpu.memory.read(OPERAND + 0x200, size))
    assert again[2:] == first[2:]


def test_fldenv_keeps_the_physical_registers(bench: Bench) -> None:
    fpu = bench.cpu.state.fpu
    fpu.unpack(image(fsw=0, st=[ONE + n for n in range(8)]))
    bench.cpu.memory.write(OPERAND, struct.pack("<7I", 0x37F, 3 << 11, 0xFF3F, 0, 0, 0, 0))
    assert bench.execute(_at("d925")) is None
    assert [fpu.st(n) for n in range(8)] == [ONE + (n + 3 & 7) for n in range(8)]
    assert fpu.pack()[4] == 0b0000_1000


def test_fldenv_may_make_an_error_pending(bench: Bench) -> None:
    bench.cpu.memory.write(OPERAND, struct.pack("<7I", 0x37E, 1, 0xFFFF, 0, 0, 0, 0))
    bench.cpu.state.fpu.initialize()
    assert bench.execute(_at("d925")) is None
    assert bench.cpu.state.fpu.fsw == 0x8081
    assert bench.vector(b"\xd9\xd0") == Vector.MF


def test_fldcw_unmasks_what_was_flagged(bench: Bench) -> None:
    fpu = bench.cpu.state.fpu
    fpu.initialize()
    fpu.fsw = 0x0004
    bench.cpu.memory.write(OPERAND, (0xE33B).to_bytes(2, "little"))
    assert bench.execute(_at("d92d")) is None
    assert (fpu.fcw, fpu.fsw) == (0x037B, 0x8084)
    assert bench.vector(b"\x9b") == Vector.MF
    assert bench.execute(b"\xdb\xe2") is None  # fnclex
    assert fpu.fsw == 0
    assert bench.execute(b"\x9b") is None


def test_fnclex_clears_flags_and_keeps_the_rest(bench: Bench) -> None:
    bench.cpu.state.fpu.unpack(image(fcw=0x340, fsw=0x7F7F))
    assert bench.execute(b"\xdb\xe2") is None
    assert bench.cpu.state.fpu.fsw == 0x7F00


def test_fnstsw_and_fnstcw(bench: Bench) -> None:
    state = bench.cpu.state
    state.fpu.unpack(image(fcw=0x27E, fsw=0x7F01))
    state.gpr[0] = 0xAABB_CCDD
    assert bench.execute(b"\xdf\xe0") is None
    assert state.gpr[0] == 0xAABB_FF81
    assert bench.execute(_at("dd3d")) is None
    assert bench.execute(_at("d93d", OPERAND + 2)) is None
    assert bench.cpu.memory.read(OPERAND, 6) == bytes.fromhex("81ff 7e02 0000")


# FXSAVE.


def test_fxsave_writes_288_bytes(bench: Bench) -> None:
    given = image(fcw=0x27F, fsw=0x1801, tags=0x3C, mxcsr=0x9FC0, st=[ONE + n for n in range(8)], xmm=range(1, 9))
    fpu = bench.cpu.state.fpu
    fpu.unpack(given)
    for name, value in (("fioff", 0x1234_5678), ("fiseg", 8), ("fooff", 0x9ABC_DEF0), ("foseg", 16), ("fop", 0x5AB)):
        write_register(fpu, name, value)
    expected = bytearray(given)
    struct.pack_into("<HIHHIHH", expected, 6, 0x5AB, 0x1234_5678, 8, 0, 0x9ABC_DEF0, 16, 0)
    bench.cpu.memory.write(OPERAND, b"\xcc" * 512)
    assert bench.execute(_at("0fae05")) is None
    assert bench.cpu.memory.read(OPERAND, 512) == bytes(expected[:288]) + b"\xcc" * 224
    before = fpu.pack()
    fpu.unpack(image(st=[TWO] * 8, xmm=[77] * 8))
    assert bench.execute(_at("0fae0d")) is None
    assert fpu.pack() == before


def test_without_osfxsr_fxsave_and_fxrstor_leave_sse_out(bench: Bench) -> None:
    bench.cpu.state.cr4 = 0
    fpu = bench.cpu.state.fpu
    fpu.unpack(image(mxcsr=0x9FC0, st=[ONE] * 8, xmm=[5] * 8))
    assert bench.execute(_at("0fae05")) is None
    saved = bench.cpu.memory.read(OPERAND, 512)
    assert (saved[24:32], saved[32:42], saved[160:]) == (bytes(8), ONE.to_bytes(10, "little"), bytes(352))
    bench.cpu.memory.write(OPERAND, image(mxcsr=0xFFFF_FFFF, st=[TWO] * 8, xmm=[6] * 8))
    assert bench.execute(_at("0fae0d")) is None
    assert (fpu.mxcsr, fpu.st(7), fpu.xmm(7)) == (0x9FC0, TWO, 5)


def test_reserved_bits_of_mxcsr_are_general_protection(bench: Bench) -> None:
    fpu = bench.cpu.state.fpu
    fpu.unpack(image(mxcsr=0x1F80))
    before = fpu.pack()
    for bit in (16, 17, 31):
        bench.cpu.memory.write(OPERAND, image(mxcsr=0x1F80 | 1 << bit, st=[ONE] * 8))
        fault = bench.execute(_at("0fae0d"))
        assert fault is not None
        assert (fault.vector, fault.error_code) == (Vector.GP, 0)
        fault = bench.execute(_at("0fae15", OPERAND + 24))
        assert fault is not None
        assert (fault.vector, fault.error_code) == (Vector.GP, 0)
    assert fpu.pack() == before
    bench.cpu.memory.write(OPERAND, (0x603F).to_bytes(4, "little"))
    assert bench.execute(_at("0fae15")) is None, "flags that are set raise nothing, though unmasked"
    assert fpu.mxcsr == 0x603F
    assert bench.execute(_at("0fae1d", OPERAND + 4)) is None
    assert bench.cpu.memory.read(OPERAND + 4, 4) == (0x603F).to_bytes(4, "little")


# Errors.


def test_an_unmasked_error_keeps_the_result_out_of_memory_and_on_the_stack(bench: Bench) -> None:
    fpu = bench.cpu.state.fpu
    huge = 0x7FFE_FFFF_FFFF_FFFF_FFFF
    for fcw, value, stored in ((0x377, huge, False), (0x36F, 1, False), (0x37E, 0x7FFF_8000_0000_0000_0001, False),
                               (0x35F, ONE | 1, True), (0x37F, huge, True)):  # fmt: skip
        fpu.unpack(image(fcw=fcw, tags=0xFF, st=[value] * 8))
        bench.cpu.memory.write(OPERAND, b"\xcc" * 4)
        assert bench.execute(_at("d91d")) is None  # fstp dword
        assert (bench.cpu.memory.read(OPERAND, 4) != b"\xcc" * 4) == stored, hex(fcw)
        assert (fpu.top == 1) == stored
        assert bool(fpu.fsw & 0x80) == (fcw != 0x37F)


def _with_fpu(bare: Bare) -> Bare:
    bare.cpu.model = PENTIUM4
    bare.cpu.fpu = HostFpu(bare.state.fpu)
    bare.state.cr4 |= CR4_OSFXSR | CR4_OSXMMEXCPT
    bare.state.cr0 |= CR0_NE
    return bare


DIVIDE_BY_ZERO = "jmp begin; mask: .word 0x37b; begin: fninit; fldcw [mask]; fld1; fldz; fdivp;"


def test_an_x87_error_is_told_at_the_next_instruction_that_waits() -> None:
    bare = _with_fpu(flat(DIVIDE_BY_ZERO + "nop; fnstsw ax; fld1; nop"))
    for _ in range(40):
        bare.run(1)
        if bare.state.halted:
            break
    stack = struct.unpack("<3I", bare.memory.read(bare.state.gpr[4], 12))
    assert bare.state.eip == handler_of(Vector.MF) + 1
    assert bare.state.gpr[0] & 0x84 == 0x84
    code = bare.memory.read(stack[0], 2)
    assert code == b"\xd9\xe8", "the saved EIP is that of the instruction that waited"


def test_an_sse_error_is_told_at_once() -> None:
    bare = _with_fpu(flat("jmp begin; mask: .long 0x1d80; begin: ldmxcsr [mask]; xorps xmm1, xmm1; divss xmm1, xmm1; "
                          "cvtsi2ss xmm0, esp; divss xmm0, xmm2; nop"))  # fmt: skip
    for _ in range(20):
        bare.run(1)
        if bare.state.halted:
            break
    stack = struct.unpack("<3I", bare.memory.read(bare.state.gpr[4], 12))
    assert bare.state.eip == handler_of(Vector.XM) + 1
    assert bare.memory.read(stack[0], 4) == b"\xf3\x0f\x5e\xc2"
    assert bare.state.fpu.mxcsr & 0x3F == 0x05


def test_with_ne_clear_an_error_freezes_the_cpu_until_irq_13() -> None:
    bare = _with_fpu(flat(DIVIDE_BY_ZERO + "nop; fld1; nop; nop"))
    cpu, state = bare.cpu, bare.state
    state.cr0 &= ~CR0_NE
    state.eflags |= IF
    levels: list[bool] = []

    def drive(level: bool) -> None:
        levels.append(level)
        bare.lines.set_intr(level)

    bare.lines.acknowledge = lambda: 0x75
    cpu.fpu_error.drive_irq = drive
    bare.run(8)
    assert levels == [True]
    assert state.halted
    stack = struct.unpack("<I", bare.memory.read(state.gpr[4], 4))[0]
    assert state.eip in (handler_of(0x75), handler_of(0x75) + 1)
    assert bare.memory.read(stack, 2) == b"\xd9\xe8"
    # The handler writes to port F0h: the line falls, and instructions that wait go on until the error is cleared.
    cpu.fpu_error.acknowledge()
    assert levels == [True, False]
    bench = Bench.__new__(Bench)
    bench.cpu = cpu
    before = state.fpu.top
    assert bench.execute(b"\xd9\xe8") is None
    assert state.fpu.top == before - 1 & 7
    assert state.fpu.fsw & 0x84 == 0x84, "the error stays"
    assert bench.execute(b"\x9b") is None
    assert bench.execute(b"\xdb\xe2") is None
    assert not cpu.fpu_error.ferr
    assert not cpu.fpu_error.ignne
    assert state.fpu.fsw & 0x84 == 0


def test_a_frozen_cpu_without_interrupts_stands_still() -> None:
    bare = _with_fpu(flat(DIVIDE_BY_ZERO + "fld1; nop"))
    bare.state.cr0 &= ~CR0_NE
    stop = bare.run(20)
    assert stop.kind is StopKind.HALTED
    assert bare.memory.read(bare.state.eip, 2) == b"\xd9\xe8"
    assert bare.clock.icount == 6


def test_an_ignored_stack_fault_gives_way_to_a_newer_invalid_operation(bench: Bench) -> None:
    signaling = 0x7FFF_8000_0000_0000_0001
    state = bench.cpu.state
    state.cr0 &= ~CR0_NE
    bench.cpu.fpu_error.report()
    bench.cpu.fpu_error.acknowledge()
    state.fpu.unpack(image(fcw=0x37E, fsw=0x0241, st=[signaling] * 8))
    assert bench.execute(b"\xd9\xfa") is None  # fsqrt
    assert state.fpu.fsw & 0x80FF == 0x8081
    state.fpu.unpack(image(fcw=0x37E, fsw=0x0241, st=[ONE] * 8))
    assert bench.execute(b"\xd9\xfa") is None
    assert state.fpu.fsw & 0x80FF == 0x80C1


def test_frozen_is_no_exception_of_the_guest() -> None:
    assert isinstance(FpuFrozen(), GuestFault)


# CPUID.


def test_the_models_announce_what_they_have() -> None:
    assert set(MODELS) == {"p6-nofpu", "pentium4"}
    model = MODELS["pentium4"]
    signature, misc, ecx, features = model.leaf(1)
    assert signature >> 8 & 0xF == 15
    assert (misc >> 8 & 0xFF) * 8 == 64
    assert ecx == 0
    for bit in (0, 19, 23, 24, 25, 26):
        assert features >> bit & 1, bit
        assert not MODELS["p6-nofpu"].leaf(1)[3] >> bit & 1
    for bit in (7, 9, 12, 14, 16, 17, 18, 21, 22, 27, 28, 29, 31):
        assert not features >> bit & 1, bit
    assert model.has_fpu
    assert not MODELS["p6-nofpu"].has_fpu
    assert model.cr4_mask & ~MODELS["p6-nofpu"].cr4_mask == CR4_OSFXSR | CR4_OSXMMEXCPT
