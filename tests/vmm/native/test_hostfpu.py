"""The host's FPU as a port: what it refuses, what it encodes, and that neither side sees the other's registers."""

from __future__ import annotations

import ctypes
import gc

import capstone
import pytest
from capstone import x86_const
from iced_x86 import Code_, Decoder, Instruction

from machine.cpuid import PENTIUM4_INSTRUCTIONS
from machine.fpustate import FLAGS, GPR, OPERAND, FpuState
from machine.instructions import CODE_NAMES, fpu, lookup, simd
from tests.machine.fpu_batch import image
from tests.machine.fpu_forms import Form, forms
from vmm.native import hostmemory
from vmm.native.assembler import Assembler
from vmm.native.hostfpu import HostFpu, encode
from vmm.native.operands import RDI, dword, word

ADDRESS = 0x1234_5678
THIRD = 0x3FFD_AAAA_AAAA_AAAA_AAAB


def _decoded(code: bytes) -> Instruction:
    return Decoder(32, code).decode()


def _computed() -> list[Form]:
    return [form for form in forms(ADDRESS) if form.row in fpu.COMPUTED | simd.COMPUTED]


@pytest.fixture
def host() -> tuple[FpuState, HostFpu]:
    state = FpuState()
    return state, HostFpu(state)


def test_whatever_the_tables_do_not_name_is_refused(host: tuple[FpuState, HostFpu]) -> None:
    allowed = {form.code for form in _computed()}
    refused = 0
    for code in CODE_NAMES:
        if code in allowed:
            continue
        instruction = Instruction()
        instruction.code = code
        with pytest.raises(ValueError, match=r"is not computed|has an operand|has a register"):
            host[1].computation(instruction)
        refused += 1
    assert refused > 4000
    assert len(allowed) > 350


@pytest.mark.parametrize(
    "code",
    [
        "0fae0500000000", "0fae0d00000000", "0fae1500000000", "d92d00000000", "dbe3", "9bdbe3", "d93500000000",
        "660ff7ca", "660f3a15c000", "0fc30500000000", "0f1800", "db0d00000000", "f20f7cc1", "0f05",
        "cd80", "c5f058c2", "c3",
    ],
)  # fmt: skip
def test_instructions_that_touch_control_state_or_other_memory_are_refused(
    host: tuple[FpuState, HostFpu], code: str
) -> None:
    with pytest.raises(ValueError, match="is not computed"):
        host[1].computation(_decoded(bytes.fromhex(code)))


def test_prefixes_and_addresses_of_the_guest_are_not_passed_on() -> None:
    plain = encode(_decoded(b"\xd9\x05" + ADDRESS.to_bytes(4, "little")))[0]
    for prefixes in (b"\x64", b"\x65", b"\x67\x67", b"\x26\x2e", b"\xf3", b"\x66"):
        # fld dword [address]
        size = 2 if b"\x67" in prefixes else 4
        code = prefixes + (b"\xd9\x06" if size == 2 else b"\xd9\x05") + ADDRESS.to_bytes(4, "little")[:size]
        assert encode(_decoded(code))[0] == plain


def test_the_host_instruction_is_the_same_with_operands_of_ours() -> None:
    engine = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    guest = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_32)
    engine.detail = guest.detail = True
    seen: set[Code_] = set()
    for form in _computed():
        body, source, target = encode(_decoded(form.data))
        if CODE_NAMES[form.code].endswith(("DCD0", "DCD8", "DDC8", "DED0", "DFC8", "DFD0", "DFD8")):
            assert body == form.data  # undocumented aliases, which Capstone does not know
            continue
        theirs, ours = next(guest.disasm(form.data, 0)), next(engine.disasm(body, 0))
        assert ours.size == len(body)
        assert ours.mnemonic == theirs.mnemonic, form.name
        assert body[0] not in (0x64, 0x65, 0x67, 0xF0), form.name
        memory = [operand for operand in ours.operands if operand.type == x86_const.X86_OP_MEM]
        assert bool(memory) == form.has_memory, form.name
        for operand in memory:
            mem = operand.mem
            assert (ours.reg_name(mem.base), mem.index, mem.disp, mem.segment) == ("rbx", 0, OPERAND, 0), form.name
            assert operand.size <= 16
        registers = [operand.reg for operand in ours.operands if operand.type == x86_const.X86_OP_REG]
        general = [ours.reg_name(register) for register in registers if ours.reg_name(register)[0] == "e"]
        assert set(general) <= {"eax"}, form.name
        assert (source or target) == bool(general), form.name
        immediates = [operand.imm & 0xFF for operand in ours.operands if operand.type == x86_const.X86_OP_IMM]
        assert immediates == [o.imm & 0xFF for o in theirs.operands if o.type == x86_const.X86_OP_IMM]
        seen.add(form.code)
    assert len(seen) > 340


def test_general_purpose_registers_go_through_their_slot(host: tuple[FpuState, HostFpu]) -> None:
    state, port = host
    state.unpack(image())
    for number in range(8):
        state.words[GPR // 4] = 0x1111_0000 + number
        port.computation(_decoded(bytes((0x66, 0x0F, 0x6E, 0xC0 | number))))()  # movd xmm0, r32
        assert state.xmm(0) == 0x1111_0000 + number
        state.words[GPR // 4] = 0
        port.computation(_decoded(bytes((0x66, 0x0F, 0x7E, 0xC0 | number))))()  # movd r32, xmm0
        assert state.words[GPR // 4] == 0x1111_0000 + number


def test_flags_go_in_and_out(host: tuple[FpuState, HostFpu]) -> None:
    state, port = host
    compare, move = _decoded(b"\xdb\xf1"), _decoded(b"\xda\xc1")  # fcomi st, st(1); fcmovb st, st(1)
    for first, second, flags in ((1, 2, 0x01), (2, 1, 0x00), (1, 1, 0x40)):
        state.unpack(image(st=[(0x3FFE + first) << 64 | 1 << 63, (0x3FFE + second) << 64 | 1 << 63, *[0] * 6]))
        state.words[FLAGS // 4] = 0x8D5
        port.computation(compare)()
        assert state.words[FLAGS // 4] & 0x8D5 == flags
        assert state.words[FLAGS // 4 + 1] == 0
        before = state.st(0)
        port.computation(move)()
        assert (state.st(0) != before) == (flags == 1)


def test_control_words_of_the_host_and_the_guest_are_kept_apart(host: tuple[FpuState, HostFpu]) -> None:
    state, port = host
    mapping = hostmemory.DualMapping(4096, "test")
    try:
        assembler = Assembler(mapping.host)
        assembler.emit("stmxcsr", dword(RDI))
        assembler.emit("fnstcw", word(RDI, 4))
        assembler.emit("ret")
        loader = assembler.here
        assembler.emit("fldcw", word(RDI, 4))
        assembler.emit("ret")
        code = assembler.finish()
        mapping.data[: len(code)] = code
        slot = ctypes.create_string_buffer(8)
        look = ctypes.PYFUNCTYPE(None, ctypes.c_uint64)(mapping.host)
        load = ctypes.PYFUNCTYPE(None, ctypes.c_uint64)(loader)
        look(ctypes.addressof(slot))
        own = ctypes.create_string_buffer(slot.raw)
        unusual = ctypes.create_string_buffer(slot.raw[:4] + b"\x7f\x02")
        assert slot.raw[4:6] != b"\x7f\x02"
        load(ctypes.addressof(unusual))
        look(ctypes.addressof(slot))
        before = slot.raw
        state.unpack(image(fcw=0xC40, mxcsr=0xFFC0, st=[THIRD] * 8, xmm=[0x3EAA_AAAB] * 8, tags=0xFF))
        port.computation(_decoded(b"\xdc\xc9"))()  # fmul st(1), st
        state.mxcsr |= 0x1F80
        port.computation(_decoded(b"\xf3\x0f\x59\xc1"))()  # mulss xmm0, xmm1
        assert state.fcw == 0xC40
        assert state.mxcsr & 0xFFC0 == 0xFFC0
        assert state.fsw & 0x80
        look(ctypes.addressof(slot))
        # The exception flags are the host's business.
        assert [a & b for a, b in zip(slot.raw, b"\xc0\xff\xff\xff\xff\xff\0\0", strict=True)] == [
            a & b for a, b in zip(before, b"\xc0\xff\xff\xff\xff\xff\0\0", strict=True)
        ]
    finally:
        load(ctypes.addressof(own))
        mapping.close()


def test_the_upper_xmm_registers_of_the_host_stay_out_of_the_page(host: tuple[FpuState, HostFpu]) -> None:
    state, port = host
    for form in _computed():
        state.unpack(image(st=[THIRD] * 8, xmm=[(1 << 128) - 1] * 8))
        port.computation(_decoded(form.data))()
        assert state.bytes8[288:512] == bytes(224), form.name


def test_a_computation_outlives_the_port(host: tuple[FpuState, HostFpu]) -> None:
    state = FpuState()
    compute = HostFpu(state).computation(_decoded(b"\xd9\xe8"))
    state.initialize()
    gc.collect()
    compute()
    assert state.st(0) == 0x3FFF_8000_0000_0000_0000
    del host


def test_the_same_instruction_is_encoded_once(host: tuple[FpuState, HostFpu]) -> None:
    port = host[1]
    first = port.computation(_decoded(b"\xd9\x05\x00\x00\x00\x00"))
    assert port.computation(_decoded(b"\x64\xd9\x44\x88\x10")) is first
    assert port.computation(_decoded(b"\xd9\x15\x00\x00\x00\x00")) is not first


def test_every_row_that_is_computed_is_in_the_table() -> None:
    rows = {lookup(form.code, PENTIUM4_INSTRUCTIONS) for form in _computed()}
    assert {row.mnemonic for row in rows if row is not None} == fpu.COMPUTED | simd.COMPUTED
