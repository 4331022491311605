"""Routines for far transfers within the ring: JMP, CALL and RET with 32-bit operands between flat code segments.

What is not plain (gates and tasks, conforming segments, another ring) is a callout. They must not know fragments.

Source: SDM Vol. 2, "JMP", "CALL", "RET".
"""

from __future__ import annotations

from machine.state import CS
from vmm.native.operands import EAX, ECX, EDX, R8D, R9D, R12D, Memory
from vmm.native.routine import FLAT_CODE, RPL, Routine, linear
from vmm.native.stateblock import field, word


def emit_far_jump(writer: Routine) -> None:
    """To R9D:R8D."""
    writer.emit("mov", R8D, R8D)  # what it goes by has 32 bits, whoever came here
    _find_code(writer, has_returned=False)
    _load_code(writer)


def emit_far_call(writer: Routine) -> None:
    """To R9D:R8D; CS and `routine_next` are pushed."""
    emit = writer.emit
    emit("mov", R8D, R8D)
    _find_code(writer, has_returned=False)
    writer.probe(R12D, -8, -4)
    emit("mov", EAX, word("segments", 2 * CS))
    emit("mov", linear(R12D, -4), EAX)
    emit("mov", EAX, field("routine_next"))
    emit("mov", linear(R12D, -8), EAX)
    emit("lea", R12D, Memory(0, R12D, displacement=-8))
    _load_code(writer)


def emit_far_return(writer: Routine) -> None:
    """To what is popped; R9D bytes more are released."""
    emit = writer.emit
    emit("mov", field("routine_access"), R9D)
    emit("mov", R8D, linear(R12D))
    emit("mov", R9D, linear(R12D, 4))
    emit("and", R9D, 0xFFFF)
    _find_code(writer, has_returned=True)
    emit("mov", EAX, field("routine_access"))
    emit("lea", R12D, Memory(0, R12D, EAX, 1, 8))
    _load_code(writer)


def _find_code(writer: Routine, *, has_returned: bool) -> None:
    """R9D, EDX = selector and attributes for CS, if the selector in R9D is of flat, nonconforming code of this ring.

    RPL must be CPL for a RET, and is made CPL by the others. EAX and ECX are lost, R8D stays.
    """
    emit = writer.emit
    emit("mov", EAX, R9D)
    emit("and", EAX, RPL)
    emit("cmp", EAX, field("cpl"))
    writer.unless("e" if has_returned else "be")
    writer.use_kernel_window()
    writer.read_descriptor(R9D)
    writer.need_flat(FLAT_CODE)
    writer.dpl(ECX)
    emit("cmp", ECX, field("cpl"))
    writer.unless("e")
    if not has_returned:
        emit("or", R9D, ECX)  # CPL is 0 or 3
    writer.use_own_window()


def _load_code(writer: Routine) -> None:
    """Load CS with what was found, and go on at R8D in it."""
    writer.emit("mov", word("segments", 2 * CS), R9D)
    writer.emit("mov", word("segments", 2 * CS + 1), EDX)
    writer.go_on()
    writer.fail()
