"""The command line's files of inputs: written at once, read again, refused in one line."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from gdbstub import cli_inputs, cli_options
from gdbstub.cli_engine import UsageError
from gdbstub.cli_run import build_target
from gdbstub.cli_serial import Lines
from machine.inputs import Input, InputError, InputKind, header
from tests import engine

ENTRY = Input(7, InputKind.SERIAL, b"hello", 1)


def test_what_was_recorded_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "inputs"
    recorder = cli_inputs.Recorder(str(path))
    recorder(None)
    recorder(ENTRY)
    assert cli_inputs.read(str(path)) == (ENTRY,)
    recorder.close()


def test_a_restart_begins_the_file_anew(tmp_path: Path) -> None:
    path = tmp_path / "inputs"
    recorder = cli_inputs.Recorder(str(path))
    recorder(None)
    recorder(ENTRY)
    recorder(None)
    recorder.close()
    assert path.read_text() == header() + "\n"


@pytest.mark.parametrize("name", ["missing/inputs", "."])
def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path, name: str) -> None:
    path = str(tmp_path / name)
    with pytest.raises(InputError, match=f"--record {path}"):
        cli_inputs.Recorder(path)
    with pytest.raises(InputError, match=f"--replay {path}"):
        cli_inputs.read(path)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"hello\n"])
def test_a_file_of_something_else_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "inputs"
    path.write_bytes(content)
    with pytest.raises(InputError, match="--replay"):
        cli_inputs.read(str(path))


@pytest.mark.parametrize("replayed", ["inputs", "missing"])
def test_a_file_to_replay_is_read_before_another_is_begun(tmp_path: Path, replayed: str) -> None:
    """They may be the same one; and where none is read, nothing is lost."""
    path = tmp_path / "inputs"
    path.write_text(f"{header()}\n{ENTRY.line()}\n")
    files = ["--record", str(path), "--replay", str(tmp_path / replayed)]
    options = cli_options.parse(["run", "--serial", "none", *engine.words(), *files])
    with ExitStack() as stack:
        lines = stack.enter_context(Lines(pytest.fail))
        if replayed == "missing":
            with pytest.raises(UsageError, match=r"--replay .*missing"):
                build_target(options, lines, stack)
            assert ENTRY.line() in path.read_text()
        else:
            assert build_target(options, lines, stack).machine.options.replay == (ENTRY,)
            assert path.read_text() == header() + "\n"
