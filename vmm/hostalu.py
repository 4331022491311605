"""Owns the encodings with which the host's CPU is asked for the result and flags of one ALU operation.

Operations, widths and operand order are those of `machine.alu`; it must not know how the ALU computes them.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from typing import Final

from machine.alu import Alu, build_alu
from machine.undefined import AMD_ZEN5, PROFILES, SPOTS, measure
from machine.undefinedprobes import Operands
from vmm.hostcpu import EFLAGS_WORD, WORDS_PER_STATE, HostCpu, HostCpuError

_MASK32: Final = 0xFFFF_FFFF
EAX, ECX, EDX, EBX, ESI, EDI = 0, 1, 2, 3, 6, 7


def _place_single(a: int, b: int, c: int) -> tuple[int, ...]:
    """EAX, ECX; the third operand in EDX."""
    return (a, b, c, 0, 0, 0, 0, 0)


def _place_count_last(a: int, b: int, c: int) -> tuple[int, ...]:
    """EAX, EDX, ECX."""
    return (a, c, b, 0, 0, 0, 0, 0)


def _place_double16(a: int, b: int, c: int) -> tuple[int, ...]:
    """DX:AX, CX."""
    return (a & 0xFFFF, b, a >> 16, c, 0, 0, 0, 0)


def _place_double32(a: int, b: int, c: int) -> tuple[int, ...]:
    """EDX:EAX, ECX."""
    return (a & _MASK32, b, a >> 32, c, 0, 0, 0, 0)


def _place_three_doubles(a: int, b: int, c: int) -> tuple[int, ...]:
    """EDX:EAX, EDI:ESI, ECX:EBX."""
    return (a & _MASK32, c >> 32, a >> 32, c & _MASK32, 0, 0, b & _MASK32, b >> 32)


def _eax(state: Sequence[int]) -> int:
    return state[EAX]


def _ax(state: Sequence[int]) -> int:
    return state[EAX] & 0xFFFF


def _al(state: Sequence[int]) -> int:
    return state[EAX] & 0xFF


def _ah(state: Sequence[int]) -> int:
    return state[EAX] >> 8 & 0xFF


def _edx(state: Sequence[int]) -> int:
    return state[EDX]


def _dx(state: Sequence[int]) -> int:
    return state[EDX] & 0xFFFF


def _dl(state: Sequence[int]) -> int:
    return state[EDX] & 0xFF


def _dx_ax(state: Sequence[int]) -> int:
    return (state[EDX] & 0xFFFF) << 16 | state[EAX] & 0xFFFF


def _edx_eax(state: Sequence[int]) -> int:
    return state[EDX] << 32 | state[EAX]


def _edi_esi(state: Sequence[int]) -> int:
    return state[EDI] << 32 | state[ESI]


_ACCUMULATOR: Final = {8: _al, 16: _ax, 32: _eax}
_DATA: Final = {8: _dl, 16: _dx, 32: _edx}
_DOUBLE: Final = {8: _ax, 16: _dx_ax, 32: _edx_eax}
_PLACE_DOUBLE: Final = {8: _place_single, 16: _place_double16, 32: _place_double32}


@dataclass(frozen=True, slots=True)
class Encoding:
    """How one operation is asked of a CPU.

    Attributes:
        code: the instruction, equal in 32-bit and 64-bit mode unless `legacy`.
        place: operands to EAX ECX EDX EBX ESP EBP ESI EDI.
        result: the same registers afterwards to the result.
        legacy: does not exist in 64-bit mode.
        immediate_bytes: operand b follows `code` as an immediate of so many bytes.
        divides: None, or tells whether a divide of a by b is without #DE.
    """

    code: bytes
    place: Callable[[int, int, int], tuple[int, ...]]
    result: Callable[[Sequence[int]], int]
    legacy: bool = False
    immediate_bytes: int = 0
    divides: Callable[[int, int], bool] | None = None

    def code_for(self, b: int) -> bytes:
        """The bytes to run, operand b included if it is an immediate."""
        if not self.immediate_bytes:
            return self.code
        return self.code + (b & (1 << self.immediate_bytes * 8) - 1).to_bytes(self.immediate_bytes, "little")


def _divides_unsigned(width: int) -> Callable[[int, int], bool]:
    mask = (1 << width) - 1

    def divides(dividend: int, divisor: int) -> bool:
        divisor &= mask
        return divisor != 0 and dividend // divisor <= mask

    return divides


def _divides_signed(width: int) -> Callable[[int, int], bool]:
    mask, sign = (1 << width) - 1, 1 << (width - 1)

    def divides(dividend: int, divisor: int) -> bool:
        divisor = ((divisor & mask) ^ sign) - sign
        dividend -= (dividend >> (2 * width - 1)) << (2 * width)
        if divisor == 0:
            return False
        quotient = abs(dividend) // abs(divisor)
        return quotient < sign or (quotient == sign and (dividend < 0) != (divisor < 0))

    return divides


def _encodings() -> dict[tuple[str, int], Encoding]:
    table: dict[tuple[str, int], Encoding] = {}
    for width, prefix, wide in ((8, b"", 0), (16, b"\x66", 1), (32, b"", 1)):
        accumulator = _ACCUMULATOR[width]
        # op r/m, r with eAX and eCX.
        for name, opcode in (
            ("add", 0x00), ("or", 0x08), ("adc", 0x10), ("sbb", 0x18), ("and", 0x20), ("sub", 0x28), ("xor", 0x30),
            ("cmp", 0x38), ("test", 0x84),
        ):  # fmt: skip
            table[name, width] = Encoding(prefix + bytes((opcode | wide, 0xC8)), _place_single, accumulator)
        table["xadd", width] = Encoding(prefix + bytes((0x0F, 0xC0 | wide, 0xC8)), _place_single, accumulator)
        # Groups 3, 4 and 5 on eAX; 40-4F would be REX prefixes.
        for name, opcode, extension in (("not", 0xF6, 2), ("neg", 0xF6, 3), ("inc", 0xFE, 0), ("dec", 0xFE, 1)):
            code = prefix + bytes((opcode | wide, 0xC0 | extension << 3))
            table[name, width] = Encoding(code, _place_single, accumulator)
        for name, extension in (("mul", 4), ("imul", 5)):
            code = prefix + bytes((0xF6 | wide, 0xC1 | extension << 3))
            table[name, width] = Encoding(code, _place_single, _DOUBLE[width])
        for name, extension, guard in (("div", 6, _divides_unsigned), ("idiv", 7, _divides_signed)):
            code = prefix + bytes((0xF6 | wide, 0xC1 | extension << 3))
            table[name, width] = Encoding(code, _PLACE_DOUBLE[width], _DOUBLE[width], divides=guard(width))
        # Group 2 with CL.
        for extension, name in enumerate(("rol", "ror", "rcl", "rcr", "shl", "shr", "sal", "sar")):
            code = prefix + bytes((0xD2 | wide, 0xC0 | extension << 3))
            table[name, width] = Encoding(code, _place_single, accumulator)
        table["cmpxchg", width] = Encoding(
            prefix + bytes((0x0F, 0xB0 | wide, 0xCA)), _place_count_last, _DATA[width]
        )  # cmpxchg eDX, eCX
        if width == 8:
            continue
        for name, opcode in (("shld", 0xA5), ("shrd", 0xAD)):  # eAX, eDX, CL
            table[name, width] = Encoding(prefix + bytes((0x0F, opcode, 0xD0)), _place_count_last, accumulator)
        for name, opcode in (("bt", 0xA3), ("bts", 0xAB), ("btr", 0xB3), ("btc", 0xBB)):
            table[name, width] = Encoding(prefix + bytes((0x0F, opcode, 0xC8)), _place_single, accumulator)
        for name, opcode in (("bsf", 0xBC), ("bsr", 0xBD), ("imul2", 0xAF)):  # eAX, eCX
            table[name, width] = Encoding(prefix + bytes((0x0F, opcode, 0xC1)), _place_single, accumulator)
        table["imul3", width] = Encoding(
            prefix + b"\x69\xc0", _place_single, accumulator, immediate_bytes=width // 8
        )  # imul eAX, eAX, b
        table["bswap", width] = Encoding(prefix + b"\x0f\xc8", _place_single, accumulator)
    table["cmpxchg8b", 64] = Encoding(
        # mov [esp-16], esi; mov [esp-12], edi; cmpxchg8b [esp-16]; mov esi, [esp-16]; mov edi, [esp-12]: in the red
        # zone, which signals leave alone. 64-bit code reads ESP as RSP.
        bytes.fromhex("89 74 24 F0 89 7C 24 F4 0F C7 4C 24 F0 8B 74 24 F0 8B 7C 24 F4"),
        _place_three_doubles,
        _edi_esi,
    )
    for name, code in (("aaa", b"\x37"), ("aas", b"\x3f"), ("daa", b"\x27"), ("das", b"\x2f")):
        table[name, 16] = Encoding(code, _place_single, _ax, legacy=True)
    table["salc", 8] = Encoding(b"\xd6", _place_single, _al, legacy=True)
    table["aam", 16] = Encoding(
        b"\xd4", _place_single, _ax, legacy=True, immediate_bytes=1, divides=lambda _ax, base: base & 0xFF != 0
    )
    table["aad", 16] = Encoding(b"\xd5", _place_single, _ax, legacy=True, immediate_bytes=1)
    # The first 64-bit CPUs lacked these two in 64-bit mode.
    table["lahf", 16] = Encoding(b"\x9f", _place_single, _ax, legacy=True)
    table["sahf", 16] = Encoding(b"\x9e", _place_single, _ax, legacy=True)
    return table


ENCODINGS: Final = _encodings()
"""By operation and width in bits, as `machine.alu` names them."""


class HostAlu:
    """Answers what the host's CPU gives for an ALU operation, undefined flags included."""

    def __init__(self, cpu: HostCpu) -> None:
        self._cpu = cpu

    def can_run(self, operation: str, width: int) -> bool:
        """Whether the host has the instruction: those that 64-bit mode lacks need a 32-bit code segment."""
        encoding = ENCODINGS.get((operation, width))
        return encoding is not None and (self._cpu.has_legacy_mode or not encoding.legacy)

    def results(self, operation: str, width: int, cases: Sequence[Operands]) -> list[tuple[int, int]]:
        """Result and EFLAGS of each case; of EFLAGS the status flags are loaded, and bit 1 and IF come out set.

        Raises:
            KeyError: no such operation.
            ValueError: a divide would raise #DE.
            HostCpuError: the host has no 32-bit code segment and the operation needs one.
        """
        encoding = ENCODINGS[operation, width]
        if encoding.divides is not None:
            for a, b, _c, _eflags in cases:
                if not encoding.divides(a, b):
                    raise ValueError(f"{operation} of {a:#x} by {b:#x} would raise #DE")
        if not encoding.immediate_bytes:
            return self._run(encoding, encoding.code, cases)
        results = []
        for code, same in groupby(cases, key=lambda case: encoding.code_for(case[1])):
            results += self._run(encoding, code, tuple(same))
        return results

    def _run(self, encoding: Encoding, code: bytes, cases: Sequence[Operands]) -> list[tuple[int, int]]:
        place, result = encoding.place, encoding.result
        states = array("I")
        for a, b, c, eflags in cases:
            states.extend(place(a, b, c))
            states.append(eflags)
        self._cpu.run(code, states, legacy=encoding.legacy)
        words = states.tolist()
        return [
            (result(words[i : i + WORDS_PER_STATE]), words[i + EFLAGS_WORD])
            for i in range(0, len(words), WORDS_PER_STATE)
        ]


def choose_alu(model: str = "host") -> Alu:
    """The ALU for a run.

    Args:
        model: "host" for the undefined flags of this machine's CPU, measured once in a process, or a name in
            `machine.undefined.PROFILES`. Where there is nothing to measure on (no x86-64 Linux), "host" is AMD_ZEN5,
            and `Alu.profile.unprobed` names every operation.

    Raises:
        KeyError: no such model.
    """
    if model != "host":
        return build_alu(PROFILES[model])
    return _measured_alu()


@cache
def _measured_alu() -> Alu:
    """The ALU that is as this machine's CPU; executable memory is kept only if that must be asked again."""
    try:
        cpu = HostCpu()
    except HostCpuError:
        return build_alu(replace(AMD_ZEN5, unprobed=tuple(SPOTS)))
    host = HostAlu(cpu)
    profile = measure(host)
    alu = build_alu(profile, host)
    if not profile.host_operations:
        cpu.close()
    return alu
