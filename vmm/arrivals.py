"""Interrupts and exceptions that Python learns of, under emitted code.

For interrupts from outside a routine of the TC enters the handler, and the guest runs on there; what it refuses is
delivered by the interpreter, as exceptions are. It must not know which code runs before or after.
"""

from __future__ import annotations

from abc import abstractmethod

from machine.cpu import Cpu
from machine.debug import DebugControl, Stop
from machine.faults import GuestFault, SoftwareInterrupt
from machine.flags import IF, RF, TF, VM
from machine.state import MASK32
from vmm.native import stateblock
from vmm.native.cache import Exit, TranslationCache
from vmm.native.modes import Mode
from vmm.native.registers import GuestRegisters
from vmm.native.spaces import Spaces
from vmm.watched import WatchedTranslator


class ArrivingTranslator(WatchedTranslator):
    """The part of `BinaryTranslator` that takes interrupts."""

    _least_budget_insns: int
    _registers: GuestRegisters
    _spaces: Spaces

    def __init__(self, cpu: Cpu, debug: DebugControl) -> None:
        super().__init__(cpu, debug)
        self._tc: TranslationCache | None = None
        self._may_put_off = False  # whether emitted code runs next
        self._arriving: int | None = None  # the vector of what it is to deliver first

    @abstractmethod
    def _execute_native(self, limit_icount: int, mode: Mode | None) -> Stop | None:
        """Run emitted code: from the handler of what is arriving on, if something is."""

    def _needs_boundary(self, enabled: int) -> bool:
        """Whether a device wants more than an interrupt that is disabled, which only emitted code has to know of."""
        lines = self._cpu.lines
        if enabled or lines.nmi_pending or lines.reset_requested or lines.exit_requested:
            return True
        assert self._tc is not None
        self._tc.state.words[stateblock.PENDING] = self._pending()
        return False

    def _must_attend(self) -> bool:
        """Whether the instruction just interpreted left something for the boundary, or for another way to execute."""
        state = self._cpu.state
        return bool(
            state.eflags & (TF | RF)
            or state.shadow
            or state.halted
            or self._cpu.pending_debug
            or self._are_registers_new()
        )

    def _pending(self) -> int:
        """Not 0 if emitted code must not enable interrupts, return to where they are, or execute INT n by itself."""
        cpu = self._cpu
        other = cpu.state.nmi_blocked or self._debug.catch_software
        return stateblock.PENDING_OTHER * bool(other) | stateblock.PENDING_INTERRUPT * bool(cpu.lines.attention)

    def _deliver_fault(self, fault: GuestFault, eip: int) -> Stop | None:
        self._registers.stale = True
        return super()._deliver_fault(fault, eip)

    def _deliver_software(self, event: SoftwareInterrupt, eip: int, next_eip: int) -> Stop | None:
        self._registers.stale = True
        return super()._deliver_software(event, eip, next_eip)

    def _deliver_external(self, vector: int) -> Stop | None:
        """Leave it to emitted code, which runs next, if it may be able to."""
        cpu = self._cpu
        if not self._may_put_off or self._guarding or cpu.lines.attention or cpu.state.eflags & (TF | RF | VM):
            return super()._deliver_external(vector)
        self._arriving = vector
        return None

    def _execute(self, until_icount: int, *, skip_breakpoint: bool) -> Stop | None:
        self._may_put_off = True
        vector, clock = self._arriving, self._cpu.clock
        if vector is None:
            if self._cpu.repeating and self._cpu.state.eflags & IF and self._pending() & stateblock.PENDING_INTERRUPT:
                until_icount = min(until_icount, clock.icount + 1)  # it comes as soon as the REP is done
            return super()._execute(until_icount, skip_breakpoint=skip_breakpoint)
        limit_icount = min(until_icount, clock.deadline_icount)
        mode = self._spaces.modes.current()
        stop = None
        if mode is not None and mode.is_plain and limit_icount - clock.icount >= self._least_budget_insns:
            stop = self._execute_native(limit_icount, mode)
        is_refused = self._arriving is not None
        self._arriving = None
        return super()._deliver_external(vector) if is_refused else stop

    def _prepare_arrival(self, vector: int) -> int:
        """The offset at which to enter for the delivery of an interrupt, for which everything is made ready."""
        tc = self._tc
        assert tc is not None
        words = tc.state.words
        words[stateblock.ROUTINE_EIP] = words[stateblock.ROUTINE_NEXT] = self._cpu.state.eip
        tc.state.quads[stateblock.SCRATCH9] = vector
        return tc.routines["arrive"]

    def _arrive(self, vector: int) -> int | None:
        """Emitted code was left: where to enter again for the delivery, or None if it is done or `_arriving` still."""
        tc = self._tc
        assert tc is not None
        words, quads = tc.state.words, tc.state.quads
        at = quads[stateblock.FAULT_RIP] - tc.host
        if words[stateblock.REASON] == Exit.FAULT and tc.is_arrival(at):
            tc.undo_routine(at)
            host, write = quads[stateblock.FAULT_ADDRESS], bool(quads[stateblock.FAULT_ERROR] & 2)
            window = self._windows.at(host)
            if window is not None and self._windows.fill(host & MASK32, write=write, window=window):
                return self._prepare_arrival(vector)
        elif words[stateblock.REASON] != Exit.REFUSAL:
            self._arriving = None
        return None
