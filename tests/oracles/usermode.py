"""Owns the host CPU as an oracle for whole instructions: 32-bit user mode in a process of its own, faults included.

What it runs are bytes that tests made; it must not know what is compared with it. Segments of every kind come from an
LDT, so 16-bit code and stacks, bases, limits and rights are the real ones too.
"""

from __future__ import annotations

import os
import struct
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Final

import pytest

PAGE_BYTES: Final = 4096
CODE: Final = 0x20_0000
CODE_PAGES: Final = 2
ARENA: Final = 0x30_0000
ARENA_PAGES: Final = 16
ARENA_BYTES: Final = ARENA_PAGES * PAGE_BYTES

NONE, READ, WRITE, EXECUTE = 0, 1, 3, 5
"""Protections of a page; EXECUTE may be read too."""

USER_CODE: Final = 0x23
USER_DATA: Final = 0x2B
"""Linux's flat 32-bit segments."""


@dataclass(frozen=True, slots=True)
class LdtSegment:
    """A segment of DPL 3 in the LDT.

    Attributes:
        base: linear.
        limit: in bytes, or in pages less one if `in_pages`.
        contents: 0 data, 1 expand-down data, 2 code, 3 conforming code.
        big: D or B.
        writable: of code: readable.
    """

    base: int
    limit: int
    contents: int = 0
    big: bool = True
    writable: bool = True
    in_pages: bool = False
    present: bool = True

    def user_desc(self, number: int) -> bytes:
        """Linux's struct user_desc."""
        flags = self.big | self.contents << 1 | (not self.writable) << 3 | self.in_pages << 4 | (not self.present) << 5
        return struct.pack("<4I", number, self.base, self.limit, flags)

    @property
    def limit_bytes(self) -> int:
        """The limit with granularity applied."""
        return self.limit << 12 | 0xFFF if self.in_pages else self.limit

    @property
    def attributes(self) -> int:
        """In the form of `machine.state.Segment`; Linux sets the accessed bit."""
        kind = 1 | self.writable << 1 | self.contents << 2
        return kind | 0x70 | self.present << 7 | self.big << 10 | self.in_pages << 11

    @property
    def descriptor(self) -> bytes:
        """The eight bytes in the LDT."""
        low = self.limit & 0xFFFF | (self.base & 0xFFFF) << 16
        high = self.base >> 16 & 0xFF | (self.attributes & 0xFF) << 8 | self.limit & 0xF_0000
        return struct.pack("<II", low, high | self.attributes >> 8 << 20 | self.base & 0xFF00_0000)


def ldt_selector(number: int) -> int:
    """The selector, with RPL 3, of an entry of the LDT."""
    return number << 3 | 7


@dataclass(frozen=True, slots=True)
class Job:
    """One instruction to run.

    Attributes:
        code: at most 16 bytes; INT3 follows.
        gpr: EAX ECX EDX EBX ESP EBP ESI EDI.
        eflags: AC and the flags below bit 12, but IF, which is always set; with TF the run ends after one instruction.
        eip: where `code` is, as an offset in CS.
        code_linear: the same as a linear address in the code pages.
        selectors: ES CS SS DS FS GS.
        iterations: with TF and REP, how many at most.
        patches: linear address in the arena to at most 16 bytes; two at most.
        protection: of each page of the arena.
        code_protection: of each page of code.
    """

    code: bytes
    gpr: tuple[int, ...]
    eflags: int
    eip: int = CODE + 0x800
    code_linear: int = CODE + 0x800
    selectors: tuple[int, ...] = (USER_DATA, USER_CODE, USER_DATA, USER_DATA, USER_DATA, USER_DATA)
    iterations: int = 1
    patches: Mapping[int, bytes] = field(default_factory=dict)
    protection: bytes = bytes([WRITE]) * ARENA_PAGES
    code_protection: bytes = bytes([EXECUTE]) * CODE_PAGES


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a job left behind.

    Attributes:
        vector: the exception that ended it; 1 if TF did, 3 if it ran into the INT3 behind (EIP then points to that).
        error_code: of the exception.
        cr2: of a page fault, else 0.
        memory: the bytes of the arena that differ from `pristine()`, by linear address.
    """

    gpr: tuple[int, ...]
    eip: int
    eflags: int
    selectors: tuple[int, ...]
    vector: int
    error_code: int
    cr2: int
    memory: Mapping[int, int]


_HEADER: Final = struct.Struct("<6I")
_JOB: Final = struct.Struct("<8III6HII16s2s2xII16sII16s")
_OUTCOME: Final = struct.Struct("<8III6H4I")
_VECTOR_BP, _VECTOR_PF = 3, 14
_NO_LDT: Final = 3


@cache
def pristine() -> bytes:
    """The arena before each job: no byte equals its neighbours, or what is in the same place of another page."""
    return bytes((i * 167 + (i >> 8) * 59 + (i >> 12) * 31 + 5) & 0xFF for i in range(ARENA_BYTES))


@cache
def _program() -> int:
    """A file descriptor of the compiled program."""
    source = Path(__file__).with_name("usermode.c")
    options = "-m32 -O2 -nostdlib -static -ffreestanding -fno-stack-protector -fno-pie -no-pie"
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "usermode"
        command = ["gcc", *options.split(), "-o", str(binary), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return _memory_file(binary.read_bytes())


def _memory_file(data: bytes) -> int:
    fd = os.memfd_create("usermode")
    with open(fd, "wb", closefd=False) as file:
        file.write(data)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _pack(job: Job) -> bytes:
    patches = [(linear, len(data), data) for linear, data in job.patches.items()]
    patches += [(ARENA, 0, b"")] * (2 - len(patches))
    (a, a_bytes, a_data), (b, b_bytes, b_data) = patches
    fixed = _JOB.pack(
        *job.gpr, job.eip, job.eflags, *job.selectors, job.iterations, job.code_linear, job.code.ljust(16, b"\xcc"),
        job.code_protection, a, a_bytes, a_data, b, b_bytes, b_data,
    )  # fmt: skip
    return fixed + job.protection


def run(jobs: Sequence[Job], ldt: Mapping[int, LdtSegment] | None = None) -> list[Outcome]:
    """What the host's CPU makes of each job.

    Skips the test if this is no x86-64 Linux with 32-bit processes and an LDT.

    Args:
        jobs: none may make a system call, or load FS or GS with what the kernel would miss.
        ldt: entry number to segment.
    """
    segments = ldt or {}
    header = _HEADER.size + 16 * len(segments) + ARENA_BYTES
    packed = b"".join(_pack(job) for job in jobs)
    data = b"".join(
        (
            _HEADER.pack(CODE, ARENA, ARENA_PAGES, len(segments), len(jobs), header + len(packed)),
            *(segment.user_desc(number) for number, segment in segments.items()),
            pristine(),
            packed,
        )
    )
    program, given = _program(), _memory_file(data)
    try:
        done = subprocess.run(
            [f"/proc/self/fd/{program}"], stdin=given, capture_output=True, pass_fds=(program,), check=False
        )
    except OSError as error:
        pytest.skip(f"this kernel runs no 32-bit programs: {error}")
    finally:
        os.close(given)
    if done.returncode == _NO_LDT:
        pytest.skip("this kernel has no modify_ldt, or none for 16-bit segments")
    assert done.returncode == 0, f"usermode ended with {done.returncode}"
    return _unpack(done.stdout, len(jobs))


def _unpack(data: bytes, count: int) -> list[Outcome]:
    outcomes, at = [], 0
    for _ in range(count):
        *gpr, eip, eflags, es, cs, ss, ds, fs, gs, vector, error, cr2, changes = _OUTCOME.unpack_from(data, at)
        at += _OUTCOME.size
        changed = struct.unpack_from(f"<{changes}I", data, at)
        at += 4 * changes
        outcomes.append(
            Outcome(
                tuple(gpr),
                eip - 1 if vector == _VECTOR_BP else eip,
                eflags,
                (es, cs, ss, ds, fs, gs),
                vector,
                error,
                cr2 if vector == _VECTOR_PF else 0,
                {ARENA + (change >> 8): change & 0xFF for change in changed},
            )
        )
    assert at == len(data), f"{len(data) - at} bytes too many"
    return outcomes
