"""INT 13h: diskettes and hard disks, by cylinder, head and sector and, on hard disks, by linear block.

It must not know how a disk stores its sectors. Transfers take no time.

Source: IBM PS/2 and PC BIOS Interface Technical Reference, "Interrupt 13H"; T13, BIOS Enhanced Disk Drive Services.
"""

import struct

from machine.bios import bda
from machine.bios.frame import CallFrame
from machine.bios.platform import Platform
from machine.disk import SECTOR_BYTES, Disk, DiskError, Media

OK = 0x00
BAD_PARAMETER = 0x01
DISK_CHANGED = 0x06
DMA_BOUNDARY = 0x09
CONTROLLER_FAILURE = 0x20

_HARD = 0x80
_MAX_CHS_SECTORS = 128
#: A packet may ask for 65535 sectors; so many are moved at once.
_PIECE_SECTORS = 1024
_EDD_VERSION_1 = 0x01
_EDD_PACKET_ACCESS = 0x0001
_PACKET = struct.Struct("<BBHHHQ")
# INT 13h AH=48h, version 1: size, flags, physical geometry, sectors, bytes of a sector.
_PARAMETERS = struct.Struct("<HHIIIQH")
_PARAMETERS_HAVE_CHS = 0x0002

#: CMOS drive types by sectors of the format: 360 KB, 1.2 MB, 720 KB, 1.44 MB, 2.88 MB.
_DRIVE_TYPES = {720: 1, 2400: 2, 1440: 3, 2880: 4, 5760: 6}


def service(platform: Platform, frame: CallFrame) -> None:
    """INT 13h: all drives."""
    _serve(platform, frame)


def diskette_service(platform: Platform, frame: CallFrame) -> None:
    """INT 40h: what INT 13h does, for diskettes only."""
    if frame.dl < _HARD:
        _serve(platform, frame)
    else:
        frame.fail(BAD_PARAMETER)


def _serve(platform: Platform, frame: CallFrame) -> None:
    disk = platform.drives.get(frame.dl)
    function = frame.ah
    if function == 0x01:
        _last_status(platform, frame)
        return
    if function == 0x15 and disk is not None:
        _drive_type(frame, disk)
        return
    if disk is None:
        status = BAD_PARAMETER
    elif function in _FUNCTIONS:
        status = _FUNCTIONS[function](platform, frame, disk)
    elif function in _HARD_FUNCTIONS and disk.media is Media.HARD:
        status = _HARD_FUNCTIONS[function](platform, frame, disk)
    elif function in _FLOPPY_FUNCTIONS and disk.media is Media.FLOPPY:
        status = _FLOPPY_FUNCTIONS[function](platform, frame, disk)
    else:
        status = BAD_PARAMETER
    if frame.status:
        return  # not done yet
    platform.store(bda.DISK_STATUS if frame.dl >= _HARD else bda.FLOPPY_STATUS, 1, status)
    if function == 0x41 and status == OK:
        frame.ah, frame.carry = _EDD_VERSION_1, False
    elif status == OK:
        frame.succeed()
    else:
        frame.fail(status)


def _last_status(platform: Platform, frame: CallFrame) -> None:
    status = platform.load(bda.DISK_STATUS if frame.dl >= _HARD else bda.FLOPPY_STATUS, 1)
    frame.ah = status
    frame.carry = status != OK


def _drive_type(frame: CallFrame, disk: Disk) -> None:
    """AH: 1 diskette without change line, 3 hard disk with its sectors in CX:DX."""
    frame.carry = False
    if disk.media is Media.FLOPPY:
        frame.ah = 1
    else:
        frame.ah = 3
        geometry = disk.geometry
        sectors = (_last_cylinder(disk) + 1) * geometry.heads * geometry.sectors
        frame.cx, frame.dx = sectors >> 16, sectors & 0xFFFF


def _last_cylinder(disk: Disk) -> int:
    """The last cylinder that is told of: hard disks keep one back, which once was for diagnostics."""
    cylinders = min(disk.geometry.cylinders, 1024)
    return cylinders - 1 if disk.media is Media.FLOPPY else max(0, cylinders - 2)


def _reset(_platform: Platform, _frame: CallFrame, _disk: Disk) -> int:
    return OK


def _transfer(platform: Platform, frame: CallFrame, disk: Disk) -> int:
    """02h read, 03h write, 04h verify: AL sectors from CH, CL, DH at ES:BX; AL on return is how many were done.

    A diskette transfer may not cross a 64 KiB boundary, since the DMA controller cannot.
    """
    function, count = frame.ah, frame.al
    cylinder = frame.ch | (frame.cl & 0xC0) << 2
    lba = disk.geometry.to_lba(cylinder, frame.dh, frame.cl & 0x3F)
    if not 0 < count <= _MAX_CHS_SECTORS or lba is None or lba + count > disk.sector_count:
        return BAD_PARAMETER
    linear = (frame.es << 4) + frame.bx
    crosses = linear >> 16 != (linear + count * SECTOR_BYTES - 1) >> 16
    if disk.media is Media.FLOPPY and function != 0x04 and crosses:
        frame.al = 0
        return DMA_BOUNDARY
    status = _move(platform, disk, function, lba, count, linear)
    if status != OK:
        frame.al = 0
    return status


def _move(platform: Platform, disk: Disk, function: int, lba: int, count: int, linear: int) -> int:
    try:
        if function in (0x02, 0x42):
            platform.cpu.write(linear, disk.read(lba, count))
        elif function in (0x03, 0x43):
            disk.write(lba, platform.cpu.read(linear, count * SECTOR_BYTES))
        else:
            disk.read(lba, count)
    except DiskError:
        return CONTROLLER_FAILURE
    return OK


def _format_track(_platform: Platform, frame: CallFrame, disk: Disk) -> int:
    """05h: the track's sectors are filled with F6h."""
    lba = disk.geometry.to_lba(frame.ch, frame.dh, 1)
    if lba is None:
        return BAD_PARAMETER
    try:
        disk.write(lba, b"\xf6" * (disk.geometry.sectors * SECTOR_BYTES))
    except DiskError:
        return CONTROLLER_FAILURE
    return OK


def _parameters(platform: Platform, frame: CallFrame, disk: Disk) -> int:
    """08h: last cylinder, sectors, last head, number of drives; for diskettes also the type and the parameter table."""
    geometry = disk.geometry
    last_cylinder = _last_cylinder(disk)
    frame.al = 0
    frame.ch = last_cylinder & 0xFF
    frame.cl = geometry.sectors | last_cylinder >> 2 & 0xC0
    frame.dh = geometry.heads - 1
    if disk.media is Media.FLOPPY:
        frame.dl = platform.floppies
        frame.bx = _DRIVE_TYPES.get(disk.sector_count, 4)
        frame.es, frame.di = bda.ROM_SEGMENT, bda.ROM_DISKETTE_PARAMETERS
    else:
        frame.dl = platform.hard_disks
    return OK


def _seek(_platform: Platform, frame: CallFrame, disk: Disk) -> int:
    cylinder = frame.ch | (frame.cl & 0xC0) << 2
    return OK if cylinder < disk.geometry.cylinders else BAD_PARAMETER


def _change_line(_platform: Platform, _frame: CallFrame, _disk: Disk) -> int:
    return DISK_CHANGED  # the answer of a drive that cannot tell


def _check_extensions(_platform: Platform, frame: CallFrame, _disk: Disk) -> int:
    frame.bx = 0xAA55
    frame.cx = _EDD_PACKET_ACCESS
    return OK


def _transfer_packet(platform: Platform, frame: CallFrame, disk: Disk) -> int:
    """42h read, 43h write, 44h verify, 47h seek, by the packet at DS:SI; its count on return is how many were done."""
    at = (frame.ds << 4) + frame.si
    size_bytes, _, count, offset, selector, lba = _PACKET.unpack(platform.cpu.read(at, _PACKET.size))
    if size_bytes < _PACKET.size:
        return BAD_PARAMETER
    if lba >= disk.sector_count:
        return BAD_PARAMETER
    if frame.ah == 0x47:
        return OK
    if lba + count > disk.sector_count or count < frame.attempt:
        platform.store(at + 2, 2, 0)
        return BAD_PARAMETER
    done = frame.attempt
    piece = min(count - done, _PIECE_SECTORS)
    linear = (selector << 4) + offset + done * SECTOR_BYTES
    status = _move(platform, disk, frame.ah, lba + done, piece, linear)
    if status != OK:
        platform.store(at + 2, 2, 0)
    elif done + piece < count:
        frame.again(done + piece)
    return status


def _extended_parameters(platform: Platform, frame: CallFrame, disk: Disk) -> int:
    """48h: the table of version 1.x at DS:SI."""
    at = (frame.ds << 4) + frame.si
    if platform.load(at, 2) < _PARAMETERS.size:
        return BAD_PARAMETER
    geometry = disk.physical_geometry
    platform.cpu.write(
        at,
        _PARAMETERS.pack(
            _PARAMETERS.size,
            _PARAMETERS_HAVE_CHS,
            geometry.cylinders,
            geometry.heads,
            geometry.sectors,
            disk.sector_count,
            SECTOR_BYTES,
        ),
    )
    return OK


_FUNCTIONS = {
    0x00: _reset,
    0x02: _transfer,
    0x03: _transfer,
    0x04: _transfer,
    0x08: _parameters,
}
_FLOPPY_FUNCTIONS = {
    0x05: _format_track,
    0x16: _change_line,
}
_HARD_FUNCTIONS = {
    0x09: _reset,
    0x0C: _seek,
    0x0D: _reset,
    0x10: _reset,
    0x11: _reset,
    0x14: _reset,
    0x41: _check_extensions,
    0x42: _transfer_packet,
    0x43: _transfer_packet,
    0x44: _transfer_packet,
    0x47: _transfer_packet,
    0x48: _extended_parameters,
}
