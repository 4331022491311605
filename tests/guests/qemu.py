"""Runs an image of ours under Debian's QEMU and returns what it printed and how it ended.

The guest's clock counts instructions (`-icount`, with no waiting for the host), so a run is the same every time.
"""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.system.tools import qemu

COMMON = (
    *("-nodefaults", "-no-user-config", "-vga", "std", "-display", "none", "-serial", "stdio", "-no-reboot"),
    *("-device", "isa-debug-exit,iobase=0xf4,iosize=1", "-icount", "shift=0,sleep=off"),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of a run: QEMU's exit status, and the text on COM1 with its carriage returns left out."""

    status: int
    serial: str


def kernel(image: Path, append: str = "") -> tuple[str, ...]:
    """Return the arguments that boot a multiboot image with `append` on its command line."""
    return ("-kernel", str(image), "-append", append)


def drive(image: Path, interface: str) -> tuple[str, ...]:
    """Return the arguments that boot a raw disk image; `interface` is "floppy" or "ide"."""
    return ("-drive", f"format=raw,if={interface},index=0,file={image}", "-snapshot")


def _text(serial: bytes) -> str:
    return serial.decode("ascii").replace("\r", "")


def run(arguments: Sequence[str], typed: bytes = b"", timeout_s: float = 30.0) -> Outcome:
    """Run QEMU to its end, `typed` waiting at COM1 from the start.

    Raises:
        subprocess.TimeoutExpired: it did not end within `timeout_s` seconds of the host's time.
    """
    done = subprocess.run(
        [qemu(), *COMMON, *arguments], input=typed, capture_output=True, timeout=timeout_s, check=False
    )
    return Outcome(done.returncode, _text(done.stdout))


def run_until(arguments: Sequence[str], marker: str, timeout_s: float = 30.0) -> str:
    """Run QEMU until a line on COM1 has `marker` in it, then end it; return what was printed, that line included.

    Raises:
        AssertionError: it ended, or `timeout_s` seconds of the host's time had gone, without that.
    """
    command = [str(qemu()), *COMMON, *arguments]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        watchdog = threading.Timer(timeout_s, process.kill)
        watchdog.start()
        printed = b""
        for line in process.stdout:
            printed += line
            if marker.encode() in line:
                break
        watchdog.cancel()
        process.kill()
    assert marker.encode() in printed, f"no {marker!r} in {printed!r}"
    return _text(printed)


@contextmanager
def stopped(arguments: Sequence[str], socket: Path) -> Iterator[str]:
    """Keep a QEMU that waits for gdb before the first instruction; yield what `target remote` reaches it by."""
    command = [str(qemu()), *COMMON, *arguments, "-S", "-gdb", f"unix:{socket},server=on,wait=off"]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            while not socket.exists():
                assert process.poll() is None
            yield str(socket)
        finally:
            process.kill()
