"""What `make run` shows: the scripted session where there is no terminal, and gdb itself where there is one."""

import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import engine
from tests.system import tools

COMMAND = (sys.executable, "-m", "tools.demo")
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.usefixtures("each_engine")
@pytest.mark.parametrize("gdb", tools.gdbs(), ids=["stock", "recent"])
def test_without_a_terminal_a_scripted_session_runs(gdb: Path) -> None:
    done = subprocess.run(
        [*COMMAND, *engine.words()],
        cwd=ROOT,
        env=os.environ | {"GDB": str(gdb)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    expected = (
        r"eip +0x10000c +0x10000c <start>",
        r"Temporary breakpoint 1, system_call \(\)",
        r"\$1 = 3\n",
        r"vector_128 \(\)",
        r"\$2 = 0\n",
        r"#1 .* in system_call \(\) .*\n#2 .* in sys_hertz \(\)",
        r"Hardware watchpoint 2: ticks\n\nOld value = 0\nNew value = 1\n",
        r"Triple fault: .*\n +1\. #GP general protection",
        r"triple_fault \(\) at guests/demo/entry\.S",
        r"\[Inferior 1 \(process 1\) killed\]",
    )
    rest = done.stdout
    for pattern in expected:
        found = re.search(pattern, rest)
        assert found is not None, f"no {pattern!r} in the rest of the session:\n{rest}"
        rest = rest[found.end() :]


class Terminal:
    """The user's side of a pseudo-terminal: types, and reads what appears."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.shown = ""

    def read_until(self, wanted: str, timeout_s: float = 60.0) -> str:
        """Return what appeared up to and with `wanted`; what comes after it is kept."""
        deadline = time.monotonic() + timeout_s
        while wanted not in self.shown:
            ready, _, _ = select.select([self.descriptor], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"no {wanted!r} after {timeout_s} s in {self.shown!r}"
            self.shown += os.read(self.descriptor, 65536).decode(errors="replace")
        seen, self.shown = self.shown.split(wanted, 1)
        return seen + wanted

    def type_line(self, text: str) -> None:
        os.write(self.descriptor, text.encode() + b"\n")


@pytest.mark.usefixtures("each_engine")
def test_on_a_terminal_gdb_is_the_users() -> None:
    user_side, gdb_side = pty.openpty()
    environment = os.environ | {"TERM": "dumb", "GDB": str(tools.stock_gdb())}
    # setsid makes the terminal the controlling one of the session, so that Ctrl-C in it is a signal.
    command = ("setsid", "--ctty", *COMMAND, *engine.words())
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=gdb_side, stdout=gdb_side, stderr=gdb_side)
    os.close(gdb_side)
    try:
        terminal = Terminal(user_side)
        terminal.read_until("(gdb) ")
        terminal.type_line("break syscall_dispatch")
        terminal.read_until("(gdb) ")
        terminal.type_line("continue")
        terminal.read_until("Breakpoint 1, syscall_dispatch (")
        terminal.read_until("(gdb) ")
        terminal.type_line("delete")
        terminal.read_until("(y or n)")
        terminal.type_line("y")
        terminal.read_until("(gdb) ")
        # Ctrl-C is for gdb, which stops the guest; the machine lives on.
        terminal.type_line("continue")
        terminal.read_until("Continuing.")
        time.sleep(0.5)
        os.write(user_side, b"\x03")
        terminal.read_until("Program received signal SIGINT")
        terminal.read_until("(gdb) ")
        terminal.type_line("kill")
        terminal.read_until("(y or n)")
        terminal.type_line("y")
        terminal.read_until("(gdb) ")
        terminal.type_line("quit")
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.wait(timeout=10)
        os.close(user_side)
