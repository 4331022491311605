"""SSE exceptions: what faults, what is flagged and kept, against the host's CPU with its exceptions unmasked."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import pytest

from machine.faults import GuestFault, Vector
from machine.fpustate import MXCSR, REGISTERS_BYTES
from machine.state import CR4_OSFXSR, CR4_OSXMMEXCPT
from tests.machine.fpu_batch import State, image, states
from tests.machine.fpu_forms import Form
from tests.machine.fpu_runs import floating_cpu, plain_forms
from vmm.blocks import BlockCache

_SOURCE = Path(__file__).parent.parent / "oracles" / "simd.c"
_ARITHMETIC = ("add", "sub", "mul", "div", "sqrt", "min", "max", "cmp", "comi", "ucomi", "cvt")


def _forms() -> list[Form]:
    """Arithmetic on XMM registers alone."""
    return [
        form
        for form in plain_forms()
        if form.row.startswith(_ARITHMETIC)
        and not form.has_memory
        and "_MM" not in form.name.replace("_XMM", "")
        and not (form.row.startswith("cmp") and form.data[-1] > 7)
    ]


def _given(seed: int, count: int) -> list[State]:
    """States with some SSE exceptions unmasked, some flagged already, and flushing to zero now and then."""
    chance = random.Random(seed)
    found = []
    for state in states(seed, count):
        mxcsr = int.from_bytes(state.image[MXCSR : MXCSR + 4], "little") & ~0x1F80
        mxcsr |= chance.choice((chance.getrandbits(6), 0x3F ^ 1 << chance.randrange(6))) << 7
        mxcsr |= chance.choice((0, 0, chance.getrandbits(6)))
        given = bytearray(state.image)
        given[0:2] = b"\x7f\x03"  # no x87 error may be pending
        given[MXCSR : MXCSR + 4] = mxcsr.to_bytes(4, "little")
        found.append(State(bytes(given), state.operand, state.eax, state.eflags))
    return found


def _directed() -> list[State]:
    """One lane overflows or underflows beyond what another does: products and quotients of powers of two."""
    powers = [0x7F00_0000, 0x4000_0001, 0x3F80_0000, 0x0080_0000, 0x2000_0000, 0x1F80_0001, 0x0040_0000, 0x3F00_0000]
    found = []
    for mask, extra in product((0x3F & ~8, 0x3F & ~16, 0x3F & ~24, 0x3F & ~32), (0, 0x8000, 0x40, 0x8040)):
        # Overflow, an exact product that is tiny, and two that are neither.
        first = [0x7F00_0000, 0x0080_0000, 0x3F80_0000, 0x3F80_0000]
        second = [0x4100_0000, 0x3F00_0000, 0x3F80_0000, 0x3F80_0000]
        values = [sum(value << 32 * n for n, value in enumerate(lanes)) for lanes in (first, first, second)]
        found.append(State(image(mxcsr=mask << 7 | extra, xmm=[*values, *[0] * 5]), bytes(16), 0, 0))
        for shift in range(8):
            lanes = powers[shift:] + powers[:shift]
            values = [sum(value << 32 * n for n, value in enumerate(lanes[at : at + 4])) for at in (0, 2, 4)]
            given = image(mxcsr=mask << 7 | extra, xmm=[*values, *[0] * 5])
            found.append(State(given, bytes(16), 0, 0))
    return found


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("simd") / "simd"
    subprocess.run(["gcc", "-O1", "-no-pie", "-o", str(program), str(_SOURCE)], check=True)
    return program


def _run_host(program: Path, batch: Sequence[tuple[Form, State]]) -> list[tuple[bytes, bool]]:
    given = b"".join(form.data.ljust(16, b"\x90") + state.image for form, state in batch)
    output = subprocess.run([str(program)], input=given, capture_output=True, check=True).stdout
    size = REGISTERS_BYTES + 4
    slots = [output[at : at + size] for at in range(0, len(output), size)]
    assert len(slots) == len(batch)
    return [(slot[:REGISTERS_BYTES], slot[REGISTERS_BYTES] == 1) for slot in slots]


def _run_ours(batch: Sequence[tuple[Form, State]], cr4: int) -> list[tuple[bytes, int | None]]:
    cpu = floating_cpu(1)
    cache = BlockCache(cpu)
    cpu.state.cr4 = cr4
    found: list[tuple[bytes, int | None]] = []
    for form, state in batch:
        block = cache._decode(form.data, big=True, cut=False, limit=1)
        cpu.state.fpu.unpack(state.image)
        vector = None
        try:
            block.operations[0]()
        except GuestFault as fault:
            vector = fault.vector
        found.append((cpu.state.fpu.pack()[:REGISTERS_BYTES], vector))
    cpu.memory.close()
    return found


def _registers(image: bytes) -> tuple[int, bytes]:
    return int.from_bytes(image[MXCSR : MXCSR + 4], "little"), image[160:]


def test_exceptions_and_flags_are_those_of_the_host(oracle: Path) -> None:
    batch = [(form, state) for form in _forms() for state in _given(11, 200) + _directed()]
    theirs, ours = _run_host(oracle, batch), _run_ours(batch, CR4_OSFXSR | CR4_OSXMMEXCPT)
    wrong = []
    for (form, state), (their_image, faulted), (our_image, vector) in zip(batch, theirs, ours, strict=True):
        if (vector is not None) != faulted or _registers(our_image) != _registers(their_image):
            wrong.append((form.name, [f"{_registers(item)[0]:04x}" for item in (state.image, our_image, their_image)]))
    assert not wrong, (len(wrong), wrong[:5])
    vectors = [vector for _, vector in ours]
    assert set(vectors) == {None, Vector.XM}
    assert vectors.count(Vector.XM) > len(vectors) // 10


def test_without_osxmmexcpt_an_unmasked_exception_is_an_undefined_opcode() -> None:
    batch = [(form, state) for form in _forms()[:20] for state in _given(8, 24)]
    with_vector, without = _run_ours(batch, CR4_OSFXSR | CR4_OSXMMEXCPT), _run_ours(batch, CR4_OSFXSR)
    assert [item[0] for item in with_vector] == [item[0] for item in without]
    translation: dict[int | None, int | None] = {None: None, Vector.XM: Vector.UD}
    assert [translation[vector] for _, vector in with_vector] == [vector for _, vector in without]
