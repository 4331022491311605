"""Conversations as literal text, each carried on in every chunking of the client's bytes.

A line is `> PACKET` (client to server), `>! BYTES` (as they are, without framing), `>> PACKET` (the guest does not get
to run after it), `< PACKET` (the server's, runs expanded), `<~ REGEX`, `<! BYTES` (acknowledgements), or a comment.
`\\xNN` is a byte. A transcript whose first line is `ack` keeps acknowledgements on.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.gdbstub.wire import Talk, pack, unpack

TRANSCRIPTS = sorted(Path(__file__).with_name("transcripts").glob("*.txt"))


def decode(text: str) -> bytes:
    return text.encode("latin-1").decode("unicode_escape").encode("latin-1")


def parse(path: Path) -> tuple[bool, list[tuple[str, str]]]:
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
    acknowledging = lines[0] == "ack"
    steps = []
    for line in lines[acknowledging:]:
        mark, _, rest = line.partition(" ")
        assert mark in (">", ">!", ">>", "<", "<~", "<!"), line
        steps.append((mark, rest))
    return acknowledging, steps


def carry_on(path: Path, chunks: Callable[[bytes], Iterator[bytes]]) -> None:
    acknowledging, steps = parse(path)
    talk = Talk(ack=acknowledging)
    packets: list[bytes] = []
    acks = b""
    for mark, text in steps:
        where = f"{path.name}: {mark} {text}"
        if mark.startswith(">"):
            assert not packets, f"unexpected {packets} before {where}"
            data = decode(text)
            received = unpack(
                talk.send_raw(data if mark == ">!" else pack(data), run=mark != ">>", chunks=chunks),
            )
            packets, acks = received.packets, received.acks
        elif mark == "<!":
            assert acks == decode(text), where
        else:
            assert packets, f"no reply: {where}"
            packet = packets.pop(0)
            if mark == "<":
                assert packet == decode(text), where
            else:
                assert re.fullmatch(text.encode(), packet, re.DOTALL), f"{packet!r}: {where}"
    assert not packets


def whole(data: bytes) -> Iterator[bytes]:
    yield data


def bytewise(data: bytes) -> Iterator[bytes]:
    return (data[index : index + 1] for index in range(len(data)))


def test_there_are_transcripts() -> None:
    assert len(TRANSCRIPTS) >= 10


@pytest.mark.parametrize("path", TRANSCRIPTS, ids=lambda path: path.stem)
@pytest.mark.parametrize("chunks", [whole, bytewise])
def test_transcript(path: Path, chunks: Callable[[bytes], Iterator[bytes]]) -> None:
    carry_on(path, chunks)


@pytest.mark.parametrize("path", TRANSCRIPTS, ids=lambda path: path.stem)
def test_transcript_split_at_each_byte(path: Path) -> None:
    longest = max(len(pack(decode(text))) for mark, text in parse(path)[1] if mark.startswith(">"))

    def split_at(at: int) -> Callable[[bytes], Iterator[bytes]]:
        return lambda data: iter([piece for piece in (data[:at], data[at:]) if piece])

    for at in range(1, longest):
        carry_on(path, split_at(at))


@pytest.mark.parametrize("path", TRANSCRIPTS, ids=lambda path: path.stem)
def test_transcript_sent_all_at_once(path: Path) -> None:
    """A client that does not wait for replies gets the same ones, as long as the guest does not run."""
    acknowledging, steps = parse(path)
    quiet = []
    for mark, text in steps:
        if mark in (">!", ">>") or (re.match(r"(vCont;|[cCsS]\b|D|k|v[RAK]|R|!)", text) and mark == ">"):
            break
        quiet.append((mark, text))
    talk = Talk(ack=acknowledging)
    data = b"".join(pack(decode(text)) for mark, text in quiet if mark == ">")
    packets = unpack(talk.send_raw(data)).packets
    expected = [(mark, text) for mark, text in quiet if mark in ("<", "<~")]
    assert len(packets) == len(expected)
    for packet, (mark, text) in zip(packets, expected, strict=True):
        assert packet == decode(text) if mark == "<" else re.fullmatch(text.encode(), packet, re.DOTALL)
