"""`trapgate diff`: its statuses, and what it prints."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from gdbstub import cli
from gdbstub.cli_options import USAGE_STATUS
from guests import images
from tests.gdbstub.test_monitor_lockstep import SOURCE, plant_wrong_sum
from tests.oracles.assembler import assemble

CODE = 0x10_0000


@pytest.fixture
def image(tmp_path: Path) -> str:
    """A flat binary, as the command line takes it."""
    path = tmp_path / "flat.bin"
    path.write_bytes(assemble(SOURCE, origin=CODE))
    return f"{path}@{CODE:#x}"


def diff(*words: str | Path) -> int:
    return cli.main(["diff", *map(str, words)])


def test_nothing_differs(image: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert diff("interp", "bt", image, "-m", "4M") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["both stop at icount 20,002: halted", "no difference in 20,002 instructions"]
    assert lines[2].startswith("the host's time: interp ")


def test_a_guest_that_ends_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert diff("trap", "trap-nested", images.path("tiny-exit"), "--append", "exit 7", "--verify-tc") == 0
    assert ": exit (debug exit, status 15)\n" in capsys.readouterr().out


def test_so_many_instructions(image: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert diff("interp", "bt", image, "--max-insns", "2k") == 0
    assert capsys.readouterr().out.startswith("no difference in 2,000 instructions\n")


def test_something_differs(image: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    plant_wrong_sum(monkeypatch)
    assert diff("bt", "interp", image) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["different after the instruction at icount 2 (bt / interp):", "  ecx: 0x4 / 0x3"]
    assert lines[-1].endswith("add ecx, 3")


def test_as_json(image: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert diff("interp", "trap-nested", image, "--json", "--max-insns", "100", "--each") == 0
    equal = json.loads(capsys.readouterr().out)
    assert equal.pop("seconds") != [0, 0]
    assert equal == {
        "engines": ["interp", "trap nested"], "begin_icount": 0, "icount": 100, "stop": None, "difference": None,
    }  # fmt: skip
    plant_wrong_sum(monkeypatch)
    assert diff("interp", "trap", image, "--json") == 1
    found = json.loads(capsys.readouterr().out)["difference"]
    assert (found["agreed_icount"], found["icount"], found["exact"]) == (2, 3, True)
    assert found["differences"] == [
        {"kind": "register", "name": "ecx", "first": "0x3", "second": "0x4"},
        {"kind": "flag", "name": "PF", "first": "1", "second": "0"},
    ]
    assert found["trace"][-1].endswith("add ecx, 3")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["interp", "hvm"], "there is no engine `hvm`; there is: bt, trap,"),
        (["trap-kvm", "bt"], "`trap kvm` has no icount: KVM does not count"),
        (["bt", "interp", "/nowhere.elf"], "/nowhere.elf: No such file or directory"),
        (["bt", "interp", "-m", "4000G"], "RAM of 4294967296000 bytes"),
        (["bt", "interp", "--rtc", "never"], "--rtc never: not a date"),
    ],
)
def test_refusals(words: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert diff(*words) == USAGE_STATUS
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("trapgate: ")
    assert line in captured.err
    assert captured.err.count("\n") == 1


def test_a_host_that_has_no_more(
    image: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_name: str) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "memfd_create", refuse)
    assert diff("interp", "bt", image) == USAGE_STATUS
    assert capsys.readouterr().err == f"trapgate: [Errno {errno.EMFILE}] Too many open files\n"


@pytest.mark.parametrize("words", [["bt"], ["bt", "interp", "--gdb", "0"], ["bt", "interp", "a", "b"]])
def test_what_is_no_option_of_it(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        diff(*words)
    assert ended.value.code == USAGE_STATUS
    assert capsys.readouterr().err.startswith("trapgate diff: ")


def test_ctrl_c(image: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_self: object, _until: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vmm.lockstep.Side.advancing", interrupt)
    assert diff("interp", "bt", image) == 130
