"""Owns Unicorn as an oracle: an instruction with given registers, flags and memory, in flat 32-bit or real 16-bit mode.

Its undefined flags are QEMU's, not a CPU's: mask them. It must not know what is compared with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import unicorn
from unicorn import x86_const

CODE: Final = 0x8000
"""Where code is put; the 32 KiB behind it are the oracle's."""

MEMORY_BYTES: Final = 0x11_0000
"""Mapped from 0 on, readable and writable: all that real mode reaches."""

# Unicorn's own annotations are partial.
_unicorn: Final[Any] = unicorn

_CODE_BYTES: Final = 0x8000
_SLOT_BYTES: Final = 32

_GPR: Final = (
    x86_const.UC_X86_REG_EAX, x86_const.UC_X86_REG_ECX, x86_const.UC_X86_REG_EDX, x86_const.UC_X86_REG_EBX,
    x86_const.UC_X86_REG_ESP, x86_const.UC_X86_REG_EBP, x86_const.UC_X86_REG_ESI, x86_const.UC_X86_REG_EDI,
)  # fmt: skip

_MEMORY_ERRORS: Final = frozenset(
    (
        unicorn.UC_ERR_READ_UNMAPPED, unicorn.UC_ERR_WRITE_UNMAPPED, unicorn.UC_ERR_FETCH_UNMAPPED,
        unicorn.UC_ERR_READ_PROT, unicorn.UC_ERR_WRITE_PROT, unicorn.UC_ERR_FETCH_PROT,
    )
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class UnicornOutcome:
    """What a run left behind.

    Attributes:
        gpr: EAX ECX EDX EBX ESP EBP ESI EDI.
        eip: IP in 16-bit mode. Relative to nothing: compare with `CODE` only through `advance_bytes`.
        eflags: all of EFLAGS.
        advance_bytes: EIP minus where the code began.
        vector: None, or the exception or interrupt that stopped the run; 14 stands for any access outside memory.
    """

    gpr: tuple[int, ...]
    eip: int
    eflags: int
    advance_bytes: int
    vector: int | None


class UnicornCpu:
    """One Unicorn engine, used again and again.

    Args:
        bits: 32 is flat protected mode at CPL 0 without paging; 16 is real mode with all segment bases 0.
    """

    def __init__(self, bits: Literal[16, 32] = 32) -> None:
        self._engine = _unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_32 if bits == 32 else unicorn.UC_MODE_16)
        self._engine.mem_map(0, MEMORY_BYTES)
        self._engine.hook_add(unicorn.UC_HOOK_INTR, self._on_interrupt)
        self._pristine = self._engine.context_save()
        self._slots: dict[bytes, int] = {}
        self._vector: int | None = None

    def _on_interrupt(self, _engine: object, number: int, _user_data: object) -> None:
        if self._vector is None:
            self._vector = number
        self._engine.emu_stop()

    def run(
        self,
        code: bytes,
        gpr: Sequence[int],
        eflags: int,
        memory: Mapping[int, bytes] | None = None,
        *,
        instructions: int = 1,
    ) -> UnicornOutcome:
        """Execute the first `instructions` of `code`; 0 means up to the end of `code`.

        Args:
            code: at most 32 bytes.
            gpr: eight registers, in ModRM order.
            eflags: status flags and DF; TF and VM are not for this oracle.
            memory: linear address to bytes, written before the run.
        """
        engine = self._engine
        for address, data in (memory or {}).items():
            engine.mem_write(address, data)
        start = self._place(code)
        for register, value in zip(_GPR, gpr, strict=True):
            engine.reg_write(register, value)
        engine.reg_write(x86_const.UC_X86_REG_EFLAGS, eflags | 2)
        self._vector = None
        try:
            engine.emu_start(start, start + len(code), count=instructions)
        except _unicorn.UcError as error:
            self._vector = _vector_of(error.errno)
        eip = engine.reg_read(x86_const.UC_X86_REG_EIP)
        outcome = UnicornOutcome(
            tuple(engine.reg_read(register) for register in _GPR),
            eip,
            engine.reg_read(x86_const.UC_X86_REG_EFLAGS),
            eip - start,
            self._vector,
        )
        if self._vector is not None:
            # Unicorn remembers an exception that was not delivered, and would make the next one a double fault.
            engine.context_restore(self._pristine)
        return outcome

    def reset(self) -> None:
        """Back to the segments of the beginning, which an instruction may have loaded; no code is left to jump to."""
        self._engine.context_restore(self._pristine)
        self._slots.clear()
        self._engine.mem_write(CODE, b"\x90" * _CODE_BYTES)
        self._engine.ctl_remove_cache(CODE, CODE + _CODE_BYTES)

    def read(self, address: int, length_bytes: int) -> bytes:
        """Memory as the last run left it."""
        return bytes(self._engine.mem_read(address, length_bytes))

    def _place(self, code: bytes) -> int:
        """An address for `code` that never held other code: Unicorn keeps its translations."""
        if len(code) > _SLOT_BYTES:
            raise ValueError(f"{len(code)} bytes do not fit in a slot of {_SLOT_BYTES}")
        start = self._slots.get(code)
        if start is None:
            if len(self._slots) * _SLOT_BYTES == _CODE_BYTES:
                self._slots.clear()
                self._engine.ctl_remove_cache(CODE, CODE + _CODE_BYTES)
            start = self._slots[code] = CODE + len(self._slots) * _SLOT_BYTES
            self._engine.mem_write(start, code.ljust(_SLOT_BYTES, b"\x90"))
        return start


def _vector_of(error_number: int) -> int:
    if error_number == unicorn.UC_ERR_INSN_INVALID:
        return 6
    if error_number in _MEMORY_ERRORS:
        return 14
    raise AssertionError(f"Unicorn failed with error {error_number}")
