"""Delivery of interrupts and exceptions: IVT, gates, virtual-8086 redirection, double faults and shutdown.

It must not know who noticed the event, nor when interrupts are accepted.

Source: SDM Vol. 3A, "Interrupt and Exception Handling" and "Double Fault Exception (#DF)"; Vol. 2, "INT n";
Vol. 3B, "Interrupt and Exception Handling in Virtual-8086 Mode".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Self

from machine.debug import FaultLevel
from machine.descriptors import (
    INTERRUPT_GATE16,
    INTERRUPT_GATE32,
    IS_32,
    RPL,
    SELECTOR_INDEX,
    TASK_GATE,
    TRAP_GATE16,
    TRAP_GATE32,
    TSS16,
    TSS32,
    Descriptor,
    check_accessed,
    mark_accessed,
    read_descriptor,
)
from machine.faults import (
    EXT,
    IDT,
    TI,
    DebugFault,
    GuestFault,
    PageFault,
    Vector,
    general_protection,
    not_present,
)
from machine.flags import AC, IF, IOPL, NT, RF, TF, VIF, VM
from machine.frames import check_room, push_frame
from machine.segmentation import load_null, load_real_code, load_v86
from machine.state import CR0_PE, CR4_VME, CS, DR7_GD, DS, ES, ESP, FS, GS, MASK32, SHADOW_NONE, SS
from machine.tasks import IO_MAP_BASE_32, LIMIT_32, SwitchKind, switch_task
from machine.transfers import stack_for_level

if TYPE_CHECKING:
    from machine.cpu import Cpu

_GATES: Final = frozenset((TASK_GATE, INTERRUPT_GATE16, TRAP_GATE16, INTERRUPT_GATE32, TRAP_GATE32))
_INTERRUPT_GATES: Final = (INTERRUPT_GATE16, INTERRUPT_GATE32)

# Exceptions that leave RF in the saved EFLAGS as it was: all that are not faults, and #DB even where it is one (for the
# guarded debug registers the SDM says otherwise, but that is not what processors do).
_NOT_FAULTS: Final = frozenset((Vector.DB, Vector.NMI, Vector.BP, Vector.OF, Vector.DF, Vector.MC))

CONTRIBUTORY: Final = frozenset((Vector.DE, Vector.TS, Vector.NP, Vector.SS, Vector.GP))

_REDIRECTION_BYTES: Final = 32


class TripleFault(Exception):
    """The CPU is in shutdown.

    Attributes:
        chain: the exceptions, first to last; the one before the last is the #DF that could not be delivered.
    """

    def __init__(self, chain: tuple[FaultLevel, ...]) -> None:
        super().__init__(chain)
        self.chain = chain

    def __str__(self) -> str:
        return " -> ".join(f"{level.vector:#x} at {level.cs:#06x}:{level.eip:#x}" for level in self.chain)


@dataclass(frozen=True, slots=True)
class _Event:
    """What is to be delivered; most fields are arguments of `deliver`."""

    vector: int
    error_code: int | None
    return_eip: int
    external: bool = False
    resume: bool = False
    linear: int | None = None


def raise_exception(cpu: Cpu, fault: GuestFault, return_eip: int) -> None:
    """Deliver an exception, and whatever exceptions its delivery raises, down to #DF and shutdown.

    CR2 and the conditions of a `DebugFault` are written here; DR7.GD is cleared for #DB, and HLT is over.

    Args:
        cpu: EIP becomes that of the handler.
        fault: what the instruction raised; `fault.return_eip` goes before `return_eip` if it is set.
        return_eip: the instruction to return to: for traps the next one.

    Raises:
        TripleFault: the CPU is in shutdown; its registers are those before the last attempt.
    """
    if isinstance(fault, DebugFault):
        cpu.state.dr[6] |= fault.conditions
    _deliver_event(cpu, _event(fault, return_eip))


def deliver_event(
    cpu: Cpu,
    vector: int,
    *,
    external: bool,
    error_code: int | None,
    return_eip: int,
    linear: int | None = None,
    resume: bool | None = None,
) -> None:
    """Deliver an external interrupt that was acknowledged, an NMI, or an exception, like `raise_exception`.

    Args:
        cpu: EIP becomes that of the handler.
        vector: 0 to 255.
        external: an interrupt or NMI; faults of its delivery make no double fault.
        error_code: what the exception pushes, or None.
        return_eip: the instruction to return to.
        linear: of #PF: what CR2 gets.
        resume: RF is set in the saved EFLAGS; None: for faults, and not for traps and interrupts.

    Raises:
        TripleFault: as in `raise_exception`.
    """
    if resume is None:
        resume = not external and vector not in _NOT_FAULTS
    _deliver_event(cpu, _Event(vector, error_code, return_eip, external, resume, linear))


def software_interrupt(cpu: Cpu, vector: int, next_eip: int, *, by_int_n: bool = True) -> None:
    """INT n, INT3, INTO and INT1.

    The two-byte INT n alone obeys IOPL in virtual-8086 mode and may be redirected there. The gate's DPL is asked for
    all but INT1 (one-byte, vector 1), which is delivered like the exception it stands for.

    Args:
        cpu: EIP becomes that of the handler.
        vector: 0 to 255.
        next_eip: where to return.
        by_int_n: it is the two-byte form.

    Raises:
        GuestFault: a fault of this instruction; nothing was changed, unless a task switch passed its commit point.
    """
    state = cpu.state
    if by_int_n and state.eflags & VM:
        if state.cr4 & CR4_VME and not _is_intercepted(cpu, vector):
            _redirect(cpu, vector, next_eip)
            return
        if state.eflags & IOPL != IOPL:
            raise general_protection(0)
    is_int1 = vector == Vector.DB and not by_int_n
    deliver(cpu, vector, software=not is_int1, external=False, error_code=None, return_eip=next_eip)
    if is_int1:
        state.dr[7] &= ~DR7_GD


def _event(fault: GuestFault, return_eip: int) -> _Event:
    vector = fault.vector
    if fault.return_eip is not None:
        return_eip = fault.return_eip
    linear = fault.linear if isinstance(fault, PageFault) else None
    resume = vector not in _NOT_FAULTS
    return _Event(vector, fault.error_code, return_eip, resume=resume, linear=linear)


def _level(cpu: Cpu, event: _Event) -> FaultLevel:
    cs = cpu.state.segments[CS].selector
    return FaultLevel(event.vector, event.error_code, event.linear, cs, event.return_eip, event.external)


def _deliver_event(cpu: Cpu, event: _Event) -> None:
    delivery = Delivery(event)
    while (fault := delivery.attempt(cpu)) is not None:
        delivery.follow(cpu, fault)


@dataclass(slots=True)
class Delivery:
    """An event on the way to its handler, one attempt at a time, for whoever wants to know of each.

    Attributes:
        event: what is delivered next.
        chain: what was attempted so far.
    """

    event: _Event
    chain: list[FaultLevel] = field(default_factory=list)

    @classmethod
    def of_fault(cls, fault: GuestFault, return_eip: int) -> Self:
        """Of an exception, as `raise_exception` takes it; the conditions of a `DebugFault` are the caller's to set."""
        return cls(_event(fault, return_eip))

    @classmethod
    def of_event(
        cls,
        vector: int,
        *,
        external: bool,
        error_code: int | None,
        return_eip: int,
        linear: int | None = None,
        resume: bool | None = None,
    ) -> Self:
        """Of an event, as `deliver_event` takes it."""
        if resume is None:
            resume = not external and vector not in _NOT_FAULTS
        return cls(_Event(vector, error_code, return_eip, external, resume, linear))

    @property
    def vector(self) -> int:
        """Of the event."""
        return self.event.vector

    @property
    def error_code(self) -> int | None:
        """What the event pushes."""
        return self.event.error_code

    @property
    def is_external(self) -> bool:
        """Whether it is an interrupt or NMI."""
        return self.event.external

    def attempt(self, cpu: Cpu) -> GuestFault | None:
        """Enter the handler; else the fault that this raised, with nothing changed but CR2."""
        state, event = cpu.state, self.event
        self.chain.append(_level(cpu, event))
        if event.linear is not None:
            state.cr2 = event.linear
        try:
            deliver(
                cpu,
                event.vector,
                software=False,
                external=event.external,
                error_code=event.error_code,
                return_eip=event.return_eip,
                resume=event.resume,
            )
        except GuestFault as fault:
            return fault
        state.halted = 0
        if event.vector == Vector.DB and not event.external:
            state.dr[7] &= ~DR7_GD
        return None

    def follow(self, cpu: Cpu, fault: GuestFault) -> None:
        """Let what a failed attempt raised be the next event, or a double fault.

        Raises:
            TripleFault: the CPU is in shutdown.
        """
        event, state = self.event, cpu.state
        second = _event(fault, event.return_eip)
        if _doubles(event, second):
            # The second exception is never delivered itself, but its address is in CR2.
            self.chain.append(_level(cpu, second))
            if second.linear is not None:
                state.cr2 = second.linear
            if event.vector == Vector.DF:
                raise TripleFault(tuple(self.chain))
            second = _Event(Vector.DF, 0, second.return_eip)
        self.event = second


def _doubles(first: _Event, second: _Event) -> bool:
    """`second`, raised by the delivery of `first`, makes a double fault (or, after a #DF, shutdown) of both."""
    if first.external:
        return False
    if first.vector in (Vector.PF, Vector.DF):
        return second.vector == Vector.PF or second.vector in CONTRIBUTORY
    return first.vector in CONTRIBUTORY and second.vector in CONTRIBUTORY


def deliver(
    cpu: Cpu,
    vector: int,
    *,
    software: bool,
    external: bool,
    error_code: int | None,
    return_eip: int,
    resume: bool = False,
) -> None:
    """Enter the handler of `vector`.

    Args:
        cpu: EIP is set last.
        vector: 0 to 255.
        software: by INT n, INT3 or INTO: the gate's DPL is asked, error codes have EXT clear, RF is saved as 0.
        external: an interrupt from outside.
        error_code: what the exception pushes in protected mode, or None.
        return_eip: EIP to save.
        resume: save RF as 1.

    Raises:
        GuestFault: with nothing changed, unless a task switch passed its commit point.
    """
    state = cpu.state
    flags = state.eflags
    if resume:
        flags |= RF
    elif software:
        flags &= ~RF
    if not state.cr0 & CR0_PE:
        _deliver_real(cpu, vector, flags, return_eip)
        return
    ext = EXT if external or not software else 0
    code = vector << 3 | IDT | ext
    if vector * 8 + 7 > state.idtr.limit:
        raise general_protection(code)
    gate_linear = (state.idtr.base + vector * 8) & MASK32
    gate = Descriptor(gate_linear, cpu.mmu.load_system(gate_linear, 8))
    kind = gate.system_type
    if kind not in _GATES or (software and gate.dpl < state.cpl):
        raise general_protection(code)
    if not gate.present:
        raise not_present(code)
    if kind == TASK_GATE:
        _deliver_to_task(cpu, gate, flags, return_eip, ext, error_code)
    else:
        _deliver_through_gate(cpu, gate, flags, return_eip, ext, error_code)
    state.shadow = SHADOW_NONE


def _deliver_real(cpu: Cpu, vector: int, flags: int, return_eip: int) -> None:
    state = cpu.state
    if vector * 4 + 3 > state.idtr.limit:
        raise general_protection(0)
    cs, stack = state.segments[CS], state.segments[SS]
    check_room(stack, state.gpr[ESP], 3, 2, 0)
    entry = cpu.mmu.load_system(state.idtr.base + vector * 4, 4)
    offset, selector = entry & 0xFFFF, entry >> 16
    if offset > cs.limit:
        raise general_protection(0)
    esp = push_frame(cpu, stack, state.gpr[ESP], 2, (flags, cs.selector, return_eip), user=False)
    load_real_code(cs, selector)
    cpu.set_esp(esp)
    state.eflags &= ~(IF | TF | AC | RF)
    state.shadow = SHADOW_NONE
    state.eip = offset


def _deliver_to_task(cpu: Cpu, gate: Descriptor, flags: int, return_eip: int, ext: int, error_code: int | None) -> None:
    selector = gate.gate_selector
    code = selector & SELECTOR_INDEX | ext
    tss = None if selector & TI or not selector & SELECTOR_INDEX else read_descriptor(cpu, selector)
    if tss is None or tss.system_type not in (TSS16, TSS32):
        raise general_protection(code)
    switch_task(cpu, selector, tss, SwitchKind.CALL, return_eip, ext=ext, saved_flags=flags, error_code=error_code)


def _deliver_through_gate(
    cpu: Cpu, gate: Descriptor, flags: int, return_eip: int, ext: int, error_code: int | None
) -> None:
    state = cpu.state
    selector = gate.gate_selector
    if not selector & SELECTOR_INDEX:
        raise general_protection(ext)
    code = selector & SELECTOR_INDEX | ext
    descriptor = read_descriptor(cpu, selector)
    if descriptor is None or not descriptor.is_code or descriptor.dpl > state.cpl:
        raise general_protection(code)
    if not descriptor.present:
        raise not_present(code)
    size_bytes = 4 if gate.type & IS_32 else 2
    from_v86 = bool(flags & VM)
    is_inner = not descriptor.is_conforming and descriptor.dpl < state.cpl
    if from_v86 and (not is_inner or descriptor.dpl):
        raise general_protection(code)
    cs, ss = state.segments[CS], state.segments[SS]
    offset = gate.gate_offset
    values = [flags, cs.selector, return_eip]
    if error_code is not None:
        values.append(error_code)
    if is_inner:
        stack_selector, esp, stack, stack_descriptor = stack_for_level(cpu, descriptor.dpl, ext)
        values = [ss.selector, state.gpr[ESP], *values]
        if from_v86:
            values = [state.segments[register].selector for register in (GS, FS, DS, ES)] + values
        check_room(stack, esp, len(values), size_bytes, stack_selector & SELECTOR_INDEX | ext)
        if offset > descriptor.limit:
            raise general_protection(ext)
        check_accessed(cpu, descriptor)
        check_accessed(cpu, stack_descriptor)
        esp = push_frame(cpu, stack, esp, size_bytes, values, user=False)
        mark_accessed(cpu, stack_descriptor)
        ss.copy_from(stack)
        if from_v86:
            for register in (GS, FS, DS, ES):
                load_null(state.segments[register], 0)
        level = descriptor.dpl
    else:
        check_room(ss, state.gpr[ESP], len(values), size_bytes, ext)
        if offset > descriptor.limit:
            raise general_protection(ext)
        check_accessed(cpu, descriptor)
        esp = push_frame(cpu, ss, state.gpr[ESP], size_bytes, values, user=cpu.mmu.user)
        level = state.cpl
    mark_accessed(cpu, descriptor)
    cs.load(selector & ~RPL | level, descriptor.base, descriptor.limit, descriptor.attributes)
    cpu.set_esp(esp)
    state.eflags &= ~(TF | NT | RF | VM | (IF if gate.type in _INTERRUPT_GATES else 0))
    cpu.set_cpl(level)
    state.eip = offset


def _is_intercepted(cpu: Cpu, vector: int) -> bool:
    """The redirection bitmap (below the I/O bitmap of the TSS) has the bit of `vector` set. #GP(0) if out of reach."""
    tr = cpu.state.tr
    if not tr.attributes & IS_32 or tr.limit < LIMIT_32:
        raise general_protection(0)
    at = cpu.mmu.load_system(tr.base + IO_MAP_BASE_32, 2) - _REDIRECTION_BYTES + (vector >> 3)
    if not 0 <= at <= tr.limit:
        raise general_protection(0)
    return bool(cpu.mmu.load_system(tr.base + at, 1) & 1 << (vector & 7))


def _redirect(cpu: Cpu, vector: int, next_eip: int) -> None:
    """INT n in virtual-8086 mode to the 8086 program's own handler, by the IVT at linear 0."""
    state = cpu.state
    stack, cs = state.segments[SS], state.segments[CS]
    virtual_if = state.eflags & IOPL != IOPL
    flags = state.eflags & ~RF
    if virtual_if:
        flags = flags | IOPL | IF if flags & VIF else (flags | IOPL) & ~IF
    check_room(stack, state.gpr[ESP], 3, 2, 0)
    entry = cpu.mmu.load_linear(vector * 4, 4, cpu.mmu.user)
    esp = push_frame(cpu, stack, state.gpr[ESP], 2, (flags, cs.selector, next_eip), user=cpu.mmu.user)
    load_v86(cs, entry >> 16)
    cpu.set_esp(esp)
    state.eflags &= ~(TF | RF | (VIF if virtual_if else IF))
    state.shadow = SHADOW_NONE
    state.eip = entry & 0xFFFF
