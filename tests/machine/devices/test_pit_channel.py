"""The closed form of a counter against the data sheet's, pulse by pulse, and the read and write sequences."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from machine.devices.pit_channel import PitChannel
from tests.machine.devices.clocked_counter import ClockedCounter


def configured(mode: int, count: int, *, bcd: bool = False, gate: bool = True) -> PitChannel:
    """A channel that got control word and count at tick 0."""
    channel = PitChannel()
    channel.gate = gate
    channel.write_control(0x30 | mode << 1 | bcd, 0)
    channel.write(count & 0xFF, 0)
    channel.write(count >> 8, 0)
    return channel


def wave(channel: PitChannel, ticks: int) -> str:
    return "".join("_#"[channel.output(tick)] for tick in range(ticks))


# Data sheet, figures of modes 0, 2, 3, 4: OUT after CW and count at tick 0; tick 1 loads.
@pytest.mark.parametrize(
    ("mode", "count", "expected"),
    [
        (0, 4, "_____######"),
        (2, 3, "###_##_##_##_"),
        (2, 2, "##_#_#_#_"),
        (3, 4, "###__##__##__"),
        (3, 5, "####__###__###__"),
        (3, 2, "##_#_#_"),
        (3, 3, "###_##_##_"),
        (4, 3, "####_#######"),
        (1, 3, "############"),
        (5, 3, "############"),
    ],
)
def test_waves(mode: int, count: int, expected: str) -> None:
    channel = configured(mode, count)
    assert wave(channel, len(expected)) == expected
    changes = [tick for tick in range(1, len(expected)) if expected[tick] != expected[tick - 1]]
    for tick in range(changes[-1] if changes else 0):
        assert channel.next_change(tick) == min(change for change in changes if change > tick)


@pytest.mark.parametrize("mode", [2, 3])
def test_a_count_of_1_is_taken_as_2(mode: int) -> None:
    assert wave(configured(mode, 1), 20) == wave(configured(mode, 2), 20)


@pytest.mark.parametrize(("mode", "expected"), [(0, "__####"), (4, "##_###")])
def test_a_count_of_1_is_fine_elsewhere(mode: int, expected: str) -> None:
    assert wave(configured(mode, 1), 6) == expected


def test_a_strobe_ends_also_while_the_gate_is_low() -> None:
    channel = configured(4, 3)
    assert not channel.output(4)
    channel.set_gate(False, 4)
    assert (channel.next_change(4), channel.output(5), channel.next_change(5)) == (5, True, None)
    channel.set_gate(True, 9)
    assert "".join("_#"[channel.output(tick)] for tick in range(9, 14)) == "#####"
    assert channel.value(11) == 0xFFFE


@pytest.mark.parametrize(("mode", "expected"), [(1, "######___########"), (5, "#########_#######")])
def test_triggered_waves(mode: int, expected: str) -> None:
    channel = configured(mode, 3, gate=False)
    assert wave(channel, 6) == expected[:6]
    channel.set_gate(True, 5)
    assert "".join("_#"[channel.output(tick)] for tick in range(6, 17)) == expected[6:]


@pytest.mark.parametrize(
    ("mode", "count", "values"),
    [
        (0, 3, [3, 2, 1, 0, 0xFFFF, 0xFFFE]),
        (2, 3, [3, 2, 1, 3, 2, 1]),
        (3, 4, [4, 2, 4, 2, 4]),
        (3, 5, [4, 2, 0, 4, 2, 4, 2, 0]),
        (4, 2, [2, 1, 0, 0xFFFF]),
        (2, 0, [0x1_0000, 0xFFFF]),
    ],
)
def test_counting_sequences(mode: int, count: int, values: list[int]) -> None:
    channel = configured(mode, count)
    assert [channel.value(tick) for tick in range(1, 1 + len(values))] == values


def test_bcd_counts_in_decimal() -> None:
    channel = configured(0, 0x0101, bcd=True)
    channel.latch_count(3)
    assert (channel.read(3), channel.read(3)) == (0x99, 0x00)
    channel.latch_count(103)
    assert (channel.read(103), channel.read(103)) == (0x99, 0x99)
    channel = configured(0, 0x4321, bcd=True)
    assert (channel.read(1), channel.read(1)) == (0x21, 0x43)
    channel = configured(2, 0x0000, bcd=True)
    assert (channel.value(1), channel.read(1), channel.read(1)) == (10_000, 0x00, 0x00)


def test_latched_count_stays_until_it_is_read() -> None:
    channel = configured(2, 0x1234)
    channel.latch_count(1)
    channel.latch_count(50)
    assert channel.read(60) == 0x34
    assert channel.read(61) == 0x12
    assert channel.read(62) == (0x1234 - 61) & 0xFF


def test_status_is_read_before_the_count() -> None:
    channel = configured(2, 0x1234)
    channel.latch_count(1)
    channel.latch_status(1)
    assert [channel.read(9) for _ in range(3)] == [0xB4, 0x34, 0x12]


@pytest.mark.parametrize(("access", "expected"), [(1, [0x34, 0x34]), (2, [0x12, 0x12]), (3, [0x34, 0x12])])
def test_access_modes(access: int, expected: list[int]) -> None:
    channel = PitChannel()
    channel.write_control(0x30 | 4 << 1, 0)
    channel.set_gate(False, 0)
    channel.write(0x34, 0)
    channel.write(0x12, 0)
    channel.control = access << 4 | 4 << 1
    assert [channel.read(5), channel.read(5)] == expected


@pytest.mark.parametrize(("access", "register"), [(1, 0x0034), (2, 0x3400)])
def test_single_byte_writes_clear_the_other_byte(access: int, register: int) -> None:
    channel = PitChannel()
    channel.write_control(access << 4 | 2 << 1, 0)
    channel.write(0x34, 0)
    assert channel.value(1) == register


def test_null_count_until_the_element_is_loaded() -> None:
    channel = PitChannel()
    channel.write_control(0x34, 0)
    assert channel.status(0) == 0xF4
    channel.write(10, 0)
    channel.write(0, 0)
    assert [channel.status(tick) for tick in (0, 1)] == [0xF4, 0xB4]
    channel.write(20, 3)
    channel.write(0, 3)
    assert [channel.status(tick) & 0x40 for tick in (3, 10, 11)] == [0x40, 0x40, 0]
    assert channel.value(11) == 20


def test_null_count_comes_with_the_whole_count() -> None:
    channel = configured(0, 100)
    channel.write(5, 1)
    assert channel.status(1) & 0x40 == 0
    channel.write(0, 2)
    assert [channel.status(tick) & 0x40 for tick in (2, 3)] == [0x40, 0]


@pytest.mark.parametrize(
    ("count", "new", "written_at", "expected"),
    [
        (4, 5, 1, "###__###__###__"),
        (4, 5, 3, "###__###__###__"),
        (4, 7, 2, "###___####___####"),
        (5, 4, 4, "####__##__##"),
        (5, 4, 2, "####__##__##"),
        (3, 8, 3, "###_####____####"),
    ],
)
def test_mode_3_takes_a_new_count_after_half_a_period(count: int, new: int, written_at: int, expected: str) -> None:
    channel = configured(3, count)
    seen = ""
    for tick in range(len(expected)):
        seen += "_#"[channel.output(tick)]
        if tick == written_at:
            channel.write(new, tick)
            channel.write(0, tick)
    assert seen == expected


def test_mode_as_written_is_in_the_status() -> None:
    channel = configured(6, 100)
    assert (channel.mode, channel.status(1) & 0x3F) == (2, 0x3C)


ACTIONS = st.one_of(
    st.tuples(st.just("control"), st.sampled_from([m << 1 | b for m in range(8) for b in (0, 1)]), st.integers(1, 3)),
    st.tuples(st.just("count"), st.sampled_from([1, 2, 3, 4, 5, 8, 9, 0x10, 0x19, 0x99, 0x100, 0]), st.just(0)),
    st.tuples(st.just("byte"), st.sampled_from([0, 1, 2, 3, 6, 7, 9]), st.just(0)),
    st.tuples(st.just("gate"), st.integers(0, 1), st.just(0)),
    st.tuples(st.just("pulse"), st.integers(1, 12), st.just(0)),
)


@given(st.lists(ACTIONS, max_size=40), st.booleans())
def test_every_history_gives_what_the_data_sheet_gives(actions: list[tuple[str, int, int]], gate: bool) -> None:
    channel, plain = PitChannel(), ClockedCounter(gate)
    channel.gate = gate
    tick = 0
    promised: int | None = None
    for action, value, access in actions:
        pulses = 0
        if action == "control":
            mode = value >> 1
            channel.write_control(access << 4 | value, tick)
            plain.control(mode - 4 if mode > 5 else mode, access, bool(value & 1))
        elif action == "count":
            for byte in (value & 0xFF, value >> 8) if plain.access == 3 else (value & 0xFF,):
                channel.write(byte, tick)
                plain.write(byte)
        elif action == "byte":
            channel.write(value, tick)
            plain.write(value)
        elif action == "gate":
            channel.set_gate(bool(value), tick)
            plain.set_gate(bool(value))
        else:
            pulses = value
        promised = channel.next_change(tick)
        for _ in range(pulses):
            before = plain.out
            plain.pulse()
            tick += 1
            followed = channel.follow(tick)
            assert followed == (plain.out, channel.next_change(tick))
            assert channel.output(tick) == plain.out
            if plain.out != before:
                assert promised == tick
            if promised is None or promised <= tick:
                promised = channel.next_change(tick)
        assert channel.output(tick) == plain.out
        assert bool(channel.status(tick) & 0x40) == plain.null
        assert channel.value(tick) % plain.modulus == plain.element % plain.modulus


@given(st.lists(ACTIONS, max_size=20), st.integers(0, 100))
def test_a_restored_channel_goes_on_alike(actions: list[tuple[str, int, int]], later: int) -> None:
    channel = PitChannel()
    tick = 0
    for action, value, access in actions:
        if action == "control":
            channel.write_control(access << 4 | value, tick)
        elif action == "gate":
            channel.set_gate(bool(value), tick)
        elif action == "pulse":
            tick += value
        else:
            channel.write(value & 0xFF, tick)
    other = PitChannel()
    other.restore(channel.snapshot())
    assert other.snapshot() == channel.snapshot()
    tick += later
    assert [other.status(tick), other.value(tick), other.read(tick), other.read(tick)] == [
        channel.status(tick),
        channel.value(tick),
        channel.read(tick),
        channel.read(tick),
    ]
