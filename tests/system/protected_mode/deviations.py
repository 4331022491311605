"""Where the oracles depart from the SDM, and how records are compared in spite of it.

It knows records and the names of cases; which processor is right is said here with the reason, once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from types import MappingProxyType

from tests.system.protected_mode.arena import ARENA, RF, S_TSS_16, STACK0, STACK1, STACK3, TSS_B, TSS_MAIN
from tests.system.protected_mode.harness import Record

DIGITS = 6
UNKNOWN = "-" * DIGITS  # the oracle is wrong, its record does not count

_DOUBLE_FAULT = 8
_SELECTOR_CODED = (10, 11, 12, 13)
_TABLES_END = 0x240  # of GDT and LDT in the arena
_SAVED_FLAGS = tuple(tss + 0x24 - ARENA for tss in (TSS_MAIN, TSS_B))
_SAVED_ESP = TSS_MAIN + 0x38 - ARENA
_STACKS = range(STACK0 - ARENA - 0x100, STACK3 - ARENA)
_SMALL_STACK = range(STACK1 - ARENA - 0x80, STACK1 - ARENA)  # with a base of its own in the cases about limits

# By suite and beginning of the case's name: what Bochs 2.7 does differently.
BOCHS: Mapping[tuple[str, str], str] = MappingProxyType(
    {
        ("transfers.outer_stacks", f"iretd ss access {access:02x} rpl 3"): (
            "IRET to a stack segment that is not present is #SS(selector) (SDM Vol. 2, IRET); Bochs raises #NP"
        )
        for access in (0x72, 0x73, 0x76, 0x77)
    }
)

# The same for QEMU 7.2's TCG. Reasons that are matters of single values are in `_same_for_qemu`.
QEMU: Mapping[tuple[str, str], str] = MappingProxyType(
    {
        ("segments.stack_segments", "mov ss, eax; nop access 96"): "TCG does not know the limits of a stack",
        ("segments.stack_segments", "mov ss, eax; nop access 97"): "TCG does not know the limits of a stack",
        ("interrupts.inner_stacks", "int 0x31 ss1 b6 rpl 1"): "TCG does not know the limits of a stack",
        ("interrupts.inner_stacks", "int 0x31 ss1 b7 rpl 1"): "TCG does not know the limits of a stack",
        ("interrupts.inner_stacks", "call 203:0 ss1 b6 rpl 1"): "TCG does not know the limits of a stack",
        ("interrupts.inner_stacks", "call 203:0 ss1 b7 rpl 1"): "TCG does not know the limits of a stack",
        ("interrupts.gates", ".byte 0xf1"): "TCG of 7.2 raises #UD for INT1",
        ("transfers.fast_calls", "sysenter cs 3"): "SYSENTER_CS[15:2] = 0 is #GP(0) (SDM Vol. 2); TCG asks all 32 bits",
        ("transfers.fast_calls", "sysexit cs 3"): "SYSENTER_CS[15:2] = 0 is #GP(0) (SDM Vol. 2); TCG asks all 32 bits",
        ("tasks.back_links", "iret to selector 48"): "a task that returns to itself is undone by TCG's order of loads",
    }
    | {
        (suite, f"{instruction} {access:02x} rpl {rpl}"): (
            "a stack segment that is not present is #SS(selector) (SDM Vol. 2, RET, IRET, CALL, INT n), not for TCG"
        )
        for suite, instruction, first, rpl in (
            ("transfers.outer_stacks", "iretd ss access", 0x70, 3),
            ("transfers.outer_stacks", "retf ss access", 0x70, 3),
            ("interrupts.inner_stacks", "call 203:0 ss1", 0x30, 1),
        )
        for access in (first + 2, first + 3, first + 6, first + 7)
    }
    | {
        ("interrupts.code_segments", f"int through gate to {access:02x} rpl 0 cpl 86"): (
            "from virtual-8086 mode only to DPL 0 (SDM Vol. 2, INT n); TCG goes to other levels too"
        )
        for access in (*range(0xB8, 0xBC), *range(0xD8, 0xDC))
    }
    | {
        ("transfers.calls", f"call access {access:02x} rpl {rpl} cpl {level} gate to 70"): (
            "CS.RPL becomes CPL (SDM Vol. 2, CALL); TCG leaves that of the gate's selector after a conforming segment"
        )
        for access in (0xAC, 0xCC, 0xEC)
        for rpl, level in ((1, 1), (3, 3))
    }
    | {
        ("transfers.segments_dropped", f"{instruction} to {level} with {selector}"): (
            "a null selector with an RPL comes out as 0; TCG leaves FS and GS alone, which long mode needs"
        )
        for instruction in ("iretd", "retf")
        for level in (1, 3)
        for selector in (1, 3)
    }
)


def reason(table: Mapping[tuple[str, str], str], suite: str, name: str) -> str | None:
    """Why an oracle's record of a case does not count, or None if it does."""
    for (which, beginning), why in table.items():
        if which == suite and name.startswith(beginning):
            return why
    return None


def digest(record: Record) -> str:
    """`DIGITS` hexadecimal digits for a record, equal for all that counts as equal to Bochs'.

    After a switch to the task of vector 8 two things do not count: RF in the EFLAGS that the switch saved (Bochs sets
    it, though #DF is an abort), and what lies below the saved stack pointer (Bochs writes what fits before it faults).
    """
    changes = dict(record.changes)
    if record.registers["vector"] == _DOUBLE_FAULT:
        for offset in _SAVED_FLAGS:
            if offset in changes:
                changes[offset] &= ~RF
        changes = {offset: value for offset, value in changes.items() if not _is_below_stack(offset, record)}
    text = repr((sorted(record.registers.items()), sorted(changes.items()), record.dumps))
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]


def _is_below_stack(offset: int, record: Record) -> bool:
    if offset in _SMALL_STACK:
        return True
    return offset in _STACKS and ARENA + offset < record.changes.get(_SAVED_ESP, 0)


def unlike_qemu(suite: str, ours: Record, theirs: Record) -> list[str]:
    """What of our record QEMU's contradicts."""
    found = []
    pairs = [(name, value, theirs.registers[name]) for name, value in ours.registers.items()]
    for name, value, other in pairs:
        if value != other and not _same_for_qemu(suite, name, value, other, ours):
            found.append(f"{name} {value:#x}, not {other:#x}")
    for offset in sorted(ours.changes.keys() | theirs.changes.keys()):
        value_found, other_found = ours.changes.get(offset), theirs.changes.get(offset)
        if value_found == other_found:
            continue
        if value_found is None or other_found is None:
            # TCG does not set the accessed bit of what a transfer loads (SDM Vol. 3A, "Code- and Data-Segment
            # Descriptor Types").
            accessed = value_found is not None and offset < _TABLES_END and value_found & 0x1100 == 0x1100
            if not (accessed and other_found is None):
                found.append(f"at {offset:#x} {value_found}, not {other_found}")
        elif not _same_for_qemu(suite, "", value_found, other_found, ours):
            found.append(f"at {offset:#x} {value_found:#x}, not {other_found:#x}")
    if ours.dumps != theirs.dumps:
        found.append(f"dumps {ours.dumps.hex()}, not {theirs.dumps.hex()}")
    return found


def _same_for_qemu(suite: str, register: str, ours: int, theirs: int, record: Record) -> bool:
    return any(_excuses(suite, register, ours, theirs, record))


def _excuses(suite: str, register: str, ours: int, theirs: int, record: Record) -> Iterator[bool]:
    difference = ours ^ theirs
    # TCG of 7.2 saves RF = 0 for faults, and keeps what IRET loaded (SDM Vol. 3B, "Instruction-Breakpoint Exception").
    yield difference == RF and register in ("", "eflags")
    # It has no EXT in error codes (SDM Vol. 3A, "Error Code").
    yield not register and difference == 1 and bool(ours & 1) and record.registers["vector"] in _SELECTOR_CODED
    # A 16-bit TSS leaves the upper halves open: ours become ones, TCG's stay.
    is_16 = record.registers["tr"] == S_TSS_16 or record.registers["ecx"] >> 16 == 0xFFFF
    yield is_16 and ours >> 16 == 0xFFFF and not difference & 0xFFFF
    # Bits 19:16 of what LAR returns are undefined: ours are the descriptor's, as in the processors measured.
    yield suite == "segments.looks" and not difference & ~0xF_0000 and not theirs & 0xF_0000
