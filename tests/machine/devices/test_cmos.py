"""What firmware finds in the CMOS, as QEMU's and Bochs' firmware lay it out."""

from __future__ import annotations

import pytest

from machine.devices.cmos import cmos_contents

MIB = 1 << 20


@pytest.mark.parametrize(
    ("ram_bytes", "base", "extended", "above_16", "above_4g"),
    [
        (MIB, 640, 0, 0, 0),
        (8 * MIB, 640, 7168, 0, 0),
        (64 * MIB, 640, 0xFC00, 0x300, 0),
        (128 * MIB, 640, 0xFFFF, 0x700, 0),
        (4096 * MIB, 640, 0xFFFF, 0xFF00, 0),
        (5120 * MIB, 640, 0xFFFF, 0xFF00, 0x4000),
    ],
)
def test_memory_sizes(ram_bytes: int, base: int, extended: int, above_16: int, above_4g: int) -> None:
    cmos = cmos_contents(ram_bytes)

    def word(index: int) -> int:
        return cmos[index] | cmos[index + 1] << 8

    assert (word(0x15), word(0x17), word(0x30), word(0x34)) == (base, extended, extended, above_16)
    assert word(0x5B) | cmos[0x5D] << 16 == above_4g


@pytest.mark.parametrize(
    ("types", "byte", "equipment"), [((), 0, 0x04), ((4,), 0x40, 0x05), ((4, 5), 0x45, 0x45), ((0, 4), 0x04, 0x05)]
)
def test_floppies(types: tuple[int, ...], byte: int, equipment: int) -> None:
    cmos = cmos_contents(8 * MIB, floppy_types=types)
    assert (cmos[0x10], cmos[0x14]) == (byte, equipment)


def test_fpu_and_cpus() -> None:
    cmos = cmos_contents(8 * MIB, fpu=True, cpus=4)
    assert (cmos[0x14], cmos[0x5F]) == (0x06, 3)


@pytest.mark.parametrize(
    ("order", "first_two", "third"), [("c", 0x02, 0), ("ac", 0x21, 0), ("cad", 0x12, 0x30), ("n", 4, 0)]
)
def test_boot_order(order: str, first_two: int, third: int) -> None:
    cmos = cmos_contents(8 * MIB, boot_order=order)
    assert (cmos[0x3D], cmos[0x38]) == (first_two, third)


def test_disks() -> None:
    cmos = cmos_contents(8 * MIB, disk_geometries=[(0x123, 16, 63), (20, 4, 17)])
    assert [cmos[index] for index in range(0x1B, 0x24)] == [0x23, 0x01, 16, 0xFF, 0xFF, 0xC8, 0x23, 0x01, 63]
    assert [cmos[index] for index in range(0x24, 0x2D)] == [20, 0, 4, 0xFF, 0xFF, 0xC0, 20, 0, 17]
    assert (cmos[0x12], cmos[0x19], cmos[0x1A]) == (0xFF, 47, 47)
    assert cmos_contents(8 * MIB, disk_geometries=[None, (20, 4, 17)])[0x12] == 0x0F


def test_checksum_is_high_byte_first() -> None:
    cmos = cmos_contents(64 * MIB, floppy_types=(4,), disk_geometries=[(0x123, 16, 63)])
    total = sum(cmos.get(index, 0) for index in range(0x10, 0x2E))
    assert (cmos[0x2E], cmos[0x2F]) == (total >> 8, total & 0xFF)


@pytest.mark.parametrize(
    "options",
    [{"boot_order": "x"}, {"boot_order": "acdn"}, {"floppy_types": (1, 2, 3)}, {"disk_geometries": [None] * 3}],
)
def test_what_does_not_fit_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="CMOS has"):
        cmos_contents(8 * MIB, **options)  # type: ignore[arg-type]
