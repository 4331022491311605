"""Routines for far transfers in real mode: JMP, CALL, RET, INT n and IRET, with 16-bit operands and a 16-bit stack.

A selector leads to the dispatch table of its code by a look-up in the state block; what it does not have, and whatever
is not plain (a stack that wraps, limits exceeded, flags that want more), is a callout. They must not know fragments.

Source: SDM Vol. 2, "JMP", "CALL", "RET", "INT n", "IRET/IRETD"; Vol. 3A, "8086 Emulation".
"""

from __future__ import annotations

from machine.flags import AC, IOPL, NT, TF
from machine.state import CS, SS
from vmm.native.operands import (
    CX,
    DX,
    EAX,
    ECX,
    EDX,
    R8D,
    R9,
    R9D,
    R12D,
    R12W,
    R14,
    R15,
    RAX,
    RCX,
    Memory,
    address,
)  # fmt: skip
from vmm.native.routine import Routine, linear
from vmm.native.stateblock import (
    OFFSETS,
    REAL_CODE,
    REAL_SHIFTS,
    REAL_SPACES,
    field,
    segment_base,
    segment_bound,
    word,
)  # fmt: skip

_WORD_BYTES = 2
_SEGMENT_BYTES = 0x1_0000


def emit_far_jump(writer: Routine) -> None:
    """To R9D:R8D."""
    writer.emit("mov", field("target_eip"), R8D)
    _find(writer)
    _enter(writer)


def emit_far_call(writer: Routine) -> None:
    """To R9D:R8D; CS and `routine_next` are pushed."""
    writer.emit("mov", field("target_eip"), R8D)
    _find(writer)
    _need_room_to_push(writer, 2)
    _push_return_address(writer)
    _move_stack(writer, -2)
    _enter(writer)


def emit_far_return(writer: Routine) -> None:
    """To what is popped; R9D bytes more are released."""
    emit = writer.emit
    _need_room_to_pop(writer, 2)
    emit("mov", field("routine_access"), R9D)
    _read_return_address(writer)
    _find(writer)
    emit("mov", EAX, field("routine_access"))
    emit("lea", ECX, address(R12D, 2 * _WORD_BYTES, index=RAX))
    emit("mov", R12W, CX)
    _enter(writer)


def emit_interrupt(writer: Routine) -> None:
    """INT n with the vector in R9D."""
    emit = writer.emit
    emit("cmp", field("pending"), 0)
    writer.unless("e")
    writer.find_gate(2)
    emit("mov", R9D, linear(R9D))
    emit("mov", R8D, R9D)
    emit("and", R8D, 0xFFFF)
    emit("mov", field("target_eip"), R8D)
    emit("shr", R9D, 16)
    _find(writer)
    _need_room_to_push(writer, 3)
    writer.flags_image(EDX)
    emit("mov", linear(EAX, 2 * _WORD_BYTES, 16), DX)
    _push_return_address(writer)
    _move_stack(writer, -3)
    emit("mov", field("interrupt_flag"), 0)
    emit("and", field("system_flags"), 0xFFFF_FFFF & ~AC)
    _enter(writer)


def emit_interrupt_return(writer: Routine) -> None:
    """IRET."""
    emit = writer.emit
    image = word("segments_new", 0)
    emit("cmp", field("pending"), 0)
    writer.unless("e")
    _need_room_to_pop(writer, 3)
    emit("movzx", EDX, linear(EAX, 2 * _WORD_BYTES, 16))
    emit("test", EDX, TF)
    writer.unless("e")
    emit("mov", image, EDX)
    _read_return_address(writer)
    _find(writer)
    _move_stack(writer, 3)
    writer.load_interrupt_flag(image)
    writer.load_system_flags(image, IOPL | NT)
    writer.load_rflags(image)
    _enter(writer)


def _find(writer: Routine) -> None:
    """R14 = the dispatch table for the selector in R9D, not yet for others to see; EAX and ECX are lost."""
    emit = writer.emit
    writer.need(word("segments", 2 * CS + 1), REAL_CODE)  # what a load in real mode would make of it
    emit("mov", EAX, R9D)
    for shift in REAL_SHIFTS:
        emit("mov", ECX, EAX)
        emit("shr", ECX, shift)
        emit("add", EAX, ECX)
    emit("and", EAX, REAL_SPACES - 1)
    emit("shl", EAX, 4)
    emit("cmp", _slot(0), R9)
    writer.unless("e")
    emit("mov", R14, _slot(8))
    emit("test", R14, R14)
    writer.unless("ne")


def _slot(offset: int) -> Memory:
    """A field of the entry at offset RAX."""
    return Memory(64, R15, RAX, 1, OFFSETS["real_spaces"] + offset)


def _enter(writer: Routine) -> None:
    """Load CS with R9D and go on at `target_eip`, by the table that was found."""
    emit = writer.emit
    emit("mov", field("dispatch"), R14)
    emit("mov", word("segments", 2 * CS), R9D)
    emit("shl", R9D, 4)
    emit("mov", segment_base(CS), R9D)
    emit("mov", R8D, field("target_eip"))
    writer.go_on()
    writer.fail()


def _need_room_to_push(writer: Routine, words: int) -> None:
    """EAX = linear address of the top of the stack after a push; fails where SP would wrap or exceed the limit."""
    emit = writer.emit
    emit("movzx", EAX, R12W)
    emit("cmp", EAX, _WORD_BYTES * words)
    writer.unless("ae")
    emit("mov", RCX, segment_bound(SS, write=True))
    emit("lea", RCX, address(RCX, -1, index=RAX))
    _need_negative(writer)
    emit("mov", ECX, segment_base(SS))
    emit("lea", EAX, Memory(0, EAX, ECX, 1, -_WORD_BYTES * words))


def _need_room_to_pop(writer: Routine, words: int) -> None:
    """EAX = linear address of the top of the stack; fails where a pop would wrap or exceed the limit."""
    emit = writer.emit
    emit("movzx", EAX, R12W)
    emit("cmp", EAX, _SEGMENT_BYTES - _WORD_BYTES * words)
    writer.unless("be")
    emit("mov", RCX, segment_bound(SS, write=False))
    emit("lea", RCX, address(RCX, _WORD_BYTES * words - 1, index=RAX))
    _need_negative(writer)
    emit("mov", ECX, segment_base(SS))
    emit("lea", EAX, Memory(0, EAX, ECX, 1))


def _need_negative(writer: Routine) -> None:
    """Fail unless RCX is negative."""
    writer.emit("test", RCX, RCX)
    writer.unless("s")


def _push_return_address(writer: Routine) -> None:
    """CS and `routine_next` to the stack at EAX; EDX is lost."""
    emit = writer.emit
    emit("mov", EDX, word("segments", 2 * CS))
    emit("mov", linear(EAX, _WORD_BYTES, 16), DX)
    emit("mov", EDX, field("routine_next"))
    emit("mov", linear(EAX, 0, 16), DX)


def _read_return_address(writer: Routine) -> None:
    """R9D and `target_eip` = what the stack at EAX holds."""
    emit = writer.emit
    emit("movzx", R8D, linear(EAX, 0, 16))
    emit("mov", field("target_eip"), R8D)
    emit("movzx", R9D, linear(EAX, _WORD_BYTES, 16))


def _move_stack(writer: Routine, words: int) -> None:
    """SP += so many words; ECX is lost."""
    writer.emit("lea", ECX, address(R12D, _WORD_BYTES * words))
    writer.emit("mov", R12W, CX)
