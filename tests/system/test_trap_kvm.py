"""`--vmm trap --trap-backend kvm` as users start it: a boot to the end, gdb sessions on it, and what is refused."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from guests import images
from tests.system.tools import asked, gdb_mi, run_gdb
from tests.system.trapgate import run, running
from tests.vmm.trap.kvm import needs_kvm

DEMO = images.path("demo")
ON_KVM = ("--vmm", "trap", "--trap-backend", "kvm")


@needs_kvm
class TestRuns:
    def test_a_floppy_to_its_end(self, tmp_path: Path) -> None:
        floppy = tmp_path / "boot.img"
        floppy.write_bytes(images.floppy("boot"))
        done = run("run", floppy, *ON_KVM, "--gdb", "none", "--json-stats", tmp_path / "stats.json")
        assert done.returncode == 0, done.stderr
        assert b"entering protected mode" in done.stdout
        statistics = json.loads((tmp_path / "stats.json").read_text())["statistics"]
        assert statistics["engine"] == "trap kvm"
        assert statistics["exits_out_to_0x07f0"] > 100

    def test_the_demo_kernel_ends_with_the_guests_status(self) -> None:
        done = run("run", *ON_KVM, "--gdb", "none", "--append", "run=echo hello;poweroff")
        assert done.returncode == 0, done.stderr
        assert b"trapgate demo kernel" in done.stdout
        assert b"hello" in done.stdout


@needs_kvm
class TestGdb:
    def test_break_step_watch_and_change_engines(self) -> None:
        with running(DEMO, "--append", "quiet", "--serial", "none", *ON_KVM) as trapgate:
            done = run_gdb(
                [
                    trapgate.connect, "stepi", *asked("$icount"), "tbreak kernel_main", "continue",
                    "break syscall_dispatch", "continue", "backtrace 2", "monitor vmm bt", "continue",
                    "monitor vmm trap kvm", "continue", "delete", "watch ticks", "continue", "info watchpoints",
                    "monitor exits", "monitor stats", *asked("$cpl"), "kill",
                ],
                program=DEMO,
            )  # fmt: skip
        assert done.value_of("$icount") == "1", "a step is one instruction, on KVM too"
        assert "Temporary breakpoint 1, kernel_main" in done.output
        assert done.output.count("Breakpoint 2, syscall_dispatch") == 3
        assert "* bt" in done.output
        assert done.output.count("* trap kvm") == 1
        assert re.search(r"Old value = 0\nNew value = 1\n", done.output)
        assert re.search(r"^ *engine +trap kvm$", done.output, re.MULTILINE)

    def test_ctrl_c_in_a_guest_that_never_comes_out(self) -> None:
        program = images.path("tiny-loop")
        with running(program, *ON_KVM) as trapgate, gdb_mi(program=program) as mi:
            mi.command("-gdb-set mi-async on")
            mi.command(trapgate.connect)
            for _ in range(3):
                mi.command("-exec-continue")
                time.sleep(0.1)
                begun_s = time.monotonic()
                mi.command("-exec-interrupt")
                assert mi.wait_for_stop()["signal-name"] == "SIGINT"
                assert time.monotonic() - begun_s < 2
            assert "the host's alarm" in mi.console("monitor exits")
            mi.command("kill")


class TestRefusals:
    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (("--trap-backend", "kvm"), "--trap-backend is for --vmm trap"),
            ((*ON_KVM, "--paging", "nested"), "--paging is for the emulated backend"),
        ],
    )
    def test_one_line_and_status_2(self, words: tuple[str, ...], message: str) -> None:
        done = run("run", *words, "--gdb", "none", "--max-insns", "1")
        assert done.returncode == 2
        text = done.stderr.decode()
        assert message in text
        assert text.count("\n") == 1
