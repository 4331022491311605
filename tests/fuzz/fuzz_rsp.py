"""Fuzz the packet parser and all handlers: `python -m tests.fuzz.fuzz_rsp [libFuzzer options] [CORPUS]`.

The input is the client's bytes; every 0xFF in it cuts them into chunks, so that the fuzzer finds chunkings too. A
finding is an exception, output that is no packets, or a session that no longer answers; it becomes a test in
tests/gdbstub/test_findings.py.
"""

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports():
    from gdbstub import agent, agent_printf, fields, framing, register_layout, session  # noqa: F401 - instrumented
    from gdbstub.packets import table  # noqa: F401
    from tests.gdbstub.toy import ToyTarget
    from tests.gdbstub.wire import Talk, pack, unpack

RAM_BYTES = 0x4000


def converse(data: bytes) -> None:
    """Send `data` in its chunks, with short stints between them, and check that the session is still alive."""
    talk = Talk(ToyTarget(RAM_BYTES), ack=True)
    for chunk in data.split(b"\xff"):
        unpack(talk.send_raw(chunk, run=False))
        if talk.debuggee.running:
            talk.debuggee.stint()
    # End a packet that may be open, stop what may be running; then a guest must be there, or can be started.
    talk.send_raw(b"#00\x03$#00+", run=False)
    if talk.debuggee.running:
        talk.debuggee.interrupt()
        talk.session.take_output()
    replies = unpack(talk.send_raw(pack(b"vMustReplyEmpty") + pack(b"vRun;"), run=False)).packets
    if replies[-2] != b"" or not replies[-1].startswith(b"T05"):
        raise AssertionError(f"the session is dead: {replies}")


def checksummed(data: bytes) -> bytes:
    """Frame what stands between line feeds, as random checksums are hardly ever right."""
    return b"".join(pack(line.translate(None, b"#$")) for line in data.split(b"\n"))


def test_one_input(data: bytes) -> None:
    """Take one input: the first byte chooses whether lines are framed or bytes go out as they are."""
    converse(checksummed(data[1:]) if data[:1] > b"\x40" else data[1:])


def write_seeds(directory: Path) -> None:
    """Write the requests of all transcripts, one packet a line, as seeds."""
    directory.mkdir(parents=True, exist_ok=True)
    transcripts = Path(__file__).parents[1] / "gdbstub" / "transcripts"
    for path in sorted(transcripts.glob("*.txt")):
        requests = [line[2:] for line in path.read_text().splitlines() if line.startswith("> ")]
        for number, request in enumerate(requests):
            seed = b"A" + request.encode("latin-1").decode("unicode_escape").encode("latin-1")
            (directory / f"{path.stem}-{number}").write_bytes(seed)


if __name__ == "__main__":
    folders = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    if folders:
        write_seeds(Path(folders[0]))
    atheris.Setup(sys.argv, test_one_input)
    atheris.Fuzz()
