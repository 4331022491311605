"""What a PC's firmware finds in the CMOS memory: memory sizes, drives, boot order, and the checksum over them.

It must not know the clock chip that holds the bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

_KIB = 1 << 10
_MIB = 1 << 20
_GIB = 1 << 30
_16_MIB = 16 * _MIB
_64_KIB = 64 * _KIB
_WORD_MAX = 0xFFFF
_CONVENTIONAL_KIB = 640

_FLOPPY_TYPES = 0x10
_DISK_TYPES = 0x12
_EQUIPMENT = 0x14
_BASE_MEMORY = 0x15
_EXTENDED_MEMORY = 0x17
_EXTENDED_DISK_TYPES = 0x19
_USER_DISK_GEOMETRIES = (0x1B, 0x24)
_CHECKSUM = 0x2E
_EXTENDED_MEMORY_FOUND = 0x30
_ABOVE_16_MIB = 0x34
_BOOT_THIRD = 0x38
_BOOT_FIRST_TWO = 0x3D
_ABOVE_4_GIB = 0x5B
_OTHER_CPUS = 0x5F

_EQUIPMENT_FLOPPY = 0x01
_EQUIPMENT_FPU = 0x02
_EQUIPMENT_MOUSE = 0x04
_EQUIPMENT_SECOND_FLOPPY = 0x40

_TYPE_IN_EXTENSION = 0xF
_TYPE_USER = 47

_BOOT_CODES = {"a": 1, "c": 2, "d": 3, "n": 4}


def cmos_contents(
    ram_bytes: int,
    *,
    floppy_types: Sequence[int] = (),
    disk_geometries: Sequence[tuple[int, int, int] | None] = (),
    boot_order: str = "cad",
    fpu: bool = False,
    cpus: int = 1,
) -> dict[int, int]:
    """The bytes by index, as the firmware of a PC (QEMU's and Bochs' layout) expects them.

    Args:
        ram_bytes: all RAM from address 0; what lies above 4 GiB is told apart.
        floppy_types: for up to two drives the CMOS type: 4 is 1.44 MB, 5 is 2.88 MB, 0 is none.
        disk_geometries: for up to two fixed disks (cylinders, heads, sectors), or None.
        boot_order: up to three letters: a floppy, c disk, d CD-ROM, n network.
        fpu: an FPU is there.
        cpus: number of processors.

    Raises:
        ValueError: a letter of `boot_order` is none of these, or there are too many of something.
    """
    if len(floppy_types) > 2 or len(disk_geometries) > 2 or len(boot_order) > 3 or set(boot_order) - set(_BOOT_CODES):
        raise ValueError(f"CMOS has two floppies, two disks and three boot devices of a, c, d, n: {boot_order!r}")
    contents: dict[int, int] = {}

    def word(index: int, value: int) -> None:
        value = min(value, _WORD_MAX)
        contents[index] = value & 0xFF
        contents[index + 1] = value >> 8

    low_bytes = min(ram_bytes, 4 * _GIB)
    word(_BASE_MEMORY, min(_CONVENTIONAL_KIB, ram_bytes // _KIB))
    extended_kib = max(0, low_bytes - _MIB) // _KIB
    word(_EXTENDED_MEMORY, extended_kib)
    word(_EXTENDED_MEMORY_FOUND, extended_kib)
    word(_ABOVE_16_MIB, max(0, low_bytes - _16_MIB) // _64_KIB)
    above = (ram_bytes - low_bytes) // _64_KIB
    for byte in range(3):
        contents[_ABOVE_4_GIB + byte] = above >> 8 * byte & 0xFF
    contents[_OTHER_CPUS] = cpus - 1

    first, second = (*floppy_types, 0, 0)[:2]
    contents[_FLOPPY_TYPES] = first << 4 | second
    equipment = _EQUIPMENT_MOUSE | (_EQUIPMENT_FPU if fpu else 0)
    if first or second:
        equipment |= _EQUIPMENT_FLOPPY
    if first and second:
        equipment |= _EQUIPMENT_SECOND_FLOPPY
    contents[_EQUIPMENT] = equipment

    contents[_DISK_TYPES] = 0
    for number, geometry in enumerate(disk_geometries):
        if geometry is None:
            continue
        cylinders, heads, sectors = geometry
        contents[_DISK_TYPES] |= _TYPE_IN_EXTENSION << (0 if number else 4)
        contents[_EXTENDED_DISK_TYPES + number] = _TYPE_USER
        base = _USER_DISK_GEOMETRIES[number]
        word(base, cylinders)
        contents[base + 2] = heads & 0xFF
        word(base + 3, _WORD_MAX)
        contents[base + 5] = 0xC0 | (0x08 if heads > 8 else 0)
        word(base + 6, cylinders)
        contents[base + 8] = sectors

    codes = [_BOOT_CODES[letter] for letter in boot_order] + [0, 0, 0]
    contents[_BOOT_FIRST_TWO] = codes[1] << 4 | codes[0]
    contents[_BOOT_THIRD] = codes[2] << 4

    # The checksum is stored high byte first, unlike every other word.
    checksum = sum(contents.get(index, 0) for index in range(_FLOPPY_TYPES, _CHECKSUM)) & _WORD_MAX
    contents[_CHECKSUM] = checksum >> 8
    contents[_CHECKSUM + 1] = checksum & 0xFF
    return contents
