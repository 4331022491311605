"""What two guests that should be equal differ in, by the names that the architecture and the devices give it.

It owns the comparison of two guests that stand still, and the names. It must not know how they came there.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from machine import flags
from machine.clock import Clock
from machine.cpu import Cpu
from machine.debug import Stop
from machine.engine import Engine
from machine.fpustate import SSE_REGISTERS, X87_REGISTERS, read_register
from machine.lines import CpuLines
from machine.memory import PAGE_BYTES, PhysicalMemory
from machine.state import STATE_LAYOUT

MEMORY_LINES = 8

_GPR_NAMES = ("eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi")
_SEGMENT_NAMES = ("es", "cs", "ss", "ds", "fs", "gs")
_memcmp = ctypes.CDLL(None).memcmp
_memcmp.restype = ctypes.c_int
_memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


class Guest(Protocol):
    """What is compared: `machine.pc.Machine` is one."""

    @property
    def cpu(self) -> Cpu:
        """Its CPU."""

    @property
    def memory(self) -> PhysicalMemory:
        """Its memory."""

    @property
    def clock(self) -> Clock:
        """Its clock."""

    @property
    def lines(self) -> CpuLines:
        """Its CPU's lines."""

    @property
    def engine(self) -> Engine:
        """What runs it."""

    def close(self) -> None:
        """Give everything back."""


class Kind(Enum):
    """What kind of thing differs."""

    STOP = "stop"
    REGISTER = "register"
    FLAG = "flag"
    CPU = "cpu"  # what the CPU knows besides its registers
    CLOCK = "clock"
    LINE = "line"  # into the CPU
    DEVICE = "device"
    OUTPUT = "output"
    MEMORY = "memory"


# Named by themselves.
_UNMARKED = (Kind.REGISTER, Kind.STOP, Kind.OUTPUT)


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that is not equal.

    Attributes:
        kind: what it is.
        name: which: a register, a flag, a device with the path to the value in it, a physical address in hex.
        first, second: the values, as people read them.
    """

    kind: Kind
    name: str
    first: str
    second: str

    def __str__(self) -> str:
        mark = "" if self.kind in _UNMARKED else f"{self.kind.value} "
        return f"{mark}{self.name}: {self.first} / {self.second}"


def guest_differences(ours: Guest, theirs: Guest) -> Iterator[Difference]:
    """What the guests' programs could tell apart, devices and what they have sent out excepted."""
    a, b = ours.cpu.state.pack(), theirs.cpu.state.pack()
    if a != b:
        yield from _register_differences(ours.cpu, theirs.cpu, STATE_LAYOUT.parse(a), STATE_LAYOUT.parse(b))
    yield from tree_differences(Kind.CPU, _beside_registers(ours), _beside_registers(theirs))
    yield from tree_differences(Kind.CLOCK, ours.clock.snapshot(), theirs.clock.snapshot())
    yield from tree_differences(Kind.LINE, ours.lines.snapshot(), theirs.lines.snapshot())
    yield from _memory_differences(ours.memory, theirs.memory)


def stop_differences(first: Stop | None, second: Stop | None) -> Iterator[Difference]:
    """What stopped either guest, if that is not the same."""
    if first != second:
        yield Difference(Kind.STOP, "stopped by", describe_stop(first), describe_stop(second))


def describe_stop(stop: Stop | None) -> str:
    """What stopped a guest, in a few words."""
    if stop is None:
        return "nothing"
    text = stop.kind.name.lower().replace("_", " ")
    if stop.exit_request is not None:
        return f"{text} ({stop.exit_request.kind.value}, status {stop.exit_request.status})"
    levels = " then ".join(f"vector {level.vector} at {level.cs:04x}:{level.eip:08x}" for level in stop.chain)
    return f"{text} ({levels})" if levels else text


def output_differences(first: bytes | bytearray, second: bytes | bytearray) -> Iterator[Difference]:
    """Where what the guests have sent out parts."""
    if first == second:
        return
    shorter = min(len(first), len(second))
    common = next((at for at, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), shorter)
    shown = [repr(bytes(data[common : common + 40])) for data in (first, second)]
    yield Difference(Kind.OUTPUT, f"output after {common} bytes", *shown)


def tree_differences(kind: Kind, first: Mapping[str, object], second: Mapping[str, object]) -> Iterator[Difference]:
    """The values that differ in two nested mappings, each by its path."""
    if first == second:
        return
    ours, theirs = dict(_flatten("", first)), dict(_flatten("", second))
    for name in (*ours, *(name for name in theirs if name not in ours)):
        if ours.get(name) != theirs.get(name):
            yield Difference(kind, name, _show(ours.get(name)), _show(theirs.get(name)))


def _register_differences(
    ours: Cpu, theirs: Cpu, first: Mapping[str, object], second: Mapping[str, object]
) -> Iterator[Difference]:
    fields = [
        dict(_flatten("", {name: value for name, value in each.items() if name != "fpu"})) for each in (first, second)
    ]
    for name, value in fields[0].items():
        other = fields[1][name]
        if value == other:
            continue
        if name == "eflags" and isinstance(value, int) and isinstance(other, int):
            yield from _flag_differences(value, other)
        else:
            yield Difference(Kind.REGISTER, _register_name(name), _show(value), _show(other))
    for name in (*X87_REGISTERS, *SSE_REGISTERS) if first["fpu"] != second["fpu"] else ():
        a, b = (read_register(cpu.state.fpu, name) for cpu in (ours, theirs))
        if a != b:
            yield Difference(Kind.REGISTER, name, _show(a), _show(b))


def _flag_differences(first: int, second: int) -> Iterator[Difference]:
    for name, mask in flags.NAMES:
        if (first ^ second) & mask:
            # The lowest bit of the mask is the field's.
            yield Difference(Kind.FLAG, name, *[str((value & mask) // (mask & -mask)) for value in (first, second)])


def _register_name(path: str) -> str:
    """What people call the register at a path of `STATE_LAYOUT`: gpr[3] is EBX, segments[1].limit is CS's limit."""
    head, bracket, rest = path.partition("[")
    number, _, part = rest.partition("]")
    if head == "gpr":
        return _GPR_NAMES[int(number)]
    if head == "segments":
        return f"{_SEGMENT_NAMES[int(number)]}{part}"
    return f"{head}{number}{part}" if bracket else path


def _beside_registers(guest: Guest) -> dict[str, object]:
    cpu = guest.cpu
    return {"pending_debug": cpu.pending_debug, "repeating": cpu.repeating, "a20": guest.memory.a20_enabled}


def _flatten(name: str, value: object) -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping):
        for key, each in value.items():
            if key != "_io":  # construct's own
                yield from _flatten(f"{name}.{key}" if name else str(key), each)
    elif isinstance(value, list | tuple):
        for index, each in enumerate(value):
            yield from _flatten(f"{name}[{index}]", each)
    else:
        yield name, value


def _show(value: object) -> str:
    if isinstance(value, bytes) and len(value) > 40:
        return f"{value[:40].hex()}... ({len(value)} bytes)"
    return f"{value:#x}" if isinstance(value, int) and not isinstance(value, bool) else repr(value)


def _memory_differences(first: PhysicalMemory, second: PhysicalMemory) -> Iterator[Difference]:
    if first.ram_bytes != second.ram_bytes:
        yield Difference(Kind.MEMORY, "size in bytes", _show(first.ram_bytes), _show(second.ram_bytes))
        return
    shown = 0
    for start, end in _touched(first, second):
        if _equal(first.ram8[start:end], second.ram8[start:end]):
            continue
        for page in range(start, end, PAGE_BYTES):
            a, b = first.ram[page : page + PAGE_BYTES], second.ram[page : page + PAGE_BYTES]
            for at in range(0, PAGE_BYTES if a != b else 0, 4):
                if a[at : at + 4] != b[at : at + 4]:
                    shown += 1
                    if shown <= MEMORY_LINES:
                        name, values = f"{page + at:08x}", [each[at : at + 4].hex(" ") for each in (a, b)]
                        yield Difference(Kind.MEMORY, name, *values)
    if shown > MEMORY_LINES:
        yield Difference(Kind.MEMORY, "doublewords besides", *[str(shown - MEMORY_LINES)] * 2)


def _equal(first: memoryview, second: memoryview) -> bool:
    # Two memoryviews are compared byte by byte, each by way of a Python object.
    address = ctypes.addressof(ctypes.c_char.from_buffer(first)), ctypes.addressof(ctypes.c_char.from_buffer(second))
    return not _memcmp(*address, len(first))


def _touched(*memories: PhysicalMemory) -> Iterator[tuple[int, int]]:
    """The parts of RAM that either guest has touched."""
    edges = [edge for memory in memories for first, end in memory.used_extents() for edge in ((first, 1), (end, -1))]
    depth, begin = 0, 0
    for at, change in sorted(edges, key=lambda edge: (edge[0], -edge[1])):
        if not depth:
            begin = at
        depth += change
        if not depth:
            yield begin, at
