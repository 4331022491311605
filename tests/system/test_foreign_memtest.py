"""Memtest86+, a program that none of us wrote: as a Linux boot image and as a floppy, and what stock gdb makes of it.

It runs with 5 MiB of RAM, as little as it can do with, and 100 ns an instruction, since it measures its speed against
the timer. It is compiled without frame pointers but for its main routine, and without unwind tables.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from tests.system import debian, trapgate
from tests.system.dialogue import attached
from tests.system.runs import MIB, Run, booted
from tests.system.tools import gdbs

pytestmark = pytest.mark.usefixtures("each_engine")

APPEND = "console=ttyS0,115200 nopause"
RAM_BYTES = 5 * MIB
NS_PER_INSN = 100

# What the screen shows in its first rows, and the instructions (in steps of 10,000) after which it is there first.
SHOWN_OF_BOOT_IMAGE = (
    ("Memtest86+ v6.10", 1_370_000),
    ("Test #0  [Address test, walking ones, no cache]", 2_390_000),
    ("Testing: 4MB - 5MB [1MB of 4.62MB]", 4_010_000),
    ("Test #2  [Address test, own address + window]", 4_040_000),
)
SHOWN_OF_FLOPPY = (
    ("Booting from diskette 0", 10_000),
    ("Memtest86+ v6.10", 1_370_000),
    ("Test #0  [Address test, walking ones, no cache]", 2_650_000),
)

# Its main routine calls the one that draws the screen; where that is called from, and where main returns to.
DRAW, CALL_OF_DRAW, RETURN_OF_MAIN = 0x11_10E8, 0x11_2EFD, 0x10_01B3
SCREEN = 0xB_8000
PAGING, PAE = 1 << 31, 1 << 5


def assert_shown(run: Run, expected: tuple[tuple[str, int], ...]) -> None:
    last = expected[-1][1]
    shown = tuple((text, run.run_until(partial(is_shown, run, text), last)) for text, _ in expected)
    assert shown == expected


def is_shown(run: Run, text: str) -> bool:
    return text in run.screen


def test_the_boot_image_gets_into_its_tests_and_shows_them_on_serial() -> None:
    with booted(debian.memtest(), append=APPEND, ram_bytes=RAM_BYTES, ns_per_insn=NS_PER_INSN, kernel=True) as run:
        assert_shown(run, SHOWN_OF_BOOT_IMAGE)
        assert "Errors: 0" in run.screen
        banner = run.text.index("Memtest86+ v6.10")
        assert run.text.startswith("\x1b[2J")
        assert run.printed[banner][0] == 2_224_466
        assert run.printed[run.text.index("#0  [Address test")][0] == 3_023_945
        printed = list(run.printed)
    with booted(debian.memtest(), append=APPEND, ram_bytes=RAM_BYTES, ns_per_insn=NS_PER_INSN) as again:
        again.run_to(3_100_000)
        assert again.printed == [(icount, byte) for icount, byte in printed if icount < 3_100_000]


def test_the_floppy_is_booted_by_its_own_sector_and_finds_a_bit_that_changes() -> None:
    """Test #2 fills memory with its own addresses and then looks: in between a bit is flipped, from outside."""
    address = 0x4C_1234
    with booted(debian.memtest_floppy(), ram_bytes=RAM_BYTES, ns_per_insn=NS_PER_INSN) as run:
        assert_shown(run, SHOWN_OF_FLOPPY)
        memory = run.machine.memory
        run.run_until(lambda: memory.load(0x4F_F000, 4) == 0x4F_F000, 6_000_000)
        assert memory.load(address, 4) == address
        memory.store(address, 4, address ^ 0x10)
        run.run_until(lambda: "Press any key to remove this banner" in run.screen, 8_100_000)
        run.machine.type_text("x")
        run.run_until(lambda: "Press any key" not in run.screen, 12_000_000)
        assert "Errors: 1" in run.screen
        (found,) = (row.split() for row in run.screen.splitlines() if "4c1234" in row)
        assert found == ["0", "0", "2", "0000004c1234", "(4.75MB)", "004c1234", "004c1224", "00000010", "1"]
        assert run.printed == []


def test_the_floppy_is_a_kernel_if_the_command_line_says_so() -> None:
    """Its first sectors are the Linux boot image; only then does it know of a serial console."""
    words = [
        "--append",
        APPEND,
        "-m",
        "5",
        "--ns-per-insn",
        str(NS_PER_INSN),
        "--gdb",
        "none",
        "--max-insns",
        "2230000",
    ]
    done = trapgate.run("run", "--kernel", debian.memtest_floppy(), *words, timeout_s=200)
    assert done.returncode == 0, done.stderr
    assert b"Memtest86+ v6.10" in done.stdout


@pytest.mark.parametrize("path", gdbs(), ids=lambda path: path.parts[1])
def test_breakpoint_steps_backtrace_and_a_watchpoint_on_the_display(path: Path) -> None:
    words = ["-m", "5", "--ns-per-insn", str(NS_PER_INSN), "--append", APPEND, "--serial", "none", "--cpu", "p6-nofpu"]
    with trapgate.running("-kernel", debian.memtest(), *words) as program, attached(program, path) as gdb:
        assert gdb.number("$pc") == 0x10_0000
        gdb.say(f"break *{DRAW:#x}")
        gdb.go()
        assert gdb.count() == 1_299_570
        assert gdb.number("$cr0") & PAGING
        assert gdb.number("$cr4") & PAE
        # The routine has not pushed EBP and never will: its caller, main, is left out.
        assert gdb.frames() == [DRAW, RETURN_OF_MAIN]
        assert gdb.number("*(unsigned int*) $esp") == CALL_OF_DRAW + 5
        assert gdb.instructions(f"{CALL_OF_DRAW:#x}", 1) == [(CALL_OF_DRAW, f"call {DRAW:#x}")]

        # It first asks a routine of two instructions where it is, as code that can be moved does.
        listed = gdb.instructions(f"{DRAW:#x}", 8)
        calls = [number for number, (_, text) in enumerate(listed) if text.startswith("call")]
        gdb.go(f"stepi {calls[0] + 1}")
        assert [text for _, text in gdb.instructions("$pc", 2)] == ["mov (%esp),%ebx", "ret"]
        gdb.go("stepi 2")
        after_call = listed[calls[0] + 1][0]
        assert gdb.number("$pc") == gdb.number("$ebx") == after_call
        assert gdb.count() == 1_299_570 + calls[0] + 3

        gdb.say("delete")
        gdb.say(f"watch *(char*) {SCREEN + 2 * 6:#x}")
        stop = gdb.go()
        while stop["value"]["new"] != "77 'M'":
            stop = gdb.go()
        assert stop["reason"] == "watchpoint-trigger"
        assert "      M" in gdb.screen()[0]
        assert "Memtest" not in gdb.screen()[0]
