"""Disk images: sectors, geometry, and writes that never reach the user's file."""

import struct
from pathlib import Path

import pytest

from machine import disk as disk_module
from machine.disk import SECTOR_BYTES, Disk, DiskError, Geometry, Media


def numbered_sectors(count: int) -> bytes:
    return b"".join(struct.pack("<I", lba) * (SECTOR_BYTES // 4) for lba in range(count))


def fat_floppy_sector(total_sectors: int, media: int = 0xF0, sector_bytes: int = 512) -> bytes:
    sector = bytearray(512)
    sector[0:3] = b"\xeb\x3c\x90"
    struct.pack_into("<H", sector, 11, sector_bytes)
    struct.pack_into("<H", sector, 19, total_sectors)
    sector[21] = media
    return bytes(sector)


def partitioned_sector(last_head: int, last_sector: int, first: int, length: int, kind: int = 0x83) -> bytes:
    sector = bytearray(512)
    struct.pack_into("<BBBBBBBBII", sector, 446, 0x80, 0, 1, 0, kind, last_head, last_sector, 0, first, length)
    sector[510:] = b"\x55\xaa"
    return bytes(sector)


@pytest.mark.parametrize(
    ("sectors", "geometry"),
    [
        (320, Geometry(40, 1, 8)),
        (720, Geometry(40, 2, 9)),
        (1440, Geometry(80, 2, 9)),
        (2400, Geometry(80, 2, 15)),
        (2880, Geometry(80, 2, 18)),
        (5760, Geometry(80, 2, 36)),
    ],
)
def test_floppy_sizes_are_floppies(sectors: int, geometry: Geometry) -> None:
    disk = Disk.from_bytes(bytes(sectors * SECTOR_BYTES))
    assert (disk.media, disk.geometry, disk.sector_count) == (Media.FLOPPY, geometry, sectors)
    assert disk.physical_geometry == geometry


@pytest.mark.parametrize(
    ("sectors", "geometry"),
    [
        (1, Geometry(1, 16, 63)),
        (10000, Geometry(9, 16, 63)),
        (1024 * 16 * 63, Geometry(1024, 16, 63)),
        (1024 * 16 * 63 + 1, Geometry(512, 32, 63)),
        (1024 * 128 * 63 + 1, Geometry(514, 255, 63)),
        (2048 * 255 * 63, Geometry(1024, 255, 63)),
    ],
)
def test_other_sizes_are_hard_disks(sectors: int, geometry: Geometry, tmp_path: Path) -> None:
    sparse = tmp_path / "disk.img"
    with sparse.open("wb") as file:
        file.truncate(sectors * SECTOR_BYTES)
    disk = Disk.open(sparse)
    assert (disk.media, disk.geometry) == (Media.HARD, geometry)
    assert disk.sector_count == max(sectors, 1008)
    assert disk.physical_geometry.heads == 16
    assert disk.physical_geometry.cylinders == min(disk.sector_count // 1008, 16383)
    disk.close()


def test_short_fat_floppy_image_is_a_floppy_of_its_format() -> None:
    disk = Disk.from_bytes(fat_floppy_sector(2880))
    assert (disk.media, disk.sector_count) == (Media.FLOPPY, 2880)


@pytest.mark.parametrize(
    "sector",
    [
        fat_floppy_sector(2880, media=0xF8),
        fat_floppy_sector(2881),
        fat_floppy_sector(2880, sector_bytes=1024),
        b"\0" * 512,
    ],
)
def test_what_does_not_say_floppy_is_a_hard_disk(sector: bytes) -> None:
    assert Disk.from_bytes(sector).media is Media.HARD


@pytest.mark.parametrize(
    ("sector", "geometry"),
    [
        (partitioned_sector(3, 17, 17, 2000), Geometry(147, 4, 17)),
        (partitioned_sector(254, 63, 63, 2000), Geometry(9, 16, 63)),  # larger than the disk: not believed
        (partitioned_sector(3, 0, 17, 2000), Geometry(9, 16, 63)),
        (partitioned_sector(3, 17, 17, 2000, kind=0), Geometry(9, 16, 63)),
        (partitioned_sector(3, 17, 9999, 2000), Geometry(9, 16, 63)),
        (partitioned_sector(3, 17, 17, 2000)[:510] + b"\0\0", Geometry(9, 16, 63)),
    ],
)
def test_geometry_comes_from_the_partition_table(sector: bytes, geometry: Geometry) -> None:
    assert Disk.from_bytes(sector + bytes(9999 * SECTOR_BYTES)).geometry == geometry


def test_media_can_be_forced() -> None:
    assert Disk.from_bytes(bytes(512), Media.FLOPPY).sector_count == 2880
    assert Disk.from_bytes(bytes(2880 * 512), Media.HARD).media is Media.HARD
    with pytest.raises(DiskError, match="too many for a floppy"):
        Disk.from_bytes(bytes(5761 * 512), Media.FLOPPY)


@pytest.mark.parametrize(
    ("cylinder", "head", "sector", "lba"),
    [(0, 0, 1, 0), (0, 0, 18, 17), (0, 1, 1, 18), (1, 0, 1, 36), (79, 1, 18, 2879)],
)
def test_chs_to_lba(cylinder: int, head: int, sector: int, lba: int) -> None:
    assert Geometry(80, 2, 18).to_lba(cylinder, head, sector) == lba


@pytest.mark.parametrize(("cylinder", "head", "sector"), [(80, 0, 1), (0, 2, 1), (0, 0, 19), (0, 0, 0)])
def test_chs_outside_has_no_lba(cylinder: int, head: int, sector: int) -> None:
    assert Geometry(80, 2, 18).to_lba(cylinder, head, sector) is None


def test_reads_and_overlay(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(numbered_sectors(4096))
    disk = Disk.open(path)
    assert disk.read(5, 2) == numbered_sectors(7)[5 * 512 :]
    disk.write(6, b"w" * 1024)
    assert disk.read(5, 4) == numbered_sectors(6)[5 * 512 :] + b"w" * 1024 + numbered_sectors(9)[8 * 512 :]
    assert path.read_bytes() == numbered_sectors(4096)
    state = disk.snapshot()
    disk.discard_writes()
    assert disk.read(6, 1) == numbered_sectors(7)[6 * 512 :]
    disk.restore(state)
    assert disk.read(6, 2) == b"w" * 1024
    disk.write(6, b"x" * 512)
    assert state == {"sectors": [[6, b"w" * 512], [7, b"w" * 512]]}
    disk.close()


def test_end_of_image_is_filled_with_zeros() -> None:
    disk = Disk.from_bytes(b"a" * 700)
    assert disk.read(1, 1) == b"a" * 188 + b"\0" * 324
    assert disk.read(1007, 1) == b"\0" * 512


def test_accesses_outside_are_errors() -> None:
    disk = Disk.from_bytes(bytes(2880 * 512))
    disk.read(2879, 1)
    for lba, count in ((2880, 1), (2879, 2), (-1, 1)):
        with pytest.raises(DiskError, match="of a disk of 2880"):
            disk.read(lba, count)
        with pytest.raises(DiskError, match="of a disk of 2880"):
            disk.write(lba, bytes(512 * count))
    with pytest.raises(DiskError, match="not whole sectors"):
        disk.write(0, b"abc")


def test_overlay_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_module, "MAX_OVERLAY_SECTORS", 4)
    disk = Disk.from_bytes(bytes(2880 * 512))
    disk.write(0, bytes(4 * 512))
    disk.write(1, b"y" * 1024)  # nothing new: still fits
    with pytest.raises(DiskError, match="more than 4 sectors"):
        disk.write(3, bytes(1024))


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="No such file"):
        Disk.open(tmp_path / "absent")
    with pytest.raises(DiskError, match="not a regular file"):
        Disk.open(tmp_path)
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(DiskError, match="empty"):
        Disk.open(tmp_path / "empty")


def test_file_that_shrinks_is_a_disk_error(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(2880 * 512))
    disk = Disk.open(path)
    path.write_bytes(b"")
    with pytest.raises(DiskError, match="shorter"):
        disk.read(0, 1)
    disk.close()
