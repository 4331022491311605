"""Host instructions as Capstone sees them, one at a time: operands, what is written, and the forms that match.

It knows an instruction by its bytes alone; what may stand before or behind it is known to the verifier.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Final

import capstone
from capstone import x86

from vmm.native.stateblock import OFFSETS, SIZES
from vmm.native.whitelist import FORMS, PROTECTED, STUB_FORMS, WRITABLE, Form

_PREFIXES: Final = frozenset(b"\x26\x2e\x36\x3e\x64\x65\x66\x67\xf0\xf2\xf3")
_GS, _OPERAND_SIZE, _ADDRESS_SIZE, _REPNE, _REP = 0x65, 0x66, 0x67, 0xF2, 0xF3
REGISTER_NAMES: Final = (
    ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16))),
    ("eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi", *(f"r{n}d" for n in range(8, 16))),
    ("ax", "cx", "dx", "bx", "sp", "bp", "si", "di", *(f"r{n}w" for n in range(8, 16))),
    ("al", "cl", "dl", "bl", "spl", "bpl", "sil", "dil", *(f"r{n}b" for n in range(8, 16))),
)
_REGISTERS: Final[dict[str, tuple[int, int]]] = {
    **{name: (number, bits) for names, bits in zip(REGISTER_NAMES, (64, 32, 16, 8), strict=True)
       for number, name in enumerate(names)},
    **{name: (number, 8) for number, name in enumerate(("ah", "ch", "dh", "bh"))},
}  # fmt: skip
# The numbers of the registers that guest code may name: those of the guest, R12 for ESP, and the scratch registers.
GUEST_NUMBERS: Final = (0, 1, 2, 3, 5, 6, 7, 12)
_NAMED: Final = frozenset((*GUEST_NUMBERS, 8, 9))
_SIZE_NAMES = {8: "byte", 16: "word", 32: "dword", 64: "qword"}
_READS_ONLY = frozenset({"cmp", "test", "bt", "push"})
_WRITES_ALL = frozenset({"xchg", "xadd"})
# What always writes all 32 bits of a 32-bit destination, and so clears the upper half.
_WRITES_FULLY = frozenset(
    ("mov", "movzx", "movsx", "lea", "add", "or", "adc", "sbb", "and", "sub", "xor", "inc", "dec", "neg", "not", "imul",
     "sarx", "shrx", "shlx", "rorx")
)  # fmt: skip
_STEPS_KEPT = 1 << 16  # constants and displacements of guest code are in them, so there is no end to what comes
_ELEMENT_BYTES = {"b": 1, "w": 2, "d": 4}
_STRING = re.compile(r"(rep |repe |repne )?(movs|cmps|stos|lods|scas)([bwd])$")


class DecodeError(Exception):
    """Bytes that are no host instruction."""


@dataclass(frozen=True, slots=True)
class Operand:
    """An operand as Capstone sees it.

    Attributes:
        kind: `register`, `fpu`, `constant`, `memory`, or `target` of a direct branch.
        text: in the notation of literal kinds, without the size of memory.
        bits: of the register, or of the memory that is accessed.
        number: of a register; the value of a constant; the displacement.
        registers: number and bits of the registers in an address.
        gs: the segment is GS.
        other_segment: it is another one.
    """

    kind: str
    text: str
    bits: int
    number: int = 0
    registers: tuple[tuple[int, int], ...] = ()
    gs: bool = False
    other_segment: bool = False


@dataclass(frozen=True, slots=True)
class Step:
    """One host instruction, wherever it stands.

    Attributes:
        code: its bytes.
        mnemonic: without REP.
        text: for people.
        operands: explicit ones.
        forms: those that match operands and prefixes.
        relative: of a direct branch, from the next instruction on.
        writes: the registers that may be written, and whether the upper half is surely cleared.
        repeated_bytes: of an element, if it has a REP prefix.
    """

    code: bytes
    mnemonic: str
    text: str
    operands: tuple[Operand, ...]
    forms: tuple[Form, ...]
    relative: int | None
    writes: tuple[tuple[int, bool], ...]
    repeated_bytes: int


# Kinds of operands.


def _is_reg(operand: Operand) -> bool:
    return operand.kind == "register" and operand.number in _NAMED and operand.bits <= 32


def _is_window(operand: Operand) -> bool:
    return operand.gs and all(number in _NAMED and bits == 32 for number, bits in operand.registers)


def _is_address(operand: Operand) -> bool:
    plain = operand.kind == "memory" and not operand.gs and not operand.other_segment
    return plain and all(number in _NAMED for number, _ in operand.registers)


def _field_of(operand: Operand) -> str | None:
    """The field of the state block that an operand lies in."""
    if not _is_displaced(operand, "r15"):
        return None
    end = operand.number + operand.bits // 8
    return next((name for name, at in OFFSETS.items() if at <= operand.number and end <= at + SIZES[name]), None)


_KINDS: Final[Mapping[str, Callable[[Operand], bool]]] = {
    "reg": _is_reg,
    "imm": lambda operand: operand.kind == "constant",
    "win": _is_window,
    "val": lambda operand: (
        _is_reg(operand) or (_is_window(operand) and operand.bits <= 32) or operand.kind == "constant"
    ),
    "ea": _is_address,
    "ram": lambda operand: _is_displaced(operand, "r8") and not operand.number and operand.bits <= 32,
    "wide": lambda operand: _is_displaced(operand, "r8") and not operand.number and operand.bits == 64,
    "rel": lambda operand: operand.kind == "target",
    "xmm": lambda operand: operand.kind == "fpu" and re.fullmatch("xmm[0-7]", operand.text) is not None,
    "mm": lambda operand: operand.kind == "fpu" and re.fullmatch("mm[0-7]", operand.text) is not None,
    "st": lambda operand: operand.kind == "fpu" and operand.text.startswith("st"),
    "state": lambda operand: _field_of(operand) is not None,
    "out": lambda operand: _field_of(operand) in WRITABLE,
    "slot": lambda operand: _field_of(operand) not in (None, *PROTECTED),
    # For stubs only.
    "any": lambda operand: operand.kind in ("register", "constant"),
    "pointer": lambda operand: operand.kind == "register" and operand.bits == 64,
}


@cache
def _predicate(kind: str) -> Callable[[Operand], bool]:
    """Whether an operand is of a kind; what is no name of one is matched literally."""
    known = _KINDS.get(kind)
    if known is not None:
        return known
    if kind.isdigit():
        return lambda operand: operand.kind == "constant" and operand.number == int(kind)
    size, bracket, rest = kind.partition("[")
    literal, size = (bracket + rest, size.strip()) if bracket else (kind, "")
    bits = next((bits for bits, name in _SIZE_NAMES.items() if name == size), 0)
    if rest.startswith("state."):
        name = rest[len("state.") : -1]
        return lambda operand: operand.bits == bits and _field_of(operand) == name
    if literal.endswith("+imm]"):
        base = literal[1 : -len("+imm]")]
        return lambda operand: _is_displaced(operand, base)
    return lambda operand: (
        operand.text == literal and not operand.gs and not operand.other_segment and bits in (0, operand.bits)
    )


def _is_displaced(operand: Operand, base: str) -> bool:
    text = f"[{base}{operand.number:+d}]" if operand.number else f"[{base}]"
    return operand.text == text and not operand.gs and not operand.other_segment


# Decoding.


def _make_decoder(*, detail: bool) -> capstone.Cs:
    decoder = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    decoder.detail = detail
    return decoder


_QUICK: Final = _make_decoder(detail=False)
_THOROUGH: Final = _make_decoder(detail=True)


def split(code: bytes) -> Iterator[tuple[int, bytes]]:
    """The instructions of `code`: offset and bytes; where there is none, what is left comes last."""
    end = 0
    for at, size, _, _ in _QUICK.disasm_lite(code, 0):
        end = at + size
        yield at, code[at:end]
    if end != len(code):
        yield end, code[end:]


@lru_cache(maxsize=_STEPS_KEPT)
def decode(code: bytes, *, stub: bool) -> Step:
    """Look at one instruction closely, whatever follows from its bytes alone.

    Raises:
        DecodeError: it is not one instruction.
    """
    found = list(_THOROUGH.disasm(code, 0))
    if len(found) != 1 or found[0].size != len(code):
        raise DecodeError("Capstone finds no instruction here")
    insn = found[0]
    operands = tuple(_operand(insn, each) for each in insn.operands)
    text = f"{insn.mnemonic} {insn.op_str}".strip()
    is_relative = len(operands) == 1 and operands[0].kind == "constant" and insn.group(capstone.CS_GRP_BRANCH_RELATIVE)
    if is_relative:
        operands = (replace(operands[0], kind="target"),)
    # SSE2 has a MOVSD and a CMPSD too.
    string = None if any(operand.kind == "fpu" for operand in operands) else _STRING.match(insn.mnemonic)
    mnemonic: str = insn.mnemonic
    if string:
        mnemonic, operands = string[2] + string[3], ()
    step = Step(
        code,
        mnemonic,
        text,
        operands,
        (),
        operands[0].number - len(code) if is_relative else None,
        tuple(_writes(insn, mnemonic, operands)),
        _ELEMENT_BYTES[string[3]] if string and string[1] else 0,
    )
    table = _forms_by_mnemonic(stub=stub).get(mnemonic, ())
    return replace(step, forms=tuple(form for form in table if _matches(form, step)))


@cache
def _forms_by_mnemonic(*, stub: bool) -> Mapping[str, tuple[Form, ...]]:
    table: dict[str, list[Form]] = {}
    for form in STUB_FORMS if stub else FORMS:
        for mnemonic in form.mnemonics.split():
            table.setdefault(mnemonic, []).append(form)
    return {mnemonic: tuple(forms) for mnemonic, forms in table.items()}


def _operand(insn: capstone.CsInsn, operand: x86.X86Op) -> Operand:
    bits = 8 * operand.size
    if operand.type == x86.X86_OP_REG:
        name = insn.reg_name(operand.reg)
        if name in _REGISTERS:
            return Operand("register", name, bits=_REGISTERS[name][1], number=_REGISTERS[name][0])
        return Operand("fpu", name, bits)
    if operand.type == x86.X86_OP_IMM:
        return Operand("constant", "", bits, operand.imm)
    memory = operand.mem
    names = [insn.reg_name(register) for register in (memory.base, memory.index) if register]
    scaled = f"*{memory.scale}" if memory.index and memory.scale > 1 else ""
    text = "+".join(names) + scaled
    if memory.disp or not names:
        text += f"{memory.disp:+d}"
    segment = insn.reg_name(memory.segment) if memory.segment else ""
    # RIP has no place in the table of registers that a form may name.
    registers = tuple(_REGISTERS.get(name, (-1, 64)) for name in names)
    return Operand("memory", f"[{text}]", bits, memory.disp, registers, segment == "gs", segment not in ("", "gs"))


def _writes(insn: capstone.CsInsn, mnemonic: str, operands: tuple[Operand, ...]) -> Iterable[tuple[int, bool]]:
    for n, operand in enumerate(operands):
        if operand.kind == "register" and ((n == 0 and mnemonic not in _READS_ONLY) or (mnemonic in _WRITES_ALL)):
            fully = mnemonic in _WRITES_FULLY or mnemonic.startswith("cmov")
            yield operand.number, operand.bits == 32 and fully
    if mnemonic in ("cmpxchg8b", "cmpxchg", "mul", "imul", "div", "idiv"):
        yield from ((0, False), (2, False))
    for register in insn.regs_write:
        known = _REGISTERS.get(insn.reg_name(register))
        if known is not None and known[0] != 4:
            yield known[0], False


def _matches(form: Form, step: Step) -> bool:
    kinds = [kind.strip() for kind in form.operands.split(",")] if form.operands else []
    if len(kinds) != len(step.operands):
        return False
    if not all(_predicate(kind)(operand) for kind, operand in zip(kinds, step.operands, strict=True)):
        return False
    return _prefixes_match(form, step)


def _prefixes_match(form: Form, step: Step) -> bool:
    """Whether the prefixes are exactly those that the operands and the form ask for, each once, REX behind them."""
    count = next(n for n, byte in enumerate(step.code) if byte not in _PREFIXES)
    prefixes = step.code[:count]
    if len(set(prefixes)) != len(prefixes):
        return False
    needed, allowed = set[int](), set(form.prefixes)
    if any(operand.gs for operand in step.operands):
        needed |= {_GS, _ADDRESS_SIZE}
    if step.mnemonic == "jecxz":
        needed.add(_ADDRESS_SIZE)
    if step.mnemonic == "lea":
        allowed.add(_ADDRESS_SIZE)
    if any(operand.bits == 16 and operand.kind in ("register", "memory") for operand in step.operands):
        allowed.add(_OPERAND_SIZE)
    return needed <= set(prefixes) <= needed | allowed
