"""Plain ELF executables: where their segments go, and which files are refused with which words."""

import pytest

from machine.loaders import ImageError, ImageKind, LoadOptions, load
from machine.loaders.entry import STACK_TOP
from tests.machine.loaders.images import ElfSection, ElfSegment, elf_image, read

MIB = 1 << 20


def test_segments_and_entry_state() -> None:
    image = elf_image(
        [ElfSegment(b"text", 0x100000), ElfSegment(b"data", 0x200000, memory_bytes=0x2000, flags=6)],
        entry=0x100002,
    )
    loaded = load(image)
    assert loaded.kind is ImageKind.ELF
    assert [(write.physical, write.data, write.zero_bytes) for write in loaded.writes] == [
        (0x100000, b"text", 0),
        (0x200000, b"data", 0x1FFC),
    ]
    entry = loaded.entry
    assert (entry.eip, entry.linear, entry.gpr) == (0x100002, 0x100002, (0, 0, 0, 0, STACK_TOP, 0, 0, 0))
    assert (entry.protected, entry.eflags, entry.a20) == (True, 2, True)
    assert {segment.base for segment in entry.segments} == {0}
    assert {segment.limit for segment in entry.segments} == {0xFFFF_FFFF}


def test_segments_go_to_physical_addresses() -> None:
    loaded = load(elf_image([ElfSegment(b"text", 0x100000, linear=0xC0100000)], entry=0xC0100001))
    assert loaded.writes[0].physical == 0x100000
    assert loaded.entry.eip == 0x100001


def test_a_physical_entry_stays() -> None:
    segments = [ElfSegment(b"text", 0x200000, linear=0x100000), ElfSegment(b"boot", 0x100000, linear=0x100000)]
    assert load(elf_image(segments, entry=0x100001)).entry.eip == 0x100001


def test_other_program_headers_and_empty_segments_are_passed_over() -> None:
    image = elf_image(
        [
            ElfSegment(b"note", 0x100000, kind=4),
            ElfSegment(b"", 0x100000),
            ElfSegment(b"text", 0x100000),
        ]
    )
    assert [write.data for write in load(image).writes] == [b"text"]


def test_headers_placed_below_1_mib_are_dropped() -> None:
    segments = [ElfSegment(b"h" * 0x80, 0xFF000, flags=4), ElfSegment(b"text", 0x100000)]
    assert [write.physical for write in load(elf_image(segments)).writes] == [0x100000]
    straddling = ElfSegment(b"x" * 0x20, 0xFFFF0, memory_bytes=0x40, fields={"offset": 0, "filesz": 0x20}, flags=7)
    (write,) = load(elf_image([straddling])).writes
    assert (write.physical, len(write.data), write.zero_bytes) == (0x100000, 0x10, 0x20)
    assert write.data == elf_image([straddling])[0x10:0x20]


@pytest.mark.parametrize("flags", [1, 2, 5, 6, 7])
def test_code_and_data_in_the_hole_are_refused(flags: int) -> None:
    with pytest.raises(ImageError, match="reaches into the video memory and ROM"):
        load(elf_image([ElfSegment(b"text", 0xF0000, flags=flags)]))


def one(**fields: int) -> list[ElfSegment]:
    return [ElfSegment(b"text", 0x100000, fields=fields)]


IDENT64 = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
BIG_ENDIAN = b"\x7fELF\x01\x02\x01".ljust(16, b"\0")


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (elf_image(one(), ident=IDENT64), r"ELF64: a 64-bit image, this is a 32-bit machine \(offset 0x4\)"),
        (elf_image(one(), ident=BIG_ENDIAN), r"not little-endian \(offset 0x5\)"),
        (elf_image(one(), ident=b"\x7fELF\x07\x01".ljust(16, b"\0")), r"ELF class 7 unknown"),
        (elf_image(one(), machine=62), r"another machine: x86-64, not i386 \(offset 0x12\)"),
        (elf_image(one(), machine=9999), r"another machine: 9999"),
        (elf_image(one(), machine=183), "another machine: AArch64"),
        (elf_image(one(), machine=40), "another machine: ARM,"),
        (elf_image(one(), type=1), r"a relocatable object, not an executable \(offset 0x10\)"),
        (elf_image(one(), type=3), r"a shared object or position-independent executable"),
        (elf_image(one(), type=77), r"of type 77"),
        (elf_image(one())[:30], r"truncated: ELF header at offset 0x0 needs 52 bytes, file has 0x1e"),
        (elf_image(one())[:10], r"truncated: ELF header"),
        (elf_image(one())[:60], r"truncated: ELF program header 0 at offset 0x34 needs 32 bytes, file has 0x3c"),
        (elf_image(one())[:-1], r"truncated: ELF program header 0 at offset 0x34 needs the file up to 0x58"),
        (elf_image(one(), phoff=0xFFFFFFF0), r"truncated: ELF program header 0 at offset 0xfffffff0"),
        (elf_image(one(), phentsize=64), r"program headers of 64 bytes each, not 32 \(offset 0x2a\)"),
        (elf_image(one(), phnum=0), r"no segment to load"),
        (elf_image([ElfSegment(b"text", 0x100000, kind=4)]), r"no segment to load"),
        (elf_image(one(memsz=2)), r"program header 0 at offset 0x34: 0x4 bytes in the file, only 0x2 in memory"),
        (elf_image(one(offset=0xFFFFFFFF)), r"truncated: .*needs the file up to 0x100000003"),
        (elf_image(one(paddr=0xFFFFFFFE)), r"physical range from 0xfffffffe on passes 4 GiB"),
        (elf_image(one(paddr=64 * MIB)), r"ELF segment 0 at 0x4000000 to 0x4000003 does not fit into 64 MiB of RAM"),
        (elf_image(one(memsz=0xF0000000 - 0x100000)), r"does not fit into 64 MiB of RAM"),
        (elf_image(one(paddr=0x9FFFE)), r"reaches into the video memory and ROM"),
        (
            elf_image([ElfSegment(b"text", 0x100000), ElfSegment(b"data", 0x100003)]),
            r"ELF segment 1 at 0x100003 to 0x100006 overlaps ELF segment 0 at 0x100000 to 0x100003",
        ),
        (
            elf_image([ElfSegment(b"text", 0x100010), ElfSegment(b"data", 0x100000, memory_bytes=0x11)]),
            r"segment 1 .* overlaps ELF segment 0",
        ),
        (
            elf_image([ElfSegment(b"text", 0x100010), ElfSegment(b"data", 0x100000, memory_bytes=0x1000)]),
            r"segment 1 .* overlaps ELF segment 0",
        ),
        (elf_image(one(), [ElfSection(b"x", 1)], shentsize=64), r"section headers of 64 bytes each, not 40"),
        (elf_image(one(), [ElfSection(b"x", 1)])[:-1], r"truncated: ELF section header 0"),
        (
            elf_image(one(), [ElfSection(b"x", 2, fields={"size": 0x1000})]),
            r"truncated: ELF section header 0 at offset 0x59 needs the file up to 0x1058, it has 0x81 bytes",
        ),
        (elf_image(one(), [ElfSection(b"x", 3, fields={"offset": 0x82})]), r"truncated: ELF section"),
    ],
)
def test_bad_files(image: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        load(image)
    assert "\n" not in str(caught.value)


def test_touching_segments_do_not_overlap() -> None:
    image = elf_image([ElfSegment(b"data", 0x100004), ElfSegment(b"text", 0x100000), ElfSegment(b"more", 0x100008)])
    assert read(load(image).writes, 0x100000, 12) == b"textdatamore"


def test_ram_size_counts_to_the_last_byte() -> None:
    image = elf_image([ElfSegment(b"text", 0x1FFFFC)], entry=0x1FFFFC)
    assert load(image, LoadOptions(ram_bytes=2 * MIB)).entry.eip == 0x1FFFFC
    with pytest.raises(ImageError, match="2 MiB of RAM"):
        load(elf_image([ElfSegment(b"text", 0x1FFFFD)]), LoadOptions(ram_bytes=2 * MIB))
