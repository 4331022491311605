"""Sessions over TCP, and the guest's stints between their packets: the only user of trio beside the command line.

It must not know the protocol; a `Session` takes and gives bytes.
"""

from __future__ import annotations

import errno
import itertools
import socket
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from ipaddress import ip_address
from time import perf_counter
from typing import TYPE_CHECKING

import trio

from gdbstub.debuggee import Debuggee, End, EndKind
from gdbstub.target import StintEnd, Target

if TYPE_CHECKING:
    from gdbstub.session import Session

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 1234
MAX_CLIENTS = 8
_LAST_PORT = 0xFFFF
RECEIVE_BYTES = 0x20000
SEND_BYTES = 0x10000
# A client that takes nothing of what was sent for this long is dropped.
STALL_S = 10.0
# How long the last replies may take when the guest has ended.
FAREWELL_S = 1.0
# And then, how long clients may take to hang up.
LINGER_S = 0.2
# The longest that an idle guest waits if nobody calls `wake`.
IDLE_S = 0.02


class ListenError(Exception):
    """The server cannot listen where it was told to; the text says why."""


class _Client:
    """A connection: its session, and what wakes its tasks."""

    def __init__(self, name: str, stream: trio.abc.Stream, session: Session) -> None:
        self.name = name
        self.stream = stream
        self.session = session
        self.scope = trio.CancelScope()
        self.sending = False
        self.has_output = trio.Event()
        self.has_work = trio.Event()
        self.has_room = trio.Event()

    def notify(self) -> None:
        """Wake the tasks that have something to do."""
        if self.session.has_output and not self.sending:
            self.has_output.set()
        if self.session.has_work:
            self.has_work.set()
        if self.session.accepts_input:
            self.has_room.set()


class Server:
    """Serves one target to any number of clients, one of which controls it.

    A client that leaves with `D` lets the guest run on. One that vanishes leaves it as it is (stopped, or running),
    without its breakpoints; the next finds it so. A second client is read-only, until it attaches anew.
    """

    def __init__(self, target: Target, log: Callable[[str], None] = lambda _line: None) -> None:
        """Prepare to serve; `log` gets one line an event, without newline."""
        self.debuggee = Debuggee(target, perf_counter)
        self._log = log
        self._clients: list[_Client] = []
        self._numbers = itertools.count(1)
        self._awake = trio.Event()
        self._progress = trio.Event()

    def wake(self) -> None:
        """Let the guest run at once if it is idle: there is input for it."""
        self._awake.set()

    async def serve(
        self,
        listeners: Sequence[trio.SocketListener] = (),
        *,
        start: bool = True,
        tasks: Sequence[Callable[[], Awaitable[None]]] = (),
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> End:
        """Run the guest and serve its clients until its end, and return that.

        The guest's end is not yet the end for a client in extended mode, as it may start the guest again.

        Args:
            listeners: where clients come in; none to run without a debugger.
            start: whether the guest runs at once; otherwise it waits for a debugger to let it.
            tasks: what else runs as long as this does, such as serial lines; cancelled at the end.
            task_status: told when clients are accepted.
        """
        if start:
            self.debuggee.start()
        async with trio.open_nursery() as nursery:
            for task in tasks:
                nursery.start_soon(task)
            for listener in listeners:
                nursery.start_soon(partial(trio.serve_listeners, self.serve_stream, [listener]))
            task_status.started()
            await self._run_guest()
            await self._say_farewell()
            nursery.cancel_scope.cancel()
        end = self.debuggee.end
        if end is None:
            raise RuntimeError("the guest's loop ended before the guest")
        return end

    async def _say_farewell(self) -> None:
        """Let the last replies go out, and clients hang up by themselves."""
        self._notify_all()
        for patience_s, is_done in ((FAREWELL_S, self._all_is_sent), (LINGER_S, lambda: not self._clients)):
            with trio.move_on_after(patience_s):
                while not is_done():
                    self._progress = trio.Event()
                    await self._progress.wait()

    def _all_is_sent(self) -> bool:
        return not any(client.sending or client.session.has_output for client in self._clients)

    async def serve_stream(self, stream: trio.abc.Stream) -> None:
        """Talk to one client until it leaves."""
        name = f"client {next(self._numbers)}"
        if len(self._clients) >= MAX_CLIENTS:
            self._log(f"{name}: refused, there are {MAX_CLIENTS} already")
            await trio.aclose_forcefully(stream)
            return
        from gdbstub.session import Session  # when somebody is there: the guest need not wait for it at the start

        session = Session(self.debuggee, lambda line: self._log(f"{name}: {line}"))
        client = _Client(name, stream, session)
        self._clients.append(client)
        self._log(f"{name}: connected{_peer(stream)}")
        try:
            async with trio.open_nursery() as nursery:
                client.scope = nursery.cancel_scope
                nursery.start_soon(self._receive, client)
                nursery.start_soon(self._send, client)
                nursery.start_soon(self._work, client)
        finally:
            self._clients.remove(client)
            session.lose_connection()
            self._awake.set()
            self._progress.set()
            self._log(f"{name}: gone{self._describe_guest()}")
            await trio.aclose_forcefully(stream)

    async def _receive(self, client: _Client) -> None:
        """Read packets and act on them at once, the first stint of the guest included: most steps need no more."""
        session = client.session
        while True:
            while not session.accepts_input:
                client.has_room = trio.Event()
                await client.has_room.wait()
            try:
                data = await client.stream.receive_some(RECEIVE_BYTES)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                data = b""
            if not data:
                client.scope.cancel()
                return
            was_running = self.debuggee.running
            session.receive(bytes(data))
            if self.debuggee.running and not was_running:
                self.debuggee.stint()
            # The reply goes out from here; `_send` is for what comes without a request.
            replies = session.has_output and not client.sending
            client.sending |= replies
            self._changed()
            if replies:
                await self._flush(client)

    async def _send(self, client: _Client) -> None:
        while True:
            client.has_output = trio.Event()
            client.notify()
            await client.has_output.wait()
            if not client.sending:
                await self._flush(client)

    async def _flush(self, client: _Client) -> None:
        """Send all output of a session; a client that does not take it is dropped."""
        client.sending = True
        try:
            while client.session.has_output:
                output = memoryview(client.session.take_output())
                client.notify()
                for start in range(0, len(output), SEND_BYTES):
                    with trio.fail_after(STALL_S):
                        await client.stream.send_all(output[start : start + SEND_BYTES])
        except trio.TooSlowError:
            self._log(f"{client.name}: dropped, it has read nothing for {STALL_S:.0f} s")
            client.scope.cancel()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            client.scope.cancel()
        client.sending = False
        self._progress.set()

    async def _work(self, client: _Client) -> None:
        while True:
            while client.session.has_work:
                client.session.advance()
                self._changed()
                await trio.lowlevel.checkpoint()
            client.has_work = trio.Event()
            await client.has_work.wait()

    async def _run_guest(self) -> None:
        debuggee = self.debuggee
        while not self._is_over():
            if not debuggee.running:
                self._awake = trio.Event()
                await self._awake.wait()
            elif self._is_held_up():
                # The controller asked for more output (of agent printf) than it takes; `_send` drops it if it has died.
                await trio.sleep(0.001)
            elif debuggee.stint() is StintEnd.IDLE and debuggee.running:
                self._awake = trio.Event()
                with trio.move_on_after(IDLE_S):
                    await self._awake.wait()
            else:
                self._notify_all()
                await trio.lowlevel.checkpoint()

    def _is_over(self) -> bool:
        end = self.debuggee.end
        if end is None:
            return False
        may_restart = any(client.session.extended and client.session.controls for client in self._clients)
        return end.kind is EndKind.QUIT or not may_restart

    def _is_held_up(self) -> bool:
        return any(client.session.controls and client.session.is_congested for client in self._clients)

    def _changed(self) -> None:
        """Wake everybody who waits for what a packet has changed."""
        if self.debuggee.running or self.debuggee.end is not None:
            self._awake.set()
        self._notify_all()

    def _notify_all(self) -> None:
        for client in self._clients:
            client.notify()

    def _describe_guest(self) -> str:
        if self.debuggee.controlled or self.debuggee.end is not None:
            return ""
        return ", the guest runs on" if self.debuggee.running else ", the guest stays stopped"


async def listen(
    announce: Callable[[str], None], host: str = DEFAULT_HOST, port: int = DEFAULT_PORT
) -> trio.SocketListener:
    """Open the listening socket, and announce the one line that says where it listens.

    Args:
        announce: gets lines for the user, without newline: a warning first, if others than this host can connect.
        host: an address or a name; loopback unless the user wants otherwise.
        port: 0 picks a free one.

    Raises:
        ListenError: the port is taken or is none, or the address is not ours.
    """
    if not 0 <= port <= _LAST_PORT:
        raise ListenError(f"cannot listen on {host}:{port}: ports go up to {_LAST_PORT}")
    try:
        listeners = await trio.open_tcp_listeners(port, host=host)
    except OSError as error:
        reason = "the port is in use" if error.errno == errno.EADDRINUSE else str(error)
        raise ListenError(f"cannot listen on {host}:{port}: {reason}") from error
    # A name may have several addresses, with port 0 each with a port of its own: one line, one socket, IPv4 first.
    listeners.sort(key=lambda listener: listener.socket.family != socket.AF_INET)
    for other in listeners[1:]:
        await other.aclose()
    address = listeners[0].socket.getsockname()
    if not ip_address(address[0]).is_loopback:
        announce(f"gdb: warning: {address[0]} is not loopback, and RSP has no authentication")
    shown_host = f"[{address[0]}]" if ":" in address[0] else address[0]
    announce(f"gdb: listening on {shown_host}:{address[1]}")
    return listeners[0]


def _peer(stream: trio.abc.Stream) -> str:
    if not isinstance(stream, trio.SocketStream):
        return ""
    # Finds out in the end that a peer is gone which never said so.
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    try:
        address = stream.socket.getpeername()
    except OSError:
        return ""
    return f" from {address[0]}:{address[1]}"
