"""The sessions that the README shows, typed again on a terminal: gdb answers what stands there.

Blank lines and `Continuing.` are left out there, and what `...` stands for. Figures of time, and counts that depend on
it, are compared as words only: those of `monitor stats` and `monitor exits`, and the port.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.system.terminal import PROMPT, started

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
MEASURED = ("monitor stats", "monitor exits", "monitor hybrid")


@dataclass(frozen=True, slots=True)
class Session:
    """One session: the command line, what appears before the first prompt, and the commands with what each answers."""

    command: str
    greeting: list[str] = field(default_factory=list)
    turns: list[tuple[str, list[str]]] = field(default_factory=list)


def sessions() -> list[Session]:
    found: list[Session] = []
    for block in re.findall(r"^```\n(\$ trapgate gdb .*?)^```$", README, re.MULTILINE | re.DOTALL):
        first, *lines = block.splitlines()
        session = Session(first.removeprefix("$ "))
        said = session.greeting
        for line in lines:
            if line.startswith(PROMPT):
                said = []
                session.turns.append((line.removeprefix(PROMPT), said))
            elif line:
                said.append(line)
        found.append(session)
    return found


def masked(line: str) -> str:
    """A line without its figures and addresses."""
    return re.sub(r"\s+", " ", re.sub(r"\b[0-9a-f]{8}\b|[\d,.]+\d|\d", "#", line))


def check(command: str, expected: Sequence[str], seen: Sequence[str]) -> None:
    if command in MEASURED:
        lines = {masked(line) for line in seen}
        missing = [line for line in expected if line != "..." and masked(line) not in lines]
        assert not missing, "\n".join([*missing, "--- is not in", *seen])
        return
    text = "".join(f"{line}\n" for line in seen)
    pattern = "".join(r"(?:.*\n)*?" if line == "..." else re.escape(line) + r"\n" for line in expected)
    assert re.fullmatch(pattern, text), "\n".join([f"{PROMPT}{command}", *expected, "--- but", *seen])


def test_there_are_sessions() -> None:
    assert len(sessions()) >= 2


@pytest.mark.parametrize("number", range(len(sessions())))
def test_session(number: int) -> None:
    session = sessions()[number]
    with started(session.command) as terminal:
        greeting = [re.sub(r":\d+$", ":PORT", line) for line in terminal.read()]
        expected = [re.sub(r":\d+$", ":PORT", line) for line in session.greeting]
        assert greeting == expected
        for command, answer in session.turns:
            seen = terminal.type_line(command)
            check(command, answer, [line for line in seen if line != command])
