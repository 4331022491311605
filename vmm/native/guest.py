"""Guest operands as host operands: registers where they live, memory in the window.

It must not know what an instruction does with them.
"""

from __future__ import annotations

from iced_x86 import Instruction, MemorySizeExt, Mnemonic, OpKind, Register, Register_, RegisterExt

from vmm.native.cache import GUEST_REGISTERS
from vmm.native.operands import Memory
from vmm.native.operands import Register as HostRegister
from vmm.native.stateblock import word

SEGMENT_REGISTERS = frozenset({Register.ES, Register.CS, Register.SS, Register.DS, Register.FS, Register.GS})
_FLAT_SEGMENTS = frozenset({Register.ES, Register.SS, Register.DS})


def register(guest: Register_) -> HostRegister:
    """Where a 32-bit (or 16-bit) guest register lives, as the host's 32-bit register."""
    return GUEST_REGISTERS[RegisterExt.number(guest)]


def segment_number(guest: Register_) -> int:
    """The encoding of a segment register: `machine.state.ES` to `GS`."""
    return guest - Register.ES


def selector(guest: Register_) -> Memory:
    """The selector in a segment register, zero-extended to 32 bits."""
    return word("segments", 2 * segment_number(guest))


def memory(instruction: Instruction) -> Memory | None:
    """The memory operand in the window (for LEA: its address); None with 16-bit addressing.

    The effective address is computed in 32 bits, as the guest's is, and the segment is taken for flat.
    """
    if not has_wide_address(instruction):
        return None
    base, index = instruction.memory_base, instruction.memory_index
    is_lea = instruction.mnemonic == Mnemonic.LEA
    displacement = instruction.memory_displacement & 0xFFFF_FFFF
    return Memory(
        0 if is_lea else 8 * MemorySizeExt.size(instruction.memory_size),
        register(base) if base else None,
        register(index) if index else None,
        instruction.memory_index_scale,
        displacement - (1 << 32) if displacement >> 31 else displacement,
        gs=not is_lea,
    )


def has_wide_address(instruction: Instruction) -> bool:
    """Whether the address of the memory operand has 32 bits, not 16."""
    named = instruction.memory_base or instruction.memory_index
    return (RegisterExt.size(named) if named else instruction.memory_displ_size) == 4


def has_memory(instruction: Instruction) -> bool:
    """Whether an operand is memory with a ModRM or moffs address."""
    return any(instruction.op_kind(n) == OpKind.MEMORY for n in range(instruction.op_count))


def is_flat(instruction: Instruction) -> bool:
    """Whether its memory operand, if it has one, is in DS, ES or SS, which are flat and writable here."""
    return not has_memory(instruction) or instruction.memory_segment in _FLAT_SEGMENTS
