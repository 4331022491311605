"""What Bochs makes of every form on a set of states: recorded, because a run takes a minute and few have Bochs.

`python -m tests.machine.fpu_golden` renews the record, with the packages that `tests.oracles.bochs` names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from tests.machine.fpu_batch import State, states
from tests.machine.fpu_forms import Form
from tests.machine.fpu_runs import Slot, plain_forms

RECORD = Path(__file__).with_name("fpu_golden.json")

APPROXIMATE = frozenset({"rcpps", "rcpss", "rsqrtps", "rsqrtss"})
TRANSCENDENTAL = frozenset({"f2xm1", "fsin", "fcos", "fsincos", "fptan", "fpatan", "fyl2x", "fyl2xp1"})
# FSTPNCE is undocumented: AMD's processors store from an empty register without a stack fault, Bochs does not.
NOT_COMPARED = APPROXIMATE | TRANSCENDENTAL | {"fstpnce"}
_COMPARES_TO_FLAGS = frozenset({"fcomi", "fcomip", "fucomi", "fucomip"})
_C1 = 0x200
_OVERFLOW_UNDERFLOW = 0x18
_STACK_FAULT = 0x40


def golden_states() -> list[State]:
    """Half of them with x87 exceptions unmasked."""
    return states(1, 48) + states(2, 48, unmasked=True)


def golden_forms() -> list[Form]:
    """What is compared."""
    return [form for form in plain_forms() if form.row not in NOT_COMPARED]


def canonical(form: Form, state: State, slot: Slot) -> bytes:
    """A result without what processors differ in, or Bochs has wrong."""
    data = bytearray(slot.data)
    if form.row in _COMPARES_TO_FLAGS or (form.row == "fld" and slot.fsw & _STACK_FAULT):
        # The SDM clears C1; AMD's processors leave it. FLD from an empty register to a full one: both faults at once.
        data[3] &= ~(_C1 >> 8)
    if form.row in ("psraw", "psrad"):
        # By 0, Bochs does not write the register, whose exponent should be ones then.
        for number in range(8):
            data[32 + 16 * number + 8 : 32 + 16 * number + 10] = b"\0\0"
    if form.row == "frndint" and _is_pseudo_denormal(Slot(state.image)):
        return b""  # Bochs leaves it as it is
    if form.row == "fscale" and slot.fsw & ~slot.fcw & _OVERFLOW_UNDERFLOW:
        return b""  # beyond what an unmasked response can represent processors give infinity or zero, Bochs wraps
    return bytes(data)


def _is_pseudo_denormal(slot: Slot) -> bool:
    return not slot.st(0) >> 64 & 0x7FFF and bool(slot.st(0) >> 63 & 1)


def digests(batch: Sequence[Form], given: Sequence[State], slots: Sequence[Slot]) -> dict[str, str]:
    """One for each form, over all states."""
    found = {}
    for n, form in enumerate(batch):
        digest = hashlib.sha256()
        for k, state in enumerate(given):
            digest.update(canonical(form, state, slots[n * len(given) + k]))
        found[form.name] = digest.hexdigest()[:16]
    return found


def recorded() -> dict[str, str]:
    """The record."""
    found: dict[str, str] = json.loads(RECORD.read_text())
    return found


if __name__ == "__main__":
    from tests.machine.fpu_runs import run_bochs

    _forms, _states = golden_forms(), golden_states()
    RECORD.write_text(json.dumps(digests(_forms, _states, run_bochs(_forms, _states)), indent=0) + "\n")
