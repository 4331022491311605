"""Telling what an image is, and loading it: the one way in for whoever has a file or its bytes.

It owns the order in which formats are tried and how addresses are written behind a file name.
"""

import os
import re
from pathlib import Path, PurePath

from machine.disk import FLOPPIES, SECTOR_BYTES, Disk, DiskError, Media
from machine.e820 import EXTENDED, ROM_ALIAS
from machine.loaders import elf, flat, linux, multiboot
from machine.loaders.entry import EntryState, reset_entry
from machine.loaders.errors import ImageError
from machine.loaders.image import ImageKind, LoadedImage, LoadOptions, read_file
from machine.loaders.layout import Layout

_SNIFF_BYTES = 64 * 1024
_ADDRESS_SUFFIX = re.compile(r"^(.+)@(0[xX][0-9a-fA-F]+|[0-9]+)$", re.DOTALL)
_BOOT_SIGNATURE = b"\x55\xaa"
_FLOPPY_BYTES = frozenset(sectors * SECTOR_BYTES for sectors in FLOPPIES)

_FOREIGN = {
    b"\x1f\x8b": "gzip data",
    b"BZh": "bzip2 data",
    b"\xfd7zXZ\0": "xz data",
    b"PK\x03\x04": "a zip archive",
    b"MZ": "a DOS or Windows program",
    b"QFI\xfb": "a qcow2 disk image; convert it to raw",
    b"#!": "a script",
    b"!<arch>\n": "a library archive",
}


def load(image: str | os.PathLike[str] | bytes, options: LoadOptions | None = None) -> LoadedImage:
    """Describe how to load an image.

    A path may end in `@ADDRESS`, as in `kernel.bin@0x100000`, unless a file of that whole name exists; the image is
    then a flat binary. Otherwise, in this order: a multiboot header, the ELF magic, a Linux setup header, 55AAh at
    offset 510 (a boot sector, floppy or disk image).

    Kernels and disks overlap. A disk image may hold a multiboot kernel, as GRUB's do: a header in the second sector or
    later of a file with a boot signature that is not ELF does not count. A Linux kernel begins with a boot signature,
    memtest86+ even with a boot sector that works: a file with one, of exactly the size of a floppy, is a floppy that a
    kernel was written to. `LoadOptions.kernel` says that a kernel is meant, and takes both for one.

    Raises:
        ImageError: with one line that says what is wrong with the image.
    """
    options = options or LoadOptions()
    if not EXTENDED <= options.ram_bytes <= ROM_ALIAS:
        raise ImageError(f"RAM of {options.ram_bytes} bytes: must be from 1 MiB to 4095 MiB")
    if isinstance(image, bytes):
        return _load(image, "image", image, len(image), options, options.load_address)
    path = os.fspath(image)
    address = options.load_address
    match = _ADDRESS_SUFFIX.match(path)
    if match and not os.path.exists(path):  # noqa: PTH110 - Path.exists raises for a NUL in the name
        path, address = match[1], int(match[2], 0 if match[2][:2] in ("0x", "0X") else 10)
    try:
        return _load(path, path, *_read_start(path), options, address)
    except ImageError as error:
        message = str(error)
        raise (error if message.startswith(path) else ImageError(f"{path}: {message}")) from error


def detect(start: bytes, file_bytes: int, *, kernel: bool = False) -> ImageKind | None:
    """The format of a file; None if it is none that can be told.

    Args:
        start: its first 64 KiB, or all of it.
        file_bytes: its length.
        kernel: disks are not considered.
    """
    is_elf = start.startswith(elf.MAGIC)
    signed = not kernel and start[510:512] == _BOOT_SIGNATURE
    if signed and not is_elf and file_bytes in _FLOPPY_BYTES:
        return ImageKind.DISK
    header = multiboot.find_header(start)
    if header is not None and (is_elf or not signed or header.offset < 512):
        return ImageKind.MULTIBOOT
    if is_elf:
        return ImageKind.ELF
    if linux.is_linux(start):
        return ImageKind.LINUX
    return ImageKind.DISK if signed else None


def _load(
    source: str | bytes, name: str, start: bytes, file_bytes: int, options: LoadOptions, address: int | None
) -> LoadedImage:
    kind = options.kind or ImageKind.FLAT
    if options.kind is None and address is None:
        kind = _detect_or_refuse(start, file_bytes, kernel=options.kernel)
    if kind is ImageKind.ELF and options.kind is None and multiboot.has_multiboot2_header(start):
        raise ImageError("a multiboot 2 kernel; only multiboot 1 is supported")
    if options.modules and kind not in (ImageKind.MULTIBOOT, ImageKind.LINUX):
        raise ImageError(f"a {kind.value} takes no modules (--initrd)")
    if kind is ImageKind.DISK:
        return _load_disk(source, name, options.media)
    data = source if isinstance(source, bytes) else read_file(source)
    layout = Layout(options.ram_bytes)
    entry: EntryState
    if kind is ImageKind.MULTIBOOT:
        entry = multiboot.load(data, PurePath(name).name, options.command_line, options.modules, layout)
    elif kind is ImageKind.LINUX:
        entry = linux.load(data, options.command_line, options.modules, layout)
    elif kind is ImageKind.ELF:
        entry = flat.load_elf(data, layout)
    elif address is None:
        raise ImageError("a flat binary needs a load address, as in name.bin@0x100000")
    else:
        entry = flat.load_flat(data, address, options.entry, options.entry_bits, layout)
    return LoadedImage(kind, name, layout.writes, entry)


def _detect_or_refuse(start: bytes, file_bytes: int, *, kernel: bool) -> ImageKind:
    kind = detect(start, file_bytes, kernel=kernel)
    if kind is not None:
        return kind
    if detect(start, file_bytes) is ImageKind.DISK:
        raise ImageError("a disk image, not a kernel: it boots without --kernel before it")
    raise ImageError(_describe_unknown(start))


def _load_disk(source: str | bytes, name: str, media: Media | None) -> LoadedImage:
    try:
        disk = Disk.from_bytes(source, media) if isinstance(source, bytes) else Disk.open(source, media)
    except DiskError as error:
        raise ImageError(str(error)) from error
    return LoadedImage(ImageKind.DISK, name, (), reset_entry(), disk)


def _read_start(path: str) -> tuple[bytes, int]:
    """The first 64 KiB, and the length of the file."""
    try:
        file = Path(path)
        if not file.is_file():
            raise ImageError(f"{path}: {'not a regular file' if file.exists() else 'No such file or directory'}")
        with file.open("rb") as stream:
            return stream.read(_SNIFF_BYTES), os.fstat(stream.fileno()).st_size
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror}") from error
    except ValueError as error:  # a NUL in the name
        raise ImageError(f"{path!r}: {error}") from error


def _describe_unknown(start: bytes) -> str:
    if not start:
        return "image is empty"
    for magic, what in _FOREIGN.items():
        if start.startswith(magic):
            return f"not a bootable image: {what}"
    if start[0x8001:0x8006] == b"CD001":
        return "not a bootable image: a CD-ROM image without a boot sector for disks"
    if len(start) < 512:
        return f"not a bootable image: {len(start)} bytes, no multiboot or ELF header; a flat binary needs @ADDRESS"
    found = start[510:512].hex()
    return (
        "not a bootable image: no multiboot header in the first 8 KiB, no ELF or Linux header, "
        f"{found} instead of 55aa at offset 510 (0x1fe); a flat binary needs @ADDRESS"
    )
