"""Memory of the guest for people who look at it: linear or physical, without rights, A and D bits or other traces.

It knows the guest's page tables and physical memory; whoever asks, gdb or a monitor command, is unknown here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gdbstub.target import TargetError
from machine.memory import PAGE_BYTES, PAGE_SHIFT, READ_ONLY, PhysicalMemory
from machine.paging import PAE_ADDRESS, PHYSICAL_BITS, RW, US, G, P, entries, probe
from machine.state import CR0_PG, CR4_PAE, CR4_PGE, CpuState

Piece = tuple[int, bytes]  # physical address and bytes, inside one page

LINEAR_END = 1 << 32
PHYSICAL_END = 1 << PHYSICAL_BITS
_PAE_SPAN_BYTES = {"PDPTE": 1 << 30, "PDE": 2 << 20, "PTE": PAGE_BYTES}
_LEGACY_SPAN_BYTES = {"PDE": 4 << 20, "PTE": PAGE_BYTES}
# A look at one entry takes a few microseconds; after so many a caller in the server's thread should get its turn.
_ENTRIES_IN_SLICE = 256


@dataclass(frozen=True, slots=True)
class Mapping:
    """Linear addresses [`start`, `end`) that are mapped with equal rights.

    Attributes:
        writable: R/W of all levels.
        user: U/S of all levels.
        is_global: the G bit, where CR4.PGE gives it meaning.
    """

    start: int
    end: int
    writable: bool
    user: bool
    is_global: bool


def read_linear(memory: PhysicalMemory, state: CpuState, linear: int, length: int) -> bytes:
    """Up to `length` bytes, cut at the first page that is not mapped, or at 4 GiB."""
    parts = []
    end = min(linear + length, LINEAR_END)
    while linear < end:
        physical = probe(memory, state, linear)
        if physical is None:
            break
        count = min(end - linear, PAGE_BYTES - (linear & PAGE_BYTES - 1))
        parts.append(memory.read(physical, count))
        linear += count
    return b"".join(parts)


def read_physical(memory: PhysicalMemory, physical: int, length: int) -> bytes:
    """Up to `length` bytes, cut at the end of the physical address space."""
    return memory.read(physical, max(0, min(length, PHYSICAL_END - physical)))


def write_linear(memory: PhysicalMemory, state: CpuState, linear: int, data: bytes) -> list[Piece]:
    """Write through the page tables, whatever rights they give; returns what was written where.

    Raises:
        TargetError: a page is not mapped, or is ROM or nothing; no byte was written.
    """
    if linear + len(data) > LINEAR_END:
        raise TargetError(f"{len(data)} bytes at {linear:#x} go past the end of linear memory.")
    pieces: list[Piece] = []
    done = 0
    while done < len(data):
        count = min(len(data) - done, PAGE_BYTES - (linear + done & PAGE_BYTES - 1))
        physical = probe(memory, state, linear + done)
        if physical is None:
            raise TargetError(f"Linear address {linear + done:#010x} is not mapped.")
        pieces.append((physical, data[done : done + count]))
        done += count
    _write(memory, pieces)
    return pieces


def write_physical(memory: PhysicalMemory, physical: int, data: bytes) -> list[Piece]:
    """Write at physical addresses; returns what was written where.

    Raises:
        TargetError: it is ROM or nothing is there; no byte was written.
    """
    pieces: list[Piece] = []
    done = 0
    while done < len(data):
        count = min(len(data) - done, PAGE_BYTES - (physical + done & PAGE_BYTES - 1))
        pieces.append((physical + done, data[done : done + count]))
        done += count
    _write(memory, pieces)
    return pieces


def _write(memory: PhysicalMemory, pieces: list[Piece]) -> None:
    for physical, _ in pieces:
        at = memory.ram_address(physical)
        if at >= 0 and memory.page_flags[at >> PAGE_SHIFT] & READ_ONLY:
            raise TargetError(f"Physical address {physical:#010x} is ROM; it cannot be written.")
        if at < 0 and not memory.has_device(physical):
            raise TargetError(f"Nothing answers at physical address {physical:#010x}.")
    for physical, data in pieces:
        memory.write(physical, data)


def mappings(memory: PhysicalMemory, state: CpuState, start: int = 0) -> Iterator[Mapping | None]:
    """The mapped ranges from the page of `start` on, ascending and as long as possible.

    Yields:
        A mapping; or None now and then, when a while has passed without one.
    """
    if not state.cr0 & CR0_PG:
        yield Mapping(0, LINEAR_END, writable=True, user=True, is_global=False)
        return
    spans = _PAE_SPAN_BYTES if state.cr4 & CR4_PAE else _LEGACY_SPAN_BYTES
    current: Mapping | None = None
    linear = start & ~(PAGE_BYTES - 1)
    looked = 0
    while linear < LINEAR_END:
        found, span_bytes = _entry_rights(memory, state, linear, spans)
        end = (linear | span_bytes - 1) + 1
        rights = (current.writable, current.user, current.is_global) if current else None
        if current and found is not None and found == rights:
            current = Mapping(current.start, end, *found)
        else:
            if current:
                yield current
            current = Mapping(linear, end, *found) if found else None
        linear = end
        looked += 1
        if looked % _ENTRIES_IN_SLICE == 0:
            yield None
    if current:
        yield current


def _entry_rights(
    memory: PhysicalMemory, state: CpuState, linear: int, spans: dict[str, int]
) -> tuple[tuple[bool, bool, bool] | None, int]:
    """Writable, user and global of what maps `linear`, or None; and how many bytes the last entry spans."""
    rights = RW | US
    last_level, value = "", 0
    for entry in entries(memory, state, linear):
        last_level, value = entry.level, entry.value
        if not value & P or entry.reserved:
            return None, spans[last_level]
        if last_level != "PDPTE":
            rights &= value
    is_global = bool(value & G and state.cr4 & CR4_PGE)
    return (bool(rights & RW), bool(rights & US), is_global), spans[last_level]


def frame_address(value: int) -> int:
    """The physical address in a paging-structure entry (bits above the flags)."""
    return value & PAE_ADDRESS
