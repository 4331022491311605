"""Images that carry no load address of their own, or no boot protocol: flat binaries and plain ELF executables.

It must not know how memory is written or the CPU is started.
"""

from machine.e820 import EXTENDED
from machine.loaders import elf
from machine.loaders.entry import STACK_TOP, EntryState, flat_entry, real_entry
from machine.loaders.errors import ImageError
from machine.loaders.layout import Layout


def load_flat(data: bytes, address: int, entry: int | None, entry_bits: int, layout: Layout) -> EntryState:
    """Place all bytes at `address` and enter at `entry` (None: the first byte), in real or flat protected mode.

    In protected mode all registers are 0 but ESP, `STACK_TOP`; in real mode see `real_entry`.

    Raises:
        ImageError: it does not fit, or a real-mode entry is not below 1 MiB.
    """
    if not data:
        raise ImageError("image is empty")
    if address < 0 or (entry is not None and not 0 <= entry <= 0xFFFF_FFFF):
        raise ImageError(f"load address {address:#x} and entry {entry or 0:#x} must be 32-bit numbers")
    layout.put(address, data, "flat binary")
    at = address if entry is None else entry
    if entry_bits == 32:
        return flat_entry(at, esp=STACK_TOP)
    if entry_bits != 16:
        raise ImageError(f"an entry has 16 or 32 bits, not {entry_bits}")
    if at >= EXTENDED:
        raise ImageError(f"entry {at:#x} is not below 1 MiB, where real mode reaches")
    return real_entry(at)


def load_elf(data: bytes, layout: Layout) -> EntryState:
    """Place an executable's segments; enter in flat protected mode, all registers 0 but ESP, `STACK_TOP`.

    Raises:
        ImageError: not an i386 executable, or it does not fit.
    """
    executable = elf.parse(data)
    elf.place(executable, layout)
    return flat_entry(executable.entry, esp=STACK_TOP)
