"""Routines of the TC that save, load and switch the guest's FPU: FXSAVE, FXRSTOR, LDMXCSR, FNINIT, and CR0.TS.

The registers are the host's by then, which a gate in the fragment has seen to. What the host would do otherwise than
the guest's CPU is made good on the way: the pointers to the last instruction, the mask of MXCSR, reserved bits. What is
not plain (an area in two pages, a reserved bit of MXCSR, a pending exception) is a callout. They must not know
fragments.

Source: SDM Vol. 2A, "CLTS", "FXSAVE", "FXRSTOR", "FINIT/FNINIT", "LDMXCSR"; APM Vol. 5, "FXSAVE", on what it leaves
out.
"""

from __future__ import annotations

from collections.abc import Callable

from machine.fpustate import (
    FCW,
    FCW_FIXED,
    FCW_WRITABLE,
    FSW_EXCEPTIONS,
    FXSAVE_BYTES,
    MXCSR,
    MXCSR_MASK,
    MXCSR_WRITABLE,
    REGISTERS_BYTES,
    XMM,
)
from machine.memory import PAGE_BYTES
from machine.state import CR0_TS, MASK32
from vmm.native.operands import EAX, ECX, EDX, R8, R9D, RAX, Label, Memory, dword
from vmm.native.routine import Routine, linear
from vmm.native.stateblock import field

# MOVUPS between XMM0 and memory with a displacement of four bytes: [RAX + ...], gs:[R9D + ...].
_FROM_PAGE, _TO_PAGE = b"\x0f\x10\x80", b"\x0f\x11\x80"
_FROM_GUEST, _TO_GUEST = b"\x65\x67\x41\x0f\x10\x81", b"\x65\x67\x41\x0f\x11\x81"
_XMM_BYTES = 16
_FOP_MASK = 0x7FF
_SELECTOR_MASK = 0xFFFF
# Where an image has a pointer, its field in the state block, and the bits that it has.
_POINTERS = (
    (8, "fpu_ip", MASK32),
    (12, "fpu_cs", _SELECTOR_MASK),
    (16, "fpu_dp", MASK32),
    (20, "fpu_ds", _SELECTOR_MASK),
)
_TAGS_AND_OPCODE = 4  # the doubleword with the tags in byte 0, and FOP in the upper half


def emit_fpu_routines(begin: Callable[[str], Routine]) -> None:
    """Emit all; `begin` begins one by name. The address of the operand comes in R9D."""
    _emit_fxsave(begin("fxsave"))
    _emit_fxrstor(begin("fxrstor"))
    _emit_ldmxcsr(begin("ldmxcsr"))
    _emit_fninit(begin("fninit"))
    _emit_clts(begin("clts"))
    _emit_load_cr0(begin("load cr0"))


def _move(writer: Routine, form: bytes, at: int) -> None:
    """Move XMM0 from or to offset `at` of the page at RAX or of the guest's area at R9D."""
    writer.asm.raw(form + at.to_bytes(4, "little"))


def _need_one_page(writer: Routine) -> None:
    """Fail unless the area at R9D is aligned, and in one page, so that only its first access can fault."""
    emit = writer.emit
    emit("mov", ECX, R9D)
    emit("and", ECX, 15)
    writer.unless("e")
    emit("mov", ECX, R9D)
    emit("and", ECX, PAGE_BYTES - 1)
    emit("cmp", ECX, PAGE_BYTES - FXSAVE_BYTES)
    writer.unless("be")


def _emit_fxsave(writer: Routine) -> None:
    """The registers by way of the page that they are kept in, which is stale while they are the host's."""
    emit = writer.emit
    emit("mov", field("routine_return"), R8)
    _need_one_page(writer)
    emit("or", linear(R9D), 0)  # a fault while every register is the guest's still
    emit("mov", RAX, field("fpu_page"))
    emit("fxsave", Memory(0, RAX))
    emit("mov", ECX, dword(RAX, _TAGS_AND_OPCODE))
    emit("and", ECX, 0xFF)
    emit("mov", EDX, field("fpu_op"))
    emit("shl", EDX, 16)
    emit("or", ECX, EDX)
    emit("mov", dword(RAX, _TAGS_AND_OPCODE), ECX)
    for at, name, _ in _POINTERS:
        emit("mov", ECX, field(name))
        emit("mov", dword(RAX, at), ECX)
    emit("mov", ECX, MXCSR_WRITABLE)
    emit("mov", dword(RAX, MXCSR_MASK), ECX)
    for at in range(0, REGISTERS_BYTES, _XMM_BYTES):
        _move(writer, _FROM_PAGE, at)
        _move(writer, _TO_GUEST, at)
    _move(writer, _FROM_PAGE, XMM)
    writer.succeed()
    writer.fail()


def _emit_fxrstor(writer: Routine) -> None:
    """The same the other way round."""
    emit = writer.emit
    emit("mov", field("routine_return"), R8)
    _need_one_page(writer)
    # FCW as it can be; nothing may be pending, so that FSW is what it says.
    emit("mov", EDX, linear(R9D, FCW))
    emit("mov", ECX, EDX)
    emit("shr", ECX, 16)
    emit("and", EDX, FCW_WRITABLE)
    emit("or", EDX, FCW_FIXED)
    emit("mov", EAX, EDX)
    emit("not", EAX)
    emit("and", EAX, FSW_EXCEPTIONS)
    emit("or", EAX, 0x8080)  # ES and B
    emit("and", EAX, ECX)
    writer.unless("e")
    emit("shl", ECX, 16)
    emit("or", ECX, EDX)
    emit("mov", RAX, field("fpu_page"))
    emit("mov", EDX, linear(R9D, MXCSR))
    emit("and", EDX, MASK32 & ~MXCSR_WRITABLE)
    writer.unless("e")
    for at in range(0, REGISTERS_BYTES, _XMM_BYTES):
        _move(writer, _FROM_GUEST, at)
        _move(writer, _TO_PAGE, at)
    emit("mov", dword(RAX, FCW), ECX)
    emit("fxrstor", Memory(0, RAX))
    for at, name, mask in _POINTERS:
        emit("mov", ECX, linear(R9D, at))
        if mask != MASK32:
            emit("and", ECX, mask)
        emit("mov", field(name), ECX)
    emit("mov", ECX, linear(R9D, _TAGS_AND_OPCODE))
    emit("shr", ECX, 16)
    emit("and", ECX, _FOP_MASK)
    emit("mov", field("fpu_op"), ECX)
    writer.succeed()
    writer.fail()


def _emit_ldmxcsr(writer: Routine) -> None:
    """The host may know bits that the guest's CPU refuses."""
    emit = writer.emit
    emit("mov", field("routine_return"), R8)
    emit("mov", ECX, linear(R9D))
    emit("mov", EDX, ECX)
    emit("and", EDX, MASK32 & ~MXCSR_WRITABLE)
    writer.unless("e")
    emit("mov", field("parked"), ECX)
    emit("ldmxcsr", field("parked"))
    writer.succeed()
    writer.fail()


def _emit_fninit(writer: Routine) -> None:
    """The pointers are 0 then."""
    emit = writer.emit
    emit("mov", field("routine_return"), R8)
    emit("fninit")
    for name in ("fpu_ip", "fpu_cs", "fpu_dp", "fpu_ds", "fpu_op"):
        emit("mov", field(name), 0)
    writer.succeed()


def _open_gates(writer: Routine) -> None:
    """CR0.TS is clear."""
    for name in ("fpu_gate", "sse_gate"):
        writer.emit("mov", RAX, field(f"{name}_without_ts"))
        writer.emit("mov", field(name), RAX)


def _emit_clts(writer: Routine) -> None:
    """The registers have been loaded, if they may be used but for TS."""
    emit = writer.emit
    emit("mov", field("routine_return"), R8)
    emit("and", field("cr0"), MASK32 & ~CR0_TS)
    _open_gates(writer)
    writer.succeed()


def _emit_load_cr0(writer: Routine) -> None:
    """MOV CR0 with the value in R9D, if it changes TS alone."""
    emit, is_clear = writer.emit, Label()
    emit("mov", field("routine_return"), R8)
    emit("mov", EAX, R9D)
    emit("mov", ECX, field("cr0"))
    emit("xor", EAX, ECX)
    emit("and", EAX, MASK32 & ~CR0_TS)
    writer.unless("e")
    emit("mov", field("cr0"), R9D)
    emit("and", R9D, CR0_TS)
    emit("je", is_clear)
    for name in ("fpu_gate", "sse_gate"):
        emit("mov", field(name), 0)
    writer.succeed()
    writer.asm.bind(is_clear)
    _open_gates(writer)
    writer.succeed()
    writer.fail()
