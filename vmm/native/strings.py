"""Translation of string instructions with 32-bit addresses: the host's own, on addresses inside the window.

ESI and EDI become window + ESI and window + EDI while the instruction runs; since a window is 4 GiB aligned, their low
halves are the guest's registers all the time, also when it faults half way. A fault must therefore resume at the first
host instruction, which adds the window again.

A REP whose count is so large that it might reach beyond the guards around the window is a callout. SCASB and CMPSB
cannot; strlen uses them with ECX = FFFFFFFFh. How long one may take is the alarm's business.
"""

from __future__ import annotations

from iced_x86 import Instruction, Mnemonic, OpKind, Register

from vmm.native.operands import ECX, EDI, ESI, R8, R8D, R9D, RDI, RSI, address
from vmm.native.operands import Register as HostRegister
from vmm.native.stateblock import field
from vmm.native.unit import Draft

LIMIT_LOG2 = 30  # 4 GiB of doublewords: the size of a guard

_FLAT_PREFIXES = frozenset({Register.NONE, Register.DS, Register.ES, Register.SS})
_SOURCE = ((RSI, ESI),)
_DESTINATION = ((RDI, EDI),)
_BOTH = _SOURCE + _DESTINATION

FORMS: dict[int, tuple[bytes, tuple[tuple[HostRegister, HostRegister], ...]]] = {
    Mnemonic.MOVSB: (b"\xa4", _BOTH), Mnemonic.MOVSW: (b"\x66\xa5", _BOTH), Mnemonic.MOVSD: (b"\xa5", _BOTH),
    Mnemonic.CMPSB: (b"\xa6", _BOTH), Mnemonic.CMPSW: (b"\x66\xa7", _BOTH), Mnemonic.CMPSD: (b"\xa7", _BOTH),
    Mnemonic.STOSB: (b"\xaa", _DESTINATION), Mnemonic.STOSW: (b"\x66\xab", _DESTINATION),
    Mnemonic.STOSD: (b"\xab", _DESTINATION),
    Mnemonic.LODSB: (b"\xac", _SOURCE), Mnemonic.LODSW: (b"\x66\xad", _SOURCE), Mnemonic.LODSD: (b"\xad", _SOURCE),
    Mnemonic.SCASB: (b"\xae", _DESTINATION), Mnemonic.SCASW: (b"\x66\xaf", _DESTINATION),
    Mnemonic.SCASD: (b"\xaf", _DESTINATION),
}  # fmt: skip
_COMPARING_BYTES = frozenset({Mnemonic.CMPSB, Mnemonic.SCASB})
_NARROW = frozenset({OpKind.MEMORY_SEG_SI, OpKind.MEMORY_SEG_DI, OpKind.MEMORY_ESDI})


def emit_string(draft: Draft, instruction: Instruction) -> bool:
    """MOVS CMPS STOS LODS SCAS, with REP, REPE, REPNE or none."""
    if instruction.segment_prefix not in _FLAT_PREFIXES:
        return False
    if any(instruction.op_kind(n) in _NARROW for n in range(instruction.op_count)):
        return False
    opcode, registers = FORMS[instruction.mnemonic]
    emit = draft.asm.emit
    prefix = b""
    if instruction.has_rep_prefix or instruction.has_repne_prefix:
        if instruction.mnemonic not in _COMPARING_BYTES:
            emit_count_check(draft, instruction.ip32, LIMIT_LOG2)
        prefix = b"\xf2" if instruction.has_repne_prefix else b"\xf3"
    emit("mov", R8, field("window"))
    for wide, _ in registers:
        emit("lea", wide, address(R8, index=wide))
    draft.asm.raw(prefix + opcode)
    for _, narrow in registers:
        emit("mov", narrow, narrow)
    return True


def emit_count_check(draft: Draft, eip: int, limit_log2: int) -> None:
    """If ECX >= 1 << limit_log2: callout. Without flags: shifted inside ECX itself, for JECXZ, and restored."""
    emit = draft.asm.emit
    emit("mov", R8D, ECX)
    emit("mov", R9D, limit_log2)
    emit("shrx", ECX, ECX, R9D)
    small = draft.asm.jump_if_ecx_is_zero()
    emit("mov", ECX, R8D)
    draft.callout_early(eip)
    draft.asm.bind_rel8(small)
    emit("mov", ECX, R8D)
