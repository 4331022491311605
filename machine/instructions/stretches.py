"""Stretches of string instructions with REP: iterations inside one page of source and destination, done at once.

It knows what a store to a page with flags may change for the iterations that follow; it must not know how REP counts.
"""

from __future__ import annotations

from collections.abc import Callable

from iced_x86 import Instruction, Mnemonic

from machine.cpu import Cpu
from machine.flags import DF, PF, STATUS_MASK, ZF
from machine.instructions.operands import MASKS, address_mask, string_destination, string_source
from machine.memory import HOLDS_CODE, PAGE_BYTES, PAGE_SHIFT, SECOND_HOLDS_CODE
from machine.state import CS, EAX, EDI, ESI, MASK32, Segment

# Do up to so many iterations at once; return how many were done, 0 if only the slow way is right.
Stretch = Callable[[int], int]

_SIZES = {
    Mnemonic.MOVSB: 1, Mnemonic.MOVSW: 2, Mnemonic.MOVSD: 4,
    Mnemonic.CMPSB: 1, Mnemonic.CMPSW: 2, Mnemonic.CMPSD: 4,
    Mnemonic.STOSB: 1, Mnemonic.STOSW: 2, Mnemonic.STOSD: 4,
    Mnemonic.LODSB: 1, Mnemonic.LODSW: 2, Mnemonic.LODSD: 4,
    Mnemonic.SCASB: 1, Mnemonic.SCASW: 2, Mnemonic.SCASD: 4,
    Mnemonic.INSB: 1, Mnemonic.INSW: 2, Mnemonic.INSD: 4,
    Mnemonic.OUTSB: 1, Mnemonic.OUTSW: 2, Mnemonic.OUTSD: 4,
}  # fmt: skip


class StringContext:
    """What the iterations of one instruction share: operand size, address size, segments."""

    def __init__(self, cpu: Cpu, instruction: Instruction) -> None:
        self.cpu = cpu
        self.state = cpu.state
        self.gpr = cpu.state.gpr
        self.size = _SIZES[instruction.mnemonic]
        self.mask = address_mask(instruction)
        self.keep = ~self.mask & MASK32
        self.source = string_source(cpu, instruction)
        self.destination = string_destination(cpu)
        self._here, self._length = instruction.ip32, instruction.len

    def advance(self, register: int) -> None:
        """Move ESI or EDI (SI or DI) by one element in the direction of DF."""
        self.move(register, -self.size if self.state.eflags & DF else self.size)

    def move(self, register: int, step: int) -> None:
        """Add to ESI or EDI (SI or DI)."""
        gpr = self.gpr
        gpr[register] = gpr[register] & self.keep | (gpr[register] + step) & self.mask

    def readable(self, register: int, segment: Segment, count: int, *, down: bool) -> tuple[int, int]:
        """Where in RAM the first element at ESI or EDI is, and how many can be read without a look at each.

        They are at most `count`, in one page, and no read of them faults; 0 if that is not known. `down`: they go down
        from the first one.
        """
        limits = segment.read_low, segment.read_high
        return self._span(register, segment, limits, self.cpu.mmu.reads, count, down=down)

    def writable(self, count: int, *, down: bool) -> tuple[int, int]:
        """The same for writes at EDI; whoever watches the page may be told of them once, when all are done.

        Raises:
            GuestFault: what the write of the first element raises.
        """
        mmu, segment = self.cpu.mmu, self.destination
        limits = segment.write_low, segment.write_high
        at, room = self._span(EDI, segment, limits, mmu.writes, count, down=down)
        if room:
            return at, room
        at, room = self._span(EDI, segment, limits, mmu.traced_writes, count, down=down)
        if room:
            room = self._before_effect(at, room, down=down)
        if room and mmu.before_access is not None:
            mmu.translate((segment.base + (self.gpr[EDI] & self.mask)) & MASK32, write=True, user=mmu.user)
        return at, room

    def _span(
        self,
        register: int,
        segment: Segment,
        limits: tuple[int, int],
        deltas: dict[int, int],
        count: int,
        *,
        down: bool,
    ) -> tuple[int, int]:
        offset, size = self.gpr[register] & self.mask, self.size
        low, high = limits
        linear = (segment.base + offset) & MASK32
        delta = deltas.get(linear >> PAGE_SHIFT)
        room = min(PAGE_BYTES - (linear & 0xFFF), high + 1 - offset, self.mask + 1 - offset) // size
        if delta is None or offset < low or room <= 0:
            return 0, 0
        if down:
            room = min(linear & 0xFFF, offset - low) // size + 1
        return linear + delta, min(count, room)

    def _before_effect(self, at: int, count: int, *, down: bool) -> int:
        """How many of `count` elements, to be written from `at` on, have no effect on those behind them.

        A store to a table entry that a cached translation came from may move the next element, and one to the
        instruction itself be the last that it makes.
        """
        memory, mmu, size = self.cpu.memory, self.cpu.mmu, self.size
        page = at >> PAGE_SHIFT
        first, end = (at - (count - 1) * size, at + size) if down else (at, at + count * size)
        effects = [(cell, cell + 4) for cell in mmu.live_cells(first, end)]
        if memory.page_flags[page] & (HOLDS_CODE | SECOND_HOLDS_CODE):
            effects += self._own_bytes(page)
        for effect, after in effects:
            if first < after and effect < end:
                count = min(count, max(0, (at - after) // size + 1 if down else (effect - at) // size))
        return count

    def _own_bytes(self, page: int) -> list[tuple[int, int]]:
        """From where to where in a page of RAM the instruction itself is, if it is there."""
        cpu = self.cpu
        linear = (self.state.segments[CS].base + self.state.eip + self._here) & MASK32
        first_bytes = min(self._length, PAGE_BYTES - (linear & 0xFFF))
        found = []
        for start, length in ((linear, first_bytes), (linear + first_bytes, self._length - first_bytes)):
            physical = cpu.mmu.probe(start) if length else None
            at = -1 if physical is None else cpu.memory.ram_address(physical)
            if at >> PAGE_SHIFT == page:
                found.append((at, at + length))
        return found


def stretch_of_movs(context: StringContext) -> Stretch:
    """MOVS; a source that earlier elements overwrite repeats itself."""
    state, memory, size = context.state, context.cpu.memory, context.size
    ram = memory.ram8

    def stretch(count: int) -> int:
        down = bool(state.eflags & DF)
        source, count = context.readable(ESI, context.source, count, down=down)
        if not count:
            return 0
        destination, count = context.writable(count, down=down)
        length = count * size
        distance = source - destination if down else destination - source  # at which elements are read again
        if not length or 0 < distance < size:
            return 0
        if down:
            source, destination = source + size - length, destination + size - length
        if 0 < distance < length:
            start = source + length - distance if down else source
            period = bytes(ram[start : start + distance]) * (length // distance + 1)
            data = period[-length:] if down else period[:length]
        else:
            data = bytes(ram[source : source + length])
        memory.write_at(destination, data)
        for register in (ESI, EDI):
            context.move(register, -length if down else length)
        return count

    return stretch


def stretch_of_stos(context: StringContext) -> Stretch:
    """STOS."""
    gpr, state, memory, size = context.gpr, context.state, context.cpu.memory, context.size

    def stretch(count: int) -> int:
        down = bool(state.eflags & DF)
        destination, count = context.writable(count, down=down)
        if not count:
            return 0
        length = count * size
        value = (gpr[EAX] & MASKS[size]).to_bytes(size, "little")
        memory.write_at(destination + size - length if down else destination, value * count)
        context.move(EDI, -length if down else length)
        return count

    return stretch


def stretch_of_cmps(context: StringContext) -> Stretch:
    """The elements in front that are equal, for REPE: each of them leaves the same flags."""
    state, ram, size = context.state, context.cpu.mmu.ram8, context.size

    def stretch(count: int) -> int:
        if state.eflags & DF:
            return 0
        first, count = context.readable(ESI, context.source, count, down=False)
        second, count = context.readable(EDI, context.destination, count, down=False)
        length = count * size
        if ram[first : first + length] != ram[second : second + length]:
            ours = int.from_bytes(ram[first : first + length], "little")
            difference = ours ^ int.from_bytes(ram[second : second + length], "little")
            count = ((difference & -difference).bit_length() - 1) // (8 * size)
            length = count * size
        if count:
            for register in (ESI, EDI):
                context.move(register, length)
            state.eflags = state.eflags & ~STATUS_MASK | ZF | PF
        return count

    return stretch
