"""The command `trapgate` as a shell script sees it: statuses, output, one-line refusals."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import termios
import time
from pathlib import Path

import pytest

from guests import images
from tests.system.trapgate import command, run, running

DEMO = images.path("demo")
EXIT = images.path("tiny-exit")
QUIET = ("--append", "quiet")


@pytest.mark.usefixtures("each_engine")
class TestStatuses:
    @pytest.mark.parametrize(("value", "status"), [(0, 1), (3, 7), (0x7F, 0xFF)])
    def test_debug_exit(self, value: int, status: int) -> None:
        assert run("run", EXIT, "--gdb", "none", "--append", f"exit {value}").returncode == status

    def test_power_off(self) -> None:
        done = run("run", DEMO, "--gdb", "none", "--append", "quiet run=poweroff")
        assert (done.returncode, done.stderr) == (0, b"")

    def test_triple_fault_without_debugger(self) -> None:
        done = run("run", images.path("tiny-triple"), "--gdb", "none")
        assert done.returncode == 3
        assert done.stderr.startswith(b"trapgate: Triple fault")
        assert b"#UD" in done.stderr

    def test_max_insns(self) -> None:
        done = run("run", images.path("tiny-loop"), "--gdb", "none", "--max-insns", "100k")
        assert done.returncode == 0
        assert done.stderr == b"trapgate: The guest has executed 100000 instructions, as --max-insns says.\n"

    def test_no_command_and_help(self) -> None:
        assert run().returncode == 2
        done = run("--help")
        assert done.returncode == 0
        for name in (b"run", b"gdb", b"diff", b"bench", b"doctor"):
            assert name in done.stdout
        assert b"--debugcon" in run("run", "--help").stdout
        assert re.match(rb"trapgate( \d+\.\d+|, run from its sources)", run("--version").stdout)

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
    def test_signals_end_it(self, number: signal.Signals) -> None:
        with running(DEMO, *QUIET, stopped=False) as trapgate:
            trapgate.wait_for("demo>")
            trapgate.process.send_signal(number)
            assert trapgate.wait() == 128 + number

    def test_ctrl_c_ends_it(self) -> None:
        with running(DEMO, *QUIET, stopped=False) as trapgate:
            trapgate.wait_for("demo>")
            trapgate.process.send_signal(signal.SIGINT)
            assert trapgate.wait() == 130


class TestRefusals:
    def refuse(self, *words: str | Path) -> str:
        done = run("run", *words)
        assert done.returncode == 2
        assert done.stderr.count(b"\n") == 1, done.stderr
        assert done.stdout == b""
        return done.stderr.decode()

    def test_images(self, tmp_path: Path) -> None:
        assert "No such file" in self.refuse(tmp_path / "none")
        (tmp_path / "text").write_text("hello")
        assert "not a bootable image" in self.refuse(tmp_path / "text")
        (tmp_path / "empty").touch()
        assert "empty" in self.refuse(tmp_path / "empty")
        (tmp_path / "cut").write_bytes(DEMO.read_bytes()[:6000])
        assert "truncated" in self.refuse(tmp_path / "cut")
        assert "not a regular file" in self.refuse(tmp_path)
        assert "RAM" in self.refuse(DEMO, "-m", "1M")

    def test_two_images(self) -> None:
        assert "two images" in self.refuse(DEMO, "--kernel", DEMO)

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (("--gdb", "none", "-S"), "waits for a debugger"),
            (("-s", "--gdb", "1"), "both"),
            (("--rtc", "yesterday"), "not a date"),
            (("--debug-exit", "0x20"), "port 0x20"),
            (("--serial", "/nonexistent/x"), "cannot write"),
            (("--serial", "none", "--serial", "none", "--serial", "none"), "two serial ports"),
            (("-m", "16G"), "4095 MiB"),
            (("-m", "0"), "1 MiB"),
            (("--paging", "nested"), "is for --vmm trap"),
            (("--undefined-flags", "zork"), "amd-zen5"),
            (("--initrd", "/nonexistent"), "No such file"),
            (("--gdb", "203.0.113.1:0"), "cannot listen"),
        ],
    )
    def test_options(self, words: tuple[str, ...], message: str) -> None:
        assert message in self.refuse(DEMO, *words)

    def test_taken_port(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            assert "port is in use" in self.refuse(DEMO, "--gdb", str(port))
            assert "port is in use" in self.refuse(DEMO, "--gdb", "none", "--serial", f"tcp:{port}")

    def test_a_second_server_on_the_port_leaves_the_first_alone(self) -> None:
        with running(DEMO, *QUIET) as first:
            assert "in use" in self.refuse(DEMO, "--gdb", str(first.port))
            with socket.create_connection(("127.0.0.1", first.port), timeout=10) as client:
                client.sendall(b"+$?#3f")
                assert b"$" in client.recv(100)


class TestListening:
    def test_one_line_says_where(self) -> None:
        with running(DEMO) as trapgate:
            assert trapgate.errors == f"gdb: listening on 127.0.0.1:{trapgate.port}\n"

    def test_beyond_loopback_there_is_a_warning(self) -> None:
        # Opened on all addresses of this machine, and asked over loopback only.
        process = subprocess.Popen(
            command("run", DEMO, "-S", "--gdb", "0.0.0.0:0"), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        try:
            assert process.stderr is not None
            lines = [process.stderr.readline().decode() for _ in range(2)]
        finally:
            process.kill()
            process.wait()
            if process.stderr is not None:
                process.stderr.close()
        assert any("no authentication" in line for line in lines)
        assert any(re.match(r"gdb: listening on 0\.0\.0\.0:\d+$", line) for line in lines)

    def test_without_s_the_guest_starts_at_once(self) -> None:
        with running(DEMO, *QUIET, stopped=False) as trapgate:
            trapgate.wait_for("demo>")
        with running(DEMO, *QUIET) as trapgate:
            time.sleep(0.5)
            assert trapgate.output == ""


@pytest.mark.usefixtures("each_engine")
class TestSinks:
    def test_standard_input_and_output(self) -> None:
        done = run("run", DEMO, "--gdb", "none", *QUIET, stdin=b"echo one\necho two\npoweroff\n")
        assert done.returncode == 0
        lines = done.stdout.decode().splitlines()
        assert [line for line in lines if line in ("one", "two")] == ["one", "two"]

    def test_file(self, tmp_path: Path) -> None:
        log = tmp_path / "serial.log"
        log.write_text("old")
        done = run("run", DEMO, "--gdb", "none", "--serial", log, "--append", "quiet run=echo hello;poweroff")
        assert (done.returncode, done.stdout) == (0, b"")
        assert b"hello" in log.read_bytes()
        assert b"old" not in log.read_bytes()

    def test_none(self) -> None:
        done = run("run", DEMO, "--gdb", "none", "--serial", "none", "--append", "quiet run=poweroff")
        assert (done.returncode, done.stdout) == (0, b"")

    def test_tcp_keeps_the_beginning_for_its_first_client(self) -> None:
        with running(DEMO, *QUIET, "--serial", "tcp:0", stopped=False) as trapgate:
            port = int(trapgate.wait_for(r"serial: listening on 127\.0\.0\.1:(\d+)")[1])
            time.sleep(0.5)
            with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
                received = b""
                while b"demo>" not in received:
                    received += client.recv(4096)
                client.sendall(b"echo over tcp\n")
                while b"\nover tcp" not in received:
                    received += client.recv(4096)
            with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
                client.sendall(b"exit 4\n")
                assert trapgate.wait() == 9

    def test_debugcon_and_second_serial_line(self, tmp_path: Path) -> None:
        # MOV DX, 2F8h; MOV AL, 'B'; OUT DX, AL; MOV AL, 'C'; OUT E9h, AL; MOV AL, 0; OUT F4h, AL
        (tmp_path / "code").write_bytes(bytes.fromhex("66baf802 b042 ee b043 e6e9 b000 e6f4"))
        two, con = tmp_path / "two", tmp_path / "con"
        done = run("run", f"{tmp_path / 'code'}@0x100000", "--gdb", "none", "--serial", "none", "--serial", two,
                   "--debugcon", con)  # fmt: skip
        assert done.returncode == 1
        assert (two.read_bytes(), con.read_bytes()) == (b"B", b"C")

    def test_a_closed_reader_does_not_stop_the_guest(self) -> None:
        process = subprocess.Popen(
            command("run", DEMO, "--gdb", "none", "--append", "quiet run=help;help;exit 1"),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.wait(60) == 3
        process.stderr.close()

    def test_terminal_is_raw_while_it_runs_and_restored(self) -> None:
        main, terminal = pty.openpty()
        before = termios.tcgetattr(terminal)
        process = subprocess.Popen(
            command("run", DEMO, "--gdb", "none", *QUIET), stdin=terminal, stdout=terminal, stderr=subprocess.DEVNULL
        )
        try:
            seen = read_until(main, b"demo>")
            raw = termios.tcgetattr(terminal)
            assert not raw[3] & (termios.ICANON | termios.ECHO)
            assert raw[3] & termios.ISIG
            os.write(main, b"echo typed\r")
            seen += read_until(main, b"\ntyped")
            os.write(main, b"\x04")  # Ctrl-D goes to the guest
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 130
            assert termios.tcgetattr(terminal) == before
        finally:
            process.kill()
            process.wait()
            os.close(main)
            os.close(terminal)


def read_until(descriptor: int, wanted: bytes, timeout_s: float = 30.0) -> bytes:
    seen = b""
    end_s = time.monotonic() + timeout_s
    while wanted not in seen:
        ready, _, _ = select.select([descriptor], [], [], max(0.0, end_s - time.monotonic()))
        assert ready, f"no {wanted!r} in {seen!r}"
        seen += os.read(descriptor, 4096)
    return seen


def test_statistics_as_json(tmp_path: Path, each_engine: str) -> None:
    path = tmp_path / "stats.json"
    run("run", DEMO, "--gdb", "none", "--append", "quiet run=exit 2", "--json-stats", path)
    record = json.loads(path.read_text())
    assert (record["end"], record["status"]) == ("exited", 5)
    assert record["statistics"]["engine"] == each_engine
    assert record["statistics"]["icount"] > 50_000


@pytest.mark.usefixtures("each_engine")
def test_the_same_run_twice() -> None:
    words = ("run", DEMO, "--gdb", "none", "--append", "run=sleep 40;ps;regs;uptime;poweroff")
    first, second = run(*words), run(*words)
    assert first.stdout == second.stdout
    assert b"primes" in first.stdout


def test_doctor() -> None:
    done = run("doctor")
    assert done.returncode == 0
    facts = json.loads(run("doctor", "--json").stdout)
    names = {fact["name"] for fact in facts}
    assert {"python", "host", "FSGSBASE", "BMI2", "KVM", "vm.max_map_count", "address space", "gdb", "lldb"} <= names
    assert all(fact["effect"] and isinstance(fact["ok"], bool) for fact in facts)
    assert all(fact["name"] in done.stdout.decode() for fact in facts)


def test_bench_lists_and_refuses() -> None:
    assert b"interp" in run("bench", "--list").stdout
    done = run("bench", "zork")
    assert (done.returncode, done.stderr.count(b"\n")) == (2, 1)


def test_help_is_there_at_once() -> None:
    """Against the start of Python itself, on whatever host this is: nothing heavy is imported."""
    done = subprocess.run(
        [*command()[:1], "-X", "importtime", *command("--help")[1:]], capture_output=True, check=True, timeout=30
    )
    loaded = {line.rsplit(b"|", 1)[1].strip() for line in done.stderr.splitlines() if line.startswith(b"import time:")}
    assert not loaded & {b"trio", b"construct", b"iced_x86", b"capstone", b"machine", b"vmm", b"asyncio"}
