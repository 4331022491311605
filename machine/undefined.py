"""Owns what the SDM leaves undefined in the results and flags of integer instructions, and what CPU models make of it.

It names each undefined spot once, with the rules that models are known or likely to follow, and picks the rules that a
given CPU follows; it must not know how the ALU computes, nor how a host is asked.

Source: SDM Vol. 1 appendix A, "EFLAGS Cross-Reference", and the instruction pages of Vol. 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from machine.flags import AF, CF, OF, PF, SF, ZF
from machine.undefinedprobes import Operands, probes
from machine.undefinedrules import RULES, Outcome

RESULT: Final = 0
"""Stands in place of a flag where the result itself is undefined."""

HOST: Final = "host"
"""The rule of last resort: ask the host's CPU for each execution."""

Key = tuple[str, int, str, int]
"""Operation, width in bits, condition of the spot, flag or RESULT."""


class AluHost(Protocol):
    """A real CPU that can be asked for single ALU operations; operations and operands are those of `machine.alu`."""

    def can_run(self, operation: str, width: int) -> bool:
        """Whether this CPU has the instruction in a mode that can be reached."""

    def results(self, operation: str, width: int, cases: Sequence[Operands]) -> list[tuple[int, int]]:
        """Result and EFLAGS of each case; of the EFLAGS given, the status flags are loaded."""


Condition = Callable[[int, int, int, int], bool]
"""Whether a spot is undefined, by width, a, b and c."""


@dataclass(frozen=True, slots=True)
class Spot:
    """Flags, or the result, of one operation that are undefined under one condition.

    Attributes:
        condition: part of the key in profiles.
        applies: whether it holds, by width, a, b and c.
        rules: for each flag (or RESULT) the names of the candidate rules; the first is AMD_ZEN5's.
        widths: bits.
    """

    condition: str
    applies: Condition
    rules: Mapping[int, tuple[str, ...]]
    widths: tuple[int, ...] = (8, 16, 32)


def _always(_width: int, _a: int, _b: int, _c: int) -> bool:
    return True


def _shifts(_width: int, _a: int, b: int, _c: int) -> bool:
    return b & 31 != 0


def _shifts_by_more(width: int, _a: int, b: int, _c: int) -> bool:
    return 1 < b & 31 < width


def _shifts_all_out(width: int, _a: int, b: int, _c: int) -> bool:
    return b & 31 >= width


def _rotates_by_more(width: int, _a: int, b: int, _c: int) -> bool:
    return b & 31 > 1 and (b & 31) % width != 0


def _rotates_whole(width: int, _a: int, b: int, _c: int) -> bool:
    return b & 31 > 1 and (b & 31) % width == 0


def _rotates_carry_by_more(width: int, _a: int, b: int, _c: int) -> bool:
    return b & 31 > 1 and (b & 31) % (width + 1) != 0


def _rotates_carry_whole(width: int, _a: int, b: int, _c: int) -> bool:
    return b & 31 > 1 and (b & 31) % (width + 1) == 0


def _double_shifts(width: int, _a: int, _b: int, c: int) -> bool:
    return 0 < c & 31 <= width


def _double_shifts_by_more(width: int, _a: int, _b: int, c: int) -> bool:
    return 1 < c & 31 <= width


def _double_shifts_all_out(width: int, _a: int, _b: int, c: int) -> bool:
    return c & 31 > width


def _scans_something(_width: int, _a: int, b: int, _c: int) -> bool:
    return b != 0


def _scans_nothing(_width: int, _a: int, b: int, _c: int) -> bool:
    return b == 0


_PLAIN: Final = ("unchanged", "clear", "set")
_SHIFT_OVERFLOW: Final = (
    "carry differs from sign", "top bits differ", "sign changed", "unchanged", "clear", "set",
)  # fmt: skip


def _first(rule: str, *others: str) -> tuple[str, ...]:
    return (rule, *(other for other in others if other != rule))


def _rotates(of_rule: str, by_more: Condition, whole: Condition) -> tuple[Spot, ...]:
    overflow = {OF: _first(of_rule, *_SHIFT_OVERFLOW)}
    return Spot("count over 1", by_more, overflow), Spot("whole turn", whole, overflow, (8, 16))


def _shift(of_rule: str, carry_rules: tuple[str, ...]) -> tuple[Spot, ...]:
    overflow = {OF: _first(of_rule, *_SHIFT_OVERFLOW)}
    carry = {CF: carry_rules} if carry_rules else {}
    return (
        Spot("count over 0", _shifts, {AF: _first("set", *_PLAIN)}),
        Spot("count over 1", _shifts_by_more, overflow),
        Spot("count from size", _shifts_all_out, carry | overflow, (8, 16)),
    )


def _double_shift(of_rule: str, *carry_rules: str) -> tuple[Spot, ...]:
    overflow = {OF: _first(of_rule, *_SHIFT_OVERFLOW)}
    auxiliary = {AF: _first("set", *_PLAIN)}
    beyond = {RESULT: ("source twice", "destination again"), CF: carry_rules} | overflow | auxiliary
    return (
        Spot("count over 0", _double_shifts, auxiliary, (16, 32)),
        Spot("count over 1", _double_shifts_by_more, overflow, (16, 32)),
        Spot(
            "count over size",
            _double_shifts_all_out,
            beyond | dict.fromkeys((SF, ZF, PF), ("of result", *_PLAIN)),
            (16,),
        ),
    )


def _scan() -> tuple[Spot, ...]:
    cleared = dict.fromkeys((CF, OF, SF, AF), _first("clear", *_PLAIN))
    found = {PF: ("of result", *_PLAIN, "of source")}
    nothing = {RESULT: ("destination kept", "zero"), PF: _first("set", *_PLAIN)}
    return (
        Spot("source not 0", _scans_something, cleared | found, (16, 32)),
        Spot("source 0", _scans_nothing, nothing | cleared, (16, 32)),
    )


def _spots() -> dict[str, tuple[Spot, ...]]:
    logic = (Spot("always", _always, {AF: _first("clear", *_PLAIN)}),)
    halves = ("of result", "of upper half")
    product = dict.fromkeys((SF, ZF, PF), (*_PLAIN, *halves)) | {AF: _PLAIN}
    quotient = dict.fromkeys((SF, ZF, PF), (*_first("clear", *_PLAIN), *halves))
    divide = (Spot("always", _always, quotient | {CF: _PLAIN, OF: _PLAIN, AF: _first("set", *_PLAIN)}),)
    bit = (Spot("always", _always, {OF: (*_PLAIN, "ROR overflow")} | dict.fromkeys((SF, AF, PF), _PLAIN), (16, 32)),)
    carry_by_count = ("carry by size", *_PLAIN)
    ascii_sum = dict.fromkeys((OF, SF, ZF, PF), ("of word sum", "of byte sum", "of AL", *_PLAIN))
    decimal = (Spot("always", _always, {OF: ("of byte sum", *_PLAIN)}, (16,)),)
    return {
        "and": logic,
        "or": logic,
        "xor": logic,
        "test": logic,
        "mul": (Spot("always", _always, product),),
        "imul": (Spot("always", _always, product),),
        "imul2": (Spot("always", _always, product, (16, 32)),),
        "div": divide,
        "idiv": divide,
        "rol": _rotates("carry differs from sign", _rotates_by_more, _rotates_whole),
        "ror": _rotates("top bits differ", _rotates_by_more, _rotates_whole),
        "rcl": _rotates("carry differs from sign", _rotates_carry_by_more, _rotates_carry_whole),
        "rcr": _rotates("top bits differ", _rotates_carry_by_more, _rotates_carry_whole),
        "shl": _shift("left overflow", ("left carry", *carry_by_count)),
        "shr": _shift("top bits differ", ("right carry", *carry_by_count)),
        "sar": _shift("clear", ()),
        "shld": _double_shift("left overflow", "left carry", "left pair carry", *carry_by_count),
        "shrd": _double_shift("top bits differ", "right carry", "right pair carry", *carry_by_count),
        "bt": bit,
        "bts": bit,
        "btr": bit,
        "btc": bit,
        "bsf": _scan(),
        "bsr": _scan(),
        "bswap": (Spot("always", _always, {RESULT: ("zero", "bytes swapped", "destination kept")}, (16,)),),
        "aaa": (Spot("always", _always, ascii_sum, (16,)),),
        "aas": (Spot("always", _always, ascii_sum, (16,)),),
        "daa": decimal,
        "das": decimal,
        "aam": (Spot("always", _always, dict.fromkeys((OF, AF, CF), _first("clear", *_PLAIN)), (16,)),),
        "aad": (Spot("always", _always, dict.fromkeys((OF, AF, CF), ("of byte sum", *_PLAIN)), (16,)),),
    }


SPOTS: Final[Mapping[str, tuple[Spot, ...]]] = _spots()
"""Every undefined spot by operation: the one table that the ALU, the measurement and the masks of tests read."""


def undefined_flags(operation: str, width: int, a: int, b: int, c: int) -> int:
    """EFLAGS bits that the SDM leaves undefined when `operation` runs on these operands."""
    return _undefined(operation, width, a, b, c)[0]


def is_result_undefined(operation: str, width: int, a: int, b: int, c: int) -> bool:
    """Whether the SDM leaves the result itself undefined for these operands."""
    return _undefined(operation, width, a, b, c)[1]


def _undefined(operation: str, width: int, a: int, b: int, c: int) -> tuple[int, bool]:
    mask, result = 0, False
    for spot in SPOTS.get(operation, ()):
        if width in spot.widths and spot.applies(width, a, b, c):
            for flag in spot.rules:
                mask |= flag
                result = result or flag == RESULT
    return mask, result


def widest_undefined_flags(operation: str) -> int:
    """EFLAGS bits that `operation` leaves undefined for some operands or other."""
    mask = 0
    for spot in SPOTS.get(operation, ()):
        for flag in spot.rules:
            mask |= flag
    return mask


def keys() -> Iterator[tuple[Key, Spot]]:
    """Every undefined flag or result of every operation and width."""
    for operation, spots in SPOTS.items():
        for spot in spots:
            for width in spot.widths:
                for flag in spot.rules:
                    yield (operation, width, spot.condition, flag), spot


@dataclass(frozen=True, slots=True)
class UndefinedFlags:
    """What one CPU model makes of every undefined spot.

    Attributes:
        name: of the model, or where it was measured.
        rules: a name in `RULES`, or HOST, for each key.
        unprobed: operations that could not be asked for, so that their rules are an assumption.
    """

    name: str
    rules: Mapping[Key, str]
    unprobed: tuple[str, ...] = ()

    @property
    def host_operations(self) -> tuple[str, ...]:
        """Operations that no known rule explains and that the host has to be asked for."""
        return tuple(sorted({key[0] for key, rule in self.rules.items() if rule == HOST}))

    def describe(self) -> str:
        """One line for people."""
        text = f"undefined flags as on {self.name}"
        if self.host_operations:
            text += f"; by asking the host: {' '.join(self.host_operations)}"
        if self.unprobed:
            text += f"; assumed: {' '.join(self.unprobed)}"
        return text


AMD_ZEN5: Final = UndefinedFlags("AMD Zen 5", {key: spot.rules[key[3]][0] for key, spot in keys()})
"""Measured on an EPYC of family 1Ah, model 2; the ALU's functions are written for it."""


def _deviating(name: str, deviations: Mapping[str, Mapping[int, str]]) -> UndefinedFlags:
    """A model by its differences from AMD_ZEN5, given by operation, or operation and condition, and flag."""
    rules = dict(AMD_ZEN5.rules)
    for key in rules:
        operation, _width, condition, flag = key
        for where in (operation, f"{operation} {condition}"):
            if flag in deviations.get(where, {}):
                rules[key] = deviations[where][flag]
    return UndefinedFlags(name, rules)


def _intel_p6() -> UndefinedFlags:
    unchanged = "unchanged"
    arithmetic = dict.fromkeys((SF, ZF, AF, PF), unchanged)
    ascii_sum = {OF: unchanged, SF: "clear"}
    deviations: dict[str, dict[int, str]] = {
        "mul": arithmetic,
        "imul": arithmetic,
        "imul2": arithmetic,
        "div": arithmetic,
        "idiv": arithmetic,
        "aaa": ascii_sum,
        "aas": ascii_sum,
        "daa": {OF: unchanged},
        "das": {OF: unchanged},
        "rol": {OF: unchanged},
        "ror": {OF: unchanged},
        "bsf": dict.fromkeys((CF, OF, SF, AF, PF), unchanged),
        "bsr": dict.fromkeys((CF, OF, SF, AF, PF), unchanged),
    }
    for operation in ("shl", "shr", "sar", "shld", "shrd"):
        deviations[operation] = {AF: unchanged, OF: unchanged}
    return _deviating("Intel P6", deviations)


INTEL_P6: Final = _intel_p6()
"""Pentium II to Core 2 by the table of sandpile.org/x86/flags.htm; not measured by us. Where the table is silent
(results, CF of shifts beyond the size, RCL and RCR) it is as AMD_ZEN5."""

PROFILES: Final[Mapping[str, UndefinedFlags]] = {"amd-zen5": AMD_ZEN5, "intel-p6": INTEL_P6}
"""Known models by the name that a user types."""


def measure(host: AluHost) -> UndefinedFlags:
    """Find the rules that `host` follows, by some native executions of each operation.

    A spot that no candidate rule explains gets HOST; operations that the host cannot run keep AMD_ZEN5's rules and are
    listed in `unprobed`. The profile is named after the known model that it equals, if there is one.
    """
    rules: dict[Key, str] = {}
    unprobed = []
    for operation, spots in SPOTS.items():
        for width in sorted({width for spot in spots for width in spot.widths}):
            if not host.can_run(operation, width):
                unprobed.append(operation)
                continue
            cases = probes(operation, width)
            outcomes = [
                Outcome(operation, width, *case, result, out)
                for case, (result, out) in zip(cases, host.results(operation, width, cases), strict=True)
            ]
            for spot in spots:
                if width in spot.widths:
                    seen = [seen for seen in outcomes if spot.applies(width, seen.a, seen.b, seen.c)]
                    for flag, candidates in spot.rules.items():
                        rules[operation, width, spot.condition, flag] = _explain(seen, flag, candidates)
    found = {**AMD_ZEN5.rules, **rules}
    name = next((profile.name for profile in PROFILES.values() if profile.rules == found), "this host")
    return UndefinedFlags(name, found, tuple(dict.fromkeys(unprobed)))


def _explain(outcomes: Sequence[Outcome], flag: int, candidates: Sequence[str]) -> str:
    for name in candidates:
        rule = RULES[name]
        for seen in outcomes:
            value = rule(seen, flag)
            if value != seen.result if flag == RESULT else bool(value) != bool(seen.out & flag):
                break
        else:
            return name
    return HOST
