"""Monitor commands that show descriptor tables and the task state segment, decoded.

They read guest memory without rights or traces and change nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from construct import Int16ul, Int32ul, Padding, Struct

from gdbstub.guest_memory import read_linear
from gdbstub.guest_stops import EXCEPTION_TITLES, name_of_vector
from gdbstub.monitor.command import Command, parse_number, usage_error
from gdbstub.target import TargetError
from machine.descriptors import (
    IS_32,
    KINDS,
    RPL,
    TSS16,
    TSS16_BUSY,
    TSS32,
    TSS32_BUSY,
    Descriptor,
    TableEntry,
    list_table,
)
from machine.faults import TI, Vector
from machine.state import CR0_PE, MASK32, SEG_S, SEG_TYPE

if TYPE_CHECKING:
    from gdbstub.guest import GuestTarget

_TSS_KINDS = (TSS16, TSS16_BUSY, TSS32, TSS32_BUSY)

TSS32_LAYOUT = Struct(
    "link" / Int16ul, Padding(2),
    "esp0" / Int32ul, "ss0" / Int16ul, Padding(2),
    "esp1" / Int32ul, "ss1" / Int16ul, Padding(2),
    "esp2" / Int32ul, "ss2" / Int16ul, Padding(2),
    "cr3" / Int32ul, "eip" / Int32ul, "eflags" / Int32ul,
    "eax" / Int32ul, "ecx" / Int32ul, "edx" / Int32ul, "ebx" / Int32ul,
    "esp" / Int32ul, "ebp" / Int32ul, "esi" / Int32ul, "edi" / Int32ul,
    "es" / Int16ul, Padding(2), "cs" / Int16ul, Padding(2), "ss" / Int16ul, Padding(2),
    "ds" / Int16ul, Padding(2), "fs" / Int16ul, Padding(2), "gs" / Int16ul, Padding(2),
    "ldt" / Int16ul, Padding(2), "trap" / Int16ul, "io_map" / Int16ul,
)  # fmt: skip
"""The 32-bit task state segment. Source: SDM Vol. 3A, "Task-State Segment (TSS)"."""
TSS16_LAYOUT = Struct(
    "link" / Int16ul, "sp0" / Int16ul, "ss0" / Int16ul, "sp1" / Int16ul, "ss1" / Int16ul, "sp2" / Int16ul,
    "ss2" / Int16ul, "ip" / Int16ul, "flags" / Int16ul, "ax" / Int16ul, "cx" / Int16ul, "dx" / Int16ul,
    "bx" / Int16ul, "sp" / Int16ul, "bp" / Int16ul, "si" / Int16ul, "di" / Int16ul, "es" / Int16ul, "cs" / Int16ul,
    "ss" / Int16ul, "ds" / Int16ul, "ldt" / Int16ul,
)  # fmt: skip
"""The 16-bit task state segment. Source: SDM Vol. 3A, "16-Bit Task-State Segment (TSS)"."""


def describe_entry(entry: TableEntry) -> str:
    """One descriptor: what it is, where it leads, who may use it."""
    if entry.is_gate:
        target = (
            f"TSS {entry.gate_selector:04x}"
            if entry.kind == "task gate"
            else (f"{entry.gate_selector:04x}:{entry.gate_offset:08x}")
        )
        words = [target, entry.kind]
        if entry.kind.startswith("call gate"):
            words.append(f"{entry.parameter_count} parameters")
    else:
        words = [f"base {entry.base:08x}, limit {entry.limit:08x}", entry.kind]
    words.append(f"DPL {entry.dpl}")
    if not entry.present:
        words.append("not present")
    return ", ".join(words)


def show_gdt(guest: GuestTarget, _words: list[str]) -> Iterator[str]:
    """`info gdt`."""
    gdtr = guest.machine.cpu.state.gdtr
    yield f"GDT at linear {gdtr.base:#010x}, limit {gdtr.limit:#06x}\n"
    yield from _show_table(guest, "gdt")


def show_ldt(guest: GuestTarget, _words: list[str]) -> Iterator[str]:
    """`info ldt`."""
    ldtr = guest.machine.cpu.state.ldtr
    if ldtr.selector & ~RPL == 0:
        yield "There is no LDT: LDTR holds a null selector.\n"
        return
    yield f"LDT, selector {ldtr.selector:04x}, at linear {ldtr.base:#010x}, limit {ldtr.limit:#06x}\n"
    yield from _show_table(guest, "ldt")


def _show_table(guest: GuestTarget, table: str) -> Iterator[str]:
    """The entries, runs of equal ones said once; zeros are left out."""
    unmapped = zeros = 0
    for entry in list_table(guest.machine.cpu, table):
        if entry is None:
            unmapped += 1
        elif entry.raw == 0:
            zeros += 1
        else:
            yield f"  {entry.selector:04x}  {describe_entry(entry)}\n"
            continue
        yield ""
    if zeros:
        yield f"  {zeros} that are zero\n"
    if unmapped:
        yield f"  {unmapped} that are not in mapped RAM\n"


def show_idt(guest: GuestTarget, words: list[str]) -> Iterator[str]:
    """`info idt [VECTOR]`: gates in protected mode, far pointers in real mode."""
    if len(words) > 1:
        raise usage_error("info idt")
    state = guest.machine.cpu.state
    protected = bool(state.cr0 & CR0_PE)
    only = parse_number(guest, words[0], "vector") if words else None
    vectors = min(256, (state.idtr.limit + 1) // (8 if protected else 4))
    if only is not None and not 0 <= only < vectors:
        raise TargetError(f"Vector {only:#x} is beyond the limit of the table.")
    title = "IDT" if protected else "Interrupt vectors"
    yield f"{title} at linear {state.idtr.base:#010x}, limit {state.idtr.limit:#06x}\n"
    previous, repeated = "", 0
    for vector, text in _gates(guest) if protected else _far_pointers(guest, vectors):
        if only not in (None, vector):
            continue
        if text == previous:
            repeated += 1
            yield ""
            continue
        if repeated:
            yield f"        and {repeated} more like this\n"
        previous, repeated = text, 0
        yield f"  {vector:02x} {exception_name(vector):4} {text}\n"
    if repeated:
        yield f"        and {repeated} more like this\n"


def exception_name(vector: int) -> str:
    """`#GP`, `NMI`, or nothing for a vector that no exception has."""
    return "NMI" if vector == Vector.NMI else name_of_vector(vector) if vector in EXCEPTION_TITLES else ""


def _gates(guest: GuestTarget) -> Iterator[tuple[int, str]]:
    for index, entry in enumerate(list_table(guest.machine.cpu, "idt")):
        if entry is None:
            yield index, "not in mapped RAM"
        elif entry.raw == 0:
            yield index, "zero"
        elif entry.is_gate:
            yield index, describe_entry(entry)
        else:
            yield index, f"not a gate: {entry.raw:016x}"


def _far_pointers(guest: GuestTarget, vectors: int) -> Iterator[tuple[int, str]]:
    machine = guest.machine
    for vector in range(vectors):
        at = machine.cpu.state.idtr.base + vector * 4
        raw = read_linear(machine.memory, machine.cpu.state, at & MASK32, 4)
        pointer = int.from_bytes(raw, "little")
        yield vector, f"{pointer >> 16:04x}:{pointer & 0xFFFF:04x}" if len(raw) == 4 else "not in mapped RAM"


def show_tss(guest: GuestTarget, words: list[str]) -> Iterator[str]:
    """`info tss [SELECTOR]`."""
    machine = guest.machine
    state = machine.cpu.state
    if len(words) > 1:
        raise usage_error("info tss")
    if words:
        selector = parse_number(guest, words[0], "selector")
        raw = b""
        if 0 <= selector <= 0xFFFF and selector & ~RPL and selector | 7 <= state.gdtr.limit:
            raw = read_linear(machine.memory, state, (state.gdtr.base + (selector & 0xFFF8)) & MASK32, 8)
        if len(raw) < 8 or selector & TI:
            raise TargetError(f"Selector {selector:#06x} is not in the GDT.")
        tss = Descriptor(0, int.from_bytes(raw, "little"))
        base, limit, kind = tss.base, tss.limit, tss.system_type
    else:
        tr = state.tr
        selector, base, limit, kind = tr.selector, tr.base, tr.limit, tr.attributes & (SEG_S | SEG_TYPE)
        if selector & ~RPL == 0:
            yield "There is no task state segment: TR holds a null selector.\n"
            return
    if kind not in _TSS_KINDS:
        raise TargetError(f"Selector {selector:#06x} is not of a TSS.")
    layout = TSS32_LAYOUT if kind & IS_32 else TSS16_LAYOUT
    yield f"{KINDS[kind]}, selector {selector:04x}, at linear {base:#010x}, limit {limit:#x}\n"
    data = read_linear(machine.memory, state, base, layout.sizeof())
    if len(data) < layout.sizeof():
        raise TargetError("It is on a page that is not mapped.")
    fields = {name: value for name, value in layout.parse(data).items() if not name.startswith("_")}
    cells = [f"{name:>6} {value:08x}" for name, value in fields.items()]
    for first in range(0, len(cells), 4):
        yield "  " + "  ".join(cells[first : first + 4]) + "\n"
    if kind & IS_32:
        yield _describe_io_map(fields["io_map"], limit)


def _describe_io_map(first: int, limit: int) -> str:
    if first + 1 > limit:
        return "  no I/O permission bitmap: every port needs CPL <= IOPL\n"
    ports = min((limit - first) * 8, 1 << 16)
    return f"  I/O permission bitmap at offset {first:#x} for ports 0 to {ports - 1:#x}\n"


COMMANDS = (
    Command("info gdt", "", "the global descriptor table, decoded", show_gdt),
    Command("info ldt", "", "the local descriptor table, decoded", show_ldt),
    Command("info idt", "[VECTOR]", "the interrupt table: gates, or real mode's far pointers", show_idt),
    Command("info tss", "[SELECTOR]", "the task state segment of TR, or of a selector of the GDT", show_tss),
)
