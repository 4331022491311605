"""Delivery of an exception without leaving the TC: from a fault that is known to the handler that the IDT has for it.

What is not plain is a callout of the instruction, which then faults in Python. It must not know how the fault was
noticed.

Source: SDM Vol. 3A, "Exception- or Interrupt-Handler Procedures"; Vol. 3B, "Instruction-Breakpoint Exception
Condition" for RF in the flags that a fault pushes.
"""

from __future__ import annotations

from machine.faults import Vector
from vmm.native.crossings import emit_gate_entry
from vmm.native.operands import EAX, ECX, R9D, R10, R15, RAX, Label, Memory, address
from vmm.native.routine import Routine
from vmm.native.stateblock import NO_BUDGET, OFFSETS, VECTORS, field


def emit_delivery(writer: Routine, entry: Label) -> None:
    """Enter the handler of an exception, at `entry`, to which other routines jump.

    They have saved EAX, ECX, EDX and all of RFLAGS, as `Routine` does with `has_image`, and hand over

    - `routine_eip` and `routine_next`: both the address of the instruction that faults,
    - R10: the budget, of which that instruction has been charged, too, as `Routine.fail` wants it; R12D: ESP before it,
    - `delivery_vector`; `delivery_code_bytes`: 4 if `delivery_code` is to be pushed, else 0,
    - `delivery_linear`: what CR2 gets, if the vector is that of #PF.

    Nothing may hold events off there: `shadow` is 0. EBX, EBP, ESI and EDI are the guest's.

    Args:
        writer: a routine with an image of the flags, which has no beginning of its own.
        entry: bound here.
    """
    emit = writer.emit
    no_linear = Label()
    writer.asm.bind(entry)
    # Where nothing has retired since the last delivery there may be no end to them: Python counts, and comes back.
    emit("cmp", field("delivery_budget"), R10)
    writer.unless("ne")
    emit("mov", R9D, field("delivery_vector"))
    emit_gate_entry(writer, by_fault=True)
    emit("mov", field("delivery_budget"), R10)
    emit("lea", R10, address(R10, 1))
    emit("mov", field("resume_budget"), NO_BUDGET)
    emit("mov", EAX, field("delivery_vector"))
    emit("and", EAX, VECTORS - 1)
    count = Memory(32, R15, RAX, 4, OFFSETS["deliveries"])
    emit("mov", ECX, count)
    emit("lea", ECX, Memory(0, ECX, displacement=1))
    emit("mov", count, ECX)
    emit("cmp", EAX, int(Vector.PF))
    emit("jne", no_linear)
    emit("mov", EAX, field("delivery_linear"))
    emit("mov", field("cr2"), EAX)
    writer.asm.bind(no_linear)
    writer.go_on()
    writer.fail()
