"""The map of physical memory that firmware hands to kernels, the one source for BIOS services, multiboot and fw_cfg.

It owns which addresses are RAM and which are kept; it must not know who asks or in which format it is told.
"""

import enum
from dataclasses import dataclass

KIB = 1024
MIB = 1024 * KIB

#: The extended BIOS data area: the last KiB below 640 KiB.
EBDA = 0x9FC00
EBDA_BYTES = 1 * KIB
CONVENTIONAL_END = 0xA0000
ROM = 0xF0000
ROM_BYTES = 64 * KIB
ROM_ALIAS = 0xFFFF0000
EXTENDED = 1 * MIB


class MemoryKind(enum.IntEnum):
    """Types of the INT 15h E820h interface."""

    USABLE = 1
    RESERVED = 2


@dataclass(frozen=True, slots=True)
class MemoryRegion:
    """Physical addresses [base, base + length_bytes) are of one kind."""

    base: int
    length_bytes: int
    kind: MemoryKind

    @property
    def end(self) -> int:
        """First address past the region."""
        return self.base + self.length_bytes


def memory_map(ram_bytes: int) -> tuple[MemoryRegion, ...]:
    """The regions of a machine with `ram_bytes` of RAM from address 0, ascending and without overlap.

    RAM under the PC hole (A0000h to FFFFFh) is not usable and is left out, as are all other unpopulated addresses.

    Raises:
        ValueError: less than 1 MiB, or more than fits below the ROM at the end of 4 GiB.

    Source: ACPI specification, "INT 15H, E820H - Query System Address Map".
    """
    if not EXTENDED <= ram_bytes <= ROM_ALIAS:
        raise ValueError(f"RAM of {ram_bytes} bytes: must be from {EXTENDED} to {ROM_ALIAS}")
    regions = [
        MemoryRegion(0, EBDA, MemoryKind.USABLE),
        MemoryRegion(EBDA, EBDA_BYTES, MemoryKind.RESERVED),
        MemoryRegion(ROM, ROM_BYTES, MemoryKind.RESERVED),
    ]
    if ram_bytes > EXTENDED:
        regions.append(MemoryRegion(EXTENDED, ram_bytes - EXTENDED, MemoryKind.USABLE))
    regions.append(MemoryRegion(ROM_ALIAS, ROM_BYTES, MemoryKind.RESERVED))
    return tuple(regions)


def usable_kib(ram_bytes: int) -> tuple[int, int]:
    """KiB of RAM from 0 up to the EBDA, and from 1 MiB up: what INT 12h, CMOS and multiboot's mem fields say."""
    return EBDA // KIB, (ram_bytes - EXTENDED) // KIB
