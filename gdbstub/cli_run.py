"""`trapgate run`: wires image, machine, engine, serial lines and server together, and turns the end into a status.

Only here and in its sister modules do the packages meet.
"""

from __future__ import annotations

import argparse
import gc
import json
import signal
import sys
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import monotonic

import trio

from gdbstub import cli_engine, cli_inputs, counters
from gdbstub.cli_engine import UsageError
from gdbstub.cli_machine import machine_options
from gdbstub.cli_options import DEFAULT_ADDRESS, USAGE_STATUS, Address, Sink
from gdbstub.cli_serial import Lines, SinkError
from gdbstub.debuggee import End, EndKind
from gdbstub.guest import GuestTarget
from gdbstub.server import ListenError, Server, listen
from machine.engine import CountsExits, Engine, EngineError, LocatesExits
from machine.loaders.errors import ImageError
from machine.memory import MemorySizeError
from machine.pc import Machine

SIGNAL_STATUS = 128
_SITES = 10
_COM1, _COM2 = "serial", "serial 2"
_LINE_NAMES = (_COM1, _COM2)
_FULL_COLLECTION_EVERY = 1000  # collections of the middle generation; Python itself says 10


Accompany = Callable[[trio.SocketListener, Machine], Awaitable[None]]


@dataclass(slots=True)
class SerialInput:
    """A serial line of the machine, as what takes a terminal's bytes; it survives restarts of the machine."""

    machine: Machine
    index: int

    def feed(self, data: bytes) -> None:
        """Send to the guest."""
        self.machine.feed_serial(self.index, data)

    @property
    def is_listening(self) -> bool:
        """See `Machine.serial_is_listening`."""
        return self.machine.serial_is_listening(self.index)

    @property
    def queued_bytes(self) -> int:
        """What the guest has not read yet."""
        return self.machine.serial_queued_bytes(self.index)


def say(line: str) -> None:
    """One line for the user, on standard error."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def run(options: argparse.Namespace) -> int:
    """Carry out `trapgate run`; returns the exit status."""
    return run_machine(options, wait=options.wait)


def run_machine(
    options: argparse.Namespace,
    *,
    wait: bool,
    default_listen: Address = DEFAULT_ADDRESS,
    accompany: Accompany | None = None,
) -> int:
    """Run a machine as the options say, until its end.

    Args:
        options: from the parser.
        wait: the guest waits for a debugger.
        default_listen: where gdb connects if the options do not say.
        accompany: a task beside the server (gdb, for one); when it returns, the run is over.
    """
    with ExitStack() as stack:
        lines = stack.enter_context(Lines(say))
        try:
            target = build_target(options, lines, stack)
            address = _listen_address(options, default_listen, needed=wait)
            _tame_garbage_collection()
            end = trio.run(_serve, target, lines, options, wait, address, accompany)
        except (UsageError, ImageError, SinkError, ListenError, MemorySizeError) as error:
            say(f"trapgate: {error}")
            return USAGE_STATUS
        except KeyboardInterrupt:
            return SIGNAL_STATUS + signal.SIGINT
        if options.json_stats:
            _write_statistics(options.json_stats, target.machine, end)
        return end.status


def _tame_garbage_collection() -> None:
    """Look through all objects but rarely: with decoded code for a guest that takes up to a quarter of a second.

    Meanwhile no packet is heard. What becomes garbage by itself is freed all the same, and young cycles are found.
    """
    gc.enable()
    gc.freeze()
    gc.set_threshold(*gc.get_threshold()[:2], _FULL_COLLECTION_EVERY)


def _recorder(path: str | None, stack: ExitStack) -> cli_inputs.Recorder | None:
    if path is None:
        return None
    recorder = cli_inputs.Recorder(path)
    stack.callback(recorder.close)
    return recorder


def build_target(options: argparse.Namespace, lines: Lines, stack: ExitStack) -> GuestTarget:
    """Build the machine that the options describe, stopped before its first instruction.

    Raises:
        UsageError, ImageError, SinkError, MemorySizeError: it cannot be.
    """
    if len(options.serial) > len(_LINE_NAMES):
        raise UsageError("there are two serial ports, COM1 and COM2")
    engine = cli_engine.choose(options, say)
    sinks = [*options.serial, *[Sink("stdio"), Sink("none")][len(options.serial) :]]
    serial = [lines.open(name, sink, takes_input=True) for name, sink in zip(_LINE_NAMES, sinks, strict=True)]
    try:
        made = machine_options(options, (serial[0], serial[1]), lines.open("debugcon", options.debugcon))
        # The file is emptied, and --replay may be the same one.
        made = replace(made, record=_recorder(options.record, stack))
        machine = Machine(made, engine.factories, engine.name, engine.alu)
    except (ValueError, EngineError) as error:
        raise UsageError(str(error)) from error
    stack.callback(machine.close)
    target = GuestTarget(machine)
    target.default_engine = engine.default
    target.end_icount = options.max_insns
    target.pace = monotonic if options.pace else None
    return target


def _listen_address(options: argparse.Namespace, default: Address, *, needed: bool) -> Address | None:
    if options.gdb is None:
        return DEFAULT_ADDRESS if options.gdb_default else default
    if options.gdb_default:
        raise UsageError("-s and --gdb both say where gdb connects")
    address: Address | None = options.gdb.address
    if address is None and needed:
        raise UsageError("the guest waits for a debugger, and with --gdb none there can be none")
    return address


async def _serve(
    target: GuestTarget,
    lines: Lines,
    options: argparse.Namespace,
    wait: bool,
    address: Address | None,
    accompany: Accompany | None,
) -> End:
    server = Server(target, say if options.verbose else lambda _line: None)
    receivers = {name: SerialInput(target.machine, index) for index, name in enumerate(_LINE_NAMES)}
    listeners = [] if address is None else [await listen(say, address.host, address.port)]
    tasks = lines.tasks(dict(receivers), server.wake)
    ends: list[End] = []
    async with trio.open_nursery() as nursery:

        async def watch_signals() -> None:
            # gdb handles Ctrl-C itself, and passes it on as a packet.
            wanted = (signal.SIGTERM, signal.SIGHUP, *([signal.SIGINT] if accompany is None else []))
            with trio.open_signal_receiver(*wanted) as signals:
                async for number in signals:
                    ends.append(End(EndKind.KILLED, SIGNAL_STATUS + number))
                    nursery.cancel_scope.cancel()

        async def go_along() -> None:
            if accompany is not None:
                await accompany(listeners[0], target.machine)
                nursery.cancel_scope.cancel()

        nursery.start_soon(watch_signals)
        nursery.start_soon(go_along)
        ends.append(await server.serve(listeners, start=not wait, tasks=tasks))
        if accompany is None:
            nursery.cancel_scope.cancel()
    if target.unseen_text:
        say(f"trapgate: {target.unseen_text.rstrip()}")
    return ends[0] if ends else End(EndKind.KILLED)


def _exits(engine: Engine) -> dict[str, object]:
    """Of an engine with exits: these by reason, and the addresses in the guest that cost most."""
    record: dict[str, object] = {}
    if isinstance(engine, CountsExits):
        record["exits"] = [asdict(row) for row in engine.exit_counts()]
    if isinstance(engine, LocatesExits):
        names = ("eip", "count", "total_ns")
        record["exit_sites"] = [dict(zip(names, site, strict=True)) for site in engine.exit_sites(_SITES)]
    return record


def _write_statistics(path: str, machine: Machine, end: End) -> None:
    statistics = counters.for_programs(machine.statistics())
    record = {"end": end.kind.name.lower(), "status": end.status, "statistics": statistics, **_exits(machine.engine)}
    try:
        Path(path).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        say(f"trapgate: cannot write {path}: {error.strerror}")
