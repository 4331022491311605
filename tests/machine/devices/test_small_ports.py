"""The small ports of the board: A20, reset, speaker, DMA registers, debug output and the ends of a run."""

from __future__ import annotations

import pytest

from machine.clock import Clock
from machine.devices.debug_ports import Debugcon, DebugExit, PostPort, PowerControl
from machine.devices.device import unconnected
from machine.devices.dma import Dma
from machine.devices.pit import Pit
from machine.devices.system_control import A20Gate, PortA, PortB, ResetControl
from machine.lines import CpuLines, ExitKind, ExitRequest
from tests.machine.devices.rig import advance


def test_a20_starts_free_and_drives_its_line() -> None:
    levels: list[bool] = []
    gate = A20Gate(levels.append)
    gate.set_enabled(False)
    state = gate.snapshot()
    gate.reset()
    gate.restore(state)
    assert levels == [True, False, True, False]
    assert gate.describe() == "a20: masked"


def test_port_92() -> None:
    lines = CpuLines()
    gate = A20Gate(unconnected)
    port = PortA(gate, lines.request_reset)
    assert port.load_port(0x92, 1) == 0x02
    port.store_port(0x92, 1, 0x00)
    assert (gate.enabled, port.load_port(0x92, 1)) == (False, 0x00)
    port.store_port(0x92, 1, 0x02)
    port.store_port(0x92, 1, 0x00)
    assert not lines.attention
    gate.set_enabled(True)
    assert port.load_port(0x92, 1) == 0x02, "whoever wrote it"
    port.store_port(0x92, 1, 0x03)
    assert lines.reset_requested
    lines.take_reset()
    port.store_port(0x92, 1, 0x03)
    assert lines.snapshot()["reset_requested"] is False, "bit 0 did not rise again"


@pytest.mark.parametrize(
    ("writes", "resets"), [((0x06,), 1), ((0x04,), 1), ((0x02, 0x06), 1), ((0x02,), 0), ((4, 4), 1)]
)
def test_cf9(writes: tuple[int, ...], resets: int) -> None:
    count = 0

    def reset() -> None:
        nonlocal count
        count += 1

    control = ResetControl(reset)
    for value in writes:
        control.store_port(0xCF9, 1, value)
    assert (count, control.load_port(0xCF9, 1)) == (resets, writes[-1])


def test_port_61() -> None:
    clock = Clock()
    pit = Pit(clock, unconnected)
    port = PortB(pit)
    assert port.load_port(0x61, 1) == 0
    port.store_port(0x61, 1, 0xFF)
    assert (port.load_port(0x61, 1), pit.channel2.gate) == (0x0F, True), "the upper half cannot be written"
    port.store_port(0x61, 1, 0x02)
    assert (port.load_port(0x61, 1), pit.channel2.gate) == (0x02, False)
    port.store_port(0x61, 1, 0x0F)
    pit.store_port(0x43, 1, 0xB0)
    pit.store_port(0x42, 1, 20)
    pit.store_port(0x42, 1, 0)
    seen = []
    for _ in range(4):
        advance(clock, 10_000)
        seen.append(port.load_port(0x61, 1))
    # OUT rises after 21 ticks (17.6 us), the refresh bit toggles every 18 (15.1 us).
    assert seen == [0x0F, 0x3F, 0x3F, 0x2F]
    port.reset()
    assert (port.load_port(0x61, 1) & 0x0F, pit.channel2.gate) == (0, False)


@pytest.mark.parametrize(("value", "size", "status"), [(0, 1, 1), (0x10, 1, 0x21), (0x7F, 4, 0xFF), (0x100, 4, 0x01)])
def test_debug_exit(value: int, size: int, status: int) -> None:
    lines = CpuLines()
    device = DebugExit(lines)
    assert device.load_port(0xF4, size) == 0
    device.store_port(0xF4, size, value)
    assert lines.exit_requested == ExitRequest(ExitKind.DEBUG_EXIT, status)


@pytest.mark.parametrize("value", [0x2000, 0x2001, 0x3400])
def test_power_off(value: int) -> None:
    lines = CpuLines()
    device = PowerControl(lines)
    device.store_port(0x604, 2, value & ~0x2000)
    assert lines.exit_requested is None
    device.store_port(0x604, 2, value)
    assert lines.take_exit() == ExitRequest(ExitKind.POWER_OFF, 0)
    assert device.load_port(0x604, 2) == value & ~0x2000


def test_debugcon_and_post() -> None:
    sent = bytearray()
    console = Debugcon(sent.extend)
    console.store_port(0xE9, 1, 0x41)
    Debugcon(None).store_port(0xE9, 1, 0x41)
    assert (bytes(sent), console.load_port(0xE9, 1)) == (b"A", 0xE9)
    post = PostPort()
    post.store_port(0x80, 1, 0x5A)
    assert (post.load_port(0x80, 1), post.describe()) == (0x5A, "post: 5a")


def test_dma_registers() -> None:
    dma = Dma()
    for port, value in ((0x0C, 0), (0x00, 0x34), (0x00, 0x12), (0xD8, 0), (0xC6, 0x78), (0xC6, 0x56), (0x87, 0x9A)):
        dma.store_port(port, 1, value)
    for port in (0x0C, 0xD8):
        dma.store_port(port, 1, 0)
    assert [dma.load_port(port, 1) for port in (0x00, 0x00, 0xC6, 0xC7, 0x87)] == [0x34, 0x12, 0x78, 0x56, 0x9A]


def test_dma_masks() -> None:
    dma = Dma()
    seen = [dma.load_port(0x0F, 1)]
    for port, value in ((0x0A, 0x02), (0x0A, 0x00), (0x0A, 0x06), (0x0E, 0), (0x0F, 0x35), (0x0D, 0)):
        dma.store_port(port, 1, value)
        seen.append(dma.load_port(0x0F, 1))
    assert seen == [0x0F, 0x0B, 0x0A, 0x0E, 0x00, 0x05, 0x0F]
    for register in range(8, 16):
        dma.store_port(register, 1, 0x05)
    assert [dma.load_port(port, 1) for port in range(8, 16)] == [0, 0, 0, 0, 0, 0, 0, 0x05]


def test_dma_master_clear_resets_the_flip_flop() -> None:
    dma = Dma()
    dma.store_port(0x01, 1, 0x11)
    dma.store_port(0x0D, 1, 0)
    dma.store_port(0x01, 1, 0x22)
    dma.store_port(0xDC, 1, 0)
    assert dma.load_port(0xDE, 1) == 0
    dma.reset()
    assert (dma.load_port(0x01, 1), dma.load_port(0xDE, 1)) == (0x22, 0x0F)
    dma.power_on()
    assert dma.load_port(0x01, 1) == 0
