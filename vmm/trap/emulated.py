"""Guest mode on the native core: `vmrun` takes a VMCB, runs the guest under its intercepts, and comes back at an exit.

It stands for the hardware: what is not intercepted happens here without an exit, in emitted code, by its routines, or
interpreted on the hardware's behalf. It must not know what a VMM does with an exit, and nothing is adapted to one.

Source: AMD64 APM Vol. 2, "Secure Virtual Machine": "VMRUN Instruction", "#VMEXIT", "Event Injection".
"""

from __future__ import annotations

import sys

from machine.cpu import Cpu
from machine.debug import DebugControl, FaultLevel, Stop, StopKind
from machine.faults import DebugFault, GuestFault, PageFault, SoftwareInterrupt, Vector
from machine.flags import IF, RF
from machine.fpu import FpuFrozen
from machine.interrupts import Delivery, TripleFault
from machine.memory import PAGE_SHIFT, READ_ONLY
from machine.paging import DIRTY, RW, entries, permits
from machine.state import CR0_PG, CS, DR7_GD, MASK32, SEG_DB, SHADOW_MOV_SS
from vmm.bt import BinaryTranslator
from vmm.native import stateblock
from vmm.native.adaptation import Culprits
from vmm.native.faultroutine import LONGEST_ACCESS_BYTES
from vmm.native.fragments import Fragment
from vmm.native.regions import READABLE, UNMAPPED, WRITABLE
from vmm.native.shadows import HOLDS_SHADOWED_TABLE, PROTECT_KEY, Window
from vmm.native.sharing import Space
from vmm.trap.exitcodes import ExitCode, exception_code
from vmm.trap.exitinfo import (
    PF_PRESENT,
    PF_USER,
    PF_WRITE,
    Event,
    EventType,
    NestedPageFaultInfo,
    TaskSwitchCause,
    TaskSwitchInfo,
)
from vmm.trap.interception import Intercepted, InterceptingCache, Policy
from vmm.trap.intercepts import Intercept3
from vmm.trap.vmcb import NP_ENABLE, V_INTR_VECTOR_SHIFT, V_IRQ, Vmcb, offset_of
from vmm.trap.vmcbstate import invalid_because, load_state, store_state
from vmm.trap.walks import WalkCounter

_LEFT = Stop(StopKind.BUDGET)  # guest mode was left; the VMCB says why
_SOFTWARE_EXCEPTIONS = (Vector.BP, Vector.OF)

_EXITCODE = offset_of("exitcode") // 8
_EXITINFO1 = offset_of("exitinfo1") // 8
_EXITINFO2 = offset_of("exitinfo2") // 8
_EXITINTINFO = offset_of("exitintinfo") // 8
_EVENTINJ = offset_of("eventinj") // 8
_NRIP = offset_of("nrip") // 8
_V_INTR = offset_of("v_intr") // 8
_NP_CONTROL = offset_of("np_control") // 8
_VECTORS = slice(offset_of("intercept_cr") // 4, offset_of("intercept5") // 4)


class NoCulprits(Culprits):
    """Hardware does not change its mind about an instruction that keeps faulting."""

    def __init__(self) -> None:
        super().__init__(volatile=None)

    def fault(self, _fragment: Fragment, _eip: int, *, soft: bool = False) -> bool:  # noqa: ARG002
        """Never translated anew."""
        return False

    def write(self, _fragment: Fragment, _first: int, _end: int) -> None:
        """Nor one whose bytes keep changing."""


class GuestMode(BinaryTranslator):
    """A CPU with SVM, as far as a VMM needs it: `vmrun`.

    Attributes:
        policy: the intercepts and the permission maps; the vectors are read from the VMCB.
        delivery: the event whose delivery an exit interrupted: what EXITINTINFO says, with its history.
        second: the exception that its delivery raised.
        fault_window: the shadow page table that an intercepted #PF came from; None if the fault did not need one.
        interpret_next: the next instruction hits what the native core protects for itself.
        shutdown: the exceptions that led to the last SHUTDOWN.
        walks: the page walks of nested paging.
    """

    stops_short = False  # the timer says to the instruction when the guest is left
    delivers_faults = False  # an exception may be intercepted

    def __init__(
        self, cpu: Cpu, debug: DebugControl, *, verify: bool = False, beside: BinaryTranslator | None = None
    ) -> None:
        super().__init__(cpu, debug, verify=verify, beside=beside)
        self._culprits = NoCulprits()
        self.policy = Policy()
        self._cache = InterceptingCache(cpu, self.policy)
        self._vmcb = Vmcb()
        self._vectors: tuple[int, ...] = ()
        self._is_nested = False
        self._virtual_interrupt = 0
        self._waiting: Intercepted | None = None  # noticed in emitted code, which has to be synchronized first
        self._serving_fault = False
        self._delivering = False
        self._software_event = 0  # as EXITINTINFO tells it, while INT n, INT3, INTO or INT1 enters its handler
        self._goal_icount = sys.maxsize  # until `run` says: the timer of `vmrun` comes first
        self.delivery: Delivery | None = None
        self.second: GuestFault | None = None
        self.fault_window: Window | None = None
        self.interpret_next = False
        self.shutdown: tuple[FaultLevel, ...] = ()
        self.walks = WalkCounter(cpu.memory)

    def enter(self) -> None:
        """Take over the CPU."""
        super().enter()
        self._vectors = ()

    def resume(self) -> None:
        """Run the CPU again, by what was derived before `pause`."""
        super().resume()
        self._windows.before_fill = self._before_fill
        self._spaces.sharing.enabled = False  # code that a window has no page for is fetched, which may be an exit
        self._cpu.mmu.before_access = self._before_access
        self._cpu.before_task_switch = self._before_task_switch
        self._cpu.mmu.flush()  # what is cached of devices has not been looked at

    def pause(self) -> None:
        """Another engine runs the CPU for a while, without intercepts."""
        self._windows.before_fill = None
        self._cpu.mmu.before_access = None
        self._cpu.before_task_switch = None
        super().pause()

    # World switches.

    def vmrun(
        self, block: Vmcb, timer_icount: int, *, skip_breakpoint: bool = False, single: bool = False
    ) -> Stop | None:
        """Run the guest of a VMCB until an intercepted event; the block then holds its state, and why it was left.

        The CPU's `state` has what the block has no room for. Nothing that is read or written here counts as an access
        of the VMM's.

        Args:
            block: the VMCB.
            timer_icount: when the host's timer interrupts the guest, which is an exit (INTR).
            skip_breakpoint: a debugger's breakpoint at the first instruction does not stop.
            single: the debugger wants one instruction; EXCP_DB when it is done.

        Returns:
            What stopped the guest for the debugger, or None. For hardware a stop is an exit, too: EXCP_DB.
        """
        accesses = block.reads, block.writes
        try:
            self._vmcb = block
            self._load(block)
            if invalid_because(block) is not None:
                self._leave(ExitCode.INVALID)
                return None
            self.policy.active = True
            try:
                stop = self._inject() or self._run_guest(timer_icount, skip_breakpoint, single)
            finally:
                self.policy.active = False
            if stop is not _LEFT:
                self._leave(ExitCode.EXCP_DB)
            store_state(block, self._cpu.state)
            return None if stop is _LEFT else stop
        finally:
            block.reads, block.writes = accesses

    def _load(self, block: Vmcb) -> None:
        cpu = self._cpu
        state = cpu.state
        before = state.cr0, state.cr3, state.cr4, state.cpl
        load_state(block, state)
        if before != (state.cr0, state.cr3, state.cr4, state.cpl):
            cpu.set_cpl(state.cpl)
            cpu.mmu.flush()
        cpu.mmu.update_alignment()
        self._registers.stale = True
        quads = block.views[3]
        self._virtual_interrupt = quads[_V_INTR] & V_IRQ
        self._is_nested = bool(quads[_NP_CONTROL] & NP_ENABLE)
        self._waiting = None
        self.fault_window = None
        vectors = tuple(block.views[2][_VECTORS])
        if vectors != self._vectors:
            self._vectors = vectors
            self.policy.take(vectors)
            rows = self.policy.rows()
            assert self._tc is not None
            if rows != self._tc.withheld:
                self._tc.withheld = rows
                self.flush_translations()

    def _leave(self, code: int, info1: int = 0, info2: int = 0, *, length: int = 0, interrupted: int = 0) -> Stop:
        """An exit: the host is back."""
        quads = self._vmcb.views[3]
        next_eip = self._cpu.state.eip + length & 0xFFFF_FFFF if length else 0
        quads[_EXITCODE] = code
        quads[_EXITINFO1] = info1
        quads[_EXITINFO2] = next_eip if code == ExitCode.IOIO else info2
        quads[_EXITINTINFO] = interrupted
        quads[_NRIP] = next_eip
        self._waiting = None
        self._registers.stale = True
        return _LEFT

    def _leave_for_exception(self, fault: GuestFault, interrupted: int = 0) -> Stop:
        info2 = fault.linear if isinstance(fault, PageFault) else 0
        return self._leave(exception_code(fault.vector), fault.error_code or 0, info2, interrupted=interrupted)

    # Events.

    def _inject(self) -> Stop | None:
        """Deliver what EVENTINJ asks for."""
        quads, state = self._vmcb.views[3], self._cpu.state
        bits = quads[_EVENTINJ]
        event = Event.decode(bits)
        if event is None:
            self.delivery = None
            return None
        quads[_EVENTINJ] = 0
        delivery = self.delivery
        if delivery is None or encode(delivery) != bits:
            delivery = Delivery.of_event(
                event.vector,
                external=event.type in (EventType.INTR, EventType.NMI),
                error_code=event.error_code,
                return_eip=state.eip,
                linear=state.cr2 if event.vector == Vector.PF and event.type is EventType.EXCEPTION else None,
                resume=False if event.type is EventType.SOFTWARE else None,
            )
        if event.type is EventType.NMI:
            state.nmi_blocked = 1
        return self._deliver(delivery)

    def _deliver(self, delivery: Delivery) -> Stop | None:
        """Enter an event's handler, or what follows if that faults; an exit if one of these is intercepted."""
        cpu = self._cpu
        self._registers.stale = True
        while True:
            self._delivering = True
            try:
                fault = delivery.attempt(cpu)
            finally:
                self._delivering = False
            if fault is None:
                self.delivery = None
                return None
            self.delivery, self.second = delivery, fault
            if isinstance(fault, Intercepted):
                return self._leave(fault.code, fault.info1, fault.info2, interrupted=encode(delivery))
            if self.policy.exceptions >> fault.vector & 1:
                return self._leave_for_exception(fault, encode(delivery))
            interrupted = encode(delivery)
            try:
                delivery.follow(cpu, fault)
            except TripleFault as triple:
                self.shutdown = triple.chain
                return self._leave(ExitCode.SHUTDOWN)
            if delivery.vector == Vector.DF and self.policy.exceptions >> Vector.DF & 1:
                return self._leave(ExitCode.EXCP_DF, interrupted=interrupted)

    def _deliver_fault(self, fault: GuestFault, eip: int) -> Stop | None:
        """What an instruction raised: an exit, or the guest's own handler."""
        cpu = self._cpu
        state, policy = cpu.state, self.policy
        if not policy.active:
            return super()._deliver_fault(fault, eip)
        if isinstance(fault, Intercepted):
            state.eip = eip
            return self._leave(
                fault.code, fault.info1, fault.info2, length=fault.length, interrupted=self._software_event
            )
        if isinstance(fault, FpuFrozen):
            if policy.three & Intercept3.FERR_FREEZE:
                state.eip = eip
                return self._leave(ExitCode.FERR_FREEZE)
            return super()._deliver_fault(fault, eip)
        if fault.return_eip is not None:
            eip = fault.return_eip
        if policy.exceptions >> fault.vector & 1:
            state.eip = eip
            self.delivery = None
            if isinstance(fault, DebugFault):  # as its handler would find them
                state.dr[6] |= fault.conditions
                state.dr[7] &= ~DR7_GD
            elif fault.vector == Vector.BR:
                return self._leave(ExitCode.EXCP_BR, length=self._length_of_instruction())
            return self._leave_for_exception(fault, self._software_event)
        if fault.vector in self._debug.caught_vectors and not self._deliver_caught:
            return super()._deliver_fault(fault, eip)
        self._note_exception(fault)
        state.eip = eip
        return self._deliver(Delivery.of_fault(fault, eip))

    def _length_of_instruction(self) -> int:
        """In bytes, of the one at EIP, which has been executed."""
        cs = self._cpu.state.segments[CS]
        block, _ = self._cache.find(cs.base + self._cpu.state.eip & MASK32, bool(cs.attributes & SEG_DB), single=True)
        return block.offsets[1]

    def _note_exception(self, fault: GuestFault) -> None:
        """An exception is about to be delivered."""
        self._deliver_caught = False
        self._patience -= 1
        self._exceptions[fault.vector] = self._exceptions.get(fault.vector, 0) + 1
        self._cpu.repeating = False
        if isinstance(fault, DebugFault):
            self._cpu.state.dr[6] |= fault.conditions

    def _deliver_software(self, event: SoftwareInterrupt, eip: int, next_eip: int) -> Stop | None:
        is_exception = event.vector in _SOFTWARE_EXCEPTIONS and not event.by_int_n
        if self.policy.active and is_exception and self.policy.exceptions >> event.vector & 1:
            self._cpu.state.eip = eip
            self.delivery = None
            return self._leave(exception_code(event.vector), length=next_eip - eip & 0xFFFF_FFFF)
        self.delivery = None  # the instruction is executed again
        self._software_event = Event(
            event.vector, EventType.SOFTWARE if event.by_int_n else EventType.EXCEPTION
        ).encode()
        try:
            return super()._deliver_software(event, eip, next_eip)
        finally:
            self._software_event = 0

    # Running.

    def _run_guest(self, timer_icount: int, skip_breakpoint: bool, single: bool) -> Stop:
        cpu = self._cpu
        state, lines, clock = cpu.state, cpu.lines, cpu.clock
        while True:
            if self._waiting is not None:
                return self._leave_waiting()
            if (
                clock.icount >= min(timer_icount, clock.deadline_icount)
                or lines.exit_requested
                or lines.reset_requested
            ):
                return self._leave(ExitCode.INTR)
            if cpu.pending_debug and state.shadow != SHADOW_MOV_SS:
                hits, cpu.pending_debug = cpu.pending_debug, 0
                stop = self._deliver_fault(DebugFault(hits), state.eip)
            elif single:
                stop = self._execute_one(check_breakpoints=False) or self._leave(ExitCode.EXCP_DB)
            elif lines.nmi_pending and not state.nmi_blocked and state.shadow != SHADOW_MOV_SS:
                if self.policy.three & Intercept3.NMI:
                    return self._leave(ExitCode.NMI)
                stop = self._take_nmi()
            elif self._virtual_interrupt and state.eflags & IF and not state.shadow and not cpu.repeating:
                stop = self._take_virtual_interrupt()
            elif state.halted or self._patience < 0 or self._is_late():
                return self._leave(ExitCode.INTR)
            elif self.interpret_next:
                self.interpret_next = False
                careful = state.shadow or state.eflags & RF
                stop = self._execute_one(check_breakpoints=False) if careful else self._interpret(clock.icount + 1)
            else:
                stop = super()._execute(timer_icount, skip_breakpoint=skip_breakpoint)
                skip_breakpoint = False
            if stop is not None:
                return stop

    def _take_nmi(self) -> Stop | None:
        """A physical NMI that is the guest's."""
        state = self._cpu.state
        self._cpu.lines.take_nmi()
        state.nmi_blocked = 1
        self._patience -= 1
        return self._deliver(Delivery.of_event(Vector.NMI, external=True, error_code=None, return_eip=state.eip))

    def _take_virtual_interrupt(self) -> Stop | None:
        """V_IRQ is set, and the guest can take it."""
        if self.policy.three & Intercept3.VINTR:
            return self._leave(ExitCode.VINTR)
        quads = self._vmcb.views[3]
        vector = quads[_V_INTR] >> V_INTR_VECTOR_SHIFT & 0xFF
        quads[_V_INTR] &= ~V_IRQ
        self._virtual_interrupt = 0
        self._patience -= 1
        eip = self._cpu.state.eip
        return self._deliver(Delivery.of_event(vector, external=True, error_code=None, return_eip=eip))

    def _leave_waiting(self) -> Stop:
        waiting = self._waiting
        assert waiting is not None
        return self._leave(waiting.code, waiting.info1, waiting.info2)

    def _interpret(self, limit_icount: int) -> Stop | None:
        if self._waiting is not None and self.policy.active:
            return self._leave_waiting()
        return super()._interpret(limit_icount)

    def _pending(self) -> int:
        return super()._pending() | stateblock.PENDING_INTERRUPT * bool(self._virtual_interrupt)

    def _is_interrupted(self, limit_icount: int) -> bool:
        return bool(self._virtual_interrupt) or super()._is_interrupted(limit_icount)

    # What memory accesses lead to.

    def _handle_fault(self, space: Space, limit_icount: int) -> int | None:
        assert self._tc is not None
        at = self._tc.state.quads[stateblock.FAULT_RIP] - self._tc.host
        self._serving_fault = True
        try:
            target = super()._handle_fault(space, limit_icount)
        finally:
            self._serving_fault = False
        if self._waiting is not None and self._is_another_first(at, self._waiting.info2):
            # Of the instruction's page faults hardware meets another one: the interpreter finds out which.
            self._waiting = self.fault_window = None
        return target

    def _is_another_first(self, at: int, linear: int) -> bool:
        """Whether the guest's tables forbid an access that may not be the first one for which they do."""
        tc, window = self._tc, self.fault_window
        assert tc is not None
        assert window is not None
        if not tc.is_routine(at):
            fragment = self._store.index.at(at)
            in_order = fragment is not None and fragment.index_at(at) in fragment.unit.faulting_in_order
            # Close to the beginning of a page it may be of an access that begins in the page before.
            if in_order and linear & 0xFFF >= LONGEST_ACCESS_BYTES:
                return False
        write = bool(tc.state.quads[stateblock.FAULT_ERROR] & 2)
        return not permits(self._cpu.memory, window.paging, linear, write=write, user=window.user)

    def _before_fill(self, window: Window, linear: int, write: bool) -> bool:
        """A page is missing where emitted code runs: the hardware's page walk fills it, or finds a fault in a shadow.

        Raises:
            Intercepted: code cannot be fetched.
        """
        if not self.policy.active:
            return True
        rights = window.rights(linear >> PAGE_SHIFT)
        if rights == WRITABLE or (rights and not write):
            return True
        if self._is_nested:
            self.walks.count(window.paging, linear)
            return True
        if write and rights == READABLE and self._is_ours(window, linear):
            return True
        if not self.policy.exceptions >> Vector.PF & 1:
            return True
        error = PF_PRESENT * (rights != UNMAPPED) | PF_WRITE * write | PF_USER * window.user
        self._waiting = Intercepted(ExitCode.EXCP_PF, error, linear)
        self.fault_window = window
        if not self._serving_fault:
            raise self._waiting
        return False

    def _is_ours(self, window: Window, linear: int) -> bool:
        """A page is protected only because the native core watches it, for code that it holds."""
        region = window.regions[linear >> window.region_shift]
        flags = self._cpu.memory.page_flags[region.ram_pages[(linear >> PAGE_SHIFT) - region.first_page]]
        if not flags or flags & (HOLDS_SHADOWED_TABLE | READ_ONLY):
            return False
        if not window.paging.cr0 & CR0_PG:
            return True
        *_, leaf = entries(self._cpu.memory, window.paging, linear)
        may_write = region.writable and (leaf.value & RW or not window.key & PROTECT_KEY)
        return bool(may_write and leaf.value & DIRTY)

    def _before_access(self, linear: int, physical: int, write: bool, user: bool) -> None:
        """An interpreted instruction accesses memory: what is no RAM has no mapping in the VMM's page tables."""
        if not self.policy.active or self._delivering:
            return
        memory = self._cpu.memory
        at = memory.ram_address(physical)
        is_rom = at >= 0 and write and memory.page_flags[at >> PAGE_SHIFT] & READ_ONLY
        if at >= 0 and not is_rom:
            return
        error = (PF_PRESENT if is_rom else 0) | PF_WRITE * write
        if self._is_nested:
            raise Intercepted(ExitCode.NPF, *NestedPageFaultInfo(error | PF_USER, physical).encode())
        if self.policy.exceptions >> Vector.PF & 1:
            raise Intercepted(ExitCode.EXCP_PF, error | PF_USER * user, linear)

    def _before_task_switch(
        self, selector: int, by_iret: bool, by_jump: bool, error_code: int | None, flags: int
    ) -> None:
        if self.policy.active and self.policy.three & Intercept3.TASK_SWITCH:
            cause = TaskSwitchCause.IRET if by_iret else TaskSwitchCause.JUMP if by_jump else TaskSwitchCause(0)
            info = TaskSwitchInfo(selector, cause, error_code, bool(flags & RF))
            raise Intercepted(ExitCode.TASK_SWITCH, *info.encode())


def encode(delivery: Delivery) -> int:
    """The event of a delivery, as EVENTINJ and EXITINTINFO have it."""
    kind = EventType.EXCEPTION
    if delivery.is_external:
        kind = EventType.NMI if delivery.vector == Vector.NMI else EventType.INTR
    return Event(delivery.vector, kind, delivery.error_code).encode()
