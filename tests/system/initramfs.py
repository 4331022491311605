"""Writes an initramfs: a few files as a cpio archive in the format that Linux unpacks at its start.

Source: the kernel's documentation, `driver-api/early-userspace/buffer-format`. It knows nothing of what the files are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

_MAGIC = b"070701"
_TRAILER = "TRAILER!!!"
DIRECTORY, CHARACTER_DEVICE, REGULAR = 0o040000, 0o020000, 0o100000


@dataclass(frozen=True, slots=True)
class Entry:
    """One file.

    Attributes:
        name: without a leading slash.
        mode: kind and permissions, as in `struct stat`.
        data: what a regular file holds.
        device: major and minor number of a device.
    """

    name: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def archive(entries: Iterable[Entry]) -> bytes:
    """All entries in turn, and the one that ends them."""
    return b"".join(map(_pack, (*entries, Entry(_TRAILER, 0))))


def _pack(entry: Entry) -> bytes:
    name = entry.name.encode() + b"\0"
    # inode, mode, uid, gid, links, mtime, size, device (2), its own device (2), length of the name, check sum
    fields = (0, entry.mode, 0, 0, 1, 0, len(entry.data), 0, 0, *entry.device, len(name), 0)
    return _padded(_MAGIC + b"".join(b"%08X" % value for value in fields) + name) + _padded(entry.data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
