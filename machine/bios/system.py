"""INT 15h: memory sizes and map, A20, waiting, block moves, what the system is; and INT 11h and 12h.

It must not know who runs the CPU; memory sizes come from the shared memory map.

Source: ACPI specification, "System Address Map Interfaces"; IBM PS/2 and PC BIOS Interface Technical Reference,
"Interrupt 15H".
"""

import struct

from machine.bios import bda, rtc
from machine.bios.frame import CallFrame
from machine.bios.platform import Platform
from machine.e820 import memory_map, usable_kib

UNSUPPORTED = 0x86
_SMAP = 0x534D4150
_E820_ENTRY = struct.Struct("<QQI")
_PORT_A = 0x92
_PORT_A_A20 = 0x02
_15_MIB_KIB = 15 * 1024
#: Function 88h was made for AT memory; more than this is not told, as older software counts on it.
_MAX_88_KIB = 63 * 1024
_MAX_BLOCK_WORDS = 0x8000


def service(platform: Platform, frame: CallFrame) -> None:
    """INT 15h: by AX, then by AH; what is not there (APM among it) answers CF set and AH 86h."""
    function = _BY_AX.get(frame.ax) or _BY_AH.get(frame.ah)
    if function is None:
        frame.fail(UNSUPPORTED)
    else:
        function(platform, frame)


def equipment(platform: Platform, frame: CallFrame) -> None:
    """INT 11h."""
    frame.ax = platform.load(bda.EQUIPMENT, 2)


def memory_size(platform: Platform, frame: CallFrame) -> None:
    """INT 12h."""
    frame.ax = platform.load(bda.MEMORY_KIB, 2)


def _address_map(platform: Platform, frame: CallFrame) -> None:
    """E820h: entry number EBX to ES:DI; EBX on return is the next, 0 after the last."""
    regions = memory_map(platform.memory.ram_bytes)
    if frame.edx != _SMAP or frame.ecx < _E820_ENTRY.size or frame.ebx >= len(regions):
        frame.fail(UNSUPPORTED)
        return
    region = regions[frame.ebx]
    entry = _E820_ENTRY.pack(region.base, region.length_bytes, region.kind)
    platform.cpu.write((frame.es << 4) + frame.di, entry)
    frame.eax = _SMAP
    frame.ecx = _E820_ENTRY.size
    frame.ebx = (frame.ebx + 1) % len(regions)
    frame.carry = False


def _extended_sizes(platform: Platform) -> tuple[int, int]:
    """KiB from 1 to 16 MiB, and blocks of 64 KiB above 16 MiB."""
    _, upper_kib = usable_kib(platform.memory.ram_bytes)
    return min(upper_kib, _15_MIB_KIB), max(0, upper_kib - _15_MIB_KIB) // 64


def _sizes_16(platform: Platform, frame: CallFrame) -> None:
    frame.ax, frame.bx = _extended_sizes(platform)
    frame.cx, frame.dx = frame.ax, frame.bx
    frame.carry = False


def _sizes_32(platform: Platform, frame: CallFrame) -> None:
    frame.eax, frame.ebx = _extended_sizes(platform)
    frame.ecx, frame.edx = frame.eax, frame.ebx
    frame.carry = False


def _extended_kib(platform: Platform, frame: CallFrame) -> None:
    _, upper_kib = usable_kib(platform.memory.ram_bytes)
    frame.ax = min(upper_kib, _MAX_88_KIB)
    frame.carry = False


def set_a20(platform: Platform, *, enabled: bool) -> None:
    """Open or close the gate at port 92h, without touching the reset bit."""
    value = platform.read_port(_PORT_A) & ~(_PORT_A_A20 | 0x01)
    platform.write_port(_PORT_A, value | _PORT_A_A20 if enabled else value)


def _a20_off(platform: Platform, frame: CallFrame) -> None:
    set_a20(platform, enabled=False)
    frame.succeed()


def _a20_on(platform: Platform, frame: CallFrame) -> None:
    set_a20(platform, enabled=True)
    frame.succeed()


def _a20_status(platform: Platform, frame: CallFrame) -> None:
    frame.al = 1 if platform.read_port(_PORT_A) & _PORT_A_A20 else 0
    frame.succeed()


def _a20_support(_platform: Platform, frame: CallFrame) -> None:
    frame.bx = 3  # by keyboard controller and by port 92h
    frame.succeed()


def _keyboard_intercept(_platform: Platform, frame: CallFrame) -> None:
    frame.carry = True  # keep the key


def _event_wait(platform: Platform, frame: CallFrame) -> None:
    """83h: after CX:DX microseconds set bit 7 of the byte at ES:BX (AL=0), or forget about it (AL=1)."""
    if frame.al == 1:
        rtc.cancel_wait(platform)
        frame.succeed()
    elif rtc.start_wait(platform, frame.cx << 16 | frame.dx, frame.es << 16 | frame.bx):
        frame.succeed()
    else:
        frame.fail(0x80)


def _wait(platform: Platform, frame: CallFrame) -> None:
    """86h: return after CX:DX microseconds."""
    if frame.attempt == 0:
        own_flag = bda.WAIT_ACTIVE  # 0000:04A0
        if not rtc.start_wait(platform, frame.cx << 16 | frame.dx, own_flag):
            frame.fail(0x83)
            return
    if platform.load(bda.WAIT_ACTIVE, 1) & bda.WAITING:
        frame.wait()
        return
    platform.store(bda.WAIT_ACTIVE, 1, 0)
    frame.succeed()


def _move_block(platform: Platform, frame: CallFrame) -> None:
    """87h: CX words, from the segment of the third descriptor at ES:SI to that of the fourth; A20 is open for it."""
    if frame.cx > _MAX_BLOCK_WORDS:
        frame.fail(0x02)
        return
    table = (frame.es << 4) + frame.si
    source, target = (_descriptor_base(platform, table + at) for at in (0x10, 0x18))
    a20 = platform.memory.a20_enabled
    platform.memory.a20_enabled = True
    platform.memory.write(target, platform.memory.read(source, 2 * frame.cx))
    platform.memory.a20_enabled = a20
    frame.succeed()
    frame.zero = True


def _descriptor_base(platform: Platform, linear: int) -> int:
    low, high = platform.load(linear + 2, 4), platform.load(linear + 7, 1)
    return low & 0xFFFFFF | high << 24


def _configuration(_platform: Platform, frame: CallFrame) -> None:
    frame.es, frame.bx = bda.ROM_SEGMENT, bda.ROM_CONFIGURATION
    frame.succeed()


def _ebda(platform: Platform, frame: CallFrame) -> None:
    frame.es = platform.load(bda.EBDA_SEGMENT, 2)
    frame.carry = False


def _nothing_to_do(_platform: Platform, frame: CallFrame) -> None:
    frame.succeed()


_BY_AX = {
    0x2400: _a20_off,
    0x2401: _a20_on,
    0x2402: _a20_status,
    0x2403: _a20_support,
    0xE801: _sizes_16,
    0xE820: _address_map,
    0xE881: _sizes_32,
}
_BY_AH = {
    0x4F: _keyboard_intercept,
    0x83: _event_wait,
    0x85: _nothing_to_do,
    0x86: _wait,
    0x87: _move_block,
    0x88: _extended_kib,
    0x90: _nothing_to_do,
    0x91: _nothing_to_do,
    0xC0: _configuration,
    0xC1: _ebda,
}
