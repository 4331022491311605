"""Whatever a file holds, a loader returns or raises `ImageError`; and what it returns can be carried out."""

import itertools
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from machine.loaders import ImageError, ImageKind, LoadedImage, LoadOptions, Module, elf, load, parse_modules
from machine.memory import PhysicalMemory
from machine.state import CpuState
from tests.machine.loaders.images import (
    ElfSection,
    ElfSegment,
    elf_image,
    kludge_image,
    linux_image,
    multiboot_elf,
    multiboot_header,
)

MIB = 1 << 20
SEEDS: dict[str, bytes] = {
    "elf": elf_image([ElfSegment(b"text" * 8, 0x100000), ElfSegment(b"data", 0x200000, memory_bytes=0x800)]),
    "multiboot": multiboot_elf(
        7, sections=[ElfSection(b"", 0), ElfSection(b"symbols", elf.SHT_SYMTAB), ElfSection(b"\0n\0", elf.SHT_STRTAB)]
    ),
    "kludge": kludge_image(before=8, load_end_addr=0x100030, bss_end_addr=0x102000),
    "linux": linux_image(),
    "disk": bytes(510) + b"\x55\xaa" + bytes(512),
}
NUMBERS = st.one_of(
    st.integers(0, 0xFFFFFFFF),
    st.sampled_from((0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFF, 0x100000, 0xA0000, 0x9FC00, 16 * MIB)),
)


def check(image: LoadedImage, ram_bytes: int) -> None:
    """All writes are inside RAM, ascending and apart."""
    assert all(first.end <= second.physical for first, second in itertools.pairwise(image.writes))
    for write in image.writes:
        assert 0 <= write.physical < write.end <= ram_bytes
        assert write.physical >= MIB or write.end <= 0xA0000
    assert 0 <= image.entry.eip <= 0xFFFFFFFF
    assert len(image.entry.segments) == 6
    if image.disk is not None:
        assert len(image.disk.read(0, 1)) == 512


def load_or_refuse(data: bytes, options: LoadOptions) -> None:
    try:
        image = load(data, options)
    except ImageError as error:
        message = str(error)
    else:
        check(image, options.ram_bytes)
        message = "loaded"
    assert len(message.splitlines()) == 1


@given(st.binary(max_size=2048), st.sampled_from([None, *ImageKind]))
def test_arbitrary_bytes(data: bytes, kind: ImageKind | None) -> None:
    load_or_refuse(data, LoadOptions(ram_bytes=16 * MIB, kind=kind, load_address=0x100000 if kind else None))


@pytest.mark.parametrize("name", SEEDS)
@given(changes=st.lists(st.tuples(st.integers(0, 700), NUMBERS, st.sampled_from((1, 2, 4))), max_size=4), cut=st.data())
def test_changed_images(name: str, changes: list[tuple[int, int, int]], cut: st.DataObject) -> None:
    data = bytearray(SEEDS[name])
    for offset, value, size_bytes in changes:
        at = offset % len(data)
        data[at : at + size_bytes] = (value & ((1 << 8 * size_bytes) - 1)).to_bytes(size_bytes, "little")
    length = cut.draw(st.one_of(st.just(len(data)), st.integers(0, len(data))))
    modules = (Module(b"module", "m"),) if name in ("multiboot", "kludge", "linux") else ()
    load_or_refuse(bytes(data[:length]), LoadOptions(ram_bytes=16 * MIB, modules=modules, command_line="a b"))


@given(st.lists(st.tuples(NUMBERS, NUMBERS, st.binary(max_size=64)), min_size=1, max_size=6))
def test_any_segments(parts: list[tuple[int, int, bytes]]) -> None:
    segments = [ElfSegment(multiboot_header(3) + data, at, memory_bytes=size) for at, size, data in parts]
    load_or_refuse(elf_image(segments), LoadOptions(ram_bytes=16 * MIB))


@given(NUMBERS, NUMBERS, NUMBERS, NUMBERS, NUMBERS)
def test_any_addresses(header: int, first: int, load_end: int, bss_end: int, entry: int) -> None:
    image = kludge_image(
        header_addr=header, load_addr=first, load_end_addr=load_end, bss_end_addr=bss_end, entry_addr=entry
    )
    load_or_refuse(image, LoadOptions(ram_bytes=16 * MIB))


@given(st.text(max_size=40))
def test_any_module_text(text: str) -> None:
    try:
        modules = parse_modules(text)
    except ImageError:
        assert "" in [part.split(" ")[0] for part in text.replace(",,", "x").split(",")]
    else:
        assert len(modules) == text.replace(",,", "").count(",") + 1


@given(st.lists(st.text(min_size=1, max_size=10).filter(lambda text: text[0] not in " \0"), min_size=1, max_size=4))
def test_modules_survive_escaping(strings: list[str]) -> None:
    strings = [string.replace("\0", "") for string in strings]
    modules = parse_modules(",".join(string.replace(",", ",,") for string in strings))
    assert [module.command_line for module in modules] == strings
    assert [module.source for module in modules] == [string.split(" ")[0] for string in strings]


@given(st.text(max_size=60), st.lists(st.binary(max_size=5000), max_size=3))
def test_any_command_line_and_modules(line: str, contents: list[bytes]) -> None:
    modules = tuple(Module(content, f"m{index}") for index, content in enumerate(contents))
    load_or_refuse(SEEDS["multiboot"], LoadOptions(ram_bytes=16 * MIB, command_line=line, modules=modules))


@pytest.mark.parametrize("name", SEEDS)
def test_every_truncation(name: str) -> None:
    for length in range(len(SEEDS[name])):
        load_or_refuse(SEEDS[name][:length], LoadOptions(ram_bytes=16 * MIB))


@pytest.mark.parametrize(
    "make",
    [
        lambda: load(SEEDS["multiboot"], LoadOptions(ram_bytes=2 * MIB)),
        lambda: load(SEEDS["linux"], LoadOptions(ram_bytes=2 * MIB)),
        lambda: load(b"\xf4", LoadOptions(ram_bytes=2 * MIB, load_address=0x7C00, entry_bits=16)),
    ],
)
def test_install_twice_gives_the_same(make: Callable[[], LoadedImage]) -> None:
    image = make()
    memory, cpu = PhysicalMemory(2 * MIB), CpuState()
    states = []
    for _ in range(2):
        memory.write(0x100000, b"\xee" * 0x4000)
        image.install(cpu, memory)
        states.append((cpu.pack(), memory.read(0, 0xA0000), memory.read(0x100000, 0x4000)))
        cpu.gpr[:] = [7] * 8
        cpu.eip = 5
    assert states[0] == states[1]
    assert cpu.segments[1].selector == image.entry.segments[1].selector
    for write in image.writes:
        assert memory.read(write.physical, write.end - write.physical) == write.data + bytes(write.zero_bytes)
    memory.close()
