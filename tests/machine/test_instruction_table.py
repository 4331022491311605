"""The instruction table as a whole: which opcodes this CPU has, that every row has cases, LOCK, lengths, undefined."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
from iced_x86 import OpKind

from machine.faults import Vector
from machine.flags import TF
from machine.instructions import CODE_NAMES, Row, codes
from machine.instructions.table import ROWS, add_rows
from tests.machine.instruction_cases import LOCK, OPCODES, SIZE_PREFIXES, Bits, by_mnemonic, decode
from tests.machine.instruction_checks import BITS, one_of_each, subject
from tests.machine.instruction_jobs import WORLDS, Layout, build_job, some_world
from tests.machine.opcode_map import CODES, MAP, opcode_map, reachable, render_codes, render_map
from tests.oracles.usermode import Job

# The decoder has these, but not with our options: FWAIT is an instruction of its own, 0F 1F is one of the reserved
# NOPs, and UD0 has a ModRM byte.
UNREACHABLE = frozenset(
    (
        "FSTENV_M14BYTE", "FSTENV_M28BYTE", "FSTCW_M2BYTE", "FENI", "FDISI", "FCLEX", "FINIT", "FSETPM",
        "FSAVE_M94BYTE", "FSAVE_M108BYTE", "FSTSW_M2BYTE", "FSTSW_AX", "NOP_RM16", "NOP_RM32", "UD0",
    )
)  # fmt: skip


def test_the_opcode_map_is_the_golden_one() -> None:
    """To be read against the SDM's opcode maps; `python -m tests.machine.opcode_map` writes it."""
    assert render_map() == MAP.read_text()


def test_the_codes_of_the_decoder_are_the_golden_ones() -> None:
    assert render_codes() == CODES.read_text()


def test_operand_size_makes_16_bit_code_of_32_bit_code() -> None:
    """All but 0xE3, JCXZ or JECXZ, whose name goes by the address size."""
    pairs = [
        (opcode_map(32), opcode_map(16, b"\x66")),
        (opcode_map(32, b"\x66"), opcode_map(16)),
        (opcode_map(32), opcode_map(32, b"\x67")),
        (opcode_map(16), opcode_map(16, b"\x67")),
    ]
    for one, other in pairs:
        assert {opcode for opcode in one if one[opcode] != other[opcode]} == {"e3"}


def test_every_code_can_be_met_or_has_a_reason() -> None:
    met = {code for code, _ in reachable()}
    assert {CODE_NAMES[code] for code in codes() if code not in met} == UNREACHABLE


def test_the_walk_meets_every_code() -> None:
    met = {code for code, _ in reachable()}
    walked = {case.instruction.code for bits in BITS for cases in by_mnemonic(bits).values() for case in cases}
    missing = {CODE_NAMES[code] for code in met - walked}
    # Of x87 instructions with registers, the walk takes some of the eight of each kind.
    assert {name for name in missing if not name.startswith("F")} == set()


@pytest.mark.parametrize("bits", BITS)
def test_every_row_has_cases(bits: Bits) -> None:
    counts = Counter({mnemonic: len(cases) for mnemonic, cases in by_mnemonic(bits).items()})
    assert {mnemonic for mnemonic in ROWS if not counts[mnemonic]} == set()
    assert counts.keys() == ROWS.keys()


def test_a_mnemonic_has_one_row() -> None:
    with pytest.raises(ValueError, match="has add already"):
        add_rows(Row("add", ROWS["add"].build))


def _job(code: bytes, bits: Bits) -> Job:
    surroundings = WORLDS[bits][0]
    eip = surroundings.code_linear - surroundings.code_base
    return Job(code[:16], (0,) * 8, TF, eip, surroundings.code_linear, surroundings.selectors)


@pytest.mark.parametrize("bits", BITS)
def test_opcodes_that_are_not_in_the_map_are_undefined(bits: Bits) -> None:
    """In user mode, with all registers 0 and no memory there: only the decoding can have been looked at."""
    undefined = 0
    for prefix in SIZE_PREFIXES:
        for opcode in OPCODES:
            for modrm in (*range(0, 0x40, 8), *range(0xC0, 0x100, 8)):
                code = prefix + opcode + bytes([modrm]) + bytes(12)
                if decode(code, bits) is None:
                    undefined += 1
                    seen = subject().run(_job(code, bits))
                    assert (seen.vector, seen.error_code) == (Vector.UD, 0), code.hex()
    assert undefined > 9000


LOCKABLE = frozenset(
    ("add", "adc", "and", "btc", "btr", "bts", "cmpxchg", "cmpxchg8b", "dec", "inc", "neg", "not", "or", "sbb", "sub",
     "xadd", "xchg", "xor")
)  # fmt: skip


@pytest.mark.parametrize("bits", BITS)
def test_lock(bits: Bits) -> None:
    """#UD before anything but a memory destination of the instructions that the SDM lists under LOCK."""
    counts: Counter[bool] = Counter()
    for original in one_of_each(bits):
        chance = random.Random(original.code)
        case, job = build_job(original, chance, some_world(original, chance), Layout())
        plain = subject().run(job)
        locked = subject().run(replace(job, code=bytes([LOCK]) + job.code))
        allowed = case.row.mnemonic in LOCKABLE and case.instruction.op0_kind == OpKind.MEMORY
        counts[allowed] += 1
        if allowed:
            assert (locked.gpr, locked.memory, locked.eflags) == (plain.gpr, plain.memory, plain.eflags), str(case)
            assert locked.vector == plain.vector
        else:
            assert (locked.vector, locked.gpr, locked.eip) == (Vector.UD, job.gpr, job.eip), str(case)
    assert counts[True] > 80
    assert counts[False] > 1000
