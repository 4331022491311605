"""Other encodings of the same operations on this host: memory operands, immediates, shifts by one.

The ALU knows one function per operation. That undefined flags do not depend on the form is a fact about this host's
CPU, and these tests are where it would show if it were otherwise.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable

import pytest

from machine.alu import Alu, build_alu
from machine.flags import STATUS_MASK
from machine.undefined import measure
from machine.undefinedprobes import Operands
from tests.machine.alu_cases import BIT_TESTS, DOUBLE_SHIFTS, SHIFTS, cases, run
from tests.oracles.host import host_cpu, require_host_alu
from vmm.hostalu import ENCODINGS
from vmm.hostcpu import EFLAGS_WORD, WORDS_PER_STATE

# [esp-16], in the red zone, as SIB and displacement.
STACK_SLOT = b"\x24\xf0"
WIDTHS = (8, 16, 32)

REGISTER_FORMS = [
    (operation, width)
    for (operation, width), encoding in ENCODINGS.items()
    if not encoding.legacy and operation not in ("bswap", "cmpxchg8b", "imul3", "sal")
]
"""Those whose code ends in a ModRM byte with a register as r/m."""

ACCUMULATOR_OPERATIONS = ("add", "or", "adc", "sbb", "and", "sub", "xor", "cmp")
"""In the order of the opcode extensions of 80h to 83h."""


@pytest.fixture(scope="module")
def alu() -> Alu:
    host = require_host_alu()
    return build_alu(measure(host), host)


def prefix(width: int) -> bytes:
    return b"\x66" if width == 16 else b""


def memory_form(operation: str, width: int) -> bytes:
    """The register form with its r/m register spilled to the stack slot around it."""
    code = ENCODINGS[operation, width].code
    register, middle = code[-1] & 7, code[-1] & 0x38
    spill = bytes((0x89, 0x44 | register << 3)) + STACK_SLOT
    reload = bytes((0x8B, 0x44 | register << 3)) + STACK_SLOT
    return spill + code[:-1] + bytes((0x44 | middle,)) + STACK_SLOT + reload


def expect_equal(alu: Alu, operation: str, width: int, code: bytes, wanted: list[Operands]) -> None:
    encoding = ENCODINGS[operation, width]
    states = array("I")
    for a, b, c, eflags in wanted:
        states.extend(encoding.place(a, b, c))
        states.append(eflags)
    host_cpu().run(code, states)
    for number, case in enumerate(wanted):
        state = states[number * WORDS_PER_STATE : (number + 1) * WORDS_PER_STATE]
        theirs = encoding.result(state), state[EFLAGS_WORD] & STATUS_MASK
        assert run(alu, operation, width, case) == theirs, (operation, width, code.hex(), [hex(x) for x in case])


def expect_equal_by_immediate(
    alu: Alu, operation: str, width: int, wanted: list[Operands], operand: int, code: Callable[[int], bytes]
) -> None:
    """Group the cases by the operand that is an immediate, and run each group."""
    groups: dict[int, list[Operands]] = {}
    for case in wanted:
        groups.setdefault(case[operand], []).append(case)
    for immediate, group in groups.items():
        expect_equal(alu, operation, width, code(immediate), group)


@pytest.mark.parametrize(("operation", "width"), REGISTER_FORMS)
def test_memory_operands(alu: Alu, operation: str, width: int) -> None:
    divides = ENCODINGS[operation, width].divides
    wanted = [
        case for case in cases(operation, width, random_cases=600) if divides is None or divides(case[0], case[1])
    ]
    if operation in BIT_TESTS:
        wanted = [case for case in wanted if case[1] < width]  # a memory bit string goes beyond its operand
    assert len(wanted) > 150
    expect_equal(alu, operation, width, memory_form(operation, width), wanted)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("operation", SHIFTS)
def test_shifts_by_an_immediate_and_by_one(alu: Alu, operation: str, width: int) -> None:
    wide = width != 8
    modrm = ENCODINGS[operation, width].code[-1]
    wanted = cases(operation, width, random_cases=0)
    expect_equal_by_immediate(
        alu, operation, width, wanted, 1, lambda count: prefix(width) + bytes((0xC0 | wide, modrm, count))
    )
    by_one = [case for case in wanted if case[1] == 1]
    expect_equal(alu, operation, width, prefix(width) + bytes((0xD0 | wide, modrm)), by_one)


@pytest.mark.parametrize("width", [16, 32])
@pytest.mark.parametrize("operation", DOUBLE_SHIFTS)
def test_double_shifts_by_an_immediate(alu: Alu, operation: str, width: int) -> None:
    opcode = ENCODINGS[operation, width].code[-2] & ~1
    expect_equal_by_immediate(
        alu,
        operation,
        width,
        cases(operation, width),
        2,
        lambda count: prefix(width) + bytes((0x0F, opcode, 0xD0, count)),
    )


@pytest.mark.parametrize("width", [16, 32])
@pytest.mark.parametrize("operation", BIT_TESTS)
def test_bits_by_an_immediate(alu: Alu, operation: str, width: int) -> None:
    modrm = 0xE0 | BIT_TESTS.index(operation) << 3
    wanted = [case for case in cases(operation, width) if case[1] < 256]
    expect_equal_by_immediate(
        alu, operation, width, wanted, 1, lambda index: prefix(width) + bytes((0x0F, 0xBA, modrm, index))
    )


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("operation", ACCUMULATOR_OPERATIONS)
def test_immediate_sources(alu: Alu, operation: str, width: int) -> None:
    modrm = 0xC0 | ACCUMULATOR_OPERATIONS.index(operation) << 3
    opcode = 0x80 if width == 8 else 0x81
    expect_equal_by_immediate(
        alu,
        operation,
        width,
        cases(operation, width, random_cases=60),
        1,
        lambda value: prefix(width) + bytes((opcode, modrm)) + value.to_bytes(width // 8, "little"),
    )
