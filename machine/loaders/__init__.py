"""Loaders: from a file or its bytes to the memory writes and the CPU state with which the guest begins.

They must not know how the guest is run; nothing but `ImageError` escapes them, whatever the file holds.
"""

from machine.loaders.detection import detect, load
from machine.loaders.entry import EntryState, SegmentEntry
from machine.loaders.errors import ImageError
from machine.loaders.image import ImageKind, LoadedImage, LoadOptions, Module, parse_modules
from machine.loaders.layout import MemoryWrite

__all__ = [
    "EntryState",
    "ImageError",
    "ImageKind",
    "LoadOptions",
    "LoadedImage",
    "MemoryWrite",
    "Module",
    "SegmentEntry",
    "detect",
    "load",
    "parse_modules",
]
