"""Stack frames of far transfers: room is checked, pages are probed, and only then is anything written.

It knows segments and offsets; which faults have which error codes is said by the callers.

Source: SDM Vol. 3A, "Stack Switching" and "Stack Usage on Transfers to Interrupt and Exception-Handling Routines".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from machine.faults import GuestFault, Vector, stack_fault
from machine.state import ESP, MASK32, SEG_DB, SS, Segment

if TYPE_CHECKING:
    from machine.cpu import Cpu


def stack_mask(segment: Segment) -> int:
    """The bits of ESP that address a stack in `segment`."""
    return MASK32 if segment.attributes & SEG_DB else 0xFFFF


def _is_inside(offset: int, size_bytes: int, low: int, high: int) -> bool:
    """The same rule as for other accesses, with its exception at the end of 4 GiB: see `Mmu.check_segment`."""
    if not low <= offset <= high:
        return False
    return offset + size_bytes - 1 <= high or (high == MASK32 and not low)


def check_room(segment: Segment, esp: int, count: int, size_bytes: int, error_code: int) -> None:
    """Raise #SS(`error_code`) unless `count` pushes of `size_bytes` below `esp` lie within the limit of `segment`."""
    mask = stack_mask(segment)
    low, high = segment.write_low, segment.write_high
    for number in range(1, count + 1):
        if not _is_inside((esp - number * size_bytes) & mask, size_bytes, low, high):
            raise stack_fault(error_code)


def push_frame(cpu: Cpu, segment: Segment, esp: int, size_bytes: int, values: Sequence[int], *, user: bool) -> int:
    """Push `values`, first one first, on a stack that `check_room` found large enough.

    Args:
        cpu: its memory is written; no register changes.
        segment: the stack, which need not be in SS yet.
        esp: where the stack points before.
        size_bytes: 2 or 4, of each value, which is cut to it.
        values: what to push.
        user: with the rights of CPL 3.

    Returns:
        The offset of the last value, cut to the width of the stack.

    Raises:
        GuestFault: #PF or #AC, before anything was written.
    """
    mmu = cpu.mmu
    mask = stack_mask(segment)
    value_mask = (1 << 8 * size_bytes) - 1
    places = [(segment.base + ((esp - n * size_bytes) & mask)) & MASK32 for n in range(1, len(values) + 1)]
    if user and mmu.aligned_only and places[0] & (size_bytes - 1):
        raise GuestFault(Vector.AC, 0)
    # The first push decides a fault; of the rest only those that come to another page can add one.
    page = -1
    for linear in places:
        last = linear + size_bytes - 1
        if linear >> 12 != page or last >> 12 != page:
            mmu.check_linear(linear, size_bytes, write=True, user=user)
            page = linear >> 12
    for linear, value in zip(places, values, strict=True):
        mmu.store_linear(linear, size_bytes, value & value_mask, user)
    return (esp - len(values) * size_bytes) & mask


def check_within(cpu: Cpu, count: int, size_bytes: int, skip_bytes: int = 0) -> None:
    """Raise #SS(0) unless `count` items from `skip_bytes` above ESP on lie within the limit of SS."""
    segment = cpu.state.segments[SS]
    mask = stack_mask(segment)
    esp = cpu.state.gpr[ESP] + skip_bytes
    low, high = segment.read_low, segment.read_high
    for number in range(count):
        if not _is_inside((esp + number * size_bytes) & mask, size_bytes, low, high):
            raise stack_fault(0)


def peek(cpu: Cpu, count: int, size_bytes: int, skip_bytes: int = 0) -> list[int]:
    """Read `count` items from `skip_bytes` above ESP on without popping them.

    Raises:
        GuestFault: #SS(0), or #PF or #AC at the present privilege level.
    """
    check_within(cpu, count, size_bytes, skip_bytes)
    segment = cpu.state.segments[SS]
    mask = stack_mask(segment)
    esp = cpu.state.gpr[ESP] + skip_bytes
    load = cpu.mmu.load32 if size_bytes == 4 else cpu.mmu.load16
    return [load(segment, (esp + number * size_bytes) & mask) for number in range(count)]
