"""The ROM image: built from its source byte for byte, with everything where software and loaders look for it."""

import struct
import subprocess
from pathlib import Path

from machine.bios import bda, rom
from machine.loaders import entry
from machine.state import CpuState
from tests.machine.bios.assembly import tool

SOURCES = Path(__file__).parents[3] / "machine" / "bios"


def test_image_is_what_the_source_builds(tmp_path: Path) -> None:
    subprocess.run([tool("make"), "-s", "-C", SOURCES, f"OUT={tmp_path}"], check=True, timeout=60)
    assert (tmp_path / "rom.bin").read_bytes() == rom()


def test_fixed_places() -> None:
    image = rom()
    assert len(image) == 0x10000
    assert image[0xFFF0:0xFFF5] == b"\xea\x5b\xe0\x00\xf0"  # jmp F000:E05B
    assert image[0xFFFE] == 0xFC
    assert image[bda.ROM_IRET] == 0xCF
    length, model = struct.unpack_from("<HB", image, bda.ROM_CONFIGURATION)
    assert (length, model) == (8, 0xFC)
    assert image[bda.ROM_DISKETTE_PARAMETERS + 3 : bda.ROM_DISKETTE_PARAMETERS + 5] == bytes((2, 18))


def descriptor(table: int, selector: int) -> tuple[int, int, int]:
    """Base, limit in bytes and attributes from a table in the ROM."""
    low, high = struct.unpack_from("<II", rom(), table - 0xF0000 + selector)
    base = low >> 16 | (high & 0xFF) << 16 | high & 0xFF00_0000
    limit = low & 0xFFFF | high & 0xF0000
    if high & 1 << 23:
        limit = limit << 12 | 0xFFF
    return base, limit, high >> 8 & 0xFF | high >> 12 & 0xF00


def test_descriptor_tables_hold_what_entries_have_loaded() -> None:
    for state in (entry.flat_entry(0x100000), entry.linux_entry(0x100000, 0x9000)):
        base, limit = state.gdtr
        assert bytes(8) == rom()[base - 0xF0000 : base - 0xF0000 + 8]
        for values in state.segments:
            assert values.selector + 7 <= limit
            assert (values.base, values.limit, values.attributes) == descriptor(base, values.selector)
    assert descriptor(entry.FLAT_GDT, 0x18) == (0, 0xFFFF, 0x9B)
    assert descriptor(entry.FLAT_GDT, 0x20) == (0, 0xFFFF, 0x93)


def test_reset_entry_is_the_cpus_own() -> None:
    after_reset = CpuState()
    reset = entry.reset_entry()
    assert tuple(after_reset.gpr) == reset.gpr
    assert (after_reset.eip, after_reset.cr0, after_reset.eflags) == (reset.eip, reset.cr0, reset.eflags)
    for segment, values in zip(after_reset.segments, reset.segments, strict=True):
        assert segment.fields == (values.selector, values.base, values.limit, values.attributes)
