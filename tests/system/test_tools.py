"""The debuggers that the whole-system tests drive: they are there, of the right age, and answer a script."""

from pathlib import Path

import pytest

from tests.system import tools


def test_the_two_gdbs_are_an_old_and_a_new_one() -> None:
    assert tools.gdb_version(tools.stock_gdb()) >= (13, 1)
    assert tools.gdb_version(tools.recent_gdb()) >= (16, 0)


@pytest.mark.parametrize("gdb", tools.gdbs(), ids=["stock", "recent"])
def test_a_script_goes_on_after_a_command_that_fails(gdb: Path) -> None:
    run = tools.run_gdb(["frobnicate", *tools.asked("6 * 7"), *tools.asked('"x" "y"')], gdb=gdb)
    assert 'Undefined command: "frobnicate"' in run.output
    assert run.value_of("6 * 7") == "42"
    assert run.value_of('"x" "y"') == '"xy"'
    with pytest.raises(tools.DebuggerError, match="no value of '1'"):
        run.value_of("1")


@pytest.mark.parametrize("gdb", tools.gdbs(), ids=["stock", "recent"])
def test_a_session_through_mi(gdb: Path) -> None:
    with tools.gdb_mi(gdb=gdb) as session:
        assert session.evaluate("1 + 1") == "2"
        assert session.console("print 3") == "$1 = 3\n"
        with pytest.raises(tools.DebuggerError, match="nonesuch"):
            session.command("-nonesuch")
        with pytest.raises(tools.DebuggerError, match="waiting for a stop"):
            session.wait_for_stop(timeout_s=0.3)
        assert session.evaluate("2 + 2") == "4"


def test_a_debugger_that_does_not_end_is_given_up() -> None:
    with pytest.raises(tools.DebuggerError, match=r"still busy after 0\.5 s"):
        tools.run_gdb(["shell sleep 5"], timeout_s=0.5)


def test_lldb_runs_a_script() -> None:
    assert "= 42" in tools.run_lldb(["print 6 * 7"]).output
