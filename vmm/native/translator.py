"""The translator: guest instructions to host code, one translation unit (TU) at a time, by the mode that the CPU is in.

Which emitter an instruction gets follows from its row in the instruction table; what has none is a callout, never bytes
passed through. It must not know windows, engines or why a fragment is wanted.

A guest fault always resumes at the first host instruction of the guest instruction, so nothing that the guest can see
changes before the last access that can fault.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

from iced_x86 import Code, Decoder, DecoderError, FlowControl, Instruction, OpKind, Register

from machine.cpuid import P6_INSTRUCTIONS
from machine.instructions import Effect, lookup
from machine.instructions.operands import CONDITION_NAMES
from machine.instructions.table import FPU_FEATURES
from machine.state import MASK32
from vmm.blocks import OPTIONS
from vmm.native import farflow, flow, guest, narrow, narrowstrings, stack, straddling, strings, system
from vmm.native import soft as soft_forms
from vmm.native.cache import TranslationCache
from vmm.native.floating import FLOATING, TRANSFERS, emit_floating, emit_state, prepare_pointers
from vmm.native.ident import IDENT, emit_ident
from vmm.native.modes import Mode
from vmm.native.operands import Memory
from vmm.native.unit import Draft, Unit

MAX_TU_INSTRUCTIONS = 32

_MOST_KNOWN = 1 << 15  # instructions for each mode: some 5 MiB

_STACK = frozenset({"push", "pop", "call", "ret"})
_STACK_POINTERS = frozenset({Register.ESP, Register.SP})
_GOES_ON = (FlowControl.NEXT, FlowControl.CONDITIONAL_BRANCH)

# Emits one instruction; False if it has to be a callout, with nothing emitted that matters.
Emitter = Callable[[Draft, Instruction], bool]


def emit_nothing(_draft: Draft, _instruction: Instruction) -> bool:
    """PAUSE and NOP, whose operand is not accessed; to the host the reserved NOPs may mean something else."""
    return True


_STRINGS = tuple(f"{kind}{width}" for kind in ("movs", "cmps", "stos", "lods", "scas") for width in "bwd")
_NOTHING = ("pause", "nop", "sfence", "lfence", "mfence", *(f"prefetch{hint}" for hint in ("nta", "t0", "t1", "t2")))

EMITTERS: dict[str, Emitter] = {
    "jmp": flow.emit_jmp,
    **{f"j{name}": flow.emit_jcc for name in CONDITION_NAMES},
    "call": flow.emit_call,
    "ret": flow.emit_ret,
    "loop": flow.emit_loop,
    "jecxz": flow.emit_jecxz,
    "push": stack.emit_push,
    "pop": stack.emit_pop,
    "leave": stack.emit_leave,
    "pushad": stack.emit_pushad,
    "popad": stack.emit_popad,
    "mov_from_sreg": system.emit_mov_from_segment,
    "mov_to_sreg": system.emit_mov_to_segment,
    "pop_sreg": system.emit_pop_segment,
    "pushfd": system.emit_pushfd,
    "popfd": system.emit_popfd,
    "cli": system.emit_cli,
    "sti": system.emit_sti,
    "int": system.emit_int,
    "iretd": system.emit_iretd,
    "sysenter": system.emit_sysenter,
    "sysexit": system.emit_sysexit,
    "mov_from_cr": system.emit_mov_from_cr,
    "mov_to_cr": system.emit_mov_to_cr,
    "clts": system.emit_clts,
    "cpuid": system.emit_cpuid,
    "in": system.emit_port_access,
    "out": system.emit_port_access,
    "invlpg": system.emit_invlpg,
    "rdtsc": system.emit_rdtsc,
    **dict.fromkeys(TRANSFERS.values(), emit_state),
    **dict.fromkeys(_NOTHING, emit_nothing),
    **dict.fromkeys(_STRINGS, strings.emit_string),
}
"""For plain modes."""

NARROW_EMITTERS: dict[str, Emitter] = {
    **narrow.EMITTERS,
    **farflow.EMITTERS,
    **dict.fromkeys(_NOTHING, emit_nothing),
    **dict.fromkeys(_STRINGS, narrowstrings.emit_string),
}
"""For all others, and for what the first table leaves alone in plain ones."""

# Besides IDENT: their host code accesses memory in the order and in the way in which the interpreter does.
_FAULTING_IN_ORDER = frozenset(
    {"push", "ret", "leave", "jmp"} | {name for name in _STRINGS if name.startswith(("stos", "lods"))}
)


def translate(
    tc: TranslationCache,
    mode: Mode,
    eip: int,
    data: bytes,
    stops: frozenset[int] = frozenset(),
    features: frozenset[int] = P6_INSTRUCTIONS,
    patched: frozenset[int] = frozenset(),
    beyond: bytes = b"",
    soft: frozenset[int] = frozenset(),
) -> Unit:
    """Translate from `eip` on, up to 32 instructions, an unconditional transfer, a callout, or the end of the page.

    An instruction that goes on in the next page is a TU by itself, as far as the mode is plain.

    A conditional branch is a way out of the TU; one back to its start is unrolled as often as there is room.

    Args:
        tc: where the code will be placed next.
        mode: what the CPU is in when it comes there.
        eip: guest address of the first instruction.
        data: the bytes from there to the end of the page.
        stops: guest addresses whose instructions are callouts because a debugger may stop there.
        features: the instruction sets that the CPU has.
        patched: guest addresses of instructions whose immediate operand is read where it stands, if that is possible.
        beyond: the first bytes of the next page, if they are known and there may be need of them.
        soft: guest addresses of instructions that are to have a soft form, if that is possible.
    """
    most_insns = tc.longest_unit_insns or MAX_TU_INSTRUCTIONS
    known = _known(replace(mode, code_base=0, code_limit=MASK32))
    draft = Draft(tc, mode, eip, most_insns, patched=patched, known=known, soft=soft)
    decoder = Decoder(16 if mode.is_narrow else 32, data, OPTIONS, eip)
    next_eip = end_eip = eip
    # What is in the shadow of STI stays with it, so that no budget ends between them.
    while decoder.can_decode and (len(draft.hosts) < most_insns or len(draft.hosts) in draft.shadows):
        instruction = decoder.decode()
        if mode.is_plain and _is_cut(decoder) and next_eip not in stops and len(draft.hosts) not in draft.shadows:
            if draft.hosts:
                return _go_on(draft, next_eip, end_eip)
            return _translate_straddling(draft, data, beyond, features)
        if instruction.is_invalid or next_eip in stops or not _emit(draft, instruction, data, decoder, features):
            break
        next_eip = instruction.next_ip32
        end_eip = max(end_eip, next_eip)
        if draft.goes_round:
            draft.goes_round = False
            next_eip, decoder.ip, decoder.position = eip, eip, 0
        elif instruction.flow_control not in _GOES_ON:
            return draft.finish(end_eip, len(draft.hosts))
        if draft.is_complete:
            draft.settle_stack()
            draft.jump(next_eip)
            return draft.finish(end_eip, len(draft.hosts))
    else:
        if draft.hosts and len(draft.hosts) not in draft.shadows:
            return _go_on(draft, next_eip, end_eip)
    return _call_out(draft, next_eip, end_eip)


def _go_on(draft: Draft, next_eip: int, end_eip: int) -> Unit:
    """The TU ends, and what follows is another."""
    draft.store_pointers()
    draft.settle_stack()
    draft.jump(next_eip)
    return draft.finish(end_eip, len(draft.hosts))


def _call_out(draft: Draft, next_eip: int, end_eip: int) -> Unit:
    """The TU ends with a callout of the instruction at `next_eip`."""
    charged = len(draft.hosts)
    draft.store_pointers()
    draft.settle_stack()
    draft.begin(next_eip)
    draft.callout(next_eip)
    return draft.finish(end_eip, charged)


def _is_cut(decoder: Decoder) -> bool:
    """Whether the instruction that was decoded last goes on where there are no more bytes."""
    return decoder.last_error == DecoderError.NO_MORE_BYTES


def _translate_straddling(draft: Draft, data: bytes, beyond: bytes, features: frozenset[int]) -> Unit:
    """The TU of one instruction that lies in two pages, which checks that the second one still holds its end."""
    eip = draft.eip
    draft.most_insns, draft.straddles = 1, True
    decoder = Decoder(32, data + beyond, OPTIONS, eip)
    instruction = decoder.decode()
    if not instruction.is_invalid:
        draft.beyond = beyond[: instruction.len - len(data)]
        if _emit(draft, instruction, data + beyond, decoder, features):
            if instruction.flow_control in _GOES_ON:
                return _go_on(draft, instruction.next_ip32, instruction.next_ip32)
            return draft.finish(instruction.next_ip32, 1)
    return _call_out(draft, eip, eip)


def _name(mnemonic: str, instruction: Instruction) -> str:
    """As `TranslationCache.withheld` has it."""
    if mnemonic == "mov_from_cr":
        return f"{mnemonic}{instruction.op1_register - Register.CR0}"
    if mnemonic == "mov_to_cr":
        return f"{mnemonic}{instruction.op0_register - Register.CR0}"
    return mnemonic


def _emit(
    draft: Draft, instruction: Instruction, data: bytes, decoder: Decoder, features: frozenset[int] = P6_INSTRUCTIONS
) -> bool:
    """Emit one instruction, or nothing at all."""
    row = lookup(instruction.code, features)
    if row is None or instruction.next_ip > draft.mode.code_limit:
        return False
    if draft.tc.withheld and _name(row.mnemonic, instruction) in draft.tc.withheld:
        return False
    if draft.pointers.pending:
        prepare_pointers(draft, instruction, row.mnemonic)
    if draft.stack_offset and not _leaves_stack_unsettled(instruction, row.mnemonic):
        draft.settle_stack()
    before = len(draft.asm.code)
    stack_offset = draft.stack_offset
    draft.begin(instruction.ip32)
    if draft.beyond:
        straddling.emit_check(draft, instruction.ip32, draft.beyond)
    if row.mnemonic in FLOATING and not FPU_FEATURES.isdisjoint(features):
        emitted = draft.mode.is_plain and emit_floating(draft, instruction, row.mnemonic)
    else:
        emitted = _emit_row(draft, instruction, row.mnemonic, row.effect, data, decoder)
    if emitted:
        return True
    draft.take_back(before)
    draft.stack_offset = stack_offset
    draft.stack_offsets.pop(len(draft.hosts) - 1, None)
    draft.hosts.pop()
    draft.eips.pop()
    return False


def _leaves_stack_unsettled(instruction: Instruction, name: str) -> bool:
    """Whether it does without guest ESP, or knows where it is; and stays in the TU, or is a CALL or RET."""
    if name not in _STACK and name not in IDENT:
        return False
    if instruction.memory_base in _STACK_POINTERS or not guest.is_flat(instruction):
        return False
    if name == "pop" and instruction.op0_kind != OpKind.REGISTER:
        return False
    if name == "ret" and instruction.code not in (Code.RETND, Code.RETND_IMM16):
        return False
    if name in _STACK and instruction.stack_pointer_increment in (-2, 2):
        return False
    operands = range(instruction.op_count)
    return not any(
        instruction.op_kind(n) == OpKind.REGISTER and instruction.op_register(n) in _STACK_POINTERS for n in operands
    )


def _emit_row(draft: Draft, instruction: Instruction, name: str, effect: Effect, data: bytes, decoder: Decoder) -> bool:
    is_plain = draft.mode.is_plain
    if is_plain and instruction.ip32 in draft.patched and _emit_patched(draft, instruction):
        return True
    emitter = EMITTERS.get(name) if is_plain else None
    other = NARROW_EMITTERS.get(name)
    if emitter is not None or other is not None:
        before = len(draft.asm.code)
        if emitter is not None and emitter(draft, instruction):
            if name in _FAULTING_IN_ORDER:
                draft.faulting_in_order.add(len(draft.hosts) - 1)
            return True
        draft.take_back(before)
        return other is not None and other(draft, instruction)
    if is_plain:
        draft.faulting_in_order.add(len(draft.hosts) - 1)
    if name not in IDENT or effect not in (Effect.NEXT, Effect.BRANCH):
        return False
    offset = instruction.ip32 - draft.eip
    raw = data[offset : offset + instruction.len]
    if instruction.ip32 in draft.soft:
        return emit_ident(draft, instruction, raw, decoder)
    known = draft.known.get(raw)
    if known is not None:
        draft.asm.raw(known)
        return True
    before = len(draft.asm.code)
    if not emit_ident(draft, instruction, raw, decoder):
        return False
    if len(draft.known) >= _MOST_KNOWN:
        draft.known.clear()
    draft.known[raw] = bytes(draft.asm.code[before:])
    return True


@cache
def _known(_mode_at_zero: Mode) -> dict[bytes, bytes]:
    """What IDENT has made of guest instructions in a mode: the same wherever they stand, in segments of any size."""
    return {}


def can_be_soft(mode: Mode, data: bytes, features: frozenset[int], *, divides: bool) -> bool:
    """Whether an instruction, which `data` begins with, can have a soft form; not if it straddles two pages.

    Args:
        mode: what it would be translated for.
        data: its bytes, and more.
        features: the CPU model's instructions.
        divides: the form of a division that looks at the divisor is meant.
    """
    if not mode.is_plain:
        return False
    instruction = Decoder(32, data, OPTIONS).decode()
    row = None if instruction.is_invalid else lookup(instruction.code, features)
    if row is None or row.mnemonic not in IDENT or row.effect is not Effect.NEXT:
        return False
    return soft_forms.is_division(instruction) if divides else soft_forms.is_possible(mode, instruction)


def _emit_patched(draft: Draft, instruction: Instruction) -> bool:
    """MOV of an immediate operand that is written to time and again: it is loaded from the instruction itself."""
    if instruction.code != Code.MOV_R32_IMM32 or instruction.len != 5:
        return False
    at = draft.mode.linear(instruction.ip32 + 1)
    operand = Memory(32, displacement=at - (1 << 32) if at >> 31 else at, gs=True)
    draft.asm.emit("mov", guest.register(instruction.op0_register), operand)
    draft.loads.append(instruction.ip32 + 1)
    return True
