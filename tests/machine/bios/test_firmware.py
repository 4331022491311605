"""The firmware port: who may call, where the frame is, what a call leaves alone."""

from collections.abc import Iterator

import pytest

from machine.bios import FIRMWARE_PORT, Caller
from machine.bios.firmware import SERVICES
from machine.bios.frame import FRAME_BYTES, CallFrame
from machine.state import CR0_PE, CR0_PG, CS
from tests.machine.bios.pc import FRAME, Pc

MEMORY_SIZE = 0x12
VM = 1 << 17


@pytest.fixture
def pc() -> Iterator[Pc]:
    made = Pc()
    made.firmware.self_test()
    yield made
    made.close()


def test_a_call_changes_its_frame_only(pc: Pc) -> None:
    before = pc.memory.read(0, 0xA0000)
    frame = pc.call(MEMORY_SIZE, ax=0x1234, ebx=0x11223344, esi=0x55667788, es=0x9ABC, ds=0xDEF0, ip=1, cs=2)
    assert (frame.ax, frame.ebx, frame.esi, frame.es, frame.ds) == (639, 0x11223344, 0x55667788, 0x9ABC, 0xDEF0)
    assert (frame.ip, frame.cs, frame.flags) == (1, 2, 0x202)
    after = pc.memory.read(0, 0xA0000)
    assert after[:FRAME] == before[:FRAME]
    assert after[FRAME + FRAME_BYTES :] == before[FRAME + FRAME_BYTES :]


@pytest.mark.parametrize(
    ("base", "cr0", "eflags", "answered"),
    [
        (0xF0000, 0, 0, True),
        (0xFFFF0000, 0, 0, True),
        (0xF0000, CR0_PE, VM, True),
        (0xF0000, CR0_PE, 0, False),
        (0x0, 0, 0, False),
        (0xE0000, 0, 0, False),
        (0xF0010, 0, 0, False),
    ],
)
def test_only_the_rom_may_call(pc: Pc, base: int, cr0: int, eflags: int, *, answered: bool) -> None:
    pc.call(MEMORY_SIZE)
    pc.memory.store(FRAME + 28, 4, 0)  # EAX
    state = pc.cpu.state
    state.segments[CS].load(base >> 4 & 0xFFFF, base, 0xFFFF, 0x93)
    state.cr0, state.eflags = cr0, eflags | 2
    pc.board.ports.store(FIRMWARE_PORT, 4, FRAME)
    assert (pc.memory.load(FRAME + 28, 4) == 639) == answered


@pytest.mark.parametrize(("port", "size_bytes"), [(FIRMWARE_PORT, 1), (FIRMWARE_PORT, 2), (FIRMWARE_PORT + 1, 4)])
def test_other_accesses_do_nothing(pc: Pc, port: int, size_bytes: int) -> None:
    pc.call(MEMORY_SIZE)
    pc.memory.store(FRAME + 28, 4, 0)
    pc.board.ports.store(port, size_bytes, FRAME & 0xFF)
    assert pc.memory.load(FRAME + 28, 4) == 0
    assert pc.board.ports.load(FIRMWARE_PORT, 4) == 0xFFFFFFFF


def test_a_service_that_is_none_does_nothing(pc: Pc) -> None:
    before = pc.memory.read(0, 0xA0000)
    pc.call(0x77)
    after = pc.memory.read(0, 0xA0000)
    assert after[:FRAME] == before[:FRAME]
    assert 0x77 not in SERVICES


def test_frame_wraps_in_its_segment(pc: Pc) -> None:
    pc.cpu.state.segments[CS].load(0xF000, 0xF0000, 0xFFFF, 0x93)
    caller = Caller(pc.cpu.state, pc.memory)
    frame = CallFrame([0] * 15)
    frame.service, frame.flags = MEMORY_SIZE, 0x202
    frame.save(caller, 0x3000, 0xFFF0)
    assert pc.memory.load(0x30000 + 38 - 16, 2) == MEMORY_SIZE
    pc.board.ports.store(FIRMWARE_PORT, 4, 0x3000FFF0)
    assert CallFrame.load(caller, 0x3000, 0xFFF0).ax == 639
    assert pc.memory.load(0x30000 + 28 - 16, 2) == 639


def test_register_parts() -> None:
    frame = CallFrame([0] * 15)
    frame.eax = 0x11223344
    assert (frame.ax, frame.ah, frame.al) == (0x3344, 0x33, 0x44)
    frame.ah = 0x155
    frame.al = -1
    assert frame.eax == 0x112255FF
    frame.flags = 0xFFFF
    frame.carry = False
    frame.zero = False
    assert frame.flags == 0xFFFF & ~0x41
    frame.carry = True
    assert (frame.flags, frame.carry, frame.zero) == (0xFFFF & ~0x40, True, False)


@pytest.mark.parametrize("first", range(0xB8000, 0xB8005))
@pytest.mark.parametrize("length", range(10))
def test_device_memory_is_reached_in_dwords(pc: Pc, first: int, length: int) -> None:
    caller = Caller(pc.cpu.state, pc.memory)
    pc.memory.intercepts_devices = True
    pc.memory.write(0xB8000, bytes(range(0x40, 0x60)))
    sizes: list[int] = []
    load = pc.board.vga.load

    def record(offset: int, size_bytes: int) -> int:
        sizes.append(size_bytes)
        return load(offset, size_bytes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pc.board.vga, "load", record)
        assert caller.read(first, length) == bytes(range(0x40, 0x60))[first - 0xB8000 :][:length]
    assert sum(sizes) == length
    assert len([size for size in sizes if size == 1]) <= 6
    caller.write(first, b"\xee" * length)
    expected = bytearray(range(0x40, 0x60))
    expected[first - 0xB8000 : first - 0xB8000 + length] = b"\xee" * length
    assert pc.memory.read(0xB8000, 0x20) == expected


def test_virtual_8086_callers_are_seen_through_paging(pc: Pc) -> None:
    state, memory = pc.cpu.state, pc.memory
    directory, table = 0x100000, 0x101000
    memory.store(directory, 4, table | 7)
    for page in range(256):
        memory.store(table + 4 * page, 4, page << 12 | 7)
    memory.store(table + 4 * 0x30, 4, 0x200000 | 7)
    memory.store(table + 4 * 0x31, 4, 0)
    state.cr3, state.cr0, state.eflags = directory, CR0_PE | CR0_PG, VM | 2
    state.segments[CS].load(0xF000, 0xF0000, 0xFFFF, 0xF3)
    caller = Caller(state, memory)
    caller.write(0x2FFFE, b"abcdef")
    assert memory.read(0x2FFFE, 2) == b"ab"
    assert memory.read(0x200000, 4) == b"cdef"
    assert memory.read(0x30000, 4) == bytes(4)
    caller.write(0x30FFE, b"xyz!")
    assert caller.read(0x30FFE, 4) == b"xy\xff\xff"
