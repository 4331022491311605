"""The flat view of RAM for emitted code: 4 GiB of host addresses in which a guest's physical address is an offset.

Whatever 32-bit number a guest makes an address of, RAM or nothing of the host's is there. It must not know who looks.
"""

from __future__ import annotations

from contextlib import ExitStack

from machine.memory import HOLE_FIRST, HOLE_LAST, PhysicalMemory
from vmm.native import hostmemory
from vmm.native.stateblock import OFFSETS, StateBlock

# An entry of eight bytes at the last address ends behind the view.
_VIEW_BYTES = (1 << 32) + 4096
_VIEW = OFFSETS["ram_view"] // 8
_LIMIT = OFFSETS["ram_limit"] // 4


class RamView:
    """The view of one machine's RAM, without the PC hole, and what the state block says of it.

    `ram_view` is its address, `ram_limit` the size of RAM: 0 while address line 20 is held at zero, so that nobody who
    asks for the limit looks anywhere.
    """

    def __init__(self, memory: PhysicalMemory, block: StateBlock) -> None:
        """Map it.

        Raises:
            HostMemoryError: the host has no room.
        """
        self._memory = memory
        self._block = block
        with ExitStack() as undo:
            self.host = hostmemory.reserve(_VIEW_BYTES)
            undo.callback(hostmemory.release, self.host, _VIEW_BYTES)
            hostmemory.map_file(self.host, HOLE_FIRST, memory.ram_fd, 0, writable=True)
            first = HOLE_LAST + 1
            if memory.ram_bytes > first:
                hostmemory.map_file(self.host + first, memory.ram_bytes - first, memory.ram_fd, first, writable=True)
            self._undo = undo.pop_all()
        block.quads[_VIEW] = self.host
        self._map_changed()
        memory.map_observers.append(self._map_changed)

    def close(self) -> None:
        """Unmap it."""
        self._memory.map_observers.remove(self._map_changed)
        self._block.words[_LIMIT] = 0
        self._block.quads[_VIEW] = 0
        self._undo.close()

    def _map_changed(self) -> None:
        self._block.words[_LIMIT] = self._memory.ram_bytes if self._memory.a20_enabled else 0
