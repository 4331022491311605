"""The sessions that the README shows, typed again on a terminal: gdb answers what stands there.

Blank lines and `Continuing.` are left out there, and what `...` stands for. Figures of time, and counts that depend on
it, are compared as words only: those of `monitor stats` and `monitor exits`, and the port.
"""

from __future__ import annotations

import os
import pty
import re
import select
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.system import tools

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROMPT = "(gdb) "
SETTINGS = ("set confirm off", "set pagination off", "set width 0", "set height 0", "set debuginfod enabled off")
MEASURED = ("monitor stats", "monitor exits", "monitor hybrid")
_LEFT_OUT = re.compile(
    r"\s*\Z|Continuing\.|(Remote debugging using|Reading symbols from|Source directories searched:) "
)
_ANSWER_TIMEOUT_S = 120.0


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


class Terminal:
    """A pseudo-terminal with gdb on it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def read(self) -> list[str]:
        """The lines up to the next prompt, without those that the README leaves out."""
        shown = ""
        deadline_s = time.monotonic() + _ANSWER_TIMEOUT_S
        while not shown.endswith(PROMPT):
            ready, _, _ = select.select([self._descriptor], [], [], max(0.0, deadline_s - time.monotonic()))
            assert ready, f"no prompt after {_ANSWER_TIMEOUT_S} s:\n{shown}"
            shown += os.read(self._descriptor, 65536).decode(errors="replace")
        lines = shown.removesuffix(PROMPT).replace("\r", "").splitlines()
        return [line.rstrip() for line in lines if not _LEFT_OUT.match(line)]

    def type_line(self, text: str) -> list[str]:
        """Type a command and return what it answers."""
        os.write(self._descriptor, text.encode() + b"\n")
        return self.read()


@contextmanager
def started(command: str) -> Iterator[Terminal]:
    """The command line of a session, with settings for gdb that have nothing wait for the user."""
    user_side, gdb_side = pty.openpty()
    words = [sys.executable, "-m", "gdbstub.cli", *shlex.split(command)[1:], "--", "-nx"]
    for setting in SETTINGS:
        words += ["-iex", setting]
    environment = os.environ | {"TERM": "dumb", "GDB": str(tools.stock_gdb()), "INPUTRC": "/dev/null"}
    process = subprocess.Popen(
        ["setsid", "--ctty", *words], cwd=ROOT, env=environment, stdin=gdb_side, stdout=gdb_side, stderr=gdb_side
    )
    os.close(gdb_side)
    try:
        subprocess.run(["stty", "-F", os.ttyname(user_side), "-echo"], check=False, capture_output=True)
        yield Terminal(user_side)
    finally:
        process.kill()
        process.wait(timeout=10)
        os.close(user_side)


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
