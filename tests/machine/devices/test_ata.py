"""The ATA channel as course kernels drive it: IDENTIFY, sectors by LBA and CHS, interrupts, errors, absent drives."""

from __future__ import annotations

import struct

import pytest

from machine.clock import Clock
from machine.devices.ata import AtaChannel
from machine.disk import Disk, Media
from machine.ports import PortBus
from tests.machine.devices.rig import Wire, advance

ACCESS_NS = 2_000
BSY, DRDY, DSC, DRQ, ERR = 0x80, 0x40, 0x10, 0x08, 0x01
READY = DRDY | DSC
ABORTED, NOT_FOUND = 0x04, 0x10
SECTORS = 4096


def make_disk(first_byte: int = 0) -> Disk:
    """Sector n is filled with n as 16-bit words, plus `first_byte` in the high byte."""
    return Disk.from_bytes(b"".join(struct.pack("<H", n | first_byte << 8) * 256 for n in range(SECTORS)), Media.HARD)


class Channel:
    def __init__(self, *disks: Disk | None) -> None:
        self.clock = Clock()
        self.irq = Wire(self.clock)
        self.disks = disks or (make_disk(),)
        self.ata = AtaChannel(self.clock, self.irq, self.disks)
        self.ports = PortBus()
        self.ports.register(0x1F0, 0x1F7, self.ata)
        self.ports.register(0x1F0, 0x1F1, self.ata, (2,))
        self.ports.register(0x1F0, 0x1F3, self.ata, (4,))
        self.ports.register(0x3F6, 0x3F6, self.ata)

    def out(self, port: int, value: int) -> None:
        self.ports.store(port, 1, value)

    def read(self, port: int) -> int:
        return self.ports.load(port, 1)

    def command(self, command: int, lba: int = 0, count: int = 1, device: int = 0xE0) -> None:
        for port, value in zip(range(0x1F2, 0x1F6), (count & 0xFF, lba, lba >> 8, lba >> 16), strict=True):
            self.out(port, value & 0xFF)
        self.out(0x1F6, device | lba >> 24 & 15)
        self.out(0x1F7, command)

    def wait(self) -> int:
        """Let the access happen; the status, which also takes the interrupt back."""
        advance(self.clock, ACCESS_NS)
        return self.read(0x1F7)

    def words(self, count: int = 256) -> bytes:
        return b"".join(struct.pack("<H", self.ports.load(0x1F0, 2)) for _ in range(count))

    def put(self, data: bytes) -> None:
        for (word,) in struct.iter_unpack("<H", data):
            self.ports.store(0x1F0, 2, word)


def sector(n: int) -> bytes:
    return struct.pack("<H", n) * 256


def test_identify() -> None:
    channel = Channel()
    channel.command(0xEC)
    assert channel.read(0x3F6) == BSY
    assert channel.wait() == READY | DRQ
    words = struct.unpack("<256H", channel.words())
    assert words[60] | words[61] << 16 == SECTORS
    assert (words[1], words[3], words[6]) == (4, 16, 63)
    assert (words[54:57], words[57] | words[58] << 16) == ((4, 16, 63), 4 * 16 * 63)
    assert (words[0] & 0x8000, words[49] & 0x0300, words[47] & 0xFF) == (0, 0x0200, 16)
    assert struct.pack(">20H", *words[27:47]).decode().strip() == "TRAPGATE DISK"
    assert channel.read(0x1F7) == READY


@pytest.mark.parametrize("command", [0x20, 0x21])
def test_read_sectors_interrupts_for_each(command: int) -> None:
    channel = Channel()
    channel.command(command, 5, 3)
    for n in range(3):
        assert channel.read(0x3F6) == BSY
        assert not channel.irq.level
        assert channel.wait() == READY | DRQ
        assert channel.words() == sector(5 + n)
    assert channel.irq.rises == [ACCESS_NS * n for n in (1, 2, 3)]
    advance(channel.clock, 10 * ACCESS_NS)
    assert (channel.read(0x3F6), channel.irq.level, channel.read(0x1F2)) == (READY, False, 0)


def test_reading_status_takes_the_interrupt_back_and_the_other_status_does_not() -> None:
    channel = Channel()
    channel.command(0x20)
    advance(channel.clock, ACCESS_NS)
    seen = []
    for port in (0x3F6, 0x1F7):
        channel.read(port)
        seen.append(channel.irq.level)
    assert seen == [True, False]


def test_write_sectors_and_read_them_back() -> None:
    channel = Channel()
    channel.command(0x30, 7, 2)
    assert (channel.read(0x1F7), channel.irq.level) == (READY | DRQ, False), "no interrupt before the first block"
    channel.put(b"\xa5" * 512)
    assert channel.read(0x3F6) == BSY
    assert channel.wait() == READY | DRQ
    channel.put(b"\x5a" * 512)
    assert channel.wait() == READY
    assert len(channel.irq.rises) == 2
    disk = channel.disks[0]
    assert disk is not None
    assert disk.read(6, 4) == sector(6) + b"\xa5" * 512 + b"\x5a" * 512 + sector(9)


def test_the_data_port_takes_every_width() -> None:
    channel = Channel()
    channel.command(0x20, 0x0102)
    channel.wait()
    assert channel.ports.load(0x1F0, 4) == 0x0102_0102
    assert [channel.read(0x1F0), channel.read(0x1F0)] == [2, 1]
    assert channel.words(253) == sector(0x0102)[6:]
    assert channel.read(0x1F7) == READY


def test_count_0_is_256() -> None:
    channel = Channel()
    channel.command(0x20, 0, 0)
    data = b""
    while channel.wait() & DRQ:
        data += channel.words()
    assert data == b"".join(sector(n) for n in range(256))


def test_chs_by_the_drive_s_geometry_and_by_the_guest_s() -> None:
    channel = Channel()
    channel.command(0x20, lba=1 << 8 | 3, device=0xA0 | 2)
    channel.wait()
    assert channel.words() == sector((1 * 16 + 2) * 63 + 3 - 1)
    channel.command(0x91, count=17, device=0xA0 | 3)
    assert (channel.wait(), channel.irq.level) == (READY, False)
    channel.command(0x20, lba=5 << 8 | 17, device=0xA0 | 3)
    channel.wait()
    assert channel.words() == sector((5 * 4 + 3) * 17 + 16)
    channel.command(0x20, lba=0, device=0xA0)
    assert (channel.wait(), channel.read(0x1F1)) == (READY | ERR, NOT_FOUND), "there is no sector 0"


def test_multiple_sectors() -> None:
    channel = Channel()
    channel.command(0xC4, 0, 4)
    assert (channel.wait(), channel.read(0x1F1)) == (READY | ERR, ABORTED), "not before SET MULTIPLE"
    for count, error in ((3, ABORTED), (32, ABORTED), (16, 0), (1, 0), (4, 0)):
        channel.command(0xC6, count=count)
        channel.wait()
        assert channel.read(0x1F1) == error
    before = len(channel.irq.rises)
    channel.command(0xC4, 10, 6)
    assert channel.wait() == READY | DRQ
    data = channel.words(4 * 256)
    assert channel.wait() == READY | DRQ
    data += channel.words(2 * 256)
    assert data == b"".join(sector(n) for n in range(10, 16))
    assert len(channel.irq.rises) == before + 2
    channel.command(0xC5, 20, 4)
    channel.put(b"x" * 2048)
    assert channel.wait() == READY
    channel.command(0xC6, count=0)
    channel.command(0xC5, 20, 4)
    assert channel.wait() & ERR


@pytest.mark.parametrize(("command", "lba", "count"), [(0x20, SECTORS, 1), (0x20, SECTORS - 1, 2), (0x40, SECTORS, 1)])
def test_reading_past_the_end(command: int, lba: int, count: int) -> None:
    channel = Channel()
    channel.command(command, lba, count)
    status = channel.wait()
    if status & DRQ:
        channel.words()
        status = channel.wait()
    assert (status, channel.read(0x1F1)) == (READY | ERR, NOT_FOUND)
    channel.command(0x20, 1)
    assert (channel.wait(), channel.read(0x1F1)) == (READY | DRQ, 0)


@pytest.mark.parametrize(("lba", "device"), [(1 << 24, 0xE0), (1 << 16, 0xE0), (1 << 8 | 1, 0xE1)])
def test_every_bit_of_the_address_counts(lba: int, device: int) -> None:
    channel = Channel()
    channel.command(0x20, lba, device=device)
    assert (channel.wait(), channel.read(0x1F1)) == (READY | ERR, NOT_FOUND)


def test_the_high_byte_of_the_cylinder_counts() -> None:
    channel = Channel()
    channel.command(0x20, 1 << 16 | 1, device=0xA0)
    assert (channel.wait(), channel.read(0x1F1)) == (READY | ERR, NOT_FOUND)


def test_a_command_ends_the_transfer_before_it() -> None:
    channel = Channel()
    channel.command(0x20, 5, 2)
    channel.wait()
    channel.words(2)
    channel.command(0x20, 9)
    channel.wait()
    assert channel.words() == sector(9)
    assert channel.read(0x1F7) == READY
    channel.command(0x31, 11)
    channel.put(b"\x77" * 100)
    channel.command(0xEC)
    channel.wait()
    assert len(channel.words()) == 512
    disk = channel.disks[0]
    assert disk is not None
    assert disk.read(11, 1) == sector(11)


def test_writing_past_the_end() -> None:
    channel = Channel()
    channel.command(0x30, SECTORS)
    channel.put(bytes(512))
    assert (channel.wait(), channel.read(0x1F1)) == (READY | ERR, NOT_FOUND)


@pytest.mark.parametrize("command", [0x00, 0xA1, 0xC8, 0xCA, 0x24, 0xF8, 0xFF])
def test_what_it_cannot_do_is_aborted(command: int) -> None:
    channel = Channel()
    channel.command(command)
    assert channel.irq.level
    assert (channel.read(0x1F7), channel.read(0x1F1), channel.irq.level) == (READY | ERR, ABORTED, False)


@pytest.mark.parametrize("command", [0x10, 0x1F, 0x40, 0x70, 0xE0, 0xE1, 0xE7])
def test_commands_without_data(command: int) -> None:
    channel = Channel()
    channel.command(command)
    assert channel.irq.level
    assert (channel.read(0x1F7), channel.read(0x1F1)) == (READY, 0)


def test_power_mode_and_features() -> None:
    channel = Channel()
    channel.command(0xE5)
    assert (channel.read(0x1F7), channel.read(0x1F2)) == (READY, 0xFF)
    for feature, count, error in ((0x03, 0x0C, 0), (0x03, 0x22, ABORTED), (0xAA, 0, 0), (0x05, 0, ABORTED)):
        channel.out(0x1F1, feature)
        channel.command(0xEF, count=count)
        assert channel.read(0x1F1) == error


def test_no_interrupts_while_the_guest_does_not_want_them() -> None:
    channel = Channel()
    channel.out(0x3F6, 0x02)
    channel.command(0x20)
    advance(channel.clock, ACCESS_NS)
    assert channel.irq.changes == []
    channel.out(0x3F6, 0x00)
    assert channel.irq.level, "it is still pending"


def test_soft_reset_shows_the_signature() -> None:
    channel = Channel()
    channel.command(0x20, 5, 9)
    channel.out(0x3F6, 0x04)
    assert channel.read(0x1F7) == BSY
    channel.out(0x1F2, 0x55)
    channel.out(0x3F6, 0x00)
    advance(channel.clock, 10 * ACCESS_NS)
    assert [channel.read(port) for port in range(0x1F1, 0x1F8)] == [1, 1, 1, 0, 0, 0xA0, READY]
    assert channel.irq.changes == []


def test_diagnostics() -> None:
    channel = Channel()
    channel.command(0x90, device=0xF0)
    assert [channel.read(port) for port in range(0x1F1, 0x1F8)] == [1, 1, 1, 0, 0, 0xA0, READY]


def test_a_busy_drive_takes_no_commands() -> None:
    channel = Channel()
    channel.command(0x20, 5)
    channel.command(0x20, 9)
    channel.wait()
    assert channel.words() == sector(5)


def test_the_second_drive() -> None:
    channel = Channel(make_disk(), make_disk(0x80))
    channel.command(0x20, 3, device=0xF0)
    channel.wait()
    assert channel.words() == sector(0x8003)
    assert channel.ata.describe().startswith("ata: drive0=50 drive1=50 device=f0")


@pytest.mark.parametrize(("disks", "device"), [((make_disk(), None), 0xF0), ((None, make_disk()), 0xE0)])
def test_an_absent_drive_has_status_0_and_takes_no_commands(disks: tuple[Disk | None, ...], device: int) -> None:
    channel = Channel(*disks)
    channel.command(0xEC, 0x123456, count=7, device=device)
    assert [channel.read(port) for port in (*range(0x1F1, 0x1F8), 0x3F6)] == [0, 7, 0x56, 0x34, 0x12, device, 0, 0]
    assert (channel.ports.load(0x1F0, 2), channel.irq.changes) == (0, [])
    channel.command(0xEC, device=device ^ 0x10)
    assert channel.wait() == READY | DRQ


def test_the_data_port_belongs_to_the_drive_that_transfers() -> None:
    channel = Channel(make_disk(), make_disk(0x80))
    channel.command(0x20, 3)
    channel.wait()
    channel.out(0x1F6, 0xF0)
    assert channel.words(2) == b"\xff" * 4
    channel.out(0x1F6, 0xE0)
    assert channel.words() == sector(3)


def test_stray_data_goes_nowhere() -> None:
    channel = Channel()
    channel.put(b"\xff" * 1024)
    assert channel.words(1) == b"\xff\xff"
    channel.command(0x30, 1)
    channel.put(b"\x11" * 512)
    channel.put(b"\x22" * 512)
    assert channel.wait() == READY
    disk = channel.disks[0]
    assert disk is not None
    assert disk.read(1, 2) == b"\x11" * 512 + sector(2)
