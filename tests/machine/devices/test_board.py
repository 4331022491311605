"""The whole board: who answers where, snapshots in the middle of everything, and any traffic at all."""

from __future__ import annotations

import ast
import datetime as dt
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import machine.devices
from machine.devices.board import Board, BoardOptions
from machine.disk import Disk, Media
from tests.machine.devices.rig import RAM_BYTES, a_board, advance, set_up_like_firmware

PORTS = [
    *range(0x10), 0x20, 0x21, *range(0x40, 0x44), 0x60, 0x61, 0x64, 0x70, 0x71, *range(0x80, 0x90), 0x92, 0xA0, 0xA1,
    *range(0xC0, 0xE0), 0xE9, 0xF4, *range(0x1F0, 0x1F8), *range(0x2F8, 0x300), *range(0x3B0, 0x3E0), 0x3F6,
    *range(0x3F8, 0x400), 0x4D0, 0x4D1, 0x510, 0x511, 0x604, 0xB004, *range(0xCF8, 0xD00), 0x1234, 0xFFFF,
]  # fmt: skip


class Output:
    """Options with a disk, and where everything that goes out goes."""

    def __init__(self) -> None:
        self.serial = (bytearray(), bytearray())
        self.debugcon = bytearray()
        disk = Disk.from_bytes(bytes(range(256)) * 4096, Media.HARD)
        self.disk = disk
        self.options = BoardOptions(
            serial=(self.serial[0].extend, self.serial[1].extend),
            debugcon=self.debugcon.extend,
            disks=(disk,),
            floppy_types=(4,),
            command_line=b"root=/dev/hda",
        )


# Devices whose whole state goes with RESET: no battery, no memory, nothing that somebody outside has typed.
WITHOUT_BATTERY = ("pic", "pit", "a20", "i8042", "mouse", "port92", "port61", "reset", "pci", "fw_cfg", "post", "power")

Step = tuple[str, int, int, int]
STEPS: st.SearchStrategy[Step] = st.one_of(
    st.tuples(st.just("out"), st.sampled_from(PORTS), st.sampled_from([1, 1, 1, 2, 4]), st.integers(0, 0xFFFF_FFFF)),
    st.tuples(st.just("in"), st.sampled_from(PORTS), st.sampled_from([1, 1, 1, 2, 4]), st.just(0)),
    st.tuples(st.just("pass"), st.integers(0, 3_000_000), st.just(0), st.just(0)),
    st.tuples(st.sampled_from(["serial", "key", "mouse"]), st.integers(0, 255), st.just(0), st.just(0)),
    st.tuples(st.just("acknowledge"), st.just(0), st.just(0), st.just(0)),
    st.tuples(st.just("text"), st.integers(0, 0x1FFFC), st.sampled_from([1, 2, 4]), st.integers(0, 0xFFFF_FFFF)),
    st.tuples(st.just("skip"), st.just(0), st.just(0), st.just(0)),
)


def perform(board: Board, step: Step) -> object:
    kind, first, size, value = step
    if kind == "out":
        board.ports.store(first, size, value & (1 << 8 * size) - 1)
    elif kind == "in":
        value = board.ports.load(first, size)
        assert 0 <= value < 1 << 8 * size
        return value
    elif kind == "pass":
        advance(board.clock, first)
    elif kind == "serial":
        (board.com1 if first & 1 else board.com2).receive(bytes((first, first)))
    elif kind == "key":
        board.keyboard.press(bytes((first,)))
    elif kind == "mouse":
        board.mouse.move(first - 128, first >> 3, first & 7)
    elif kind == "acknowledge" and board.lines.intr:
        peeked = board.lines.peek()
        assert board.lines.acknowledge() == peeked
        return peeked
    elif kind == "text":
        board.vga.store(first, size, value & (1 << 8 * size) - 1)
        return board.vga.load(first, size)
    elif kind == "skip" and board.clock.skip_to_next():
        board.clock.run_due()
    return None


def everything(board: Board) -> object:
    """All that can be seen of a board from outside."""
    return (
        board.snapshot(), board.clock.snapshot(), board.clock.next_deadline_ns, board.lines.snapshot(),
        board.lines.exit_requested, board.describe(), board.vga.screen(), board.vga.cursor,
    )  # fmt: skip


@settings(max_examples=60)
@given(st.lists(STEPS, max_size=60), st.lists(STEPS, max_size=30))
@example([("out", port, 1, 0xFF) for port in PORTS], [("out", port, 2, 0xFFFF) for port in PORTS])
def test_any_traffic_is_survived_and_repeats_and_continues_from_a_snapshot(first: list[Step], then: list[Step]) -> None:
    outputs = Output(), Output(), Output()
    with a_board(outputs[0].options) as one, a_board(outputs[1].options) as two, a_board(outputs[2].options) as three:
        assert [perform(one, step) for step in first] == [perform(two, step) for step in first]
        assert everything(one) == everything(two)

        three.clock.restore(one.clock.snapshot())
        three.lines.restore(one.lines.snapshot())
        three.restore(one.snapshot())
        outputs[2].disk.restore(outputs[0].disk.snapshot())
        three.lines.exit_requested = one.lines.exit_requested
        assert everything(three) == everything(one)
        sent = len(outputs[0].serial[0])
        assert [perform(three, step) for step in then] == [perform(one, step) for step in then]
        assert everything(three) == everything(one)
        assert outputs[0].serial[0][sent:] == outputs[2].serial[0]
        assert outputs[0].disk.snapshot() == outputs[2].disk.snapshot()

        one.clock.reset()
        one.power_on()
        with a_board(Output().options) as fresh:
            one.lines.reset()
            assert everything(one) == everything(fresh), "power-on is the state of a new board"
            two.reset()
            new = fresh.snapshot()
            assert {name: two.snapshot()[name] for name in WITHOUT_BATTERY} == {
                name: new[name] for name in WITHOUT_BATTERY
            }


def busy_board(board: Board) -> None:
    """Have something going on in every device that knows time."""
    store = board.ports.store
    set_up_like_firmware(board)
    for port, value in (
        (0x70, 0x0B),
        (0x71, 0x72),
        (0x3F9, 0x03),
        (0x3FA, 0xC1),
        (0x61, 0x01),
        (0x1F6, 0xE0),
        (0x1F7, 0x20),
    ):
        store(port, 1, value)
    board.com1.receive(b"some input that takes its time")
    board.keyboard.type_text("hello")


def test_a_snapshot_taken_in_the_middle_continues_to_the_nanosecond() -> None:
    def run(board: Board) -> list[tuple[int, int]]:
        seen = []
        for _ in range(300):
            if not board.clock.skip_to_next():
                break
            board.clock.run_due()
            while board.lines.intr:
                vector = board.lines.acknowledge()
                seen.append((board.clock.now_ns, vector))
                for port in (0x20, 0xA0):
                    board.ports.store(port, 1, 0x20)
                board.ports.load(0x60, 1)
                board.ports.load(0x3F8, 1)
                board.ports.store(0x70, 1, 0x0C)
                board.ports.load(0x71, 1)
        return seen

    with a_board(Output().options) as one, a_board(Output().options) as two:
        busy_board(one)
        run(one)
        state = one.snapshot(), one.clock.snapshot(), one.lines.snapshot()
        two.clock.restore(state[1])
        two.lines.restore(state[2])
        two.restore(state[0])
        expected = run(one)
        assert len({vector for _, vector in expected}) >= 2
        assert run(two) == expected
        two.clock.restore(state[1])
        two.lines.restore(state[2])
        two.restore(state[0])
        assert run(two) == expected, "a snapshot can be restored again, and shares nothing with the board"


def test_a_snapshot_is_plain_values() -> None:
    def plain(value: object) -> bool:
        if isinstance(value, dict):
            return all(isinstance(key, str) and plain(inner) for key, inner in value.items())
        if isinstance(value, list):
            return all(type(inner) is int for inner in value)
        return type(value) in (int, bool, bytes, str)

    with a_board(Output().options) as board:
        busy_board(board)
        assert plain(board.snapshot())


@pytest.mark.parametrize("damage", ["missing", "unknown", "kind", "field", "value"])
def test_a_damaged_snapshot_is_refused(damage: str) -> None:
    with a_board() as board:
        state = board.snapshot()
        pit = state["pit"]
        assert isinstance(pit, dict)
        if damage == "missing":
            del state["pit"]
        elif damage == "unknown":
            state["tape"] = {}
        elif damage == "kind":
            state["pit"] = 5
        elif damage == "field":
            del pit["irq_level"]
        else:
            pit["irq_level"] = "yes"
        with pytest.raises(ValueError, match=r"pit|Pit|tape"):
            board.restore(state)


def test_every_port_answers_its_device() -> None:
    with a_board(Output().options) as board:
        answers = {
            0x20: 0x00, 0x61: 0x00, 0x64: 0x18, 0x70: 0xFF, 0x80: 0x00, 0x81: 0x00, 0x92: 0x02, 0xE9: 0xE9, 0xF4: 0x00,
            0x1F7: 0x50, 0x3F6: 0x50, 0x2FD: 0x60, 0x3FD: 0x60, 0x3CC: 0x67, 0x4D0: 0x00, 0x511: ord("Q"), 0xCF9: 0x00,
            0x0F: 0x0F, 0xDE: 0x0F, 0x177: 0xFF, 0x3BC: 0xFF, 0x278: 0xFF, 0x2E8: 0xFF, 0x62: 0xFF, 0x65: 0xFF,
        }  # fmt: skip
        assert {port: board.ports.load(port, 1) for port in answers} == answers
        assert [board.ports.load(port, 2) for port in (0x604, 0xB004)] == [0, 0]
        for first in (0x2F8, 0x3F8):
            board.ports.store(first + 7, 1, 0x5A)
            assert board.ports.load(first + 7, 1) == 0x5A
        board.ports.store(0xCF8, 4, 0x8000_0000)
        assert [board.ports.load(0xCFC, size) for size in (1, 2, 4)] == [0x86, 0x8086, 0x1237_8086]
        board.ports.store(0x1F7, 1, 0xEC)
        advance(board.clock, 10_000)
        assert board.ports.load(0x1F0, 4) >> 16 == 2, "words 0 and 1 of IDENTIFY: kind and cylinders"
        assert board.ports.load(0x1F0, 2) == 0


def test_options_move_and_remove_ports() -> None:
    with a_board(BoardOptions(debug_exit_port=0x501)) as board:
        assert [board.ports.load(port, 1) for port in (0xF4, 0x501, 0x504, 0x1F7)] == [0xFF, 0, 0, 0xFF]
        assert board.ata is None
    with a_board(BoardOptions(debug_exit_port=None)) as board:
        assert board.ports.load(0xF4, 1) == 0xFF
    with pytest.raises(ValueError, match="port 0x60"), a_board(BoardOptions(debug_exit_port=0x60)):
        pass


def test_cmos_knows_the_memory_and_the_drives() -> None:
    with a_board(Output().options) as board:

        def cmos(index: int) -> int:
            board.ports.store(0x70, 1, index)
            return board.ports.load(0x71, 1)

        assert cmos(0x17) | cmos(0x18) << 8 == (RAM_BYTES >> 10) - 1024
        assert (cmos(0x10), cmos(0x14), cmos(0x12)) == (0x40, 0x05, 0xF0)
        assert (cmos(0x00), cmos(0x09), cmos(0x32)) == (0x00, 0x06, 0x20)


def test_start_date_option() -> None:
    with a_board(BoardOptions(start_date=dt.datetime(1999, 1, 2, 3, 4, 5, tzinfo=dt.UTC))) as board:
        assert board.describe("rtc").startswith("rtc: 1999-01-02 03:04:05")


def test_text_memory_is_mapped_and_a20_reaches_memory() -> None:
    with a_board() as board:
        board.vga.store(0x18000, 2, 0x0741)
        assert board.vga.screen()[0][0] == "A"
        board.ports.store(0x92, 1, 0x00)
        assert not board.a20.enabled


def served(board: Board, provoke: Callable[[], object]) -> list[int]:
    """The vectors that come of it, each with its EOI."""
    vectors = []
    provoke()
    while board.lines.intr:
        vectors.append(board.lines.acknowledge())
        for port in (0xA0, 0x20):
            board.ports.store(port, 1, 0x20)
    return vectors


def test_interrupts_of_every_device_reach_the_cpu() -> None:
    with a_board(Output().options) as board:

        def out(*writes: tuple[int, int]) -> None:
            for port, value in writes:
                board.ports.store(port, 1, value)

        def tick_the_clock() -> None:
            out((0x70, 0x0B), (0x71, 0x12))
            advance(board.clock, 1_000_000_000)

        def fill_the_aux_buffer() -> None:
            board.ports.load(0x60, 1)
            out((0x64, 0x60), (0x60, 0x47), (0x64, 0xD3), (0x60, 1))

        set_up_like_firmware(board)
        out((0x21, 0x00), (0xA1, 0x00))
        assert served(board, lambda: advance(board.clock, 60_000_000)) == [0x08]
        out((0x43, 0x30))
        assert served(board, lambda: board.keyboard.press(b"\x1c")) == [0x09]
        assert served(board, lambda: out((0x2F9, 0x02))) == [0x0B]
        assert served(board, lambda: out((0x3F9, 0x02))) == [0x0C]
        assert served(board, tick_the_clock) == [0x70]
        assert served(board, fill_the_aux_buffer) == [0x74]
        assert served(board, lambda: out((0x1F6, 0xE0), (0x1F7, 0xE7))) == [0x76]


def test_nmi_obeys_its_mask() -> None:
    with a_board() as board:
        board.ports.store(0x70, 1, 0x80)
        board.raise_nmi()
        assert not board.lines.nmi_pending
        board.ports.store(0x70, 1, 0x00)
        board.raise_nmi()
        assert board.lines.attention


def test_the_firmware_s_timer_ticks_18_times_a_second() -> None:
    with a_board() as board:
        set_up_like_firmware(board)
        ticks = 0
        while board.clock.skip_to_next() and board.clock.now_ns < 1_000_000_000:
            board.clock.run_due()
            if board.lines.intr:
                assert board.lines.acknowledge() == 0x08
                board.ports.store(0x20, 1, 0x20)
                ticks += 1
        assert ticks == 18


def test_describe_by_name() -> None:
    with a_board() as board:
        assert board.describe("pic", "a20").splitlines()[2] == "a20: enabled"
        assert len(board.describe().splitlines()) >= len(board.devices)
        with pytest.raises(KeyError):
            board.describe("tape")


ROOT = Path(machine.devices.__file__ or "").parents[1]


@pytest.mark.parametrize(
    "path",
    [*(ROOT / "devices").glob("*.py"), ROOT / "clock.py", ROOT / "ports.py", ROOT / "lines.py"],
    ids=lambda path: path.stem,
)
def test_no_device_knows_the_host_s_time_or_chance(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names.append(node.module or "")
        assert not {name.split(".")[0] for name in names} & {"time", "random", "secrets", "os", "uuid"}
        assert not (isinstance(node, ast.Attribute) and node.attr in ("now", "today", "utcnow"))
