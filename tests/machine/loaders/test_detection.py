"""Which format an image is taken for, addresses behind file names, and files that are none of ours."""

from pathlib import Path

import pytest

from machine.disk import FLOPPIES, SECTOR_BYTES, Media
from machine.loaders import ImageError, ImageKind, LoadOptions, Module, detect, load
from machine.loaders.multiboot import MULTIBOOT2_MAGIC
from tests.machine.loaders.images import (
    ElfSegment,
    elf_image,
    kludge_image,
    linux_image,
    multiboot_elf,
    multiboot_header,
)

BOOT_SECTOR = bytes(510) + b"\x55\xaa"
PLAIN_ELF = elf_image([ElfSegment(b"text", 0x100000)])


def with_signature(image: bytes) -> bytes:
    return image[:510].ljust(510, b"\0") + b"\x55\xaa" + image[512:]


@pytest.mark.parametrize(
    ("image", "kind"),
    [
        (multiboot_elf(), ImageKind.MULTIBOOT),
        (kludge_image(), ImageKind.MULTIBOOT),
        (with_signature(kludge_image()), ImageKind.MULTIBOOT),
        (BOOT_SECTOR + multiboot_header(3) + bytes(512), ImageKind.DISK),
        (with_signature(multiboot_elf(text=bytes(600))), ImageKind.MULTIBOOT),
        (PLAIN_ELF, ImageKind.ELF),
        (linux_image(), ImageKind.LINUX),
        (BOOT_SECTOR, ImageKind.DISK),
        (BOOT_SECTOR + bytes(1 << 20), ImageKind.DISK),
        (BOOT_SECTOR[:-1], None),
        (bytes(1024), None),
        (b"", None),
    ],
)
def test_detect(image: bytes, kind: ImageKind | None) -> None:
    assert detect(image[: 64 << 10], len(image)) is kind


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        (with_signature(linux_image()), ImageKind.LINUX),
        (with_signature(kludge_image()), ImageKind.MULTIBOOT),
        (BOOT_SECTOR + multiboot_header(3) + bytes(512), ImageKind.MULTIBOOT),
    ],
)
def test_a_kernel_written_to_a_floppy_is_a_floppy_unless_a_kernel_is_meant(kernel: bytes, kind: ImageKind) -> None:
    for sectors in FLOPPIES:
        floppy = kernel.ljust(sectors * SECTOR_BYTES, b"\0")
        loaded = load(floppy)
        assert loaded.kind is ImageKind.DISK
        assert loaded.disk is not None
        assert loaded.disk.media is Media.FLOPPY
        assert detect(floppy[: 64 << 10], len(floppy), kernel=True) is kind
        assert detect(floppy[: 64 << 10], len(floppy) + 1, kernel=True) is kind


@pytest.mark.parametrize("image", [linux_image(), kludge_image()])
def test_the_size_of_a_floppy_alone_makes_none(image: bytes) -> None:
    unsigned = bytearray(image.ljust(2880 * SECTOR_BYTES, b"\0"))
    unsigned[510:512] = b"\0\0"
    signed_and_longer = with_signature(image).ljust(2881 * SECTOR_BYTES, b"\0")
    for other in (bytes(unsigned), signed_and_longer):
        assert detect(other, len(other)) is detect(image, len(image))
    executable = with_signature(multiboot_elf(text=bytes(600))).ljust(2880 * SECTOR_BYTES, b"\0")
    assert detect(executable, len(executable)) is ImageKind.MULTIBOOT


def test_a_linux_kernel_of_the_size_of_a_floppy(tmp_path: Path) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(with_signature(linux_image()).ljust(2880 * SECTOR_BYTES, b"\0"))
    assert load(path, LoadOptions(kernel=True)).kind is ImageKind.LINUX
    assert load(path).kind is ImageKind.DISK


def test_a_disk_is_no_kernel() -> None:
    with pytest.raises(ImageError, match=r"^a disk image, not a kernel: it boots without --kernel before it$"):
        load(BOOT_SECTOR, LoadOptions(kernel=True))
    with pytest.raises(ImageError, match="100 bytes, no multiboot or ELF header"):
        load(bytes(100), LoadOptions(kernel=True))
    assert load(BOOT_SECTOR, LoadOptions(kernel=True, kind=ImageKind.DISK)).disk is not None


def test_disk_image_is_left_to_the_bios() -> None:
    loaded = load(BOOT_SECTOR)
    assert loaded.disk is not None
    assert loaded.disk.read(0, 1) == BOOT_SECTOR
    assert loaded.writes == ()
    assert (loaded.entry.segments[1].selector, loaded.entry.segments[1].base, loaded.entry.eip) == (
        0xF000,
        0xFFFF0000,
        0xFFF0,
    )
    assert not loaded.entry.protected


def test_disk_file(tmp_path: Path) -> None:
    path = tmp_path / "floppy.img"
    path.write_bytes(BOOT_SECTOR.ljust(2880 * 512, b"f"))
    loaded = load(path)
    assert loaded.disk is not None
    assert loaded.disk.media is Media.FLOPPY
    assert loaded.disk.read(2879, 1) == b"f" * 512
    loaded.disk.close()


@pytest.mark.parametrize("media", [*Media, None])
def test_kind_of_drive_can_be_chosen(media: Media | None) -> None:
    loaded = load(BOOT_SECTOR, LoadOptions(media=media))
    assert loaded.disk is not None
    assert loaded.disk.media is (media or Media.HARD)


@pytest.mark.parametrize("suffix", ["@0x200000", "@2097152", "@0X200000"])
def test_address_behind_the_name(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "raw.bin"
    path.write_bytes(b"\x90\xf4")
    loaded = load(f"{path}{suffix}")
    assert loaded.kind is ImageKind.FLAT
    (write,) = loaded.writes
    assert (write.physical, write.data, loaded.entry.eip) == (0x200000, b"\x90\xf4", 0x200000)
    assert loaded.entry.protected


def test_a_file_really_named_so_wins(tmp_path: Path) -> None:
    path = tmp_path / "raw.bin@0x100"
    path.write_bytes(BOOT_SECTOR)
    assert load(path).kind is ImageKind.DISK


@pytest.mark.parametrize(
    ("address", "entry", "selector", "ip"),
    [(0x7C00, None, 0, 0x7C00), (0x1000, 0x12345, 0x1000, 0x2345), (0x500, 0xFFFFF, 0xF000, 0xFFFF)],
)
def test_real_mode_entry(address: int, entry: int | None, selector: int, ip: int) -> None:
    loaded = load(b"\xf4", LoadOptions(load_address=address, entry=entry, entry_bits=16))
    assert not loaded.entry.protected
    for segment in loaded.entry.segments:
        assert (segment.selector, segment.base, segment.limit) == (selector, selector << 4, 0xFFFF)
    assert (loaded.entry.eip, loaded.entry.linear) == (ip, address if entry is None else entry)


def test_address_zero_is_one() -> None:
    loaded = load(b"\xf4" * 3, LoadOptions(load_address=0, entry=2))
    assert (loaded.writes[0].physical, loaded.entry.eip) == (0, 2)


def test_an_address_makes_any_image_flat() -> None:
    assert load(PLAIN_ELF, LoadOptions(load_address=0x100000)).kind is ImageKind.FLAT
    assert load(PLAIN_ELF, LoadOptions(load_address=0x100000, kind=ImageKind.ELF)).kind is ImageKind.ELF


def test_kind_can_be_forced() -> None:
    assert load(bytes(1024), LoadOptions(kind=ImageKind.DISK)).disk is not None
    with pytest.raises(ImageError, match="no multiboot header in the first 1024 bytes"):
        load(bytes(1024), LoadOptions(kind=ImageKind.MULTIBOOT))
    with pytest.raises(ImageError, match="ELF header at offset 0x0"):
        load(bytes(1024), LoadOptions(kind=ImageKind.ELF))
    with pytest.raises(ImageError, match="needs a load address"):
        load(bytes(1024), LoadOptions(kind=ImageKind.FLAT))
    with pytest.raises(ImageError, match="Linux setup header at offset 0x1f1"):
        load(bytes(1024), LoadOptions(kind=ImageKind.LINUX))


def test_multiboot_2_is_named() -> None:
    words = (MULTIBOOT2_MAGIC, 0, 24, -(MULTIBOOT2_MAGIC + 24) & 0xFFFF_FFFF)
    header = b"".join(word.to_bytes(4, "little") for word in words) + bytes(8)
    text = elf_image([ElfSegment(bytes(4) + header, 0x100000)])
    assert (text.find(header)) % 8 == 0
    with pytest.raises(ImageError, match="a multiboot 2 kernel"):
        load(text)
    assert load(text, LoadOptions(kind=ImageKind.ELF)).kind is ImageKind.ELF
    shifted = elf_image([ElfSegment(header, 0x100000)])
    assert load(shifted).kind is ImageKind.ELF


@pytest.mark.parametrize(
    ("image", "options", "message"),
    [
        (b"", LoadOptions(), "image is empty"),
        (b"", LoadOptions(load_address=0x100000), "image is empty"),
        (b"\x1f\x8b" + bytes(600), LoadOptions(), "gzip data"),
        (b"QFI\xfb" + bytes(600), LoadOptions(), "qcow2"),
        (b"#!/bin/sh\n", LoadOptions(), "a script"),
        (bytes(100), LoadOptions(), "100 bytes, no multiboot or ELF header"),
        (bytes(0x8001) + b"CD001", LoadOptions(), "CD-ROM image without a boot sector"),
        (bytes(range(256)) * 3, LoadOptions(), r"feff instead of 55aa at offset 510 \(0x1fe\)"),
        (b"x", LoadOptions(load_address=64 << 20), "does not fit into 64 MiB"),
        (b"x", LoadOptions(load_address=0xA0000), "video memory and ROM"),
        (b"x", LoadOptions(load_address=-1), "must be 32-bit numbers"),
        (b"x", LoadOptions(load_address=0x100, entry=1 << 32), "must be 32-bit numbers"),
        (b"x", LoadOptions(load_address=0x100000, entry_bits=16), "not below 1 MiB"),
        (b"x", LoadOptions(load_address=0x100000, entry_bits=64), "16 or 32 bits, not 64"),
        (b"x", LoadOptions(ram_bytes=0), "RAM of 0 bytes"),
        (b"x", LoadOptions(ram_bytes=1 << 40), "RAM of 1099511627776 bytes"),
        (bytes(510) + b"\x55\xaa" + bytes(4 << 20), LoadOptions(media=Media.FLOPPY), "too many for a floppy"),
        (BOOT_SECTOR, LoadOptions(modules=(Module(b"", "x"),)), "a disk image takes no modules"),
        (PLAIN_ELF, LoadOptions(modules=(Module(b"", "x"),)), "an? ELF executable takes no modules"),
    ],
)
def test_bad_images(image: bytes, options: LoadOptions, message: str) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        load(image, options)
    assert "\n" not in str(caught.value)


def test_bad_paths(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"absent: No such file or directory"):
        load(tmp_path / "absent")
    with pytest.raises(ImageError, match=r"absent: No such file or directory"):
        load(f"{tmp_path}/absent@0x100000")
    with pytest.raises(ImageError, match="not a regular file"):
        load(tmp_path)
    with pytest.raises(ImageError, match="not a regular file"):
        load("/dev/zero")
    with pytest.raises(ImageError, match=r"null|NUL|No such file"):
        load("a\0b")
    with pytest.raises(ImageError, match="File name too long"):
        load("x" * 5000)
    bad = tmp_path / "bad.bin"
    bad.write_bytes(b"nothing")
    with pytest.raises(ImageError) as caught:
        load(bad)
    assert str(caught.value) == (
        f"{bad}: not a bootable image: 7 bytes, no multiboot or ELF header; a flat binary needs @ADDRESS"
    )
