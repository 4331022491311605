"""Random programs for engines: instructions of the table with operands in a small space of awkward pages.

A fault goes on at the next instruction, so that one program meets many. It must not know which engine runs them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import cast

from hypothesis import strategies as st
from hypothesis.vendor.pretty import RepresentationPrinter
from iced_x86 import OpKind, Register, Register_, RegisterExt

from machine.faults import Vector
from machine.state import CR0_WP, CS, FS, GS, MASK32, SEG_DB, SEG_G, SS
from tests.machine.instruction_cases import Case, by_mnemonic, decode
from tests.oracles.assembler import assemble
from tests.vmm.bare import Bare, map_low_memory, set_handler, set_page
from vmm.native.ident import IDENT
from vmm.native.translator import EMITTERS, NARROW_EMITTERS

CODE = 0x40_0000  # linear; two pages
CODE_BYTES = 0x2000
SANDBOX = 0x41_0000
SANDBOX_PAGES = 8
TOP_PAGE, LOW_PAGE = 0xFFFF_F000, 0  # accesses wrap from one to the other

_CODE_PHYSICAL = 0x20_0000
_DATA_PHYSICAL = 0x21_0000
_TABLE, _TOP_TABLE = 0x10_2000, 0x10_3000
_DIRECTORY = 0x10_0000
_RESUME = 0x12_0000  # for each byte of code: where to go on after a fault there
_RESTART = _RESUME - 4  # where to go on after a fault elsewhere
_TSS = 0x11_0000
_GDT = 0xA000
_KERNEL_STACK = 0x7_0000
_USER_CODE, _USER_DATA = 0x1B, 0x23

_WITH_ERROR_CODE = frozenset({8, 10, 11, 12, 13, 14, 17})
_HANDLER = f"""
    push eax
    mov eax, [esp + 4]
    sub eax, {CODE:#x}
    cmp eax, {CODE_BYTES:#x}
    jae 1f
    mov eax, [eax * 4 + {_RESUME:#x}]
    jmp 2f
1:  mov eax, [{_RESTART:#x}]
2:  mov [esp + 4], eax
    pop eax
    iretd
"""

# Page-table entries of a sandbox page, without the address where None stands for that of its own.
_P, _RW, _US, _A, _D = 1, 2, 4, 0x20, 0x40
PAGE_KINDS: tuple[tuple[str, int | None, int], ...] = (
    ("plain", None, _P | _RW | _US | _A | _D),
    ("fresh", None, _P | _RW | _US),
    ("read before", None, _P | _RW | _US | _A),
    ("read only", None, _P | _US),
    ("supervisor", None, _P | _RW),
    ("supervisor, read only", None, _P | _A | _D),
    ("not present", None, _RW | _US),
    ("alias", _DATA_PHYSICAL, _P | _RW | _US),
    ("code", _CODE_PHYSICAL, _P | _RW | _US | _D),
    ("more code", _CODE_PHYSICAL + 0x1000, _P | _RW | _US),
    ("its own table", _TABLE, _P | _RW | _US | _A | _D),
    ("directory", _DIRECTORY, _P | _RW | _US),
    ("nothing", 0x4000_0000, _P | _RW | _US),
    ("screen", 0xB_8000, _P | _RW | _US),
)

# FS and GS: selector, base, limit in bytes, attributes without DPL. The selectors are null, so that no fault pops one.
SEGMENT_KINDS: tuple[tuple[str, int, int, int], ...] = (
    ("flat", 0, MASK32, 0x93 | SEG_DB | SEG_G),
    ("thread's", 0x41_0010, MASK32, 0x93 | SEG_DB | SEG_G),
    ("wrapping", 0xFFFF_F800, MASK32, 0x93 | SEG_DB | SEG_G),
    ("short", 0x41_0000, 0x1FFE, 0x93 | SEG_DB),
    ("one byte", 0x41_1000, 0, 0x93 | SEG_DB),
    ("read only", 0x41_0800, MASK32, 0x91 | SEG_DB | SEG_G),
    ("readable code", 0, MASK32, 0x9B | SEG_DB | SEG_G),
    ("growing down", 0, 0x41_0FFF, 0x97 | SEG_DB),
    ("null", 0, 0, 0),
)

_SKIPPED = frozenset({"jmp_far", "call_far", "hlt"})
_RELATIVE = frozenset({OpKind.NEAR_BRANCH16, OpKind.NEAR_BRANCH32})
_STRINGS = ("movs", "cmps", "stos", "lods", "scas")
OFFSETS = (*range(8), 0x10, 0x7FE, 0x800, *range(0xFF0, 0x1000))
_FS_PREFIX, _GS_PREFIX = 0x64, 0x65
PREFIXES = (0, 0, 0, 0, 0, 0, 0, 0x26, 0x36, 0x3E, 0x2E, 0x64, 0x65, 0xF0, 0xF2, 0xF3)


@cache
def cases() -> tuple[Case, ...]:
    """What the translator has an emitter for, with 32-bit addresses."""
    names = (IDENT | set(EMITTERS) | set(NARROW_EMITTERS)) - _SKIPPED
    return tuple(
        case
        for name, found in sorted(by_mnemonic(32).items())
        for case in found
        if name in names and b"\x67" not in case.code[:2]
    )


def kinds_of_cases() -> tuple[Case, ...]:
    """One case for each form, place of ESP, high byte register and kind of address: emitters tell no more apart."""
    return distinct(cases())


def distinct(all_cases: Iterable[Case]) -> tuple[Case, ...]:
    """The first of each kind."""
    found: dict[tuple[object, ...], Case] = {}
    for case in all_cases:
        instruction = case.instruction
        operands = range(instruction.op_count)
        registers = [instruction.op_register(n) for n in operands if instruction.op_kind(n) == OpKind.REGISTER]
        key = (
            instruction.code,
            tuple(instruction.op_kind(n) for n in operands),
            tuple(RegisterExt.number(register) >> 2 for register in registers),
            Register.ESP in registers,
            instruction.memory_base == Register.ESP,
            bool(instruction.memory_base),
            bool(instruction.memory_index),
        )
        found.setdefault(key, case)
    return tuple(found.values())


@dataclass(frozen=True, slots=True, repr=False)
class Step:
    """One instruction of a program.

    Attributes:
        case: what it is, but for a displacement or branch target that is put in.
        prefix: in front of it; 0 is none.
        linear: where its memory operand is to be; None leaves registers and displacement as they come.
        count: ECX of a REP, and which step a branch goes to.
    """

    case: Case
    prefix: int
    linear: int | None
    count: int

    def __repr__(self) -> str:
        where = "as it comes" if self.linear is None else f"{self.linear:#x}"
        return f"<{self.prefix:02x} {self.case}, operand {where}, count {self.count}>"

    def _repr_pretty_(self, printer: RepresentationPrinter, _cycle: bool) -> None:
        printer.text(repr(self))


@dataclass(frozen=True, slots=True, repr=False)
class Program:
    """A whole test.

    Attributes:
        steps: what to run.
        kinds: indices into PAGE_KINDS for the sandbox's pages, then for TOP_PAGE and LOW_PAGE.
        user: at CPL 3.
        segments: indices into SEGMENT_KINDS for FS and GS.
        write_protect: CR0.WP.
        registers: EAX to EDI at the start.
        eflags: status flags and DF at the start.
    """

    steps: tuple[Step, ...]
    kinds: tuple[int, ...]
    user: bool
    write_protect: bool
    registers: tuple[int, ...]
    eflags: int
    segments: tuple[int, int] = (0, 0)

    def __repr__(self) -> str:
        kinds = ", ".join(PAGE_KINDS[kind][0] for kind in self.kinds)
        registers = " ".join(f"{value:08x}" for value in self.registers)
        level = f"CPL {3 if self.user else 0}, WP {int(self.write_protect)}, EFLAGS {self.eflags:x}"
        level += ", FS and GS " + ", ".join(SEGMENT_KINDS[kind][0] for kind in self.segments)
        steps = "\n".join(map(repr, self.steps))
        return f"\n{steps}\n{level}, {registers}\npages {kinds}\n"

    def _repr_pretty_(self, printer: RepresentationPrinter, _cycle: bool) -> None:
        printer.text(repr(self))

    def prepare(self, bare: Bare) -> None:
        """Put it into a guest made by `bare.flat`."""
        _build_tables(bare, self.kinds)
        _set_level(bare, user=self.user)
        for number, kind in zip((FS, GS), self.segments, strict=True):
            _, base, limit, attributes = SEGMENT_KINDS[kind]
            bare.state.segments[number].load(0, base, limit, attributes | (0x60 if attributes and self.user else 0))
        for vector in (v for v in Vector if v not in (Vector.NMI, Vector.DF)):
            code = ("add esp, 4\n" if vector in _WITH_ERROR_CODE else "") + _HANDLER
            set_handler(bare, vector, assemble(code))
        program, starts = self.layout()
        bare.memory.write(_CODE_PHYSICAL, program)
        resume = [starts[-1]] * CODE_BYTES
        for first, following in pairwise(starts):
            resume[first - CODE : following - CODE] = [following] * (following - first)
        bare.memory.write(_RESUME, b"".join(at.to_bytes(4, "little") for at in resume))
        bare.memory.store(_RESTART, 4, starts[len(starts) // 2])
        bare.state.gpr[:] = self.registers
        bare.state.eflags = 2 | self.eflags
        bare.state.cr0 |= CR0_WP if self.write_protect else 0
        bare.state.eip = starts[0]

    def layout(self) -> tuple[bytes, list[int]]:
        """The code, and where each step starts; the last start is that of an endless loop behind them."""
        # It ends in the second page, so that some instruction lies across two.
        lengths = [len(self._encode(step, [CODE] * (len(self.steps) + 1), 0)) for step in self.steps]
        at = CODE + 0x1000 - min(sum(lengths) // 2, 0xF00)
        first = at
        starts = []
        for length in lengths:
            starts.append(at)
            at += length
        starts.append(at)
        encoded = b"".join(self._encode(step, starts, start) for step, start in zip(self.steps, starts, strict=False))
        return (bytes(first - CODE) + encoded + b"\xeb\xfe").ljust(CODE_BYTES, b"\x90"), starts

    def _base(self, prefix: int) -> int:
        """The base of the segment that a prefix names."""
        return SEGMENT_KINDS[self.segments[prefix == _GS_PREFIX]][1] if prefix in (_FS_PREFIX, _GS_PREFIX) else 0

    def _encode(self, step: Step, starts: Sequence[int], start: int) -> bytes:
        case = step.case
        instruction = case.instruction
        before = b""
        if step.linear is not None:
            before, case = _aim(case, step.linear - self._base(step.prefix) & MASK32)
        if case.row.string:
            before += b"\xb9" + (step.count % 40).to_bytes(4, "little")
        code = case.code
        if instruction.op0_kind in _RELATIVE:
            target = starts[step.count % len(starts)]
            size = 4 if code[0] in (0xE8, 0xE9) or code[0] == 0x0F else 1
            if instruction.op0_kind == OpKind.NEAR_BRANCH32:
                relative = (target - (start + len(before) + len(code))) % (1 << 32)
                code = code[:-size] + (relative & ((1 << 8 * size) - 1)).to_bytes(size, "little")
        elif step.prefix and decode(bytes([step.prefix]) + code, 32) is not None:
            code = bytes([step.prefix]) + code
        return before + code


def _move(register: int, value: int) -> bytes:
    """MOV r32, imm32."""
    return bytes([0xB8 | register]) + (value & MASK32).to_bytes(4, "little")


def _number(register: int) -> int:
    return RegisterExt.number(cast("Register_", register))


def _aim(case: Case, linear: int) -> tuple[bytes, Case]:
    """Instructions that load registers, and the case with another displacement, so that its operand is at `linear`."""
    instruction = case.instruction
    if case.row.string:
        return _move(6, linear) + _move(7, linear ^ 0x1003), case
    if not any(instruction.op_kind(n) == OpKind.MEMORY for n in range(instruction.op_count)):
        return _move(5 if case.row.mnemonic == "leave" else 4, linear + 4), case
    base: int = instruction.memory_base
    index: int = instruction.memory_index
    if not base and not index:
        return b"", case.with_displacement(linear)
    offset = linear - instruction.memory_displacement
    if not index:
        return _move(_number(base), offset), case
    if not base or base == index:
        return _move(_number(index), offset // (instruction.memory_index_scale + (base == index))), case
    before = _move(_number(index), 0x101)
    return before + _move(_number(base), offset - 0x101 * instruction.memory_index_scale), case


def _build_tables(bare: Bare, kinds: Sequence[int]) -> None:
    memory = bare.memory
    map_low_memory(bare)
    for page in range(1024):
        set_page(bare, page << 12, page << 12 | _P | _RW)
    memory.store(_DIRECTORY + 4, 4, _TABLE | _P | _RW | _US)
    memory.store(_DIRECTORY + 4 * 1023, 4, _TOP_TABLE | _P | _RW | _US)
    for page in range(2):
        memory.store(_TABLE + 4 * page, 4, _CODE_PHYSICAL + 0x1000 * page | _P | _RW | _US)
    slots = [_TABLE + 4 * ((SANDBOX >> 12 & 0x3FF) + page) for page in range(SANDBOX_PAGES)]
    for number, (slot, kind) in enumerate(zip([*slots, _TOP_TABLE + 4 * 1023, 0x10_1000], kinds, strict=True)):
        _, physical, rights = PAGE_KINDS[kind]
        own = _DATA_PHYSICAL + 0x1000 * number
        memory.store(slot, 4, (own if physical is None else physical) | rights)
        memory.write(own, bytes((7 * at + 13 * number) & 0xFF for at in range(256)) * 16)


def _set_level(bare: Bare, *, user: bool) -> None:
    memory, state = bare.memory, bare.state
    memory.write(_GDT + 0x18, bytes.fromhex("ffff000000fbcf00 ffff000000f3cf00 67000000 118b0000"))
    memory.store(_TSS + 4, 4, _KERNEL_STACK)
    memory.store(_TSS + 8, 4, 0x10)
    state.gdtr.limit = 0x2F
    state.tr.load(0x28, _TSS, 0x67, 0x8B)
    if user:
        for number, segment in enumerate(state.segments):
            is_code = number == CS
            segment.load(_USER_CODE if is_code else _USER_DATA, 0, MASK32, (0xFB if is_code else 0xF3) | SEG_DB | SEG_G)
        bare.cpu.set_cpl(3)
    assert state.segments[SS].selector == (_USER_DATA if user else 0x10)


@st.composite
def _steps(draw: st.DrawFn) -> Step:
    bases = [SANDBOX + 0x1000 * page for page in range(SANDBOX_PAGES)] + [TOP_PAGE, LOW_PAGE]
    case = draw(st.sampled_from(cases()))
    prefix = draw(st.sampled_from(PREFIXES))
    base = draw(st.sampled_from([*bases, *bases, *bases, None, None]))
    linear = None if base is None else base + draw(st.sampled_from(OFFSETS))
    return Step(case, prefix, linear, draw(st.integers(0, 63)))


@st.composite
def programs(draw: st.DrawFn, longest: int = 24) -> Program:
    """Random programs."""
    edges = st.sampled_from([0, 1, 0x7F, 0x80, 0xFF, 0x7FFF_FFFF, 0x8000_0000, MASK32])
    word = st.one_of(edges, st.integers(0, MASK32))
    kinds = st.lists(st.integers(0, len(PAGE_KINDS) - 1), min_size=SANDBOX_PAGES + 2, max_size=SANDBOX_PAGES + 2)
    return Program(
        steps=tuple(draw(st.lists(_steps(), min_size=1, max_size=longest))),
        kinds=tuple(draw(kinds)),
        user=draw(st.booleans()),
        write_protect=draw(st.booleans()),
        registers=draw(st.tuples(*[word] * 8)),
        eflags=draw(st.sampled_from([0, 1, 0x40, 0x8D5, 0x400])),
        segments=draw(st.tuples(*[st.integers(0, len(SEGMENT_KINDS) - 1)] * 2)),
    )
