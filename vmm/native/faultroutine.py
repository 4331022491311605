"""Where signals of emitted code, and accesses that the software path refuses, go first.

An exception of the guest's at a known place is delivered at once; for all else it is the exit that it would have been,
with everything as it was. It must not know fragments: which places are known to raise exceptions, and what they stand
for, is in the state block.
"""

from __future__ import annotations

import signal

from machine.faults import PF_USER, PF_WRITE, Vector
from machine.state import MASK32
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
from vmm.native.routine import SAVED, Routine
from vmm.native.softroutines import DIVIDES
from vmm.native.stateblock import NOWHERE_FIRST, OFFSETS, SITE_BYTES, SITES, field, word
from vmm.native.walkroutine import emit_walk

# An access that begins so far before the end of a page may reach into the next one, and fault there.
LONGEST_ACCESS_BYTES = 16
_DIVIDE_TRAP, _PAGE_FAULT_TRAP = int(Vector.DE), int(Vector.PF)  # host and guest number them alike
_RIP, _EIP, _UNDO, _LEFT = range(4)  # words of a site
_ESP_BIT = 8


def site_index(offset: int) -> int:
    """The only place in the table where the host instruction at an offset of the TC can be."""
    return offset & SITES - 1


def site(offset: int, eip: int, refund_insns: int, esp: int, most: int) -> tuple[int, int, int, int]:
    """The words of a site, as the state block has them."""
    assert refund_insns < 1 << _ESP_BIT
    return offset, eip, esp << _ESP_BIT & MASK32 | refund_insns, most


def emit_fault(assembler: Assembler, fault_exit: int, page_fault: Label, divide_error: Label, deliver: Label) -> None:
    """A host signal has just come, and the state block says what it is.

    It keeps nothing on the stack of return addresses, whose guard page the signal may be about.

    Args:
        assembler: where to.
        fault_exit: host address of the exit for signals.
        page_fault: bound to what `emit_soft_fault` wants of it.
        divide_error: the same.
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
    _emit_look_up(assembler, leave)
    divide, known = Label(), Label()
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
    assembler.bind(divide_error)
    emit("mov", field("delivery_vector"), int(Vector.DE))
    emit("mov", field("delivery_code_bytes"), 0)
    emit("jmp", known)
    assembler.bind(page_fault)
    emit("mov", field("delivery_vector"), int(Vector.PF))
    emit("mov", field("delivery_code_bytes"), 4)
    emit("mov", field("delivery_code"), EDX)
    assembler.bind(known)
    _emit_undo(assembler)
    emit("jmp", deliver)
    assembler.bind(leave)
    _emit_leave(assembler, fault_exit)


def emit_soft_fault(writer: Routine, soft_exit: int, page_fault: Label, divide_error: Label) -> None:
    """The software path refuses an access to `soft_linear`, of the kind `soft_access`, or a division.

    Args:
        writer: a routine with an image of the flags.
        soft_exit: host address of the exit for that.
        page_fault: where to go, further on, with the error code in EDX and the place in `site`.
        divide_error: the same with no error code.
    """
    emit = writer.emit
    emit("cmp", field("fault_first"), NOWHERE_FIRST)
    emit("je", writer.failed)
    emit("mov", RAX, field("routine_return"))
    _emit_look_up(writer.asm, writer.failed)
    emit("mov", EDX, field("soft_access"))
    emit("cmp", EDX, DIVIDES)
    emit("je", divide_error)
    emit("mov", R8D, field("soft_linear"))
    emit("mov", field("delivery_linear"), R8D)
    emit_walk(writer.asm, faulted=page_fault, unusual=writer.failed)
    writer.asm.bind(writer.failed)
    writer.load_saved()
    writer.asm.jump_to("jmp", soft_exit)


def _emit_look_up(assembler: Assembler, leave: Label) -> None:
    """The site for the host address in RAX, in `site`: ECX is its place in the table. Leave if it is not known."""
    emit = assembler.emit
    emit("sub", RAX, R13)
    emit("mov", ECX, EAX)
    emit("and", ECX, SITES - 1)
    emit("shl", ECX, SITE_BYTES.bit_length() - 1)
    emit("cmp", EAX, _of_site(_RIP))
    emit("jne", leave)
    emit("sub", _of_site(_LEFT), 1)
    emit("js", leave)
    emit("mov", field("site"), ECX)


def _of_site(number: int) -> Memory:
    return Memory(32, R15, RCX, 1, OFFSETS["sites"] + 4 * number)


def _emit_undo(assembler: Assembler) -> None:
    """Back to before the instruction of `site`, as `emit_delivery` wants it."""
    emit = assembler.emit
    emit("mov", ECX, field("site"))
    emit("mov", EAX, _of_site(_EIP))
    emit("mov", field("routine_eip"), EAX)
    emit("mov", field("routine_next"), EAX)
    emit("mov", EAX, _of_site(_UNDO))
    emit("mov", EDX, EAX)
    emit("and", EAX, (1 << _ESP_BIT) - 1)
    emit("lea", R10, address(R10, index=RAX))
    emit("sar", EDX, _ESP_BIT)
    emit("lea", R12D, Memory(0, R12D, EDX))


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
