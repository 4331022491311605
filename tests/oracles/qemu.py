"""Runs a flat test program under QEMU's TCG, from a known state, and returns the bytes that it prints.

It knows nothing of our machine: a test that compares gives both the same `rom()` and program, or the same entry state.
"""

from __future__ import annotations

import enum
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.system.tools import qemu

#: A byte written here appears in `QemuRun.output`.
DEBUGCON_PORT = 0xE9
#: A value `v` written here ends the run with `QemuRun.status` v.
EXIT_PORT = 0xF4

#: Where the program is loaded and entered, by mode.
PROTECTED_ENTRY = 0x0010_0000
REAL_ENTRY = 0x7C00
#: ESP at entry in both modes; the stack grows down from below a real-mode program.
ENTRY_ESP = 0x7C00

CODE_SELECTOR = 0x08
DATA_SELECTOR = 0x10

ROM_BYTES = 0x1_0000
#: Physical address of the ROM's last copy below 1 MiB; the reset vector's copy ends at 4 GiB.
ROM_BASE = 0xF_0000
#: Physical address of the GDT that protected mode starts with: null, flat code, flat data.
GDT_BASE = ROM_BASE + 0xF100

# Accessed is set in both: a segment load must not have to write to the ROM.
_FLAT_CODE = 0x00CF_9B00_0000_FFFF
_FLAT_DATA = 0x00CF_9300_0000_FFFF
_GDT = struct.pack("<QQQ", 0, _FLAT_CODE, _FLAT_DATA)
_BOOT_OFFSET = 0xF000
_RESET_OFFSET = 0xFFF0


class Mode(enum.Enum):
    """What the processor is in when the program gets control.

    In both: interrupts off, DF clear, EAX the entry address, EBX = ECX = ESI = EDI = EBP = 0, EDX as reset left it (the
    CPU's signature), ESP = `ENTRY_ESP`. PROTECTED: flat 32-bit segments from the GDT at `GDT_BASE`, CS `CODE_SELECTOR`,
    the others `DATA_SELECTOR`, paging off, IDTR as at reset. REAL: all segments 0, CS:IP = 0:7C00.
    """

    PROTECTED = PROTECTED_ENTRY
    REAL = REAL_ENTRY


@dataclass(frozen=True, slots=True)
class QemuRun:
    """What a program did: the bytes it sent to port E9h, and how it ended.

    `status` is the value written to the exit port, or None if the machine was reset instead (a triple fault does that).
    """

    output: bytes
    status: int | None


class QemuError(AssertionError):
    """QEMU did not run the program to its end; the message holds what it had printed until then."""


@cache
def rom(mode: Mode) -> bytes:
    """Return a 64 KiB ROM image whose reset vector sets `mode` up and jumps to the program; it makes no BIOS calls."""
    image = bytearray(b"\xff" * ROM_BYTES)
    gdt_offset = GDT_BASE - ROM_BASE
    image[gdt_offset : gdt_offset + len(_GDT)] = _GDT
    pointer_offset = gdt_offset + len(_GDT)
    image[pointer_offset : pointer_offset + 6] = struct.pack("<HI", len(_GDT) - 1, GDT_BASE)
    boot = _protected_boot(pointer_offset) if mode is Mode.PROTECTED else _real_boot()
    image[_BOOT_OFFSET : _BOOT_OFFSET + len(boot)] = boot
    image[_RESET_OFFSET : _RESET_OFFSET + 5] = b"\xea" + struct.pack(
        "<HH", _BOOT_OFFSET, ROM_BASE >> 4
    )  # jmp F000:F000
    return bytes(image)


def _protected_boot(pointer_offset: int) -> bytes:
    code = b"\xfa\xfc"  # cli; cld
    code += b"\x2e\x66\x0f\x01\x16" + struct.pack("<H", pointer_offset)  # o32 lgdt cs:[pointer]
    code += b"\x0f\x20\xc0\x0c\x01\x0f\x22\xc0"  # mov eax, cr0; or al, 1; mov cr0, eax
    flat_start = ROM_BASE + _BOOT_OFFSET + len(code) + 8
    code += b"\x66\xea" + struct.pack("<IH", flat_start, CODE_SELECTOR)  # jmp dword code:flat_start
    code += b"\x66\xb8" + struct.pack("<H", DATA_SELECTOR)  # mov ax, data
    code += b"\x8e\xd8\x8e\xc0\x8e\xd0\x8e\xe0\x8e\xe8"  # mov ds, es, ss, fs, gs
    code += b"\xbc" + struct.pack("<I", ENTRY_ESP)  # mov esp, ENTRY_ESP
    return code + b"\xb8" + struct.pack("<I", PROTECTED_ENTRY) + b"\xff\xe0"  # mov eax, entry; jmp eax


def _real_boot() -> bytes:
    code = b"\xfa\xfc\x31\xc0"  # cli; cld; xor ax, ax
    code += b"\x8e\xd8\x8e\xc0\x8e\xd0\x8e\xe0\x8e\xe8"  # mov ds, es, ss, fs, gs
    code += b"\x66\xbc" + struct.pack("<I", ENTRY_ESP)  # mov esp, ENTRY_ESP
    code += b"\x66\xb8" + struct.pack("<I", REAL_ENTRY)  # mov eax, entry
    return code + b"\xea" + struct.pack("<HH", REAL_ENTRY, 0)  # jmp 0:7C00


def run(
    program: bytes,
    mode: Mode = Mode.PROTECTED,
    *,
    cpu: str = "qemu32",
    memory_mib: int = 8,
    timeout_s: float = 20.0,
    options: Sequence[str] = (),
) -> QemuRun:
    """Load `program` at the entry address of `mode`, run it, and return what it printed and how it ended.

    A run costs some 0.03 s beside what the program takes (measured). Runs share nothing: they may go on side by side.

    Args:
        program: flat machine code; it prints with `out 0E9h, al` and ends with `out 0F4h, al`.
        mode: the state it starts in.
        cpu: a model for QEMU's `-cpu`, features appended with commas.
        memory_mib: size of RAM in MiB.
        timeout_s: host seconds after which the run is given up.
        options: more of QEMU's command line, such as devices that a bare machine lacks.

    Raises:
        QemuError: QEMU refused its command line, crashed, or was still running after `timeout_s`.
    """
    with tempfile.TemporaryDirectory(prefix="trapgate-qemu-") as directory:
        image = Path(directory, "program")
        image.write_bytes(program)
        bios = Path(directory, "rom")
        bios.write_bytes(rom(mode))
        command = [
            str(qemu()), "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
            "-machine", "pc,usb=off,vmport=off", "-accel", "tcg,tb-size=8", "-cpu", cpu, "-m", str(memory_mib),
            "-bios", str(bios), "-device", f"loader,force-raw=on,file={image},addr={mode.value:#x}",
            "-device", f"isa-debug-exit,iobase={EXIT_PORT:#x},iosize=4", "-debugcon", "stdio", *options,
        ]  # fmt: skip
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s, check=False
            )
        except subprocess.TimeoutExpired as expired:
            raise QemuError(f"still running after {timeout_s} s; printed {expired.stdout or b''!r}") from expired
    if done.returncode == 0:
        return QemuRun(done.stdout, None)
    # isa-debug-exit makes the status odd: (value << 1) | 1. What QEMU itself dislikes ends with status 1 and a message.
    if done.returncode < 0 or done.returncode & 1 == 0 or done.stderr:
        raise QemuError(f"QEMU ended with status {done.returncode}: {done.stderr.decode(errors='replace').strip()}")
    return QemuRun(done.stdout, done.returncode >> 1)
