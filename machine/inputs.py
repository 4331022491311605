"""Outside input as data: what came in when, so that a run can be repeated. One JSON object a line in a file.

It must not know who types or how an input acts on the machine.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

FORMAT = "trapgate-inputs"
VERSION = 1


class InputError(ValueError):
    """A file of inputs that cannot be used; the message names the line."""


class InputKind(Enum):
    """What can come in."""

    SERIAL = "serial"  # bytes at COM1 (index 0) or COM2 (1)
    KEYS = "keys"  # scan codes of set 2
    TEXT = "text"  # characters typed, UTF-8
    NMI = "nmi"
    RESET = "reset"  # the reset button
    MEMORY = "memory"  # a debugger's write at physical address `index`
    REGISTERS = "registers"  # a debugger's write: the whole state in `STATE_LAYOUT`


@dataclass(frozen=True, slots=True)
class Input:
    """One input.

    Attributes:
        at_ns: virtual time; with the icount it is the same in each run.
        kind: what it is.
        data: its bytes.
        index: which line, or which address.
    """

    at_ns: int
    kind: InputKind
    data: bytes = b""
    index: int = 0

    def line(self) -> str:
        """The line of the file, without its end."""
        fields = {"ns": self.at_ns, "kind": self.kind.value, "index": self.index, "data": self.data.hex()}
        return json.dumps(fields)


def header() -> str:
    """The first line of the file, without its end."""
    return json.dumps({"format": FORMAT, "version": VERSION})


def parse(lines: Iterable[str]) -> tuple[Input, ...]:
    """Read a file's lines.

    Raises:
        InputError: it is not such a file, or a line is damaged or out of order.
    """
    inputs: list[Input] = []
    number = 0
    for number, line in enumerate(lines, 1):
        try:
            fields = json.loads(line)
            entry = None if number == 1 else _entry(fields)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"line {number}: not an input ({error})") from error
        if entry is None:
            _check_header(fields)
        elif inputs and entry.at_ns < inputs[-1].at_ns:
            raise InputError(f"line {number}: earlier than the line before it")
        else:
            inputs.append(entry)
    if not number:
        raise InputError("line 1: the file is empty")
    return tuple(inputs)


def _check_header(fields: object) -> None:
    if fields != {"format": FORMAT, "version": VERSION}:
        raise InputError(f"line 1: not a file of inputs of version {VERSION}")


def _entry(fields: dict[str, object]) -> Input:
    data = bytes.fromhex(str(fields["data"]))
    return Input(_number(fields["ns"]), InputKind(fields["kind"]), data, _number(fields["index"]))


def _number(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is not a number of 0 or more")
    return value
