"""GRUB's rescue floppy, which none of us made: real mode, the BIOS, and protected mode in turns, under stock gdb.

An instruction takes a microsecond here, so that GRUB, which waits for the timer to measure its clock, need not wait
long. Nearly all of its instructions are its own work in protected mode: it unpacks itself in 13 million, and the menu
stands after 103 million, most of them for unpacking files, copying bytes and dividing 64-bit numbers bit by bit.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.system import debian
from tests.system.dialogue import Dialogue, attached
from tests.system.runs import booted
from tests.system.tools import gdbs, recent_gdb, stock_gdb
from tests.system.trapgate import Trapgate, running

pytestmark = pytest.mark.usefixtures("each_engine")

NS_PER_INSN = 1000

# The boot sector: its first instruction; the routine that prints, and where it is called first; its first INT 13h.
BOOT_SECTOR = 0x7C00
PRINT, AFTER_CALL_OF_PRINT = 0x7DAA, 0x7C93
INT_13, AFTER_INT_13 = 0x7C9B, 0x7C9D
# The BIOS's entry for INT 13h, by the address that it has in every PC.
BIOS_DISK = 0xF_E3FE

# The core image, unpacked: the routine that calls the BIOS for GRUB, its INT, and where the core was entered.
CALL_BIOS, INT, AFTER_INT, ENTRY = 0x909C, 0x9102, 0x9104, 0x9041
UNPACKED_AT = 13_385_596
PROTECTED, CARRY = 1 << 0, 1 << 0
# Executed when the menu has been there for a second; in a module that GRUB loads, so there is nothing yet at the start.
MENU_SECOND = 0x3ED_A8F2

STACK = "((unsigned int) $ss_base + (unsigned short) $esp)"


def stopped_at_reset() -> AbstractContextManager[Trapgate]:
    return running(debian.grub_floppy(), "--ns-per-insn", str(NS_PER_INSN), "--serial", "none")


def pushed(gdb: Dialogue, index: int) -> int:
    """A word of the 16-bit stack, from its top."""
    return gdb.number(f"*(unsigned short*) ({STACK} + {2 * index})")


@pytest.mark.parametrize("path", gdbs(), ids=lambda path: path.parts[1])
def test_real_mode_from_reset_through_a_bios_call(path: Path) -> None:
    with stopped_at_reset() as trapgate, attached(trapgate, path) as gdb:
        gdb.say("set architecture i8086")
        assert gdb.instructions("$pc_linear", 1) == [(0xFFFF_FFF0, "ljmp $0xf000,$0xe05b")]
        gdb.say(f"break *{BOOT_SECTOR:#x}")
        gdb.go()
        assert (gdb.number("$cs"), gdb.number("$eip"), gdb.number("$dl")) == (0, BOOT_SECTOR, 0)
        assert [text for _, text in gdb.instructions("$pc_linear", 2)] == ["jmp 0x7c65", "nop"]
        begun = gdb.count()
        gdb.go("stepi 3")
        assert gdb.count() == begun + 3
        five = gdb.instructions("$pc_linear", 5)
        assert [text for _, text in five[:4]] == ["test $0x70,%dl", "je 0x7c74", "mov $0x80,%dl", "ljmp $0x0,$0x7c79"]

        # A routine, and out of it by the return address.
        gdb.say(f"break *{PRINT:#x}")
        gdb.go()
        assert gdb.frames()[0] == PRINT
        assert pushed(gdb, 0) == AFTER_CALL_OF_PRINT
        gdb.say(f"tbreak *{AFTER_CALL_OF_PRINT:#x}")
        gdb.say("delete 2")
        gdb.go()
        assert gdb.screen()[3] == "GRUB"

        # Into the BIOS, instruction by instruction, and back.
        gdb.say(f"break *{INT_13:#x}")
        gdb.go()
        assert gdb.instructions("$pc_linear", 1) == [(INT_13, "int $0x13")]
        assert gdb.number("$ah") == 0x41
        gdb.go("stepi")
        assert gdb.number("$pc_linear") == BIOS_DISK
        assert (pushed(gdb, 0), pushed(gdb, 1)) == (AFTER_INT_13, 0)
        mnemonics: list[str] = []
        while gdb.number("$cs") == 0xF000 and len(mnemonics) < 100:
            mnemonics.append(gdb.instructions("$pc_linear", 1)[0][1].split()[0])
            gdb.go("stepi")
        assert gdb.number("$pc") == AFTER_INT_13
        assert mnemonics.count("out") == 1
        assert mnemonics[-1] == "iret"
        assert gdb.number("$eflags") & CARRY, "no extensions for a diskette"
        assert gdb.number("$ah") == 1


def test_protected_mode_and_the_bios_in_turns_under_both_gdbs() -> None:
    """The breakpoint is on code that is yet to be unpacked. The second gdb goes on where the first one has vanished."""
    with stopped_at_reset() as trapgate:
        with attached(trapgate, stock_gdb()) as gdb:
            assert gdb.number(f"*(unsigned int*) {CALL_BIOS:#x}") == 0
            gdb.say(f"break *{CALL_BIOS:#x}")
            gdb.go()
            assert gdb.count() == UNPACKED_AT
            assert gdb.number("$cr0") & PROTECTED
            assert [text for _, text in gdb.instructions("$pc", 4)] == ["pushf", "cli", "popf", "push %ebp"]
            # It has not pushed EBP yet, so its caller is left out.
            assert gdb.frames() == [CALL_BIOS, 0x937C, 0xCA1E, ENTRY, 0]
            gdb.go("stepi 4")
            gdb.say(f"tbreak *{INT:#x}")
            gdb.go()
            assert not gdb.number("$cr0") & PROTECTED
            at_int = gdb.count()

        with attached(trapgate, recent_gdb()) as gdb:
            assert (gdb.number("$pc"), gdb.count()) == (INT, at_int)
            gdb.say("set architecture i8086")
            assert gdb.instructions("$pc_linear", 1) == [(INT, "int $0x15")]
            assert gdb.number("$eax") == 0xE820
            gdb.go("stepi")
            assert gdb.number("$pc_linear") == 0xF_F859
            gdb.say(f"tbreak *{AFTER_INT:#x}")
            gdb.go()
            assert (gdb.number("$eax"), gdb.number("$ecx")) == (0x534D_4150, 20)
            # The W of "Welcome to GRUB!": INT 10h AH=09h.
            gdb.say("set architecture i386")
            gdb.say(f"break *{CALL_BIOS:#x} if $al == 0x10 && *(unsigned short*) $edx == 0x0957")
            gdb.go()
            assert gdb.frames() == [CALL_BIOS, 0xE97E, 0xE9C6, 0xDBE1, 0xDC0B, 0xCA35, ENTRY, 0]
            assert "W" not in gdb.screen()[4]
            gdb.say(f"tbreak *{0xE97E:#x}")
            gdb.go()
            assert gdb.screen()[4] == "W"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("each_engine", ["bt"], indirect=True)  # a hundred million instructions
def test_the_menu_and_its_command_line() -> None:
    with stopped_at_reset() as trapgate, attached(trapgate, recent_gdb()) as gdb:
        gdb.say(f"tbreak *{MENU_SECOND:#x}")
        gdb.go()
        assert 103_000_000 < gdb.count() < 104_000_000
        screen = gdb.screen()
        assert "GNU GRUB  version 2.06" in screen[1]
        entries = [row.strip(" │") for row in screen[4:13]]
        assert entries[0] == "*GNU/Linux"
        assert entries[7:] == ["Memtest86+", "Change the colors"]
        assert "   The highlighted entry will be executed automatically in 30s." in screen

        gdb.say("monitor type c")
        # The > of its prompt.
        gdb.say(f"break *{CALL_BIOS:#x} if $al == 0x10 && *(unsigned short*) $edx == 0x093e")
        gdb.go()
        assert "grub" in [row.strip(" │") for row in gdb.screen()]


def test_it_loads_the_same_way_twice() -> None:
    with (
        booted(debian.grub_floppy(), ns_per_insn=NS_PER_INSN) as first,
        booted(debian.grub_floppy(), ns_per_insn=NS_PER_INSN) as second,
    ):
        for icount in (100_000, 1_000_000, 2_000_000):
            first.run_to(icount)
            second.run_to(icount, lambda: 7_919)
            assert first.state() == second.state()
        assert "GRUB loading..." in first.screen
