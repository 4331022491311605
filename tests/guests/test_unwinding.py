"""The demo kernel's call frame information: stock gdb walks from the kernel through every kind of entry into ring 3."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from guests import images
from tests.guests import qemu
from tests.system.tools import DebuggerRun, gdbs, run_gdb

SOURCES = f"directory {images.source_root()}"
BOTH_GDBS = pytest.mark.parametrize("gdb", gdbs(), ids=["stock", "recent"])


@pytest.fixture
def target(tmp_path: Path) -> Iterator[str]:
    with qemu.stopped(qemu.kernel(images.path("demo"), "quiet"), tmp_path / "gdb") as address:
        yield f"target remote {address}"


def debug(target: str, *commands: str, gdb: Path) -> DebuggerRun:
    return run_gdb([SOURCES, target, *commands, "kill"], gdb=gdb, program=images.symbols_path("demo"))


def frames(text: str) -> list[str]:
    """The function names of a backtrace, innermost first; anything that is no frame is kept as it is."""
    names = []
    for line in text.strip().splitlines():
        words = line.replace(" in ", " ").split()
        address = len(words) > 1 and words[1].startswith("0x")
        names.append(words[2 if address else 1] if words[0].startswith("#") else line)
    return names


PRIMES = ["primes_main", "user_start"]
CLOCK = ["clock_main", "user_start"]


@BOTH_GDBS
@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ("break kernel_main", ["kernel_main", "start_high"]),
        (
            "break sys_hertz if current == &tasks[2] && $esp > 0xc0000000",
            ["sys_hertz", "syscall_dispatch", "trap", "<signal", "system_call", "sys_hertz", *PRIMES],
        ),
        (
            "break sys_map_screen if $esp > 0xc0000000",
            ["sys_map_screen", "syscall_dispatch", "trap", "<signal", "fast_system_call", "sys_map_screen", *CLOCK],
        ),
        ("break page_fault", ["page_fault", "exception", "trap", "<signal", "user_start"]),
        (
            "break tasks_tick",
            ["tasks_tick", "interrupt", "trap", "<signal", "wait_for_interrupt", "idle", "thread_begin"],
        ),
        (
            "break task_sleep if current == &tasks[3]",
            ["task_sleep", "sys_sleep", "syscall_dispatch", "trap", "<signal", "fast_system_call", "sys_sleep", *CLOCK],
        ),
    ],
)
def test_backtraces_reach_the_first_frame(target: str, stop: str, expected: list[str], gdb: Path) -> None:
    output = debug(target, stop, "continue", "echo <<<\\n", "backtrace", "echo >>>\\n", gdb=gdb).output
    assert frames(output.partition("<<<")[2].partition(">>>")[0]) == expected


@BOTH_GDBS
@pytest.mark.parametrize(
    ("first", "caller", "steps"),
    [
        ("system_call", ["system_call", "sys_hertz", *PRIMES], 24),
        ("fast_system_call", ["fast_system_call", "sys_map_screen", *CLOCK], 44),
    ],
)
def test_every_step_of_a_system_call_has_its_caller(
    target: str, first: str, caller: list[str], steps: int, gdb: Path
) -> None:
    """From the first instruction of the stub in ring 3, by single steps, well into the kernel's C code."""
    each = ("echo <<<\\n", "backtrace", "echo >>>\\n", "stepi")
    parts = debug(target, f"break *{first}", "continue", *(each * steps), gdb=gdb).output.split("<<<")[1:]
    seen = set()
    assert len(parts) == steps
    for part in parts:
        names = frames(part.partition(">>>")[0])
        assert names[-len(caller) :] == caller
        seen.add(names[0])
    assert {first, "trap_entry", "trap"} <= seen
    assert seen & {"vector_128", "sysenter_entry"}


@BOTH_GDBS
@pytest.mark.parametrize(
    "leave", ["*trap_return if *(int *)($esp + 48) == 128", "*trap_return if *(int *)($esp + 48) == 129"]
)
def test_every_step_on_the_way_back_has_its_caller(target: str, leave: str, gdb: Path) -> None:
    each = ("stepi", "echo <<<\\n", "backtrace", "echo >>>\\n", "info registers cs", "echo ===\\n")
    parts = debug(target, f"break {leave}", "continue", *(each * 14), gdb=gdb).output.split("<<<")[1:]
    rings = set()
    for part in parts:
        trace, _, rest = part.partition(">>>")
        assert frames(trace)[-2:] in (PRIMES, CLOCK)
        rings.add(int(rest.split()[1], 16) & 3)
    assert rings == {0, 3}


@BOTH_GDBS
def test_every_step_of_an_interrupt_in_ring_0_has_its_caller(target: str, gdb: Path) -> None:
    """There the CPU pushes neither SS nor ESP: what was interrupted had its ESP just above the three words pushed."""
    each = ("echo <<<\\n", "backtrace", "echo >>>\\n", "frame 1", "print $esp - $interrupted", "stepi")
    start = ("break *vector_32", "continue", "delete", "set $interrupted = $esp + 12")
    parts = debug(target, *start, *(each * 16), gdb=gdb).output.split("<<<")[1:]
    seen = set()
    for part in parts:
        trace, _, rest = part.partition(">>>")
        names = frames(trace)
        seen.add(names[0])
        assert names[-3:] == ["wait_for_interrupt", "idle", "thread_begin"]
        assert names[0] == "trap" or re.search(r"^\$\d+ = 0$", rest, re.MULTILINE)
    assert {"vector_32", "trap_entry", "trap"} <= seen


@BOTH_GDBS
def test_registers_of_ring_3_are_found_from_within_the_kernel(target: str, gdb: Path) -> None:
    show = "print/x {$esp, $ebx, $esi, $edi, $cs, $ss, $ds}"
    output = debug(
        target,
        *("break *system_call", "continue", "delete", "stepi 7", "x/i $pc", show),
        *("break syscall_dispatch if current == &tasks[2]", "continue", "frame 3", show),
        gdb=gdb,
    ).output
    assert "int    $0x80" in output
    values = [line.partition(" = ")[2] for line in output.splitlines() if line.startswith("$")]
    assert len(values) == 2
    assert values[0] == values[1]
    assert values[0].endswith("0x1b, 0x23, 0x23}")


@pytest.mark.parametrize(
    ("text", "length_bytes", "result"),
    [
        ("0xc0100000", 4, -1),  # the kernel's
        ("0xbfffffff", 2, -1),  # runs into the kernel's
        ("0x1000", 4, -1),  # nobody's
        ("0x400000", 4, 4),
        ("0x400000", 1000, 128),
        ("0x401ffe", 4, -1),  # runs out of the program
    ],
)
def test_the_kernel_writes_only_what_the_task_can_read(target: str, text: str, length_bytes: int, result: int) -> None:
    """A system call of the task `primes`, with other arguments put in before its `int $0x80`."""
    output = debug(
        target,
        *("break *system_call", "continue", "delete", "stepi 7"),
        *("set $eax = 2", f"set $ebx = {text}", f"set $esi = {length_bytes}"),
        *("break *($pc + 2) if current == &tasks[2]", "continue", "print $eax", "print/x $cs"),
        gdb=gdbs()[0],
    ).output
    assert f"$1 = {result}\n$2 = 0x1b\n" in output


@BOTH_GDBS
def test_source_lines_are_shown(target: str, gdb: Path) -> None:
    output = debug(target, "break start", "continue", "break switch_context", "continue", gdb=gdb).output
    assert "$PHYSICAL(direct_tables), %edi" in output
    assert "movl    4(%esp), %eax" in output
