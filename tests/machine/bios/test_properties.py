"""A guest may call any service with anything in its registers and in the BIOS data area: the firmware only answers."""

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from machine.bios import Caller, bda
from machine.bios.firmware import SERVICES
from machine.bios.frame import CallFrame
from machine.disk import Disk
from tests.machine.bios.pc import FRAME, Pc

WORDS = st.one_of(st.integers(0, 0xFFFF), st.sampled_from((0, 1, 0xFF, 0x80, 0x8000, 0xFFFF, 0x0201, 0x1301, 0x4200)))
#: Functions that exist come up often enough.
FUNCTIONS = st.one_of(
    WORDS,
    st.builds(lambda ah, al: ah << 8 | al, st.integers(0, 0x1A), st.integers(0, 255)),
    st.sampled_from((0xE820, 0xE801, 0xE881, 0x2400, 0x2401, 0x8600, 0x8300, 0x8700, 0x4100, 0x4300, 0x4800)),
)
REGISTERS = ("bx", "cx", "dx", "si", "di", "bp", "ds", "es", "ip", "cs", "flags")


@pytest.fixture(scope="module")
def pc() -> Iterator[Pc]:
    drives = {0: Disk.from_bytes(bytes(2880 * 512)), 0x80: Disk.from_bytes(bytes(10000 * 512))}
    made = Pc(drives)
    yield made
    made.close()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=400)
@given(
    service=st.sampled_from(sorted(SERVICES)),
    ax=FUNCTIONS,
    registers=st.fixed_dictionaries(dict.fromkeys(REGISTERS, WORDS)),
    trash=st.lists(st.tuples(st.integers(0, bda.BDA_BYTES - 1), st.integers(0, 255)), max_size=12),
    attempt=st.sampled_from((0, 0, 1, 18, 0xFFFF)),
)
def test_any_call(
    pc: Pc, service: int, ax: int, registers: dict[str, int], trash: list[tuple[int, int]], attempt: int
) -> None:
    pc.firmware.self_test()
    for offset, value in trash:
        pc.memory.store(bda.BDA_FIRST + offset, 1, value)
    frame = pc.call(service, ax=ax, status=attempt, **registers)
    for _ in range(20):
        if frame.attempt == 0:
            break
        pc.clock.idle_ns += 1_000_000
        pc.clock.run_due()
        frame = pc.call_again()
    for disk in pc.drives.values():
        disk.discard_writes()


def test_a_long_string_is_written_in_pieces(pc: Pc) -> None:
    pc.firmware.self_test()
    pc.memory.write(0x20000, b"0123456789" * 30)
    calls, frame = 1, pc.call(0x10, ax=0x1300, bx=0x1E, cx=300, dx=0x0102, es=0x2000)
    while frame.attempt:
        assert (frame.ax, frame.cx, frame.service) == (0x1300, 300, 0x10)
        assert pc.memory.load(FRAME + 39, 1) == 0x80  # the ROM asks again at once
        calls += 1
        frame = pc.call_again()
    assert calls == 38
    rows = pc.screen()
    assert rows[1] == "  " + ("0123456789" * 8)[:78]
    assert "".join(rows[1:]).strip() == "0123456789" * 30
    assert pc.board.vga.cursor == (0, 0)  # AL bit 0 is clear: the cursor goes back
    assert pc.memory.read(0xB8000 + 160 + 4, 2) == b"0\x1e"


def test_registers_of_a_frame_that_waits_are_the_callers(pc: Pc) -> None:
    pc.firmware.self_test()
    frame = pc.call(0x16, eax=0x11220033, ebx=0x44556677, scratch=0x8899AABB)
    assert frame.attempt == 1
    again = CallFrame.load(Caller(pc.cpu.state, pc.memory), 0, FRAME)
    assert (again.eax, again.ebx, again.scratch) == (0x11220033, 0x44556677, 0x8899AABB)
    assert again.attempt == 1
