"""GNU Mach with the FPU that it needs: it finds and sets up that of the Pentium 4 model, probes for devices, and ends.

Of its 5,183 million instructions nearly all are drivers that wait, for a floppy controller above all; only `bt` is
quick enough for that. See `test_foreign_gnumach` for its addresses.
"""

from __future__ import annotations

from machine.cpuid import PENTIUM4
from machine.state import CR0_EM, CR0_TS, CR4_OSFXSR
from tests.system import debian
from tests.system.dialogue import attached
from tests.system.runs import MIB, Run, booted
from tests.system.tools import recent_gdb
from tests.system.trapgate import running

APPEND = "console=com0"
RAM_MIB = 24

# It has found the FPU after 1.8 million instructions; the panic is complete at the last of these (measured).
FPU_FOUND_INSNS = 2_000_000
LAST_LINES = (
    (261_821_133, "pcibios_init: Using configuration type 1"),
    (261_823_906, "Probing PCI hardware."),
    (5_181_842_399, "floppy0: no floppy controllers found"),
    (5_182_863_957, "done"),
    (5_182_866_281, "scsi : 0 hosts."),
    (5_182_869_357, "scsi : detected total."),
    (5_182_878_864, "com1: at atbus0, port = 2f8x, spl = 6u, pic = 3. (DOS COM2)"),
    (5_182_880_901, "com 2 out of range"),
    (5_182_885_990, "RTC time is 2006-10-21 12:00:05"),
    (
        5_182_925_167,
        "panic ../kern/bootstrap.c:181: bootstrap_create: No bootstrap code loaded with the kernel!",
    ),
)
BOUND_INSNS = 5_183_000_000
STINT_INSNS = 50_000_000

# The routine that prints the panic, and where it is called.
PANIC, CALLED_FROM = 0xC101_4040, 0xC104_A9A9


def test_it_sets_the_fpu_up() -> None:
    with booted(debian.gnumach(), append=APPEND, ram_bytes=RAM_MIB * MIB, model=PENTIUM4) as run:
        state = run.machine.cpu.state
        run.run_until(lambda: bool(state.cr4 & CR4_OSFXSR), FPU_FOUND_INSNS)
        run.run_to(run.icount + 100_000)
        assert state.cr0 & (CR0_EM | CR0_TS) == CR0_TS, "an FPU is there, and nobody has used it yet"
        assert "No FPU" not in run.text


def boot_and_run() -> Run:
    with booted(debian.gnumach(), append=APPEND, ram_bytes=RAM_MIB * MIB, model=PENTIUM4, engine="bt") as run:
        run.run_to(BOUND_INSNS, lambda: STINT_INSNS)
        return run


def test_it_runs_to_its_expected_panic_at_the_same_icounts() -> None:
    first, second = boot_and_run(), boot_and_run()
    after_probing = [(icount, line) for icount, line in first.lines() if icount > 10_000_000 and "[K" not in line]
    assert after_probing == list(LAST_LINES)
    assert first.text.count("probing scsi") == 16
    assert first.printed == second.printed


def test_gdb_stops_it_there() -> None:
    words = ("-m", str(RAM_MIB), "--append", APPEND, "--serial", "none", "--cpu", "pentium4", "--vmm", "bt")
    with running(debian.gnumach(), *words) as trapgate, attached(trapgate, recent_gdb(), debian.gnumach()) as gdb:
        gdb.say(f"tbreak *{CALLED_FROM:#x}")
        gdb.go()
        icount = gdb.count()
        assert LAST_LINES[-2][0] < icount < LAST_LINES[-1][0]
        assert gdb.number("$cr0") & CR0_TS
        gdb.go("stepi")
        assert (gdb.number("$pc"), gdb.count()) == (PANIC, icount + 1)
        assert "No bootstrap code loaded" in gdb.say("x/s *(char**) ($esp + 16)")
