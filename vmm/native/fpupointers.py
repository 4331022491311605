"""Where the last x87 instruction and its operand were, kept without a store for each instruction.

It knows which pointers each instruction of a TU leaves behind, and when emitted code has to store them; which
instructions leave any, it must not know.

Emitted code stores the pointers once for a run of x87 instructions: on the way out of the TU, and before an instruction
that changes a register of the operand's address. If a fault ends the run earlier, `Span`s say what was not stored yet.

Source: SDM Vol. 1, "x87 FPU Instruction and Data (Operand) Pointers" and "Last Instruction Opcode".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from machine.fpustate import FCS, FDP, FDS, FIP, FOP, FpuState
from machine.state import CS, MASK32, CpuState
from vmm.native.assembler import Assembler
from vmm.native.cache import GUEST_REGISTERS
from vmm.native.operands import R8D, Memory, address
from vmm.native.stateblock import field as block_field
from vmm.native.stateblock import selector


@dataclass(frozen=True, slots=True)
class LastInstruction:
    """FIP and FOP; FCS is CS."""

    eip: int
    opcode: int


@dataclass(frozen=True, slots=True)
class LastOperand:
    """FDP as an address of guest registers, and the number of the segment register for FDS."""

    place: Memory
    segment: int


@dataclass(frozen=True, slots=True)
class Span:
    """What the pointers are while the guest instructions numbered `first` to `last` of a TU execute, not stored yet."""

    first: int
    last: int
    value: LastInstruction | LastOperand


@dataclass(slots=True)
class Pointers:
    """The pointers of one TU in the making.

    Attributes:
        spans: as of `Span`.
    """

    spans: list[Span] = field(default_factory=list)
    _instruction: tuple[int, LastInstruction] | None = None
    _operand: tuple[int, LastOperand] | None = None

    def note(self, index: int, instruction: LastInstruction, operand: LastOperand | None) -> None:
        """The guest instruction numbered `index` was emitted, and leaves these pointers."""
        self._close_instruction(index)
        self._instruction = index, instruction
        if operand is not None:
            self._close_operand(index)
            self._operand = index, operand

    @property
    def pending(self) -> bool:
        """Whether something is to be stored."""
        return self._instruction is not None

    def needs(self, written: Iterable[int]) -> bool:
        """Whether an instruction that writes the general registers with these numbers changes what is to be stored."""
        if self._operand is None:
            return False
        place = self._operand[1].place
        used = {GUEST_REGISTERS.index(register) for register in (place.base, place.index) if register is not None}
        return not used.isdisjoint(written)

    def store(self, asm: Assembler, index: int) -> None:
        """Emit the stores of what is to be stored, before the guest instruction numbered `index`."""
        for value in self.open:
            emit_store(asm, value)
        self._close_instruction(index - 1)
        self._close_operand(index - 1)

    def store_operand(self, asm: Assembler, index: int) -> None:
        """The same for the pointer to the operand alone: the instruction changes what it comes from."""
        if self._operand is not None:
            emit_store(asm, self._operand[1])
            self._close_operand(index - 1)

    def shift(self, index: int, register: int, delta: int) -> None:
        """The guest instruction numbered `index` adds a constant to a general register: the operand stays the same."""
        if self._operand is None:
            return
        value = self._operand[1]
        place, host = value.place, GUEST_REGISTERS[register]
        amount = delta * ((place.base == host) + place.scale * (place.index == host))
        if amount:
            displacement = (place.displacement - amount + (1 << 31) & MASK32) - (1 << 31)
            self._close_operand(index)
            self._operand = index, LastOperand(place._replace(displacement=displacement), value.segment)

    @property
    def open(self) -> tuple[LastInstruction | LastOperand, ...]:
        """What is to be stored: on every way out of the TU from here, unless `store` comes before it."""
        return tuple(each[1] for each in (self._instruction, self._operand) if each is not None)

    def _close_instruction(self, last: int) -> None:
        if self._instruction is not None:
            self._close(self._instruction[0], last, self._instruction[1])
            self._instruction = None

    def _close_operand(self, last: int) -> None:
        if self._operand is not None:
            self._close(self._operand[0], last, self._operand[1])
            self._operand = None

    def _close(self, index: int, last: int, value: LastInstruction | LastOperand) -> None:
        if index < last:
            self.spans.append(Span(index + 1, last, value))


def emit_store(asm: Assembler, value: LastInstruction | LastOperand) -> None:
    """Store pointers, by way of R8D; no flags change.

    state.fpu_ip, fpu_op = constants; fpu_cs = CS; or fpu_dp = effective address; fpu_ds = its segment's selector
    """
    emit = asm.emit
    if isinstance(value, LastInstruction):
        emit("mov", block_field("fpu_ip"), value.eip)
        emit("mov", block_field("fpu_op"), value.opcode)
        emit("mov", R8D, selector(CS))
        emit("mov", block_field("fpu_cs"), R8D)
        return
    place = value.place
    if place.base is None and place.index is None:
        emit("mov", block_field("fpu_dp"), place.displacement & MASK32)
    else:
        emit("lea", R8D, _plain(place))
        emit("mov", block_field("fpu_dp"), R8D)
    emit("mov", R8D, selector(value.segment))
    emit("mov", block_field("fpu_ds"), R8D)


def _plain(place: Memory) -> Memory:
    if place.base is None:
        assert place.index is not None
        return Memory(0, None, place.index, place.scale, place.displacement)
    return address(place.base, place.displacement, index=place.index, scale=place.scale)


def recover(spans: Sequence[Span], index: int, state: CpuState) -> None:
    """Store what emitted code had not stored yet when it stopped before the guest instruction numbered `index`.

    Args:
        spans: of the TU.
        index: the instruction that is to be executed next.
        state: the CPU's, with the general registers as they were then.
    """
    fpu: FpuState = state.fpu
    words = fpu.words
    for span in spans:
        if not span.first <= index <= span.last:
            continue
        value = span.value
        if isinstance(value, LastInstruction):
            words[FIP // 4] = value.eip
            words[FCS // 4] = state.segments[CS].selector
            words[FOP // 4] = value.opcode
        else:
            place, gpr = value.place, state.gpr
            linear = place.displacement
            if place.base is not None:
                linear += gpr[GUEST_REGISTERS.index(place.base)]
            if place.index is not None:
                linear += gpr[GUEST_REGISTERS.index(place.index)] * place.scale
            words[FDP // 4] = linear & MASK32
            words[FDS // 4] = state.segments[value.segment].selector
