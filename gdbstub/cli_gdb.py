"""`trapgate gdb`: the machine with stock gdb beside it, connected and with symbols.

It must not know the protocol; gdb is a program like any other, with the terminal as its own.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
from collections.abc import Sequence
from functools import partial

import trio

from gdbstub.cli_options import DEFAULT_HOST, USAGE_STATUS, Address, Sink
from gdbstub.cli_run import run_machine, say
from guests import images
from machine.pc import Machine

_ANY_PORT = Address(DEFAULT_HOST, 0)


def run(options: argparse.Namespace, gdb_words: Sequence[str]) -> int:
    """Carry out `trapgate gdb`; returns the exit status: the guest's own, or gdb's if gdb failed."""
    gdb = find_gdb()
    if gdb is None:
        say("trapgate: gdb was not found; install it, or name one in the environment variable GDB")
        return USAGE_STATUS
    if not options.serial:
        options.serial = [Sink("stdout")]
    statuses: list[int] = []
    # Ctrl-C goes to the whole foreground group: gdb handles it, and the machine must not die of it.
    before = signal.signal(signal.SIGINT, lambda _number, _frame: None)
    try:
        accompany = partial(_run_gdb, gdb, list(gdb_words), statuses)
        status = run_machine(options, wait=True, default_listen=_ANY_PORT, accompany=accompany)
    finally:
        signal.signal(signal.SIGINT, before)
    return status or (statuses[0] if statuses else 0)


def find_gdb() -> str | None:
    """The gdb to start: $GDB, or the first in PATH."""
    return shutil.which(os.environ.get("GDB") or "gdb")


def gdb_arguments(machine: Machine, host: str, port: int, words: Sequence[str]) -> list[str]:
    """What gdb is started with: symbols, sources of our own images, the connection, and then what the user adds."""
    arguments = ["-q"]
    symbols = machine.symbol_file
    if symbols is not None:
        arguments += ["-iex", f"directory {images.source_root()}"] if symbols.parent == images.built_directory() else []
        arguments.append(str(symbols))
    shown_host = f"[{host}]" if ":" in host else host
    return [*arguments, "-ex", f"target extended-remote {shown_host}:{port}", *words]


async def _run_gdb(
    gdb: str, words: Sequence[str], statuses: list[int], listener: trio.SocketListener, machine: Machine
) -> None:
    host, port = listener.socket.getsockname()[:2]
    process = await trio.run_process([gdb, *gdb_arguments(machine, host, port, words)], check=False, stdin=None)
    statuses.append(process.returncode)
