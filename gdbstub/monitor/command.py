"""One monitor command, and the words that users write: numbers, addresses, switches.

It must not know any particular command.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gdbstub import guest_registers
from gdbstub.target import TargetError

if TYPE_CHECKING:
    from gdbstub.guest import GuestTarget

MASK32 = 0xFFFF_FFFF
# Of 64 bits or so: of thousands of digits Python makes no number.
_TERM = re.compile(r"\s*([+-]?)\s*(\$\w+|0[xX][0-9a-fA-F]{1,16}|[0-9]{1,20})")

Run = Callable[["GuestTarget", list[str]], Iterator[str]]


@dataclass(frozen=True, slots=True)
class Command:
    """A command: `name` is one or two words, `usage` what may follow them.

    Attributes:
        summary: one line for the list of commands.
        run: yields the output in pieces; called with the words after the name.
        changes: it changes something, so that a read-only client may not have it.
        details: more for `help NAME`.
        bare: may also be used with no words by a read-only client, though `changes` is set.
        raw: `run` gets the rest of the line as one word.
    """

    name: str
    usage: str
    summary: str
    run: Run
    changes: bool = False
    details: str = ""
    bare: bool = False
    raw: bool = False

    @property
    def synopsis(self) -> str:
        """Name and usage."""
        return f"{self.name} {self.usage}".rstrip()


def usage_error(command: str) -> TargetError:
    """For words that a command does not understand."""
    return TargetError(f"That is not how `{command}` is used; see `monitor help {command}`.")


def parse_number(guest: GuestTarget, text: str, what: str = "number") -> int:
    """A sum of numbers (decimal, or hex after 0x) and registers ($esp), such as `$ebp+8`.

    Raises:
        TargetError: it is none.
    """
    at = total = 0
    while at < len(text):
        match = _TERM.match(text, at)
        if match is None or (at and not match[1]):
            raise TargetError(f"`{text}` is no {what}: write decimal, 0x and hex, $register, or a sum of them.")
        value = _term(guest, match[2])
        total += -value if match[1] == "-" else value
        at = match.end()
    if not text:
        raise TargetError(f"A {what} is missing.")
    return total


def parse_linear(guest: GuestTarget, text: str) -> int:
    """An address of 32 bits; sums wrap as the CPU's do."""
    value = parse_number(guest, text, "address")
    if not -MASK32 <= value <= MASK32:
        raise TargetError(f"{value:#x} is not an address of 32 bits.")
    return value & MASK32


def parse_physical(guest: GuestTarget, text: str) -> int:
    """A physical address.

    Raises:
        TargetError: negative, or beyond 36 bits.
    """
    value = parse_number(guest, text, "address")
    if not 0 <= value < 1 << 36:
        raise TargetError(f"{value:#x} is not a physical address of 36 bits.")
    return value


def parse_switch(words: list[str], command: str) -> bool:
    """The words must be `on` or `off`."""
    if words not in (["on"], ["off"]):
        raise usage_error(command)
    return words == ["on"]


def _term(guest: GuestTarget, term: str) -> int:
    if not term.startswith("$"):
        if term[:2] not in ("0x", "0X") and len(term) > 1 and term[0] == "0":
            raise TargetError(f"`{term}` starts with 0: write 0x for hex, or leave the zeros out.")
        return int(term, 16 if term[:2] in ("0x", "0X") else 10)
    name = term[1:].lower()
    if name in ("pc", "sp", "fp"):
        name = {"pc": "eip", "sp": "esp", "fp": "ebp"}[name]
    try:
        number = guest_registers.DESCRIPTION.number_of(name)
    except KeyError:
        raise TargetError(f"There is no register {term}.") from None
    value = guest_registers.read(guest.machine.cpu, number)
    if value is None:
        raise TargetError(f"Register {term} is not available.")
    return value
