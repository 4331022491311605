"""Runs a flat test program under Bochs, as `tests.oracles.qemu` does under QEMU, to record what it prints.

Tests compare with recorded results and need no Bochs; whoever renews them does (Debian: bochs, bochs-term, vgabios).
"""

from __future__ import annotations

import itertools
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.oracles.qemu import PROTECTED_ENTRY, Mode, rom

VGA_BIOS = Path("/usr/share/bochs/VGABIOS-lgpl-latest")

#: What one `optramimage` takes.
PIECE_BYTES = 1 << 17

_MARK = b"[begin]"
_PROLOGUE_OFFSET = 0xE000
_RESET_OFFSET = 0xFFF0
_BOOT_OFFSET = 0xF000


class BochsError(AssertionError):
    """Bochs is not installed, or refused to run."""


def version() -> str:
    """The first word of its banner that is a version."""
    done = subprocess.run([_bochs(), "--help"], capture_output=True, text=True, check=False)
    words = (done.stdout + done.stderr).split()
    return next(word for before, word in itertools.pairwise(words) if before == "Emulator")


def _bochs() -> str:
    found = shutil.which("bochs")
    if found is None or not VGA_BIOS.exists():
        raise BochsError("bochs is not installed: apt-get install bochs bochs-term vgabios")
    return found


def _rom() -> bytes:
    """The same ROM, which first prints a mark: Bochs writes messages of its own before it."""
    image = bytearray(rom(Mode.PROTECTED))
    code = b"".join(bytes((0xB0, byte, 0xE6, 0xE9)) for byte in _MARK)  # mov al, byte; out 0E9h, al
    distance = _BOOT_OFFSET - (_PROLOGUE_OFFSET + len(code) + 3)
    code += b"\xe9" + distance.to_bytes(2, "little")
    image[_PROLOGUE_OFFSET : _PROLOGUE_OFFSET + len(code)] = code
    image[_RESET_OFFSET : _RESET_OFFSET + 5] = b"\xea" + _PROLOGUE_OFFSET.to_bytes(2, "little") + b"\x00\xf0"
    return bytes(image)


def run(pieces: dict[int, bytes], *, cpu: str = "p2_klamath", memory_mib: int = 8, timeout_s: float = 60.0) -> bytes:
    """Run a protected-mode program and return what it sent to port E9h; messages of Bochs itself may follow it.

    Args:
        pieces: up to four parts of the program by address, one of them at `PROTECTED_ENTRY`; it ends by writing
            "Shutdown" to port 8900h.
        cpu: a name from `bochs --help cpu`.
        memory_mib: size of RAM.
        timeout_s: host seconds after which the run is given up.
    """
    assert PROTECTED_ENTRY in pieces
    assert len(pieces) <= 4, "Bochs loads four images"
    assert all(len(data) <= PIECE_BYTES for data in pieces.values()), "Bochs cuts larger images"
    with tempfile.TemporaryDirectory(prefix="trapgate-bochs-") as name:
        directory = Path(name)
        (directory / "rom").write_bytes(_rom())
        images = []
        for number, (address, data) in enumerate(pieces.items(), 1):
            (directory / f"image{number}").write_bytes(data)
            images.append(f"optramimage{number}: file={directory}/image{number}, address={address:#x}")
        settings = [
            f"megs: {memory_mib}",
            f"cpu: model={cpu}, count=1, ips=50000000, reset_on_triple_fault=0, ignore_bad_msrs=0",
            f"romimage: file={directory}/rom, address=0xffff0000", f"vgaromimage: file={VGA_BIOS}", *images,
            "port_e9_hack: enabled=1", 'display_library: rfb, options="timeout=0"', f"log: {directory}/log",
            "panic: action=fatal", "error: action=report", "speaker: enabled=0", "clock: sync=none",
        ]  # fmt: skip
        (directory / "settings").write_text("\n".join(settings) + "\n")
        (directory / "commands").write_text("c\nq\n")
        command = [_bochs(), "-q", "-f", f"{directory}/settings", "-rc", f"{directory}/commands"]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s, check=False, cwd=directory
        )
    start = done.stdout.find(_MARK)
    if start < 0:
        raise BochsError(f"Bochs printed no mark: {done.stdout[-1000:]!r} {done.stderr[-1000:]!r}")
    return done.stdout[start + len(_MARK) :]
