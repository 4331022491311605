"""What `make run` shows: the scripted session where there is no terminal, and gdb itself where there is one."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import engine
from tests.system import tools
from tests.system.terminal import ROOT, opened

COMMAND = (sys.executable, "-m", "tools.demo")


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


@pytest.mark.usefixtures("each_engine")
def test_on_a_terminal_gdb_is_the_users() -> None:
    with opened(*COMMAND, *engine.words()) as terminal:
        terminal.read()
        terminal.type_line("break syscall_dispatch")
        assert any("Breakpoint 1, syscall_dispatch (" in line for line in terminal.type_line("continue"))
        terminal.write("delete\n")
        terminal.read_until("(y or n)")
        terminal.type_line("y")
        # Ctrl-C is for gdb, which stops the guest; the machine lives on.
        terminal.write("continue\n")
        terminal.read_until("Continuing.")
        time.sleep(0.5)
        terminal.write("\x03")
        assert any("Program received signal SIGINT" in line for line in terminal.read())
        terminal.write("kill\n")
        terminal.read_until("(y or n)")
        terminal.type_line("y")
        terminal.write("quit\n")
        assert terminal.process.wait(timeout=30) == 0
