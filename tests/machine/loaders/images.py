"""Images made by hand for the loader tests, right unless a test says otherwise."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from machine.loaders import elf, linux, multiboot
from machine.loaders.layout import MemoryWrite


@dataclass
class ElfSegment:
    """A PT_LOAD; `fields` overrides what the builder would write."""

    data: bytes
    physical: int
    linear: int | None = None
    memory_bytes: int | None = None
    flags: int = 5
    kind: int = elf.PT_LOAD
    fields: Mapping[str, int] = field(default_factory=dict)


@dataclass
class ElfSection:
    """A section with bytes of the file."""

    data: bytes
    kind: int
    flags: int = 0
    address: int = 0
    fields: Mapping[str, int] = field(default_factory=dict)


def elf_image(
    segments: Sequence[ElfSegment],
    sections: Sequence[ElfSection] = (),
    *,
    entry: int = 0x100000,
    ident: bytes = b"\x7fELF\x01\x01\x01".ljust(16, b"\0"),
    **fields: int,
) -> bytes:
    """Header, program headers, the segments' bytes, the sections' bytes, section headers."""
    header_bytes = elf.HEADER.sizeof() + len(segments) * elf.PROGRAM_HEADER.sizeof()
    body = b""
    program_headers = b""
    for segment in segments:
        values = {
            "type": segment.kind,
            "offset": header_bytes + len(body),
            "vaddr": segment.physical if segment.linear is None else segment.linear,
            "paddr": segment.physical,
            "filesz": len(segment.data),
            "memsz": len(segment.data) if segment.memory_bytes is None else segment.memory_bytes,
            "flags": segment.flags,
            "align": 4,
        }
        program_headers += elf.PROGRAM_HEADER.build(values | dict(segment.fields))
        body += segment.data
    section_headers = b""
    for section in sections:
        values = dict.fromkeys(("name", "link", "info", "entsize"), 0) | {
            "type": section.kind,
            "flags": section.flags,
            "addr": section.address,
            "offset": header_bytes + len(body),
            "size": len(section.data),
            "addralign": 4,
        }
        section_headers += elf.SECTION_HEADER.build(values | dict(section.fields))
        body += section.data
    header = {
        "ident": ident,
        "type": elf.ET_EXEC,
        "machine": elf.EM_386,
        "version": 1,
        "entry": entry,
        "phoff": elf.HEADER.sizeof(),
        "shoff": header_bytes + len(body) if sections else 0,
        "flags": 0,
        "ehsize": elf.HEADER.sizeof(),
        "phentsize": elf.PROGRAM_HEADER.sizeof(),
        "phnum": len(segments),
        "shentsize": elf.SECTION_HEADER.sizeof(),
        "shnum": len(sections),
        "shstrndx": 0,
    } | fields
    built: bytes = elf.HEADER.build(header)
    return built + program_headers + body + section_headers


def multiboot_header(flags: int, *, magic: int = multiboot.HEADER_MAGIC, checksum_off_by: int = 0) -> bytes:
    """Magic, flags, checksum."""
    checksum = (-magic - flags + checksum_off_by) & 0xFFFF_FFFF
    built: bytes = multiboot.HEADER.build({"magic": magic, "flags": flags, "checksum": checksum})
    return built


def multiboot_elf(flags: int = 3, *, sections: Sequence[ElfSection] = (), text: bytes = b"\xf4" * 32) -> bytes:
    """A kernel at 1 MiB whose text begins with a multiboot header."""
    segment = ElfSegment(multiboot_header(flags) + text, 0x100000, memory_bytes=0x1800)
    return elf_image([segment], sections, entry=0x10000C)


def kludge_image(*, before: int = 0, after: bytes = b"kernel text", flags: int = 0x10003, **addresses: int) -> bytes:
    """A file with `before` bytes, a header with address fields, and `after`."""
    fields = {
        "header_addr": 0x100000 + before,
        "load_addr": 0x100000,
        "load_end_addr": 0,
        "bss_end_addr": 0,
        "entry_addr": 0x100000 + before + 32,
    } | addresses
    built: bytes = multiboot.ADDRESS_FIELDS.build(fields)
    return b"\x90" * before + multiboot_header(flags) + built + after


def linux_image(kernel: bytes = b"\xf4" * 64, *, setup_sects: int = 1, **fields: int) -> bytes:
    """A bzImage of protocol 2.12 with `setup_sects` sectors of setup."""
    values: dict[str, object] = dict.fromkeys((one.name for one in linux.SETUP_HEADER.subcons), 0)
    values |= {"setup_sects": setup_sects, "jump": b"\xeb\x66", "header": b"HdrS", "version": 0x20C}
    values |= {"boot_flag": 0xAA55, "loadflags": 1, "code32_start": 0x100000, "cmdline_size": 64}
    values |= {"syssize": -(-len(kernel) // 16), "initrd_addr_max": 0x37FF_FFFF}
    head = bytearray((setup_sects + 1) * 512)
    header = linux.SETUP_HEADER.build(values | fields)
    head[linux.HEADER_OFFSET : linux.HEADER_OFFSET + len(header)] = header
    return bytes(head) + kernel


def read(writes: Sequence[MemoryWrite], physical: int, length: int) -> bytes:
    """What memory holds after the writes; bytes not written read as 0CCh."""
    data = bytearray(b"\xcc" * length)
    for write in writes:
        content = write.data + bytes(write.zero_bytes)
        for at in range(max(physical, write.physical), min(physical + length, write.end)):
            data[at - physical] = content[at - write.physical]
    return bytes(data)


def read_string(writes: Sequence[MemoryWrite], physical: int) -> str:
    """The NUL-terminated string at an address."""
    text = b""
    while (byte := read(writes, physical + len(text), 1)) != b"\0":
        text += byte
    return text.decode()
