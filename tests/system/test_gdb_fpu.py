"""Stock gdb and the registers of an FPU: read, written, and seen by the guest."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tests.oracles.assembler import assemble
from tests.system.dialogue import attached
from tests.system.tools import gdbs, recent_gdb
from tests.system.trapgate import running

ORIGIN = 0x10_0000
# Multiboot enters with CR0.EM as at reset: clear.
SOURCE = """
    fninit
    fld1
    fldpi
    mov eax, cr4
    or eax, 0x200
    mov cr4, eax
    mov eax, 0x40490fdb
    movd xmm3, eax
here:
    nop
    fadd st(0), st(1)
    addss xmm3, xmm3
    sub esp, 4
    fstcw [esp]
    jmp .
"""


@pytest.mark.parametrize(
    ("path", "engine"),
    [*itertools.product(gdbs(), ("interp", "bt")), (recent_gdb(), "trap")],
    ids=lambda value: value if isinstance(value, str) else value.parts[1],
)
def test_its_registers_are_read_and_written(path: Path, engine: str, tmp_path: Path) -> None:
    image = tmp_path / "fpu.bin"
    code = assemble(SOURCE, origin=ORIGIN)
    image.write_bytes(code)
    here = ORIGIN + code.index(b"\x90")
    words = (f"{image}@{ORIGIN:#x}", "--cpu", "pentium4", "--vmm", engine, "--serial", "none")
    with running(*words) as trapgate, attached(trapgate, path) as gdb:
        assert gdb.number("$fctrl") == 0x40
        gdb.say(f"break *{here:#x}")
        gdb.go()
        assert "3.14159265" in gdb.say("p $st0")
        assert "= 1" in gdb.say("p $st1")
        assert (gdb.number("$fctrl"), gdb.number("$mxcsr")) == (0x37F, 0x1F80)
        assert gdb.number("$ftag") == 0x0FFF
        assert gdb.number("$fioff") == ORIGIN + 4
        assert "3.1415927" in gdb.say("p $xmm3.v4_float[0]")
        assert "=>R6: Valid   0x4000c90fdaa22168c235" in gdb.say("info float")

        gdb.say("set $st1 = 0.5")
        gdb.say("set $fctrl = 0x27f")
        gdb.say("set $xmm3.v4_float[0] = 2.5")
        gdb.say("set $mxcsr = 0x1fa0")
        gdb.go("stepi 6")
        assert "3.64159265" in gdb.say("p $st0")
        assert "= 5" in gdb.say("p $xmm3.v4_float[0]")
        assert gdb.number("$mxcsr") == 0x1FA0
        assert gdb.number("*(unsigned short*) $esp") == 0x27F
        assert gdb.number("$fioff") == here + 1


def test_without_an_fpu_they_are_unavailable() -> None:
    with running("--cpu", "p6-nofpu", "--serial", "none") as trapgate, attached(trapgate, recent_gdb()) as gdb:
        for name in ("st0", "fctrl", "xmm7", "mxcsr"):
            assert "<unavailable>" in gdb.say(f"p ${name}")
