"""The x87 environment in memory: what FSTENV, FSAVE and their inverses transfer, in its four formats.

It must not know how the bytes get to guest memory.

Source: SDM Vol. 1, "Saving the x87 FPU's State with FSTENV/FNSTENV and FSAVE/FNSAVE", figures of the four formats. What
the reserved halves read as was measured on current processors.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

from machine.fpustate import FCS, FDP, FDS, FIP, FOP, FSW_TOP_SHIFT, FpuState

ENVIRONMENT_BYTES: Final = {16: 14, 32: 28}
IMAGE_BYTES: Final = {16: 94, 32: 108}
_REGISTER_BYTES: Final = 10
_RESERVED: Final = 0xFFFF_0000  # the upper halves of 16-bit fields in a 32-bit environment

_FORMATS: Final = {16: Struct("<7H"), 32: Struct("<7I")}


def environment(fpu: FpuState, bits: int, *, protected: bool) -> bytes:
    """The environment as FNSTENV stores it.

    Args:
        fpu: the state.
        bits: operand size, 16 or 32.
        protected: pointers are selector and offset; in real and virtual-8086 mode they are linear addresses.
    """
    words = fpu.words
    fip, fcs, fdp, fds, fop = (words[at // 4] for at in (FIP, FCS, FDP, FDS, FOP))
    fop &= 0x7FF
    head = (fpu.fcw, fpu.fsw, fpu.tags)
    if protected:
        if bits == 16:
            return _FORMATS[16].pack(*head, fip & 0xFFFF, fcs, fdp & 0xFFFF, fds)
        return _FORMATS[32].pack(*(_RESERVED | value for value in head), fip, fop << 16 | fcs, fdp, _RESERVED | fds)
    instruction, operand = (fcs << 4) + fip & 0xFFFF_FFFF, (fds << 4) + fdp & 0xFFFF_FFFF
    if bits == 16:
        return _FORMATS[16].pack(
            *head,
            instruction & 0xFFFF,
            (instruction >> 16 & 0xF) << 12 | fop,
            operand & 0xFFFF,
            (operand >> 16 & 0xF) << 12,
        )
    return _FORMATS[32].pack(
        *(_RESERVED | value for value in head),
        _RESERVED | instruction & 0xFFFF,
        instruction >> 16 << 12 | fop,
        _RESERVED | operand & 0xFFFF,
        operand >> 16 << 12,
    )


def load_environment(fpu: FpuState, data: bytes, bits: int, *, protected: bool) -> None:
    """FLDENV: the inverse of `environment`; registers keep their contents, only their tags say empty or not.

    The registers stay the same physical ones, so ST(i) changes with TOP.
    """
    fcw, fsw, tags, fip, fcs, fdp, fds = _FORMATS[bits].unpack(data[: ENVIRONMENT_BYTES[bits]])
    words = fpu.words
    if protected:
        fop = fcs >> 16 & 0x7FF if bits == 32 else 0
    else:
        fop = fcs & 0x7FF
        high = 0xF if bits == 16 else 0xFFFF
        fip, fdp = fip & 0xFFFF | (fcs >> 12 & high) << 16, fdp & 0xFFFF | (fds >> 12 & high) << 16
        fcs = fds = 0
    fpu.turn(fsw >> FSW_TOP_SHIFT & 7)
    words[FIP // 4], words[FDP // 4] = fip, fdp
    words[FCS // 4], words[FDS // 4], words[FOP // 4] = fcs & 0xFFFF, fds & 0xFFFF, fop
    fpu.tags = tags
    fpu.fsw = fsw
    fpu.fcw = fcw


def registers(fpu: FpuState) -> bytes:
    """ST(0) to ST(7), ten bytes each: what FSAVE stores behind the environment."""
    return b"".join(fpu.st(number).to_bytes(_REGISTER_BYTES, "little") for number in range(8))


def load_registers(fpu: FpuState, data: bytes) -> None:
    """FRSTOR's part behind the environment: 80 bytes."""
    for number in range(8):
        at = number * _REGISTER_BYTES
        fpu.set_st(number, int.from_bytes(data[at : at + _REGISTER_BYTES], "little"))
