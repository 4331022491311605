from __future__ import annotations

import pytest

from gdbstub import guest_registers
from gdbstub.target import TargetError
from machine.cpuid import PENTIUM4
from machine.flags import AC
from machine.state import CR0_AM, CR0_ET, CR0_PE, CS, DS
from tests.gdbstub.pc import CODE, guest, register, step, write

NAMES = [r.name for r in guest_registers.DESCRIPTION.registers]


def test_gdbs_core_comes_first_and_whole() -> None:
    core = guest_registers.DESCRIPTION.features[0]
    assert core.name == "org.gnu.gdb.i386.core"
    assert [r.name for r in core.registers[:16]] == [
        *("eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi", "eip", "eflags", "cs", "ss", "ds", "es", "fs", "gs"),
    ]
    assert len(core.registers) == 32
    assert sum(r.bits for r in core.registers) == 16 * 32 + 8 * 80 + 8 * 32


def test_every_register_of_the_issue_is_there() -> None:
    wanted = {"cr0", "cr2", "cr3", "cr4", "gdtr_base", "gdtr_limit", "idtr_base", "idtr_limit", "ldtr", "tr", "cpl"}
    wanted |= {
        f"{s}_{part}" for s in ("cs", "ss", "ds", "es", "fs", "gs", "ldtr", "tr") for part in ("base", "limit", "attr")
    }
    wanted |= {"dr0", "dr1", "dr2", "dr3", "dr6", "dr7", "icount", "pc_linear", "ia32_sysenter_esp"}
    assert wanted <= set(NAMES)


def test_read_all_agrees_with_read() -> None:
    with guest(b"\x90") as target:
        values = target.read_registers(1)
        assert len(values) == len(NAMES)
        assert list(values) == [target.read_register(1, number) for number in range(len(NAMES))]
        for name, value in zip(NAMES, values, strict=True):
            bits = guest_registers.DESCRIPTION.registers[NAMES.index(name)].bits
            assert value is None or 0 <= value < 1 << bits


def test_without_fpu_its_registers_are_unavailable() -> None:
    with guest(b"\x90") as target:
        assert register(target, "st0") is None
        assert register(target, "fctrl") is None
        assert register(target, "xmm7") is None
        for name in ("st0", "fctrl", "fop", "xmm0", "mxcsr"):
            with pytest.raises(TargetError, match=f"no {name}"):
                write(target, name, 1)


def test_with_fpu_its_registers_are_read_and_written() -> None:
    with guest(b"\x90") as target:
        target.machine.cpu.model = PENTIUM4
        assert register(target, "ftag") == 0x5555, "after RESET every register holds zero"
        write(target, "st1", 0x3FFF_8000_0000_0000_0000)
        assert register(target, "ftag") == 0x5551
        for name, value in (("fctrl", 0x37F), ("fstat", 0x3800), ("fiseg", 8), ("fioff", 0x1234), ("foseg", 0x10),
                            ("fooff", 0x5678), ("fop", 0x1D9), ("ftag", 0xFFFF), ("st7", 1 << 79), ("mxcsr", 0x1F80),
                            ("xmm3", 1 << 127 | 5)):  # fmt: skip
            write(target, name, value)
            assert register(target, name) == value, name


@pytest.mark.parametrize("name", ["eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi", "eip", "cr2", "dr0", "dr3"])
def test_plain_registers_keep_what_is_written(name: str) -> None:
    with guest(b"\x90") as target:
        others = {other: register(target, other) for other in NAMES if other not in (name, "pc_linear")}
        write(target, name, 0x1234_5678)
        assert register(target, name) == 0x1234_5678
        assert {other: register(target, other) for other in others} == others


def test_a_register_number_is_the_one_of_the_description() -> None:
    with guest(b"\x41") as target:  # inc ecx
        step(target)
        assert register(target, "ecx") == 1


def test_values_too_wide_are_refused() -> None:
    with guest(b"\x90") as target, pytest.raises(TargetError, match="16 bits"):
        write(target, "gdtr_limit", 0x1_0000)


def test_privilege_level_is_read_only() -> None:
    with guest(b"\x90") as target:
        write(target, "cpl", 0)
        with pytest.raises(TargetError, match="only be read"):
            write(target, "cpl", 3)


def test_time_goes_on_when_gdb_restores_registers() -> None:
    with guest(b"\x90" * 4) as target:
        before = target.read_registers(1)
        step(target)
        step(target)
        for number, value in enumerate(before):
            if value is not None:
                target.write_register(1, number, value)
        assert register(target, "icount") == 2
        assert register(target, "ia32_time_stamp_counter") == 2
        after = dict(zip(NAMES, target.read_registers(1), strict=True))
        changed = [name for name, value in zip(NAMES, before, strict=True) if after[name] != value]
        assert changed == ["ia32_time_stamp_counter", "icount"]


def test_eflags_keep_reserved_bits() -> None:
    with guest(b"\x90") as target:
        write(target, "eflags", 0xFFFF_FFFF & ~(1 << 17))
        assert register(target, "eflags") == 0x003D_7FD7
        write(target, "eflags", 0)
        assert register(target, "eflags") == 2
        with pytest.raises(TargetError, match="VM"):
            write(target, "eflags", 1 << 17)


def test_control_registers_follow_the_cpus_rules() -> None:
    with guest(b"\x90") as target:
        with pytest.raises(TargetError, match="#GP"):
            write(target, "cr0", 1 << 31)
        with pytest.raises(TargetError, match="#GP"):
            write(target, "cr4", 1 << 30)
        assert register(target, "cr0") == CR0_PE | CR0_ET
        write(target, "cr3", 0x5000)
        assert register(target, "cr3") == 0x5000


def test_debug_registers_keep_fixed_bits() -> None:
    with guest(b"\x90") as target:
        write(target, "dr7", 0)
        write(target, "dr6", 0)
        assert register(target, "dr7") == 0x400
        assert register(target, "dr6") == 0xFFFF_0FF0


def test_linear_pc_sets_eip() -> None:
    with guest(b"\x90" * 8) as target:
        write(target, "cs_base", 0x1000)
        write(target, "pc_linear", CODE + 4)
        assert register(target, "eip") == CODE + 4 - 0x1000
        assert register(target, "pc_linear") == CODE + 4


def test_alignment_checks_follow_the_flags() -> None:
    with guest(b"\x90") as target:
        target.machine.cpu.state.cr0 |= CR0_AM
        target.machine.cpu.set_cpl(3)
        write(target, "eflags", AC)
        assert target.machine.cpu.mmu.aligned_only
        write(target, "eflags", 0)
        assert not target.machine.cpu.mmu.aligned_only


def test_moving_eip_ends_a_repetition() -> None:
    with guest(b"\xf3\xaa\x90") as target:  # REP STOSB
        write(target, "ecx", 5)
        write(target, "edi", CODE + 0x1000)
        target.machine.cpu.repeating = True
        write(target, "eip", CODE)
        assert target.machine.cpu.repeating
        write(target, "eip", CODE + 2)
        assert not target.machine.cpu.repeating


def test_moving_eip_ends_a_halt() -> None:
    with guest(b"\xf4\x90\x90") as target:
        target.machine.cpu.state.halted = 1
        write(target, "eip", CODE)
        assert target.machine.cpu.state.halted == 1
        write(target, "eip", CODE + 1)
        assert target.machine.cpu.state.halted == 0


class TestSelectors:
    def test_protected_mode_reads_the_descriptor(self) -> None:
        with guest(b"\x90") as target:  # the BIOS's GDT: code 08h, data 10h
            write(target, "ds", 0x08)
            assert register(target, "ds_attr") == register(target, "cs_attr")
            write(target, "ds", 0)
            assert register(target, "ds_attr") == 0
            write(target, "ds", 0x10)
            assert register(target, "ds_limit") == 0xFFFF_FFFF

    @pytest.mark.parametrize(
        ("name", "selector", "message"),
        [
            ("ds", 0xFFF0, "beyond the limit"),
            ("ds", 0x14, "LDT"),
            ("ds", 0x1_0010, "16 bits"),
            ("ss", 0x0, "null"),
            ("ss", 0x08, "writable"),
            ("cs", 0x0, "null"),
            ("cs", 0x10, "not of a code segment"),
            ("ldtr", 0x08, "LDT"),
            ("tr", 0x10, "TSS"),
        ],
    )
    def test_refusals_change_nothing(self, name: str, selector: int, message: str) -> None:
        with guest(b"\x90") as target:
            target.machine.cpu.state.ldtr.load(0, 0, 0, 0)
            before = target.machine.cpu.state.pack()
            with pytest.raises(TargetError, match=message):
                write(target, name, selector)
            assert target.machine.cpu.state.pack() == before

    def test_real_mode_moves_the_base_only(self) -> None:
        with guest(b"\x90", bits=16, at=0x7C00) as target:
            write(target, "ds_limit", 0xFFFF_FFFF)
            write(target, "ds", 0x1234)
            assert target.machine.cpu.state.segments[DS].fields[:3] == (0x1234, 0x1_2340, 0xFFFF_FFFF)

    def test_same_selector_keeps_hidden_parts(self) -> None:
        with guest(b"\x90") as target:
            write(target, "fs_base", 0xABCD)
            write(target, "fs", register(target, "fs") or 0)
            assert register(target, "fs_base") == 0xABCD

    def test_code_selector_brings_its_privilege(self) -> None:
        with guest(b"\x90") as target:
            write(target, "cs", 0x0B)
            assert register(target, "cpl") == 3
            assert target.machine.cpu.mmu.user
            write(target, "cs", 0x08)
            assert register(target, "cpl") == 0
            assert not target.machine.cpu.mmu.user

    def test_hidden_attributes_change_how_code_is_decoded(self) -> None:
        with guest(b"\x40\x90") as target:  # INC EAX; in 16-bit code INC AX
            write(target, "eax", 0xFFFF)
            write(target, "cs_attr", target.machine.cpu.state.segments[CS].attributes & ~0x400)
            step(target)
            assert register(target, "eax") == 0

    def test_reserved_attribute_bit(self) -> None:
        with guest(b"\x90") as target, pytest.raises(TargetError, match="bit 9"):
            write(target, "ds_attr", 0x293)
