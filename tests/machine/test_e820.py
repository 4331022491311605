"""The memory map that BIOS, multiboot and fw_cfg share."""

import itertools

import pytest

from machine.e820 import MIB, MemoryKind, memory_map, usable_kib


def test_map_of_64_mib() -> None:
    assert [(region.base, region.end, region.kind) for region in memory_map(64 * MIB)] == [
        (0, 0x9FC00, MemoryKind.USABLE),
        (0x9FC00, 0xA0000, MemoryKind.RESERVED),
        (0xF0000, 0x100000, MemoryKind.RESERVED),
        (0x100000, 0x4000000, MemoryKind.USABLE),
        (0xFFFF0000, 0x100000000, MemoryKind.RESERVED),
    ]


@pytest.mark.parametrize("ram_bytes", [1 * MIB, 2 * MIB, 64 * MIB, 3072 * MIB, 0xFFFF0000])
def test_regions_ascend_without_overlap(ram_bytes: int) -> None:
    regions = memory_map(ram_bytes)
    assert all(first.end <= second.base for first, second in itertools.pairwise(regions))
    assert all(region.length_bytes > 0 for region in regions)
    assert max(region.end for region in regions if region.kind is MemoryKind.USABLE) <= ram_bytes


@pytest.mark.parametrize("ram_bytes", [0, MIB - 1, 0xFFFF0001])
def test_impossible_sizes(ram_bytes: int) -> None:
    with pytest.raises(ValueError, match="RAM of"):
        memory_map(ram_bytes)


def test_usable_kib() -> None:
    assert usable_kib(64 * MIB) == (639, 63 * 1024)
