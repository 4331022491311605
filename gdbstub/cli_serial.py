"""Where the bytes of serial lines and of debugcon go, and where input comes from: terminal, files, TCP.

It knows file descriptors and trio; what a guest says with the bytes is not known here.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import stat
import termios
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import trio

from gdbstub.cli_options import Address, Sink

READ_BYTES = 4096
# poll() promises room for this much in a pipe, so that writing no more never blocks.
_ATOMIC_BYTES = select.PIPE_BUF
# Output that waits for a slow reader of stdout; with more the guest waits too.
MAX_BACKLOG_BYTES = 1 << 22
# What a TCP line keeps for its first client: a kernel's boot messages.
MAX_EARLY_BYTES = 1 << 18
# Input is taken from its source only while the guest has read most of what it got.
MAX_QUEUED_BYTES = 4096
_CONGESTED_S = 0.02
# How long the first input waits for a guest that may never show that it listens.
LISTEN_PATIENCE_S = 2.0

Task = Callable[[], Awaitable[None]]


class SinkError(Exception):
    """A sink cannot be opened; the text says why."""


class Input(Protocol):
    """What takes the bytes that come in."""

    @property
    def is_listening(self) -> bool:
        """False until the guest has set its end of the line up: it would lose what comes before."""

    def feed(self, data: bytes) -> None:
        """Take bytes."""

    @property
    def queued_bytes(self) -> int:
        """How many the guest has not read yet."""


class Output:
    """A file descriptor that gets bytes as they come, as long as it takes them without blocking."""

    def __init__(self, descriptor: int, *, owned: bool) -> None:
        self._descriptor = descriptor
        self._owned = owned
        self._backlog = bytearray()
        self._broken = False
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)
        self._regular = stat.S_ISREG(os.fstat(descriptor).st_mode)

    def write(self, data: bytes) -> None:
        """Pass bytes on, in order; when the reader has gone they are lost."""
        if self._broken:
            return
        self._backlog += data
        self.drain(wait=len(self._backlog) > MAX_BACKLOG_BYTES)

    def drain(self, *, wait: bool = False) -> None:
        """Write what waits, as far as there is room; all of it if `wait`."""
        backlog = self._backlog
        while backlog and not self._broken:
            chunk = backlog if self._regular else backlog[:_ATOMIC_BYTES]
            if not self._regular and not wait and not self._poll.poll(0):
                return
            try:
                del backlog[: os.write(self._descriptor, chunk)]
            except BlockingIOError:
                if not wait:
                    return
                self._poll.poll(100)
            except OSError:
                self._broken = True
                backlog.clear()

    async def run(self) -> None:
        """Write what waits as soon as there is room again."""
        while True:
            await trio.sleep(_CONGESTED_S)
            if self._backlog:
                self.drain()

    def close(self) -> None:
        """Write the rest, waiting for it, and close."""
        self.drain(wait=True)
        if self._owned:
            os.close(self._descriptor)


class TcpLine:
    """A listening TCP port; one client at a time is the other end of the line, the next one waits."""

    def __init__(self, address: Address, announce: Callable[[str], None], name: str) -> None:
        """Open the port.

        Raises:
            SinkError: it is taken, or not ours.
        """
        self._early: bytearray | None = bytearray()
        self._stream: trio.SocketStream | None = None
        self._turn = trio.Lock()
        self._outgoing = bytearray()
        self._has_output = trio.Event()
        self._input: Input | None = None
        self._wake: Callable[[], None] = lambda: None
        where = f"{address.host}:{address.port}"
        try:
            family, _, _, _, target = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0]
            self._socket = socket.socket(family, socket.SOCK_STREAM)
        except OSError as error:
            raise SinkError(f"{name}: cannot listen on {where}: {error.strerror}") from error
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind(target)
            self._socket.listen(1)
        except OSError as error:
            self._socket.close()
            reason = "the port is in use" if error.errno == errno.EADDRINUSE else error.strerror
            raise SinkError(f"{name}: cannot listen on {where}: {reason}") from error
        announce(f"{name}: listening on {address.host}:{self._socket.getsockname()[1]}")

    def connect(self, receiver: Input, wake: Callable[[], None]) -> None:
        """Say who takes what clients send, and who wants to know of it."""
        self._input, self._wake = receiver, wake

    def write(self, data: bytes) -> None:
        """Send to the client; before the first one has come, keep the beginning for it."""
        if self._early is not None:
            self._early += data[: MAX_EARLY_BYTES - len(self._early)]
        elif self._stream is not None and len(self._outgoing) < MAX_BACKLOG_BYTES:
            self._outgoing += data
            self._has_output.set()

    async def run(self) -> None:
        """Accept clients and talk to them, one after the other."""
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(self._socket))
        async with trio.open_nursery() as nursery:
            await nursery.start(_serve, listener, self._talk)

    async def _talk(self, stream: trio.SocketStream) -> None:
        async with self._turn:
            await self._talk_alone(stream)

    async def _talk_alone(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._outgoing = self._early or bytearray()
        self._early = None
        self._has_output.set()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._send, stream)
                async for data in stream:
                    await self._take(bytes(data))
                nursery.cancel_scope.cancel()
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            self._stream = None
            await trio.aclose_forcefully(stream)

    async def _take(self, data: bytes) -> None:
        if self._input is not None:
            await _feed(self._input, data, self._wake)

    async def _send(self, stream: trio.SocketStream) -> None:
        while True:
            if not self._outgoing:
                self._has_output = trio.Event()
                await self._has_output.wait()
            data, self._outgoing = self._outgoing, bytearray()
            await stream.send_all(data)

    def close(self) -> None:
        """Hang up; what no client has taken is lost."""
        self._socket.close()


async def _serve(
    listener: trio.SocketListener,
    talk: Callable[[trio.SocketStream], Awaitable[None]],
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    task_status.started()
    await trio.serve_listeners(talk, [listener])


async def _feed(receiver: Input, data: bytes, wake: Callable[[], None]) -> None:
    receiver.feed(data)
    wake()
    while receiver.queued_bytes > MAX_QUEUED_BYTES:  # noqa: ASYNC110 - the guest tells nobody when it reads
        await trio.sleep(_CONGESTED_S)


async def read_descriptor(descriptor: int, receiver: Input, wake: Callable[[], None]) -> None:
    """Feed what can be read to the guest, until its end; the descriptor stays in blocking mode: others share it."""
    with trio.move_on_after(LISTEN_PATIENCE_S):
        while not receiver.is_listening:  # noqa: ASYNC110 - the guest tells nobody
            await trio.sleep(_CONGESTED_S)
    while True:
        try:
            await trio.lowlevel.wait_readable(descriptor)
        except PermissionError:  # epoll takes no regular files, which are always readable
            await trio.lowlevel.checkpoint()
        except OSError:
            return
        try:
            data = os.read(descriptor, READ_BYTES)
        except OSError:
            return
        if not data:
            return
        await _feed(receiver, data, wake)


@contextmanager
def raw_terminal(descriptor: int) -> Iterator[None]:
    """Pass every key on at once and unchanged while this lasts, but for Ctrl-C and the like; for terminals only."""
    try:
        before = termios.tcgetattr(descriptor)
    except termios.error:
        yield
        return
    raw = termios.tcgetattr(descriptor)
    raw[0] &= ~(
        termios.IGNBRK
        | termios.BRKINT
        | termios.PARMRK
        | termios.ISTRIP
        | termios.INLCR
        | termios.IGNCR
        | termios.ICRNL
        | termios.IXON
    )
    raw[3] &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.IEXTEN)
    termios.tcsetattr(descriptor, termios.TCSANOW, raw)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


class Lines:
    """The sinks of one run: outputs to give to devices, and tasks that move bytes while the guest runs."""

    def __init__(self, announce: Callable[[str], None]) -> None:
        self._announce = announce
        self._stdout: Output | None = None
        self._outputs: list[Output] = []
        self._tcp: dict[str, TcpLine] = {}
        self._stdin_taken: str | None = None

    def __enter__(self) -> Self:
        """Nothing yet."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write the rest and close."""
        for output in self._outputs:
            output.close()
        for line in self._tcp.values():
            line.close()

    def open(self, name: str, sink: Sink, *, takes_input: bool = False) -> Callable[[bytes], None] | None:
        """Open a sink; None if bytes go nowhere.

        Raises:
            SinkError: it cannot be opened.
        """
        if sink.kind == "none":
            return None
        if sink.kind == "tcp":
            line = TcpLine(sink.address, self._announce, name)
            self._tcp[name] = line
            return line.write
        if sink.kind in ("stdio", "stdout"):
            if takes_input and sink.kind == "stdio" and self._stdin_taken is None:
                self._stdin_taken = name
            if self._stdout is None:
                self._stdout = Output(1, owned=False)
                self._outputs.append(self._stdout)
            return self._stdout.write
        try:
            descriptor = os.open(Path(sink.path), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        except (OSError, ValueError) as error:
            raise SinkError(f"{name}: cannot write {sink.path}: {getattr(error, 'strerror', error)}") from error
        output = Output(descriptor, owned=True)
        self._outputs.append(output)
        return output.write

    def reads_stdin(self, name: str) -> bool:
        """True if the standard input belongs to this line."""
        return self._stdin_taken == name

    def tasks(self, receivers: dict[str, Input], wake: Callable[[], None]) -> list[Task]:
        """What has to run while the guest does; `receivers` are the lines that take input, by name."""
        tasks: list[Task] = [output.run for output in self._outputs]
        for name, line in self._tcp.items():
            if name in receivers:
                line.connect(receivers[name], wake)
            tasks.append(line.run)
        if self._stdin_taken in receivers:
            receiver = receivers[self._stdin_taken or ""]

            async def read_stdin() -> None:
                with raw_terminal(0):
                    await read_descriptor(0, receiver, wake)
                    await trio.sleep_forever()

            tasks.append(read_stdin)
        return tasks
