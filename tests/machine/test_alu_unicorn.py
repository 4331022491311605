"""The ALU against Unicorn, a second opinion that shares nothing with the host's silicon: undefined flags are masked."""

from __future__ import annotations

import pytest

from machine.alu import build_alu
from machine.faults import GuestFault
from machine.flags import ALWAYS_SET
from machine.undefined import is_result_undefined, undefined_flags
from tests.machine.alu_cases import OPERATIONS, cases, run
from tests.oracles.unicorn_cpu import UnicornCpu
from vmm.hostalu import ENCODINGS

ALU = build_alu()
CASES_PER_OPERATION = 700


@pytest.fixture(scope="module")
def unicorn_cpu() -> UnicornCpu:
    return UnicornCpu(32)


@pytest.mark.parametrize(("operation", "width"), OPERATIONS)
def test_equals_unicorn_where_the_manual_defines(unicorn_cpu: UnicornCpu, operation: str, width: int) -> None:
    encoding = ENCODINGS[operation, width]
    wanted = cases(operation, width, random_cases=300)
    for case in wanted[:: -(-len(wanted) // CASES_PER_OPERATION)]:
        a, b, c, eflags = case
        code = encoding.code_for(b)
        registers = list(encoding.place(a, b, c))
        registers[4] = 0x1000
        theirs = unicorn_cpu.run(code, registers, eflags, instructions=0)
        where = f"{operation}{width} a={a:#x} b={b:#x} c={c:#x} flags={eflags:#x}"
        if theirs.vector is not None:
            with pytest.raises(GuestFault) as caught:
                run(ALU, operation, width, case)
            assert caught.value.vector == theirs.vector, where
            continue
        result, out = run(ALU, operation, width, case)
        defined = ~undefined_flags(operation, width, a, b, c)
        assert (out | ALWAYS_SET) & defined == theirs.eflags & defined, where
        if not is_result_undefined(operation, width, a, b, c):
            assert result == encoding.result(theirs.gpr), where
