"""INT 13h where SeaBIOS is no model: bad disks, the overlay, packets that are none, formatting, big disks."""

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from machine.bios import bda, disks
from machine.disk import Disk, Media
from tests.machine.bios.pc import Pc

DISK = 0x13


def numbered(sectors: int) -> bytes:
    return b"".join(struct.pack("<I", lba) * 128 for lba in range(sectors))


@pytest.fixture
def pc() -> Iterator[Pc]:
    drives = {0: Disk.from_bytes(numbered(2880)), 0x80: Disk.from_bytes(numbered(10000))}
    made = Pc(drives)
    made.firmware.self_test()
    yield made
    made.close()


def test_writes_stay_in_the_overlay(pc: Pc, tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(numbered(10000))
    pc.drives[0x80] = Disk.open(path)
    pc.platform.drives = pc.drives
    pc.memory.write(0x20000, b"new!" * 128)
    assert not pc.call(DISK, ax=0x0301, cx=0x0005, dx=0x80, es=0x2000).carry
    assert pc.call(DISK, ax=0x0202, cx=0x0004, dx=0x80, es=0x3000).ax == 2
    assert pc.memory.read(0x30000, 1024) == struct.pack("<I", 3) * 128 + b"new!" * 128
    assert path.read_bytes() == numbered(10000)


def test_a_file_that_shrinks_is_a_bad_disk(pc: Pc, tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(numbered(10000))
    pc.platform.drives = {0x80: Disk.open(path)}
    path.write_bytes(b"")
    frame = pc.call(DISK, ax=0x0201, cx=0x0001, dx=0x80, es=0x2000)
    assert (frame.ah, frame.al, frame.carry) == (disks.CONTROLLER_FAILURE, 0, True)
    assert pc.call(DISK, ax=0x0100, dx=0x80).ah == disks.CONTROLLER_FAILURE
    packet = struct.pack("<BBHHHQ", 16, 0, 1, 0, 0x2000, 0)
    pc.memory.write(0x5000, packet)
    assert pc.call(DISK, ax=0x4200, dx=0x80, si=0x5000).ah == disks.CONTROLLER_FAILURE
    assert pc.number(0x5002, 2) == 0
    pc.platform.drives[0x80].close()


@pytest.mark.parametrize("size_bytes", [0, 15])
def test_packets_too_short(pc: Pc, size_bytes: int) -> None:
    pc.memory.write(0x5000, struct.pack("<BBHHHQ", size_bytes, 0, 1, 0, 0x2000, 0))
    frame = pc.call(DISK, ax=0x4200, dx=0x80, si=0x5000)
    assert (frame.ah, frame.carry) == (disks.BAD_PARAMETER, True)


def test_long_transfers_are_done_in_pieces(pc: Pc) -> None:
    pc.memory.write(0x5000, struct.pack("<BBHHHQ", 16, 0, 2500, 0x10, 0xFFFF, 100))
    calls, frame = 1, pc.call(DISK, ax=0x4200, dx=0x80, si=0x5000)
    while frame.attempt:
        assert (frame.ax, frame.carry) == (0x4200, False)
        calls += 1
        frame = pc.call_again()
    assert (calls, frame.ah, frame.carry, pc.number(0x5002, 2)) == (3, 0, False, 2500)
    assert pc.memory.read(0x100000, 2500 * 512) == pc.drives[0x80].read(100, 2500)


def test_format_track(pc: Pc) -> None:
    assert not pc.call(DISK, ax=0x0512, cx=0x0301, dx=0x0100).carry
    first = (3 * 2 + 1) * 18
    assert pc.drives[0].read(first, 18) == b"\xf6" * (18 * 512)
    assert pc.drives[0].read(first - 1, 1) == struct.pack("<I", first - 1) * 128
    assert pc.drives[0].read(first + 18, 1) == struct.pack("<I", first + 18) * 128
    assert pc.call(DISK, ax=0x0512, cx=0x5101, dx=0x0000).carry
    assert pc.call(DISK, ax=0x0512, cx=0x0001, dx=0x0080).carry


def test_extensions_are_version_1_with_packets(pc: Pc) -> None:
    frame = pc.call(DISK, ax=0x4100, bx=0x55AA, dx=0x80)
    assert (frame.ah, frame.bx, frame.cx, frame.carry) == (0x01, 0xAA55, 0x0001, False)
    assert pc.call(DISK, ax=0x4100, bx=0x55AA, dx=0x00).carry


def test_status_is_kept_by_kind_of_drive(pc: Pc) -> None:
    assert pc.call(DISK, ax=0x0201, cx=0, dx=0x00).carry
    assert pc.call(DISK, ax=0x0100, dx=0x80).ah == 0
    assert pc.call(DISK, ax=0x0100, dx=0x00).ah == disks.BAD_PARAMETER
    assert pc.number(bda.FLOPPY_STATUS) == disks.BAD_PARAMETER


def test_diskette_entry_takes_diskettes_only(pc: Pc) -> None:
    assert pc.call(0x40, ax=0x0201, cx=1, dx=0x00, es=0x2000).ax == 1
    assert pc.call(0x40, ax=0x0201, cx=1, dx=0x80, es=0x2000).carry


@pytest.mark.parametrize(("sectors", "kind"), [(720, 1), (1440, 3), (2400, 2), (2880, 4), (5760, 6)])
def test_diskette_parameters(pc: Pc, sectors: int, kind: int) -> None:
    disk = Disk.from_bytes(bytes(sectors * 512))
    pc.platform.drives = {0: disk}
    frame = pc.call(DISK, ax=0x0800)
    geometry = disk.geometry
    assert (frame.ch, frame.cl, frame.dh, frame.dl) == (geometry.cylinders - 1, geometry.sectors, geometry.heads - 1, 1)
    assert (frame.bl, frame.es) == (kind, bda.ROM_SEGMENT)


def test_cylinders_past_1023_are_not_told(pc: Pc, tmp_path: Path) -> None:
    path = tmp_path / "huge.img"
    with path.open("wb") as file:
        file.truncate(20_000_000 * 512)
    pc.platform.drives = {0x80: Disk.open(path)}
    frame = pc.call(DISK, ax=0x0800, dx=0x80)
    assert (frame.ch | (frame.cl & 0xC0) << 2, frame.cl & 0x3F, frame.dh, frame.dl) == (1022, 63, 254, 1)
    frame = pc.call(DISK, ax=0x1500, dx=0x80)
    assert (frame.ah, frame.cx << 16 | frame.dx) == (3, 1023 * 255 * 63)
    pc.memory.write(0x5000, struct.pack("<H", 26))
    assert not pc.call(DISK, ax=0x4800, dx=0x80, si=0x5000).carry
    assert struct.unpack("<IIIQH", pc.memory.read(0x5004, 22)) == (16383, 16, 63, 20_000_000, 512)
    packet = struct.pack("<BBHHHQ", 16, 0, 1, 0, 0x2000, 19_999_999)
    pc.memory.write(0x5000, packet)
    assert not pc.call(DISK, ax=0x4200, dx=0x80, si=0x5000).carry
    pc.platform.drives[0x80].close()


def test_parameter_table_of_the_first_hard_disk(pc: Pc) -> None:
    pointer = pc.number(4 * 0x41, 4)
    table = pc.memory.read((pointer >> 16 << 4) + (pointer & 0xFFFF), 16)
    assert struct.unpack_from("<HB", table) == (9, 16)
    assert table[14] == 63
    assert pc.drives[0x80].media is Media.HARD
