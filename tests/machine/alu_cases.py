"""Owns the operands that ALU tests use: corners of every width, all shift counts, flags in, and seeded random ones."""

from __future__ import annotations

import random
from itertools import product

from machine.alu import BINARY, TERNARY, UNARY, Alu
from machine.flags import AF, CF, OF, PF, SF, STATUS_MASK, ZF
from machine.undefinedprobes import Operands

SHIFTS = ("rol", "ror", "rcl", "rcr", "shl", "shr", "sar")
DOUBLE_SHIFTS = ("shld", "shrd")
BIT_TESTS = ("bt", "bts", "btr", "btc")

FLAGS_IN = (0, CF, AF, CF | AF, SF | ZF | PF | OF, STATUS_MASK)

OPERATIONS = [
    (operation, width)
    for table in (UNARY, BINARY, TERNARY)
    for operation, by_width in table.items()
    for width in by_width
]
"""Every operation of the ALU with every width."""


def corners(width: int) -> list[int]:
    """Values around everything that flags depend on: nibbles, bytes, signs, all ones."""
    mask, sign = (1 << width) - 1, 1 << (width - 1)
    values = {0, 1, 2, 3, 5, 6, 7, 8, 9, 0xA, 0xF, 0x10, 0x11, 0x55, 0x7F, 0x80, 0x81, 0x99, 0x9A, 0xAA, 0xFE, 0xFF}
    values |= {0x100, 0x7FFF, 0x8000, 0xFFFF, 0x10000, sign - 1, sign, sign + 1, sign >> 1, mask >> 1, mask - 1, mask}
    return sorted({value & mask for value in values})


def some_random(source: random.Random, width: int) -> int:
    """A random value whose magnitude is random too."""
    return source.getrandbits(source.choice((width, source.randint(1, width))))


def run(alu: Alu, operation: str, width: int, case: Operands) -> tuple[int, int]:
    """Call the ALU with as many operands as the operation has."""
    a, b, c, eflags = case
    if operation in alu.unary:
        return alu.unary[operation][width](a, eflags)
    if operation in alu.binary:
        return alu.binary[operation][width](a, b, eflags)
    return alu.ternary[operation][width](a, b, c, eflags)


def cases(operation: str, width: int, *, random_cases: int = 1500) -> list[Operands]:
    """Operands for one operation, divides by 0 and quotients that do not fit among them."""
    source = random.Random(f"{operation} {width}")
    edges = corners(width)
    found: list[Operands]
    if operation in SHIFTS:
        found = [(a, count, 0, eflags) for a, count in product(edges, range(256)) for eflags in (0, CF, STATUS_MASK)]
        found += [
            (source.getrandbits(width), source.randrange(256), 0, eflags) for eflags in FLAGS_IN * (random_cases // 6)
        ]
    elif operation in DOUBLE_SHIFTS:
        pairs = [(a, source.choice(edges)) for a in edges] + [(source.getrandbits(width), source.getrandbits(width))]
        found = [(a, b, c, eflags) for (a, b), c in product(pairs, range(256)) for eflags in (0, STATUS_MASK)]
    elif operation in ("aaa", "aas", "daa", "das", "lahf", "sahf"):
        found = [(ax, 0, 0, eflags) for ax in range(0, 0x10000, 7) for eflags in FLAGS_IN]
        found += [
            (ah << 8 | al, 0, 0, eflags)
            for ah in (0, 0x7F, 0x80, 0xFE, 0xFF)
            for al in range(256)
            for eflags in FLAGS_IN
        ]
    elif operation in ("aam", "aad"):
        bases = (10, 0, 1, 2, 0x0F, 0x10, 0x7F, 0x80, 0xFF)
        found = [
            (ax, base, 0, eflags) for base in bases for ax in (*range(256), *corners(16)) for eflags in (0, STATUS_MASK)
        ]
        found += [(source.getrandbits(16), 10, 0, eflags) for eflags in FLAGS_IN * (random_cases // 6)]
    elif operation in ("div", "idiv"):
        found = [(a, b, 0, eflags) for a in corners(2 * width) for b in edges for eflags in (0, STATUS_MASK)]
        # The neighbourhood of overflow: quotients at both ends of the signed and of the unsigned range.
        limits = (1 << (width - 1), (1 << width) - 1, 1 << width)
        for b, limit, near, sign in product(edges, limits, (-1, 0, 1), (1, -1)):
            found.append(((b * limit + near) * sign % (1 << 2 * width), b, 0, 0))
        for eflags in FLAGS_IN * (random_cases // 6):
            b = some_random(source, width)
            found.append(
                (b * some_random(source, width) + source.getrandbits(width) >> source.randrange(3), b, 0, eflags)
            )
    elif operation == "cmpxchg8b":
        found = []
        for a, c, eflags in product(corners(64), (0, 0x0123_4567_89AB_CDEF), FLAGS_IN):
            found += [(a, b, c, eflags) for b in (a, a ^ 1, a ^ 1 << 32, a ^ 1 << 63)]
    elif operation == "cmpxchg":
        found = [
            (a, b, source.getrandbits(width), eflags) for a, b in product(edges, edges) for eflags in FLAGS_IN[::5]
        ]
    elif operation in UNARY:
        values = range(256) if width == 8 else edges + [some_random(source, width) for _ in range(random_cases)]
        found = [(a, 0, 0, eflags) for a in values for eflags in FLAGS_IN]
    else:
        found = [(a, b, 0, eflags) for a, b in product(edges, edges) for eflags in FLAGS_IN]
        for eflags in FLAGS_IN * (random_cases // 6):
            found.append((some_random(source, width), some_random(source, width), 0, eflags))
    return found
