"""Memory operands in segments that are not flat, or with 16-bit addresses: the linear address is computed in R8.

A base and a limit are looked up as the code runs, so it stays right whatever is loaded into the segment register. All
of it leaves RFLAGS alone. It must not know what an instruction does with its operand.

An offset beyond the limit becomes a read of the page that a used-up budget reads: a fault, by which the instruction is
interpreted. So do all accesses to a segment that is null, may not be accessed so, or grows down.
"""

from __future__ import annotations

from iced_x86 import Instruction, InstructionInfoFactory, MemorySizeExt, OpAccess

from machine.state import CS
from vmm.native import guest
from vmm.native.cache import GUARD_BIAS
from vmm.native.operands import R8, R8D, R8W, R9, R9D, R11, Memory, address
from vmm.native.stateblock import segment_base, segment_bound
from vmm.native.unit import Draft

_WRITES = frozenset({OpAccess.WRITE, OpAccess.COND_WRITE, OpAccess.READ_WRITE, OpAccess.READ_COND_WRITE})
SEGMENT_64K = 0x1_0000
_factory = InstructionInfoFactory()


def operand(draft: Draft, instruction: Instruction, size_bytes: int = 0) -> Memory | None:
    """The memory operand in the window; it may use R8, and R9 is clobbered.

    Args:
        draft: where code for its address is emitted, if need be.
        instruction: it must not be LEA.
        size_bytes: what is accessed, if not what the decoder says.

    Returns:
        None if it has to be left to the interpreter.
    """
    segment = guest.segment_number(instruction.memory_segment)
    size_bytes = size_bytes or MemorySizeExt.size(instruction.memory_size)
    write = is_written(instruction)
    is_flat = draft.mode.is_flat(segment)
    if not size_bytes or (segment == CS and write and is_flat):
        return None
    if is_flat and guest.has_wide_address(instruction):
        found = guest.memory(instruction)
        assert found is not None
        return (
            found
            if found.bits == 8 * size_bytes
            else Memory(8 * size_bytes, found.base, found.index, found.scale, found.displacement, gs=True)
        )
    emit_offset(draft, instruction)
    return at_offset(draft, segment, size_bytes, write=write)


def emit_offset(draft: Draft, instruction: Instruction) -> None:
    """R8D = the offset of the memory operand in its segment."""
    emit = draft.asm.emit
    base, index = instruction.memory_base, instruction.memory_index
    is_wide = guest.has_wide_address(instruction)
    displacement = instruction.memory_displacement & (0xFFFF_FFFF if is_wide else 0xFFFF)
    if not base and not index:
        emit("mov", R8D, displacement)
        return
    sign = 0x8000_0000 if is_wide else 0x8000
    host_base = guest.register(base) if base else None
    host_index = guest.register(index) if index else None
    place = Memory(0, host_base, host_index, instruction.memory_index_scale, (displacement ^ sign) - sign)
    emit("lea", R8D, place)
    if not is_wide:
        emit("movzx", R8D, R8W)


def at_offset(draft: Draft, segment: int, size_bytes: int, *, write: bool) -> Memory:
    """The operand at the offset in R8D, below 2**32, of a segment; R8D becomes its linear address."""
    if not draft.mode.is_flat(segment):
        check_bound(draft, segment, size_bytes, write=write)
        add_base(draft, segment)
    return Memory(8 * size_bytes, R8D, gs=True)


def check_bound(draft: Draft, segment: int, size_bytes: int, *, write: bool) -> None:
    """Fault unless `size_bytes` at the offset in R8 are within the limit."""
    emit = draft.asm.emit
    emit("mov", R9, segment_bound(segment, write=write))
    emit("lea", R9, address(R9, size_bytes - 1, index=R8))
    fault_unless_negative(draft)


def check_no_wrap(draft: Draft, size_bytes: int) -> None:
    """Fault unless so many bytes from the offset in R8 on are in the first 64 KiB: they would wrap in their midst."""
    draft.asm.emit("lea", R9, address(R8, size_bytes - SEGMENT_64K - 1))
    fault_unless_negative(draft)


def fault_unless_negative(draft: Draft) -> None:
    """Fault unless R9 is negative."""
    emit = draft.asm.emit
    emit("not", R9)
    emit("sarx", R9, R9, R11)
    emit("movzx", R9D, Memory(8, R11, R9, 1, -GUARD_BIAS))


def add_base(draft: Draft, segment: int) -> None:
    """R8D += base of a segment."""
    emit = draft.asm.emit
    emit("mov", R9D, segment_base(segment))
    emit("lea", R8D, address(R8, index=R9))


def is_written(instruction: Instruction) -> bool:
    """Whether an instruction writes to its memory operand."""
    return any(used.access in _WRITES for used in _factory.info(instruction).used_memory())
