"""What a debugger's user waits for, measured over a socket beside QEMU's stub: steps, memory, breakpoints.

Both servers run the demo kernel on this host, one after the other in the same session.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter

from guests import images
from tools.bench import BenchmarkError, Notice, Progress, Result, Step
from tools.rsp_client import RspClient, decode

_STEPS = 3000
_HITS = 1000
_MEMORY_BYTES = 8 << 20
_TEXT = 0x10_0000
_START_TIMEOUT_S = 20.0
# `jmp .-2` with a NOP before it, where nothing of the kernel is: a breakpoint on the NOP is hit each round.
_LOOP = 0x5000
_LOOP_CODE = b"90ebfd"
_FIRST_INSTRUCTION_BYTES = 5  # MOV EDI, imm32


def server_speed() -> Iterator[Step]:
    """Measure trapgate, then QEMU if it is installed."""
    servers: list[tuple[str, Callable[[int], list[str]]]] = [("trapgate", _trapgate_command)]
    if shutil.which("qemu-system-i386"):
        servers.append(("QEMU", _qemu_command))
    else:
        yield Notice("QEMU is not installed; only trapgate is measured")
    for number, (name, command) in enumerate(servers):
        with _serving(command) as port, RspClient(port) as client:
            _enter_kernel(client)
            parts: list[tuple[str, Callable[[RspClient], float], str]] = [
                ("steps", _steps_a_second, "1/s"),
                ("breakpoint stops", _stops_a_second, "1/s"),
                ("memory read", _megabytes_a_second, "MB/s"),
            ]
            for step, (what, measure, unit) in enumerate(parts):
                yield Progress((number + step / len(parts)) / len(servers), f"{name}: {what}")
                yield Result(f"{name} {what}", measure(client), unit)


def _trapgate_command(port: int) -> list[str]:
    words = ["--serial", "none", "--append", "quiet", "-S", "--gdb", str(port)]
    return [sys.executable, "-m", "gdbstub.cli", "run", str(images.path("demo")), *words]


def _qemu_command(port: int) -> list[str]:
    words = ["-display", "none", "-serial", "null", "-append", "quiet", "-S", "-gdb", f"tcp:127.0.0.1:{port}"]
    return ["qemu-system-i386", "-accel", "tcg", "-kernel", str(images.path("demo")), *words]


@contextmanager
def _serving(command: Callable[[int], list[str]]) -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        command(port), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        _await_port(process, port)
        yield port
    finally:
        process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()


def _await_port(process: subprocess.Popen[bytes], port: int) -> None:
    """Wait until something listens, without connecting: a client would stop the guest."""
    end_s = perf_counter() + _START_TIMEOUT_S
    wanted = f"0100007F:{port:04X} 00000000:0000 0A"
    while perf_counter() < end_s:
        with open("/proc/net/tcp", encoding="ascii") as table:  # noqa: PTH123 - not a file that has a path
            if any(wanted in line for line in table):
                return
        if process.poll() is not None and process.stderr is not None:
            raise BenchmarkError(process.stderr.read().decode(errors="replace").strip())
        time.sleep(0.02)
    raise BenchmarkError(f"{process.args!r} does not listen")


def _enter_kernel(client: RspClient) -> None:
    """Run to the kernel's second instruction: QEMU starts in its BIOS, which the loader of ours does not need."""
    with images.path("demo").open("rb") as file:
        entry = int.from_bytes(file.read(28)[24:], "little")
    second = entry + _FIRST_INSTRUCTION_BYTES
    client.ask(b"Z0,%x,1" % second)
    reply = client.ask(b"vCont;c")
    if not reply.startswith(b"T05"):
        raise BenchmarkError(f"the kernel's entry was not reached: {reply!r}")
    client.ask(b"z0,%x,1" % second)


def _steps_a_second(client: RspClient) -> float:
    begun_s = perf_counter()
    for _ in range(_STEPS):
        reply = client.ask(b"vCont;s:1")
        if not reply.startswith(b"T05"):
            raise BenchmarkError(f"a step was answered {reply!r}")
    return _STEPS / (perf_counter() - begun_s)


def _stops_a_second(client: RspClient) -> float:
    """`continue` to a breakpoint in a loop of two instructions, and back."""
    client.ask(b"M%x,3:%b" % (_LOOP, _LOOP_CODE))
    client.ask(b"P8=%b" % _LOOP.to_bytes(4, "little").hex().encode())
    client.ask(b"Z0,%x,1" % (_LOOP + 1))
    begun_s = perf_counter()
    for _ in range(_HITS):
        reply = client.ask(b"vCont;c")
        if not reply.startswith(b"T05"):
            raise BenchmarkError(f"a breakpoint was answered {reply!r}")
    elapsed_s = perf_counter() - begun_s
    client.ask(b"z0,%x,1" % (_LOOP + 1))
    return _HITS / elapsed_s


def _megabytes_a_second(client: RspClient) -> float:
    count = (client.packet_bytes - 8) // 2
    done = 0
    begun_s = perf_counter()
    while done < _MEMORY_BYTES:
        reply = client.ask(b"m%x,%x" % (_TEXT + done, count))
        if not done and len(decode(reply)) != 2 * count:  # the others are not decoded: that is not what is measured
            raise BenchmarkError(f"reading memory was answered {reply[:40]!r}")
        done += count
    return done / 1e6 / (perf_counter() - begun_s)
