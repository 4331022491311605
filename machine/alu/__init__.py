"""Owns the ALU as one table: pure functions by operation and width, with the undefined flags of a chosen CPU model.

It must not know registers, memory or the host; a model that needs the host's answers gets them through a port.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from machine.alu import arithmetic, bcd, bits, multiply, shifts
from machine.alu.arithmetic import Binary, Unary
from machine.alu.shifts import Ternary
from machine.flags import STATUS_MASK
from machine.undefined import AMD_ZEN5, HOST, RESULT, SPOTS, AluHost, Condition, UndefinedFlags
from machine.undefinedrules import RULES, Outcome, Rule

__all__ = ["BINARY", "TERNARY", "UNARY", "Alu", "Binary", "Ternary", "Unary", "build_alu"]

_ALL: Final = (8, 16, 32)
_WIDE: Final = (16, 32)

UNARY: Final[Mapping[str, Mapping[int, Unary]]] = {
    name: {width: make(width) for width in widths}
    for name, make, widths in (
        ("inc", arithmetic.inc, _ALL),
        ("dec", arithmetic.dec, _ALL),
        ("neg", arithmetic.neg, _ALL),
        ("not", arithmetic.not_, _ALL),
        ("bswap", bits.bswap, _WIDE),
        ("aaa", bcd.aaa, (16,)),
        ("aas", bcd.aas, (16,)),
        ("daa", bcd.daa, (16,)),
        ("das", bcd.das, (16,)),
        ("lahf", bits.lahf, (16,)),
        ("sahf", bits.sahf, (16,)),
        ("salc", bits.salc, (8,)),
    )
}
"""`f(a, eflags) -> (result, eflags)` by operation and width in bits, for AMD_ZEN5."""

BINARY: Final[Mapping[str, Mapping[int, Binary]]] = {
    name: {width: make(width) for width in widths}
    for name, make, widths in (
        ("add", arithmetic.add, _ALL),
        ("adc", arithmetic.adc, _ALL),
        ("sub", arithmetic.sub, _ALL),
        ("sbb", arithmetic.sbb, _ALL),
        ("cmp", arithmetic.cmp, _ALL),
        ("and", arithmetic.and_, _ALL),
        ("or", arithmetic.or_, _ALL),
        ("xor", arithmetic.xor, _ALL),
        ("test", arithmetic.test, _ALL),
        ("xadd", arithmetic.add, _ALL),
        ("rol", shifts.rol, _ALL),
        ("ror", shifts.ror, _ALL),
        ("rcl", shifts.rcl, _ALL),
        ("rcr", shifts.rcr, _ALL),
        ("shl", shifts.shl, _ALL),
        ("shr", shifts.shr, _ALL),
        ("sar", shifts.sar, _ALL),
        ("mul", multiply.mul, _ALL),
        ("imul", multiply.imul, _ALL),
        ("imul2", multiply.imul2, _WIDE),
        ("div", multiply.div, _ALL),
        ("idiv", multiply.idiv, _ALL),
        ("bt", bits.bt, _WIDE),
        ("bts", bits.bts, _WIDE),
        ("btr", bits.btr, _WIDE),
        ("btc", bits.btc, _WIDE),
        ("bsf", bits.bsf, _WIDE),
        ("bsr", bits.bsr, _WIDE),
        ("aam", bcd.aam, (16,)),
        ("aad", bcd.aad, (16,)),
    )
}
"""`f(a, b, eflags) -> (result, eflags)`; a is the destination, b the source, count, bit index or immediate."""

TERNARY: Final[Mapping[str, Mapping[int, Ternary]]] = {
    name: {width: make(width) for width in widths}
    for name, make, widths in (
        ("shld", shifts.shld, _WIDE),
        ("shrd", shifts.shrd, _WIDE),
        ("cmpxchg", bits.cmpxchg, _ALL),
        ("cmpxchg8b", bits.cmpxchg8b, (64,)),
    )
}
"""`f(a, b, c, eflags) -> (result, eflags)`; see the functions for what a, b and c are."""


@dataclass(frozen=True, slots=True)
class Alu:
    """The operations for one CPU model.

    EFLAGS go in and come out whole; bits other than the status flags pass through. Operands and results are unsigned
    and of the operation's width, but for MUL and IMUL (result) and DIV and IDIV (a and result), which are of twice the
    width. Results of CMP, TEST and BT are the destination as it was.

    Attributes:
        profile: what fills undefined flags.
        unary: by operation, then width in bits: `f(a, eflags) -> (result, eflags)`.
        binary: the same with `f(a, b, eflags) -> (result, eflags)`.
        ternary: the same with `f(a, b, c, eflags) -> (result, eflags)`.
    """

    profile: UndefinedFlags
    unary: Mapping[str, Mapping[int, Unary]]
    binary: Mapping[str, Mapping[int, Binary]]
    ternary: Mapping[str, Mapping[int, Ternary]]


def build_alu(profile: UndefinedFlags = AMD_ZEN5, host: AluHost | None = None) -> Alu:
    """The ALU whose undefined flags follow `profile`.

    Operations on which the profile agrees with AMD_ZEN5 are the plain functions; the others cost a second call.

    Args:
        profile: a known model or the result of `machine.undefined.measure`.
        host: asked for the operations that the profile marks HOST.

    Raises:
        ValueError: the profile needs a host and there is none.
    """
    if profile.host_operations and host is None:
        raise ValueError(f"these operations follow no known rule and need a host: {' '.join(profile.host_operations)}")
    unary = {
        operation: {width: _unary(base, _patch(operation, width, profile, host)) for width, base in by_width.items()}
        for operation, by_width in UNARY.items()
    }
    binary = {
        operation: {width: _binary(base, _patch(operation, width, profile, host)) for width, base in by_width.items()}
        for operation, by_width in BINARY.items()
    }
    ternary = {
        operation: {width: _ternary(base, _patch(operation, width, profile, host)) for width, base in by_width.items()}
        for operation, by_width in TERNARY.items()
    }
    return Alu(profile, unary, binary, ternary)


_Patch = Callable[[int, int, int, int, tuple[int, int]], tuple[int, int]]
"""(a, b, c, eflags, what AMD_ZEN5 gives) to (result, eflags)."""


def _unary(base: Unary, patch: _Patch | None) -> Unary:
    if patch is None:
        return base
    return lambda a, eflags: patch(a, 0, 0, eflags, base(a, eflags))


def _binary(base: Binary, patch: _Patch | None) -> Binary:
    if patch is None:
        return base
    return lambda a, b, eflags: patch(a, b, 0, eflags, base(a, b, eflags))


def _ternary(base: Ternary, patch: _Patch | None) -> Ternary:
    if patch is None:
        return base
    return lambda a, b, c, eflags: patch(a, b, c, eflags, base(a, b, c, eflags))


def _patch(operation: str, width: int, profile: UndefinedFlags, host: AluHost | None) -> _Patch | None:
    """What turns AMD_ZEN5's outcome of an operation into that of `profile`; None if they agree."""
    steps: list[tuple[Condition, _Patch]] = []
    for spot in SPOTS.get(operation, ()):
        if width not in spot.widths:
            continue
        names = {flag: profile.rules[operation, width, spot.condition, flag] for flag in spot.rules}
        changed = {flag: name for flag, name in names.items() if name != spot.rules[flag][0]}
        if HOST in changed.values() and host is not None:
            steps.append((spot.applies, _by_host(operation, width, host)))
        elif set(changed.values()) <= {"unchanged", "clear", "set"}:
            if changed:
                steps.append((spot.applies, _by_mask(changed)))
        else:
            # All of the spot, in its order: a flag may follow from the result or from CF.
            rules = tuple((flag, RULES[name]) for flag, name in names.items())
            steps.append((spot.applies, _by_rules(operation, width, rules)))
    if not steps:
        return None

    def patch(a: int, b: int, c: int, eflags: int, outcome: tuple[int, int]) -> tuple[int, int]:
        for applies, step in steps:
            if applies(width, a, b, c):
                outcome = step(a, b, c, eflags, outcome)
        return outcome

    return patch


def _by_host(operation: str, width: int, host: AluHost) -> _Patch:
    def ask(a: int, b: int, c: int, eflags: int, _outcome: tuple[int, int]) -> tuple[int, int]:
        result, out = host.results(operation, width, ((a, b, c, eflags),))[0]
        return result, eflags & ~STATUS_MASK | out & STATUS_MASK

    return ask


def _by_mask(changed: Mapping[int, str]) -> _Patch:
    kept = sum(flag for flag, name in changed.items() if name == "unchanged")
    ones = sum(flag for flag, name in changed.items() if name == "set")
    others = ~sum(changed)

    def mask(_a: int, _b: int, _c: int, eflags: int, outcome: tuple[int, int]) -> tuple[int, int]:
        result, out = outcome
        return result, out & others | eflags & kept | ones

    return mask


def _by_rules(operation: str, width: int, rules: Sequence[tuple[int, Rule]]) -> _Patch:
    def follow(a: int, b: int, c: int, eflags: int, outcome: tuple[int, int]) -> tuple[int, int]:
        result, out = outcome
        for flag, rule in rules:
            value = rule(Outcome(operation, width, a, b, c, eflags, result, out), flag)
            if flag == RESULT:
                result = value
            else:
                out = out | flag if value else out & ~flag
        return result, out

    return follow
