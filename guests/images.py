"""The images of our own: their names, what each is made from, and where the built ones are found.

It must not know how they are compiled or run: the first is `guests.build`'s business, the second everybody else's.
"""

from __future__ import annotations

import importlib.resources
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

FLOPPY_BYTES = 1440 * 1024

Kind = Literal["multiboot", "disk"]


@dataclass(frozen=True, slots=True)
class Image:
    """One built image.

    Attributes:
        name: what a user calls it.
        summary: what it shows, in one line.
        kind: "multiboot" (an ELF kernel for multiboot 1) or "disk" (raw sectors that a BIOS boots).
        sources: C and assembly files, relative to this package, in the order in which they are linked.
        script: the linker script, relative to this package.
        flags: what this image asks of the compiler beyond the common flags.
    """

    name: str
    summary: str
    kind: Kind
    sources: tuple[str, ...]
    script: str
    flags: tuple[str, ...] = ()

    @property
    def file_name(self) -> str:
        """Name of the file that is loaded or booted."""
        return f"{self.name}.elf" if self.kind == "multiboot" else f"{self.name}.img"

    @property
    def symbols_file_name(self) -> str:
        """Name of the ELF file with symbols and lines for a debugger; the image itself, if that is ELF."""
        return f"{self.name}.elf"


_DEMO_SOURCES = (
    *("demo/boot.S", "demo/entry.S", "demo/main.c", "demo/segments.c", "demo/traps.c", "demo/interrupts.c"),
    *("demo/memory.c", "demo/tasks.c", "demo/syscall.c", "demo/serial.c", "demo/screen.c", "demo/print.c"),
    *("demo/programs.c", "demo/shell.c"),
    *("demo/user/start.S", "demo/user/library.c", "demo/user/primes.c", "demo/user/clock.c", "demo/user/crash.c"),
)


def _tiny(name: str, summary: str) -> Image:
    return Image(f"tiny-{name}", summary, "multiboot", (f"tiny/{name}.S",), "tiny/tiny.ld")


IMAGES = (
    Image(
        "demo",
        "a small kernel with paging, tasks in ring 3, system calls and a shell on COM1",
        "multiboot",
        _DEMO_SOURCES,
        "demo/kernel.ld",
        ("-Og",),
    ),
    Image(
        "boot",
        "a boot sector that reads itself from disk, asks the BIOS about memory and enters protected mode",
        "disk",
        ("boot/sector.S", "boot/rest.S", "boot/protected.S"),
        "boot/boot.ld",
    ),
    Image(
        "bench",
        "compute kernels chosen by the command line",
        "multiboot",
        ("bench/start.S", "bench/guest.c", "bench/kernels.c", "bench/x87.c", "bench/sse2.c"),
        "bench/bench.ld",
        ("-O2",),
    ),
    Image(
        "nano",
        "nanobenchmarks of system instructions, exceptions and paging, chosen by the command line",
        "multiboot",
        ("nano/entry.S", "nano/main.c"),
        "nano/nano.ld",
        ("-O2",),
    ),
    Image(
        "fork",
        "processes in ring 3 with copy-on-write fork, for workloads chosen by the command line",
        "multiboot",
        (
            *("fork/entry.S", "fork/main.c", "fork/memory.c", "fork/processes.c", "fork/traps.c"),
            *("fork/user.c", "fork/compute.c"),
        ),
        "fork/fork.ld",
        ("-O2",),
    ),
    _tiny("triple", "a triple fault by way of #UD, #NP and #DF"),
    _tiny("hlt", "ten timer interrupts, waited for by HLT"),
    _tiny("loop", "a jump to itself"),
    _tiny("exit", "leaves through the debug-exit port with the status given on the command line"),
    _tiny("selfmod", "code that changes code, in five ways"),
    _tiny("stepper", "instructions that are easily stepped over wrongly, each under a name"),
)

NAMES = tuple(image.name for image in IMAGES)


def image(name: str) -> Image:
    """Return the image called `name`.

    Raises:
        KeyError: there is none; the message lists those that there are.
    """
    for candidate in IMAGES:
        if candidate.name == name:
            return candidate
    raise KeyError(f"no guest is called {name!r}; there are {', '.join(NAMES)}")


def built_directory() -> Path:
    """Return the directory of the images that ship with the package."""
    return Path(str(importlib.resources.files("guests") / "built"))


def source_root() -> Path:
    """Return the directory that the file names in the images' debug information are relative to.

    It is what gdb's `directory` command wants: the names begin with `guests/`.
    """
    return Path(str(importlib.resources.files("guests"))).parent


def path(name: str) -> Path:
    """Return the file of the image called `name`, to be loaded or booted.

    Raises:
        KeyError: there is no such image.
    """
    return built_directory() / image(name).file_name


def symbols_path(name: str) -> Path:
    """Return the ELF file that a debugger reads for the image called `name`.

    Raises:
        KeyError: there is no such image.
    """
    return built_directory() / image(name).symbols_file_name


def floppy(name: str) -> bytes:
    """Return a whole 1.44 MB floppy, FLOPPY_BYTES long, that begins with the disk image called `name`.

    Raises:
        KeyError: there is no such image.
        ValueError: it is not a disk image.
    """
    if image(name).kind != "disk":
        raise ValueError(f"{name} is not a disk image")
    return path(name).read_bytes().ljust(FLOPPY_BYTES, b"\0")
