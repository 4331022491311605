"""Where a signal of emitted code goes first: an exception of the guest's at a known place is delivered at once.

For all else it is the exit that it would have been, with everything as it was. It must not know fragments: which host
instructions are known to raise exceptions, and what they stand for, is in the state block.
"""

from __future__ import annotations

import signal

from machine.faults import PF_USER, PF_WRITE, Vector
from vmm.native.assembler import Assembler
from vmm.native.operands import (
    EAX,
    EBP,
    EBX,
    ECX,
    EDI,
    EDX,
    ESI,
    R8,
    R8D,
    R9,
    R10,
    R12D,
    R13,
    R15,
    RAX,
    RCX,
    RSP,
    Label,
    Memory,
    address,
)  # fmt: skip
from vmm.native.routine import SAVED
from vmm.native.stateblock import OFFSETS, SITE_BYTES, SITES, field, word
from vmm.native.walkroutine import emit_walk

# An access that begins so far before the end of a page may reach into the next one, and fault there.
LONGEST_ACCESS_BYTES = 16
_DIVIDE_TRAP, _PAGE_FAULT_TRAP = int(Vector.DE), int(Vector.PF)  # host and guest number them alike
_RIP, _EIP, _REFUND, _ESP = range(4)  # words of a site


def site_index(offset: int) -> int:
    """The only place in the table where the host instruction at an offset of the TC can be."""
    return offset & SITES - 1


def emit_fault(assembler: Assembler, fault_exit: int, deliver: Label) -> None:
    """A host signal has just come, and the state block says what it is.

    It keeps nothing on the stack of return addresses, whose guard page the signal may be about.

    Args:
        assembler: where to.
        fault_exit: host address of the exit for signals.
        deliver: see `emit_delivery`.
    """
    emit = assembler.emit
    leave = Label()
    # In mid-instruction ESI and EDI may be addresses in the window.
    for register in (EAX, ECX, EDX, EBX, EBP, ESI, EDI, R12D):
        emit("mov", register, register)
    for number, register in enumerate(SAVED):
        emit("mov", word("routine_registers", number), register)
    emit("mov", field("scratch8"), R8)
    emit("mov", field("scratch9"), R9)
    emit("mov", RAX, field("flags"))
    emit("mov", field("routine_flags"), RAX)
    emit("mov", RAX, field("fault_rip"))
    emit("sub", RAX, R13)
    emit("mov", ECX, EAX)
    emit("and", ECX, SITES - 1)
    emit("shl", ECX, SITE_BYTES.bit_length() - 1)
    emit("cmp", EAX, _of_site(_RIP))
    emit("jne", leave)
    emit("mov", field("site"), ECX)
    divide, page_fault, known = Label(), Label(), Label()
    emit("cmp", word("fault_signal", 0), int(signal.SIGFPE))
    emit("je", divide)
    emit("cmp", word("fault_signal", 0), int(signal.SIGSEGV))
    emit("jne", leave)
    emit("cmp", word("fault_trap", 0), _PAGE_FAULT_TRAP)
    emit("jne", leave)
    _emit_address(assembler, leave)
    _emit_look_before(assembler, leave)
    emit_walk(assembler, faulted=page_fault, unusual=leave)
    # Allowed: the window does not have the page yet.
    emit("jmp", leave)
    assembler.bind(divide)
    emit("cmp", word("fault_trap", 0), _DIVIDE_TRAP)
    emit("jne", leave)
    emit("mov", field("delivery_vector"), int(Vector.DE))
    emit("mov", field("delivery_code_bytes"), 0)
    emit("jmp", known)
    assembler.bind(page_fault)
    emit("mov", field("delivery_vector"), int(Vector.PF))
    emit("mov", field("delivery_code_bytes"), 4)
    emit("mov", field("delivery_code"), EDX)
    assembler.bind(known)
    emit("mov", ECX, field("site"))
    emit("mov", EAX, _of_site(_EIP))
    emit("mov", field("routine_eip"), EAX)
    emit("mov", field("routine_next"), EAX)
    emit("mov", EAX, _of_site(_REFUND))
    emit("lea", R10, address(R10, index=RAX))
    emit("mov", EAX, _of_site(_ESP))
    emit("lea", R12D, Memory(0, R12D, EAX))
    emit("jmp", deliver)
    assembler.bind(leave)
    _emit_leave(assembler, fault_exit)


def _of_site(number: int) -> Memory:
    return Memory(32, R15, RCX, 1, OFFSETS["sites"] + 4 * number)


def _emit_address(assembler: Assembler, leave: Label) -> None:
    """R8D, and `delivery_linear`, = the linear address; EDX = the kind of access, as `emit_walk` takes it."""
    emit = assembler.emit
    supervisor = Label()
    emit("mov", RAX, field("fault_address"))
    emit("sub", RAX, field("window"))
    emit("mov", RCX, RAX)
    emit("shr", RCX, 32)
    emit("jne", leave)
    emit("mov", R8D, EAX)
    emit("mov", field("delivery_linear"), R8D)
    emit("mov", EDX, word("fault_error", 0))
    emit("and", EDX, PF_WRITE)
    emit("cmp", field("cpl"), 0)
    emit("je", supervisor)
    emit("or", EDX, PF_USER)
    assembler.bind(supervisor)


def _emit_look_before(assembler: Assembler, leave: Label) -> None:
    """Where the access may begin in the page before, and fault there first, that page has to allow it."""
    emit = assembler.emit
    alone = Label()
    emit("mov", EAX, R8D)
    emit("and", EAX, 0xFFF)
    emit("cmp", EAX, LONGEST_ACCESS_BYTES)
    emit("jae", alone)
    emit("mov", field("delivery_code"), EDX)
    emit("lea", R8D, Memory(0, R8D, displacement=-LONGEST_ACCESS_BYTES))
    emit_walk(assembler, faulted=leave, unusual=leave, asks_bits=False)
    emit("mov", R8D, field("delivery_linear"))
    emit("mov", EDX, field("delivery_code"))
    assembler.bind(alone)


def _emit_leave(assembler: Assembler, fault_exit: int) -> None:
    """The exit, with registers and flags as they were."""
    emit = assembler.emit
    emit("mov", field("call_stack"), RSP)
    emit("mov", RSP, field("host_rsp"))
    emit("push", field("routine_flags"))
    emit("popfq")
    emit("mov", RSP, field("call_stack"))
    for number, register in enumerate(SAVED):
        emit("mov", register, word("routine_registers", number))
    emit("mov", R8, field("scratch8"))
    emit("mov", R9, field("scratch9"))
    assembler.jump_to("jmp", fault_exit)
