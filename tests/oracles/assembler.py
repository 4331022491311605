"""GNU as as a source of test programs: AT&T or Intel syntax in, flat bytes out. It must not know what runs them."""

from __future__ import annotations

import subprocess
import tempfile
from functools import cache
from pathlib import Path


@cache
def assemble(source: str, *, bits: int = 32, origin: int = 0x1000) -> bytes:
    """The bytes of `source` (Intel syntax, registers without %), linked to run at `origin`.

    Args:
        source: what goes between `.intel_syntax noprefix` and the end.
        bits: 16 or 32: the width of the code.
        origin: address of the first byte.
    """
    text = f".intel_syntax noprefix\n.code{bits}\n.text\n.globl _start\n_start:\n{source}\n"
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        (directory / "source.s").write_text(text)
        steps = (
            ["gcc", "-m32", "-c", "-o", "object.o", "source.s"],
            ["ld", "-m", "elf_i386", f"-Ttext={origin:#x}", "-o", "linked", "object.o"],
            ["objcopy", "-O", "binary", "-j", ".text", "linked", "flat"],
        )
        for step in steps:
            done = subprocess.run(step, cwd=directory, capture_output=True, text=True, check=False)
            if done.returncode:
                raise AssertionError(f"{step[0]} refused a test program:\n{done.stderr}\n{source}")
        return (directory / "flat").read_bytes()
