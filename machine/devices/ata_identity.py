"""The 512 bytes by which an ATA disk identifies itself.

It must not know the channel that the disk hangs on.
"""

from __future__ import annotations

import struct

from machine.disk import SECTOR_BYTES, Geometry

MULTIPLE_MAX_SECTORS = 16

_WORDS = SECTOR_BYTES // 2
_FIXED_DISK = 0x0040
_CAN_LBA = 0x0200
_CURRENT_GEOMETRY_VALID = 0x0001
_MULTIPLE_VALID = 0x0100
_PIO_MODE_2 = 0x0200
_ATA_1_TO_4 = 0x001E
_FLUSH_CACHE = 0x1000
_ALWAYS_SET = 0x4000
_LBA28_SECTORS = 0x0FFF_FFFF


def _text(text: str, words: int) -> list[int]:
    """ASCII with the first character of each pair in the high byte."""
    return list(struct.unpack(f">{words}H", text.ljust(2 * words).encode("ascii")))


def identity(sector_count: int, default: Geometry, current: Geometry, multiple_sectors: int, serial: str) -> bytes:
    """IDENTIFY DEVICE data.

    Args:
        sector_count: what LBA can address; more than 28 bits' worth is not told.
        default: the geometry of the drive.
        current: what INITIALIZE DEVICE PARAMETERS has made of it.
        multiple_sectors: the block of READ MULTIPLE, or 0.
        serial: at most 20 characters.

    Source: ATA/ATAPI-4 (T13/1153D), "IDENTIFY DEVICE".
    """
    sectors = min(sector_count, _LBA28_SECTORS)
    words = [0] * _WORDS
    words[0] = _FIXED_DISK
    words[1] = default.cylinders
    words[3] = default.heads
    words[6] = default.sectors
    words[10:20] = _text(serial, 10)
    words[23:27] = _text("1.0", 4)
    words[27:47] = _text("TRAPGATE DISK", 20)
    words[47] = 0x8000 | MULTIPLE_MAX_SECTORS
    words[49] = _CAN_LBA
    words[51] = _PIO_MODE_2
    words[53] = _CURRENT_GEOMETRY_VALID
    words[54:57] = [current.cylinders, current.heads, current.sectors]
    words[57:59] = [current.sector_count & 0xFFFF, current.sector_count >> 16]
    words[59] = _MULTIPLE_VALID | multiple_sectors if multiple_sectors else 0
    words[60:62] = [sectors & 0xFFFF, sectors >> 16]
    words[80] = _ATA_1_TO_4
    words[83] = words[84] = words[87] = _ALWAYS_SET
    words[83] |= _FLUSH_CACHE
    words[86] = _FLUSH_CACHE
    return struct.pack(f"<{_WORDS}H", *words)
