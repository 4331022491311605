"""BIOS calls made by a boot sector, under QEMU with SeaBIOS and in our PC, and what each call returned."""

import struct
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from machine.debug import StopKind
from machine.devices.rtc import START_DATE
from machine.disk import Disk, Media
from tests.machine.bios.assembly import assemble, tool
from tests.machine.bios.pc import Pc

SOURCE = Path(__file__).with_name("probe.S")
#: Buffers for calls that want one.
BUFFER_SEGMENT = 0x2000
BUFFER = BUFFER_SEGMENT << 4

_ENTRY = struct.Struct("<HH7I5H")
_FIRST = struct.Struct("<3H8I")
_RESULT = struct.Struct("<8I3H")
_TABLE_BYTES = 15 * 512
#: One sector of bytes that a test chooses, at 0000:DATA.
DATA = 0x8000 + _TABLE_BYTES
_INSNS = 20_000_000


@dataclass(frozen=True)
class Call:
    """One call: `vector` with these registers; `dump` bytes at segment:offset are taken afterwards."""

    vector: int
    eax: int = 0
    ebx: int = 0
    ecx: int = 0
    edx: int = 0
    esi: int = 0
    edi: int = 0
    ebp: int = 0
    ds: int = 0
    es: int = 0
    flags: int = 0
    dump: tuple[int, int, int] = (0, 0, 0)  # segment, offset, length


@dataclass(frozen=True)
class Result:
    """What a call returned."""

    eax: int
    ebx: int
    ecx: int
    edx: int
    esi: int
    edi: int
    ebp: int
    ds: int
    es: int
    flags: int
    dump: bytes

    @property
    def carry(self) -> bool:
        return bool(self.flags & 1)

    @property
    def zero(self) -> bool:
        return bool(self.flags & 0x40)

    @property
    def ah(self) -> int:
        return self.eax >> 8 & 0xFF


@dataclass(frozen=True)
class Entry:
    """Registers at the first instruction of the boot sector."""

    eax: int
    ebx: int
    ecx: int
    edx: int
    esi: int
    edi: int
    ebp: int
    esp: int
    ds: int
    es: int
    ss: int


def boot_code() -> bytes:
    """The boot sector, assembled."""
    code = assemble(SOURCE.read_text())
    assert len(code) <= 510
    return code


def image(calls: Sequence[Call], image_bytes: int, data: bytes = b"") -> bytes:
    """A disk image: boot sector, table of calls, `data`, and then sectors filled with their number."""
    table = b"".join(
        _ENTRY.pack(
            *(call.vector, call.flags, call.eax, call.ebx, call.ecx, call.edx, call.esi, call.edi, call.ebp),
            *(call.ds, call.es, call.dump[1], call.dump[0], call.dump[2]),
        )
        for call in calls
    )
    table += b"\xff\xff"
    assert len(table) <= _TABLE_BYTES
    assert len(data) <= 512
    head = boot_code().ljust(510, b"\0") + b"\x55\xaa" + table.ljust(_TABLE_BYTES, b"\0") + data.ljust(512, b"\0")
    numbered = b"".join(struct.pack("<I", lba) * 128 for lba in range(len(head) // 512, image_bytes // 512))
    return head + numbered


def parse(data: bytes, calls: Sequence[Call]) -> tuple[Entry, list[Result]]:
    """Split what came through the debug console."""
    ss, es, ds, edi, esi, ebp, esp, ebx, edx, ecx, eax = _FIRST.unpack_from(data)
    entry = Entry(eax, ebx, ecx, edx, esi, edi, ebp, esp, ds, es, ss)
    results = []
    at = _FIRST.size
    for call in calls:
        edi, esi, ebp, _, ebx, edx, ecx, eax, ds, es, flags = _RESULT.unpack_from(data, at)
        at += _RESULT.size
        dump = data[at : at + call.dump[2]]
        at += call.dump[2]
        results.append(Result(eax, ebx, ecx, edx, esi, edi, ebp, ds, es, flags, dump))
    assert at == len(data), f"{len(data)} bytes came, {at} were expected"
    return entry, results


def run_qemu(data: bytes, calls: Sequence[Call], media: Media, ram_mib: int = 16) -> tuple[Entry, list[Result]]:
    """Boot the image under QEMU."""
    qemu = tool("qemu-system-i386")
    with tempfile.TemporaryDirectory() as directory:
        path, output = Path(directory) / "image", Path(directory) / "output"
        path.write_bytes(data)
        drive = "floppy" if media is Media.FLOPPY else "ide"
        command = [qemu, "-accel", "tcg", "-m", str(ram_mib), "-display", "none", "-net", "none", "-serial", "null"]
        command += ["-drive", f"file={path},format=raw,if={drive},snapshot=on", "-debugcon", f"file:{output}"]
        command += ["-device", "isa-debug-exit,iobase=0xf4,iosize=4", "-rtc", f"base={START_DATE:%Y-%m-%dT%H:%M:%S}"]
        done = subprocess.run(command, check=False, timeout=60, capture_output=True, text=True)
        assert done.returncode == 1, done.stderr
        return parse(output.read_bytes(), calls)


def run_ours(data: bytes, calls: Sequence[Call], media: Media, ram_mib: int = 16) -> tuple[Entry, list[Result]]:
    """Boot the image in our PC."""
    number = 0 if media is Media.FLOPPY else 0x80
    pc = Pc({number: Disk.from_bytes(data, media)}, ram_mib << 20)
    stop = pc.run(_INSNS)
    assert stop.kind is StopKind.EXIT, (stop, pc.screen())
    results = parse(bytes(pc.debugcon), calls)
    pc.close()
    return results
