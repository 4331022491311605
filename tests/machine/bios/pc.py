"""A whole PC for BIOS tests: memory, board, CPU, engine and firmware, with or without running it."""

from collections.abc import Mapping

from machine.alu import build_alu
from machine.bios import FIRMWARE_PORT, Caller, Firmware, rom
from machine.bios.frame import FRAME_BYTES, CallFrame
from machine.clock import Clock
from machine.cpu import Cpu
from machine.debug import DebugControl, Stop, StopKind
from machine.devices.board import Board, BoardOptions
from machine.disk import Disk, Media
from machine.lines import CpuLines
from machine.loaders.entry import apply, reset_entry
from machine.memory import PhysicalMemory
from machine.state import CS
from tests import engine

MIB = 1 << 20
FRAME = 0x0600  # where `call` puts its frame: 0000:0600


class Pc:
    """Everything wired up as at power-on.

    Attributes:
        debugcon: bytes the guest wrote to port E9h.
    """

    def __init__(self, drives: Mapping[int, Disk] | None = None, ram_bytes: int = 16 * MIB) -> None:
        self.debugcon = bytearray()
        self.drives = dict(drives or {})
        self.clock = Clock()
        self.lines = CpuLines()
        self.memory = PhysicalMemory(ram_bytes)
        hard = tuple(disk for number, disk in sorted(self.drives.items()) if disk.media is Media.HARD)
        self.board = Board(self.clock, self.lines, self.memory, BoardOptions(disks=hard, debugcon=self.debugcon.extend))
        self.cpu = Cpu(self.memory, self.board.ports, self.lines, self.clock, build_alu())
        self.engine = engine.make(self.cpu, DebugControl())
        self.memory.map_rom(rom())
        self.firmware = Firmware(Caller(self.cpu.state, self.memory), self.memory, self.board.ports, self.drives)
        self.platform = self.firmware.platform
        self.cpu.reset()
        self.board.power_on()
        apply(reset_entry(), self.cpu.state, self.memory)
        self.engine.enter()

    def close(self) -> None:
        """Give memory and disks back."""
        self.engine.leave()
        for disk in self.drives.values():
            disk.close()

    def run(self, insns: int) -> Stop:
        """Run so many instructions, through resets, until something else stops."""
        until = self.clock.icount + insns
        while True:
            stop = self.engine.run(until)
            if stop.kind is StopKind.RESET:
                self.cpu.reset()
                self.board.reset()
            elif stop.kind is not StopKind.BUDGET or self.clock.icount >= until:
                return stop

    def call(self, service: int, **registers: int) -> CallFrame:
        """Call a service as the ROM would, without running the CPU; registers that are not given are 0."""
        self.cpu.state.segments[CS].load(0xF000, 0xF0000, 0xFFFF, 0x93)
        self.memory.write(FRAME, bytes(FRAME_BYTES))
        caller = Caller(self.cpu.state, self.memory)
        frame = CallFrame.load(caller, 0, FRAME)
        frame.service = service
        frame.flags = 0x0202
        for name, value in registers.items():
            setattr(frame, name, value)
        frame.save(caller, 0, FRAME)
        return self.call_again()

    def call_again(self) -> CallFrame:
        """The same call once more, as the ROM does after a wait; `attempt` tells whether it waits."""
        self.board.ports.store(FIRMWARE_PORT, 4, FRAME)
        return CallFrame.load(Caller(self.cpu.state, self.memory), 0, FRAME)

    def number(self, address: int, size_bytes: int = 1) -> int:
        """A number in the BIOS data area."""
        return self.memory.load(address, size_bytes)

    def screen(self) -> list[str]:
        """The rows that show, without trailing blanks, without empty rows at the end."""
        rows = [row.rstrip() for row in self.board.vga.screen()]
        while rows and not rows[-1]:
            rows.pop()
        return rows
