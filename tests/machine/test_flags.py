"""EFLAGS: the layout against the SDM's figure, the parity table, and the condition codes against two CPUs."""

from __future__ import annotations

from array import array
from itertools import product

import pytest

from machine import flags
from machine.flags import CONDITIONS, DEFINED_MASK, NAMES, PARITY, STATUS_MASK, describe
from tests.oracles.host import host_cpu, require_host_alu
from tests.oracles.unicorn_cpu import UnicornCpu

STATUS_BITS = [1 << bit for bit in range(32) if STATUS_MASK >> bit & 1]
ALL_STATUS = [sum(bits) for bits in product(*((0, bit) for bit in STATUS_BITS))]


def setcc(condition: int) -> bytes:
    """SETcc AL."""
    return bytes((0x0F, 0x90 | condition, 0xC0))


def test_layout_is_that_of_the_manual() -> None:
    # SDM Vol. 1, figure "EFLAGS Register".
    assert dict(NAMES) == {
        "CF": 0x1, "PF": 0x4, "AF": 0x10, "ZF": 0x40, "SF": 0x80, "TF": 0x100, "IF": 0x200, "DF": 0x400, "OF": 0x800,
        "IOPL": 0x3000, "NT": 0x4000, "RF": 0x1_0000, "VM": 0x2_0000, "AC": 0x4_0000, "VIF": 0x8_0000,
        "VIP": 0x10_0000, "ID": 0x20_0000,
    }  # fmt: skip
    assert STATUS_MASK == 0x8D5
    assert DEFINED_MASK == 0x3F_7FD5


@pytest.mark.parametrize("name", [name for name, _ in NAMES])
def test_bit_numbers_belong_to_their_masks(name: str) -> None:
    bit = getattr(flags, f"{name}_BIT")
    assert getattr(flags, name) >> bit == (3 if name == "IOPL" else 1)


def test_parity_counts_ones_of_a_byte() -> None:
    assert len(PARITY) == 256
    assert [PARITY[value] for value in (0, 1, 3, 7, 0xFF, 0x80, 0x81)] == [4, 0, 4, 0, 4, 0, 4]
    assert sum(1 for value in PARITY if value == flags.PF) == 128


@pytest.mark.parametrize("condition", range(16))
def test_conditions_are_those_of_the_host(condition: int) -> None:
    require_host_alu()
    states = array("I")
    for eflags in ALL_STATUS:
        states.extend((0, 0, 0, 0, 0, 0, 0, 0, eflags))
    host_cpu().run(setcc(condition), states)
    assert [CONDITIONS[condition](eflags) for eflags in ALL_STATUS] == [bool(al) for al in states[::9]]


@pytest.mark.parametrize("condition", range(16))
def test_conditions_are_those_of_unicorn(condition: int) -> None:
    cpu = UnicornCpu(32)
    theirs = [bool(cpu.run(setcc(condition), [0] * 8, eflags).gpr[0]) for eflags in ALL_STATUS]
    assert [CONDITIONS[condition](eflags) for eflags in ALL_STATUS] == theirs


def test_conditions_look_at_status_flags_only() -> None:
    for condition, eflags in product(CONDITIONS, ALL_STATUS):
        assert condition(eflags) == condition(eflags | 0xFFFF_FFFF & ~STATUS_MASK)


def test_describe_names_what_is_set_highest_first() -> None:
    assert describe(0x3246) == "IOPL=3 IF ZF PF"
    assert describe(0x2) == "-"
    assert describe(0x0003_0001) == "VM RF CF"
