"""The firmware port: a call from the ROM comes in as the address of a frame, and goes to the service that it names.

It owns the table of services and the check of who calls; it must not know what the services do.
"""

from collections.abc import Callable, Mapping
from importlib.resources import files

from machine.bios import boot, disks, keyboard, lines, rtc, system, video
from machine.bios.frame import CallFrame, FirmwareCpu
from machine.bios.platform import Platform
from machine.disk import Disk
from machine.memory import PhysicalMemory
from machine.paging import probe
from machine.ports import PortBus
from machine.state import CR0_PE, CS, CpuState

#: A free port; rom.S has the same number. Only accesses of 4 bytes reach the firmware.
FIRMWARE_PORT = 0x07F0

#: By the number that the ROM pushes: interrupt vectors, and FEh for the self-test.
SERVICES: dict[int, Callable[[Platform, CallFrame], None]] = {
    0x09: keyboard.interrupt,
    0x10: video.service,
    0x11: system.equipment,
    0x12: system.memory_size,
    0x13: disks.service,
    0x14: lines.serial_service,
    0x15: system.service,
    0x16: keyboard.service,
    0x17: lines.printer_service,
    0x18: boot.give_up,
    0x19: boot.bootstrap,
    0x1A: rtc.service,
    0x40: disks.diskette_service,
    0x70: rtc.interrupt,
    0xFE: boot.power_on,
}

_EFLAGS_VM = 1 << 17
_ROM_BASES = (0xF0000, 0xFFFF0000)


def rom() -> bytes:
    """The ROM image, 64 KiB, built from rom.S."""
    return files("machine.bios").joinpath("rom.bin").read_bytes()


class Caller:
    """A CPU and its memory, as a caller of the firmware: real mode, or virtual-8086 mode with or without paging."""

    def __init__(self, state: CpuState, memory: PhysicalMemory) -> None:
        self._state = state
        self._memory = memory

    def calls_from_rom(self) -> bool:
        """True for code in the ROM's segment, in real or virtual-8086 mode."""
        state = self._state
        if state.cr0 & CR0_PE and not state.eflags & _EFLAGS_VM:
            return False
        return state.segments[CS].base in _ROM_BASES

    def read(self, linear: int, length: int) -> bytes:
        """Memory at a linear address; what is not mapped reads as ones."""
        parts = []
        for physical, count in self._pages(linear, length):
            if physical is None:
                parts.append(b"\xff" * count)
            elif self._memory.ram_address(physical) >= 0:
                parts.append(self._memory.read(physical, count))
            else:
                pieces = _dwords(physical, count)
                parts.extend(self._memory.load(at, size).to_bytes(size, "little") for at, size in pieces)
        return b"".join(parts)

    def write(self, linear: int, data: bytes) -> None:
        """Write at a linear address; what is not mapped is lost."""
        done = 0
        for physical, count in self._pages(linear, len(data)):
            if physical is not None and self._memory.ram_address(physical) >= 0:
                self._memory.write(physical, data[done : done + count])
            elif physical is not None:
                for at, size in _dwords(physical, count):
                    start = done + at - physical
                    self._memory.store(at, size, int.from_bytes(data[start : start + size], "little"))
            done += count

    def _pages(self, linear: int, length: int) -> list[tuple[int | None, int]]:
        pages = []
        while length:
            count = min(length, 0x1000 - (linear & 0xFFF))
            pages.append((probe(self._memory, self._state, linear & 0xFFFF_FFFF), count))
            linear += count
            length -= count
        return pages


def _dwords(physical: int, length: int) -> list[tuple[int, int]]:
    """Accesses for device memory, address and size: aligned dwords, with bytes before and after."""
    end = physical + length
    first, last = min(-(-physical // 4) * 4, end), max(end // 4 * 4, physical)
    if first >= last:
        return [(at, 1) for at in range(physical, end)]
    head = [(at, 1) for at in range(physical, first)]
    return head + [(at, 4) for at in range(first, last, 4)] + [(at, 1) for at in range(last, end)]


class Firmware:
    """The device behind the firmware port. It has no state of its own: all of it is in the guest's memory.

    Args:
        cpu: the caller; an adapter of the machine's CPU.
        memory: physical memory.
        ports: where the other devices are; the firmware sets them up and reads them.
        drives: disks by BIOS drive number (00h, 01h diskettes; 80h and up hard disks).
    """

    def __init__(
        self, cpu: FirmwareCpu, memory: PhysicalMemory, ports: PortBus, drives: Mapping[int, Disk] | None = None
    ) -> None:
        self._cpu = cpu
        self.platform = Platform(cpu, memory, ports, drives or {})
        ports.register(FIRMWARE_PORT, FIRMWARE_PORT + 3, self, widths=(4,))

    def self_test(self) -> None:
        """Leave memory and devices as the BIOS does before it boots: for images that are loaded directly."""
        boot.self_test(self.platform)

    def load_port(self, port: int, size_bytes: int) -> int:  # noqa: ARG002
        """Nothing is to be read here."""
        return (1 << 8 * size_bytes) - 1

    def store_port(self, port: int, size_bytes: int, value: int) -> None:
        """A call: `value` is the frame's SS:SP. Calls from outside the ROM are ignored."""
        if port != FIRMWARE_PORT or size_bytes != 4 or not self._cpu.calls_from_rom():
            return
        selector, offset = value >> 16, value & 0xFFFF
        frame = CallFrame.load(self._cpu, selector, offset)
        service = SERVICES.get(frame.service)
        if service is None:
            return
        service(self.platform, frame)
        frame.save(self._cpu, selector, offset)
