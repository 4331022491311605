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
from machine.flags import ZF
from machine.instructions.operands import MASKS, load_of, store_of
from machine.instructions.stretches import (
    Stretch,
    StringContext,
    stretch_of_cmps,
    stretch_of_movs,
    stretch_of_stos,
)
from machine.instructions.table import Effect, Operation, Row
from machine.state import EAX, ECX, EDI, EDX, ESI, MASK32

# Iterations of one execution: a few milliseconds at most, and thousands of times more than the overhead of resuming.
CHUNK_ITERATIONS = 2048
SLOW_ITERATION = 8  # one that is done by itself, perhaps by a device, counts for so many

Iteration = Callable[[], None]


def _movs(context: StringContext) -> Iteration:
    gpr, mask, source, destination = context.gpr, context.mask, context.source, context.destination
    load, store, advance = load_of(context.cpu, context.size), store_of(context.cpu, context.size), context.advance

    def iterate() -> None:
        store(destination, gpr[EDI] & mask, load(source, gpr[ESI] & mask))
        advance(ESI)
        advance(EDI)

    return iterate


def _stos(context: StringContext) -> Iteration:
    gpr, mask, destination = context.gpr, context.mask, context.destination
    store, advance, value_mask = store_of(context.cpu, context.size), context.advance, MASKS[context.size]

    def iterate() -> None:
        store(destination, gpr[EDI] & mask, gpr[EAX] & value_mask)
        advance(EDI)

    return iterate


def _lods(context: StringContext) -> Iteration:
    gpr, mask, source = context.gpr, context.mask, context.source
    load, advance, keep = load_of(context.cpu, context.size), context.advance, ~MASKS[context.size] & MASK32

    def iterate() -> None:
        gpr[EAX] = gpr[EAX] & keep | load(source, gpr[ESI] & mask)
        advance(ESI)

    return iterate


def _cmps(context: StringContext) -> Iteration:
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


def _scas(context: StringContext) -> Iteration:
    gpr, mask, destination = context.gpr, context.mask, context.destination
    load, advance, state = load_of(context.cpu, context.size), context.advance, context.state
    compare, value_mask = context.cpu.alu.binary["cmp"][8 * context.size], MASKS[context.size]

    def iterate() -> None:
        b = load(destination, gpr[EDI] & mask)
        state.eflags = compare(gpr[EAX] & value_mask, b, state.eflags)[1]
        advance(EDI)

    return iterate


def _ins(context: StringContext) -> Iteration:
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


def _outs(context: StringContext) -> Iteration:
    gpr, mask, source, size = context.gpr, context.mask, context.source, context.size
    cpu, advance, load = context.cpu, context.advance, load_of(context.cpu, context.size)

    def iterate() -> None:
        port = gpr[EDX] & 0xFFFF
        check_io(cpu, port, size)
        cpu.ports.store(port, size, load(source, gpr[ESI] & mask))
        advance(ESI)

    return iterate


def _repeat(context: StringContext, instruction: Instruction, iterate: Iteration, stretch: Stretch | None) -> Operation:
    """REP: CX or ECX iterations by the address size; CMPS and SCAS end early when ZF differs from the prefix."""
    gpr, state, mask, keep, cpu = context.gpr, context.state, context.mask, context.keep, context.cpu
    here, following = instruction.ip32, instruction.next_ip32
    compares = instruction.mnemonic in _COMPARING
    # F2 and F3 are the same for the instructions that do not compare.
    go_on_while = 0 if instruction.has_repne_prefix else ZF

    def repeat() -> None:
        start = state.eip
        cpu.last_iteration = False
        chunk = 1 if cpu.single_iterations else CHUNK_ITERATIONS
        while count := gpr[ECX] & mask:
            if stretch is not None and chunk > 1:
                done = stretch(min(count, chunk))
                if done:
                    gpr[ECX] = gpr[ECX] & keep | count - done
                    chunk -= done
                    if (chunk <= 0 or cpu.last_iteration) and count != done:
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
_KINDS: dict[str, tuple[Callable[[StringContext], Iteration], Callable[[StringContext], Stretch] | None]] = {
    "movs": (_movs, stretch_of_movs),
    "stos": (_stos, stretch_of_stos),
    "lods": (_lods, None),
    "cmps": (_cmps, stretch_of_cmps),
    "scas": (_scas, None),
    "ins": (_ins, None),
    "outs": (_outs, None),
}


def build_string(kind: str) -> Callable[[Cpu, Instruction], Operation]:
    """The builder of one family of string instructions."""
    make, make_stretch = _KINDS[kind]

    def build(cpu: Cpu, instruction: Instruction) -> Operation:
        context = StringContext(cpu, instruction)
        iterate = make(context)
        if instruction.has_rep_prefix or instruction.has_repne_prefix:
            wanted = make_stretch is not None and not (kind == "cmps" and instruction.has_repne_prefix)
            return _repeat(context, instruction, iterate, make_stretch(context) if make_stretch and wanted else None)
        return iterate

    return build


ROWS = tuple(
    Row(kind + width, build_string(kind), Effect.SYSTEM if kind in ("ins", "outs") else Effect.NEXT, string=True)
    for kind in _KINDS
    for width in "bwd"
)
