"""The ALU against this host's CPU: results and every flag, defined or not.

Tried on 52 mutants of machine/alu, made by hand: each carry, overflow, auxiliary and parity term dropped or moved by
a bit, ADC and SBB without CF, CMP and BSF that write, INC and DEC that lose CF or miss OF, counts masked to 6 bits,
RCL modulo the width, SAR without sign, every row of the OF tables of rotates, SHLD and SHRD filled with zeros, limits
of IMUL, DIV and IDIV off by one, division rounded down, DAS without the borrow of its first step, DAA from 9Bh on.
51 failed here; the last one (SF taken twice in SHLD) changes nothing. Of the mutants of defined flags and results
none survived test_alu_unicorn.py either.
"""

from __future__ import annotations

import pytest

from machine.alu import Alu, build_alu
from machine.faults import GuestFault, Vector
from machine.flags import STATUS_MASK
from machine.undefined import measure
from machine.undefinedprobes import Operands
from tests.machine.alu_cases import OPERATIONS, cases, run
from tests.oracles.host import require_host_alu
from vmm.hostalu import ENCODINGS, HostAlu


@pytest.fixture(scope="module")
def host() -> HostAlu:
    return require_host_alu()


@pytest.fixture(scope="module")
def alu(host: HostAlu) -> Alu:
    return build_alu(measure(host), host)


def expect_equal(alu: Alu, host: HostAlu, operation: str, encoding: str, width: int, wanted: list[Operands]) -> None:
    theirs = host.results(encoding, width, wanted)
    for case, (result, eflags) in zip(wanted, theirs, strict=True):
        ours = run(alu, operation, width, case)
        assert (ours[0], ours[1]) == (result, eflags & STATUS_MASK), (
            f"{encoding}{width} a={case[0]:#x} b={case[1]:#x} c={case[2]:#x} flags={case[3]:#x}: "
            f"ours {ours[0]:#x} {ours[1]:#x}, host {result:#x} {eflags & STATUS_MASK:#x}"
        )


@pytest.mark.parametrize(("operation", "width"), OPERATIONS)
def test_equals_the_host_in_result_and_all_flags(alu: Alu, host: HostAlu, operation: str, width: int) -> None:
    if not host.can_run(operation, width):
        pytest.skip(f"{operation} needs a 32-bit code segment, which this kernel does not offer")
    divides = ENCODINGS[operation, width].divides
    wanted = [case for case in cases(operation, width) if divides is None or divides(case[0], case[1])]
    assert len(wanted) > 150
    expect_equal(alu, host, operation, operation, width, wanted)


@pytest.mark.parametrize("width", [8, 16, 32])
def test_sal_is_shl_also_by_its_own_encoding(alu: Alu, host: HostAlu, width: int) -> None:
    expect_equal(alu, host, "shl", "sal", width, cases("shl", width))


@pytest.mark.parametrize("width", [16, 32])
def test_imul_with_an_immediate_is_imul_of_two_operands(alu: Alu, host: HostAlu, width: int) -> None:
    wanted = sorted(cases("imul2", width, random_cases=60), key=lambda case: case[1])
    expect_equal(alu, host, "imul2", "imul3", width, wanted)


@pytest.mark.parametrize(
    ("operation", "width"), [*((op, w) for op in ("div", "idiv") for w in (8, 16, 32)), ("aam", 16)]
)
def test_divide_error_exactly_where_the_quotient_does_not_fit(alu: Alu, operation: str, width: int) -> None:
    divides = ENCODINGS[operation, width].divides
    assert divides is not None
    faulting = [case for case in cases(operation, width) if not divides(case[0], case[1])]
    assert len(faulting) > 50
    for case in faulting:
        with pytest.raises(GuestFault) as caught:
            run(alu, operation, width, case)
        assert caught.value.vector == Vector.DE
        assert caught.value.error_code is None


@pytest.mark.parametrize(("operation", "width"), OPERATIONS)
def test_other_bits_of_eflags_pass_through(alu: Alu, operation: str, width: int) -> None:
    others = 0xFFFF_FFFF & ~STATUS_MASK
    for a, b, c, eflags in cases(operation, width, random_cases=60)[::97]:
        try:
            plain = run(alu, operation, width, (a, b, c, eflags))
        except GuestFault:
            continue
        assert run(alu, operation, width, (a, b, c, eflags | others)) == (plain[0], plain[1] | others)
