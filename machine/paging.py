"""The page-table walk: linear to physical addresses through the guest's own tables, with their A and D bits.

It knows tables in memory and the control registers that shape them; caching translations is the MMU's business.

Source: SDM Vol. 3A, "Paging": 32-bit paging with 4 MiB pages (no PSE-36), and PAE paging without execute-disable.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from machine.faults import PF_PRESENT, PF_RESERVED, PF_USER, PF_WRITE, PageFault, general_protection
from machine.memory import PhysicalMemory
from machine.state import CR0_PG, CR0_WP, CR4_PAE, CR4_PGE, CR4_PSE, CpuState

P = 1 << 0
RW = 1 << 1
US = 1 << 2
PWT = 1 << 3
PCD = 1 << 4
ACCESSED = 1 << 5
DIRTY = 1 << 6
PS = 1 << 7
G = 1 << 8

PHYSICAL_BITS = 36
PAE_ADDRESS = (1 << PHYSICAL_BITS) - 0x1000
PAE_RESERVED = (1 << 64) - (1 << PHYSICAL_BITS)
PDPTE_RESERVED = PAE_RESERVED | 0x1E6
LARGE_RESERVED = 0x003F_E000  # PDE of a 4 MiB page, bits 21:13: address bits of PSE-36, which this CPU has not
LARGE_PAE_RESERVED = 0x001F_E000  # PDE of a 2 MiB page, bits 20:13


@dataclass(frozen=True, slots=True)
class Entry:
    """One paging-structure entry met on a walk.

    Attributes:
        level: "PDPTE", "PDE" or "PTE".
        physical: where it stands.
        value: 32 bits, 64 with PAE.
        page_bytes: size of the page that it maps, 0 if it points to a table.
        reserved: the reserved bits that are set in it and must not be.
    """

    level: str
    physical: int
    value: int
    page_bytes: int
    reserved: int


@dataclass(frozen=True, slots=True)
class Translation:
    """The outcome of a walk that did not fault.

    Attributes:
        physical: address of the byte asked for.
        page_bytes: 4096, 2 MiB or 4 MiB; 4 GiB without paging.
        writable: R/W of all levels.
        user: U/S of all levels.
        dirty: the D bit after the walk.
        is_global: the G bit, where CR4.PGE gives it meaning.
        tables: physical addresses of the entries used.
    """

    physical: int
    page_bytes: int
    writable: bool
    user: bool
    dirty: bool
    is_global: bool
    tables: tuple[int, ...]


def entries(memory: PhysicalMemory, state: CpuState, linear: int) -> Iterator[Entry]:
    """The entries that map `linear`, top down; it ends after a not-present one. Nothing is changed."""
    if state.cr4 & CR4_PAE:
        at = (state.cr3 & 0xFFFF_FFE0) + (linear >> 30) * 8
        value = memory.load(at, 4) | memory.load(at + 4, 4) << 32
        yield Entry("PDPTE", at, value, 0, value & PDPTE_RESERVED)
        if not value & P:
            return
        at = (value & PAE_ADDRESS) + (linear >> 21 & 0x1FF) * 8
        value = memory.load(at, 4) | memory.load(at + 4, 4) << 32
        if value & PS:
            yield Entry("PDE", at, value, 2 << 20, value & (PAE_RESERVED | LARGE_PAE_RESERVED))
            return
        yield Entry("PDE", at, value, 0, value & PAE_RESERVED)
        if not value & P:
            return
        at = (value & PAE_ADDRESS) + (linear >> 12 & 0x1FF) * 8
        value = memory.load(at, 4) | memory.load(at + 4, 4) << 32
        yield Entry("PTE", at, value, 4096, value & PAE_RESERVED)
        return
    at = (state.cr3 & 0xFFFF_F000) + (linear >> 22) * 4
    value = memory.load(at, 4)
    if value & PS and state.cr4 & CR4_PSE:
        yield Entry("PDE", at, value, 4 << 20, value & LARGE_RESERVED)
        return
    yield Entry("PDE", at, value, 0, 0)
    if not value & P:
        return
    at = (value & 0xFFFF_F000) + (linear >> 12 & 0x3FF) * 4
    yield Entry("PTE", at, memory.load(at, 4), 4096, 0)


def check_pdptes(memory: PhysicalMemory, cr4: int, cr3: int) -> None:
    """Raise #GP(0) if a present PDPTE of the four at `cr3` has a reserved bit set; nothing is asked without CR4.PAE."""
    if not cr4 & CR4_PAE:
        return
    for at in range(cr3 & 0xFFFF_FFE0, (cr3 & 0xFFFF_FFE0) + 32, 8):
        value = memory.load(at, 4) | memory.load(at + 4, 4) << 32
        if value & P and value & PDPTE_RESERVED:
            raise general_protection(0)


def walk(memory: PhysicalMemory, state: CpuState, linear: int, *, write: bool, user: bool) -> Translation:
    """Translate `linear`; A and D bits are written back as the access demands.

    Args:
        memory: guest physical memory.
        state: CR0, CR3 and CR4 are read.
        linear: address in [0, 2**32), after segmentation.
        write: the access writes (or is the read half of a read-modify-write).
        user: the access is made at CPL 3 and not an implicit supervisor access.

    Raises:
        PageFault: not present, reserved bit, or not permitted. CR2 is set by delivery.
    """
    if not state.cr0 & CR0_PG:
        return Translation(linear, 1 << 32, writable=True, user=True, dirty=True, is_global=False, tables=())
    error = (PF_WRITE if write else 0) | (PF_USER if user else 0)
    if not state.cr4 & CR4_PAE:
        return _walk_two_levels(memory, state, linear, error)
    rights = RW | US
    path: list[Entry] = []
    for entry in entries(memory, state, linear):
        if not entry.value & P:
            raise PageFault(linear, error)
        if entry.reserved:
            raise PageFault(linear, error | PF_PRESENT | PF_RESERVED)
        path.append(entry)
        if entry.level != "PDPTE":
            rights &= entry.value
    leaf = path[-1]
    writable = bool(rights & RW)
    allowed = writable or not write or (not user and not state.cr0 & CR0_WP)
    if (user and not rights & US) or not allowed:
        raise PageFault(linear, error | PF_PRESENT)
    for entry in path:
        if entry.level == "PDPTE":
            continue
        value = entry.value | ACCESSED
        if entry is leaf and write:
            value |= DIRTY
        if value != entry.value:
            memory.store_entry(entry.physical, value & 0xFFFF_FFFF)
    offset_mask = leaf.page_bytes - 1
    frame = leaf.value & PAE_ADDRESS & ~offset_mask
    return Translation(
        frame | linear & offset_mask,
        leaf.page_bytes,
        writable=writable,
        user=bool(rights & US),
        dirty=write or bool(leaf.value & DIRTY),
        is_global=bool(leaf.value & G and state.cr4 & CR4_PGE),
        tables=tuple(entry.physical for entry in path),
    )


def _walk_two_levels(memory: PhysicalMemory, state: CpuState, linear: int, error: int) -> Translation:
    """`walk` for 32-bit paging, in as few steps as Python allows: most guests use it, and most TLB misses end here."""
    upper_at = (state.cr3 & 0xFFFF_F000) + (linear >> 22) * 4
    upper = leaf = memory.load(upper_at, 4)
    if not upper & P:
        raise PageFault(linear, error)
    is_large = upper & PS and state.cr4 & CR4_PSE
    if is_large:
        if upper & LARGE_RESERVED:
            raise PageFault(linear, error | PF_PRESENT | PF_RESERVED)
        leaf_at, rights = upper_at, upper
    else:
        leaf_at = (upper & 0xFFFF_F000) + (linear >> 12 & 0x3FF) * 4
        leaf = memory.load(leaf_at, 4)
        if not leaf & P:
            raise PageFault(linear, error)
        rights = upper & leaf
    write, user = error & PF_WRITE, error & PF_USER
    writable = bool(rights & RW)
    if (user and not rights & US) or (write and not writable and (user or state.cr0 & CR0_WP)):
        raise PageFault(linear, error | PF_PRESENT)
    if not is_large and not upper & ACCESSED:
        memory.store_entry(upper_at, upper | ACCESSED)
    touched = leaf | ACCESSED | (DIRTY if write else 0)
    if touched != leaf:
        memory.store_entry(leaf_at, touched)
    offset_mask = 0x3F_FFFF if is_large else 0xFFF
    return Translation(
        leaf & 0xFFFF_FFFF & ~offset_mask | linear & offset_mask,
        offset_mask + 1,
        writable=writable,
        user=bool(rights & US),
        dirty=bool(touched & DIRTY),
        is_global=bool(leaf & G and state.cr4 & CR4_PGE),
        tables=(upper_at,) if is_large else (upper_at, leaf_at),
    )


def permits(memory: PhysicalMemory, state: CpuState, linear: int, *, write: bool, user: bool) -> bool:
    """Whether `walk` would find no page fault; no bit is set."""
    if not state.cr0 & CR0_PG:
        return True
    rights = RW | US
    for entry in entries(memory, state, linear):
        if not entry.value & P or entry.reserved:
            return False
        if entry.level != "PDPTE":
            rights &= entry.value
    if user and not rights & US:
        return False
    return bool(rights & RW) or not write or (not user and not state.cr0 & CR0_WP)


def probe(memory: PhysicalMemory, state: CpuState, linear: int) -> int | None:
    """The physical address behind `linear` for a debugger: no rights are asked, no bit is set; None if not mapped."""
    if not state.cr0 & CR0_PG:
        return linear
    leaf = None
    for leaf in entries(memory, state, linear):
        if not leaf.value & P or leaf.reserved:
            return None
    if leaf is None:
        return None
    offset_mask = leaf.page_bytes - 1
    return leaf.value & PAE_ADDRESS & ~offset_mask | linear & offset_mask
