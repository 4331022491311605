"""QEMU's firmware configuration device in its port form: selector 510h, data 511h.

It must not know what the items mean; `pc_items` makes those that firmware and kernels ask for.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import ClassVar

from machine.devices.device import Device
from machine.e820 import MemoryRegion

SELECTOR_PORT = 0x510
DATA_PORT = 0x511

SIGNATURE = 0x00
IDENTITY = 0x01
RAM_BYTES = 0x03
NO_GRAPHICS = 0x04
CPUS = 0x05
MAX_CPUS = 0x0F
COMMAND_LINE_BYTES = 0x14
COMMAND_LINE = 0x15
FILE_DIRECTORY = 0x19
FIRST_FILE = 0x20

_TRADITIONAL_INTERFACE = 1
_FILE_NAME_BYTES = 56


def pc_items(
    ram_bytes: int,
    memory_map: Sequence[MemoryRegion],
    command_line: bytes | None = None,
    *,
    cpus: int = 1,
    files: Mapping[str, bytes] | None = None,
) -> dict[int, bytes]:
    """The items of a PC by key: signature, RAM size, CPU count, command line, the file etc/e820, and `files` by name.

    Source: QEMU, "QEMU Firmware Configuration (fw_cfg) Device"; e820 entries as in INT 15h, E820h.
    """
    items = {
        SIGNATURE: b"QEMU",
        IDENTITY: struct.pack("<I", _TRADITIONAL_INTERFACE),
        RAM_BYTES: struct.pack("<Q", ram_bytes),
        NO_GRAPHICS: struct.pack("<H", 0),
        CPUS: struct.pack("<H", cpus),
        MAX_CPUS: struct.pack("<H", cpus),
    }
    if command_line is not None:
        text = command_line + b"\0"
        items[COMMAND_LINE_BYTES] = struct.pack("<I", len(text))
        items[COMMAND_LINE] = text
    e820 = b"".join(struct.pack("<QQI", region.base, region.length_bytes, region.kind) for region in memory_map)
    return items | file_items({"etc/e820": e820} | dict(files or {}))


def file_items(files: Mapping[str, bytes]) -> dict[int, bytes]:
    """The directory and the contents of named files, by key; in the order of their names."""
    directory = struct.pack(">I", len(files))
    items = {}
    for key, name in enumerate(sorted(files), FIRST_FILE):
        data = files[name]
        directory += struct.pack(f">IHH{_FILE_NAME_BYTES}s", len(data), key, 0, name.encode("ascii"))
        items[key] = data
    items[FILE_DIRECTORY] = directory
    return items


class FwCfg(Device):
    """A selected item is read byte by byte; past its end, and without such an item, zeros come."""

    _saved: ClassVar[tuple[str, ...]] = ("key", "offset")

    def __init__(self, items: Mapping[int, bytes]) -> None:
        self._items = dict(items)
        self.reset()

    def reset(self) -> None:
        """The signature is selected."""
        self.key = SIGNATURE
        self.offset = 0

    def load_port(self, port: int, size_bytes: int) -> int:  # noqa: ARG002
        """The next byte, at either port."""
        item = self._items.get(self.key, b"")
        if self.offset >= len(item):
            return 0
        self.offset += 1
        return item[self.offset - 1]

    def store_port(self, port: int, size_bytes: int, value: int) -> None:
        """A word at 510h selects; there is nothing to write at 511h."""
        if port == SELECTOR_PORT and size_bytes == 2:
            self.key = value
            self.offset = 0

    def describe(self) -> str:
        """The selected item."""
        return f"fw_cfg: key={self.key:04x} offset={self.offset}"
