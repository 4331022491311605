"""A mistake planted in the translator, for tests of what finds it.

It must not know who looks for it.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from iced_x86 import Decoder, Instruction

from machine.instructions import Effect
from vmm.native import translator
from vmm.native.unit import Draft


def plant(monkeypatch: pytest.MonkeyPatch, guest: bytes, emit: Callable[[Draft], None]) -> None:
    """Have an instruction emitted otherwise than it should be."""
    emit_right = translator._emit_row

    def emit_row(draft: Draft, instruction: Instruction, name: str, effect: Effect, data: bytes, at: Decoder) -> bool:
        offset = instruction.ip32 - draft.eip
        if data[offset : offset + instruction.len] != guest:
            return emit_right(draft, instruction, name, effect, data, at)
        emit(draft)
        return True

    monkeypatch.setattr(translator, "_emit_row", emit_row)
