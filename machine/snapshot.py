"""A machine as it stands at one instruction boundary, kept so that any number of machines can go on from there.

It owns a copy of everything that decides how the guest goes on. It must not know engines, which have nothing of that,
nor how a machine is put together.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import replace

from machine.cpu import Cpu
from machine.devices.board import Board
from machine.inputs import Input
from machine.loaders.image import LoadedImage

# An input of `--replay` that is still to come, with its event: virtual time, and order among those of the same time.
Awaited = tuple[Input, tuple[int, int]]


class Snapshot:
    """The copy. Nothing in it is shared with the machine that it was taken of.

    Attributes:
        icount: instructions that had retired.
        resets: how often RESET had been pulled.
        serial_used: whether the guest had used COM1 and COM2.
        replay: inputs that were to come.
    """

    def __init__(
        self,
        cpu: Cpu,
        board: Board,
        image: LoadedImage,
        resets: int,
        serial_used: tuple[bool, ...],
        replay: tuple[Awaited, ...],
    ) -> None:
        """Take it; the CPU stands between two instructions, with all of its state in `Cpu`.

        Raises:
            OSError: the host has no memory, or no more files can be open.
        """
        self.icount = cpu.clock.icount
        self.resets = resets
        self.serial_used = serial_used
        self.replay = replay
        self._registers = cpu.state.pack()
        self._pending_debug, self._repeating = cpu.pending_debug, cpu.repeating
        self._clock = cpu.clock.snapshot()
        self._lines, self._exit_request = cpu.lines.snapshot(), cpu.lines.exit_requested
        self._devices = board.snapshot()
        self._extents = tuple(cpu.memory.used_extents())
        descriptor = os.memfd_create("guest-ram-copy")
        try:
            os.ftruncate(descriptor, cpu.memory.ram_bytes)
            self._ram = mmap.mmap(descriptor, cpu.memory.ram_bytes)
        finally:
            os.close(descriptor)
        for first, end in self._extents:
            self._ram[first:end] = cpu.memory.ram8[first:end]
        # Last, for nobody would close it if the host refused anything else.
        self._image = image if image.disk is None else replace(image, disk=image.disk.copy())

    def close(self) -> None:
        """Give the copy of the memory, and the disk's file, back."""
        self._ram.close()
        if self._image.disk is not None:
            self._image.disk.close()

    def copy_image(self) -> LoadedImage:
        """The image for another machine, with a disk of its own that has the guest's writes."""
        image = self._image
        return image if image.disk is None else replace(image, disk=image.disk.copy())

    def restore(self, cpu: Cpu, board: Board) -> None:
        """Bring the parts of a machine, just put together from the same options, to where this one stood."""
        cpu.clock.restore(self._clock)
        cpu.lines.restore(self._lines)
        board.restore(self._devices)
        if self._exit_request is not None:
            cpu.lines.request_exit(self._exit_request)
        with memoryview(self._ram) as ram:
            for first, end in self._extents:
                cpu.memory.ram8[first:end] = ram[first:end]
        cpu.state.unpack(self._registers)
        cpu.pending_debug, cpu.repeating = self._pending_debug, self._repeating
        cpu.set_cpl(cpu.state.cpl)
        cpu.mmu.flush()
