"""Memory operands of x87, MMX and SSE instructions: of any size, into and out of the page where they are computed.

It checks and transfers; what the operands mean is not known here. Nothing is transferred unless all of it can be.

Source: SDM Vol. 3A, table "Alignment Requirements by Data Type"; what #AC asks of 16-byte operands and of FXSAVE was
measured on current processors.
"""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct

from machine.cpu import Cpu
from machine.faults import GuestFault, Vector, general_protection
from machine.fpustate import OPERAND
from machine.instructions.operands import Read
from machine.state import MASK32, Segment

_PAIR = Struct("<QQ")
_U64 = Struct("<Q")

# What #AC demands of an operand of so many bytes; an area of FSAVE or FSTENV says so itself.
_NATURAL = {1: 1, 2: 2, 4: 4, 8: 8, 10: 8, 16: 16}


def linear_address(
    cpu: Cpu, segment: Segment, at: int, size: int, *, write: bool, alignment: int, sixteen: bool
) -> int:
    """The linear address of an access that segment and alignment allow.

    Args:
        cpu: whose.
        segment: of the operand.
        at: its offset.
        size: bytes.
        write: else read.
        alignment: what #AC asks for.
        sixteen: a multiple of 16 is asked for always.

    Raises:
        GuestFault: #GP(0), #SS(0), #AC(0).
    """
    mmu = cpu.mmu
    linear = mmu.check_segment(segment, at, size, write=write)
    if sixteen and linear & 15:
        raise general_protection()
    if linear & (alignment - 1) and mmu.aligned_only and mmu.user:
        raise GuestFault(Vector.AC, 0)
    return linear


def load_bytes(cpu: Cpu, linear: int, size: int, chunk: int = 8) -> bytes:
    """`size` bytes from a linear address; where they are not plain RAM, by accesses of `chunk` bytes."""
    mmu = cpu.mmu
    data = bytearray()
    while len(data) < size:
        here = (linear + len(data)) & MASK32
        delta = mmu.reads.get(here >> 12)
        if delta is not None:
            count = min(0x1000 - (here & 0xFFF), size - len(data))
            data += mmu.ram8[here + delta : here + delta + count]
        else:
            count = _power_of_two(min(chunk, size - len(data)))
            data += mmu.load_linear(here, count, mmu.user).to_bytes(count, "little")
    return bytes(data)


def store_bytes(cpu: Cpu, linear: int, data: bytes | memoryview, chunk: int = 8) -> None:
    """The inverse; the caller has checked that all of it can be written."""
    mmu = cpu.mmu
    done = 0
    while done < len(data):
        here = (linear + done) & MASK32
        delta = mmu.writes.get(here >> 12)
        if delta is not None:
            count = min(0x1000 - (here & 0xFFF), len(data) - done)
            mmu.ram8[here + delta : here + delta + count] = data[done : done + count]
        else:
            count = _power_of_two(min(chunk, len(data) - done))
            mmu.store_linear(here, count, int.from_bytes(data[done : done + count], "little"), mmu.user)
        done += count


def _power_of_two(count: int) -> int:
    """The largest one that is not above `count`: sizes of single accesses."""
    return 1 << count.bit_length() - 1


def fetch(cpu: Cpu, segment: Segment, offset: Read, size: int, *, aligned: bool = False) -> Read:
    """A closure that brings the operand into the page and returns its offset in the segment.

    Args:
        cpu: whose.
        segment: of the operand.
        offset: computes its offset.
        size: 2, 4, 8, 10 or 16 bytes.
        aligned: #GP(0) unless the linear address is a multiple of 16.
    """
    fpu, mmu = cpu.state.fpu, cpu.mmu
    words, quads, page = fpu.words, fpu.quads, fpu.bytes8
    word, quad = OPERAND // 4, OPERAND // 8
    if size in (2, 4):
        load = mmu.load16 if size == 2 else mmu.load32

        def fetch_small() -> int:
            at = offset()
            words[word] = load(segment, at)
            return at

        return fetch_small
    alignment, last = _NATURAL[size], size - 1
    ram = mmu.ram
    mask = 15 if aligned else 0

    def fetch_slowly(at: int) -> None:
        linear = linear_address(cpu, segment, at, size, write=False, alignment=alignment, sixteen=aligned)
        page[OPERAND : OPERAND + size] = load_bytes(cpu, linear, size)

    def fetch8() -> int:
        at = offset()
        if segment.read_low <= at <= segment.read_high - 7:
            linear = (segment.base + at) & MASK32
            delta = mmu.reads.get(linear >> 12)
            if delta is not None and linear & 0xFFF <= 0xFF8:
                quads[quad] = _load64(ram, linear + delta)[0]
                return at
        fetch_slowly(at)
        return at

    def fetch_wide() -> int:
        at = offset()
        if segment.read_low <= at <= segment.read_high - 15:
            linear = (segment.base + at) & MASK32
            delta = mmu.reads.get(linear >> 12)
            if delta is not None and linear & 0xFFF <= 0xFF0 and not linear & mask:
                quads[quad], quads[quad + 1] = _load_pair(ram, linear + delta)
                return at
        fetch_slowly(at)
        return at

    # Ten bytes are fetched with the six behind them where these are as accessible.
    assert last == 7 or size in (10, 16)
    return fetch8 if size == 8 else fetch_wide


def reserve(cpu: Cpu, segment: Segment, offset: Read, size: int, *, aligned: bool = False) -> Read:
    """A closure that makes sure that the operand can be written, and returns its offset. Arguments as `fetch`'s."""
    mmu, alignment = cpu.mmu, _NATURAL[size]
    last, room, mask = size - 1, 0x1000 - size, 15 if aligned else 0

    def check() -> int:
        at = offset()
        if segment.write_low <= at <= segment.write_high - last:
            linear = (segment.base + at) & MASK32
            if linear >> 12 in mmu.writes and linear & 0xFFF <= room and not linear & mask:
                return at
        linear = linear_address(cpu, segment, at, size, write=True, alignment=alignment, sixteen=aligned)
        mmu.check_linear(linear, size, write=True, user=mmu.user)
        return at

    return check


def put(cpu: Cpu, segment: Segment, size: int) -> Callable[[int], None]:
    """A closure that stores the operand in the page to the offset that `reserve` has returned."""
    fpu, mmu = cpu.state.fpu, cpu.mmu
    words, quads, page = fpu.words, fpu.quads, fpu.bytes8
    word, quad = OPERAND // 4, OPERAND // 8
    if size == 2:
        return lambda at: mmu.store16(segment, at, words[word] & 0xFFFF)
    if size == 4:
        return lambda at: mmu.store32(segment, at, words[word])
    room = 0x1000 - size
    ram, ram8 = mmu.ram, mmu.ram8

    def store(at: int) -> None:
        linear = (segment.base + at) & MASK32
        delta = mmu.writes.get(linear >> 12)
        if delta is not None and linear & 0xFFF <= room:
            if size == 8:
                _store64(ram, linear + delta, quads[quad])
            elif size == 16:
                _store_pair(ram, linear + delta, quads[quad], quads[quad + 1])
            else:
                ram8[linear + delta : linear + delta + size] = page[OPERAND : OPERAND + size]
            return
        store_bytes(cpu, linear, page[OPERAND : OPERAND + size])

    return store


StoreArea = Callable[[bytes], None]
LoadArea = Callable[[], bytes]


def store_area(
    cpu: Cpu, segment: Segment, offset: Read, size: int, alignment: int, *, sixteen: bool = False
) -> StoreArea:
    """A closure that stores the first bytes of an area of `size` bytes, all of which must be writable.

    Args:
        cpu: whose.
        segment: of the operand.
        offset: computes its offset.
        size: at most 4096.
        alignment: what #AC asks for: 2 or 4.
        sixteen: #GP(0) unless the linear address is a multiple of 16.
    """

    def store(data: bytes) -> None:
        linear = linear_address(cpu, segment, offset(), size, write=True, alignment=alignment, sixteen=False)
        if sixteen and linear & 15:
            raise general_protection()
        cpu.mmu.check_linear(linear, size, write=True, user=cpu.mmu.user)
        store_bytes(cpu, linear, data, alignment)

    return store


def load_area(
    cpu: Cpu, segment: Segment, offset: Read, size: int, alignment: int, *, sixteen: bool = False
) -> LoadArea:
    """A closure that loads an area. Arguments as `store_area`'s."""

    def load() -> bytes:
        linear = linear_address(cpu, segment, offset(), size, write=False, alignment=alignment, sixteen=False)
        if sixteen and linear & 15:
            raise general_protection()
        return load_bytes(cpu, linear, size, alignment)

    return load


_load64: Callable[[object, int], tuple[int]] = _U64.unpack_from  # type: ignore[assignment]
_load_pair: Callable[[object, int], tuple[int, int]] = _PAIR.unpack_from  # type: ignore[assignment]
_store64 = _U64.pack_into
_store_pair = _PAIR.pack_into
