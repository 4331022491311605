"""Stock gdb, old and new, on the demo kernel: looking, stepping, breaking, changing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from guests import images
from tests.system.tools import DebuggerRun, asked, gdbs, run_gdb
from tests.system.trapgate import running

pytestmark = pytest.mark.usefixtures("each_engine")

DEMO = images.path("demo")


def session(
    *commands: str,
    image: str = "demo",
    append: str = "quiet",
    gdb: Path | None = None,
    extended: bool = False,
    options: Sequence[str] = (),
) -> DebuggerRun:
    """What gdb printed: commands on a machine that stands before its first instruction."""
    words = ["--append", append] if append else []
    with running(images.path(image), "--serial", "none", *words, *options) as trapgate:
        connect = trapgate.connect_extended if extended else trapgate.connect
        return run_gdb([connect, *commands], gdb=gdb, program=images.symbols_path(image))


def number(run: DebuggerRun, expression: str) -> int:
    """The value of an expression that was asked for, as a number."""
    return int(run.value_of(expression).split()[0], 0)


@pytest.mark.parametrize("gdb", gdbs(), ids=lambda path: path.parts[1])
def test_first_look(gdb: Path) -> None:
    """The whole description is accepted; flags, structures and pointers print as such."""
    run = session(
        *asked("$cr0"), *asked("$pc"), *asked("$eflags"), *asked("/x $gdtr_base"), *asked("$cs_attr"),
        *asked("$icount"), *asked("$pc_linear"), *asked("$st0"), "info registers", "info all-registers",
        "info registers system", "info threads", "info mem", "info target", gdb=gdb,
    )  # fmt: skip
    assert run.value_of("$cr0") == "[ PE ET ]"
    assert "<start>" in run.value_of("$pc")
    assert run.value_of("$eflags") == "[ IOPL=0 ]"
    assert run.value_of("/x $gdtr_base") == "0xf0020"
    assert run.value_of("$cs_attr") == "[ TYPE=11 S DPL=0 P DB G ]"
    assert run.value_of("$icount") == "0"
    assert "<start>" in run.value_of("$pc_linear")
    assert run.value_of("$st0") == "0"
    assert re.search(r"^icount +0x0 +0$", run.output, re.MULTILINE)
    assert '"CPU 1" (protected mode, ring 0)' in run.output
    assert "warning" not in run.output.lower()


@pytest.mark.parametrize("gdb", gdbs(), ids=lambda path: path.parts[1])
def test_breakpoint_and_backtrace_from_kernel_into_user_code(gdb: Path) -> None:
    """The breakpoint is set before paging is on, at an address that is not mapped yet."""
    run = session("break syscall_dispatch", "continue", "backtrace", *asked("$cpl"), "frame 4", "info locals", gdb=gdb)
    assert "Breakpoint 1, syscall_dispatch" in run.output
    for function in ("trap (frame=", "<signal handler called>", "system_call ()", "primes_main ()", "user_start ()"):
        assert function in run.output
    assert run.value_of("$cpl") == "0"


def test_stepping_through_a_system_call_from_ring_3_into_ring_0() -> None:
    run = session(
        "break system_call", "continue", "delete", *asked("$cpl"), "stepi 7", "x/i $pc", "stepi", *asked("$cs"),
        *asked("$ss"), "backtrace", "stepi", "info symbol $pc", "finish", *asked("$eip"),
    )  # fmt: skip
    assert run.value_of("$cpl") == "3"
    assert re.search(r"=> 0x\w+ <system_call\+\d+>:\s+int\s+\$0x80", run.output), run.output
    assert run.value_of("$cs") == "8"
    assert run.value_of("$ss") == "16"
    assert "vector_128" in run.output
    assert re.search(r"#1 .* in system_call \(\)", run.output)


def test_next_steps_by_ranges_over_calls() -> None:
    run = session("break kernel_main", "continue", "next", "next", *asked("$icount"), "step", "finish")
    assert re.search(r"^98\s+segments_init", run.output, re.MULTILINE)
    assert re.search(r"^99\s+traps_init", run.output, re.MULTILINE)
    assert "traps_init ()" in run.output


def test_hardware_and_temporary_breakpoints() -> None:
    run = session("hbreak kernel_main", "thbreak segments_init", "continue", "continue", "info breakpoints")
    assert "Breakpoint 1, kernel_main" in run.output
    assert "Temporary breakpoint 2, segments_init" in run.output
    assert "hw breakpoint" in run.output


def test_conditions_are_evaluated_by_the_stub() -> None:
    run = session("break tasks_tick if ticks == 7", "continue", *asked("ticks"), *asked("$icount"), "info breakpoints")
    assert run.value_of("ticks") == "7"
    assert "stop only if ticks == 7 (target evals)" in run.output
    again = session(
        "set breakpoint condition-evaluation host", "break tasks_tick if ticks == 7", "continue", *asked("$icount")
    )
    assert again.value_of("$icount") == run.value_of("$icount"), "who evaluates makes no difference"


def test_agent_printf() -> None:
    run = session(
        "set dprintf-style agent", 'dprintf tasks_tick,"tick %d of %s\\n",ticks,current->name',
        "break interrupt if ticks == 4", "continue",
    )  # fmt: skip
    ticks = [line for line in run.output.splitlines() if line.startswith("tick ")]
    assert ticks == ["tick 1 of idle", "tick 2 of idle", "tick 3 of idle", "tick 4 of idle"]


def test_watchpoints_name_the_address() -> None:
    run = session(
        "break tasks_tick", "continue", "delete", "watch ticks", "continue", "rwatch current", "continue", "delete",
        "awatch *(char*)&ticks", "continue", "info watchpoints",
    )  # fmt: skip
    assert "Hardware watchpoint 2: ticks\n\nOld value = 1\nNew value = 2" in run.output
    assert "Hardware read watchpoint 3: current\n\nValue = " in run.output
    assert "Hardware access (read/write) watchpoint 4" in run.output


def test_watchpoint_with_condition() -> None:
    run = session("break kernel_main", "continue", "watch ticks if ticks == 3", "continue", *asked("ticks"))
    assert run.value_of("ticks") == "3"


def test_memory_is_read_searched_and_written() -> None:
    run = session(
        "break tasks_tick", "continue", "set var ticks = 1000", *asked("ticks"), "x/2xw kernel_directory",
        "find kernel_directory, +4096, 0x0010d023", *asked("$numfound"), "monitor memory physical",
        "compare-sections .text", "monitor memory linear",
        "print *(int*)0", "set var *(int*)0 = 1", "output/x *(unsigned char*)0xc00f0000",
        "dump memory /dev/null 0xc0000000 0xc0100000",
    )  # fmt: skip
    assert run.value_of("ticks") == "1000"
    assert number(run, "$numfound") >= 1
    assert re.search(r"Section .text, range 0x107000 -- 0x\w+: matched.", run.output)
    assert "Cannot access memory at address 0x0" in run.output


def test_functions_of_the_guest_are_called() -> None:
    run = session(
        "break tasks_tick", "continue", "info registers", *asked("strcmp(current->name, current->name)"),
        *asked("pages_free()"), "info registers", *asked("$icount > 0"),
    )  # fmt: skip
    assert int(run.value_of("pages_free()")) > 1000
    assert run.value_of("strcmp(current->name, current->name)") == "0"
    first, second = (re.findall(rf"^{name} .*$", run.output, re.MULTILINE) for name in ("esp", "eip"))
    assert first[0] == first[1], "registers are as before the calls"
    assert second[0] == second[1]


def test_registers_are_written_and_refused() -> None:
    run = session(
        "break tasks_tick", "continue", "set $eax = 0x1234", *asked("/x $eax"), "set $ax = 0x99", *asked("$al"),
        "set $cs = 0x1b", *asked("$cpl"), "set $cs = 8", "set $icount = 5", "set $cs = 0x50", "set $cr0 = 0x80000000",
        "set $eflags = 0x46", *asked("$eflags"), *asked("$cr0"), "set $pc_linear = kernel_main", "info symbol $eip",
    )  # fmt: skip
    assert run.value_of("/x $eax") == "0x1234"
    assert run.value_of("$al") == "-103"
    assert run.value_of("$cpl") == "3"
    assert run.value_of("$eflags") == "[ ZF PF IOPL=0 ]" or run.value_of("$eflags") == "[ PF ZF IOPL=0 ]"
    assert run.value_of("$cr0") == "[ PE EM ET WP PG ]"
    assert "kernel_main in section .text" in run.output


def test_real_mode_code_is_disassembled_and_broken_into() -> None:
    """A boot sector at 0:7C00, from the reset vector on."""
    run = session(
        "set architecture i8086", *asked("/x $pc_linear"), "x/i $pc_linear", "break *0x7c00", "continue",
        "x/3i $pc_linear", "info registers cs eip", "stepi", *asked("/x $pc_linear"), "monitor info idt 0x10",
        "monitor xp /2i 0x7c00", image="boot", append="",
    )  # fmt: skip
    assert number(run, "/x $pc_linear") == 0xFFFFFFF0
    assert "Breakpoint 1, " in run.output
    assert "0x7c00" in run.output
    assert re.search(r"10 #MF  f000:\w{4}", run.output)
    assert "cs             0x0 " in run.output


def test_physical_memory_on_request() -> None:
    run = session(
        "break tasks_tick", "continue", "x/2xb 0x100000", "monitor memory physical", "x/4xb 0x100000",
        "monitor memory linear", "monitor xp /4xb 0x100000",
    )  # fmt: skip
    assert "Cannot access memory at address 0x100000" in run.output
    assert re.search(r"0x100000 <\w+>:\s+0x02\s+0xb0\s+0xad\s+0x1b", run.output)
    assert "0x00100000: 0x02 0xb0 0xad 0x1b" in run.output


def test_gdb_variables_of_the_session(each_engine: str) -> None:
    run = session("info os", "info os statistics", "info proc", "show architecture")
    assert "statistics" in run.output
    assert re.search(rf"^{each_engine} +engine", run.output, re.MULTILINE)
