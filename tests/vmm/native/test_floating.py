"""Encodings of floating-point instructions for the host, and when the pointers of x87 instructions are stored."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from iced_x86 import Code, Decoder, Instruction, OpKind, Register

from machine.cpuid import PENTIUM4_INSTRUCTIONS
from machine.fpustate import FCS, FDP, FDS, FIP, FOP
from machine.instructions.table import FPU_ROWS
from machine.state import CS, DS, SS, CpuState
from tests.oracles.assembler import assemble
from tests.vmm.float_streams import floating_cases
from vmm.native import guest
from vmm.native.cache import TranslationCache
from vmm.native.floating import FLOATING, TRANSFERS, encode
from vmm.native.fpupointers import LastInstruction, LastOperand, Span, recover
from vmm.native.modes import Mode
from vmm.native.operands import EBX, ECX, R12D, Memory
from vmm.native.translator import translate
from vmm.native.unit import Unit

EIP = 0x40_1000

# Rows of the FPU that stay callouts, and why.
CALLOUTS = {
    "they save or load more than emitted code may see": {"fnstenv", "fldenv", "fnsave", "frstor"},
    "old names for nothing": {"fneni", "fndisi", "fnsetpm"},
    "stores by mask, at EDI": {"maskmovq", "maskmovdqu"},
    "MMX state with SSE exceptions": {"cvtpi2ps", "cvtpi2pd", "cvtps2pi", "cvttps2pi", "cvtpd2pi", "cvttpd2pi"},
    "its operand is only checked": {"clflush"},
}  # fmt: skip
FENCES = {"sfence", "lfence", "mfence"}
HINTS = {"prefetchnta", "prefetcht0", "prefetcht1", "prefetcht2"}  # decoded as the reserved NOPs that they were


def test_every_row_is_emitted_or_known_to_be_a_callout() -> None:
    assert (
        set(FPU_ROWS) | {"wait"} == FLOATING | {*TRANSFERS.values()} | set().union(*CALLOUTS.values()) | FENCES | HINTS
    )
    assert {case.row.mnemonic for case in floating_cases()} == (set(FPU_ROWS) | {"wait"}) - HINTS


def test_the_host_gets_the_same_instruction() -> None:
    for case in floating_cases():
        ours = case.instruction
        operand = guest.memory(ours) if guest.has_memory(ours) else None
        if case.row.mnemonic not in FLOATING or (guest.has_memory(ours) and operand is None):
            continue
        code = encode(ours, operand)
        theirs = Decoder(64, code, ip=0).decode()
        assert theirs.len == len(code)
        assert theirs.mnemonic == ours.mnemonic, str(case)
        for n in range(ours.op_count):
            if ours.op_kind(n) == OpKind.REGISTER:
                assert theirs.op_register(n) == _moved(ours.op_register(n)), str(case)
            elif ours.op_kind(n) == OpKind.IMMEDIATE8:
                assert theirs.immediate8 == ours.immediate8
        if operand is not None:
            _check_operand(ours, theirs, code)


def _moved(register: int) -> int:
    return Register.R12D if register == Register.ESP else register


def _check_operand(ours: Instruction, theirs: Instruction, code: bytes) -> None:
    assert theirs.segment_prefix == Register.GS
    assert b"\x67" in code[:3]
    base, index = _registers(ours)
    assert _registers(theirs) == (_moved(base), index)
    if index:
        assert theirs.memory_index_scale == ours.memory_index_scale
    assert theirs.memory_displacement & 0xFFFF_FFFF == ours.memory_displacement
    assert theirs.memory_size == ours.memory_size


def _registers(instruction: Instruction) -> tuple[int, int]:
    return instruction.memory_base, instruction.memory_index


def test_undocumented_encodings_become_documented_ones() -> None:
    for code in (b"\xdc\xd1", b"\xdc\xd9", b"\xdd\xc9", b"\xde\xd1", b"\xdf\xc9", b"\xdf\xd1", b"\xdf\xd9"):
        instruction = Decoder(32, code).decode()
        assert encode(instruction, None) != code
    unchanged = Decoder(32, b"\xd8\xd1").decode()
    assert unchanged.code == Code.FCOM_ST0_STI
    assert encode(unchanged, None) == b"\xd8\xd1"


@pytest.fixture(scope="module")
def tc() -> Iterator[TranslationCache]:
    cache = TranslationCache()
    yield cache
    cache.close()


def unit_of(tc: TranslationCache, source: str) -> Unit:
    return translate(
        tc, Mode(user=False), EIP, assemble(source, origin=EIP).ljust(64, b"\x90"), features=PENTIUM4_INSTRUCTIONS
    )


class TestGates:
    def test_one_for_each_kind_in_a_unit(self, tc: TranslationCache) -> None:
        gate = len(unit_of(tc, "fld1\nhlt").code) - len(unit_of(tc, "nop\nnop\nhlt").code)
        once, twice = unit_of(tc, "paddd mm0, mm1\nhlt"), unit_of(tc, "paddd mm0, mm1\npaddd mm0, mm1\nhlt")
        assert len(twice.code) - len(once.code) < gate
        both = unit_of(tc, "addps xmm0, xmm1\npaddd mm0, mm1\nhlt")
        other = unit_of(tc, "paddd mm0, mm1\naddps xmm0, xmm1\nhlt")
        assert len(other.code) > len(both.code)

    def test_only_with_floating_point(self, tc: TranslationCache) -> None:
        assert unit_of(tc, "inc eax\naddps xmm0, xmm1\nhlt").floating
        assert not unit_of(tc, "inc eax\nmovnti [ecx], eax\nsfence\nhlt").floating


class TestSpans:
    def test_a_run_is_stored_at_its_end(self, tc: TranslationCache) -> None:
        spans = unit_of(tc, "fld dword ptr [ecx]\nfld1\ninc eax\ninc eax\njmp .").spans
        assert spans == (
            Span(1, 1, LastInstruction(EIP, 0x101)),
            Span(2, 3, LastInstruction(EIP + 2, 0x1E8)),
            Span(1, 3, LastOperand(Memory(32, ECX, gs=True), DS)),
        )

    def test_a_changed_base_ends_it(self, tc: TranslationCache) -> None:
        spans = unit_of(tc, "fld dword ptr [ebx]\ninc eax\nmov bl, 3\ninc eax\njmp .").spans
        assert spans == (
            Span(1, 1, LastOperand(Memory(32, EBX, gs=True), DS)),
            Span(1, 3, LastInstruction(EIP, 0x103)),
        )

    def test_a_base_that_moves_is_followed(self, tc: TranslationCache) -> None:
        spans = unit_of(tc, "fld dword ptr [ecx+4*ecx-8]\ninc ecx\nsub ecx, -3\njmp .").spans
        operands = [(span.first, span.last, span.value) for span in spans if isinstance(span.value, LastOperand)]
        places = [Memory(32, ECX, ECX, 4, displacement, gs=True) for displacement in (-8, -13, -28)]
        assert operands == [
            (1, 1, LastOperand(places[0], DS)), (2, 2, LastOperand(places[1], DS)),
        ]  # fmt: skip
        unfinished = unit_of(tc, "fld dword ptr [ecx+4*ecx-8]\ninc ecx\nsub ecx, -3\ncdq\ncdq\njmp .").spans
        assert Span(3, 4, LastOperand(places[2], DS)) in unfinished

    def test_mmx_leaves_none(self, tc: TranslationCache) -> None:
        assert not unit_of(tc, "paddd mm0, [ecx]\ninc eax\njmp .").spans


def test_what_was_not_stored_is_recovered() -> None:
    state = CpuState()
    state.gpr[:] = [0, 0x100, 0, 0, 0xFFFF_FFF0, 0, 0, 0]
    state.segments[CS].selector, state.segments[SS].selector = 8, 16
    spans = (
        Span(1, 2, LastInstruction(0x1234, 0x55)),
        Span(3, 4, LastInstruction(0x5678, 0x66)),
        Span(2, 3, LastOperand(Memory(64, R12D, ECX, 4, 0x20, gs=True), SS)),
    )

    def pointers() -> list[int]:
        return [state.fpu.words[at // 4] for at in (FIP, FCS, FOP, FDP, FDS)]

    recover(spans, 0, state)
    assert pointers() == [0, 0, 0, 0, 0]
    recover(spans, 1, state)
    assert pointers() == [0x1234, 8, 0x55, 0, 0]
    recover(spans, 3, state)
    assert pointers() == [0x5678, 8, 0x66, 0x410, 16]
