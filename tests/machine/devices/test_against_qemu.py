"""The same port accesses on our board and on QEMU's "pc": the same bytes, or a difference that is judged here."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from machine.devices.board import Board, BoardOptions
from machine.devices.pic import Chip
from machine.disk import Disk, Media
from tests.machine.devices.port_script import PortScript
from tests.machine.devices.rig import a_board

OPTIONS = (
    "-rtc", "base=2006-10-21T12:00:00,clock=vm", "-device", "isa-serial,index=0", "-device", "isa-serial,index=1",
    "-device", "isa-vga", "-icount", "shift=0,sleep=off",
)  # fmt: skip

MASTER, SLAVE = 0x20, 0xA0
COM1 = 0x3F8


def compare(script: PortScript) -> None:
    with a_board() as board:
        assert script.run_on_board(board) == script.run_on_qemu(OPTIONS)


def initialise_pics(script: PortScript, icw4: int = 1) -> PortScript:
    for command, base, icw3 in ((MASTER, 0x08, 4), (SLAVE, 0x70, 2)):
        script.out(command, 0x11).out(command + 1, base, icw3, icw4, 0x00)
    return script


def pic_registers(script: PortScript) -> PortScript:
    for command in (MASTER, SLAVE):
        script.out(command, 0x0A).read(command).out(command, 0x0B).read(command).read(command + 1)
    return script


def test_interrupt_controllers() -> None:
    script = initialise_pics(PortScript())
    pic_registers(script)
    script.out(0x21, 0x5A).out(0xA1, 0xA5)
    pic_registers(script)
    script.out(0x4D0, 0xFF).out(0x4D1, 0xFF).read(0x4D0).read(0x4D1)
    compare(script)


class PicTraffic:
    """Random commands to both controllers while five devices ask, generated along our board.

    A line falls only when its request has been served, since QEMU keeps the request of a line that fell (see below).
    """

    def __init__(self, board: Board, seed: int) -> None:
        self._board = board
        self._random = random.Random(seed)
        self._up: set[int] = set()
        self.script = PortScript()

    def _do(self, step: PortScript) -> None:
        step.run_on_board(self._board)
        self.script += step

    def _raise(self, irq: int) -> None:
        if irq == 0:
            # QEMU's timer runs beside its CPU: wait for the request itself.
            self._do(PortScript().out(0x43, 0x30).out(0x40, 1, 0).out(MASTER, 0x0A).wait(MASTER, 1, 1))
        elif irq in (1, 12):
            if {1, 12} & self._up:
                return
            self._do(PortScript().out(0x64, 0xD2 if irq == 1 else 0xD3).out(0x60, 0x55))
        else:
            self._do(PortScript().out(0x3F9 if irq == 4 else 0x2F9, 0x02))
        self._up.add(irq)

    def _lower(self, irq: int) -> None:
        if irq == 0:
            self._do(PortScript().out(0x43, 0x30))
        elif irq in (1, 12):
            self._do(PortScript().read(0x60))
        else:
            self._do(PortScript().out(0x3F9 if irq == 4 else 0x2F9, 0x00))
        self._up.discard(irq)

    def _drive(self) -> None:
        irq = self._random.choice((0, 1, 3, 4, 12))
        chip = self._board.pic.slave if irq >= 8 else self._board.pic.master
        if irq not in self._up:
            self._raise(irq)
        elif not chip.latched >> (irq & 7) & 1:
            self._lower(irq)

    def generate(self, steps: int) -> None:
        rnd = self._random
        icw4 = rnd.choice((1, 1, 3))
        self._do(initialise_pics(PortScript(), icw4).out(0x64, 0x60).out(0x60, 0x03).out(0x3F9, 0).out(0x2F9, 0))
        for _ in range(steps):
            command = rnd.choice((MASTER, MASTER, SLAVE))
            level = rnd.randrange(8)
            kind = rnd.choices(
                ("line", "mask", "poll", "eoi", "rotate", "special", "look"), (30, 10, 10, 10, 5, 3, 32)
            )[0]
            if kind == "line":
                self._drive()
            elif kind == "mask":
                self._do(PortScript().out(command + 1, rnd.choice((0, 0, rnd.randrange(256) & rnd.randrange(256)))))
            elif kind == "poll":
                self._do(PortScript().out(command, 0x0C).read(command))
            elif kind == "eoi":
                self._do(PortScript().out(command, rnd.choice((0x20, 0x60 | level, 0xA0, 0xE0 | level))))
            elif kind == "rotate":
                self._do(PortScript().out(command, rnd.choice((0x80, 0x00, 0xC0 | level, 0x40))))
            elif kind == "special":
                self._do(PortScript().out(command, rnd.choice((0x48, 0x68))))
            else:
                self._do(pic_registers(PortScript()))


def keep_requests_of_fallen_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give our chips QEMU's rule: a latched request stays although its line fell (the data sheet drops it)."""

    def set_input(self: Chip, irq: int, level: bool) -> None:
        bit = 1 << irq
        if level and not self.levels & bit:
            self.latched |= bit
        self.levels = self.levels | bit if level else self.levels & ~bit
        self._update()

    monkeypatch.setattr(Chip, "set_input", set_input)
    monkeypatch.setattr(Chip, "requests", property(lambda self: self.latched | self.levels & self.level_triggered))


@pytest.mark.parametrize("seed", range(12))
def test_interrupt_controllers_in_random_traffic(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_requests_of_fallen_lines(monkeypatch)
    with a_board() as board:
        traffic = PicTraffic(board, seed)
        traffic.generate(200)
    compare(traffic.script)


def test_serial_port() -> None:
    script = PortScript().out(COM1 + 4, 0)
    for register in range(8):
        script.read(COM1 + register)
    script.out(COM1 + 3, 0x83).read(COM1, 2).out(COM1, 1).out(COM1 + 1, 0).read(COM1).read(COM1 + 1)
    script.out(COM1 + 3, 0x03).out(COM1 + 1, 0xFF).read(COM1 + 1).read(COM1 + 2, 2)
    script.out(COM1 + 1, 0x0D).out(COM1 + 2, 0xC1).read(COM1 + 2)
    script.out(COM1 + 4, 0x1B).read(COM1 + 4).read(COM1 + 6, 2)
    script.out(COM1, 0x41, 0x42).read(COM1 + 5)
    for _ in range(2):
        script.read(COM1).read(COM1 + 5).read(COM1 + 2)
    script.out(COM1 + 7, 0x5A).read(COM1 + 7).out(COM1 + 4, 0x0B).read(COM1 + 6).read(COM1 + 6)
    compare(script)


@pytest.mark.parametrize("fifo_control", [0x01, 0x41, 0x81, 0xC1, 0x00])
def test_serial_port_in_loopback(fifo_control: int) -> None:
    script = PortScript().out(COM1 + 3, 0x03).out(COM1 + 2, fifo_control).out(COM1 + 4, 0x1B).read(COM1 + 6, 2)
    script.out(COM1 + 1, 0x05)
    for byte in range(18 if fifo_control else 2):
        script.out(COM1, byte).read(COM1 + 5)
        # Past the trigger level both say so; below it, QEMU's time-out runs in its own time.
        if byte >= 14:
            script.read(COM1 + 2)
    script.read(COM1 + 5)
    for _ in range(16 if fifo_control else 1):
        script.read(COM1).read(COM1 + 5)
    compare(script)


def wait_for_byte(script: PortScript, count: int = 1, flags: int = 0x01) -> PortScript:
    for _ in range(count):
        script.wait(0x64, 0x21, flags).read(0x60)
    return script


def test_keyboard_controller() -> None:
    script = PortScript()
    for command in (0xAA, 0xAB, 0xA9, 0xD0, 0xC0):
        wait_for_byte(script.out(0x64, command))
    script.out(0x64, 0x60).out(0x60, 0x47).out(0x64, 0x20)
    wait_for_byte(script)
    for command in (0xD2, 0xD3):
        wait_for_byte(script.out(0x64, command).out(0x60, 0x1C), flags=0x01 if command == 0xD2 else 0x21)
    for command in (0xAD, 0xA7, 0xAE, 0xA8):
        wait_for_byte(script.out(0x64, command).out(0x64, 0x20))
    compare(script)


@pytest.mark.parametrize("config", [0x03, 0x43])
def test_keyboard(config: int) -> None:
    script = PortScript().out(0x64, 0x60).out(0x60, config)
    for byte, replies in (
        (0xFF, 2), (0xF2, 3), (0xEE, 1), (0xED, 1), (0x07, 1), (0xF0, 1), (0x00, 2), (0xF0, 1), (0x02, 1), (0xF3, 1),
        (0x20, 1), (0xF4, 1), (0xF5, 1), (0xF6, 1), (0xF4, 1),
    ):  # fmt: skip
        wait_for_byte(script.out(0x60, byte), replies)
    script.out(0x64, 0x20)
    compare(wait_for_byte(script))


def test_mouse() -> None:
    script = PortScript().out(0x64, 0x60).out(0x60, 0x00)
    for byte, replies in (
        (0xFF, 3), (0xF2, 2), (0xE9, 4), (0xE8, 1), (0x03, 1), (0xE9, 4), (0xF3, 1), (0x50, 1), (0xE9, 4), (0xE7, 1),
        (0xF4, 1), (0xE9, 4), (0xF5, 1), (0xE6, 1), (0xEB, 4), (0xF6, 1), (0xE9, 4), (0xEE, 1), (0x55, 1), (0xEC, 1),
    ):  # fmt: skip
        wait_for_byte(script.out(0x64, 0xD4).out(0x60, byte), replies, 0x21)
    compare(script)


@pytest.mark.parametrize("channel", [0, 1, 2])
@pytest.mark.parametrize("control", [0x30, 0x12, 0x14, 0x24, 0x36, 0x37, 0x38, 0x1A, 0x3C, 0x3E])
def test_timer_status(channel: int, control: int) -> None:
    """Access, mode and BCD bits of the status, and the order of latched bytes; not what runs."""
    script = PortScript().out(0x61, 0x00).out(0x43, channel << 6 | control).out(0x40 + channel, 0x00, 0x00)
    script.out(0x43, 0xE0 | 2 << channel)
    with a_board() as board:
        script.read(0x40 + channel)
        ours, theirs = script.run_on_board(board), script.run_on_qemu(OPTIONS)
    assert [value & 0x3F for value in ours] == [value & 0x3F for value in theirs] == [control]


def test_timer_channel_2_ends_its_count() -> None:
    script = PortScript().out(0x61, 1).out(0x43, 0xB0).out(0x42, 0, 1).wait(0x61, 0x20, 0x20)
    compare(script.out(0x43, 0xE8).read(0x42).out(0x61, 0x00))


def latched(script: PortScript, channel: int) -> PortScript:
    return script.out(0x43, channel << 6).read(0x40 + channel, 2)


@pytest.mark.parametrize("mode", [0, 2, 3, 4])
def test_timer_counts_as_many_ticks_in_as_many_instructions(mode: int) -> None:
    """Under `-icount shift=0` QEMU too has a nanosecond for each instruction.

    Between two latches both count alike up to one tick: QEMU places its ticks at other nanoseconds, since it loads a
    count at once and our counter with the next CLK pulse.
    """
    script = PortScript().out(0x61, 0).out(0x43, 0xB0 | mode << 1).out(0x42, 0xFE, 0xFF).out(0x61, 1)
    pauses = (1001, 5, 9_999, 100_001, 838, 1_000_001, 20_000_001)
    for insns in pauses:
        script = latched(script.spend(insns | 1), 2)
    with a_board() as board:
        ours = script.run_on_board(board)
    theirs = script.run_on_qemu(OPTIONS)
    for low in range(2, len(ours), 2):
        steps = [(run[low - 2] | run[low - 1] << 8) - (run[low] | run[low + 1] << 8) for run in (ours, theirs)]
        assert min((steps[0] - steps[1]) % 0xFFFE, (steps[1] - steps[0]) % 0xFFFE) <= (4 if mode == 3 else 1)


def test_clock_chip_interrupts_as_often_in_as_many_instructions() -> None:
    """The periodic flag at 8192 Hz, looked at two or three times in each period."""
    script = cmos(cmos(PortScript(), 0x0A, 0x23), 0x0B, 0x42)
    cmos(script, 0x0C)
    for _ in range(400):
        cmos(script.spend(48_001), 0x0C)
    with a_board() as board:
        ours = script.run_on_board(board)[1:]
    theirs = script.run_on_qemu(OPTIONS)[1:]
    assert set(ours) == set(theirs) == {0x00, 0xC0}
    assert ours.count(0xC0) == pytest.approx(400 * 48_007 / 122_070, abs=1)
    assert theirs.count(0xC0) == pytest.approx(ours.count(0xC0), abs=1)


def cmos(script: PortScript, index: int, *values: int) -> PortScript:
    script.out(0x70, index)
    return script.out(0x71, *values) if values else script.read(0x71)


def test_clock_chip() -> None:
    script = PortScript()
    for index in (*range(14), 0x32):
        cmos(script, index)
    for control in (0x82, 0x86, 0x80, 0x84):
        cmos(script, 0x0B, control)
        hour = 0x13 if control & 2 else 0x83
        century = 20 if control & 4 else 0x20
        for index, value in ((0, 0x21), (2, 5), (4, hour), (6, 4), (7, 9), (8, 8), (9, 7), (0x32, century)):
            cmos(script, index, value)
            cmos(script, index)
        cmos(script, 0x0B, control & ~0x80)
        for index in (0, 2, 4, 7, 8, 9, 0x0A, 0x0B):
            cmos(script, index)
    cmos(cmos(script, 0x0A, 0x7F), 0x0A)
    cmos(cmos(script, 0x0D, 0x00), 0x0D)
    cmos(cmos(script, 0x0F, 0x5A), 0x0F)
    script.read(0x70)
    compare(script)


def test_cmos_memory_sizes_and_boot_order() -> None:
    # QEMU runs with 8 MiB, our board with 2: the low byte of each size is 0 in both, the high ones are not compared.
    script = PortScript()
    for index in (0x15, 0x16, 0x17, 0x30, 0x34, 0x35, 0x5B, 0x5C, 0x5D, 0x5F):
        cmos(script, index)
    compare(script)


def test_vga_register_files() -> None:
    script = PortScript().out(0x3C2, 0x67).read(0x3CC).out(0x3D4, 0x11).out(0x3D5, 0x0E)
    for index in range(0x19):
        script.out(0x3D4, index).out(0x3D5, 0x0E if index == 0x11 else (0x35 + index) & 0x7F).read(0x3D4).read(0x3D5)
    for port, registers in ((0x3C4, 5), (0x3CE, 9)):
        for index in range(registers):
            script.out(port, index).out(port + 1, 0xFF).read(port + 1)
    script.wait(0x3DA, 0x00, 0x00)
    for index in range(0x15):
        script.out(0x3C0, index, 0xFF).read(0x3C0).read(0x3C1).wait(0x3DA, 0x00, 0x00)
    script.out(0x3C0, 0x20)
    script.out(0x3D4, 0x11).out(0x3D5, 0x8E).out(0x3D4, 7).out(0x3D5, 0).read(0x3D5).out(0x3D4, 0).out(0x3D5, 0).read(
        0x3D5
    )
    script.out(0x3C8, 5).out(0x3C9, 1, 2, 3).read(0x3C8).out(0x3C7, 5).read(0x3C9, 3).read(0x3C7)
    script.read(0x3B4).read(0x3B5).out(0x3C2, 0x66).read(0x3D4).out(0x3B4, 0x0E).read(0x3B4).out(0x3B5, 0x55).read(
        0x3B5
    )
    compare(script)


def test_dma_and_small_ports() -> None:
    script = PortScript().out(0x0C, 0).out(0x00, 0x34, 0x12).out(0x0C, 0).read(0x00, 2).read(0x08)
    script.out(0xD8, 0).out(0xC2, 0x78, 0x56).out(0xD8, 0).read(0xC2, 2).read(0xD0)
    script.out(0x87, 0x5A).read(0x87).read(0x81).out(0x8F, 0xA5).read(0x8F)
    script.read(0xE9).read(0xF4).read(0xCF9).out(0xCF9, 0x02).read(0xCF9).read(0x1234, 1, 4)
    compare(script)


def test_pci_configuration() -> None:
    script = PortScript()
    for device in (0, 1):
        for register in (0x00, 0x08, 0x10, 0x3C, 0x50, 0x60):
            script.out(0xCF8, 0x8000_0000 | device << 11 | register, size=4).read(0xCFC, size=4)
    script.out(0xCF8, 0x8000_0000, size=4).read(0xCFE, size=2).read(0xCFF)
    script.out(0xCF8, 0x8000_9000, size=4).read(0xCFC, size=4).read(0xCF8, size=4)
    script.out(0xCF8, 0, size=4).read(0xCFC, size=4)
    compare(script)


def test_fw_cfg() -> None:
    script = PortScript()
    for key, count in ((0x00, 5), (0x05, 3), (0x0F, 2), (0x1234, 3)):
        script.out(0x510, key, size=2).read(0x511, count)
    compare(script)


SECTORS = 4096


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"".join(n.to_bytes(2, "little") * 256 for n in range(SECTORS)))
    return path


class DiskScript(PortScript):
    """Commands to the first drive of the ATA channel."""

    def settle(self) -> DiskScript:
        self.wait(0x3F6, 0x80, 0x00)
        return self

    def command(self, command: int, lba: int = 0, count: int = 1, device: int = 0xE0) -> DiskScript:
        self.out(0x1F2, count & 0xFF).out(0x1F3, lba & 0xFF).out(0x1F4, lba >> 8 & 0xFF).out(0x1F5, lba >> 16)
        self.out(0x1F6, device).out(0x1F7, command)
        self.settle().read(0x3F6).read(0x1F1).read(0x1F7)
        return self

    def words(self, count: int = 256) -> DiskScript:
        self.read(0x1F0, count, size=2)
        self.settle()
        return self


def test_ata_disk(image: Path) -> None:
    script = DiskScript()
    script.command(0x20, 5, 2).words().words().read(0x1F7).read(0x1F2)
    script.command(0x30, 7).out(0x1F0, *range(256), size=2)
    script.settle().read(0x1F7)
    script.command(0x20, 7).read(0x1F0, 128, size=4).read(0x1F7)
    script.command(0xC6, count=16).command(0xC4, 9, 3).words(768).read(0x1F7)
    script.command(0x20, 1 << 8 | 3, device=0xA2).words()
    script.command(0x91, count=63, device=0xAF).command(0xE7).command(0x10).command(0x70).command(0x40, 3, 2)
    script.command(0xE5).read(0x1F2)
    script.command(0x90)
    for port in range(0x1F1, 0x1F8):
        script.read(port)
    script.out(0x3F6, 0x04, 0x00)
    script.settle()
    for port in (*range(0x1F1, 0x1F8), 0x3F6):
        script.read(port)
    script.out(0x1F6, 0xF0).out(0x1F2, 0x55).read(0x1F2).read(0x1F7).read(0x3F6)
    with a_board(BoardOptions(disks=(Disk.open(image, Media.HARD),))) as board:
        ours = script.run_on_board(board)
    drive = f"if=ide,index=0,format=raw,snapshot=on,file={image}"
    assert ours == script.run_on_qemu((*OPTIONS, "-drive", drive))


def only(*ports: int) -> Callable[[], PortScript]:
    def script() -> PortScript:
        result = PortScript()
        for port in ports:
            result.read(port)
        return result

    return script


def script_of(steps: Iterable[tuple[int, ...]]) -> Callable[[], PortScript]:
    """Each step is a port alone, to read, or a port and values to write."""

    def script() -> PortScript:
        result = PortScript()
        for port, *values in steps:
            if values:
                result.out(port, *values)
            else:
                result.read(port)
        return result

    return script


DIFFERENCES = {
    "MCR is 0 after master reset (PC16550D, reset states); QEMU has OUT2 up": (only(COM1 + 4), [0x00], [0x08]),
    "going into loopback and out of it changes the modem lines (PC16550D, MSR); QEMU sets no deltas": (
        script_of([(COM1 + 4, 0x14), (COM1 + 4, 0x00), (COM1 + 6,)]), [0xBF], [0xB0]
    ),
    "the system flag is in the configuration byte; QEMU's self test leaves it out": (
        script_of([(0x64, 0x60), (0x60, 0x00), (0x64, 0xAA), (0x60,), (0x64, 0x20), (0x60,)]),
        [0x55, 0x04], [0x55, 0x00],
    ),
    "null count until the count is loaded, and OUT high from the control word of mode 2 on; QEMU has neither": (
        script_of([(0x43, 0x34), (0x43, 0xE2), (0x40,)]), [0xF4], [0x34]
    ),
    "all channels of the DMA controllers are masked after reset; QEMU does not let masks be read": (
        only(0x0F), [0x0F], [0x00]
    ),
    "port 80h reads back; QEMU's reads ones": (script_of([(0x80, 0x5A), (0x80,)]), [0x5A], [0xFF]),
    "port 92h shows A20 as it is; QEMU's shows what was last written there": (only(0x92), [0x02], [0x00]),
    "fw_cfg has no DMA here": (lambda: PortScript().out(0x510, 1, size=2).read(0x511), [0x01], [0x03]),
    "an edge-triggered request goes with its line (8259A, 'Edge and level triggered modes'); QEMU keeps it": (
        lambda: initialise_pics(PortScript()).out(COM1 + 1, 0x02, 0x00).out(MASTER, 0x0A).read(MASTER), [0x00], [0x10]
    ),
    "special fully nested mode lets in the slave, not what is below it; QEMU lets in everything": (
        lambda: initialise_pics(PortScript(), 0x11).out(0x64, 0x60).out(0x60, 0x03).out(0x64, 0xD3).out(0x60, 0x55)
        .out(MASTER, 0x0C).read(MASTER).out(COM1 + 1, 0x02).out(MASTER, 0x0C).read(MASTER),
        [0x82, 0x00], [0x82, 0x84],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENCES)
def test_known_differences(name: str) -> None:
    """What QEMU does otherwise, and why ours stands. Fails when either side changes."""
    script, ours, theirs = DIFFERENCES[name]
    with a_board() as board:
        assert script().run_on_board(board) == ours
    assert script().run_on_qemu(OPTIONS) == theirs
