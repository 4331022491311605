"""The 32-bit Linux boot protocol: boot parameters, command line, ramdisk, and images that it refuses."""

import pytest

from machine.loaders import ImageError, ImageKind, LoadOptions, Module, linux, load
from tests.machine.loaders.images import linux_image, read, read_string

MIB = 1 << 20


def test_entry_and_boot_parameters() -> None:
    loaded = load(linux_image(b"kernel bytes", setup_sects=3), LoadOptions(command_line="console=ttyS0"))
    assert loaded.kind is ImageKind.LINUX
    assert read(loaded.writes, 0x100000, 12) == b"kernel bytes"
    entry = loaded.entry
    boot_params = entry.gpr[6]
    assert (entry.eip, entry.gpr[3], entry.gpr[5], entry.gpr[7]) == (0x100000, 0, 0, 0)
    assert (entry.segments[1].selector, entry.segments[3].selector) == (0x10, 0x18)
    header = linux.SETUP_HEADER.parse(read(loaded.writes, boot_params + linux.HEADER_OFFSET, 512))
    assert (header.type_of_loader, header.ramdisk_size, header.vid_mode) == (0xFF, 0, 0xFFFF)
    assert read_string(loaded.writes, header.cmd_line_ptr) == "console=ttyS0"
    assert read(loaded.writes, boot_params + 0x1E8, 1) == b"\x05"
    assert read(loaded.writes, boot_params + 0x2D0 + 3 * 20, 20) == (
        (0x100000).to_bytes(8, "little") + (63 * MIB).to_bytes(8, "little") + b"\x01\0\0\0"
    )
    assert read(loaded.writes, boot_params + 0x1E0, 4) == (63 * 1024).to_bytes(4, "little")


def test_zero_setup_sectors_mean_four() -> None:
    image = bytearray(linux_image(b"k" * 4096, setup_sects=4, syssize=1))
    image[linux.HEADER_OFFSET] = 0
    assert read(load(bytes(image)).writes, 0x100000, 4096) == b"k" * 4096


def test_ramdisk_goes_as_high_as_allowed() -> None:
    options = LoadOptions(modules=(Module(b"ramdisk", "initrd"),))
    for limit, place in ((0x37FF_FFFF, 64 * MIB - 4096), (0x1FF_FFFF, 32 * MIB - 4096)):
        loaded = load(linux_image(initrd_addr_max=limit), options)
        header = linux.SETUP_HEADER.parse(read(loaded.writes, loaded.entry.gpr[6] + linux.HEADER_OFFSET, 512))
        assert (header.ramdisk_image, header.ramdisk_size) == (place, 7)
        assert read(loaded.writes, place, 7) == b"ramdisk"


def test_header_is_copied_only_as_far_as_it_goes() -> None:
    image = bytearray(linux_image())
    image[0x201] = 0x10
    loaded = load(bytes(image))
    assert read(loaded.writes, loaded.entry.gpr[6] + 0x212, 8) == bytes(8)


@pytest.mark.parametrize(
    ("image", "options", "message"),
    [
        (linux_image(version=0x201), LoadOptions(), r"boot protocol 2.01 is older than 2.02"),
        (linux_image(loadflags=0), LoadOptions(), "zImage"),
        (linux_image()[:1024], LoadOptions(), "truncated: the kernel begins at offset 0x400, the file has 0x400"),
        (linux_image()[:-16], LoadOptions(), "truncated: .* needs the file up to 0x440, it has 0x430"),
        (linux_image()[:0x210], LoadOptions(), "truncated: Linux setup header at offset 0x1f1"),
        (linux_image(code32_start=0xFFFF_FFFF), LoadOptions(), "Linux kernel .* does not fit"),
        (linux_image(), LoadOptions(modules=(Module(b"", "a"), Module(b"", "b"))), "takes one initrd, not 2"),
        (linux_image(), LoadOptions(modules=(Module(bytes(64 * MIB), "a"),)), "does not fit above the kernel"),
        (linux_image(initrd_addr_max=0), LoadOptions(modules=(Module(b"x", "a"),)), "does not fit above the kernel"),
        (linux_image(), LoadOptions(command_line="x" * 65), "command line of 65 bytes, the kernel takes 64"),
        (linux_image(), LoadOptions(command_line="\ud800"), "cannot be encoded"),
        (linux_image(), LoadOptions(command_line="a\0b"), "NUL character"),
    ],
)
def test_bad_images(image: bytes, options: LoadOptions, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        load(image, options)
