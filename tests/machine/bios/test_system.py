"""INT 15h and the small services, where SeaBIOS is no model: the memory map, block moves, waits."""

import struct
from collections.abc import Iterator

import pytest

from machine.bios import bda
from machine.e820 import memory_map
from tests.machine.bios.pc import Pc

SYSTEM = 0x15
SMAP = 0x534D4150
MIB = 1 << 20


@pytest.fixture
def pc() -> Iterator[Pc]:
    made = Pc()
    made.firmware.self_test()
    yield made
    made.close()


@pytest.mark.parametrize("ram_bytes", [1 * MIB, 2 * MIB, 16 * MIB, 200 * MIB])
def test_address_map_is_the_shared_one(ram_bytes: int) -> None:
    pc = Pc(ram_bytes=ram_bytes)
    entries, following = [], 0
    while True:
        frame = pc.call(SYSTEM, eax=0xE820, ebx=following, ecx=20, edx=SMAP, es=0x2000, di=0x10)
        assert (frame.eax, frame.ecx, frame.carry) == (SMAP, 20, False)
        entries.append(struct.unpack("<QQI", pc.memory.read(0x20010, 20)))
        following = frame.ebx
        if following == 0:
            break
    assert entries == [(region.base, region.length_bytes, region.kind) for region in memory_map(ram_bytes)]
    pc.close()


@pytest.mark.parametrize(
    ("ram_mib", "low_kib", "blocks"), [(1, 0, 0), (2, 1024, 0), (16, 15360, 0), (17, 15360, 16), (3000, 15360, 47744)]
)
def test_sizes(ram_mib: int, low_kib: int, blocks: int) -> None:
    pc = Pc(ram_bytes=ram_mib * MIB)
    frame = pc.call(SYSTEM, eax=0xFFFFE801, ebx=0xFFFFFFFF)
    assert (frame.eax, frame.bx, frame.cx, frame.dx) == (0xFFFF0000 | low_kib, blocks, low_kib, blocks)
    frame = pc.call(SYSTEM, eax=0xE881, ebx=0xFFFFFFFF)
    assert (frame.carry, frame.eax, frame.ebx, frame.ecx, frame.edx) == (False, low_kib, blocks, low_kib, blocks)
    assert pc.call(SYSTEM, eax=0x8800).ax == min((ram_mib - 1) * 1024, 63 * 1024)
    pc.close()


def descriptors(source: int, target: int) -> bytes:
    return bytes(16) + b"".join(
        struct.pack("<HHBBBB", 0xFFFF, at & 0xFFFF, at >> 16 & 0xFF, 0x93, 0, at >> 24) for at in (source, target)
    )


@pytest.mark.parametrize("a20", [False, True])
def test_block_move(pc: Pc, *, a20: bool) -> None:
    pc.call(SYSTEM, ax=0x2401 if a20 else 0x2400)
    pc.memory.write(0x20000, b"conventional")
    pc.memory.write(0x50000, descriptors(0x20000, 0x300000))
    frame = pc.call(SYSTEM, ah=0x87, cx=6, es=0x5000)
    assert (frame.ah, frame.carry, frame.zero) == (0, False, True)
    assert pc.memory.a20_enabled == a20
    pc.call(SYSTEM, ax=0x2401)
    assert pc.memory.read(0x300000, 14) == b"conventional\0\0"
    assert pc.call(SYSTEM, ah=0x87, cx=0x8001, es=0x5000).carry


@pytest.mark.parametrize("ax", [0x5300, 0x8900, 0xC200, 0x0000, 0x2404, 0xE802, 0xFFFF])
def test_what_is_not_there_says_so(pc: Pc, ax: int) -> None:
    frame = pc.call(SYSTEM, ax=ax, bx=1, cx=2, dx=3)
    assert (frame.ah, frame.al, frame.carry) == (0x86, ax & 0xFF, True)
    assert (frame.bx, frame.cx, frame.dx) == (1, 2, 3)


def test_event_wait(pc: Pc) -> None:
    assert not pc.call(SYSTEM, ax=0x8300, cx=0, dx=2000, es=0x4000, bx=0x10).carry
    assert pc.call(SYSTEM, ax=0x8300, dx=2000).carry  # one at a time
    for _ in range(3):
        assert pc.number(0x40010) == 0
        pc.board.clock.skip_to_next()
        pc.clock.run_due()
        pc.clock.idle_ns += 1_000_000
        pc.clock.run_due()
        pc.call(0x70)
    assert pc.number(0x40010) == 0x80
    assert pc.number(bda.WAIT_ACTIVE) == 0
    assert not pc.platform.read_cmos(0x0B) & 0x40


def test_event_wait_can_be_taken_back(pc: Pc) -> None:
    pc.call(SYSTEM, ax=0x8300, cx=1, es=0x4000)
    assert not pc.call(SYSTEM, ax=0x8301).carry
    assert not pc.platform.read_cmos(0x0B) & 0x40
    assert not pc.call(SYSTEM, ax=0x8300, cx=1, es=0x4000).carry
    assert pc.number(0x40000) == 0


def test_wait_while_another_waits(pc: Pc) -> None:
    pc.call(SYSTEM, ax=0x8300, cx=1, es=0x4000)
    frame = pc.call(SYSTEM, ax=0x8600, dx=10)
    assert (frame.carry, frame.ah) == (True, 0x83)
