"""An ATA channel with up to two disks, programmed input and output only: ports 1F0h to 1F7h and 3F6h, IRQ 14.

It must not know where the sectors come from (`machine.disk`), nor any BIOS.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from machine.clock import Clock
from machine.devices.ata_identity import MULTIPLE_MAX_SECTORS, identity
from machine.devices.device import Device, Line, Timer
from machine.disk import SECTOR_BYTES, Disk, DiskError, Geometry

FIRST_PORT = 0x1F0
LAST_PORT = 0x1F7
CONTROL_PORT = 0x3F6
IRQ = 14

_DATA, _ERROR, _COUNT, _LBA_LOW, _LBA_MID, _LBA_HIGH, _DEVICE, _STATUS = range(8)
_FEATURES, _COMMAND = _ERROR, _STATUS

_BSY = 0x80
_DRDY = 0x40
_DSC = 0x10
_DRQ = 0x08
_ERR = 0x01
_READY = _DRDY | _DSC

_NO_ERROR = 0x00
_DIAGNOSTICS_PASSED = 0x01
_ABORTED = 0x04
_ID_NOT_FOUND = 0x10
_UNCORRECTABLE = 0x40

_DEVICE_LBA = 0x40
_DEVICE_SECOND = 0x10
_DEVICE_ONES = 0xA0

_CONTROL_NO_IRQ = 0x02
_CONTROL_RESET = 0x04

_READ = (0x20, 0x21)
_WRITE = (0x30, 0x31)
_VERIFY = (0x40, 0x41)
_RECALIBRATE = range(0x10, 0x20)
_SEEK = range(0x70, 0x80)
_DIAGNOSE = 0x90
_SET_GEOMETRY = 0x91
_READ_MULTIPLE = 0xC4
_WRITE_MULTIPLE = 0xC5
_SET_MULTIPLE = 0xC6
_CHECK_POWER = 0xE5
_IDENTIFY = 0xEC
_SET_FEATURES = 0xEF
# Standby, idle and sleep, with and without timers, and flush: nothing to do.
_NOTHING_TO_DO = (0xE0, 0xE1, 0xE2, 0xE3, 0xE6, 0xE7)

# Features that change nothing here (caches, look-ahead, defaults); of the transfer modes PIO is taken.
_HARMLESS_FEATURES = (0x02, 0x55, 0x66, 0x82, 0xAA, 0xCC)
_SET_TRANSFER_MODE = 0x03
_PIO_MODES = range(0x10)

_IDLE, _READING, _WRITING = range(3)

# From the command, or the last byte of a block, to the interrupt: enough for the guest to be past its OUT.
_ACCESS_NS = 2_000


class AtaChannel(Device):
    """Two drives behind one set of registers; for an absent drive its neighbour answers, with status 0.

    A command is busy for two virtual microseconds for each block. The task file is kept once for both drives.

    Source: ATA/ATAPI-4 (T13/1153D).
    """

    _saved: ClassVar[tuple[str, ...]] = (
        "features", "count", "address", "device", "control", "status", "error", "multiple", "heads", "sectors",
        "active", "direction", "buffer", "position", "lba", "remaining", "block_sectors", "interrupt", "irq_level",
        "timer",
    )  # fmt: skip

    def __init__(self, clock: Clock, irq: Line, disks: Sequence[Disk | None]) -> None:
        """`disks` are the first and the second drive; at least one is there."""
        self._clock = clock
        self._irq = irq
        self._disks = (*disks, None, None)[:2]
        self.timer = Timer(clock, self._access)
        self.address = bytearray(3)
        self.status = [0, 0]
        self.error = [0, 0]
        self.multiple = [0, 0]
        self.heads = [0, 0]
        self.sectors = [0, 0]
        self.buffer = bytearray()
        self.irq_level = False
        self.reset()

    def reset(self) -> None:
        """As after power-on; what was written to the disks stays."""
        self.control = 0
        for number, disk in enumerate(self._disks):
            self.multiple[number] = 0
            self.heads[number] = disk.physical_geometry.heads if disk is not None else 1
            self.sectors[number] = disk.physical_geometry.sectors if disk is not None else 1
        self._soft_reset()

    def _soft_reset(self) -> None:
        """Stop what goes on and show the signature of a disk."""
        self._stop()
        self.active = 0
        self.lba = 0
        self.remaining = 0
        self.block_sectors = 1
        self.device = 0
        self.features = 0
        self._sign()
        self.interrupt = False
        self._drive()

    def _sign(self) -> None:
        for number, disk in enumerate(self._disks):
            self.status[number] = _READY if disk is not None else 0
            self.error[number] = _DIAGNOSTICS_PASSED
        self.count = 1
        self.address[:] = b"\x01\x00\x00"

    def _stop(self) -> None:
        self.timer.disarm()
        self.direction = _IDLE
        self.buffer.clear()
        self.position = 0

    def _drive(self) -> None:
        level = self.interrupt and not self.control & _CONTROL_NO_IRQ
        if level != self.irq_level:
            self.irq_level = level
            self._irq(level)

    def _raise(self) -> None:
        self.interrupt = True
        self._drive()

    @property
    def _selected(self) -> int:
        return 1 if self.device & _DEVICE_SECOND else 0

    @property
    def _disk(self) -> Disk:
        disk = self._disks[self.active]
        assert disk is not None
        return disk

    def load_port(self, port: int, size_bytes: int) -> int:
        """The registers; the data port in 1, 2 or 4 bytes."""
        number = self._selected
        present = self._disks[number] is not None
        if port == CONTROL_PORT:
            return self.status[number]
        match port & 7:
            case 0:
                return self._load_data(size_bytes) if present else 0
            case 1:
                return self.error[number] if present else 0
            case 2:
                return self.count
            case 6:
                return self.device | _DEVICE_ONES
            case 7 if not present:
                return 0
            case 7:
                self.interrupt = False
                self._drive()
                return self.status[number]
            case register:
                return self.address[register - _LBA_LOW]

    def store_port(self, port: int, size_bytes: int, value: int) -> None:
        """The registers; the data port in 1, 2 or 4 bytes. A busy drive takes nothing but the control register."""
        if port == CONTROL_PORT:
            self._write_control(value)
            return
        register = port & 7
        if register == _DATA:
            self._store_data(size_bytes, value)
        elif self.timer.armed or self.control & _CONTROL_RESET:
            return
        elif register == _FEATURES:
            self.features = value
        elif register == _COUNT:
            self.count = value
        elif register == _DEVICE:
            self.device = value
        elif register == _COMMAND:
            self._start(value)
        else:
            self.address[register - _LBA_LOW] = value

    def _write_control(self, value: int) -> None:
        before, self.control = self.control, value
        if value & ~before & _CONTROL_RESET:
            self._soft_reset()
            for number, disk in enumerate(self._disks):
                self.status[number] = _BSY if disk is not None else 0
        elif before & ~value & _CONTROL_RESET:
            self._soft_reset()
        self._drive()

    def _start(self, command: int) -> None:
        """Begin a command on the selected drive; one that is not there does not answer."""
        number = self._selected
        disk = self._disks[number]
        self.interrupt = False
        self._drive()
        if command == _DIAGNOSE:
            self._stop()
            self._sign()
            self.device = 0
            self._raise()
            return
        if disk is None:
            return
        self._stop()
        self.active = number
        self.error[number] = _NO_ERROR
        self.status[number] = _READY
        if command in (*_READ, _READ_MULTIPLE, *_WRITE, _WRITE_MULTIPLE, *_VERIFY):
            self._start_transfer(command)
        elif command == _IDENTIFY:
            self.remaining = 0
            self.buffer += identity(
                disk.sector_count, disk.physical_geometry, self._geometry, self.multiple[number], f"TG{number:06}"
            )
            self.direction = _READING
            self._wait()
        else:
            self._obey(command)

    def _obey(self, command: int) -> None:
        """Commands without data."""
        done = command in _NOTHING_TO_DO or command in _RECALIBRATE or command in _SEEK
        if command == _SET_GEOMETRY and self.count:
            self.heads[self.active] = (self.device & 15) + 1
            self.sectors[self.active] = self.count
            done = True
        elif command == _SET_MULTIPLE and self.count <= MULTIPLE_MAX_SECTORS and not self.count & self.count - 1:
            self.multiple[self.active] = self.count
            done = True
        elif command == _SET_FEATURES:
            pio = self.features == _SET_TRANSFER_MODE and self.count in _PIO_MODES
            done = pio or self.features in _HARMLESS_FEATURES
        elif command == _CHECK_POWER:
            self.count = 0xFF
            done = True
        self._finish(_NO_ERROR if done else _ABORTED)

    @property
    def _geometry(self) -> Geometry:
        heads, sectors = self.heads[self.active], self.sectors[self.active]
        return Geometry(min(0xFFFF, self._disk.sector_count // (heads * sectors)), heads, sectors)

    def _start_transfer(self, command: int) -> None:
        multiple = self.multiple[self.active]
        if command in (_READ_MULTIPLE, _WRITE_MULTIPLE) and not multiple:
            self._finish(_ABORTED)
            return
        lba = self._addressed()
        self.remaining = self.count or 256
        if lba is None:
            self._finish(_ID_NOT_FOUND)
            return
        self.lba = lba
        self.block_sectors = multiple if command in (_READ_MULTIPLE, _WRITE_MULTIPLE) else 1
        if command in _VERIFY:
            self._finish(_NO_ERROR if lba + self.remaining <= self._disk.sector_count else _ID_NOT_FOUND)
        elif command in (*_WRITE, _WRITE_MULTIPLE):
            self.direction = _WRITING
            self._ask_for_block()
        else:
            self.direction = _READING
            self._wait()

    def _addressed(self) -> int | None:
        low, mid, high = self.address
        if self.device & _DEVICE_LBA:
            return (self.device & 15) << 24 | high << 16 | mid << 8 | low
        return self._geometry.to_lba(high << 8 | mid, self.device & 15, low)

    def _wait(self) -> None:
        self.status[self.active] = _BSY
        self.timer.arm(self._clock.now_ns + _ACCESS_NS)

    def _block(self) -> int:
        return min(self.block_sectors, self.remaining)

    def _ask_for_block(self) -> None:
        """Writing: the drive wants the next block."""
        self.buffer[:] = bytes(self._block() * SECTOR_BYTES)
        self.position = 0
        self.status[self.active] = _READY | _DRQ

    def _access(self) -> None:
        """The time of an access is over: move a block between disk and buffer, and tell the guest."""
        try:
            if self.direction == _WRITING:
                self._disk.write(self.lba, bytes(self.buffer))
                self._advance()
                if not self.remaining:
                    self._finish(_NO_ERROR)
                    return
                self._ask_for_block()
            else:
                if self.remaining:
                    self.buffer[:] = self._disk.read(self.lba, self._block())
                    self._advance()
                self.position = 0
                self.status[self.active] = _READY | _DRQ
        except DiskError:
            beyond = self.lba + self._block() > self._disk.sector_count
            self._finish(_ID_NOT_FOUND if beyond else _UNCORRECTABLE)
            return
        self._raise()

    def _advance(self) -> None:
        sectors = self._block()
        self.lba += sectors
        self.remaining -= sectors
        self.count = self.remaining & 0xFF

    def _finish(self, error: int) -> None:
        """End the command, with an interrupt."""
        self._stop()
        self.error[self.active] = error
        self.status[self.active] = _READY | (_ERR if error else 0)
        self._raise()

    @property
    def _transfers(self) -> bool:
        return self.direction != _IDLE and not self.timer.armed and self.active == self._selected

    def _load_data(self, size_bytes: int) -> int:
        if self.direction != _READING or not self._transfers:
            return (1 << 8 * size_bytes) - 1
        data = self.buffer[self.position : self.position + size_bytes]
        self.position += size_bytes
        if self.position >= len(self.buffer):
            if self.remaining:
                self._wait()
            else:
                self._stop()
                self.status[self.active] = _READY
        return int.from_bytes(data, "little")

    def _store_data(self, size_bytes: int, value: int) -> None:
        if self.direction != _WRITING or not self._transfers:
            return
        data = value.to_bytes(size_bytes, "little")[: len(self.buffer) - self.position]
        self.buffer[self.position : self.position + len(data)] = data
        self.position += len(data)
        if self.position == len(self.buffer):
            self._wait()

    def describe(self) -> str:
        """The task file and both drives."""
        drives = " ".join(
            f"drive{number}=" + (f"{self.status[number]:02x}" if disk is not None else "none")
            for number, disk in enumerate(self._disks)
        )
        return (
            f"ata: {drives} device={self.device:02x} count={self.count:02x} address={self.address[::-1].hex()} "
            f"control={self.control:02x} irq={int(self.irq_level)}"
        )
