"""Operands of decoded instructions as closures: registers, immediates, effective addresses and memory of all sizes.

Built once for each decoded instruction, called each time it executes; what is done with the values is not known here.
"""

from __future__ import annotations

from collections.abc import Callable

from iced_x86 import ConditionCode, Instruction, MemorySizeExt, OpKind, Register, Register_, RegisterExt

from machine.cpu import Cpu
from machine.flags import CONDITIONS
from machine.state import DS, ES, MASK32, CpuState, Segment

Read = Callable[[], int]
Write = Callable[[int], None]

_SEGMENTS = {
    Register.ES: 0,
    Register.CS: 1,
    Register.SS: 2,
    Register.DS: 3,
    Register.FS: 4,
    Register.GS: 5,
}
_IMMEDIATES = frozenset(
    (
        OpKind.IMMEDIATE8, OpKind.IMMEDIATE8_2ND, OpKind.IMMEDIATE8TO16, OpKind.IMMEDIATE8TO32, OpKind.IMMEDIATE16,
        OpKind.IMMEDIATE32,
    )
)  # fmt: skip
# Jcc, SETcc and CMOVcc by the decoder's names, in the order of their opcodes.
CONDITION_NAMES = ("o", "no", "b", "ae", "e", "ne", "be", "a", "s", "ns", "p", "np", "l", "ge", "le", "g")
MASKS = {1: 0xFF, 2: 0xFFFF, 4: MASK32}


def segment_number(register: Register_) -> int:
    """0 to 5 for the decoder's ES CS SS DS FS GS."""
    return _SEGMENTS[register]


def gpr_number(register: Register_) -> int:
    """0 to 7 for a 16- or 32-bit general-purpose register."""
    return RegisterExt.number(register) & 7


def size_bytes(instruction: Instruction, n: int) -> int:
    """Bytes of operand `n`: of the register, of the memory, or of the immediate after sign extension."""
    kind = instruction.op_kind(n)
    if kind == OpKind.REGISTER:
        return RegisterExt.size(instruction.op_register(n))
    if kind in (OpKind.IMMEDIATE8, OpKind.IMMEDIATE8_2ND):
        return 1
    if kind in (OpKind.IMMEDIATE16, OpKind.IMMEDIATE8TO16):
        return 2
    if kind in (OpKind.IMMEDIATE32, OpKind.IMMEDIATE8TO32):
        return 4
    return MemorySizeExt.size(instruction.memory_size)


def stack_bytes(instruction: Instruction) -> int:
    """2 or 4: the operand size of a stack instruction."""
    return abs(instruction.stack_pointer_increment)


def condition(instruction: Instruction) -> Callable[[int], bool]:
    """The predicate on EFLAGS of a conditional instruction."""
    return CONDITIONS[instruction.condition_code - ConditionCode.O]


def is_memory(instruction: Instruction, n: int) -> bool:
    """Operand `n` is memory with a ModRM or moffs address."""
    return instruction.op_kind(n) == OpKind.MEMORY


def is_immediate(instruction: Instruction, n: int) -> bool:
    """Operand `n` is a constant; the 1 of a shift by 1 too."""
    return instruction.op_kind(n) in _IMMEDIATES


# Registers.


def read_register(state: CpuState, register: Register_) -> Read:
    """A closure that reads a general-purpose or segment register."""
    gpr = state.gpr
    if register in _SEGMENTS:
        segment = state.segments[_SEGMENTS[register]]
        return lambda: segment.selector
    size = RegisterExt.size(register)
    number = RegisterExt.number(register)
    if size == 4:
        return lambda: gpr[number]
    if size == 2:
        return lambda: gpr[number] & 0xFFFF
    if number >= 4:
        number -= 4
        return lambda: gpr[number] >> 8 & 0xFF
    return lambda: gpr[number] & 0xFF


def write_register(state: CpuState, register: Register_) -> Write:
    """A closure that writes a general-purpose register; the value fits its size."""
    gpr = state.gpr
    size = RegisterExt.size(register)
    number = RegisterExt.number(register)

    def write32(value: int) -> None:
        gpr[number] = value

    def write16(value: int) -> None:
        gpr[number] = gpr[number] & 0xFFFF_0000 | value

    def write8(value: int) -> None:
        gpr[number] = gpr[number] & 0xFFFF_FF00 | value

    def write8_high(value: int) -> None:
        gpr[number - 4] = gpr[number - 4] & 0xFFFF_00FF | value << 8

    if size == 4:
        return write32
    if size == 2:
        return write16
    return write8_high if number >= 4 else write8


# Addresses.


def address(cpu: Cpu, instruction: Instruction) -> tuple[Segment, Read]:
    """The segment of the memory operand, and a closure that computes its offset."""
    segment = cpu.state.segments[_SEGMENTS[instruction.memory_segment]]
    return segment, effective_address(cpu.state, instruction)


def effective_address(state: CpuState, instruction: Instruction) -> Read:
    """A closure that computes the offset of the memory operand in 32 or 16 bits."""
    gpr = state.gpr
    base, index = instruction.memory_base, instruction.memory_index
    mask = address_mask(instruction)
    displacement = instruction.memory_displacement & mask
    b = RegisterExt.number(base) if base else 0
    i = RegisterExt.number(index) if index else 0
    shift = instruction.memory_index_scale.bit_length() - 1
    if not base and not index:
        return lambda: displacement
    if not index:
        if not displacement and mask == MASK32:
            return lambda: gpr[b]
        return lambda: (gpr[b] + displacement) & mask
    if not base:
        return lambda: ((gpr[i] << shift) + displacement) & mask
    if not shift:
        return lambda: (gpr[b] + gpr[i] + displacement) & mask
    return lambda: (gpr[b] + (gpr[i] << shift) + displacement) & mask


def address_mask(instruction: Instruction) -> int:
    """0xFFFF or 0xFFFFFFFF: the address size of an instruction with a memory operand, spelled out or implied.

    The parts of an operand in parts (a far pointer, the bounds of BOUND) are apart by so many bits too.
    """
    for n in range(instruction.op_count):
        kind = instruction.op_kind(n)
        if kind in (OpKind.MEMORY_SEG_SI, OpKind.MEMORY_SEG_DI, OpKind.MEMORY_ESDI):
            return 0xFFFF
        if kind in (OpKind.MEMORY_SEG_ESI, OpKind.MEMORY_SEG_EDI, OpKind.MEMORY_ESEDI):
            return MASK32
    register = instruction.memory_base or instruction.memory_index
    address_bytes = RegisterExt.size(register) if register else instruction.memory_displ_size
    return MASK32 if address_bytes == 4 else 0xFFFF


def string_source(cpu: Cpu, instruction: Instruction) -> Segment:
    """The segment of DS:ESI, or the one that a prefix names."""
    prefix = instruction.segment_prefix
    return cpu.state.segments[_SEGMENTS[prefix] if prefix else DS]


def string_destination(cpu: Cpu) -> Segment:
    """ES, which no prefix changes."""
    return cpu.state.segments[ES]


# Values.


def read(cpu: Cpu, instruction: Instruction, n: int) -> Read:
    """A closure that reads operand `n`: register, immediate (sign-extended, unsigned in its size) or memory."""
    kind = instruction.op_kind(n)
    if kind == OpKind.REGISTER:
        return read_register(cpu.state, instruction.op_register(n))
    size = size_bytes(instruction, n)
    if kind != OpKind.MEMORY:
        value = instruction.immediate(n) & MASKS[size]
        return lambda: value
    segment, offset = address(cpu, instruction)
    mmu = cpu.mmu
    if size == 4:
        load32 = mmu.load32
        return lambda: load32(segment, offset())
    if size == 2:
        load16 = mmu.load16
        return lambda: load16(segment, offset())
    load8 = mmu.load8
    return lambda: load8(segment, offset())


def read_word(cpu: Cpu, instruction: Instruction, n: int) -> Read:
    """A closure that reads the 16 bits of operand `n` that count whatever the operand size is: selectors, LMSW."""
    if instruction.op_kind(n) == OpKind.MEMORY:
        segment, offset = address(cpu, instruction)
        load16 = cpu.mmu.load16
        return lambda: load16(segment, offset())
    register = read_register(cpu.state, instruction.op_register(n))
    return lambda: register() & 0xFFFF


def write(cpu: Cpu, instruction: Instruction, n: int) -> Write:
    """A closure that writes operand `n` without having read it: register or memory."""
    if instruction.op_kind(n) == OpKind.REGISTER:
        return write_register(cpu.state, instruction.op_register(n))
    segment, offset = address(cpu, instruction)
    store = store_of(cpu, size_bytes(instruction, n))
    return lambda value: store(segment, offset(), value)


def load_of(cpu: Cpu, size: int) -> Callable[[Segment, int], int]:
    """The MMU's load for 1, 2 or 4 bytes."""
    return {1: cpu.mmu.load8, 2: cpu.mmu.load16, 4: cpu.mmu.load32}[size]


def store_of(cpu: Cpu, size: int) -> Callable[[Segment, int, int], None]:
    """The MMU's store for 1, 2 or 4 bytes."""
    return {1: cpu.mmu.store8, 2: cpu.mmu.store16, 4: cpu.mmu.store32}[size]


def modify_of(cpu: Cpu, size: int) -> Callable[[Segment, int], int]:
    """The MMU's load for a read-modify-write of 1, 2 or 4 bytes."""
    return {1: cpu.mmu.modify8, 2: cpu.mmu.modify16, 4: cpu.mmu.modify32}[size]
