"""KVM's own counters, as the descriptor of KVM_GET_STATS_FD gives them: a header, descriptions, then values.

It must not know what any counter counts: their names come from the kernel.

Source: Linux, Documentation/virt/kvm/api.rst, "KVM_GET_STATS_FD".
"""

from __future__ import annotations

import os
from struct import Struct

_HEADER = Struct("<6I")  # flags, bytes of a name, how many, offsets of identity, descriptions and values
_DESCRIPTION = Struct("<IhHII")  # flags, exponent, how many values, offset, bucket; then the name
_VALUE_BYTES = 8


def read_counters(fd: int) -> dict[str, int]:
    """The counters by name; histograms, which have more than one value, are left out."""
    _, name_bytes, count, _, descriptions_at, values_at = _HEADER.unpack(os.pread(fd, _HEADER.size, 0))
    step = _DESCRIPTION.size + name_bytes
    descriptions = os.pread(fd, count * step, descriptions_at)
    found: dict[str, int] = {}
    for at in range(0, len(descriptions), step):
        _, _, values, offset, _ = _DESCRIPTION.unpack_from(descriptions, at)
        name = descriptions[at + _DESCRIPTION.size : at + step].split(b"\0")[0].decode()
        if values == 1:
            found[name] = int.from_bytes(os.pread(fd, _VALUE_BYTES, values_at + offset), "little")
    return found
