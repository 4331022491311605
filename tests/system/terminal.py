"""gdb as a user has it: started by `trapgate gdb` on a pseudo-terminal, typed at, and read from prompt to prompt.

It knows what appears at the start and is not worth showing; what commands answer is the caller's business.
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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.system import tools

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "(gdb) "
SETTINGS = ("set confirm off", "set pagination off", "set width 0", "set height 0", "set debuginfod enabled off")
_LEFT_OUT = re.compile(
    r"\s*\Z|Continuing\.|(Remote debugging using|Reading symbols from|Source directories searched:) "
)
_ANSWER_TIMEOUT_S = 120.0


class Terminal:
    """A pseudo-terminal with a program on it.

    Attributes:
        process: the program.
    """

    def __init__(self, descriptor: int, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self._descriptor = descriptor
        self._shown = ""

    def read_until(self, wanted: str) -> str:
        """What appears, up to something that is wanted; what comes behind it is kept."""
        deadline_s = time.monotonic() + _ANSWER_TIMEOUT_S
        while wanted not in self._shown:
            ready, _, _ = select.select([self._descriptor], [], [], max(0.0, deadline_s - time.monotonic()))
            assert ready, f"no {wanted!r} after {_ANSWER_TIMEOUT_S} s:\n{self._shown}"
            self._shown += os.read(self._descriptor, 65536).decode(errors="replace")
        seen, self._shown = self._shown.split(wanted, 1)
        return seen + wanted

    def read(self) -> list[str]:
        """The lines up to the next prompt, without blank ones and what says nothing."""
        shown = self.read_until(PROMPT)
        lines = shown.removesuffix(PROMPT).replace("\r", "").splitlines()
        return [line.rstrip() for line in lines if not _LEFT_OUT.match(line)]

    def type_line(self, text: str) -> list[str]:
        """Type a command and return what it answers."""
        self.write(text + "\n")
        return self.read()

    def write(self, text: str) -> None:
        """Press keys."""
        os.write(self._descriptor, text.encode())


@contextmanager
def opened(*words: str) -> Iterator[Terminal]:
    """A program on a terminal of its own; a gdb that it starts is the stock one, with gdb's own keys."""
    user_side, its_side = pty.openpty()
    environment = os.environ | {"TERM": "dumb", "GDB": str(tools.stock_gdb()), "INPUTRC": "/dev/null"}
    # setsid makes the terminal the controlling one of the session, so that Ctrl-C in it is a signal.
    process = subprocess.Popen(
        ["setsid", "--ctty", *words], cwd=ROOT, env=environment, stdin=its_side, stdout=its_side, stderr=its_side
    )
    os.close(its_side)
    try:
        yield Terminal(user_side, process)
    finally:
        process.kill()
        process.wait(timeout=10)
        os.close(user_side)


@contextmanager
def started(command: str) -> Iterator[Terminal]:
    """The command line of a session, with settings for gdb that have nothing wait for the user."""
    words = [sys.executable, "-m", "gdbstub.cli", *shlex.split(command)[1:], "--", "-nx"]
    for setting in SETTINGS:
        words += ["-iex", setting]
    with opened(*words) as terminal:
        yield terminal
