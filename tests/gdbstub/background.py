"""A server in a thread of its own, for tests that drive debuggers as programs."""

import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import trio

from gdbstub.debuggee import End
from gdbstub.server import Server, listen
from tests.gdbstub.toy import ToyTarget


@dataclass
class Served:
    """What a test knows of the server behind its debugger."""

    target: ToyTarget
    port: int = 0
    log: list[str] = field(default_factory=list)
    end: End | None = None

    def wait_log(self, line: str) -> None:
        """Wait until the server has logged just this line."""
        deadline_s = time.monotonic() + 5
        while line not in self.log:
            assert time.monotonic() < deadline_s, self.log
            time.sleep(0.005)

    @property
    def remote(self) -> str:
        return f"127.0.0.1:{self.port}"


@contextmanager
def served(target: ToyTarget | None = None, *, start: bool = False) -> Iterator[Served]:
    """Serve `target` on a free port until the block ends."""
    state = Served(target or ToyTarget())
    ready: queue.Queue[tuple[trio.lowlevel.TrioToken, trio.CancelScope]] = queue.Queue()

    async def main() -> None:
        listener = await listen(lambda _line: None, port=0)
        state.port = listener.socket.getsockname()[1]
        with trio.CancelScope() as scope:
            ready.put((trio.lowlevel.current_trio_token(), scope))
            state.end = await Server(state.target, state.log.append).serve([listener], start=start)

    thread = threading.Thread(target=trio.run, args=(main,), daemon=True)
    thread.start()
    token, scope = ready.get(timeout=10)
    try:
        yield state
    finally:
        with suppress(trio.RunFinishedError):
            token.run_sync_soon(scope.cancel)
        thread.join(timeout=10)
        assert not thread.is_alive()
