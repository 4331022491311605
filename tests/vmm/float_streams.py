"""Random programs that mix x87, MMX, SSE and SSE2 with integer instructions, for engines; see `tests.vmm.streams`."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from hypothesis import strategies as st
from iced_x86 import Decoder, OpKind

from machine.cpuid import PENTIUM4, PENTIUM4_INSTRUCTIONS
from machine.instructions import lookup
from machine.instructions.table import FPU_ROWS
from machine.state import CR0_EM, CR0_MP, CR0_NE, CR0_TS, CR4_OSFXSR, CR4_OSXMMEXCPT
from tests.machine.fpu_batch import states
from tests.machine.instruction_cases import Case
from tests.vmm import streams
from tests.vmm.bare import Bare
from tests.vmm.streams import LOW_PAGE, OFFSETS, PREFIXES, SANDBOX, SANDBOX_PAGES, TOP_PAGE, Program, Step
from vmm.blocks import OPTIONS
from vmm.native.hostfpu import HostFpu

_MANDATORY = (b"", b"\x66", b"\xf2", b"\xf3")
_LAZY_FPU = 7  # #NM


def _encodings(chance: random.Random) -> Iterator[bytes]:
    yield b"\x9b"
    for opcode in range(0xD8, 0xE0):
        for modrm in range(0, 256, 8):
            yield bytes([opcode, modrm | chance.randrange(8)]) + chance.randbytes(12)
        for modrm in range(0xC0, 0x100):
            yield bytes([opcode, modrm])
    for opcode in range(256):
        for prefix in _MANDATORY:
            for modrm in range(0, 256, 8):
                yield prefix + bytes([0x0F, opcode, modrm | chance.randrange(8)]) + chance.randbytes(12)
                yield prefix + bytes([0x0F, opcode, modrm | 4, chance.randrange(256) & 0x3F | 0x20]) + bytes(8)


@cache
def floating_cases() -> tuple[Case, ...]:
    """Encodings of every row that comes with an FPU, in every form, each with some register or address."""
    found = []
    for code in _encodings(random.Random(1)):
        decoder = Decoder(32, code, OPTIONS, 0)
        instruction = decoder.decode()
        row = lookup(instruction.code, PENTIUM4_INSTRUCTIONS)
        if instruction.is_invalid or row is None or not (row.mnemonic in FPU_ROWS or row.mnemonic == "wait"):
            continue
        offsets = decoder.get_constant_offsets(instruction)
        found.append(
            FloatCase(
                code[: instruction.len], 32, instruction, row, offsets.displacement_offset, offsets.displacement_size
            )
        )
    return tuple(found)


def kinds_of_floating_cases() -> tuple[Case, ...]:
    """One case for each form, place of ESP and kind of address: emitters tell no more apart."""
    return streams.distinct(floating_cases())


class FloatCase(Case):
    """A case of the Pentium 4 model."""

    __slots__ = ()

    def with_displacement(self, value: int) -> Case:
        """The same with another displacement of 4 bytes."""
        at, size = self.displacement_at, self.displacement_bytes
        code = self.code[:at] + (value % (1 << 8 * size)).to_bytes(size, "little") + self.code[at + size :]
        instruction = Decoder(32, code, OPTIONS, 0).decode()
        return FloatCase(code, 32, instruction, self.row, at, size)


@dataclass(frozen=True, slots=True, repr=False)
class FloatProgram(Program):
    """A program for the Pentium 4 model.

    Attributes:
        fpu_seed: of the FPU's registers at the start.
        cr0: EM, MP, TS and NE.
        sse: CR4.OSFXSR and OSXMMEXCPT.
        lazy: #NM clears TS and tries again.
    """

    fpu_seed: int = 0
    cr0: int = CR0_NE
    sse: bool = True
    lazy: bool = False

    def __repr__(self) -> str:
        return (
            f"{super(FloatProgram, self).__repr__()}FPU {self.fpu_seed}, CR0 {self.cr0:#x}, {self.sse=}, {self.lazy=}\n"
        )

    def prepare(self, bare: Bare) -> None:
        """Put it into a guest made by `bare.flat`."""
        super(FloatProgram, self).prepare(bare)
        give_fpu(bare)
        state = bare.state
        chance = random.Random(self.fpu_seed)
        state.fpu.unpack(states(self.fpu_seed, 24, unmasked=True)[chance.randrange(24)].image)
        state.fpu.mxcsr = 0x1F80 if chance.random() < 0.6 else chance.getrandbits(16)
        state.cr0 |= self.cr0
        state.cr4 |= CR4_OSFXSR | CR4_OSXMMEXCPT if self.sse else 0
        if self.lazy:
            bare.memory.write(0xD000, b"\x0f\x06\xcf")  # clts; iretd
            bare.memory.store(0x9000 + 8 * _LAZY_FPU, 4, 0xD000 | 8 << 16)


def give_fpu(bare: Bare) -> None:
    """Make its CPU the Pentium 4 model; nothing may have been decoded."""
    bare.cpu.model = PENTIUM4
    bare.cpu.fpu = HostFpu(bare.cpu.state.fpu)


def aimed(case: Case, chance: random.Random) -> Step:
    """A step whose memory operand, if it has one, is in the sandbox, mostly aligned."""
    offset = chance.choice((0, 0x10, 0x20, 0x7F0, *OFFSETS))
    return Step(case, 0, SANDBOX + 0x1000 * chance.randrange(SANDBOX_PAGES) + offset, chance.randrange(64))


@st.composite
def _steps(draw: st.DrawFn) -> Step:
    bases = [SANDBOX + 0x1000 * page for page in range(SANDBOX_PAGES)] + [TOP_PAGE, LOW_PAGE]
    case = draw(st.sampled_from(floating_cases() if draw(st.integers(0, 9)) < 7 else streams.cases()))
    base = draw(st.sampled_from([*bases, *bases, *bases, None]))
    linear = None if base is None else base + draw(st.sampled_from((0, 0x10, 0x7F0, 0x800, *OFFSETS)))
    prefix = 0 if isinstance(case, FloatCase) else draw(st.sampled_from(PREFIXES))
    has_memory = any(case.instruction.op_kind(n) == OpKind.MEMORY for n in range(case.instruction.op_count))
    if isinstance(case, FloatCase) and not has_memory:
        linear = None
    return Step(case, prefix, linear, draw(st.integers(0, 63)))


@st.composite
def float_programs(draw: st.DrawFn, longest: int = 30) -> FloatProgram:
    """Random programs."""
    page_kinds = st.sampled_from([0, 0, 0, 0, *range(len(streams.PAGE_KINDS))])
    kinds = st.lists(page_kinds, min_size=SANDBOX_PAGES + 2, max_size=SANDBOX_PAGES + 2)
    rare = [0, 0, 0, 0, 0, 0, CR0_TS, CR0_TS | CR0_MP, CR0_EM]
    return FloatProgram(
        steps=tuple(draw(st.lists(_steps(), min_size=4, max_size=longest))),
        kinds=tuple(draw(kinds)),
        user=draw(st.booleans()),
        write_protect=draw(st.booleans()),
        registers=draw(st.tuples(*[st.integers(0, 0xFFFF_FFFF)] * 8)),
        eflags=draw(st.sampled_from([0, 1, 0x40, 0x8D5])),
        fpu_seed=draw(st.integers(0, 1 << 16)),
        cr0=draw(st.sampled_from(rare)) | draw(st.sampled_from([CR0_NE, CR0_NE, CR0_NE, 0])),
        sse=draw(st.sampled_from([True, True, True, True, False])),
        lazy=draw(st.booleans()),
    )
