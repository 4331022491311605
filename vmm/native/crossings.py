"""Routines that may change the ring: INT n, interrupts from outside, IRETD, SYSENTER, SYSEXIT.

They must not know fragments or engines.
"""

from __future__ import annotations

from machine.flags import AC, ID, IF, IOPL, NT, RF, TF, VIF, VIP, VM
from machine.state import CS, DS, ES, SS
from vmm.native.operands import (
    EAX,
    ECX,
    EDX,
    R8D,
    R9D,
    R10,
    R12D,
    Label,
    Memory,
    Register,
)  # fmt: skip
from vmm.native.routine import (
    CONFORMING,
    DPL,
    DPL_BIT,
    FLAT_CODE,
    FLAT_DATA,
    NULLABLE,
    RPL,
    Routine,
    linear,
)
from vmm.native.stateblock import PENDING_INTERRUPT, PENDING_OTHER, field, word

_GATE_FIXED = 0x9F00 & ~0x0100  # P, S and type without the bit that tells trap from interrupt gates
_GATE_32 = 0x8E00
_TRAP_GATE_BIT = 0x0100
_LOADED = TF | NT | VM | VIF | VIP | AC  # a popped image with any of these is for the interpreter


def emit_interrupt(writer: Routine) -> None:
    """INT n with the vector in R9D, through an interrupt or trap gate of 32 bits to flat code of ring 0."""
    emit_gate_entry(writer, by_fault=False)
    writer.go_on()
    writer.fail()


def emit_arrival(writer: Routine) -> None:
    """An interrupt from outside, with the vector in R9D, that was acknowledged: it returns to `routine_next`."""
    emit_gate_entry(writer, by_fault=False, external=True)
    writer.go_on()
    writer.fail()


def emit_gate_entry(writer: Routine, *, by_fault: bool, external: bool = False) -> None:
    """Enter the handler of the vector in R9D through an interrupt or trap gate of 32 bits to flat code of ring 0.

    What is pushed returns to `routine_next`. The handler is in R8D then, its space is current, and nothing can fail any
    more.

    Args:
        writer: the routine.
        by_fault: for an exception, whose gate may have any DPL: RF is set in the flags that it pushes, and
            `delivery_code` on top, if `delivery_code_bytes` is 4 instead of 0.
        external: for an interrupt from outside, whose gate may have any DPL; others may wait that the gate disables.
    """
    emit = writer.emit
    inner, pushed = Label(), Label()
    if by_fault:
        # What waits for IF waits on; an interrupt that could have come, but for a shadow, comes now.
        masked = Label()
        emit("cmp", field("interrupt_flag"), 0)
        emit("je", masked)
        emit("test", field("pending"), PENDING_INTERRUPT)
        writer.unless("e")
        writer.asm.bind(masked)
    elif not external:
        emit("cmp", field("pending"), 0)
        writer.unless("e")
    emit("test", field("system_flags"), VIF | VIP)
    writer.unless("e")
    writer.need_space("kernel_space")
    writer.use_kernel_window()
    writer.find_gate(3)
    emit("mov", R8D, linear(R9D))
    emit("mov", EDX, linear(R9D, 4))
    emit("mov", EAX, EDX)
    emit("and", EAX, _GATE_FIXED)
    writer.need(EAX, _GATE_32)
    if external:
        disables = Label()
        emit("test", EDX, _TRAP_GATE_BIT)
        emit("je", disables)
        emit("cmp", field("pending"), 0)
        writer.unless("e")
        writer.asm.bind(disables)
    elif not by_fault:
        writer.dpl(EAX)
        emit("cmp", EAX, field("cpl"))
        writer.unless("ae")
    emit("mov", field("routine_access"), EDX)  # the gate, for its type
    emit("mov", R9D, R8D)
    emit("shr", R9D, 16)  # the selector
    emit("and", EDX, 0xFFFF_0000)
    emit("and", R8D, 0xFFFF)
    emit("or", R8D, EDX)  # the handler
    writer.read_descriptor(R9D)
    writer.need_flat(FLAT_CODE)
    emit("test", EDX, DPL)
    writer.unless("e")
    emit("mov", field("routine_selector"), EDX)
    emit("cmp", field("cpl"), 0)
    emit("jne", inner)
    # The same ring: three doublewords on the same stack, or four.
    _emit_frame(writer, R12D, 12, by_fault=by_fault)
    emit("jmp", pushed)
    writer.asm.bind(inner)
    _emit_inner_frame(writer, by_fault=by_fault)
    writer.asm.bind(pushed)
    emit("and", R9D, 0xFFFF & ~RPL)
    emit("mov", word("segments", 2 * CS), R9D)
    emit("mov", EDX, field("routine_selector"))
    emit("mov", word("segments", 2 * CS + 1), EDX)
    emit("and", field("system_flags"), 0xFFFF_FFFF & ~NT)
    trap = Label()
    emit("test", field("routine_access"), _TRAP_GATE_BIT)
    emit("jne", trap)
    emit("mov", field("interrupt_flag"), 0)
    writer.asm.bind(trap)
    emit("mov", field("cpl"), 0)
    writer.enter_space("kernel_space", is_used=True)


def _emit_frame(writer: Routine, base: Register, frame_bytes: int, *, by_fault: bool) -> None:
    """Flags, CS and EIP at the bottom of a frame below `base`, the error code below it; ESP = the last of them.

    R12D is read before anything is written where the frame is that of another stack; EAX and ECX are lost, if `base`
    is none of them, and R8D and R9D kept.
    """
    emit = writer.emit
    value = ECX if base is EAX else EAX
    coded = Label()
    if by_fault:
        emit("mov", value, base)
        emit("sub", value, field("delivery_code_bytes"))
        # From the top down, as pushes would meet a fault.
        emit("or", linear(base, -4), 0)
        emit("or", linear(value, -frame_bytes), 0)
    else:
        writer.probe(base, -frame_bytes, -4)
    if frame_bytes > 12:
        emit("mov", value, word("segments", 2 * SS))
        emit("mov", linear(base, -4), value)
        emit("mov", linear(base, -8), R12D)
    writer.flags_image(value)
    if by_fault:
        emit("or", value, RF)
    emit("mov", linear(base, 8 - frame_bytes), value)
    emit("mov", value, word("segments", 2 * CS))
    emit("mov", linear(base, 4 - frame_bytes), value)
    emit("mov", value, field("routine_next"))
    emit("mov", linear(base, -frame_bytes), value)
    emit("lea", R12D, Memory(0, base, displacement=-frame_bytes))
    if by_fault:
        emit("cmp", field("delivery_code_bytes"), 0)
        emit("je", coded)
        emit("mov", value, field("delivery_code"))
        emit("mov", linear(R12D, -4), value)
        emit("lea", R12D, Memory(0, R12D, displacement=-4))
        writer.asm.bind(coded)


def _emit_inner_frame(writer: Routine, *, by_fault: bool) -> None:
    """The stack of ring 0 from the TSS, and five doublewords on it, or six; keeps R8D and R9D."""
    emit = writer.emit
    emit("mov", EAX, field("inner_stack"))
    emit("test", EAX, EAX)
    writer.unless("ne")
    emit("mov", word("segments_new", 0), R9D)
    emit("movzx", R9D, linear(EAX, 4, 16))
    emit("mov", EAX, linear(EAX))
    emit("mov", word("segments_new", 1), EAX)
    emit("test", R9D, RPL)
    writer.unless("e")
    writer.read_descriptor(R9D)
    writer.need_flat(FLAT_DATA)
    emit("test", EDX, DPL)
    writer.unless("e")
    emit("mov", EAX, word("segments_new", 1))
    _emit_frame(writer, EAX, 20, by_fault=by_fault)
    emit("mov", word("segments", 2 * SS), R9D)
    emit("mov", word("segments", 2 * SS + 1), EDX)
    emit("mov", R9D, word("segments_new", 0))


def emit_iret(writer: Routine) -> None:
    """IRETD to flat code of the same ring, or from ring 0 to ring 3."""
    emit = writer.emit
    outer, flags_known = Label(), Label()
    emit("mov", R8D, linear(R12D))
    emit("movzx", R9D, linear(R12D, 4, 16))
    emit("mov", EAX, linear(R12D, 8))
    emit("test", EAX, _LOADED)
    writer.unless("e")
    emit("test", field("system_flags"), NT | VIF | VIP | AC)
    writer.unless("e")
    _emit_check_pending(writer)
    emit("mov", word("segments_new", 0), EAX)
    emit("mov", ECX, field("system_flags"))
    emit("and", ECX, IOPL)
    emit("cmp", ECX, IOPL)
    writer.unless("ne")  # at CPL 3 that loads IF
    writer.use_kernel_window()
    writer.read_descriptor(R9D)
    writer.need_flat(FLAT_CODE)
    writer.dpl(ECX)
    emit("mov", EAX, R9D)
    emit("and", EAX, RPL)
    emit("cmp", ECX, EAX)
    writer.unless("e")
    emit("cmp", EAX, field("cpl"))
    emit("jne", outer)
    emit("mov", word("segments", 2 * CS), R9D)
    emit("mov", word("segments", 2 * CS + 1), EDX)
    emit("lea", R12D, Memory(0, R12D, displacement=12))
    writer.use_own_window()
    emit("jmp", flags_known)
    writer.asm.bind(outer)
    # CPL is 0 here: a lower RPL than CPL fails, and 3 has no other.
    writer.need(EAX, 3)
    emit("cmp", field("cpl"), 0)
    writer.unless("e")
    writer.need_space("user_space")
    emit("mov", field("routine_selector"), R9D)
    emit("mov", field("routine_access"), EDX)
    # What ring 3 may not use becomes null: FS and GS can be, the others are for the interpreter.
    for number in (ES, DS):
        emit("mov", EAX, word("segments", 2 * number + 1))
        emit("and", EAX, DPL)
        writer.need(EAX, DPL)
    emit("movzx", R9D, linear(R12D, 16, 16))
    emit("mov", EAX, R9D)
    emit("and", EAX, RPL)
    writer.need(EAX, 3)
    writer.read_descriptor(R9D)
    writer.need_flat(FLAT_DATA)
    emit("mov", EAX, EDX)
    emit("and", EAX, DPL)
    writer.need(EAX, DPL)
    emit("mov", R12D, linear(R12D, 12))
    emit("mov", word("segments", 2 * SS), R9D)
    emit("mov", word("segments", 2 * SS + 1), EDX)
    for name in (0, 1):
        emit("mov", EAX, field(("routine_selector", "routine_access")[name]))
        emit("mov", word("segments", 2 * CS + name), EAX)
    for number in NULLABLE:
        kept = Label()
        for bits in (DPL, CONFORMING):  # conforming code is for all rings
            emit("mov", EAX, word("segments", 2 * number + 1))
            emit("and", EAX, bits)
            emit("cmp", EAX, bits)
            emit("je", kept)
        emit("mov", word("segments", 2 * number), 0)
        writer.make_unusable(number)
        writer.asm.bind(kept)
    # CPL was 0: IF and IOPL are loaded as well.
    emit("mov", field("cpl"), 3)
    writer.enter_space("user_space")
    _emit_load_flags(writer, with_iopl=True)
    writer.go_on()
    writer.asm.bind(flags_known)
    inner = Label()
    emit("cmp", field("cpl"), 0)
    emit("jne", inner)
    _emit_load_flags(writer, with_iopl=True)
    writer.go_on()
    writer.asm.bind(inner)
    _emit_load_flags(writer, with_iopl=False)
    writer.go_on()
    writer.fail()


def _emit_check_pending(writer: Routine) -> None:
    """Fail if something waits for this IRET: the end of an NMI's handler, or IF in the image that EAX holds."""
    emit = writer.emit
    nothing = Label()
    emit("cmp", field("pending"), 0)
    emit("je", nothing)
    emit("test", field("pending"), PENDING_OTHER)
    writer.unless("e")
    emit("test", EAX, IF)
    writer.unless("e")
    writer.asm.bind(nothing)


def _emit_load_flags(writer: Routine, *, with_iopl: bool) -> None:
    """EFLAGS = the image kept aside; without IOPL also without IF, for IOPL is below 3 there."""
    emit = writer.emit
    image = word("segments_new", 0)
    plain = Label()
    emit("test", image, RF)
    emit("je", plain)
    emit("mov", field("resume_budget"), R10)
    writer.asm.bind(plain)
    if with_iopl:
        writer.load_interrupt_flag(image)
    writer.load_system_flags(image, ID | (IOPL if with_iopl else 0))
    writer.load_rflags(image)


def emit_sysenter(writer: Routine) -> None:
    """SYSENTER: segments are flat by definition."""
    emit = writer.emit
    emit("mov", EAX, field("sysenter_cs"))
    emit("and", EAX, 0xFFFC)
    writer.unless("ne")
    writer.need_space("kernel_space")
    _emit_fixed_segments(writer, code=0, stack=8, level=0)
    emit("mov", field("interrupt_flag"), 0)
    emit("mov", field("cpl"), 0)
    emit("mov", R12D, field("sysenter_esp"))
    emit("mov", R8D, field("sysenter_eip"))
    writer.enter_space("kernel_space")
    writer.go_on()
    writer.fail()


def emit_sysexit(writer: Routine) -> None:
    """SYSEXIT from ring 0: to EDX with the stack in ECX."""
    emit = writer.emit
    emit("test", field("system_flags"), AC)
    writer.unless("e")
    emit("mov", EAX, field("sysenter_cs"))
    emit("and", EAX, 0xFFFC)
    writer.unless("ne")
    writer.need_space("user_space")
    _emit_fixed_segments(writer, code=16 | 3, stack=24 | 3, level=3)
    emit("mov", field("cpl"), 3)
    emit("mov", R12D, ECX)
    emit("mov", R8D, EDX)
    writer.enter_space("user_space")
    writer.go_on()
    writer.fail()


def _emit_fixed_segments(writer: Routine, *, code: int, stack: int, level: int) -> None:
    """CS and SS from the base selector in EAX, with the attributes that SYSENTER and SYSEXIT give them."""
    emit = writer.emit
    for number, offset, access in ((CS, code, FLAT_CODE), (SS, stack, FLAT_DATA)):
        emit("lea", R9D, Memory(0, EAX, displacement=offset))
        emit("and", R9D, 0xFFFF)
        emit("mov", word("segments", 2 * number), R9D)
        emit("mov", word("segments", 2 * number + 1), access | level << DPL_BIT)
