"""Linux bzImages and what else follows the 32-bit Linux boot protocol (memtest86+ does).

It owns setup header and boot parameters; the real-mode setup code in the image is not run.

Source: Linux kernel documentation, "The Linux/x86 Boot Protocol" (versions 2.02 and up) and "Zero Page".
"""

from construct import Bytes, Const, Int8ul, Int16ul, Int32ul, Int64ul, Struct

from machine.e820 import memory_map, usable_kib
from machine.loaders.entry import EntryState, linux_entry
from machine.loaders.errors import ImageError, parse_at
from machine.loaders.image import Module, c_string
from machine.loaders.layout import PAGE_BYTES, Layout

HEADER_OFFSET = 0x1F1
MAGIC_OFFSET = 0x202
MAGIC = b"HdrS"
BOOT_PARAMS_BYTES = 4096
LOADED_HIGH = 1 << 0
CAN_USE_HEAP = 1 << 7
LOADER_TYPE_UNDEFINED = 0xFF
DEFAULT_COMMAND_LINE_BYTES = 255

SETUP_HEADER = Struct(
    "setup_sects" / Int8ul,
    "root_flags" / Int16ul,
    "syssize" / Int32ul,
    "ram_size" / Int16ul,
    "vid_mode" / Int16ul,
    "root_dev" / Int16ul,
    "boot_flag" / Int16ul,
    "jump" / Bytes(2),
    "header" / Const(MAGIC),
    "version" / Int16ul,
    "realmode_swtch" / Int32ul,
    "start_sys_seg" / Int16ul,
    "kernel_version" / Int16ul,
    "type_of_loader" / Int8ul,
    "loadflags" / Int8ul,
    "setup_move_size" / Int16ul,
    "code32_start" / Int32ul,
    "ramdisk_image" / Int32ul,
    "ramdisk_size" / Int32ul,
    "bootsect_kludge" / Int32ul,
    "heap_end_ptr" / Int16ul,
    "ext_loader_ver" / Int8ul,
    "ext_loader_type" / Int8ul,
    "cmd_line_ptr" / Int32ul,
    "initrd_addr_max" / Int32ul,
    "kernel_alignment" / Int32ul,
    "relocatable_kernel" / Int8ul,
    "min_alignment" / Int8ul,
    "xloadflags" / Int16ul,
    "cmdline_size" / Int32ul,
)
# Offsets in the boot parameters ("zero page").
_ALT_MEM_K = 0x1E0
_E820_ENTRIES = 0x1E8
_E820_TABLE = 0x2D0
_E820_ENTRY = Struct("base" / Int64ul, "length" / Int64ul, "type" / Int32ul)
_SCREEN_INFO_TEXT = Struct(
    "orig_x" / Int8ul,
    "orig_y" / Int8ul,
    "ext_mem_k" / Int16ul,
    "orig_video_page" / Int16ul,
    "orig_video_mode" / Int8ul,
    "orig_video_cols" / Int8ul,
    "flags" / Int8ul,
    "unused" / Int8ul,
    "orig_video_ega_bx" / Int16ul,
    "unused3" / Int16ul,
    "orig_video_lines" / Int8ul,
    "orig_video_isVGA" / Int8ul,
    "orig_video_points" / Int16ul,
)


def is_linux(data: bytes) -> bool:
    """True if the setup header's magic is in its place."""
    return data[MAGIC_OFFSET : MAGIC_OFFSET + 4] == MAGIC


def load(data: bytes, command_line: str, modules: tuple[Module, ...], layout: Layout) -> EntryState:
    """Place the protected-mode part, the boot parameters, the command line and, as the ramdisk, the first module.

    Raises:
        ImageError: truncated, a protocol older than 2.02, a zImage, several modules, or it does not fit.
    """
    header = parse_at(SETUP_HEADER, data, HEADER_OFFSET, "Linux setup header")
    where = f"Linux setup header at offset {HEADER_OFFSET:#x}"
    if header.version < 0x202:
        raise ImageError(f"{where}: boot protocol {header.version >> 8}.{header.version & 0xFF:02} is older than 2.02")
    if not header.loadflags & LOADED_HIGH:
        raise ImageError(f"{where}: a zImage, which loads at 0x10000, is not supported; use a bzImage")
    kernel = ((header.setup_sects or 4) + 1) * 512
    if kernel >= len(data):
        raise ImageError(f"truncated: the kernel begins at offset {kernel:#x}, the file has {len(data):#x} bytes")
    needed = kernel + header.syssize * 16
    if len(data) < needed - 15:  # syssize counts paragraphs, the last one may be cut
        raise ImageError(f"truncated: {where} needs the file up to {needed:#x}, it has {len(data):#x} bytes")
    layout.put(header.code32_start, data[kernel:], "Linux kernel")
    if len(modules) > 1:
        raise ImageError(f"a Linux kernel takes one initrd, not {len(modules)}")
    for module in modules:
        limit = header.initrd_addr_max + 1 if header.version >= 0x203 else 0x3800_0000
        header.ramdisk_image, header.ramdisk_size = _place_ramdisk(module, limit, layout)
    limit_bytes = header.cmdline_size if header.version >= 0x206 else DEFAULT_COMMAND_LINE_BYTES
    text = c_string(command_line)
    if len(text) - 1 > limit_bytes:
        raise ImageError(f"command line of {len(text) - 1} bytes, the kernel takes {limit_bytes}")
    header.cmd_line_ptr = layout.find(len(text), "command line", low=True)
    layout.put(header.cmd_line_ptr, text, "command line")
    header.type_of_loader = LOADER_TYPE_UNDEFINED
    header.vid_mode = 0xFFFF  # "normal": the mode that is set
    params = _boot_params(data, header, layout.ram_bytes)
    boot_params = layout.find(len(params), "boot parameters", low=True, align=PAGE_BYTES)
    layout.put(boot_params, params, "boot parameters")
    return linux_entry(header.code32_start, boot_params)


def _place_ramdisk(module: Module, limit: int, layout: Layout) -> tuple[int, int]:
    """As high as the kernel allows, out of the way of its own unpacking; returns address and size."""
    data = module.read()
    start = (min(limit, layout.ram_bytes) - len(data)) & ~(PAGE_BYTES - 1)
    if start < layout.end:
        raise ImageError(f"initrd of {len(data)} bytes does not fit above the kernel, which ends at {layout.end:#x}")
    layout.put(start, data, "initrd")
    return start, len(data)


def _boot_params(data: bytes, header: object, ram_bytes: int) -> bytes:
    """The zero page: zeros, the setup header as far as the image's own goes, the memory sizes and the screen."""
    params = bytearray(BOOT_PARAMS_BYTES)
    end = min(MAGIC_OFFSET + data[0x201], BOOT_PARAMS_BYTES, len(data))
    params[HEADER_OFFSET:end] = data[HEADER_OFFSET:end]
    known = min(max(end - HEADER_OFFSET, 0), SETUP_HEADER.sizeof())
    params[HEADER_OFFSET : HEADER_OFFSET + known] = SETUP_HEADER.build(header)[:known]
    _, upper_kib = usable_kib(ram_bytes)
    screen = dict.fromkeys((field.name for field in _SCREEN_INFO_TEXT.subcons), 0)
    screen |= {"ext_mem_k": min(upper_kib, 0xFFFF), "orig_video_mode": 3, "orig_video_cols": 80}
    screen |= {"orig_video_lines": 25, "orig_video_isVGA": 1, "orig_video_points": 16}
    params[: _SCREEN_INFO_TEXT.sizeof()] = _SCREEN_INFO_TEXT.build(screen)
    params[_ALT_MEM_K : _ALT_MEM_K + 4] = upper_kib.to_bytes(4, "little")
    regions = memory_map(ram_bytes)
    params[_E820_ENTRIES] = len(regions)
    table = b"".join(
        _E820_ENTRY.build({"base": region.base, "length": region.length_bytes, "type": int(region.kind)})
        for region in regions
    )
    params[_E820_TABLE : _E820_TABLE + len(table)] = table
    return bytes(params)
