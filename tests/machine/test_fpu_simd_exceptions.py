"""SSE exceptions: what faults, what is flagged and kept, against the host's CPU with its exceptions unmasked."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from machine.faults import GuestFault, Vector
from machine.fpustate import MXCSR, REGISTERS_BYTES
from machine.state import CR4_OSFXSR, CR4_OSXMMEXCPT
from tests.machine.fpu_batch import State, states
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
        image = bytearray(state.image)
        image[0:2] = b"\x7f\x03"  # no x87 error may be pending
        image[MXCSR : MXCSR + 4] = mxcsr.to_bytes(4, "little")
        found.append(State(bytes(image), state.operand, state.eax, state.eflags))
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
    batch = [(form, state) for form in _forms() for state in _given(11, 200)]
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
