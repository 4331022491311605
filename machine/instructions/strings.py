"""Rows of the string instructions, with and without REP: MOVS, CMPS, STOS, LODS, SCAS, INS and OUTS.

An operation with REP runs a bounded number of iterations and leaves EIP on itself while some are left, so that a
debugger is heard; every iteration that completed is in ESI, EDI and ECX if the next one faults.

Source: SDM Vol. 2B, "REP/REPE/REPZ/REPNE/REPNZ".
"""

from __future__ import annotations

from collections.abc import Callable

from iced_x86 import Instruction, Mnemonic

from machine.control import check_io
from machine.cpu import Cpu
from machine.flags import DF, PF, STATUS_MASK, ZF
from machine.instructions.operands import MASKS, address_mask, load_of, store_of, string_destination, string_source
from machine.instructions.table import Effect, Operation, Row
from machine.state import EAX, ECX, EDI, EDX, ESI, MASK32, Segment

# Iterations of one execution: a few milliseconds at most, and thousands of times more than the overhead of resuming.
CHUNK_ITERATIONS = 2048
SLOW_ITERATION = 8  # one that is done by itself, perhaps by a device, counts for so many

Iteration = Callable[[], None]
# Do up to so many iterations at once; return how many were done, 0 if only the slow way is right.
Bulk = Callable[[int], int]

_SIZES = {
    Mnemonic.MOVSB: 1, Mnemonic.MOVSW: 2, Mnemonic.MOVSD: 4,
    Mnemonic.CMPSB: 1, Mnemonic.CMPSW: 2, Mnemonic.CMPSD: 4,
    Mnemonic.STOSB: 1, Mnemonic.STOSW: 2, Mnemonic.STOSD: 4,
    Mnemonic.LODSB: 1, Mnemonic.LODSW: 2, Mnemonic.LODSD: 4,
    Mnemonic.SCASB: 1, Mnemonic.SCASW: 2, Mnemonic.SCASD: 4,
    Mnemonic.INSB: 1, Mnemonic.INSW: 2, Mnemonic.INSD: 4,
    Mnemonic.OUTSB: 1, Mnemonic.OUTSW: 2, Mnemonic.OUTSD: 4,
}  # fmt: skip


class _Context:
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

    def advance(self, register: int) -> None:
        """Move ESI or EDI (SI or DI) by one element in the direction of DF."""
        gpr = self.gpr
        step = -self.size if self.state.eflags & DF else self.size
        gpr[register] = gpr[register] & self.keep | (gpr[register] + step) & self.mask


def _movs(context: _Context) -> Iteration:
    gpr, mask, source, destination = context.gpr, context.mask, context.source, context.destination
    load, store, advance = load_of(context.cpu, context.size), store_of(context.cpu, context.size), context.advance

    def iterate() -> None:
        store(destination, gpr[EDI] & mask, load(source, gpr[ESI] & mask))
        advance(ESI)
        advance(EDI)

    return iterate


def _stos(context: _Context) -> Iteration:
    gpr, mask, destination = context.gpr, context.mask, context.destination
    store, advance, value_mask = store_of(context.cpu, context.size), context.advance, MASKS[context.size]

    def iterate() -> None:
        store(destination, gpr[EDI] & mask, gpr[EAX] & value_mask)
        advance(EDI)

    return iterate


def _lods(context: _Context) -> Iteration:
    gpr, mask, source = context.gpr, context.mask, context.source
    load, advance, keep = load_of(context.cpu, context.size), context.advance, ~MASKS[context.size] & MASK32

    def iterate() -> None:
        gpr[EAX] = gpr[EAX] & keep | load(source, gpr[ESI] & mask)
        advance(ESI)

    return iterate


def _cmps(context: _Context) -> Iteration:
    gpr, mask, source, destination = context.gpr, context.mask, context.source, context.destination
    load, advance, state = load_of(context.cpu, context.size), context.advance, context.state
    compare = context.cpu.alu.binary["cmp"][8 * context.size]

    def iterate() -> None:
        a = load(source, gpr[ESI] & mask)
        b = load(destination, gpr[EDI] & mask)
        state.eflags = compare(a, b, state.eflags)[1]
        advance(ESI)
        advance(EDI)

    return iterate


def _scas(context: _Context) -> Iteration:
    gpr, mask, destination = context.gpr, context.mask, context.destination
    load, advance, state = load_of(context.cpu, context.size), context.advance, context.state
    compare, value_mask = context.cpu.alu.binary["cmp"][8 * context.size], MASKS[context.size]

    def iterate() -> None:
        b = load(destination, gpr[EDI] & mask)
        state.eflags = compare(gpr[EAX] & value_mask, b, state.eflags)[1]
        advance(EDI)

    return iterate


def _ins(context: _Context) -> Iteration:
    gpr, mask, destination, size = context.gpr, context.mask, context.destination, context.size
    cpu, advance = context.cpu, context.advance
    mmu, store = cpu.mmu, store_of(cpu, size)

    def iterate() -> None:
        port = gpr[EDX] & 0xFFFF
        check_io(cpu, port, size)
        offset = gpr[EDI] & mask
        # The port must not be read if the write to memory will fault.
        mmu.check(destination, offset, size, write=True)
        store(destination, offset, cpu.ports.load(port, size))
        advance(EDI)

    return iterate


def _outs(context: _Context) -> Iteration:
    gpr, mask, source, size = context.gpr, context.mask, context.source, context.size
    cpu, advance, load = context.cpu, context.advance, load_of(context.cpu, context.size)

    def iterate() -> None:
        port = gpr[EDX] & 0xFFFF
        check_io(cpu, port, size)
        cpu.ports.store(port, size, load(source, gpr[ESI] & mask))
        advance(ESI)

    return iterate


def _span(context: _Context, register: int, segment: Segment, count: int, *, write: bool) -> tuple[int, int]:
    """The RAM offset at `register` and how many elements from there on the fast path may touch, upwards in one page."""
    offset = context.gpr[register] & context.mask
    size, mmu = context.size, context.cpu.mmu
    low, high = (segment.write_low, segment.write_high) if write else (segment.read_low, segment.read_high)
    if not low <= offset <= high:
        return 0, 0
    linear = (segment.base + offset) & MASK32
    delta = (mmu.writes if write else mmu.reads).get(linear >> 12)
    if delta is None:
        return 0, 0
    room = min(4096 - (linear & 0xFFF), high + 1 - offset, context.mask + 1 - offset)
    return linear + delta, min(count, room // size)


def _bulk_movs(context: _Context) -> Bulk:
    gpr, state, ram, size = context.gpr, context.state, context.cpu.mmu.ram8, context.size

    def bulk(count: int) -> int:
        if state.eflags & DF:
            return 0
        source, count = _span(context, ESI, context.source, count, write=False)
        destination, count = _span(context, EDI, context.destination, count, write=True)
        length = count * size
        if source < destination < source + length:
            return 0  # overlapping upwards: each element may be the source of a later one
        ram[destination : destination + length] = ram[source : source + length]
        for register in (ESI, EDI):
            gpr[register] = gpr[register] & context.keep | (gpr[register] + length) & context.mask
        return count

    return bulk


def _bulk_stos(context: _Context) -> Bulk:
    gpr, state, ram, size = context.gpr, context.state, context.cpu.mmu.ram8, context.size

    def bulk(count: int) -> int:
        if state.eflags & DF:
            return 0
        destination, count = _span(context, EDI, context.destination, count, write=True)
        length = count * size
        value = (gpr[EAX] & MASKS[size]).to_bytes(size, "little")
        ram[destination : destination + length] = value * count
        gpr[EDI] = gpr[EDI] & context.keep | (gpr[EDI] + length) & context.mask
        return count

    return bulk


def _bulk_cmps(context: _Context) -> Bulk:
    """The elements in front that are equal, for REPE: each of them leaves the same flags."""
    gpr, state, ram, size = context.gpr, context.state, context.cpu.mmu.ram8, context.size

    def bulk(count: int) -> int:
        if state.eflags & DF:
            return 0
        first, count = _span(context, ESI, context.source, count, write=False)
        second, count = _span(context, EDI, context.destination, count, write=False)
        length = count * size
        if ram[first : first + length] != ram[second : second + length]:
            ours = int.from_bytes(ram[first : first + length], "little")
            difference = ours ^ int.from_bytes(ram[second : second + length], "little")
            count = ((difference & -difference).bit_length() - 1) // (8 * size)
            length = count * size
        if count:
            for register in (ESI, EDI):
                gpr[register] = gpr[register] & context.keep | (gpr[register] + length) & context.mask
            state.eflags = state.eflags & ~STATUS_MASK | ZF | PF
        return count

    return bulk


def _repeat(context: _Context, instruction: Instruction, iterate: Iteration, bulk: Bulk | None) -> Operation:
    """REP: CX or ECX iterations by the address size; CMPS and SCAS end early when ZF differs from the prefix."""
    gpr, state, mask, keep, cpu = context.gpr, context.state, context.mask, context.keep, context.cpu
    here, following = instruction.ip32, instruction.next_ip32
    compares = instruction.mnemonic in _COMPARING
    # F2 and F3 are the same for the instructions that do not compare.
    go_on_while = 0 if instruction.has_repne_prefix else ZF

    def repeat() -> None:
        start = state.eip
        chunk = 1 if cpu.single_iterations else CHUNK_ITERATIONS
        while count := gpr[ECX] & mask:
            if bulk is not None and chunk > 1:
                done = bulk(min(count, chunk))
                if done:
                    gpr[ECX] = gpr[ECX] & keep | count - done
                    chunk -= done
                    if chunk <= 0 and count != done:
                        state.eip = (start + here) & MASK32
                        return
                    continue
            iterate()
            gpr[ECX] = gpr[ECX] & keep | count - 1
            if compares and state.eflags & ZF != go_on_while:
                break
            chunk -= SLOW_ITERATION
            if (chunk <= 0 or cpu.last_iteration) and count != 1:
                state.eip = (start + here) & MASK32
                return
        state.eip = (start + following) & MASK32

    return repeat


_COMPARING = frozenset({Mnemonic.CMPSB, Mnemonic.CMPSW, Mnemonic.CMPSD, Mnemonic.SCASB, Mnemonic.SCASW, Mnemonic.SCASD})
_KINDS: dict[str, tuple[Callable[[_Context], Iteration], Callable[[_Context], Bulk] | None]] = {
    "movs": (_movs, _bulk_movs),
    "stos": (_stos, _bulk_stos),
    "lods": (_lods, None),
    "cmps": (_cmps, _bulk_cmps),
    "scas": (_scas, None),
    "ins": (_ins, None),
    "outs": (_outs, None),
}


def build_string(kind: str) -> Callable[[Cpu, Instruction], Operation]:
    """The builder of one family of string instructions."""
    make, make_bulk = _KINDS[kind]

    def build(cpu: Cpu, instruction: Instruction) -> Operation:
        context = _Context(cpu, instruction)
        iterate = make(context)
        if instruction.has_rep_prefix or instruction.has_repne_prefix:
            wanted = make_bulk is not None and not (kind == "cmps" and instruction.has_repne_prefix)
            return _repeat(context, instruction, iterate, make_bulk(context) if make_bulk and wanted else None)
        return iterate

    return build


ROWS = tuple(
    Row(kind + width, build_string(kind), Effect.SYSTEM if kind in ("ins", "outs") else Effect.NEXT, string=True)
    for kind in _KINDS
    for width in "bwd"
)
