"""Every BIOS call that boot code makes, under SeaBIOS and under ours: the same answers, but for what each row names.

A row names the fields that differ, and the reason is written beside it; a difference that goes away fails as well.
"""

import struct
from dataclasses import dataclass, replace

import pytest

from machine.disk import Media
from tests.machine.bios.probing import BUFFER, BUFFER_SEGMENT, DATA, Call, Entry, Result, image, run_ours, run_qemu

SMAP = 0x534D4150
FLOPPY_BYTES = 2880 * 512
HARD_DISK_BYTES = 10000 * 512
SCREEN = 0xB800
Dump = tuple[int, int, int]
COMPARED = ("eax", "ebx", "ecx", "edx", "esi", "edi", "ebp", "ds", "es", "carry", "zero", "dump")


@dataclass(frozen=True)
class Row:
    """A call, the fields in which the answers differ, and why."""

    call: Call
    differs: frozenset[str] = frozenset()


def row(vector: int, eax: int = 0, *, differs: str = "", dump: Dump = (0, 0, 0), **registers: int) -> Row:
    return Row(Call(vector, eax, dump=dump, **registers), frozenset(differs.split()))


def dumped(vector: int, eax: int, *dump: int, differs: str = "", **registers: int) -> Row:
    segment, offset, length = dump
    return row(vector, eax, differs=differs, dump=(segment, offset, length), **registers)


def disk_rows(drive: int) -> list[Row]:
    def into(eax: int, ecx: int, head: int = 0, ebx: int = 0) -> Call:
        return Call(0x13, eax, ebx=ebx, ecx=ecx, edx=drive | head << 8, es=BUFFER_SEGMENT)

    def read(sectors: int, ecx: int, head: int = 0, ebx: int = 0) -> Row:
        call = into(0x0200 | sectors, ecx, head, ebx)
        return Row(replace(call, dump=(BUFFER_SEGMENT, ebx, sectors * 512)))

    return [
        row(0x13, 0x0000, edx=drive),
        row(0x13, 0x0800, edx=drive + 1),
        row(0x13, 0x1500, edx=drive),
        row(0x13, 0x1500, edx=drive + 1),
        row(0x13, 0x1600, edx=drive),
        row(0x13, 0x0201, ecx=1, edx=drive + 1, es=BUFFER_SEGMENT),
        row(0x13, 0x0100, edx=drive + 1),
        row(0x13, 0x0100, edx=drive),
        read(1, 0x0001),
        read(3, 0x0012),
        read(4, 0x0011, head=1),
        Row(into(0x0201, 0x0113)),
        row(0x13, 0x0100, edx=drive),
        Row(into(0x0201, 0x0000)),
        Row(into(0x0200, 0x0001)),
        Row(into(0x0201, 0x5001)),
        read(1, 0x4F12, head=1),
        Row(into(0x0201, 0x0101, head=0x20)),
        Row(into(0x0280, 0x0001)),
        Row(into(0x0281, 0x0001)),
        Row(into(0x0202, 0x0001, ebx=0xFF00)),
        Row(into(0x0202, 0x0001, ebx=0xFE00)),
        read(1, 0x0002, ebx=0xFE00),
        row(0x13, 0x0401, ecx=0x0001, edx=drive),
        # What is written is read again.
        row(0x13, 0x0301, ebx=0x8000, ecx=0x0111, edx=drive),
        read(1, 0x0111),
        row(0x13, 0x0C00, ecx=0x0101, edx=drive),
        *[row(0x13, function << 8, edx=drive) for function in (0x09, 0x0D, 0x10, 0x11, 0x14, 0x17, 0x55)],
        row(0x13, 0x1800, ecx=0x4F12, edx=drive),
        # CD-ROM emulation: SeaBIOS knows the call, and answers that nothing is emulated.
        row(0x13, 0x4B01, edx=drive, differs="eax carry"),
        row(0x13, 0x0800, edx=0x7F),
        row(0x13, 0x0800, edx=0xFF),
        row(0x13, 0x0200, edx=0x7F),
    ]


FLOPPY_ROWS = [
    *disk_rows(0),
    row(0x13, 0x0800, differs="edi"),  # the parameter table is at another address
    row(0x13, 0x4100, ebx=0x55AA),
    row(0x13, 0x4200, esi=DATA),
    row(0x40, 0x0800, edx=0x80),
]


def packet(sectors: int, lba: int, *, offset: int = 0, size_bytes: int = 16) -> bytes:
    return struct.pack("<BBHHHQ", size_bytes, 0, sectors, offset, BUFFER_SEGMENT, lba)


PACKETS = [
    (packet(1, 77), ""),
    (packet(3, 9997, offset=0x200), ""),
    (packet(127, 100), ""),
    (packet(128, 100), ""),
    (packet(0, 5), ""),
    (packet(1, 10000), ""),
    (packet(1, 1 << 40), ""),
]
# Across the end of the disk SeaBIOS transfers nothing, too, but says how many sectors it had wanted, and calls a read
# an uncorrectable error. So we answer as for any other sector that is not there.
CROSSING = packet(3, 9998)
RESULT_26 = DATA + 0x100
RESULT_25 = DATA + 0x130
HARD_DATA = (b"".join(one for one, _ in PACKETS) + CROSSING).ljust(0x100, b"\0")
HARD_DATA += struct.pack("<H", 26).ljust(0x30, b"\0") + struct.pack("<H", 25).ljust(0x30, b"\0")
CROSSING_DIFFERS = {0x42: "eax dump", 0x43: "dump", 0x44: "dump", 0x47: "dump"}

HARD_ROWS = [
    *disk_rows(0x80),
    row(0x13, 0x0800, edx=0x80),
    # SeaBIOS offers version 3.0 with removable media and drive parameter extensions, we version 1 with packets only.
    row(0x13, 0x4100, ebx=0x55AA, edx=0x80, differs="eax ecx"),
    dumped(0x13, 0x4800, 0, RESULT_26, 40, edx=0x80, esi=RESULT_26),
    dumped(0x13, 0x4800, 0, RESULT_25, 40, edx=0x80, esi=RESULT_25),
    *[
        dumped(0x13, function << 8, 0, DATA + 16 * index, 16, edx=0x80, esi=DATA + 16 * index, differs=differs)
        for function in (0x42, 0x44, 0x47, 0x43)
        for index, (_, differs) in enumerate(PACKETS)
    ],
    *[
        dumped(
            *(0x13, function << 8, 0, DATA + 16 * len(PACKETS), 16),
            edx=0x80,
            esi=DATA + 16 * len(PACKETS),
            differs=CROSSING_DIFFERS[function],
        )
        for function in (0x42, 0x44, 0x47, 0x43)
    ],
    dumped(0x13, 0x4200, BUFFER_SEGMENT, 0, 512, edx=0x80, esi=DATA),
]

KEYBOARD_ROWS = [
    row(0x16, 0x0100),
    row(0x16, 0x1100),
    row(0x16, 0x0200),
    row(0x16, 0x1200),
    row(0x16, 0x0500, ecx=0x1E61),
    row(0x16, 0x0100),
    row(0x16, 0x0000),
    *[
        one
        for key in (0x48E0, 0xE00D, 0xE02F, 0xE00A, 0x00E0, 0x8500, 0x0000)
        for function in (0x00, 0x10)
        for one in (
            row(0x16, 0x0500, ecx=key),
            row(0x16, (function | 1) << 8),
            row(0x16, function << 8),
        )
    ],
    *[row(0x16, 0x0500, ecx=0x0100 + number) for number in range(17)],
    *[row(0x16, 0x1000) for _ in range(15)],
    row(0x16, 0x1100),
    row(0x16, 0x0900),
    row(0x16, 0x0A00),
    row(0x16, 0x9200),
    row(0x16, 0xA200),
    row(0x16, 0x5500),
]

SYSTEM_ROWS = [
    row(0x11, differs="eax"),  # QEMU's PC has an FPU, a printer port and one serial port less
    row(0x12),
    # SeaBIOS keeps the last 128 KiB of RAM for its tables, so the sizes of extended memory differ, and the map from its
    # fourth entry on.
    row(0x15, 0xE801, differs="eax ecx"),
    row(0x15, 0x8800, differs="eax"),
    *[
        dumped(0x15, 0xE820, BUFFER_SEGMENT, 0, 20, ebx=entry, ecx=24, edx=SMAP, es=BUFFER_SEGMENT, differs=differs)
        for entry, differs in enumerate(("", "", "", "dump", "ebx dump", "eax ebx ecx carry dump"))
    ],
    row(0x15, 0xE820, ecx=20, edx=0),
    row(0x15, 0xE820, ecx=19, edx=SMAP, es=BUFFER_SEGMENT),
    row(0x15, 0xE881, differs="eax ecx carry"),  # SeaBIOS does not have it
    dumped(0x15, 0xC000, 0xF000, 0xE6F5, 10),
    row(0x15, 0xC100),
    row(0x15, 0x4F1E),
    row(0x15, 0x5300, differs="eax ebx ecx carry"),  # APM: we have none
    row(0x15, 0x2402),
    row(0x15, 0x2403),
    row(0x15, 0x2400),
    row(0x15, 0x2402),
    row(0x15, 0x2401),
    row(0x15, 0x2402),
    row(0x15, 0x9000, differs="eax"),  # AH is 0 on success in ours
    row(0x15, 0x8600, edx=5000, differs="eax"),
    *[row(0x15, function) for function in (0x8000, 0xC300, 0xD800, 0xEC00, 0x1234, 0xFFFF)],
    row(0x14, 0x0300),
    row(0x14, 0x00E3),
    row(0x14, 0x0141),
    row(0x14, 0x0300, edx=3),
    row(0x17, 0x0200, differs="eax"),  # QEMU's PC has a printer port
    row(0x1A, 0x0100, ecx=0x0012, edx=0x3456),
    row(0x1A, 0x0400, differs="eax"),  # AL, which is undefined; time and ticks would depend on the moment
    row(0x1A, 0x5500),
]

TEXT = b"Hello\r\nworld\x08!" + b"-" * 80
VIDEO_ROWS = [
    row(0x10, 0x0F00),
    row(0x10, 0x0003),
    row(0x10, 0x0F00),
    row(0x10, 0x0300),
    row(0x10, 0x0200, edx=0x0510),
    row(0x10, 0x0300),
    row(0x10, 0x0941, ebx=0x1E, ecx=3),
    row(0x10, 0x0800),
    row(0x10, 0x0A42, ebx=0x1E, ecx=2),
    row(0x10, 0x0E43, ebx=7),
    row(0x10, 0x0300),
    dumped(0x10, 0x0800, SCREEN, 5 * 160, 160),
    *[row(0x10, 0x0E00 | byte, ebx=7) for byte in TEXT],
    dumped(0x10, 0x0300, SCREEN, 0, 4000),
    row(0x10, 0x0200, edx=0x184E),
    *[row(0x10, 0x0E00 | byte, ebx=7) for byte in b"abc"],
    dumped(0x10, 0x0300, SCREEN, 0, 4000),
    dumped(0x10, 0x0602, SCREEN, 0, 1760, ebx=0x1700, ecx=0x0205, edx=0x0814),
    dumped(0x10, 0x0701, SCREEN, 0, 1760, ebx=0x2700, ecx=0x0205, edx=0x0814),
    dumped(0x10, 0x0600, SCREEN, 0, 1760, ebx=0x3700, ecx=0x0301, edx=0x0402),
    dumped(0x10, 0x0705, SCREEN, 0, 1760, ebx=0x4700, ecx=0x0102, edx=0x0303),
    dumped(0x10, 0x0601, SCREEN, 0, 4000, ebx=0x0700, ecx=0x0000, edx=0xFFFF),
    dumped(0x10, 0x1301, SCREEN, 3680, 320, ebx=0x4E, ecx=7, edx=0x184D, ebp=DATA),
    row(0x10, 0x0300),
    dumped(0x10, 0x1303, SCREEN, 1600, 320, ebx=0x4E, ecx=3, edx=0x0A4D, ebp=DATA),
    row(0x10, 0x0300),
    dumped(0x10, 0x1300, SCREEN, 1600, 320, ebx=0x4E, ecx=3, edx=0x0A10, ebp=DATA),
    row(0x10, 0x0300),
    row(0x10, 0x0501),
    row(0x10, 0x0F00),
    dumped(0x10, 0x0E41, SCREEN, 0x1000, 160, ebx=0x0007),
    dumped(0x10, 0x0300, 0x40, 0x49, 0x1C, ebx=0x0100),
    row(0x10, 0x0500),
    row(0x10, 0x0100, ecx=0x2000),
    row(0x10, 0x0300),
    row(0x10, 0x0083),
    row(0x10, 0x0F00),
    row(0x10, 0x0001),
    dumped(0x10, 0x0F00, 0x40, 0x49, 0x1C),
    row(0x10, 0x0003),
    row(0x10, 0x1A00),
    row(0x10, 0x1210, ebx=0x10),
    row(0x10, 0x1130, differs="ebp es"),  # where the font is
    row(0x10, 0x4F00, es=BUFFER_SEGMENT, differs="eax"),  # no VBE
    dumped(0x10, 0x0F00, 0x40, 0x84, 7),
]


def compare(rows: list[Row], ours: list[Result], theirs: list[Result]) -> list[str]:
    """One line for each field that differs though it should not, or does not though it should."""
    wrong = []
    for number, (one, our, their) in enumerate(zip(rows, ours, theirs, strict=True)):
        differs = {name for name in COMPARED if getattr(our, name) != getattr(their, name)}
        for name in sorted(differs ^ one.differs):
            values = [getattr(answer, name) for answer in (our, their)]
            shown = [value.hex() if isinstance(value, bytes) else f"{value:x}" for value in values]
            wrong.append(f"row {number} {one.call}: {name} ours {shown[0]}, SeaBIOS {shown[1]}")
    return wrong


@pytest.mark.parametrize(
    ("rows", "media", "image_bytes", "data"),
    [
        pytest.param(FLOPPY_ROWS, Media.FLOPPY, FLOPPY_BYTES, packet(1, 0), id="diskette"),
        pytest.param(HARD_ROWS, Media.HARD, HARD_DISK_BYTES, HARD_DATA, id="hard disk"),
        pytest.param(KEYBOARD_ROWS, Media.FLOPPY, FLOPPY_BYTES, b"", id="keyboard"),
        pytest.param(SYSTEM_ROWS, Media.FLOPPY, FLOPPY_BYTES, b"", id="system"),
        pytest.param(VIDEO_ROWS, Media.FLOPPY, FLOPPY_BYTES, b"colours", id="video"),
    ],
)
def test_same_answers(rows: list[Row], media: Media, image_bytes: int, data: bytes) -> None:
    calls = [one.call for one in rows]
    disk = image(calls, image_bytes, data)
    entry, ours = run_ours(disk, calls, media)
    their_entry, theirs = run_qemu(disk, calls, media)
    assert registers(entry) == registers(their_entry)
    assert compare(rows, ours, theirs) == []


def registers(entry: Entry) -> tuple[int, ...]:
    """All but ESP: SeaBIOS's stack is 7000h, too, less what it has on it."""
    assert 0x6E00 < entry.esp <= 0x7000
    return (entry.eax, entry.ebx, entry.ecx, entry.edx, entry.esi, entry.edi, entry.ebp, entry.ds, entry.es, entry.ss)


@pytest.mark.parametrize("ram_mib", [4, 64, 300])
def test_memory_sizes(ram_mib: int) -> None:
    calls = [Call(0x15, 0xE801), Call(0x15, 0x8800), Call(0x12)]
    disk = image(calls, FLOPPY_BYTES)
    _, ours = run_ours(disk, calls, Media.FLOPPY, ram_mib)
    _, theirs = run_qemu(disk, calls, Media.FLOPPY, ram_mib)
    reserved_kib = 128
    above = ram_mib > 16
    assert ours[0].eax == theirs[0].eax + (0 if above else reserved_kib)
    assert ours[0].ebx == theirs[0].ebx + (reserved_kib // 64 if above else 0)
    assert (ours[0].ecx, ours[0].edx) == (ours[0].eax, ours[0].ebx)
    assert ours[1].eax == theirs[1].eax + (reserved_kib if ram_mib <= 64 else 0)
    assert ours[2].eax == theirs[2].eax


def test_a_row_that_should_differ_is_checked() -> None:
    rows = [row(0x12, differs="eax")]
    result = Result(eax=0, ebx=0, ecx=0, edx=0, esi=0, edi=0, ebp=0, ds=0, es=0, flags=0, dump=b"")
    assert len(compare(rows, [result], [result])) == 1


def test_probe_reaches_memory() -> None:
    calls = [Call(0x12, dump=(BUFFER_SEGMENT, 0, 4)), Call(0x13, 0x0201, ecx=0x0112, es=BUFFER_SEGMENT)]
    calls.append(Call(0x12, dump=(BUFFER_SEGMENT, 0, 4)))
    _, ours = run_ours(image(calls, FLOPPY_BYTES), calls, Media.FLOPPY)
    assert ours[0].dump == bytes(4)
    assert ours[2].dump == (53).to_bytes(4, "little")
    assert BUFFER == 0x20000
