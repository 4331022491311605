"""Starts `trapgate` as users do, and finds where it listens; ends what it started.

It knows the command line and the line that says where gdb connects, nothing of what runs inside.
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from tests import engine

LISTENING = re.compile(r"gdb: listening on (\S+):(\d+)")
_START_TIMEOUT_S = 30.0
_END_TIMEOUT_S = 30.0


def command(*words: str | Path) -> list[str]:
    """The command line of trapgate with these words, on the engine that the test is for."""
    extra = engine.words() if words and words[0] in ("run", "gdb") else []
    return [sys.executable, "-m", "gdbstub.cli", *map(str, words[:1]), *extra, *map(str, words[1:])]


def run(*words: str | Path, timeout_s: float = 60.0, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run trapgate to its end."""
    return subprocess.run(command(*words), input=stdin, capture_output=True, timeout=timeout_s, check=False)


class Trapgate:
    """A running `trapgate run`; standard error and output are collected as they come."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self._errors: list[bytes] = []
        self._output: list[bytes] = []
        self._news = threading.Condition()
        self._threads = [
            threading.Thread(target=self._collect, args=(stream, into), daemon=True)
            for stream, into in ((process.stderr, self._errors), (process.stdout, self._output))
        ]
        for thread in self._threads:
            thread.start()
        self.port = int(self.wait_for(LISTENING)[2])

    def _collect(self, stream: IO[bytes] | None, into: list[bytes]) -> None:
        assert isinstance(stream, io.BufferedReader)
        while data := stream.read1(4096):
            with self._news:
                into.append(data)
                self._news.notify_all()
        with self._news:
            self._news.notify_all()

    @property
    def errors(self) -> str:
        """What it has written on standard error."""
        return b"".join(self._errors).decode(errors="replace")

    @property
    def output(self) -> str:
        """What it has written on standard output: the guest's first serial line."""
        return b"".join(self._output).decode(errors="replace")

    def wait_for(self, pattern: re.Pattern[str] | str, timeout_s: float = _START_TIMEOUT_S) -> re.Match[str]:
        """Wait until standard error or output has it."""
        compiled = re.compile(pattern)
        with self._news:
            found: re.Match[str] | None = None

            def look() -> bool:
                nonlocal found
                found = compiled.search(self.errors) or compiled.search(self.output)
                return found is not None or not any(thread.is_alive() for thread in self._threads)

            self._news.wait_for(look, timeout_s)
        assert found is not None, f"no {compiled.pattern!r} in:\n{self.errors}\n{self.output}"
        return found

    @property
    def connect(self) -> str:
        """The gdb command that connects."""
        return f"target remote 127.0.0.1:{self.port}"

    @property
    def connect_extended(self) -> str:
        """The gdb command that connects and may start the guest anew."""
        return f"target extended-remote 127.0.0.1:{self.port}"

    def type(self, data: bytes) -> None:
        """Send to the guest's first serial line."""
        assert self.process.stdin is not None
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def wait(self, timeout_s: float = _END_TIMEOUT_S) -> int:
        """Wait for its end; returns its exit status."""
        status = self.process.wait(timeout_s)
        for thread in self._threads:
            thread.join(timeout_s)
        return status


@contextmanager
def running(*words: str | Path, stopped: bool = True) -> Iterator[Trapgate]:
    """Start `trapgate run` with these words on a free port, by default waiting for the debugger."""
    extra: Sequence[str] = ["--gdb", "0", *(["-S"] if stopped else [])]
    process = subprocess.Popen(
        command("run", *extra, *words), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        yield Trapgate(process)
    finally:
        process.kill()
        process.wait(_END_TIMEOUT_S)
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()
