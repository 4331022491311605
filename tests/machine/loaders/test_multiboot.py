"""Multiboot 1: the header's rules, the information structure, modules, symbols."""

import itertools
from pathlib import Path
from typing import Any

import pytest

from machine.e820 import memory_map
from machine.loaders import ImageError, ImageKind, LoadedImage, LoadOptions, Module, elf, load, multiboot, parse_modules
from tests.machine.loaders.images import (
    ElfSection,
    ElfSegment,
    elf_image,
    kludge_image,
    multiboot_elf,
    multiboot_header,
    read,
    read_string,
)

MIB = 1 << 20


def information(loaded: LoadedImage) -> Any:  # noqa: ANN401 - construct's container
    return multiboot.INFO.parse(read(loaded.writes, loaded.entry.gpr[3], multiboot.INFO.sizeof()))


def test_machine_state() -> None:
    loaded = load(multiboot_elf())
    entry = loaded.entry
    assert loaded.kind is ImageKind.MULTIBOOT
    assert (entry.gpr[0], entry.eip) == (0x2BADB002, 0x10000C)
    assert entry.cr0 & 0x8000_0001 == 1
    assert entry.eflags & 0x20200 == 0
    assert entry.a20
    es, cs, ss, ds, fs, gs = entry.segments
    assert es == ss == ds == fs == gs
    assert (cs.base, cs.limit, cs.attributes & 0x41F) == (0, 0xFFFF_FFFF, 0x41B)
    assert (ds.base, ds.limit, ds.attributes & 0x41F) == (0, 0xFFFF_FFFF, 0x413)
    assert (cs.selector, ds.selector) == (0x08, 0x10)


def test_memory_and_strings() -> None:
    info = information(loaded := load(multiboot_elf(), LoadOptions(ram_bytes=32 * MIB, command_line="root=hd0 x")))
    assert info.flags == 0b10_0100_1111
    assert (info.mem_lower, info.mem_upper) == (639, 31 * 1024)
    assert read_string(loaded.writes, info.cmdline) == "image root=hd0 x"
    assert read_string(loaded.writes, info.boot_loader_name) == "trapgate"
    assert (info.mods_count, info.mods_addr) == (0, 0)
    entries = []
    at = info.mmap_addr
    while at < info.mmap_addr + info.mmap_length:
        entry = multiboot.MMAP_ENTRY.parse(read(loaded.writes, at, 24))
        entries.append((entry.base, entry.length, entry.type))
        at += entry.size + 4
    assert entries == [(region.base, region.length_bytes, region.kind) for region in memory_map(32 * MIB)]


def test_the_folder_of_an_image_is_not_told(tmp_path: Path) -> None:
    loaded = []
    for folder in (tmp_path / "a", tmp_path / "a much longer name"):
        folder.mkdir()
        (folder / "kernel.elf").write_bytes(multiboot_elf())
        loaded.append(load(folder / "kernel.elf", LoadOptions(command_line="root=hd0")))
    assert read_string(loaded[0].writes, information(loaded[0]).cmdline) == "kernel.elf root=hd0"
    assert loaded[0].writes == loaded[1].writes


def test_modules() -> None:
    modules = (Module(b"A" * 5000, "first arg,s"), Module(b"", "empty"), Module(b"BB", "second"))
    info = information(loaded := load(multiboot_elf(), LoadOptions(modules=modules)))
    table = [multiboot.MODULE_ENTRY.parse(read(loaded.writes, info.mods_addr + 16 * index, 16)) for index in range(3)]
    assert info.mods_count == 3
    assert [read_string(loaded.writes, module.string) for module in table] == ["first arg,s", "empty", "second"]
    assert [module.mod_start % 4096 for module in table] == [0, 0, 0]
    assert [module.mod_end - module.mod_start for module in table] == [5000, 0, 2]
    assert [read(loaded.writes, module.mod_start, 2) for module in table[::2]] == [b"AA", b"BB"]
    kernel_end = 0x101800
    assert kernel_end <= table[0].mod_start
    assert all(first.mod_end <= second.mod_start for first, second in itertools.pairwise(table))


def test_module_files(tmp_path: Any) -> None:  # noqa: ANN401
    path = tmp_path / "initrd"
    path.write_bytes(b"content")
    loaded = load(multiboot_elf(), LoadOptions(modules=parse_modules(f"{path} a b")))
    module = multiboot.MODULE_ENTRY.parse(read(loaded.writes, information(loaded).mods_addr, 16))
    assert read(loaded.writes, module.mod_start, 7) == b"content"
    assert read_string(loaded.writes, module.string) == f"{path} a b"
    for bad in (tmp_path / "absent", tmp_path):
        with pytest.raises(ImageError, match=str(bad)):
            load(multiboot_elf(), LoadOptions(modules=parse_modules(str(bad))))


@pytest.mark.parametrize(
    ("text", "modules"),
    [
        ("a", [("a", "a")]),
        ("a x y,b", [("a", "a x y"), ("b", "b")]),
        ("a x,,y,b", [("a", "a x,y"), ("b", "b")]),
        ("a,,b", [("a,b", "a,b")]),
    ],
)
def test_parse_modules(text: str, modules: list[tuple[str, str]]) -> None:
    assert [(module.source, module.command_line) for module in parse_modules(text)] == modules


@pytest.mark.parametrize("text", ["", "a,", " a"])
def test_modules_without_name(text: str) -> None:
    with pytest.raises(ImageError, match="no file name"):
        parse_modules(text)


def test_elf_sections_reach_the_kernel() -> None:
    sections = [
        ElfSection(b"", 0),
        ElfSection(b"symbols!", 2),
        ElfSection(b"\0names\0", 3),
        ElfSection(b"debugging", 1),
        ElfSection(b"\0alloc\0", 3, flags=2, address=0x100010),
    ]
    loaded = load(multiboot_elf(sections=sections))
    info = information(loaded)
    assert info.flags & 1 << 5
    assert (info.elf_num, info.elf_size, info.elf_shndx) == (5, 40, 0)
    table = [elf.SECTION_HEADER.parse(read(loaded.writes, info.elf_addr + 40 * index, 40)) for index in range(5)]
    assert read(loaded.writes, table[1].addr, 8) == b"symbols!"
    assert read(loaded.writes, table[2].addr, 7) == b"\0names\0"
    assert (table[0].addr, table[3].addr, table[4].addr) == (0, 0, 0x100010)
    assert min(table[1].addr, table[2].addr, info.elf_addr) >= 0x101800


def test_no_sections_no_flag() -> None:
    assert not information(load(multiboot_elf())).flags & 1 << 5


@pytest.mark.parametrize("flags", [0, 1, 2, 3, 7, 0xFFFE_0003])
def test_accepted_flags(flags: int) -> None:
    info = information(load(multiboot_elf(flags)))
    assert bool(info.flags & 1 << 12) == bool(flags & 4)
    if flags & 4:
        assert (info.framebuffer_addr, info.framebuffer_type) == (0xB8000, 2)
        assert (info.framebuffer_width, info.framebuffer_height, info.framebuffer_pitch) == (80, 25, 160)


@pytest.mark.parametrize("bit", range(3, 16))
def test_unknown_requirements_are_refused(bit: int) -> None:
    with pytest.raises(ImageError, match=rf"offset 0x54 requires unknown features: flags {1 << bit:#x}"):
        load(multiboot_elf(3 | 1 << bit))


@pytest.mark.parametrize(
    ("start", "offset"),
    [
        (multiboot_header(3), 0),
        (bytes(8192 - 12) + multiboot_header(3), 8192 - 12),
        (bytes(8192 - 11) + multiboot_header(3), None),
        (bytes(8192 - 8) + multiboot_header(3), None),
        (bytes(2) + multiboot_header(3), None),
        (multiboot_header(3)[:-1], None),
        (multiboot_header(3, checksum_off_by=1), None),
        (bytes(2) + multiboot_header(3) + bytes(2) + multiboot_header(0), 16),
        (multiboot_header(3, checksum_off_by=1) + multiboot_header(0), 12),
        (multiboot_header(0xFFFF_FFFF), 0),
    ],
)
def test_header_search(start: bytes, offset: int | None) -> None:
    found = multiboot.find_header(start + b"\xff" * 3)
    assert (found.offset if found else None) == offset


def test_address_fields() -> None:
    loaded = load(kludge_image(before=16, after=b"0123456789", load_end_addr=0x100000 + 16 + 32 + 8))
    (kernel,) = [write for write in loaded.writes if write.physical == 0x100000]
    assert kernel.data == kludge_image(before=16, after=b"01234567", load_end_addr=0x100000 + 16 + 32 + 8)
    assert kernel.zero_bytes == 0
    assert loaded.entry.eip == 0x100000 + 16 + 32


def test_address_fields_to_the_end_of_the_file_with_bss() -> None:
    image = kludge_image(after=b"0123", bss_end_addr=0x105000)
    (kernel,) = [write for write in load(image).writes if write.physical == 0x100000]
    assert (kernel.data, kernel.end) == (image, 0x105000)


def test_address_fields_skip_the_start_of_the_file() -> None:
    image = kludge_image(before=64, load_addr=0x100030, header_addr=0x100040)
    (kernel,) = [write for write in load(image).writes if write.physical == 0x100030]
    assert kernel.data == image[48:]


def test_address_fields_win_over_elf() -> None:
    addresses = {"header_addr": 0x300054, "load_addr": 0x300000, "load_end_addr": 0, "bss_end_addr": 0}
    fields = multiboot.ADDRESS_FIELDS.build(addresses | {"entry_addr": 0x300074})
    loaded = load(elf_image([ElfSegment(multiboot_header(0x10003) + fields, 0x100000)]))
    assert loaded.entry.eip == 0x300074
    assert loaded.writes[-1].physical == 0x300000


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (kludge_image(load_addr=0x100004), "outside the file"),
        (kludge_image(load_addr=0xFFFFC), "outside the file"),
        (kludge_image(load_end_addr=0xFFFFF), "load_end_addr 0xfffff is below load_addr"),
        (
            kludge_image(load_end_addr=0x200000),
            "truncated: multiboot header at offset 0x0 needs the file up to 0x100000",
        ),
        (kludge_image(bss_end_addr=0x100010), "bss_end_addr 0x100010 is below the end of the data"),
        (kludge_image(bss_end_addr=0xFFFF_FFFF), "does not fit into 64 MiB of RAM"),
        (kludge_image(load_addr=0xF0000, header_addr=0xF0000), "reaches into the video memory and ROM"),
        (kludge_image(load_addr=0xFFFF_FFF0, header_addr=0xFFFF_FFF0), "does not fit into 64 MiB of RAM"),
        (kludge_image()[:20], "truncated: multiboot address fields at offset 0xc"),
        (multiboot_header(3) + bytes(100), "gives no addresses .* not ELF"),
        (multiboot_header(3) * 2, "gives no addresses"),
    ],
)
def test_bad_kernels(image: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        load(image)
    assert "\n" not in str(caught.value)


def test_information_keeps_out_of_a_low_kernel() -> None:
    image = elf_image([ElfSegment(multiboot_header(3) + b"k" * 0x1000, 0x9000, memory_bytes=0x90000)], entry=0x900C)
    loaded = load(image, LoadOptions(command_line="x"))
    assert information(loaded).mem_lower == 639
    for first, second in itertools.pairwise(loaded.writes):
        assert first.end <= second.physical
    filling = elf_image([ElfSegment(multiboot_header(3), 0x8000, memory_bytes=0x97C00)], entry=0x900C)
    assert load(filling).entry.gpr[3] >= MIB


def test_what_does_not_fit() -> None:
    with pytest.raises(ImageError, match=r"module 0 \(big\) at 0x102000 .* does not fit into 2 MiB"):
        load(multiboot_elf(), LoadOptions(ram_bytes=2 * MIB, modules=(Module(bytes(MIB), "big file"),)))
    long_line = load(multiboot_elf(), LoadOptions(command_line="y" * 0xA0000))
    assert information(long_line).cmdline >= MIB
    with pytest.raises(ImageError, match=r"command line at .* does not fit"):
        load(multiboot_elf(), LoadOptions(ram_bytes=2 * MIB, command_line="y" * 2 * MIB))


def test_strings_that_are_none() -> None:
    with pytest.raises(ImageError, match="NUL character"):
        load(multiboot_elf(), LoadOptions(command_line="a\0b"))
    with pytest.raises(ImageError, match="cannot be encoded"):
        load(multiboot_elf(), LoadOptions(command_line="\ud800"))
    line = load(multiboot_elf(), LoadOptions(command_line="\udcff"))
    assert read(line.writes, information(line).cmdline, 8) == b"image \xff\0"
