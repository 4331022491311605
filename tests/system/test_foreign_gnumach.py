"""GNU Mach for the 486, a kernel that none of us wrote: how far it comes, when, and what stock gdb makes of it.

It has no symbols. Until it turns paging on it runs on segments with base 40000000h (see `debian.gnumach`), so that EIP
is C1xxxxxxh where the linear address is 01xxxxxxh; after that the two are the same.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.engine import MAKERS
from tests.system import debian
from tests.system.dialogue import attached
from tests.system.runs import MIB, Run, booted
from tests.system.tools import gdbs, recent_gdb
from tests.system.trapgate import Trapgate, running

APPEND = "console=com0"
RAM_MIB = 24

# What it prints, and the icount at which each line is complete; one nanosecond an instruction.
PRINTED = (
    (1_409_990, "GNU Mach 1.8+git20221224-486"),
    (1_412_452, "biosmem: physical memory map:"),
    (1_417_182, "biosmem: 000000000000000000:00000000000009f000, available"),
    (1_421_831, "biosmem: 00000000000009fc00:0000000000000a0000, reserved"),
    (1_426_480, "biosmem: 0000000000000f0000:000000000000100000, reserved"),
    (1_431_210, "biosmem: 000000000000100000:000000000001800000, available"),
    (1_435_859, "biosmem: 0000000000ffff0000:000000000100000000, reserved"),
    (1_439_617, "vm_page: page table size: 6128 entries (336k)"),
    (1_443_699, "vm_page: DMA: pages: 4080 (15M), free: 3676 (14M)"),
    (1_446_971, "vm_page: DMA: min:500 low:600 high:1000"),
    (1_451_134, "vm_page: DIRECTMAP: pages: 2048 (8M), free: 0 (0M)"),
    (1_454_892, "vm_page: DIRECTMAP: min:500 low:600 high:1000"),
    # What it looks for is not on this CPU: the end that is expected.
    (1_763_190, "panic ../i386/i386/fpu.c:244: init_fpu: No FPU!"),
)
BOUND_INSNS = 1_800_000

# The first routine that it calls often, as it is before paging and after.
ROUTINE_BEFORE_PAGING, ROUTINE = 0x0103_8100, 0xC103_8100
# The routine that prints the banner, well after paging is on, and a byte of the banner in the ring of messages.
MAIN = 0xC100_00B0
BANNER_BYTE = 0xC113_6263
# FNINIT, and how many instructions come before it.
FPU_TEST = 0xC100_6150
AT_FPU_TEST = 1_758_195
PAGING = 1 << 31


def boot_and_run(engine: str) -> Run:
    with booted(debian.gnumach(), append=APPEND, ram_bytes=RAM_MIB * MIB, engine=engine) as run:
        run.run_to(BOUND_INSNS)
        return run


@pytest.mark.parametrize("engine", MAKERS)
def test_it_prints_the_same_lines_at_the_same_icounts_up_to_its_panic(engine: str) -> None:
    first, second = boot_and_run(engine), boot_and_run(engine)
    assert first.lines() == list(PRINTED)
    assert first.printed == second.printed


def stopped_at_start() -> AbstractContextManager[Trapgate]:
    """The kernel before its first instruction."""
    return running(debian.gnumach(), "-m", str(RAM_MIB), "--append", APPEND, "--serial", "none")


@pytest.mark.parametrize("path", gdbs(), ids=lambda path: path.parts[1])
def test_breakpoints_before_and_after_paging_is_on(path: Path) -> None:
    """Both are set before the first instruction: 583,000 later the address of the second is mapped."""
    with stopped_at_start() as trapgate, attached(trapgate, path, debian.gnumach()) as gdb:
        assert gdb.number("$pc") == 0x0100_0000
        assert gdb.number(f"*(unsigned char*){FPU_TEST:#x}") == 0xFF
        gdb.say(f"break *{ROUTINE_BEFORE_PAGING:#x}")
        gdb.say(f"break *{FPU_TEST:#x}")

        stop = gdb.go()
        assert (stop["reason"], stop["signal-name"]) == ("signal-received", "SIGTRAP")
        assert gdb.count() == 157
        assert gdb.number("$eip") == ROUTINE
        assert gdb.number("$pc_linear") == ROUTINE_BEFORE_PAGING
        assert gdb.number("$cs_base") == 0x4000_0000
        assert gdb.number("$cr0") & PAGING == 0
        first, second = gdb.instructions("$pc_linear", 2)
        assert first == (ROUTINE_BEFORE_PAGING, "sub $0xc,%esp")
        esp = gdb.number("$esp")
        gdb.go("stepi")
        assert gdb.count() == 158
        assert gdb.number("$pc_linear") == second[0]
        assert gdb.number("$esp") == esp - 12

        gdb.say("delete 1")
        stop = gdb.go()
        assert (stop["reason"], stop["bkptno"]) == ("breakpoint-hit", "2")
        assert gdb.count() == AT_FPU_TEST
        assert gdb.number("$pc") == gdb.number("$pc_linear") == FPU_TEST
        assert gdb.number("$cr0") & PAGING
        assert gdb.number("$cs_base") == 0
        assert [text for _, text in gdb.instructions("$pc", 2)] == ["fninit", "fnstsw %ax"]
        gdb.go("stepi")
        assert (gdb.number("$pc"), gdb.count()) == (FPU_TEST + 2, AT_FPU_TEST + 1)
        assert f"Physical {FPU_TEST - 0xC000_0000:#010x}, in a page of 4 KiB" in gdb.say(f"monitor page {FPU_TEST:#x}")


@pytest.mark.parametrize("path", gdbs(), ids=lambda path: path.parts[1])
def test_watchpoint_and_backtrace(path: Path) -> None:
    """A byte of the ring of messages is watched: it stops in the routine that puts characters there, called by main."""
    with stopped_at_start() as trapgate, attached(trapgate, path, debian.gnumach()) as gdb:
        gdb.say(f"tbreak *{MAIN:#x}")
        gdb.go()
        assert gdb.number("$cr0") & PAGING
        gdb.say(f"watch *(char*){BANNER_BYTE:#x}")
        stop = gdb.go()
        assert stop["reason"] == "watchpoint-trigger"
        assert stop["value"] == {"old": "0 '\\000'", "new": "71 'G'"}
        assert gdb.count() == 1_407_677
        assert gdb.frames() == [0xC103_8154, 0xC103_3160, 0xC103_3320, 0xC100_00B9, 0xC101_E457, 0xC100_0074]
        returned_to = gdb.frames()[1]
        gdb.go("finish")
        assert gdb.number("$pc") == returned_to
        gdb.say("delete")
        gdb.say(f"break *{FPU_TEST:#x}")
        gdb.go()
        assert gdb.frames() == [FPU_TEST, 0xC100_00C3, 0xC101_E457, 0xC100_0074]
        assert gdb.count() == AT_FPU_TEST


def test_without_its_file_a_return_address_leads_out_of_a_routine() -> None:
    """gdb asks the server for the guest's file and reads its unwind tables; without them it finds no frames."""
    with stopped_at_start() as trapgate, attached(trapgate, recent_gdb()) as gdb:
        assert debian.gnumach().name in gdb.say("info files")
        gdb.say("file")
        gdb.say(f"tbreak *{MAIN:#x}")
        gdb.go()
        gdb.say(f"tbreak *{ROUTINE:#x}")
        gdb.go()
        assert gdb.frames() == [ROUTINE]
        esp, caller = gdb.number("$esp"), gdb.number("*(unsigned int*) $esp")
        gdb.say("tbreak *(*(unsigned int*) $esp)")
        gdb.go()
        assert gdb.number("$pc") == caller
        assert gdb.number("$esp") == esp + 4
        (before,) = gdb.instructions(f"{caller - 5:#x}", 1)
        assert before == (caller - 5, f"call {ROUTINE:#x}")
