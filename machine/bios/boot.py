"""Starting up: the self-test that leaves memory and devices as a BIOS does, and INT 19h, which enters the boot sector.

It must not know more of a device than the ports by which any BIOS sets it up.

Source: Intel 8259A, 8254 and MC146818 data sheets; IBM PS/2 and PC BIOS Interface Technical Reference, "BIOS Data Area"
and "Interrupt 19H". Masks, modes and registers at the boot sector's entry are those that SeaBIOS leaves.
"""

import struct

from machine.bios import bda, rtc, system, video
from machine.bios.frame import CallFrame
from machine.bios.platform import Platform
from machine.disk import DiskError, Media
from machine.e820 import EBDA, EBDA_BYTES, KIB, usable_kib

BOOT_SECTOR = 0x7C00
_SIGNATURE = b"\x55\xaa"
_EFLAGS_IF = 1 << 9

# Shutdown byte of the CMOS: where to go after a reset by which a 286 left protected mode.
_SHUTDOWN = 0x0F
_CMOS_EQUIPMENT = 0x14
_SHUTDOWN_JUMP_EOI = 0x05
_SHUTDOWN_JUMP = 0x0A

_EQUIPMENT_FLOPPY = 0x0001
_EQUIPMENT_FPU = 0x0002
_EQUIPMENT_80_COLUMNS = 0x0020
_EQUIPMENT_SERIAL_SHIFT = 9
_COM_PORTS = (0x3F8, 0x2F8, 0x3E8, 0x2E8)
_UART_SCRATCH = 7
_USER_VECTORS = (*range(0x60, 0x67), 0x79)


def power_on(platform: Platform, frame: CallFrame) -> None:
    """After reset: resume where the shutdown byte says, or do the self-test and let the ROM go on to INT 19h."""
    shutdown = platform.read_cmos(_SHUTDOWN)
    platform.write_cmos(_SHUTDOWN, 0)
    if shutdown in (_SHUTDOWN_JUMP_EOI, _SHUTDOWN_JUMP):
        if shutdown == _SHUTDOWN_JUMP_EOI:
            platform.write_port(0xA0, 0x20)
            platform.write_port(0x20, 0x20)
        target = platform.load(bda.RESET_RETURN, 4)
        frame.cs, frame.ip = target >> 16, target & 0xFFFF
        return
    self_test(platform)
    video.write_text(platform, "trapgate BIOS\r\n\n")


def self_test(platform: Platform) -> None:
    """Vectors, BIOS data, interrupt controllers, timer, clock, keyboard controller, text screen; A20 open.

    It needs no CPU, so it also prepares the machine for images that are loaded without booting.
    """
    system.set_a20(platform, enabled=True)
    _set_vectors(platform)
    _set_data_area(platform)
    _set_up_interrupts(platform)
    _set_up_clocks(platform)
    video.set_mode(platform, 3, clear=True)
    _set_up_keyboard(platform)
    platform.store(bda.TICKS, 4, rtc.ticks_since_midnight(platform))


def bootstrap(platform: Platform, frame: CallFrame) -> None:
    """INT 19h: load the first sector of the first drive that has a boot signature, and return into it.

    Diskettes come before hard disks. Without any the frame is left as it is: the ROM goes on to INT 18h.
    """
    for number in sorted(platform.drives):
        try:
            sector = platform.drives[number].read(0, 1)
        except DiskError:
            continue
        if sector[510:512] != _SIGNATURE:
            continue
        kind = "diskette" if platform.drives[number].media is Media.FLOPPY else "hard disk"
        video.write_text(platform, f"Booting from {kind} {number & 0x7F}\r\n")
        platform.cpu.write(BOOT_SECTOR, sector)
        frame.values[:8] = [0] * 8
        frame.eax = 0xAA55
        frame.dl = number
        frame.ds = frame.es = 0
        frame.cs, frame.ip = 0, BOOT_SECTOR
        frame.flags = _EFLAGS_IF | 2
        return


def give_up(platform: Platform, _frame: CallFrame) -> None:
    """INT 18h: say that there is nothing to boot from; the ROM then waits for ever."""
    video.write_text(platform, "No bootable device\r\n")


def _set_vectors(platform: Platform) -> None:
    table = [bda.ROM_SEGMENT << 16 | bda.ROM_IRET] * 256
    for vector in _USER_VECTORS:
        table[vector] = 0
    rom = (bda.ROM_SEGMENT << 4) + bda.ROM_VECTORS
    while (vector := platform.load(rom, 2)) < len(table):
        table[vector] = bda.ROM_SEGMENT << 16 | platform.load(rom + 2, 2)
        rom += 4
    if platform.hard_disks:
        table[0x41] = (EBDA >> 4) << 16 | bda.EBDA_DISK_TABLE
    platform.cpu.write(bda.VECTORS, struct.pack("<256I", *table))


def _set_data_area(platform: Platform) -> None:
    platform.cpu.write(bda.BDA_FIRST, bytes(bda.BDA_BYTES))
    platform.cpu.write(EBDA, bytes(EBDA_BYTES))
    platform.store(EBDA + bda.EBDA_SIZE, 1, EBDA_BYTES // KIB)
    ports = [port for port in _COM_PORTS if _is_uart(platform, port)]
    for index, port in enumerate(ports):
        platform.store(bda.COM_PORTS + 2 * index, 2, port)
    equipment = _EQUIPMENT_80_COLUMNS | len(ports) << _EQUIPMENT_SERIAL_SHIFT
    equipment |= platform.read_cmos(_CMOS_EQUIPMENT) & _EQUIPMENT_FPU
    if platform.floppies:
        platform.store(bda.FLOPPY_CONTROLLER, 1, 0x07)
        platform.store(bda.FLOPPY_MEDIA, 1, 0x17)
        equipment |= _EQUIPMENT_FLOPPY | min(platform.floppies - 1, 3) << 6
    platform.store(bda.EBDA_SEGMENT, 2, EBDA >> 4)
    platform.store(bda.EQUIPMENT, 2, equipment)
    platform.store(bda.MEMORY_KIB, 2, usable_kib(platform.memory.ram_bytes)[0])
    buffer = bda.KEY_BUFFER - bda.BDA_FIRST
    for pointer in (bda.KEY_HEAD, bda.KEY_TAIL, bda.KEY_BUFFER_START):
        platform.store(pointer, 2, buffer)
    platform.store(bda.KEY_BUFFER_END, 2, buffer + 32)
    platform.store(bda.KEYBOARD_FLAGS_3, 1, bda.ENHANCED_KEYBOARD)
    platform.store(bda.KEYBOARD_LEDS, 1, 0x10)
    platform.store(bda.DISK_COUNT, 1, platform.hard_disks)
    platform.store(bda.LPT_TIMEOUTS, 4, 0x14141414)
    platform.store(bda.COM_TIMEOUTS, 4, 0x01010101)
    first = platform.drives.get(0x80)
    if first is not None:
        geometry = first.geometry
        table = struct.pack(
            "<HBHHBBBBBHBB",
            *(geometry.cylinders, geometry.heads, 0, 0xFFFF, 0),
            *(0xC8 if geometry.heads > 8 else 0xC0, 0, 0, 0, geometry.cylinders, geometry.sectors, 0),
        )
        platform.cpu.write(EBDA + bda.EBDA_DISK_TABLE, table)


def _is_uart(platform: Platform, port: int) -> bool:
    """A UART's scratch register holds what is written."""
    for pattern in (0x55, 0xAA):
        platform.write_port(port + _UART_SCRATCH, pattern)
        if platform.read_port(port + _UART_SCRATCH) != pattern:
            return False
    platform.write_port(port + _UART_SCRATCH, 0)
    return True


def _set_up_interrupts(platform: Platform) -> None:
    """Vectors 08h and 70h; open are IRQ 0, 1, 2, 6 and 8, 12, 13, 14."""
    for command, data, vector, cascade, mask in ((0x20, 0x21, 0x08, 0x04, 0xB8), (0xA0, 0xA1, 0x70, 0x02, 0x8E)):
        platform.write_port(command, 0x11)
        platform.write_port(data, vector)
        platform.write_port(data, cascade)
        platform.write_port(data, 0x01)
        platform.write_port(data, mask)


def _set_up_clocks(platform: Platform) -> None:
    platform.write_port(0x43, 0x34)  # counter 0: both bytes, mode 2, divisor 65536
    platform.write_port(0x40, 0)
    platform.write_port(0x40, 0)
    platform.write_cmos(rtc.REGISTER_A, rtc.RATE_1024_HZ)
    platform.write_cmos(rtc.REGISTER_B, rtc.HOURS_24)
    platform.read_cmos(rtc.REGISTER_C)
    platform.read_cmos(rtc.REGISTER_D)


def _set_up_keyboard(platform: Platform) -> None:
    """Keyboard on, scan codes translated to set 1, IRQ 1 on, mouse off; nothing left in the output buffer."""
    data, command = 0x60, 0x64
    _drain_keyboard(platform)
    platform.write_port(command, 0x60)
    platform.write_port(data, 0x60)  # translate, mouse off, no interrupts yet
    platform.write_port(command, 0xAE)
    platform.write_port(data, 0xF4)
    _drain_keyboard(platform)
    platform.write_port(command, 0x60)
    platform.write_port(data, 0x61)


def _drain_keyboard(platform: Platform) -> None:
    for _ in range(32):
        if not platform.read_port(0x64) & 0x01:
            return
        platform.read_port(0x60)
