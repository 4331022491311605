"""Finds the programs that whole-system tests drive, and drives debuggers by script.

A missing program is a failure that names what installs it; nothing here knows what the debuggers are attached to.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pygdbmi.constants import GdbTimeoutError
from pygdbmi.gdbcontroller import GdbController

#: One record of GDB/MI as pygdbmi parses it: `type`, `message`, `payload`, `token`, `stream`.
Record = dict[str, Any]

# Nothing of the user's settings, terminal or language reaches a debugger under test.
_GDB_SETTINGS = (
    "set confirm off",
    "set pagination off",
    "set width 0",
    "set height 0",
    "set style enabled off",
    "set debuginfod enabled off",
    "set tcp auto-retry on",
)


class MissingToolError(AssertionError):
    """A program that the tests need is not installed."""


class DebuggerError(AssertionError):
    """A debugger did not end in time or refused a command; the message holds its output until then."""


def _found(path: str | Path | None, name: str) -> Path:
    if path is None or not os.access(path, os.X_OK):
        raise MissingToolError(f"{name} is not installed: `make setup` installs what the tests need")
    return Path(path)


@cache
def stock_gdb() -> Path:
    """Return Debian's own gdb, 13.1 on Debian 12."""
    return _found("/usr/bin/gdb", "Debian's gdb")


@cache
def recent_gdb() -> Path:
    """Return the gdb of the PyPI package gdb-for-pwndbg, 16 or newer, from the environment that runs the tests."""
    return _found(Path(sysconfig.get_path("scripts"), "gdb"), "gdb-for-pwndbg")


@cache
def lldb() -> Path:
    """Return Debian's lldb, 14.0.6 on Debian 12."""
    return _found(shutil.which("lldb"), "lldb")


@cache
def qemu() -> Path:
    """Return qemu-system-i386, 7.2 on Debian 12."""
    return _found(shutil.which("qemu-system-i386"), "qemu-system-i386")


@cache
def gcc() -> Path:
    """Return gcc; `-m32` works with it where gcc-multilib is installed."""
    return _found(shutil.which("gcc"), "gcc")


def gdbs() -> tuple[Path, ...]:
    """Return both gdbs that everything is tested with, the older one first."""
    return stock_gdb(), recent_gdb()


def gdb_version(gdb: Path) -> tuple[int, int]:
    """Return the major and minor version that `gdb` says it has."""
    text = subprocess.run([gdb, "-nx", "--version"], capture_output=True, text=True, check=True, timeout=30).stdout
    found = re.search(r"(\d+)\.(\d+)", text.splitlines()[0])
    if found is None:
        raise DebuggerError(f"{gdb} does not say its version: {text!r}")
    return int(found[1]), int(found[2])


@dataclass(frozen=True, slots=True)
class DebuggerRun:
    """What a scripted debugger printed, standard error mixed in where it came, and its exit status."""

    output: str
    status: int

    def value_of(self, expression: str) -> str:
        """Return what `print EXPRESSION` printed after `$N = `; the command must have been given in just that form."""
        marker = f"<<{expression}>>\n"
        _, found, rest = self.output.partition(marker)
        value = re.match(r"\$\d+ = (.*)", rest)
        if not found or value is None:
            raise DebuggerError(f"no value of {expression!r} in:\n{self.output}")
        return value[1]


def asked(expression: str) -> tuple[str, str]:
    """Return the two gdb commands that print `expression` so that `DebuggerRun.value_of` finds it."""
    return f"echo <<{expression}>>\\n", f"print {expression}"


def _debugger_environment() -> dict[str, str]:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("LC_", "PYTHON", "DEBUGINFOD"))
    }
    return environment | {"LC_ALL": "C.UTF-8", "TERM": "dumb"}


def _run_debugger(command: list[str], environment: dict[str, str], timeout_s: float) -> DebuggerRun:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout_s,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired as expired:
        output = (expired.stdout or b"").decode(errors="replace")
        raise DebuggerError(f"{command[0]} was still busy after {timeout_s} s:\n{output}") from expired
    return DebuggerRun(done.stdout.decode(errors="replace"), done.returncode)


def run_gdb(
    commands: Sequence[str], *, gdb: Path | None = None, program: Path | None = None, timeout_s: float = 60.0
) -> DebuggerRun:
    """Give `commands` to a gdb in batch mode, one after the other whether or not they fail, and return what it printed.

    Args:
        commands: lines as a user types them. One that takes further lines (`commands`, `define`) does not work.
        gdb: which one; None is Debian's.
        program: a file to read symbols from.
        timeout_s: host seconds for all of it.

    Raises:
        DebuggerError: it had not ended after `timeout_s`.
    """
    arguments = [str(gdb or stock_gdb()), "-nx", "-nh", "-q", "-batch"]
    for setting in _GDB_SETTINGS:
        arguments += ["-iex", setting]
    if program is not None:
        arguments.append(str(program))
    for command in commands:
        arguments += ["-ex", command]
    return _run_debugger(arguments, _debugger_environment(), timeout_s)


def run_lldb(commands: Sequence[str], *, program: Path | None = None, timeout_s: float = 60.0) -> DebuggerRun:
    """Give `commands` to lldb in batch mode and return what it printed; it stops at the first one that fails.

    Debian's lldb 14 looks for its Python modules where they are not: a traceback at the head of its output is normal.

    Raises:
        DebuggerError: it had not ended after `timeout_s`.
    """
    arguments = [str(lldb()), "--batch", "--no-lldbinit", "--no-use-colors"]
    if program is not None:
        arguments.append(str(program))
    for command in commands:
        arguments += ["--one-line", command]
    return _run_debugger(arguments, _debugger_environment(), timeout_s)


class GdbMi:
    """A gdb that is spoken to through GDB/MI, for sessions whose next command depends on what came before."""

    def __init__(self, controller: GdbController, timeout_s: float) -> None:
        self._controller = controller
        self._timeout_s = timeout_s
        self._unread: list[Record] = []

    def command(self, text: str, timeout_s: float | None = None) -> list[Record]:
        """Give one command (MI if it begins with `-`, else as a user types it) and return the records up to its result.

        Raises:
            DebuggerError: its result is an error, or did not come within `timeout_s` seconds.
        """
        self._controller.write(text, read_response=False)
        records = self._read_until(lambda record: record["type"] == "result", timeout_s, text)
        if records[-1]["message"] == "error":
            raise DebuggerError(f"{text}: {records[-1]['payload']}")
        return records

    def console(self, text: str, timeout_s: float | None = None) -> str:
        """Give one command as a user types it and return what it printed to the console and what the target printed."""
        records = self.command(text, timeout_s)
        return "".join(
            record["payload"] for record in records if record["type"] in ("console", "target") and record["payload"]
        )

    def evaluate(self, expression: str) -> str:
        """Return gdb's value of `expression`, printed as gdb prints it."""
        value = self.command(f'-data-evaluate-expression "{expression}"')[-1]["payload"]["value"]
        return str(value)

    def wait_for_stop(self, timeout_s: float | None = None) -> Record:
        """Return the payload of the next `*stopped` record, from what was read already or from what comes.

        Raises:
            DebuggerError: none came within `timeout_s` seconds.
        """
        records = self._read_until(lambda record: record["message"] == "stopped", timeout_s, "waiting for a stop")
        payload: Record = records[-1]["payload"]
        return payload

    def _read_until(self, wanted: Callable[[Record], bool], timeout_s: float | None, what: str) -> list[Record]:
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        while True:
            for index, record in enumerate(self._unread):
                if wanted(record):
                    taken, self._unread = self._unread[: index + 1], self._unread[index + 1 :]
                    return taken
            try:
                self._unread += self._controller.get_gdb_response(timeout_sec=limit_s)
            except GdbTimeoutError as error:
                raise DebuggerError(f"{what}: no answer after {limit_s} s, only {self._unread}") from error


@contextmanager
def gdb_mi(*, gdb: Path | None = None, program: Path | None = None, timeout_s: float = 30.0) -> Iterator[GdbMi]:
    """Start a gdb under GDB/MI, hand it out, and end it with everything that it had open.

    Args:
        gdb: which one; None is Debian's.
        program: a file to read symbols from.
        timeout_s: host seconds that one answer may take.
    """
    arguments = [str(gdb or stock_gdb()), "-nx", "-nh", "-q", "--interpreter=mi3"]
    for setting in _GDB_SETTINGS:
        arguments += ["-iex", setting]
    if program is not None:
        arguments.append(str(program))
    # pygdbmi waits this long for more after each answer; its default of 0.2 s is what would make sessions slow.
    controller = GdbController(command=arguments, time_to_check_for_additional_output_sec=0.02)
    process = controller.gdb_process
    assert process is not None
    try:
        yield GdbMi(controller, timeout_s)
    finally:
        process.kill()
        process.wait(timeout=10)
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def printed_until(marker: bytes, command: Sequence[str], timeout_s: float) -> bytes:
    """Run a program until it has printed `marker`, or that long, end it, and return what it printed up to there."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    limit = threading.Timer(timeout_s, process.kill)
    limit.start()
    output = b""
    with process:
        assert process.stdout is not None
        while marker not in output and (read := os.read(process.stdout.fileno(), 65536)):
            output += read
        limit.cancel()
        process.kill()
    before, found, _ = output.partition(marker)
    return before + found
