"""`monitor lockstep` in a session of gdb: the guest that is debugged stays where it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from guests import images
from tests.system.terminal import started
from tests.system.tools import asked, gdbs, run_gdb
from tests.system.trapgate import running

DEMO = images.path("demo")


@pytest.mark.parametrize("gdb", gdbs(), ids=["stock", "recent"])
def test_in_mid_session(gdb: Path) -> None:
    with running(DEMO, "--append", "quiet", "--serial", "none") as trapgate:
        done = run_gdb(
            [
                trapgate.connect, "break syscall_dispatch", "continue", *asked("$icount"),
                "monitor lockstep bt trap nested 20000",
                "monitor lockstep interp trap-kvm", "monitor lockstep bt interp 9 each",
                *asked("$icount + 0"), "stepi", *asked("$icount - 0"), "continue", "kill",
            ],
            gdb=gdb, program=DEMO,
        )  # fmt: skip
    icount = int(done.value_of("$icount"))
    assert f"bt and trap nested from icount {icount:,}, 20,000 instructions, on copies\n" in done.output
    assert "no difference in 20,000 instructions\n" in done.output
    assert "no difference in 9 instructions\n" in done.output
    assert "`trap kvm` has no icount: KVM does not count the guest's instructions" in done.output
    assert int(done.value_of("$icount + 0")) == icount
    assert int(done.value_of("$icount - 0")) == icount + 1
    assert done.output.count("Breakpoint 1, syscall_dispatch") == 2


def test_ctrl_c_ends_it_and_the_session_goes_on() -> None:
    """gdb tells nobody that its user has broken off a `monitor` command: it just sends the next packet."""
    with started("trapgate gdb --serial none --append quiet") as terminal:
        terminal.read()
        terminal.write("monitor lockstep interp trap 500000000\n")
        terminal.read_until("\n  ")  # an icount as progress, after some seconds
        terminal.write("\x03")
        assert terminal.read()[-1].endswith("Quit")
        assert terminal.type_line("stepi")[-1].startswith("23")
        assert terminal.type_line("info registers icount")[-1].split()[1:] == ["0x1", "1"]
        assert "no difference in 1,000 instructions" in terminal.type_line("monitor lockstep interp bt 1000")
