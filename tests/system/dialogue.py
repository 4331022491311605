"""A conversation with a gdb that stands before a guest without symbols: go somewhere, look, go on.

It knows gdb's commands and what it answers; which guest and which gdb they are is the caller's business.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from tests.system.tools import GdbMi, Record, gdb_mi
from tests.system.trapgate import Trapgate

# A guest may have to run a hundred million instructions to the next stop; how long a whole test may take, pytest knows.
STOP_TIMEOUT_S = 900.0


class Dialogue:
    """Commands whose answers are Python values."""

    def __init__(self, gdb: GdbMi) -> None:
        self._gdb = gdb

    def say(self, command: str) -> str:
        """Give a command as a user types it, which must not let the guest run; returns what was printed."""
        return self._gdb.console(command)

    def go(self, command: str = "continue") -> Record:
        """Give a command that lets the guest run, and return the record of the stop."""
        for record in self._gdb.command(command):
            if record["message"] == "stopped":  # `target remote` ends after the stop that it reports
                return cast("Record", record["payload"])
        return self._gdb.wait_for_stop(STOP_TIMEOUT_S)

    def number(self, expression: str) -> int:
        """The value of an expression as an unsigned number of 32 bits."""
        return int(self._gdb.evaluate(f"(unsigned int) ({expression})"), 0)

    def count(self, expression: str = "$icount") -> int:
        """The value of a register of 64 bits; by default the instructions that the guest has retired."""
        return int(self._gdb.evaluate(f"(unsigned long long) ({expression})"), 0)

    def frames(self) -> list[int]:
        """The addresses of the frames, innermost first."""
        stack = self._gdb.command("-stack-list-frames")[-1]["payload"]["stack"]
        return [int(frame["addr"], 16) for frame in stack]

    def instructions(self, where: str, count: int) -> list[tuple[int, str]]:
        """Addresses and text of `count` instructions, with single blanks."""
        listing = self.say(f"x/{count}i {where}")
        found = re.findall(r"^(?:=>)?\s+0x(\w+):\s+(.*?)\s*$", listing, re.MULTILINE)
        return [(int(address, 16), re.sub(r"\s+", " ", text)) for address, text in found]

    def screen(self) -> list[str]:
        """The rows that `monitor screen` shows, without its frame and the blanks at their ends."""
        return [row[1:-1].rstrip() for row in self.say("monitor screen").splitlines() if row.startswith("|")]


@contextmanager
def attached(trapgate: Trapgate, gdb: Path, program: Path | None = None) -> Iterator[Dialogue]:
    """Start `gdb`, with `program` for what it can read from it, and connect it; it vanishes at the end."""
    with gdb_mi(gdb=gdb, program=program, timeout_s=60.0) as controller:
        dialogue = Dialogue(controller)
        dialogue.go(trapgate.connect)
        yield dialogue
