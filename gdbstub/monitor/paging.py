"""Monitor commands about paging: the walk of one address, what is mapped, what the TLB holds.

They read guest memory without rights or traces and change nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from gdbstub.guest_memory import mappings
from gdbstub.guest_stops import describe_error_code
from gdbstub.monitor.command import Command, parse_linear, usage_error
from machine.faults import PF_PRESENT, PF_RESERVED, PF_USER, PF_WRITE, Vector
from machine.paging import ACCESSED, DIRTY, PAE_ADDRESS, PCD, PWT, RW, US, Entry, G, P, entries
from machine.state import CR0_PG, CR0_WP, CR4_PAE, CpuState

if TYPE_CHECKING:
    from gdbstub.guest import GuestTarget

_BIT_NAMES = ((PWT, "PWT"), (PCD, "PCD"), (ACCESSED, "A"), (DIRTY, "D"), (G, "G"))
_PAGE_SIZES = {4096: "4 KiB", 2 << 20: "2 MiB", 4 << 20: "4 MiB"}


def show_page(guest: GuestTarget, words: list[str]) -> Iterator[str]:
    """`page ADDR`: the walk entry by entry, and what an access would meet."""
    if len(words) != 1:
        raise usage_error("page")
    linear = parse_linear(guest, words[0])
    machine = guest.machine
    state = machine.cpu.state
    if not state.cr0 & CR0_PG:
        yield f"Paging is off: linear {linear:#010x} is physical {linear:#010x}.\n"
        return
    kind = "PAE" if state.cr4 & CR4_PAE else "32-bit"
    yield f"Linear {linear:#010x}, {kind} paging, CR3 {state.cr3:#010x}\n"
    path = list(entries(machine.memory, state, linear))
    for entry in path:
        yield f"  {_describe_entry(entry)}\n"
    leaf = path[-1]
    if leaf.value & P and not leaf.reserved:
        offset_mask = leaf.page_bytes - 1
        physical = leaf.value & PAE_ADDRESS & ~offset_mask | linear & offset_mask
        yield f"Physical {physical:#010x}, in a page of {_PAGE_SIZES[leaf.page_bytes]}\n"
    for who, user in (("supervisor", False), ("user", True)):
        for access, write in (("read", False), ("write", True)):
            error = error_code(state, path, write=write, user=user)
            if error is None:
                yield f"  {who} {access}: allowed\n"
            else:
                yield f"  {who} {access}: #PF, error code {error:#x} ({describe_error_code(Vector.PF, error)})\n"


def error_code(state: CpuState, path: list[Entry], *, write: bool, user: bool) -> int | None:
    """The error code of the page fault that an access along `path` would raise; None if it would not."""
    error = (PF_WRITE if write else 0) | (PF_USER if user else 0)
    rights = RW | US
    for entry in path:
        if not entry.value & P:
            return error
        if entry.reserved:
            return error | PF_PRESENT | PF_RESERVED
        if entry.level != "PDPTE":
            rights &= entry.value
    writable = rights & RW or (not user and not state.cr0 & CR0_WP)
    if (user and not rights & US) or (write and not writable):
        return error | PF_PRESENT
    return None


def _describe_entry(entry: Entry) -> str:
    digits = 16 if entry.level == "PDPTE" or entry.value >> 32 else 8
    where = f"{entry.level:5} at physical {entry.physical:#010x}: {entry.value:0{digits}x}"
    if not entry.value & P:
        return f"{where}  not present"
    words = []
    if entry.level != "PDPTE":
        words += ["writable" if entry.value & RW else "read only", "user" if entry.value & US else "supervisor"]
    words += [name for bit, name in _BIT_NAMES if entry.value & bit and (bit not in (DIRTY, G) or entry.page_bytes)]
    if entry.page_bytes:
        frame = entry.value & PAE_ADDRESS & ~(entry.page_bytes - 1)
        words.append(f"{_PAGE_SIZES[entry.page_bytes]} page at {frame:#010x}")
    else:
        words.append(f"table at {entry.value & PAE_ADDRESS:#010x}")
    if entry.reserved:
        words.append(f"RESERVED BITS SET: {entry.reserved:#x}")
    return f"{where}  {', '.join(words)}"


def show_mappings(guest: GuestTarget, _words: list[str]) -> Iterator[str]:
    """`info mem`: mapped ranges with their rights."""
    machine = guest.machine
    if not machine.cpu.state.cr0 & CR0_PG:
        yield "Paging is off: every linear address is the physical one.\n"
        return
    empty = True
    for mapping in mappings(machine.memory, machine.cpu.state):
        if mapping is None:
            yield ""
            continue
        empty = False
        rights = f"{'u' if mapping.user else '-'}r{'w' if mapping.writable else '-'}"
        is_global = "  global" if mapping.is_global else ""
        length = mapping.end - mapping.start
        yield f"{mapping.start:08x}-{mapping.end - 1:08x}  {length:>13,} bytes  {rights}{is_global}\n"
    if empty:
        yield "Nothing is mapped.\n"


def show_tlb(guest: GuestTarget, _words: list[str]) -> Iterator[str]:
    """`info tlb`: cached translations."""
    cached = sorted(guest.machine.cpu.mmu.entries.items())
    if not cached:
        yield "The TLB is empty.\n"
    for _, entry in cached:
        rights = f"{'u' if entry.user else '-'}r{'w' if entry.writable else '-'}"
        size = _PAGE_SIZES.get(entry.page_bytes, "no paging")
        is_global = "  global" if entry.is_global else ""
        yield f"{entry.linear:08x} -> {entry.physical:08x}  {rights}  {size}{is_global}\n"


COMMANDS = (
    Command(
        "page",
        "ADDRESS",
        "the page-table walk of a linear address, entry by entry",
        show_page,
        details="It shows what each entry says, and for reads and writes by supervisor and user whether they are\n"
        "allowed or which page fault they raise.",
    ),
    Command("info mem", "", "the linear ranges that are mapped, and their rights", show_mappings),
    Command("info tlb", "", "the translations that the TLB holds", show_tlb),
)
