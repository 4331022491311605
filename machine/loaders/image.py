"""What every loader returns, and what it is asked with.

It owns the description of a load that can be carried out again at each restart; it must not know any file format.
"""

import enum
from dataclasses import dataclass
from pathlib import Path

from machine.disk import Disk, Media
from machine.loaders.entry import EntryState, apply
from machine.loaders.errors import ImageError
from machine.loaders.layout import MemoryWrite
from machine.memory import PhysicalMemory
from machine.state import CpuState

#: Files larger than this are not read into memory; disk images are read as the guest needs them and have no limit.
MAX_FILE_BYTES = 1 << 30


class ImageKind(enum.Enum):
    """The formats, in words for users."""

    MULTIBOOT = "multiboot kernel"
    ELF = "ELF executable"
    LINUX = "Linux kernel"
    FLAT = "flat binary"
    DISK = "disk image"


@dataclass(frozen=True, slots=True)
class Module:
    """A boot module (an initrd): where its bytes are, and the string that the kernel is given with it."""

    source: str | bytes
    command_line: str

    def read(self) -> bytes:
        """Its bytes.

        Raises:
            ImageError: the file cannot be read.
        """
        return self.source if isinstance(self.source, bytes) else read_file(self.source)


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """What besides the image decides how it is loaded.

    Attributes:
        ram_bytes: size of the guest's RAM.
        command_line: arguments for the kernel (`--append`).
        modules: boot modules (`--initrd`).
        kind: force a format; None detects it.
        kernel: a kernel is meant: a disk image is refused, and a kernel of the size of a floppy is still one.
        load_address: physical address for a flat binary; giving one makes the image flat unless `kind` says otherwise.
        entry: linear address of a flat binary's first instruction; None: its first byte.
        entry_bits: 16 enters a flat binary in real mode, 32 in flat protected mode.
        media: put a disk image into this kind of drive; None: a floppy's size or FAT boot sector makes it a floppy.
    """

    ram_bytes: int = 64 << 20
    command_line: str = ""
    modules: tuple[Module, ...] = ()
    kind: ImageKind | None = None
    kernel: bool = False
    load_address: int | None = None
    entry: int | None = None
    entry_bits: int = 32
    media: Media | None = None


@dataclass(frozen=True, slots=True)
class LoadedImage:
    """Everything that puts a machine, after power-on and the BIOS's self-test, at the image's first instruction.

    Attributes:
        writes: memory to be written, ascending, without overlap, all inside RAM.
        entry: registers at the first instruction.
        disk: the boot disk of a disk image, which the BIOS then boots; None for what is loaded directly.
    """

    kind: ImageKind
    name: str
    writes: tuple[MemoryWrite, ...]
    entry: EntryState
    disk: Disk | None = None

    def install(self, cpu: CpuState, memory: PhysicalMemory) -> None:
        """Write memory and set the CPU; can be done again after every reset, with the same outcome."""
        apply(self.entry, cpu, memory)
        for write in self.writes:
            write.perform(memory)


def read_file(path: str) -> bytes:
    """A regular file's bytes.

    Raises:
        ImageError: it cannot be read, is not a regular file, or has more than `MAX_FILE_BYTES`.
    """
    file = Path(path)
    try:
        if not file.is_file():
            raise ImageError(f"{path}: {'not a regular file' if file.exists() else 'No such file or directory'}")
        if file.stat().st_size > MAX_FILE_BYTES:
            raise ImageError(f"{path}: more than {MAX_FILE_BYTES >> 20} MiB")
        return file.read_bytes()
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror}") from error
    except ValueError as error:  # a NUL in the name
        raise ImageError(f"{path!r}: {error}") from error


def parse_modules(text: str) -> tuple[Module, ...]:
    """Split `--initrd` as QEMU does: modules are separated by commas, `,,` stands for a comma, words after the file
    name are arguments. The kernel is given the whole text of a module, name and arguments.

    Raises:
        ImageError: a module without a file name.
    """
    modules = []
    for part in text.replace(",,", "\0").split(","):
        string = part.replace("\0", ",")
        name = string.split(" ", 1)[0]
        if not name:
            raise ImageError(f"no file name in module {string!r} of --initrd {text!r}")
        modules.append(Module(name, string))
    return tuple(modules)


def c_string(text: str) -> bytes:
    """The string as the kernel sees it, with the NUL at its end; bytes of file names that are not UTF-8 come through.

    Raises:
        ImageError: it contains a NUL or cannot be encoded.
    """
    if "\0" in text:
        raise ImageError(f"NUL character in {text!r}")
    try:
        return text.encode("utf-8", "surrogateescape") + b"\0"
    except UnicodeEncodeError as error:
        raise ImageError(f"{text!r} cannot be encoded: {error.reason}") from error
