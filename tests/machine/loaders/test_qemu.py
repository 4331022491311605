"""The same kernel, modules and command line under QEMU's multiboot loader and ours: the same fields, but for some."""

import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from machine.loaders import LoadedImage, LoadOptions, load, multiboot, parse_modules
from machine.loaders.entry import FLAT_GDT_BYTES
from tests.machine.loaders.images import read

SOURCE = Path(__file__).with_name("dump_kernel.S")
APPEND = "root=/dev/hda  quiet"
INITRD = "one first arg,two,one x,,y"
LOW_BYTES = 0xA0000
HIGH_BYTES = 0x40000
RECORD_BYTES = 44 + 24


@dataclass
class Dump:
    """What the kernel saw."""

    registers: bytes
    gdt: bytes
    low: bytes
    high: bytes

    def read(self, physical: int, length: int) -> bytes:
        if physical < LOW_BYTES:
            return self.low[physical : physical + length]
        return self.high[physical - 0x100000 : physical - 0x100000 + length]

    def read_string(self, physical: int) -> str:
        return self.read(physical, 256).split(b"\0")[0].decode()


def tool(name: str) -> str:
    found = shutil.which(name)
    assert found, f"{name} is needed for this test: `make test` installs it"
    return found


def build(directory: Path, *flags: str) -> Path:
    kernel = directory / "kernel.elf"
    command = [tool("gcc"), "-m32", "-nostdlib", "-static", "-Wl,-Ttext=0x100000", "-Wl,--build-id=none"]
    subprocess.run([*command, *flags, "-Wl,-z,noexecstack", "-o", kernel, SOURCE], check=True, timeout=60)
    (directory / "one").write_bytes(b"first module")
    (directory / "two").write_bytes(b"2" * 5000)
    return kernel


def run_qemu(directory: Path, kernel: str) -> Dump:
    command = [tool("qemu-system-i386"), "-accel", "tcg", "-m", "64", "-nodefaults", "-display", "none"]
    command += ["-kernel", kernel, "-append", APPEND, "-initrd", INITRD, "-debugcon", "file:dump"]
    command += ["-device", "isa-debug-exit,iobase=0xf4,iosize=4"]
    done = subprocess.run(command, cwd=directory, check=False, timeout=60, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    data = (directory / "dump").read_bytes()
    assert len(data) == RECORD_BYTES + LOW_BYTES + HIGH_BYTES
    low_end = RECORD_BYTES + LOW_BYTES
    return Dump(data[:44], data[44:RECORD_BYTES], data[RECORD_BYTES:low_end], data[low_end:])


@pytest.fixture(scope="module", params=[("-DFLAGS=0x3",), ("-DFLAGS=0x10003", "-DKLUDGE", "-Wl,--oformat=binary")])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Dump, LoadedImage]:
    directory = tmp_path_factory.mktemp("multiboot")
    kernel = build(directory, *request.param)
    theirs = run_qemu(directory, kernel.name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        ours = load(kernel.name, LoadOptions(command_line=APPEND, modules=parse_modules(INITRD)))
    return theirs, ours


def information(dump: Dump) -> Any:  # noqa: ANN401 - construct's container
    (ebx,) = struct.unpack_from("<I", dump.registers, 4)
    return multiboot.INFO.parse(dump.read(ebx, multiboot.INFO.sizeof()))


def image_information(image: LoadedImage) -> Any:  # noqa: ANN401
    return multiboot.INFO.parse(read(image.writes, image.entry.gpr[3], multiboot.INFO.sizeof()))


def test_registers(pair: tuple[Dump, LoadedImage]) -> None:
    theirs, ours = pair
    eax, _, eflags = struct.unpack_from("<3I", theirs.registers)
    assert eax == ours.entry.gpr[0]
    # PF and the like are left over from QEMU's option ROM; what the specification fixes is IF and VM.
    assert eflags & 0x20200 == ours.entry.eflags & 0x20200 == 0
    assert struct.unpack_from("<6H", theirs.registers, 12) == tuple(one.selector for one in ours.entry.segments)
    gdt_limit, gdt_base, idt_limit, idt_base = struct.unpack_from("<HIHI", theirs.registers, 24)
    assert gdt_limit == ours.entry.gdtr[1] == FLAT_GDT_BYTES - 1
    assert 0xC0000 <= gdt_base < 0x100000 > ours.entry.gdtr[0] >= 0xF0000
    assert (idt_base, idt_limit) == ours.entry.idtr
    cr0, cr4 = struct.unpack_from("<2I", theirs.registers, 36)
    assert (cr0, cr4) == (ours.entry.cr0, 0)


def test_segments_are_those_of_the_table_in_rom(pair: tuple[Dump, LoadedImage]) -> None:
    theirs, ours = pair
    for selector, index in ((0x08, 1), (0x10, 3)):
        low, high = struct.unpack_from("<II", theirs.gdt, selector)
        base = low >> 16 | (high & 0xFF) << 16 | high & 0xFF00_0000
        limit = (low & 0xFFFF | high & 0xF0000) << 12 | 0xFFF
        segment = ours.entry.segments[index]
        assert (base, limit) == (segment.base, segment.limit)
        accessed = 1 << 8  # set by the CPU when it loads the segment
        assert (high | accessed) >> 8 & 0xF0FF == (segment.attributes & 0xFF | (segment.attributes & 0xF00) << 4)


def test_information(pair: tuple[Dump, LoadedImage]) -> None:
    theirs, ours = information(pair[0]), image_information(pair[1])
    symbols = multiboot.INFO_ELF_SECTIONS  # QEMU gives none; GRUB does
    assert theirs.flags == ours.flags & ~symbols
    assert theirs.mem_lower == ours.mem_lower
    # SeaBIOS keeps the last 128 KiB of RAM for its tables; we have none.
    assert theirs.mem_upper == ours.mem_upper - 128
    assert theirs.boot_device == ours.boot_device
    assert theirs.mods_count == ours.mods_count == 3
    assert pair[0].read_string(theirs.cmdline) == f"kernel.elf {APPEND}"
    assert read_text(pair[1], ours.cmdline) == f"kernel.elf {APPEND}"
    assert pair[0].read_string(theirs.boot_loader_name) == "qemu"


def read_text(image: LoadedImage, physical: int) -> str:
    return read(image.writes, physical, 256).split(b"\0")[0].decode()


def test_memory_map(pair: tuple[Dump, LoadedImage]) -> None:
    theirs, ours = information(pair[0]), image_information(pair[1])
    maps = []
    for info, reader in ((theirs, pair[0].read), (ours, lambda at, size: read(pair[1].writes, at, size))):
        entries = []
        for at in range(info.mmap_addr, info.mmap_addr + info.mmap_length, 24):
            entry = multiboot.MMAP_ENTRY.parse(reader(at, 24))
            assert entry.size == 20
            entries.append((entry.base, entry.length, entry.type))
        maps.append(entries)
    assert maps[0][:3] == maps[1][:3]
    assert maps[0][3:] == [(0x100000, 0x3EE0000, 1), (0x3FE0000, 0x20000, 2), (0xFFFC0000, 0x40000, 2)]
    assert maps[1][3:] == [(0x100000, 0x3F00000, 1), (0xFFFF0000, 0x10000, 2)]


def test_modules(pair: tuple[Dump, LoadedImage]) -> None:
    theirs, ours = information(pair[0]), image_information(pair[1])
    for index in range(3):
        their = multiboot.MODULE_ENTRY.parse(pair[0].read(theirs.mods_addr + 16 * index, 16))
        our = multiboot.MODULE_ENTRY.parse(read(pair[1].writes, ours.mods_addr + 16 * index, 16))
        assert pair[0].read_string(their.string) == read_text(pair[1], our.string)
        length = their.mod_end - their.mod_start
        assert length == our.mod_end - our.mod_start
        assert their.mod_start % 4096 == our.mod_start % 4096 == 0
        assert pair[0].read(their.mod_start, length) == read(pair[1].writes, our.mod_start, length)


def test_symbols_of_a_linked_kernel(pair: tuple[Dump, LoadedImage]) -> None:
    ours = image_information(pair[1])
    if not ours.flags & multiboot.INFO_ELF_SECTIONS:
        assert (ours.elf_num, ours.elf_addr) == (0, 0)  # the flat kernel has none
        return
    table = [
        struct.unpack("<10I", read(pair[1].writes, ours.elf_addr + 40 * index, 40)) for index in range(ours.elf_num)
    ]
    (symbols,) = [section for section in table if section[1] == 2]
    strings = table[symbols[6]]
    names = read(pair[1].writes, strings[3], strings[5])
    found = {}
    for at in range(symbols[3], symbols[3] + symbols[5], 16):
        name, value = struct.unpack("<II", read(pair[1].writes, at, 8))
        found[names[name : names.index(b"\0", name)]] = value
    assert found[b"_start"] == pair[1].entry.eip
    assert read(pair[1].writes, found[b"marker"], 18) == b"data of the kernel"


def test_kernel_bytes(pair: tuple[Dump, LoadedImage]) -> None:
    kernel = [write for write in pair[1].writes if write.what.startswith(("ELF segment", "multiboot kernel"))]
    assert kernel
    for write in kernel:
        assert pair[0].read(write.physical, len(write.data)) == write.data
