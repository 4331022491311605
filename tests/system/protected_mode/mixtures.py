"""Cases with several things wrong at once, by chance: they show in which order the checks are made.

The numbers are drawn from a fixed seed, so the cases are the same every time.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator

from tests.system.protected_mode.arena import (
    ARENA,
    CODE,
    DF_STACK,
    EXIT_VECTOR,
    S_CODE3,
    S_DATA0,
    S_DATA1,
    S_DATA3,
    S_FREE,
    S_TSS_DF,
    STACK3,
    TSS_MAIN,
    Patch,
    descriptor,
    gate,
    segment,
    vector_gate,
)
from tests.system.protected_mode.harness import V86, Case
from tests.system.protected_mode.segments import EXIT

_COUNT = 600
_SHOW = "; .org 0x40; mov eax, cs; mov ebx, ss; mov ecx, ds; mov edx, es" + EXIT
_CODE_ACCESS = (0x9B, 0x9B, 0x9B, 0xBB, 0xFB, 0x9F, 0xFF, 0x1B, 0x93, 0x99, 0x82)
_STACK_ACCESS = (0x93, 0x93, 0x93, 0xB3, 0xF3, 0x13, 0x33, 0x91, 0x9B, 0x97, 0x82)
_SELECTORS = (S_FREE, S_FREE, S_FREE, S_FREE | 1, S_FREE | 3, 0, 3, 0x1F8, 0x44)


def _code(generator: random.Random, selector: int) -> Patch:
    """A code segment based at the arena that may be wrong, and may be too short for the target."""
    limit = generator.choice((0xFFFF, 0xFFFF, 0xFFFF, 0x103F, 0x1040))
    return descriptor(selector, segment(ARENA, limit, generator.choice(_CODE_ACCESS)))


def _stack(generator: random.Random, selector: int) -> Patch:
    """A flat stack segment that may be wrong, and may be too short."""
    limit = generator.choice((0xFFFFF, 0xFFFFF, 0xFFFFF, 0x20500, 0x206F0))
    return descriptor(selector, segment(0, limit, generator.choice(_STACK_ACCESS), 0x4))


def _inner_stack(generator: random.Random) -> list[Patch]:
    """Where the TSS says that the stacks of rings 0 and 1 are."""
    selector = generator.choice((S_DATA0, S_DATA0, S_DATA1, S_DATA3, S_FREE + 8, S_FREE + 9, 0, 0x1F8))
    return [
        _stack(generator, S_FREE + 8),
        Patch(TSS_MAIN + 8, struct.pack("<I", selector)),
        Patch(TSS_MAIN + 16, struct.pack("<I", generator.choice((S_DATA1, S_DATA1, selector)))),
    ]


def _in_safe_tasks() -> list[Patch]:
    """Handlers that do not need the stacks that are wrong."""
    return [vector_gate(vector, gate(S_TSS_DF, 0, 0xE5)) for vector in (10, 11, 12, 13, EXIT_VECTOR)]


def call_gates() -> Iterator[Case]:
    """CALL and JMP through gates: gate, code, stack, parameters and EIP."""
    generator = random.Random(1)
    for number in range(_COUNT):
        access = generator.choice((0xEC, 0xEC, 0xEC, 0x8C, 0xAC, 0x6C, 0xE4))
        count = generator.choice((0, 0, 3, 31))
        target = generator.choice(_SELECTORS)
        level = generator.choice((0, 1, 3, 3, 3))
        rpl = generator.choice((0, 3))
        patches = [
            descriptor(S_FREE + 16, gate(target, CODE + 0x40 - ARENA, access, count)),
            _code(generator, S_FREE),
            *_inner_stack(generator),
            *_in_safe_tasks(),
        ]
        instruction = generator.choice(("call", "call", "jmp"))
        code = f"{instruction} {S_FREE + 16 | rpl}:0{EXIT}" + _SHOW
        yield Case(
            f"{number}: {instruction} cpl {level} gate {access:x}", code, level, {}, patches, ((DF_STACK - 4, 1),)
        )


def interrupts() -> Iterator[Case]:
    """INT n and an exception through gates: gate, code, stack and EIP, also out of virtual-8086 mode."""
    generator = random.Random(2)
    for number in range(_COUNT):
        access = generator.choice((0xEE, 0xEF, 0xEE, 0x8E, 0x6E, 0xE6))
        target = generator.choice(_SELECTORS)
        level = generator.choice((0, 1, 3, 3, V86))
        event, vector = generator.choice((("int 0x31", 0x31), ("ud2", 6)))
        patches = [
            vector_gate(vector, gate(target, CODE + 0x40 - ARENA, access)),
            _code(generator, S_FREE),
            *_inner_stack(generator),
            *_in_safe_tasks(),
        ]
        name = f"{number}: {event} cpl {level} gate {access:x}"
        yield Case(name, f"{event}{EXIT}" + _SHOW, level, {}, patches, ((DF_STACK - 4, 1),))


def returns() -> Iterator[Case]:
    """RETF and IRETD: code, stack, EIP, and a frame that may not fit."""
    generator = random.Random(3)
    for number in range(_COUNT):
        selector = generator.choice((*_SELECTORS, S_FREE | 1, S_FREE | 3, S_CODE3))
        outer = generator.choice((S_FREE + 8, S_FREE + 9, S_FREE + 11, S_FREE + 11, S_DATA3, 0, 0x1F8))
        eip = CODE + 0x40 if selector == S_CODE3 else CODE + 0x40 - ARENA
        level = generator.choice((0, 0, 0, 1, 3))
        instruction = generator.choice(("iretd", "retf"))
        flags = f"push {generator.choice((2, 0x202, 0x3002))};" if instruction == "iretd" else ""
        patches = [_code(generator, S_FREE), _stack(generator, S_FREE + 8), *_in_safe_tasks()]
        code = f"push {outer}; push {STACK3 - 0x80}; {flags} push {selector}; push {eip}; {instruction}" + _SHOW
        name = f"{number}: {instruction} to {selector:x} with {outer:x} cpl {level}"
        yield Case(name, code, level, {}, patches, ((DF_STACK - 4, 1),))
