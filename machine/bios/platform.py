"""What every BIOS service works with: the caller's memory, the ports, the drives.

It must not know any service, nor how the call came in.
"""

from collections.abc import Mapping

from machine.bios.frame import FirmwareCpu
from machine.disk import Disk
from machine.memory import PhysicalMemory
from machine.ports import PortBus

CMOS_INDEX = 0x70
CMOS_DATA = 0x71
#: Accesses that keep NMI off while an index is selected would set bit 7; the BIOS leaves NMI on.
_FLOPPY_LIMIT = 0x80


class Platform:
    """The machine as the firmware sees it.

    Attributes:
        cpu: the caller's view of memory.
        memory: physical memory, for what is physical by definition (INT 15h AH=87h).
        drives: disks by BIOS drive number, 00h and up floppies, 80h and up hard disks.
    """

    def __init__(self, cpu: FirmwareCpu, memory: PhysicalMemory, ports: PortBus, drives: Mapping[int, Disk]) -> None:
        self.cpu = cpu
        self.memory = memory
        self.ports = ports
        self.drives = drives

    @property
    def floppies(self) -> int:
        """Number of floppy drives."""
        return sum(number < _FLOPPY_LIMIT for number in self.drives)

    @property
    def hard_disks(self) -> int:
        """Number of hard disks."""
        return sum(number >= _FLOPPY_LIMIT for number in self.drives)

    def load(self, linear: int, size_bytes: int) -> int:
        """Read a little-endian number."""
        return int.from_bytes(self.cpu.read(linear, size_bytes), "little")

    def store(self, linear: int, size_bytes: int, value: int) -> None:
        """Write a little-endian number; what does not fit is cut off."""
        self.cpu.write(linear, (value & ((1 << 8 * size_bytes) - 1)).to_bytes(size_bytes, "little"))

    def set_bits(self, linear: int, mask: int, *, on: bool) -> None:
        """Set or clear bits of a byte."""
        value = self.load(linear, 1)
        self.store(linear, 1, value | mask if on else value & ~mask)

    def read_port(self, port: int) -> int:
        """A byte."""
        return self.ports.load(port, 1)

    def write_port(self, port: int, value: int) -> None:
        """A byte."""
        self.ports.store(port, 1, value & 0xFF)

    def read_cmos(self, index: int) -> int:
        """A byte of the RTC's memory."""
        self.write_port(CMOS_INDEX, index)
        return self.read_port(CMOS_DATA)

    def write_cmos(self, index: int, value: int) -> None:
        """A byte of the RTC's memory."""
        self.write_port(CMOS_INDEX, index)
        self.write_port(CMOS_DATA, value)
