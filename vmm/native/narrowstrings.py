"""Translation of string instructions with 16-bit addresses, or in segments that are not flat: the host's own again.

ESI and EDI are window + linear address while the instruction runs. Unlike in `strings` their low halves are not the
guest's registers then, so a fault in it has to be made good by `recover`: what was kept in the state block, moved by as
much as the host moved. A REP must stay within its segments and, with 16-bit addresses, within 64 KiB, and go upwards;
any other is interpreted.
"""

from __future__ import annotations

from dataclasses import dataclass

from iced_x86 import Instruction, Mnemonic, OpKind

from machine.flags import DF
from machine.state import DS, ECX, EDI, ES, ESI, MASK32
from vmm.native import guest, segmented, strings
from vmm.native.operands import CX, R8, R8D, R8W, R9, R9D, R9W, RDI, RSI, address
from vmm.native.operands import ECX as HOST_ECX
from vmm.native.operands import EDI as HOST_EDI
from vmm.native.operands import ESI as HOST_ESI
from vmm.native.operands import Register as HostRegister
from vmm.native.stateblock import OFFSETS, StateBlock, field, segment_bound
from vmm.native.unit import Draft, Repetition

_NARROW = frozenset({OpKind.MEMORY_SEG_SI, OpKind.MEMORY_SEG_DI, OpKind.MEMORY_ESDI})
_STORING = frozenset({Mnemonic.MOVSB, Mnemonic.MOVSW, Mnemonic.MOVSD, Mnemonic.STOSB, Mnemonic.STOSW, Mnemonic.STOSD})
_DF_TO_SIGN = 63 - (DF.bit_length() - 1)


@dataclass(frozen=True, slots=True)
class _Pointer:
    """One of the two: the guest's register, where the host has it, and the fields that it is kept in."""

    number: int
    narrow: HostRegister
    wide: HostRegister
    kept: str
    linear: str


_SOURCE = _Pointer(ESI, HOST_ESI, RSI, "string_esi", "string_source")
_DESTINATION = _Pointer(EDI, HOST_EDI, RDI, "string_edi", "string_destination")


def emit_string(draft: Draft, instruction: Instruction) -> bool:
    """MOVS CMPS STOS LODS SCAS, with REP, REPE, REPNE or none."""
    opcode, registers = strings.FORMS[instruction.mnemonic]
    size_bytes = 2 if opcode[0] == 0x66 else 1 + 3 * (opcode[-1] & 1)
    is_narrow = any(instruction.op_kind(n) in _NARROW for n in range(instruction.op_count))
    repeats = instruction.has_rep_prefix or instruction.has_repne_prefix
    emit = draft.asm.emit
    if repeats:
        _check_upwards(draft)
        if not is_narrow and size_bytes > 1:
            strings.emit_count_check(draft, instruction.ip32, strings.LIMIT_LOG2)
    used = []
    if any(wide is RSI for wide, _ in registers):
        segment = guest.segment_number(instruction.segment_prefix) if instruction.segment_prefix else DS
        used.append((_SOURCE, segment, False))
    if any(wide is RDI for wide, _ in registers):
        used.append((_DESTINATION, ES, instruction.mnemonic in _STORING))
    for pointer, segment, write in used:
        if repeats:
            _check_reach(draft, pointer, segment, size_bytes, is_narrow=is_narrow, write=write)
        _emit_offset(draft, pointer, is_narrow=is_narrow)
        segmented.at_offset(draft, segment, size_bytes, write=write)
        emit("mov", field(pointer.linear), R8D)
    for pointer, _, _ in used:
        emit("mov", field(pointer.kept), pointer.narrow)
    if repeats:
        emit("mov", field("string_ecx"), HOST_ECX)
        if is_narrow:
            emit("movzx", HOST_ECX, CX)
    emit("mov", R8, field("window"))
    for pointer, _, _ in used:
        emit("mov", pointer.narrow, field(pointer.linear))
        emit("lea", pointer.wide, address(R8, index=pointer.wide))
    at = len(draft.asm.code)
    draft.asm.raw((b"\xf2" if instruction.has_repne_prefix else b"\xf3" if repeats else b"") + opcode)
    for pointer, _, _ in used:
        _restore(draft, pointer, is_narrow=is_narrow)
    if repeats and is_narrow:
        emit("mov", R9D, field("string_ecx"))
        emit("mov", R9W, CX)
        emit("mov", HOST_ECX, R9D)
    numbers = frozenset(pointer.number for pointer, _, _ in used)
    draft.repetitions[at] = Repetition(numbers, is_narrow=is_narrow, counts=repeats)
    return True


def _check_upwards(draft: Draft) -> None:
    """Fault if DF is set."""
    emit = draft.asm.emit
    emit("pushfq")
    emit("pop", R8)
    emit("mov", R9D, _DF_TO_SIGN)
    emit("shlx", R9, R8, R9)
    emit("not", R9)
    segmented.fault_unless_negative(draft)


def _emit_offset(draft: Draft, pointer: _Pointer, *, is_narrow: bool) -> None:
    """R8D = the guest's SI or ESI, DI or EDI."""
    if is_narrow:
        draft.asm.emit("movzx", R8D, HostRegister(pointer.narrow.number, 16))
    else:
        draft.asm.emit("mov", R8D, pointer.narrow)


def _check_reach(
    draft: Draft, pointer: _Pointer, segment: int, size_bytes: int, *, is_narrow: bool, write: bool
) -> None:
    """Fault unless all iterations, upwards, stay within the segment's limit and do not wrap."""
    emit = draft.asm.emit
    if is_narrow:
        _emit_last(draft, pointer, size_bytes, is_narrow=is_narrow)
        segmented.check_no_wrap(draft, 1)
    if not draft.mode.is_flat(segment):
        _emit_last(draft, pointer, size_bytes, is_narrow=is_narrow)
        emit("mov", R9, segment_bound(segment, write=write))
        emit("lea", R9, address(R9, index=R8))
        segmented.fault_unless_negative(draft)


def _emit_last(draft: Draft, pointer: _Pointer, size_bytes: int, *, is_narrow: bool) -> None:
    """R8 = offset + count * size - 1, in 64 bits; -1 of nothing at 0."""
    emit = draft.asm.emit
    _emit_offset(draft, pointer, is_narrow=is_narrow)
    if is_narrow:
        emit("movzx", R9D, CX)
    else:
        emit("mov", R9D, HOST_ECX)
    emit("lea", R8, address(R8, -1, index=R9, scale=size_bytes))


def _restore(draft: Draft, pointer: _Pointer, *, is_narrow: bool) -> None:
    """The guest's register = what was kept + how far the host's moved."""
    emit = draft.asm.emit
    emit("mov", R9D, field(pointer.linear))
    emit("not", R9)
    emit("mov", R8D, pointer.narrow)
    emit("lea", R8D, address(R8, 1, index=R9))
    emit("mov", R9D, field(pointer.kept))
    emit("lea", R8D, address(R8, index=R9))
    if is_narrow:
        emit("mov", R9W, R8W)
        emit("mov", pointer.narrow, R9D)
    else:
        emit("mov", pointer.narrow, R8D)


def recover(repetition: Repetition, block: StateBlock) -> None:
    """The same in the state block, after a fault in the host's string instruction."""
    words = block.words
    for pointer in (_SOURCE, _DESTINATION):
        if pointer.number in repetition.registers:
            kept = words[OFFSETS[pointer.kept] // 4]
            moved = kept + words[pointer.number] - words[OFFSETS[pointer.linear] // 4]
            words[pointer.number] = _merged(kept, moved, is_narrow=repetition.is_narrow)
    if repetition.counts:
        kept = words[OFFSETS["string_ecx"] // 4]
        words[ECX] = _merged(kept, words[ECX], is_narrow=repetition.is_narrow)


def _merged(kept: int, value: int, *, is_narrow: bool) -> int:
    return kept & ~0xFFFF | value & 0xFFFF if is_narrow else value & MASK32
