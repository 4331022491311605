"""What a user of gdb can ask for with `monitor`: one table of commands, and finding the one that is meant.

It must not know packets; output is text in pieces, refusals are `TargetError`.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from textwrap import fill
from typing import TYPE_CHECKING

from gdbstub.monitor import devices, hybrid, lockstep, machine, memory, paging, segments, stops, tc, trap
from gdbstub.monitor.command import Command
from gdbstub.target import TargetError

if TYPE_CHECKING:
    from gdbstub.guest import GuestTarget

__all__ = ("COMMANDS", "run")


def show_help(_guest: GuestTarget, words: list[str]) -> Iterator[str]:
    """`help [COMMAND]`."""
    if words:
        command, _ = find(words)
        yield f"monitor {command.synopsis}\n{command.summary[:1].upper()}{command.summary[1:]}.\n"
        if command.details:
            yield f"{fill(' '.join(command.details.split()), _HELP_COLUMNS)}\n"
        return
    yield "Commands of the monitor; `monitor help COMMAND` says more, and every name may be shortened.\n"
    for command in COMMANDS:
        gap = f"\n{'':{_SUMMARY_COLUMN}}" if len(command.synopsis) > _SUMMARY_COLUMN - 3 else ""
        yield f"  {command.synopsis:{_SUMMARY_COLUMN - 2}}{gap}{command.summary}\n"
    yield "Numbers are decimal, 0x and hex, $register, or sums of them.\n"


_HELP_COLUMNS = 100
_SUMMARY_COLUMN = 32
HELP = Command("help", "[COMMAND]", "this list, or more about one command", show_help)
_GROUPS = (machine, segments, paging, memory, devices, stops, tc, trap, hybrid, lockstep)
COMMANDS: tuple[Command, ...] = (HELP, *(command for group in _GROUPS for command in group.COMMANDS))
_INFO = "info"


def find(words: list[str]) -> tuple[Command, list[str]]:
    """The command that the first one or two words name, perhaps shortened, and the words after them.

    Raises:
        TargetError: none, or several.
    """
    first = words[0].lower()
    if first == "i" or (len(first) > 1 and _INFO.startswith(first)):
        names = sorted(c.name.removeprefix("info ") for c in COMMANDS if c.name.startswith("info "))
        if len(words) < 2:
            raise TargetError(f"`info` needs a topic: {', '.join(names)}.")
        return _pick(
            f"{_INFO} {words[1].lower()}", f"there is no `info {words[1]}`; topics: {', '.join(names)}"
        ), words[2:]
    # QEMU's users write xp/8x without a space.
    name, slash, rest = first.partition("/")
    if slash and name:
        return _pick(name, f"there is no command `{name}`"), [slash + rest, *words[1:]]
    return _pick(first, f"there is no command `{first}`; `monitor help` lists them"), words[1:]


def _pick(name: str, missing: str) -> Command:
    matches = [command for command in COMMANDS if command.name.startswith(name)]
    exact = [command for command in matches if command.name == name]
    if exact or len(matches) == 1:
        return (exact or matches)[0]
    if not matches:
        raise TargetError(f"{missing[:1].upper()}{missing[1:]}.")
    raise TargetError(f"`{name}` may mean {', '.join(command.name for command in matches)}.")


def run(guest: GuestTarget, line: str, *, read_only: bool) -> Generator[str]:
    """Carry out a line, yielding output in pieces, each within a few milliseconds.

    Raises:
        TargetError: the line means nothing, is refused, or fails.
        QuitRequested: the user wants the program to end.
    """
    words = line.split()
    if not words:
        yield from show_help(guest, [])
        return
    command, rest = find(words)
    if command.changes and read_only and not (command.bare and not rest):
        raise TargetError(f"`{command.name}` changes the guest, and another debugger controls it; you may only look.")
    if command.raw:
        parts = line.split(None, 1)
        rest = parts[1:]
    elif rest and not command.usage:
        raise TargetError(f"`{command.name}` takes no arguments.")
    yield from command.run(guest, rest)
