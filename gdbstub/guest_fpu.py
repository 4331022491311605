"""The registers of x87 and SSE as gdb sees them; a CPU model that lacks them has them unavailable.

It knows where the state keeps them; what instructions do with them is not known here.

Source: gdb's documentation, "i386 Features"; SDM Vol. 1, "x87 FPU Execution Environment" and "MXCSR".
"""

from __future__ import annotations

from collections.abc import Callable

from gdbstub.guest_access import Access
from gdbstub.target import Field, FlagsType, Register, TargetError, TypeDefinition, UnionType, VectorType
from machine.cpu import Cpu
from machine.fpustate import FCS, FDP, FDS, FIP, FOP, FpuState

# gdb's names for the pointers to the last instruction and operand, the place of each in the state, and its bits.
_POINTERS = (("fiseg", FCS, 0xFFFF), ("fioff", FIP, 0xFFFF_FFFF), ("foseg", FDS, 0xFFFF), ("fooff", FDP, 0xFFFF_FFFF))
_OPCODE_BITS = 0x7FF
_MXCSR_BITS = ("IE", "DE", "ZE", "OE", "UE", "PE", "DAZ", "IM", "DM", "ZM", "OM", "UM", "PM")
_VECTORS = (
    ("v4_float", VectorType("v4f", "ieee_single", 4)),
    ("v2_double", VectorType("v2d", "ieee_double", 2)),
    ("v16_int8", VectorType("v16i8", "int8", 16)),
    ("v8_int16", VectorType("v8i16", "int16", 8)),
    ("v4_int32", VectorType("v4i32", "int32", 4)),
    ("v2_int64", VectorType("v2i64", "int64", 2)),
)
SSE_TYPES: tuple[TypeDefinition, ...] = (
    *(vector for _, vector in _VECTORS),
    UnionType("vec128", (*((name, vector.id) for name, vector in _VECTORS), ("uint128", "uint128"))),
    FlagsType("i386_mxcsr", 4, (*(Field(name, bit, bit) for bit, name in enumerate(_MXCSR_BITS)), Field("FZ", 15, 15))),
)


def _access(register: Register, load: Callable[[FpuState], int], store: Callable[[FpuState, int], None]) -> Access:
    def read(cpu: Cpu) -> int | None:
        return load(cpu.state.fpu) if cpu.model.has_fpu else None

    def write(cpu: Cpu, value: int) -> None:
        if not cpu.model.has_fpu:
            raise TargetError(f"This CPU has no {register.name}.")
        store(cpu.state.fpu, value)

    return Access(register, read, write)


def _st(number: int) -> Access:
    return _access(
        Register(f"st{number}", 80, "i387_ext", group="float"),
        lambda fpu: fpu.st(number),
        lambda fpu, value: fpu.set_st(number, value),
    )


def _xmm(number: int) -> Access:
    return _access(
        Register(f"xmm{number}", 128, "vec128", group="vector"),
        lambda fpu: fpu.xmm(number),
        lambda fpu, value: fpu.set_xmm(number, value),
    )


def _word(name: str, at: int, mask: int) -> Access:
    def store(fpu: FpuState, value: int) -> None:
        fpu.words[at // 4] = value & mask

    return _access(Register(name, group="float"), lambda fpu: fpu.words[at // 4], store)


def _part(name: str, attribute: str, mask: int) -> Access:
    def load(fpu: FpuState) -> int:
        value: int = getattr(fpu, attribute)
        return value

    return _access(Register(name, group="float"), load, lambda fpu, value: setattr(fpu, attribute, value & mask))


def _set_mxcsr(fpu: FpuState, value: int) -> None:
    fpu.mxcsr = value


X87 = (
    *(_st(number) for number in range(8)),
    _part("fctrl", "fcw", 0xFFFF),
    _part("fstat", "fsw", 0xFFFF),
    _part("ftag", "tags", 0xFFFF),
    *(_word(name, at, mask) for name, at, mask in _POINTERS),
    _word("fop", FOP, _OPCODE_BITS),
)
SSE = (
    *(_xmm(number) for number in range(8)),
    _access(Register("mxcsr", type="i386_mxcsr", group="vector"), lambda fpu: fpu.mxcsr, _set_mxcsr),
)
