"""Real-mode code for tests, assembled with gcc and ld."""

import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

BOOT_SECTOR = 0x7C00


def tool(name: str) -> str:
    """The path of a program that the tests need."""
    found = shutil.which(name)
    assert found, f"{name} is needed for this test: `make setup` installs it"
    return found


@functools.cache
def assemble(source: str, address: int = BOOT_SECTOR) -> bytes:
    """Machine code of `source` (GNU syntax, after `.code16`), linked at an address."""
    with tempfile.TemporaryDirectory() as directory:
        text, target, binary = (Path(directory) / name for name in ("source.S", "source.o", "source.bin"))
        text.write_text(".code16\n.globl _start\n_start:\n" + source + "\n")
        subprocess.run([tool("gcc"), "-m32", "-c", text, "-o", target], check=True, timeout=60)
        link: list[str | os.PathLike[str]] = [tool("ld"), "-m", "elf_i386", f"-Ttext={address:#x}"]
        subprocess.run([*link, "--oformat=binary", "-o", binary, target], check=True, timeout=60)
        return binary.read_bytes()


def boot_sector(source: str) -> bytes:
    """A bootable sector that runs `source`."""
    code = assemble(source)
    assert len(code) <= 510
    return code.ljust(510, b"\0") + b"\x55\xaa"
