from __future__ import annotations

import pytest

from gdbstub import cli_options
from gdbstub.cli_options import DEFAULT_DEBUG_EXIT, USAGE_STATUS, Address, Listening, Sink


def parse(*words: str) -> object:
    return cli_options.parse(["run", *words])


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ([], "image", None),
        (["k.elf"], "image", "k.elf"),
        (["--kernel", "k.elf"], "kernel", "k.elf"),
        (["-kernel", "k.elf"], "kernel", "k.elf"),
        (["-initrd", "a,b"], "initrd", "a,b"),
        (["--append", "x=1 y"], "append", "x=1 y"),
        (["-append=-dash"], "append", "-dash"),
        ([], "memory", 64 << 20),
        (["-m", "32"], "memory", 32 << 20),
        (["-m", "1G"], "memory", 1 << 30),
        (["--memory", "2048k"], "memory", 2 << 20),
        (["-m128M"], "memory", 128 << 20),
        ([], "gdb", None),
        (["-s"], "gdb_default", True),
        (["-S"], "wait", True),
        (["--gdb", "0"], "gdb", Listening(Address("127.0.0.1", 0))),
        (["--gdb", "none"], "gdb", Listening(None)),
        (["--gdb", "0.0.0.0:99"], "gdb", Listening(Address("0.0.0.0", 99))),
        (["--gdb", "[::1]:99"], "gdb", Listening(Address("::1", 99))),
        (["-gdb", "tcp::1235"], "gdb", Listening(Address("127.0.0.1", 1235))),
        (["--serial", "stdio", "--serial", "none"], "serial", [Sink("stdio"), Sink("none")]),
        (["-serial", "file:x.log"], "serial", [Sink("file", "x.log")]),
        (["--serial", "tcp:4000"], "serial", [Sink("tcp", address=Address("127.0.0.1", 4000))]),
        (["-serial", "tcp:localhost:4000,server,nowait"], "serial", [Sink("tcp", address=Address("localhost", 4000))]),
        (["--debugcon", "out.txt"], "debugcon", Sink("file", "out.txt")),
        ([], "debug_exit", DEFAULT_DEBUG_EXIT),
        (["--debug-exit", "0x501"], "debug_exit", 0x501),
        (["--debug-exit", "none"], "debug_exit", None),
        (["--vmm", "interp"], "vmm", "interp"),
        (["--max-insns", "2M"], "max_insns", 2_000_000),
        (["--max-insns", "1_000"], "max_insns", 1000),
        (["--json-stats", "s.json"], "json_stats", "s.json"),
        (["--paging", "nested"], "paging", "nested"),
    ],
)
def test_words_and_values(words: list[str], name: str, value: object) -> None:
    assert getattr(parse(*words), name) == value


@pytest.mark.parametrize(
    "words",
    [
        ["-m", "64X"], ["-m", ""], ["-m", "-1M"], ["-m", "1.5G"], ["--gdb", "zork"], ["--gdb", "h:65536"],
        ["--gdb", ""], ["--serial", ""], ["--serial", "tcp:x"], ["--serial", "file:"], ["--debug-exit", "0x10000"],
        ["--debug-exit", "x"],
        ["--vmm", "zork"], ["--max-insns", "0"], ["--max-insns", "-5"], ["--max-insns", "K"],
        ["--trap-backend", "zork"], ["--paging", "zork"], ["--frobnicate"], ["--ker", "x"], ["a", "b"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_wrong_words_are_refused_in_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse(*words)
    assert end.value.code == USAGE_STATUS
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("trapgate")
    assert captured.out == ""


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["run", "--memroy", "64M"], "trapgate run: there is no option --memroy; there is --memory"),
        (["gdb", "--serail=none"], "trapgate gdb: there is no option --serail; there is --serial"),
        (["run", "-x"], "trapgate run: there is no option -x"),
        (["diff", "a", "b", "--max-insn", "5"], "trapgate diff: there is no option --max-insn; there is --max-insns"),
        (["diff", "a", "b", "--eahc"], "trapgate diff: there is no option --eahc; there is --each"),
        (["diff", "a", "b", "--memroy=1"], "trapgate diff: there is no option --memroy; there is --memory"),
        (["doctor", "--memroy"], "trapgate doctor: there is no option --memroy"),
        (["run", "a", "b"], "trapgate run: 'b' is one word too many"),
        (["--frob"], "trapgate: there is no option --frob"),
    ],
)
def test_what_is_mistyped_is_named_with_what_is_like_it(
    words: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli_options.parse(words)
    command = line.partition(":")[0]
    assert capsys.readouterr().err == f"{line} (see {command} --help)\n"
