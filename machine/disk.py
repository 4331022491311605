"""A disk image as numbered sectors, with its geometry and the guest's writes kept apart from the user's file.

It owns the image, the copy-on-write overlay and the choice of geometry; it must not know which controller or BIOS
service asks.
"""

from __future__ import annotations

import enum
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Self

SECTOR_BYTES = 512
#: Most sectors that a guest may have changed at once (512 MiB of data); past that a write is refused.
MAX_OVERLAY_SECTORS = 1 << 20

_PARTITION_TABLE = 446
_PARTITION_ENTRY = struct.Struct("<BBBBBBBBII")


class DiskError(Exception):
    """A disk image cannot be opened, or an access is outside it."""


class Media(enum.Enum):
    """What kind of drive the image is put into."""

    FLOPPY = "floppy"
    HARD = "hard"


@dataclass(frozen=True, slots=True)
class Geometry:
    """Cylinders, heads, sectors of a track; sectors are numbered from 1."""

    cylinders: int
    heads: int
    sectors: int

    @property
    def sector_count(self) -> int:
        """Sectors that this geometry addresses."""
        return self.cylinders * self.heads * self.sectors

    def to_lba(self, cylinder: int, head: int, sector: int) -> int | None:
        """The sector's linear number, or None where the geometry has no such sector."""
        if cylinder >= self.cylinders or head >= self.heads or not 1 <= sector <= self.sectors:
            return None
        return (cylinder * self.heads + head) * self.sectors + sector - 1


#: Floppy formats by sector count.
FLOPPIES: dict[int, Geometry] = {
    geometry.sector_count: geometry
    for geometry in (
        Geometry(40, 1, 8),  # 160 KiB
        Geometry(40, 1, 9),  # 180 KiB
        Geometry(40, 2, 8),  # 320 KiB
        Geometry(40, 2, 9),  # 360 KiB
        Geometry(80, 2, 9),  # 720 KiB
        Geometry(80, 2, 15),  # 1.2 MiB
        Geometry(80, 2, 18),  # 1.44 MiB
        Geometry(80, 2, 21),  # 1.68 MiB, DMF
        Geometry(82, 2, 21),  # 1.72 MiB
        Geometry(80, 2, 36),  # 2.88 MiB
    )
}


class Disk:
    """Sectors of 512 bytes: reads come from the overlay or the image, writes go to the overlay only.

    A short image is filled up with zeros, so that a lone boot sector can be booted: a floppy to the format that its FAT
    boot sector names or to the first of 1.44 MB and larger that holds it, a hard disk to one cylinder of 16 heads and
    63 sectors.

    Args:
        image: the bytes, or an open file descriptor, which the disk then owns.
        image_bytes: length of the image.
        media: kind of drive; None picks one: floppy for the exact size of a floppy format or for a FAT volume that
            says it is one, else hard disk.

    Raises:
        DiskError: the image is empty, or too large for a floppy.
    """

    def __init__(self, image: bytes | int, image_bytes: int, media: Media | None = None) -> None:
        if image_bytes == 0:
            raise DiskError("disk image is empty")
        self._image = image
        self._image_bytes = image_bytes
        self._overlay: dict[int, bytes] = {}
        used_sectors = -(-image_bytes // SECTOR_BYTES)
        boot_sector = self._read_image(0, 1)
        self.media = media or _guess_media(used_sectors, image_bytes, boot_sector)
        #: What BIOS services report and CHS addresses are taken by.
        self.geometry: Geometry
        #: What the drive itself reports (ATA IDENTIFY); never more than 16 heads.
        self.physical_geometry: Geometry
        if self.media is Media.FLOPPY:
            self.sector_count = _floppy_sectors(used_sectors, boot_sector)
            self.geometry = self.physical_geometry = FLOPPIES[self.sector_count]
        else:
            self.sector_count = max(used_sectors, 16 * 63)
            self.physical_geometry = Geometry(min(self.sector_count // (16 * 63), 16383), 16, 63)
            self.geometry = _partitioned_geometry(boot_sector, self.sector_count) or _translate(self.sector_count)

    @classmethod
    def from_bytes(cls, data: bytes, media: Media | None = None) -> Self:
        """A disk whose image is `data`."""
        return cls(data, len(data), media)

    @classmethod
    def open(cls, path: str | os.PathLike[str], media: Media | None = None) -> Self:
        """A disk whose image is a regular file, which is opened for reading only and never written.

        Raises:
            DiskError: the file cannot be opened, is not a regular file, or is empty.
        """
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise DiskError(f"{Path(path)}: {error.strerror}") from error
        try:
            return cls(descriptor, _file_bytes(descriptor), media)
        except DiskError as error:
            os.close(descriptor)
            raise DiskError(f"{Path(path)}: {error}") from error

    def copy(self) -> Disk:
        """Another disk with the same image and the writes so far; later ones are each disk's own.

        Raises:
            OSError: no more files can be open.
        """
        image = self._image if isinstance(self._image, bytes) else os.dup(self._image)
        other = Disk(image, self._image_bytes, self.media)
        other._overlay = dict(self._overlay)
        return other

    def close(self) -> None:
        """Give back the file; the disk must not be used afterwards."""
        if isinstance(self._image, int):
            os.close(self._image)
            self._image = b""
            self._image_bytes = 0

    def read(self, lba: int, count: int) -> bytes:
        """The `count` sectors from `lba` on.

        Raises:
            DiskError: some of them lie past the end, or the file has become unreadable.
        """
        self._check(lba, count)
        if not any(sector in self._overlay for sector in range(lba, lba + count)):
            return self._read_image(lba, count)
        return b"".join(self._overlay.get(sector) or self._read_image(sector, 1) for sector in range(lba, lba + count))

    def write(self, lba: int, data: bytes) -> None:
        """Put whole sectors into the overlay, from `lba` on.

        Raises:
            DiskError: not whole sectors, some past the end, or the overlay is full.
        """
        count, rest = divmod(len(data), SECTOR_BYTES)
        if rest:
            raise DiskError(f"a write of {len(data)} bytes is not whole sectors")
        self._check(lba, count)
        if len(self._overlay) + count > MAX_OVERLAY_SECTORS:
            fresh = sum(sector not in self._overlay for sector in range(lba, lba + count))
            if len(self._overlay) + fresh > MAX_OVERLAY_SECTORS:
                raise DiskError(f"more than {MAX_OVERLAY_SECTORS} sectors written")
        for index in range(count):
            self._overlay[lba + index] = bytes(data[index * SECTOR_BYTES : (index + 1) * SECTOR_BYTES])

    def discard_writes(self) -> None:
        """Back to the image as it was given. A reset of the machine does not do this; a restart of the run does."""
        self._overlay.clear()

    def snapshot(self) -> dict[str, object]:
        """The sectors written so far, as `[lba, data]` pairs in order."""
        return {"sectors": [[lba, self._overlay[lba]] for lba in sorted(self._overlay)]}

    def restore(self, state: dict[str, object]) -> None:
        """Back to the writes of a snapshot of this same image."""
        sectors = state["sectors"]
        assert isinstance(sectors, list)
        self._overlay = {int(lba): bytes(data) for lba, data in sectors}

    def _check(self, lba: int, count: int) -> None:
        if lba < 0 or count < 0 or lba + count > self.sector_count:
            raise DiskError(f"sectors {lba} to {lba + count - 1} of a disk of {self.sector_count}")

    def _read_image(self, lba: int, count: int) -> bytes:
        first = lba * SECTOR_BYTES
        length = count * SECTOR_BYTES
        inside = max(0, min(length, self._image_bytes - first))
        if isinstance(self._image, bytes):
            data = self._image[first : first + inside]
        else:
            data = self._read_file(first, inside)
        return data.ljust(length, b"\0")

    def _read_file(self, first: int, length: int) -> bytes:
        assert isinstance(self._image, int)
        pieces = []
        while length:
            try:
                piece = os.pread(self._image, length, first)
            except OSError as error:
                raise DiskError(f"disk image: {error.strerror}") from error
            if not piece:
                raise DiskError(f"disk image: the file has become shorter than {first + length} bytes")
            pieces.append(piece)
            first += len(piece)
            length -= len(piece)
        return b"".join(pieces)


def _file_bytes(descriptor: int) -> int:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise DiskError("not a regular file")
    return status.st_size


def _guess_media(sectors: int, image_bytes: int, boot_sector: bytes) -> Media:
    exact = image_bytes % SECTOR_BYTES == 0 and sectors in FLOPPIES
    return Media.FLOPPY if exact or sectors <= _fat_floppy_sectors(boot_sector) else Media.HARD


def _floppy_sectors(used: int, boot_sector: bytes) -> int:
    if used in FLOPPIES:
        return used
    named = _fat_floppy_sectors(boot_sector)
    if used <= named:
        return named
    for count in sorted(FLOPPIES):
        if count >= max(used, 2880):
            return count
    raise DiskError(f"{used} sectors are too many for a floppy: {max(FLOPPIES)} at most")


def _fat_floppy_sectors(boot_sector: bytes) -> int:
    """Sectors of the floppy format that a FAT boot sector describes, or 0.

    It begins with a jump and gives the bytes of a sector, the number of sectors and the media descriptor, which is
    F0h, or F9h and up, for floppies and F8h for hard disks.
    """
    (sector_bytes,) = struct.unpack_from("<H", boot_sector, 11)
    (sectors,) = struct.unpack_from("<H", boot_sector, 19)
    media = boot_sector[21]
    looks_like_fat = boot_sector[0] in (0xEB, 0xE9) and sector_bytes == SECTOR_BYTES
    return sectors if looks_like_fat and media >= 0xF0 and media != 0xF8 and sectors in FLOPPIES else 0


def _partitioned_geometry(boot_sector: bytes, sector_count: int) -> Geometry | None:
    """The geometry by which the disk was partitioned: partitions end at the last head and sector of a cylinder."""
    if boot_sector[510:512] != b"\x55\xaa":
        return None
    for index in range(4):
        entry = _PARTITION_ENTRY.unpack_from(boot_sector, _PARTITION_TABLE + index * _PARTITION_ENTRY.size)
        status, _, _, _, kind, last_head, last_sector, _, first_lba, length = entry
        if kind == 0 or length == 0 or last_head == 0 or status & 0x7F or first_lba + length > sector_count:
            continue
        sectors = last_sector & 63
        if sectors == 0 or last_head == 255:
            continue
        cylinders = sector_count // ((last_head + 1) * sectors)
        if cylinders >= 1:
            return Geometry(min(cylinders, 1024), last_head + 1, sectors)
    return None


def _translate(sector_count: int) -> Geometry:
    """The LBA-assisted translation of BIOSes: 63 sectors, and as many heads as make 1024 cylinders suffice."""
    for heads in (16, 32, 64, 128):
        if sector_count <= 1024 * heads * 63:
            return Geometry(max(1, sector_count // (heads * 63)), heads, 63)
    return Geometry(min(1024, sector_count // (255 * 63)), 255, 63)
