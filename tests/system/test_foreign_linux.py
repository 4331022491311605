"""Debian's Linux, a kernel that none of us wrote, on the command line as a user starts it, up to a shell's commands."""

from __future__ import annotations

import hashlib
import re
import sys
from pathlib import Path

import pytest

from tests.system import debian
from tests.system.initramfs import CHARACTER_DEVICE, DIRECTORY, REGULAR, Entry, archive
from tests.system.tools import printed_until

RAM = "128M"
# So that the 150 ms for which it polls the timer are not 150 million instructions.
NS_PER_INSN = "10"
LAST_WORDS = "all is done"
SCRIPT = f"""#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox uname -srm
/bin/busybox md5sum /bin/busybox
/bin/busybox awk 'BEGIN {{ printf "1/7 is %.12f\\n", 1 / 7 }}'
n=0
while [ $n -lt 10 ]; do
    /bin/busybox true && n=$((n + 1))
done
echo "$n processes came and went"
/bin/busybox grep -c . /proc/interrupts
echo {LAST_WORDS}
"""
TIMEOUT_S = 240  # for one boot


def initramfs() -> bytes:
    return archive(
        (
            Entry("bin", DIRECTORY | 0o755),
            Entry("dev", DIRECTORY | 0o755),
            Entry("proc", DIRECTORY | 0o755),
            Entry("dev/console", CHARACTER_DEVICE | 0o600, device=(5, 1)),
            Entry("bin/busybox", REGULAR | 0o755, debian.busybox().read_bytes()),
            Entry("init", REGULAR | 0o755, SCRIPT.encode()),
        )
    )


def console(initrd: Path) -> str:
    """Boot it, and return what it prints on COM1 up to the last words."""
    command = [sys.executable, "-m", "gdbstub.cli", "run", "--kernel", str(debian.linux()), "--initrd", str(initrd)]
    options = ["-m", RAM, "--append", "console=ttyS0", "--gdb", "none", "--ns-per-insn", NS_PER_INSN]
    return printed_until(f"{LAST_WORDS}\r\n".encode(), [*command, *options], TIMEOUT_S).decode("latin-1")


@pytest.mark.slow
@pytest.mark.timeout(2 * TIMEOUT_S + 120)
def test_it_boots_and_runs_programs_the_same_way_twice(tmp_path: Path) -> None:
    initrd = tmp_path / "initramfs"
    initrd.write_bytes(initramfs())
    first, second = console(initrd), console(initrd)
    assert LAST_WORDS in first, first
    assert first == second  # with the time of each line
    assert re.search(r"Linux version 6\.\d+\.", first)
    measured = re.search(r"tsc: Detected (\d+\.\d+) MHz processor", first)
    assert measured is not None
    assert abs(float(measured[1]) - 1000) < 1  # against the timer, by polling it
    assert re.search(r"\nLinux 6\.\S+ i686\r\n", first)
    digest = hashlib.md5(debian.busybox().read_bytes(), usedforsecurity=False).hexdigest()
    assert f"{digest}  /bin/busybox" in first
    assert "1/7 is 0.142857142857\r\n" in first
    assert "10 processes came and went" in first
