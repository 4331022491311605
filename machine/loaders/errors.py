"""The one error by which a loader refuses what the user gave it, and reading structures so that only it escapes.

It must not know any format.
"""

from typing import Any

from construct import Construct, ConstructError


class ImageError(Exception):
    """An image, module or option cannot be used; the message is one line that says what is wrong, and where."""


def parse_at(structure: Construct, data: bytes, offset: int, what: str) -> Any:  # noqa: ANN401 - construct's containers
    """Parse `structure` at `offset` of a file's bytes.

    Raises:
        ImageError: the file ends before the structure does, or the bytes do not make one.
    """
    size_bytes = structure.sizeof()
    if offset + size_bytes > len(data):
        raise ImageError(f"truncated: {what} at offset {offset:#x} needs {size_bytes} bytes, file has {len(data):#x}")
    try:
        return structure.parse(data[offset : offset + size_bytes])
    except ConstructError as error:
        raise ImageError(f"{what} at offset {offset:#x}: {str(error).splitlines()[-1]}") from error
