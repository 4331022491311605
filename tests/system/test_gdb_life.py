"""A session's life: Ctrl-C, detach and reattach, restart, kill, a second client, and what becomes of the process."""

from __future__ import annotations

import re
import socket
import time
from pathlib import Path

import pytest

from guests import images
from tests.system.tools import GdbMi, asked, gdb_mi, recent_gdb, run_gdb, run_lldb, stock_gdb
from tests.system.trapgate import Trapgate, run, running

pytestmark = pytest.mark.usefixtures("each_engine")

DEMO = images.path("demo")
# Two seconds each under bt.
SPINNING = "quiet run=" + ";".join(["spin 4000000"] * 12)


def connect(mi: GdbMi, trapgate: Trapgate, *, extended: bool = False) -> None:
    mi.command("-gdb-set mi-async on")  # else gdb does not read -exec-interrupt while the guest runs
    mi.command(trapgate.connect_extended if extended else trapgate.connect)


@pytest.mark.parametrize("gdb", [stock_gdb(), recent_gdb()], ids=["stock", "recent"])
def test_ctrl_c_detach_and_reattach(gdb: Path) -> None:
    """By GDB/MI, as a test harness does it: the shell spins, Ctrl-C, look, detach, it runs on, attach again."""
    with running(DEMO, "--append", SPINNING) as trapgate:
        with gdb_mi(gdb=gdb, program=DEMO) as mi:
            connect(mi, trapgate)
            mi.command("-break-insert -t spin")
            mi.command("-exec-continue")
            assert mi.wait_for_stop()["reason"] == "breakpoint-hit"
            for _ in range(3):
                mi.command("-exec-continue")
                mi.command("-exec-interrupt")
                stop = mi.wait_for_stop()
                assert stop["signal-name"] == "SIGINT"
            before = int(mi.evaluate("$icount"))
            mi.command("-target-detach")
        with gdb_mi(gdb=gdb, program=DEMO) as mi:
            connect(mi, trapgate)
            assert int(mi.evaluate("$icount")) > before
            # The tasks of ring 3 begin at the first ticks, and code that is new takes its time.
            for _ in range(50):
                if "spin" in (found := mi.console("backtrace")):
                    break
                mi.command("-exec-continue")
                time.sleep(0.1)
                mi.command("-exec-interrupt")
                mi.wait_for_stop()
            assert "spin" in found
            mi.command("kill")
        assert trapgate.wait() == 0


def test_a_client_that_vanishes_leaves_the_guest_stopped() -> None:
    with running(DEMO, "--append", "quiet") as trapgate:
        with gdb_mi(program=DEMO) as mi:
            connect(mi, trapgate)
            mi.command("-break-insert kernel_main")
            mi.command("-exec-continue")
            mi.wait_for_stop()
        again = run_gdb(
            [trapgate.connect, *asked("$icount"), "backtrace 1", "monitor info breakpoints"],
            program=DEMO,
        )
        assert 16_000 < int(again.value_of("$icount")) < 17_000
        assert "kernel_main" in again.output
        assert "gdb: " not in again.output


def test_run_restarts_from_cleared_memory_with_breakpoints() -> None:
    with running(DEMO, "--append", "quiet", "--serial", "none") as trapgate:
        first = run_gdb(
            [
                trapgate.connect_extended, "break kernel_main", "continue", *asked("$icount"), "set var quiet = 1",
                f"set remote exec-file {DEMO}", "run", *asked("$icount "), *asked("(int)quiet"), "break tasks_tick",
                "continue", "kill", "run", *asked("$icount  "),
            ],
            program=DEMO,
        )  # fmt: skip
        assert first.value_of("$icount") == first.value_of("$icount ") == first.value_of("$icount  ")
        assert first.value_of("(int)quiet") == "0"
        assert "[Inferior 1 (process 1) killed]" in first.output


def test_exit_of_the_guest_reaches_gdb_and_the_shell() -> None:
    with running(DEMO, "--append", "quiet run=exit 5", "--serial", "none") as trapgate:
        session = run_gdb([trapgate.connect, "continue"], program=DEMO)
        assert "[Inferior 1 (process 1) exited with code 013]" in session.output
        assert "The guest has ended: debug exit." in session.output
        assert trapgate.wait() == 11


def test_kill_ends_with_status_0() -> None:
    with running(DEMO, "--serial", "none") as trapgate:
        run_gdb([trapgate.connect, "kill"], program=DEMO)
        assert trapgate.wait() == 0


def test_monitor_quit_ends_with_its_status() -> None:
    with running(DEMO, "--serial", "none") as trapgate:
        run_gdb([trapgate.connect, "monitor quit 9"], program=DEMO)
        assert trapgate.wait() == 9


def test_two_clients_of_which_one_only_looks() -> None:
    words = (DEMO, "--append", SPINNING, "--serial", "none")
    with running(*words) as trapgate, gdb_mi(program=DEMO) as mi:
        connect(mi, trapgate)
        mi.command("-break-insert -t spin")
        mi.command("-exec-continue")
        mi.wait_for_stop()
        commands = [
            "backtrace 1",
            *asked("$icount"),
            "set $eax = 1",
            "monitor reset",
            "monitor info registers",
            "x/i $pc",
        ]
        look = run_gdb([trapgate.connect, *commands], program=DEMO)
        assert "spin" in look.output
        assert "you may only look" in look.output
        mi.command("-exec-continue")
        watch = run_gdb([trapgate.connect, *asked("$icount"), "detach"], program=DEMO)
        assert int(watch.value_of("$icount")) > int(look.value_of("$icount"))
        mi.command("-exec-interrupt")
        assert mi.wait_for_stop()["signal-name"] == "SIGINT"


def test_input_typed_by_the_monitor_reaches_the_shell() -> None:
    with running(DEMO, "--append", "quiet") as trapgate, gdb_mi(program=DEMO) as mi:
        connect(mi, trapgate)
        mi.command("-exec-continue")
        trapgate.wait_for("demo>")
        mi.command("-exec-interrupt")
        mi.wait_for_stop()
        mi.command("monitor serial echo hello from gdb\\n")
        mi.command("-exec-continue")
        trapgate.wait_for("(?m)^hello from gdb")
        trapgate.type(b"echo and from outside\n")
        trapgate.wait_for("(?m)^and from outside")


def test_lldb() -> None:
    with running(DEMO, "--append", "quiet", "--serial", "none") as trapgate:
        session = run_lldb(
            [
                f"gdb-remote 127.0.0.1:{trapgate.port}", "breakpoint set --name syscall_dispatch", "continue", "bt 2",
                "register read eip cr0 icount", "memory read --count 16 $esp", "thread step-inst", "register read eip",
                "breakpoint delete --force", "watchpoint set expression -w write -s 4 -- &ticks", "continue", "detach",
            ],
            program=DEMO,
        )  # fmt: skip
        assert "stop reason = breakpoint 1.1" in session.output
        assert re.search(r"eip = 0x\w+  demo.elf`syscall_dispatch", session.output)
        assert "cr0 = 0x80010015" in session.output
        assert "icount = " in session.output


def test_pygdbmi_session_follows_a_variable() -> None:
    with running(DEMO, "--append", "quiet", "--serial", "none") as trapgate, gdb_mi(program=DEMO) as mi:
        connect(mi, trapgate)
        mi.command("-break-insert tasks_tick")
        seen = []
        for _ in range(3):
            mi.command("-exec-continue")
            mi.wait_for_stop()
            seen.append((int(mi.evaluate("ticks")), int(mi.evaluate("$icount"))))
        assert [ticks for ticks, _ in seen] == [1, 2, 3]
        assert len({icount for _, icount in seen}) == 3


def test_garbage_before_gdb() -> None:
    with running(DEMO, "--append", "quiet", "--serial", "none") as trapgate:
        for garbage in (
            b"GET / HTTP/1.0\r\n\r\n",
            b"$" * 5000,
            b"$g#00" * 100,
            b"\x03" * 50,
            b"$mffffffff,ffffffff#zz",
        ):
            with socket.create_connection(("127.0.0.1", trapgate.port), timeout=10) as client:
                client.sendall(garbage)
                time.sleep(0.05)
        session = run_gdb([trapgate.connect, *asked("$icount"), "stepi", *asked("$icount ")], program=DEMO)
        assert (session.value_of("$icount"), session.value_of("$icount ")) == ("0", "1")


class TestGdbCommand:
    """`trapgate gdb`, not interactive."""

    def test_session(self) -> None:
        done = run(
            "gdb",
            DEMO,
            "--append",
            "quiet",
            "--",
            "-nx",
            "-batch",
            "-ex",
            "break kernel_main",
            "-ex",
            "continue",
            "-ex",
            "bt",
        )
        output = done.stdout.decode()
        assert done.returncode == 0, output
        assert "kernel_main (magic=" in output
        assert re.search(r"^97\s+\{", output, re.MULTILINE), "the sources of the demo kernel are found"

    def test_built_in_kernel_and_its_output(self) -> None:
        done = run("gdb", "--max-insns", "200000", "--", "-nx", "-batch", "-ex", "continue")
        assert b"trapgate demo kernel" in done.stdout
        assert done.returncode == 0

    def test_status_of_the_guest_and_of_gdb(self) -> None:
        done = run("gdb", DEMO, "--append", "quiet run=exit 3", "--", "-nx", "-batch", "-ex", "continue")
        assert done.returncode == 7
        assert run("gdb", DEMO, "--", "-nx", "-batch", "-ex", "error out").returncode != 0

    def test_without_gdb(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("GDB", "/nonexistent/gdb")
        done = run("gdb", DEMO)
        assert (done.returncode, done.stderr.count(b"\n")) == (2, 1)
        assert b"gdb was not found" in done.stderr
