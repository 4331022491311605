"""Multiboot 1 kernels: finding and checking the header, placing kernel and modules, building the boot information.

It must not know how memory is written or the CPU is started.

Source: Multiboot Specification 0.6.96.
"""

from dataclasses import dataclass

from construct import Int8ul, Int16ul, Int32ul, Int64ul, Padding, Struct

from machine.e820 import memory_map, usable_kib
from machine.loaders import elf
from machine.loaders.entry import STACK_TOP, EntryState, flat_entry
from machine.loaders.errors import ImageError, parse_at
from machine.loaders.image import Module, c_string
from machine.loaders.layout import PAGE_BYTES, Layout

HEADER_MAGIC = 0x1BADB002
BOOT_MAGIC = 0x2BADB002
SEARCH_BYTES = 8192
BOOT_LOADER_NAME = "trapgate"
#: Drive and partition fields of `boot_device`: first hard disk, no partition. QEMU's value.
BOOT_DEVICE = 0x8000FFFF

# Header flags. Bits 0 to 15 are requirements, the rest may be ignored.
ALIGN_MODULES = 1 << 0
MEMORY_INFO = 1 << 1
VIDEO_MODE = 1 << 2
ADDRESSES = 1 << 16
REQUIREMENTS = 0xFFFF

MULTIBOOT2_MAGIC = 0xE85250D6
MULTIBOOT2_SEARCH_BYTES = 32768

HEADER = Struct("magic" / Int32ul, "flags" / Int32ul, "checksum" / Int32ul)
ADDRESS_FIELDS = Struct(
    "header_addr" / Int32ul,
    "load_addr" / Int32ul,
    "load_end_addr" / Int32ul,
    "bss_end_addr" / Int32ul,
    "entry_addr" / Int32ul,
)

# Flags of the information structure.
INFO_MEMORY = 1 << 0
INFO_BOOT_DEVICE = 1 << 1
INFO_COMMAND_LINE = 1 << 2
INFO_MODULES = 1 << 3
INFO_ELF_SECTIONS = 1 << 5
INFO_MEMORY_MAP = 1 << 6
INFO_BOOT_LOADER_NAME = 1 << 9
INFO_FRAMEBUFFER = 1 << 12

INFO = Struct(
    "flags" / Int32ul,
    "mem_lower" / Int32ul,
    "mem_upper" / Int32ul,
    "boot_device" / Int32ul,
    "cmdline" / Int32ul,
    "mods_count" / Int32ul,
    "mods_addr" / Int32ul,
    "elf_num" / Int32ul,
    "elf_size" / Int32ul,
    "elf_addr" / Int32ul,
    "elf_shndx" / Int32ul,
    "mmap_length" / Int32ul,
    "mmap_addr" / Int32ul,
    "drives_length" / Int32ul,
    "drives_addr" / Int32ul,
    "config_table" / Int32ul,
    "boot_loader_name" / Int32ul,
    "apm_table" / Int32ul,
    "vbe_control_info" / Int32ul,
    "vbe_mode_info" / Int32ul,
    "vbe_mode" / Int16ul,
    "vbe_interface_seg" / Int16ul,
    "vbe_interface_off" / Int16ul,
    "vbe_interface_len" / Int16ul,
    "framebuffer_addr" / Int64ul,
    "framebuffer_pitch" / Int32ul,
    "framebuffer_width" / Int32ul,
    "framebuffer_height" / Int32ul,
    "framebuffer_bpp" / Int8ul,
    "framebuffer_type" / Int8ul,
    Padding(6),
)
FRAMEBUFFER_EGA_TEXT = 2
MMAP_ENTRY = Struct("size" / Int32ul, "base" / Int64ul, "length" / Int64ul, "type" / Int32ul)
MODULE_ENTRY = Struct("mod_start" / Int32ul, "mod_end" / Int32ul, "string" / Int32ul, "reserved" / Int32ul)


@dataclass(frozen=True, slots=True)
class Header:
    """A header found in a file: where, and what it asks for."""

    offset: int
    flags: int


def find_header(data: bytes) -> Header | None:
    """The first header in the first 8 KiB, 4-byte aligned, with a right checksum; None without one."""
    magic = HEADER_MAGIC.to_bytes(4, "little")
    offset = data.find(magic, 0, SEARCH_BYTES)
    while offset >= 0:
        if offset % 4 == 0 and offset + HEADER.sizeof() <= min(len(data), SEARCH_BYTES):
            header = HEADER.parse(data[offset : offset + HEADER.sizeof()])
            if (header.magic + header.flags + header.checksum) & 0xFFFF_FFFF == 0:
                return Header(offset, header.flags)
        offset = data.find(magic, offset + 1, SEARCH_BYTES)
    return None


def has_multiboot2_header(data: bytes) -> bool:
    """True if a header of multiboot 2, another protocol, is in the first 32 KiB: 8-byte aligned, checksum right."""
    magic = MULTIBOOT2_MAGIC.to_bytes(4, "little")
    offset = data.find(magic, 0, MULTIBOOT2_SEARCH_BYTES)
    while offset >= 0:
        if offset % 8 == 0 and offset + 16 <= len(data):
            words = (int.from_bytes(data[offset + at : offset + at + 4], "little") for at in (0, 4, 8, 12))
            if sum(words) & 0xFFFF_FFFF == 0:
                return True
        offset = data.find(magic, offset + 1, MULTIBOOT2_SEARCH_BYTES)
    return False


def load(data: bytes, name: str, command_line: str, modules: tuple[Module, ...], layout: Layout) -> EntryState:
    """Place a kernel, its modules and its information structure.

    A kernel that asks for a video mode (header bit 2) is told of the 80x25 text screen it has, which the specification
    allows: the mode is a wish. `name`, a space and `command_line` make the kernel's command line, as under QEMU; `name`
    is the image's without its folder, so that a run is the same wherever the image lies.

    Raises:
        ImageError: no header, an unknown requirement, or the kernel or a module does not fit.
    """
    header = find_header(data)
    if header is None:
        raise ImageError(f"no multiboot header in the first {min(SEARCH_BYTES, len(data))} bytes")
    unknown = header.flags & REQUIREMENTS & ~(ALIGN_MODULES | MEMORY_INFO | VIDEO_MODE)
    if unknown:
        raise ImageError(f"multiboot header at offset {header.offset:#x} requires unknown features: flags {unknown:#x}")
    executable = None
    if header.flags & ADDRESSES:
        entry = _place_by_addresses(data, header, layout)
    elif data.startswith(elf.MAGIC):
        executable = elf.parse(data)
        entry = executable.entry
        elf.place(executable, layout)
    else:
        raise ImageError(
            f"multiboot header at offset {header.offset:#x} gives no addresses (flag bit 16), and the file is not ELF"
        )
    info = _Information(layout)
    info.add_modules(modules)
    if executable is not None and executable.section_headers:
        info.add_sections(executable)
    info.add_memory_map()
    info.add_strings(f"{name} {command_line}")
    information = info.place(text_mode=bool(header.flags & VIDEO_MODE))
    return flat_entry(entry, eax=BOOT_MAGIC, ebx=information, esp=STACK_TOP)


def _place_by_addresses(data: bytes, header: Header, layout: Layout) -> int:
    """Follow the header's own load addresses (the "a.out kludge"); returns the entry point."""
    where = f"multiboot header at offset {header.offset:#x}"
    fields = parse_at(ADDRESS_FIELDS, data, header.offset + HEADER.sizeof(), "multiboot address fields")
    first = header.offset - (fields.header_addr - fields.load_addr)
    if fields.header_addr < fields.load_addr or first < 0:
        raise ImageError(
            f"{where}: load_addr {fields.load_addr:#x} and header_addr {fields.header_addr:#x} put the start of the "
            "kernel outside the file"
        )
    end = len(data)
    if fields.load_end_addr:
        if fields.load_end_addr < fields.load_addr:
            raise ImageError(
                f"{where}: load_end_addr {fields.load_end_addr:#x} is below load_addr {fields.load_addr:#x}"
            )
        end = first + fields.load_end_addr - fields.load_addr
        if end > len(data):
            raise ImageError(f"truncated: {where} needs the file up to {end:#x}, it has {len(data):#x} bytes")
    load_end = fields.load_addr + end - first
    if fields.bss_end_addr and fields.bss_end_addr < load_end:
        raise ImageError(f"{where}: bss_end_addr {fields.bss_end_addr:#x} is below the end of the data, {load_end:#x}")
    zero_bytes = fields.bss_end_addr - load_end if fields.bss_end_addr else 0
    layout.check(fields.load_addr, end - first + zero_bytes, "multiboot kernel")
    layout.put(fields.load_addr, data[first:end], "multiboot kernel", zero_bytes)
    entry: int = fields.entry_addr
    return entry


class _Information:
    """The information structure and what it points to, as they grow."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._fields: dict[str, int] = dict.fromkeys((field.name for field in INFO.subcons if field.name), 0)
        lower, upper = usable_kib(layout.ram_bytes)
        self._fields |= {"flags": INFO_MEMORY | INFO_BOOT_DEVICE, "mem_lower": lower, "mem_upper": upper}
        self._fields["boot_device"] = BOOT_DEVICE

    def add_modules(self, modules: tuple[Module, ...]) -> None:
        """Modules on pages of their own behind the kernel, in order; the table even when there are none."""
        entries = b""
        for index, module in enumerate(modules):
            data = module.read()
            what = f"module {index} ({module.command_line.split(' ', 1)[0]})"
            start = self._layout.find(len(data), what, low=False, align=PAGE_BYTES)
            self._layout.put(start, data, what)
            string = self._put(c_string(module.command_line), f"string of module {index}", low=True)
            entries += MODULE_ENTRY.build(
                {"mod_start": start, "mod_end": start + len(data), "string": string, "reserved": 0}
            )
        self._fields["flags"] |= INFO_MODULES
        self._fields["mods_count"] = len(modules)
        self._fields["mods_addr"] = self._put(entries, "module table", low=True) if modules else 0

    def add_sections(self, executable: elf.Elf) -> None:
        """The section header table, and the symbol and string tables, which have no address until we give them one."""
        table = bytearray(executable.section_headers)
        size_bytes = elf.SECTION_HEADER.sizeof()
        for index, section in enumerate(executable.sections):
            if section.kind in (elf.SHT_SYMTAB, elf.SHT_STRTAB) and not section.flags & elf.SHF_ALLOC:
                data = executable.data[section.offset : section.offset + section.size_bytes]
                align = section.align if 0 < section.align <= PAGE_BYTES else 4
                address = self._put(data, f"ELF section {index}", low=False, align=align) if data else 0
                at = index * size_bytes + elf.SECTION_ADDRESS_OFFSET
                table[at : at + 4] = address.to_bytes(4, "little")
        self._fields["flags"] |= INFO_ELF_SECTIONS
        self._fields["elf_num"] = len(executable.sections)
        self._fields["elf_size"] = size_bytes
        self._fields["elf_addr"] = self._put(bytes(table), "ELF section headers", low=False)
        self._fields["elf_shndx"] = executable.name_section

    def add_memory_map(self) -> None:
        """The map that the BIOS gives, each entry led by its own size, which does not count itself."""
        entries = b"".join(
            MMAP_ENTRY.build(
                {
                    "size": MMAP_ENTRY.sizeof() - 4,
                    "base": region.base,
                    "length": region.length_bytes,
                    "type": int(region.kind),
                }
            )
            for region in memory_map(self._layout.ram_bytes)
        )
        self._fields["flags"] |= INFO_MEMORY_MAP
        self._fields["mmap_length"] = len(entries)
        self._fields["mmap_addr"] = self._put(entries, "memory map", low=True)

    def add_strings(self, command_line: str) -> None:
        """Command line and boot loader name."""
        self._fields["flags"] |= INFO_COMMAND_LINE | INFO_BOOT_LOADER_NAME
        self._fields["cmdline"] = self._put(c_string(command_line), "command line", low=True)
        self._fields["boot_loader_name"] = self._put(c_string(BOOT_LOADER_NAME), "boot loader name", low=True)

    def place(self, *, text_mode: bool) -> int:
        """Put the structure itself; returns its physical address."""
        if text_mode:
            self._fields["flags"] |= INFO_FRAMEBUFFER
            self._fields |= {"framebuffer_addr": 0xB8000, "framebuffer_pitch": 160}
            self._fields |= {"framebuffer_width": 80, "framebuffer_height": 25, "framebuffer_bpp": 16}
            self._fields["framebuffer_type"] = FRAMEBUFFER_EGA_TEXT
        return self._put(INFO.build(self._fields), "multiboot information", low=True)

    def _put(self, data: bytes, what: str, *, low: bool, align: int = 4) -> int:
        at = self._layout.find(len(data), what, low=low, align=align)
        self._layout.put(at, data, what)
        return at
