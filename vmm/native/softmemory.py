"""What the software path to guest memory looks at besides RAM: the pages' flags, and which table entries are in use.

It says in the state block where they are, and whether the path may be taken. It must not know the code that does.
"""

from __future__ import annotations

import ctypes
from contextlib import ExitStack

from machine.cpu import Cpu
from machine.paging import ACCESSED, DIRTY, entries
from machine.state import CR0_PG
from vmm.native import adaptation, hostmemory, stateblock
from vmm.native.stateblock import StateBlock
from vmm.native.windows import Windows

_SEEN = 4096
_USES_BYTES = 1 << 30  # a byte for each doubleword that a 32-bit address can name


class SoftMemory:
    """The software path of one engine, in its state block.

    `page_flags` and `entry_uses` have a byte for whatever page, and whatever doubleword, a 32-bit number names.

    Attributes:
        uses_host, uses: where `entry_uses` is, and its bytes for RAM.
        counters: how often Python was asked instead, and for a look.
    """

    def __init__(self, cpu: Cpu, block: StateBlock, windows: Windows, beside: SoftMemory | None = None) -> None:
        """Map it.

        Args:
            cpu: whose memory it is.
            block: the state block of the emitted code that takes the path.
            windows: what may depend on table entries.
            beside: that of another engine on the same windows, which is closed later; `entry_uses` is the same.

        Raises:
            HostMemoryError: the host has no room.
        """
        self._cpu = cpu
        self._block = block
        self._windows = windows
        memory = cpu.memory
        self._is_first = beside is None
        with ExitStack() as undo:
            self._flags = (ctypes.c_char * len(memory.page_flags)).from_buffer(memory.page_flags)
            block.quads[stateblock.PAGE_FLAGS] = ctypes.addressof(self._flags)
            if beside is None:
                self.uses_host, self.uses = self._map_uses(undo)
            else:
                self.uses_host, self.uses = beside.uses_host, beside.uses
            block.quads[stateblock.ENTRY_USES] = self.uses_host
            self._undo = undo.pop_all()
        if self._is_first:
            cpu.mmu.entry_uses = self.uses
            cpu.mmu.flush()  # what is cached has not been entered
            windows.note_uses(self.uses)
        self._seen: dict[int, int] = {}  # entries of page tables that were looked at
        self._moved = False
        self.counters = {"soft accesses looked at": 0, "soft fallbacks": 0}
        self._restart()

    def _map_uses(self, undo: ExitStack) -> tuple[int, memoryview]:
        """Reserve and map `entry_uses`: its host address, and its bytes."""
        ram_bytes = self._cpu.memory.ram_bytes
        host = hostmemory.reserve(_USES_BYTES)
        undo.callback(hostmemory.release, host, _USES_BYTES)
        hostmemory.map_anonymous(ram_bytes >> 2, host=host)
        hostmemory.use_small_pages(host, ram_bytes >> 2)
        uses = hostmemory.view(host, ram_bytes >> 2)
        undo.callback(uses.release)
        return host, uses

    def attach(self) -> None:
        """Begin to strike off entries that a store has changed, after everybody who depended on them was told."""
        if self._is_first:
            self._cpu.memory.write_observers.append(self._written)

    def close(self) -> None:
        """Unmap everything; no emitted code may be running."""
        if self._is_first:
            self._cpu.memory.write_observers.remove(self._written)
            self._cpu.mmu.entry_uses = None
            self._windows.note_uses(None)
        self._block.words[stateblock.SOFT_LIMIT] = 0
        del self._flags
        self._undo.close()

    def publish(self, *, allowed: bool) -> None:
        """Say whether the path may be taken in the CPU's state; `allowed`: as far as others are concerned."""
        state, memory = self._cpu.state, self._cpu.memory
        usable = allowed and state.cr0 & CR0_PG and memory.a20_enabled
        self._block.words[stateblock.SOFT_LIMIT] = memory.ram_bytes if usable else 0

    @property
    def is_usable(self) -> bool:
        """Whether the path may be taken, as last published."""
        return bool(self._block.words[stateblock.SOFT_LIMIT])

    def look(self) -> bool:
        """The path was left; whether the instruction should be judged, as one of many or since all are in vain."""
        if self._block.words[stateblock.SOFT_LEFT] >> 31:
            self._restart()
            self.counters["soft accesses looked at"] += 1
            self._moved = self.is_usable and self._has_moved(self._block.words[stateblock.SOFT_LINEAR])
            return True
        self.counters["soft fallbacks"] += 1
        return not self.is_usable

    def take_moved(self) -> bool:
        """Whether the access that was last looked at was to a page whose entry has changed; asked once."""
        moved, self._moved = self._moved, False
        return moved

    def _restart(self) -> None:
        self._block.words[stateblock.SOFT_LEFT] = adaptation.SOFT_ACCESSES

    def _has_moved(self, linear: int) -> bool:
        """Whether the entry for a page says something else than when that was last asked, as far as is known."""
        if len(self._seen) >= _SEEN:
            self._seen.clear()
        *_, leaf = entries(self._cpu.memory, self._cpu.state, linear)
        value = leaf.value & ~(ACCESSED | DIRTY)
        before = self._seen.get(leaf.physical)
        self._seen[leaf.physical] = value
        self._windows.look_at(leaf.physical)
        return before != value

    def _written(self, at: int, length: int, _old: bytes, _flags: int) -> None:
        mmu, windows, first = self._cpu.mmu, self._windows, at >> 2
        used = bytes(self.uses[first : at + length + 3 >> 2])
        found = used.find(1)
        while found >= 0:
            cell = first + found << 2
            if not mmu.live_cells(cell, cell + 4) and not windows.depend_on(cell):
                self.uses[first + found] = 0
            found = used.find(1, found + 1)
