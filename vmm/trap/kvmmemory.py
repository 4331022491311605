"""The guest's physical memory as slots of KVM: RAM, the BIOS ROM read-only, and holes where devices answer.

It follows `PhysicalMemory.ram_address`, A20 included; devices and writes to ROM come back as exits.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from machine.memory import (
    HOLE_FIRST,
    HOLE_LAST,
    MIB,
    PAGE_BYTES,
    PAGE_SHIFT,
    READ_ONLY,
    ROM_ALIAS_END,
    PhysicalMemory,
)
from vmm.trap.kvm import Vm

_ROM_LIMIT_BYTES = 128 << 10


@dataclass(frozen=True, slots=True)
class Slot:
    """A run of guest-physical addresses that one run of RAM stands behind."""

    physical: int
    size_bytes: int
    ram_address: int
    read_only: bool


def slots_of(memory: PhysicalMemory) -> list[Slot]:
    """The slots for what `ram_address` says now: few runs, or with A20 held low two for each MiB."""
    slots: list[Slot] = []
    for first, last in ((0, HOLE_FIRST), (HOLE_FIRST, HOLE_LAST + 1), (HOLE_LAST + 1, memory.ram_bytes)):
        step = PAGE_BYTES if first == HOLE_FIRST else MIB
        if not memory.a20_enabled and first > HOLE_LAST:
            step = PAGE_BYTES  # the hole appears again in the odd MiB
        _add_runs(slots, memory, first, last, step)
    _add_runs(slots, memory, ROM_ALIAS_END - _ROM_LIMIT_BYTES, ROM_ALIAS_END, PAGE_BYTES)
    return slots


def _add_runs(slots: list[Slot], memory: PhysicalMemory, first: int, end: int, step: int) -> None:
    """Append the runs of [first, end), looked at in steps that are uniform, joined where they continue each other."""
    physical = first
    while physical < end:
        size_bytes = min(step, end - physical)
        at = memory.ram_address(physical)
        if at >= 0:
            read_only = bool(memory.page_flags[at >> PAGE_SHIFT] & READ_ONLY)
            last = slots[-1] if slots else None
            if (
                last is not None
                and (last.physical + last.size_bytes, last.ram_address + last.size_bytes) == (physical, at)
                and last.read_only == read_only
            ):
                slots[-1] = Slot(last.physical, last.size_bytes + size_bytes, last.ram_address, read_only)
            else:
                slots.append(Slot(physical, size_bytes, at, read_only))
        physical += size_bytes


class KvmMemory:
    """The slots of one virtual machine, kept as the guest's memory is."""

    def __init__(self, vm: Vm, memory: PhysicalMemory) -> None:
        self._vm = vm
        self._memory = memory
        self._slots: list[Slot] = []

    def attach(self) -> None:
        """Make the slots, and follow A20."""
        self._memory.map_observers.append(self.update)
        self.update()

    def detach(self) -> None:
        """Take them away."""
        self._memory.map_observers.remove(self.update)
        self._remove(0)

    def update(self) -> None:
        """A20 has changed, or all is new: make the slots what they should be."""
        wanted = slots_of(self._memory)
        if wanted == self._slots:
            return
        self._remove(0)
        host = _host_address(self._memory)
        for number, slot in enumerate(wanted):
            self._vm.set_memory(
                number, slot.physical, slot.size_bytes, host + slot.ram_address, read_only=slot.read_only
            )
        self._slots = wanted

    def _remove(self, first: int) -> None:
        for number, slot in enumerate(self._slots[first:], first):
            self._vm.set_memory(number, slot.physical, 0, 0, read_only=slot.read_only)
        del self._slots[first:]


def _host_address(memory: PhysicalMemory) -> int:
    """Where the machine's own mapping of RAM lies; it stays there until the memory is closed."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory.ram))
