"""ELF executables for the i386: their headers, and placing their segments at physical addresses.

It must not know which boot protocol the file also follows.

Source: System V ABI, "Object Files" and "Program Loading", with the Intel386 supplement.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from struct import Struct as RawStruct

from construct import Bytes, Const, Int8ul, Int16ul, Int32ul, Struct

from machine.e820 import CONVENTIONAL_END, EXTENDED
from machine.loaders.errors import ImageError, parse_at
from machine.loaders.layout import Layout

MAGIC = b"\x7fELF"
ELFCLASS32 = 1
ELFDATA2LSB = 1
ET_EXEC = 2
EM_386 = 3
EM_486 = 6  # reserved by the ABI, written by some old tools for the same code
PT_LOAD = 1
PF_X = 1
PF_W = 2
SHT_SYMTAB = 2
SHT_STRTAB = 3
SHT_NOBITS = 8
SHF_ALLOC = 2

IDENT = Struct(
    "magic" / Const(MAGIC),
    "elf_class" / Int8ul,
    "encoding" / Int8ul,
    "version" / Int8ul,
    "rest" / Bytes(9),
    "type" / Int16ul,
    "machine" / Int16ul,
)
HEADER = Struct(
    "ident" / Bytes(16),
    "type" / Int16ul,
    "machine" / Int16ul,
    "version" / Int32ul,
    "entry" / Int32ul,
    "phoff" / Int32ul,
    "shoff" / Int32ul,
    "flags" / Int32ul,
    "ehsize" / Int16ul,
    "phentsize" / Int16ul,
    "phnum" / Int16ul,
    "shentsize" / Int16ul,
    "shnum" / Int16ul,
    "shstrndx" / Int16ul,
)
PROGRAM_HEADER = Struct(
    "type" / Int32ul,
    "offset" / Int32ul,
    "vaddr" / Int32ul,
    "paddr" / Int32ul,
    "filesz" / Int32ul,
    "memsz" / Int32ul,
    "flags" / Int32ul,
    "align" / Int32ul,
)
SECTION_HEADER = Struct(
    "name" / Int32ul,
    "type" / Int32ul,
    "flags" / Int32ul,
    "addr" / Int32ul,
    "offset" / Int32ul,
    "size" / Int32ul,
    "link" / Int32ul,
    "info" / Int32ul,
    "addralign" / Int32ul,
    "entsize" / Int32ul,
)

#: Where `addr` is in a section header.
SECTION_ADDRESS_OFFSET = 12

_OTHER_MACHINES = {
    0: "none",
    2: "SPARC",
    8: "MIPS",
    20: "PowerPC",
    40: "ARM",
    62: "x86-64",
    183: "AArch64",
    243: "RISC-V",
}


@dataclass(frozen=True, slots=True)
class Segment:
    """A PT_LOAD program header: bytes of the file from `offset` on, zero-filled to `memory_bytes`, at `physical`."""

    index: int
    offset: int
    linear: int
    physical: int
    file_bytes: int
    memory_bytes: int
    flags: int


@dataclass(frozen=True, slots=True)
class Section:
    """A section header; `offset` and `size_bytes` are of the file, but for NOBITS sections, which it does not hold."""

    kind: int
    flags: int
    address: int
    offset: int
    size_bytes: int
    align: int


@dataclass(frozen=True, slots=True)
class Elf:
    """What a loader needs of an executable.

    Attributes:
        entry: physical address of the first instruction.
        section_headers: the raw table of section headers, 40 bytes each; empty if there is none.
    """

    data: bytes
    entry: int
    segments: tuple[Segment, ...]
    sections: tuple[Section, ...]
    section_headers: bytes
    name_section: int


def parse(data: bytes) -> Elf:
    """Read an ELF32 little-endian i386 executable.

    An entry point inside the linear range of a segment is moved to that segment's physical range, unless it is already
    inside the physical range of one: a kernel linked high may give either.

    Raises:
        ImageError: another class, encoding, type or machine, headers outside the file, or no segment to load.
    """
    ident = parse_at(IDENT, data, 0, "ELF header")
    _refuse_other_targets(ident.elf_class, ident.encoding, ident.type, ident.machine)
    header = parse_at(HEADER, data, 0, "ELF header")
    segments = _segments(data, header.phoff, header.phentsize, header.phnum)
    sections, raw_sections = _sections(data, header.shoff, header.shentsize, header.shnum)
    return Elf(data, _physical_entry(header.entry, segments), segments, sections, raw_sections, header.shstrndx)


def place(elf: Elf, layout: Layout) -> None:
    """Put all segments at their physical addresses.

    A linker told to put text at 1 MiB makes a segment of the ELF headers just below, where the ROM is. What would go
    there is dropped if it is read-only or begins with the file's headers; anything else is refused.

    Raises:
        ImageError: a segment is not inside RAM, or two overlap.
    """
    for segment in elf.segments:
        what = f"ELF segment {segment.index}"
        first, offset = segment.physical, segment.offset
        end = first + segment.memory_bytes
        file_end = offset + segment.file_bytes
        droppable = not segment.flags & (PF_X | PF_W) or segment.offset == 0
        if droppable and CONVENTIONAL_END <= first < EXTENDED:
            dropped = min(end, EXTENDED) - first
            first += dropped
            offset += min(dropped, segment.file_bytes)
        if first == end:
            continue
        layout.check(first, end - first, what)
        layout.put(first, elf.data[offset:file_end], what, end - first - (file_end - offset))


def _refuse_other_targets(elf_class: int, encoding: int, kind: int, machine: int) -> None:
    if elf_class != ELFCLASS32:
        hint = "ELF64: a 64-bit image, this is a 32-bit machine" if elf_class == 2 else f"ELF class {elf_class} unknown"
        raise ImageError(f"{hint} (offset 0x4)")
    if encoding != ELFDATA2LSB:
        raise ImageError(f"ELF data encoding {encoding} is not little-endian (offset 0x5)")
    if machine not in (EM_386, EM_486):
        raise ImageError(f"ELF for another machine: {_OTHER_MACHINES.get(machine, machine)}, not i386 (offset 0x12)")
    if kind != ET_EXEC:
        kinds = {1: "a relocatable object", 3: "a shared object or position-independent executable", 4: "a core file"}
        raise ImageError(f"ELF file is {kinds.get(kind, f'of type {kind}')}, not an executable (offset 0x10)")


def _table(data: bytes, offset: int, count: int, structure: Struct, what: str) -> Iterator[tuple[int, dict[str, int]]]:
    """Offset and fields of each of `count` headers; a table may have 65535 of them, so they are unpacked by the row.

    Raises:
        ImageError: the file ends before one of them does.
    """
    names = [field.name for field in structure.subcons]
    row = RawStruct(f"<{len(names)}I")
    inside = min(count, max(0, len(data) - offset) // row.size)
    for index in range(inside):
        at = offset + index * row.size
        yield at, dict(zip(names, row.unpack_from(data, at), strict=True))
    if inside < count:
        parse_at(structure, data, offset + inside * row.size, f"{what} {inside}")


def _segments(data: bytes, table: int, entry_bytes: int, count: int) -> tuple[Segment, ...]:
    if count and entry_bytes != PROGRAM_HEADER.sizeof():
        raise ImageError(f"ELF program headers of {entry_bytes} bytes each, not 32 (offset 0x2a)")
    segments = []
    for index, (offset, header) in enumerate(_table(data, table, count, PROGRAM_HEADER, "ELF program header")):
        if header["type"] != PT_LOAD or header["memsz"] == 0:
            continue
        where = f"ELF program header {index} at offset {offset:#x}"
        if header["filesz"] > header["memsz"]:
            raise ImageError(f"{where}: {header['filesz']:#x} bytes in the file, only {header['memsz']:#x} in memory")
        _check_inside(data, header["offset"] + header["filesz"], where)
        if header["paddr"] + header["memsz"] > 1 << 32:
            raise ImageError(f"{where}: physical range from {header['paddr']:#x} on passes 4 GiB")
        places = [header[name] for name in ("offset", "vaddr", "paddr", "filesz", "memsz", "flags")]
        segments.append(Segment(index, *places))
    if not segments:
        raise ImageError("ELF file has no segment to load")
    return tuple(segments)


def _sections(data: bytes, table: int, entry_bytes: int, count: int) -> tuple[tuple[Section, ...], bytes]:
    if table == 0 or count == 0:
        return (), b""
    if entry_bytes != SECTION_HEADER.sizeof():
        raise ImageError(f"ELF section headers of {entry_bytes} bytes each, not 40 (offset 0x2e)")
    sections = []
    for index, (offset, header) in enumerate(_table(data, table, count, SECTION_HEADER, "ELF section header")):
        if header["type"] in (SHT_SYMTAB, SHT_STRTAB):
            where = f"ELF section header {index} at offset {offset:#x}"
            _check_inside(data, header["offset"] + header["size"], where)
        places = [header[name] for name in ("type", "flags", "addr", "offset", "size", "addralign")]
        sections.append(Section(*places))
    return tuple(sections), data[table : table + count * entry_bytes]


def _check_inside(data: bytes, end: int, where: str) -> None:
    if end > len(data):
        raise ImageError(f"truncated: {where} needs the file up to {end:#x}, it has {len(data):#x} bytes")


def _physical_entry(entry: int, segments: tuple[Segment, ...]) -> int:
    for segment in segments:
        if segment.flags & PF_X and segment.physical <= entry < segment.physical + segment.memory_bytes:
            return entry
    for segment in segments:
        if segment.linear <= entry < segment.linear + segment.memory_bytes:
            return (entry - segment.linear + segment.physical) & 0xFFFF_FFFF
    return entry
