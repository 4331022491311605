"""Frames against the manual's rules, and round trips of everything that travels."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gdbstub.framing import (
    Ack,
    BadChecksum,
    Frame,
    FrameError,
    FrameReader,
    Interrupt,
    Packet,
    TooLong,
    checksum,
    compress_runs,
    escape,
    expand_runs,
    frame,
    unescape,
)
from tests.gdbstub import wire

# Bytes that framing treats in a special way, and runs of them, come up often.
AWKWARD = st.lists(
    st.one_of(
        st.binary(max_size=8),
        st.builds(lambda byte, n: bytes((byte,)) * n, st.sampled_from(b"}#$*0\0+-~"), st.integers(0, 300)),
    ),
).map(b"".join)


def read_all(data: bytes, limit_bytes: int = 1000) -> list[Frame]:
    return FrameReader(limit_bytes).feed(data)


def test_the_manuals_examples() -> None:
    assert frame(b"OK") == b"$OK#9a"
    assert expand_runs(b"0* ", 100) == b"0000"
    assert compress_runs(b"0000") == b"0* "
    assert escape(b"}") == b"}]"


@pytest.mark.parametrize("length", range(300))
def test_runs_of_every_length_come_back_and_never_grow(length: int) -> None:
    text = b"ab" + b"0" * length + b"c"
    encoded = compress_runs(text)
    assert wire.expand(encoded) == text
    assert expand_runs(encoded, 1000) == text
    assert len(encoded) <= len(text)
    assert len(encoded) < len(text) or length < 4
    # Counts that a receiver could take for framing.
    counts = [encoded[index + 1] for index in range(len(encoded) - 1) if encoded[index] == ord("*")]
    assert not set(counts) & set(b"#$+-")
    assert all(32 <= count <= 126 for count in counts)


@given(AWKWARD)
def test_round_trip(data: bytes) -> None:
    encoded = compress_runs(escape(data))
    assert not set(b"#$") & set(encoded)
    assert unescape(expand_runs(encoded, 1 << 20)) == data
    assert wire.unescape(wire.expand(encoded)) == data
    assert read_all(frame(encoded), 1 << 20) == [Packet(encoded)]


def test_large_payloads_keep_long_runs_only() -> None:
    source = random.Random(1)
    data = b"".join(bytes((source.randrange(48, 58),)) * source.choice((1, 5, 40)) for _ in range(2000))
    encoded = compress_runs(data)
    assert wire.expand(encoded) == data
    assert len(encoded) < len(data) / 2


@given(st.binary(max_size=2000))
def test_checksum_is_the_sum(data: bytes) -> None:
    assert checksum(data) == sum(data) % 256


@given(
    st.lists(
        st.sampled_from(
            [b"$OK#9a", b"$#00", b"+", b"-", b"\x03", b"noise", b"$x#00", b"$}\x03#", b"a1", b"$$", b"$m0,4#fd"]
        )
    ),
    st.data(),
)
def test_chunks_make_no_difference(pieces: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(pieces)
    reader = FrameReader(100)
    frames = []
    position = 0
    while position < len(stream):
        step = data.draw(st.integers(1, len(stream) - position))
        frames += reader.feed(stream[position : position + step])
        position += step
    whole = FrameReader(100)
    assert frames == whole.feed(stream)
    assert (reader.noise_bytes, reader.in_packet) == (whole.noise_bytes, whole.in_packet)


def test_between_packets() -> None:
    reader = FrameReader(100)
    assert reader.feed(b"+-\x03abc$OK#9a\n$OK#9A") == [
        Ack(good=True),
        Ack(good=False),
        Interrupt(),
        Packet(b"OK"),
        Packet(b"OK"),
    ]
    assert reader.noise_bytes == 4


def test_ctrl_c_in_a_packet_is_data() -> None:
    payload = b"X0,1:\x03"
    assert read_all(wire.pack(payload)) == [Packet(payload)]


@pytest.mark.parametrize("stream", [b"$OK#00", b"$OK#zz", b"$OK# 9", b"$OK#+9", b"$OK#9\n"])
def test_bad_checksum(stream: bytes) -> None:
    assert read_all(stream) == [BadChecksum(b"OK")]


@pytest.mark.parametrize("digits", [b" 9", b"+9", b"9\n", b"9 "])
def test_checksum_is_two_digits(digits: bytes) -> None:
    assert read_all(b"$\x09#" + digits) == [BadChecksum(b"\x09")]
    assert read_all(b"$\x09#09") == [Packet(b"\x09")]


def test_new_packet_in_the_middle_of_one() -> None:
    assert read_all(b"$OKOK$$OK#9a") == [Packet(b"OK")]


@pytest.mark.parametrize("chunk_bytes", [1, 7, 64, 1000])
def test_overlong_packet_is_dropped_and_the_next_one_read(chunk_bytes: int) -> None:
    reader = FrameReader(100)
    stream = wire.pack(b"x" * 500) + wire.pack(b"x" * 101) + wire.pack(b"y" * 100) + wire.pack(b"OK")
    frames = []
    for start in range(0, len(stream), chunk_bytes):
        frames += reader.feed(stream[start : start + chunk_bytes])
        assert len(reader._buffer) <= 100 + chunk_bytes + 3
    assert frames == [TooLong(500), TooLong(101), Packet(b"y" * 100), Packet(b"OK")]


@pytest.mark.parametrize("chunk_bytes", [1, 7, 64, 1000])
def test_overlong_packet_that_is_cut_off_by_a_good_one(chunk_bytes: int) -> None:
    reader = FrameReader(100)
    stream = b"$" + b"x" * 300 + b"$OK#9a"
    frames = []
    for start in range(0, len(stream), chunk_bytes):
        frames += reader.feed(stream[start : start + chunk_bytes])
    assert frames == [Packet(b"OK")]
    assert reader.noise_bytes == 300


@pytest.mark.parametrize("payload", [b"*", b"a*", b"* ", b"a*\x1f", b"a*\x7f", b"ab*"])
def test_broken_runs(payload: bytes) -> None:
    with pytest.raises(FrameError):
        expand_runs(payload, 1000)


def test_runs_cannot_expand_without_bound() -> None:
    with pytest.raises(FrameError, match="too long"):
        expand_runs(b"a*~*~*~", 200)
    assert len(expand_runs(b"a*~*~", 200)) == 195


@pytest.mark.parametrize("payload", [b"}", b"a}", b"}}}"])
def test_broken_escapes(payload: bytes) -> None:
    with pytest.raises(FrameError):
        unescape(payload)


@given(st.binary(max_size=400))
def test_random_bytes_do_no_harm(data: bytes) -> None:
    reader = FrameReader(50)
    reader.feed(data)
    # Whatever state they left, at most a lost packet stands between it and the next good ones.
    assert Packet(b"OK") in reader.feed(b"$OK#9a$OK#9a")
    assert len(reader._buffer) <= 53
