"""`trap kvm`: the guest on the host's own CPU through /dev/kvm; time is the host's clock, so no two runs are the same.

It owns when the guest runs there and what each exit asks for. While something is wanted that KVM cannot do (a step, a
catch, more breakpoints than debug registers, a mode that this KVM lacks), instructions are `Interpreter`'s, which has
the same state, devices and order of events.

Virtual time goes on by the nanoseconds that pass on the host while the guest runs, counted in instructions of
`ns_per_insn`; in HLT it skips to the next event, as on the other engines. A stint may overshoot its icount.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from machine.cpu import Cpu
from machine.debug import DebugControl, Stop, StopKind
from machine.engine import ExitCount
from machine.faults import DebugFault, Vector
from machine.flags import IF, RF, TF, VM
from machine.interrupts import TripleFault, deliver_event
from machine.state import CR0_PG, CS
from vmm.debugregisters import DR7_ENABLED
from vmm.interp import PATIENCE_EVENTS, Interpreter
from vmm.trap.exits import ExitCounters
from vmm.trap.kick import Kick
from vmm.trap.kvm import DEBUG_ENABLE, DEBUG_HARDWARE_BREAKPOINTS, DebugExit, Events, ExitReason, KvmError, Vm
from vmm.trap.kvmdebug import REGISTERS, DebugPlan, plan
from vmm.trap.kvmfacts import look
from vmm.trap.kvmmemory import KvmMemory
from vmm.trap.kvmstate import load_state, read_tsc, store_state, write_tsc
from vmm.trap.kvmstay import KvmStay, Outcome

# A stint lasts as long as its budget says, but long enough for KVM to get anywhere, and short enough for Ctrl-C.
MIN_STINT_NS = 1_000_000
MAX_STINT_NS = 5_000_000
# After an instruction that KVM's emulator does not know, more and more of them are interpreted in one go: they come in
# company, and each exit for one takes a millisecond.
_MAX_BURST_INSNS = 20_000
_GOOD_RUN_NS = 5_000_000
_INTERPRETED_INSNS = 2000
_CPUID_LEAVES = (0, 1, 0x8000_0000, 0x8000_0001, 0x8000_0002, 0x8000_0003, 0x8000_0004)
_MOV_TO_CR0 = re.compile(rb"\x0f\x22[\x00-\x07\x40-\x47\x80-\x87\xc0-\xc7]")
_SCAN_BYTES = 16 << 20
_MASK64 = (1 << 64) - 1
_RESET_EIP, _RESET_BASE = 0xFFF0, 0xFFFF_0000


class KvmEngine(Interpreter):
    """The virtual machine monitor on KVM: see `machine.engine.Engine`.

    Raises:
        KvmError: there is no KVM here, or it refuses.
    """

    name = "trap kvm"

    def __init__(self, cpu: Cpu, debug: DebugControl) -> None:
        super().__init__(cpu, debug)
        self._facts = look()
        self._open()
        self._kick: Kick | None = None
        self._exits = ExitCounters()
        self._plan: DebugPlan | None = DebugPlan()
        self._hazards: frozenset[int] = frozenset()
        self._burst_insns = 1
        self._burst_end = 0
        self._good_ns = 0
        self._shut_down: Stop | None = None  # met while an event of KVM's was delivered
        self._replaying = False
        self._refusal = ""
        self._guest_ns = 0
        self._stays = 0
        self._injected = 0
        self._interpreted: dict[str, int] = {}

    def _open(self) -> None:
        self._vm = Vm()
        self._vcpu = self._vm.vcpu
        self._slots = KvmMemory(self._vm, self._cpu.memory)
        self._debug_set: tuple[object, ...] | None = None
        self._tsc_offset: int | None = None

    # The Engine interface.

    def enter(self) -> None:
        """Take over the CPU."""
        if self._vm.closed:
            self._open()
        memory = self._cpu.memory
        with ExitStack() as undo:
            undo.callback(self._vm.close)
            undo.callback(setattr, memory, "intercepts_devices", False)
            memory.intercepts_devices = True
            super().enter()
            undo.callback(super().leave)
            self._vcpu.set_cpuid({leaf: self._cpu.model.leaf(leaf) for leaf in _CPUID_LEAVES})
            self._slots.attach()
            undo.callback(self._slots.detach)
            self._undo = undo.pop_all()

    def leave(self) -> None:
        """Hand the CPU over."""
        self._undo.close()
        if self._kick is not None:
            self._kick.close()
            self._kick = None

    def statistics(self) -> Mapping[str, int | float | str]:
        """Counters since the start; KVM's own among them, as far as it keeps them."""
        kernel = self._vm.statistics()
        return {
            **super().statistics(),
            "kvm": self._refusal or self._facts.describe(),
            "seconds in guest": round(self._guest_ns / 1e9, 6),
            "seconds in exits": round(self._exits.total_ns / 1e9, 6),
            "stays on KVM": self._stays,
            "exits": self._exits.total,
            **{f"exits {row.reason}": row.count for row in self._exits.rows()},
            "interrupts injected": self._injected,
            **{f"interpreted for {why}": count for why, count in self._interpreted.items()},
            **{f"kernel {name}": value for name, value in kernel.items() if value},
        }

    def exit_counts(self) -> Sequence[ExitCount]:
        """See `CountsExits`."""
        return self._exits.rows()

    def run(self, until_icount: int, *, skip_breakpoint: bool = False, deliver_caught: bool = False) -> Stop:
        """Execute until the icount is reached or something stops it: see `Engine.run`; it may be overshot."""
        self._patience = PATIENCE_EVENTS
        self._deliver_caught = deliver_caught
        cpu = self._cpu
        cpu.single_iterations = False
        clock = cpu.clock
        wanted_ns = (until_icount - clock.icount) * clock.ns_per_insn
        end_ns = time.monotonic_ns() + min(max(wanted_ns, MIN_STINT_NS), MAX_STINT_NS)
        while clock.icount < until_icount and self._patience >= 0 and time.monotonic_ns() < end_ns:
            stop = self._attend()
            if stop is None:
                why = "a breakpoint to be passed" if skip_breakpoint else self._unfit()
                if why:
                    stop = self._interpret(why, until_icount, skip_breakpoint=skip_breakpoint)
                else:
                    stop = self._run_on_kvm(end_ns)
                skip_breakpoint = False
            if stop is not None:
                return stop
        return Stop(StopKind.BUDGET)

    # What is interpreted, and why.

    def _unfit(self) -> str:
        """Why the next instructions cannot run on KVM; empty if they can."""
        debug, state, icount = self._debug, self._cpu.state, self._cpu.clock.icount
        if self._refusal:
            return "a refusal by KVM"
        if debug.caught_vectors or debug.catch_interrupts or debug.catch_software:
            return "catches"
        if icount < self._burst_end:
            return "instructions that KVM does not emulate"
        if state.cr0 & CR0_PG and not self._facts.paging:
            return "paging, which this KVM lacks"
        if state.eflags & VM and not self._facts.virtual_8086:
            return "virtual-8086 mode, which this KVM lacks"
        if state.eflags & (TF | RF):
            return "TF or RF"
        if state.dr[7] & DR7_ENABLED and (debug.breakpoints or debug.watchpoints or not self._facts.data_breakpoints):
            return "the guest's own debug registers"
        hazards = frozenset() if self._facts.paging else self._find_hazards()
        if hazards is None:
            return "paging, which this KVM lacks"
        if hazards != self._hazards or self._plan is None:
            self._hazards = hazards
            self._plan = plan(debug, self._facts, hazards)
        if self._plan is None:
            return "breakpoints that do not fit the debug registers"
        return ""

    def _debug_changed(self) -> None:
        super()._debug_changed()
        self._plan = None

    def _find_hazards(self) -> frozenset[int] | None:
        """Where code may turn paging on: this KVM would answer that with #GP, so the guest stops before it.

        Without paging linear addresses are physical ones. Bytes that only look like MOV to CR0 do no harm. None: more
        memory is in use than can be looked through time and again.
        """
        memory = self._cpu.memory
        found: set[int] = set()
        room_bytes = _SCAN_BYTES
        for first, end in memory.used_extents():
            room_bytes -= end - first
            if room_bytes < 0:
                return None
            found.update(first + match.start() for match in _MOV_TO_CR0.finditer(memory.ram8[first:end]))
            if len(found) > REGISTERS:
                break
        return frozenset(found)

    def _interpret(self, why: str, until_icount: int, *, skip_breakpoint: bool) -> Stop | None:
        state, clock = self._cpu.state, self._cpu.clock
        before = clock.icount
        careful = state.eflags & (TF | RF) or state.shadow or state.dr[7] & DR7_ENABLED or self._watching
        if careful or skip_breakpoint:
            stop = self._execute_one(check_breakpoints=not skip_breakpoint)
        else:
            limit = min(until_icount, clock.deadline_icount, before + _INTERPRETED_INSNS)
            if before < self._burst_end:
                limit = min(limit, self._burst_end)
            stop = self._execute_blocks(limit)
        self._interpreted[why] = self._interpreted.get(why, 0) + clock.icount - before
        return stop

    def _begin_burst(self) -> None:
        """Interpret from here on for a while: the more, the sooner it happens again."""
        self._burst_insns = 1 if self._good_ns > _GOOD_RUN_NS else min(2 * self._burst_insns, _MAX_BURST_INSNS)
        self._good_ns = 0
        self._burst_end = self._cpu.clock.icount + self._burst_insns

    # Running on KVM.

    def _run_on_kvm(self, end_ns: int) -> Stop | None:
        """Let the guest run until the host's clock says `end_ns`, or something is to be looked at from outside."""
        try:
            kick = self._move_in()
        except KvmError as error:
            self._refusal = str(error)
            return None
        stay = KvmStay(self._cpu, self._vcpu, kick, self._exits, self._patience)
        try:
            outcome = stay.run(max(end_ns, time.monotonic_ns() + MIN_STINT_NS))
        except KvmError as error:
            self._refusal = str(error)
            outcome = None
        kick.disarm()
        self._guest_ns += stay.guest_ns
        self._good_ns += stay.guest_ns
        self._injected += stay.injected
        self._patience = stay.patience
        self._move_out()
        return self._judge(outcome)

    def _move_in(self) -> Kick:
        cpu, vcpu = self._cpu, self._vcpu
        state = cpu.state
        kick = self._kick
        if kick is None or kick.thread_id != threading.get_native_id():
            if kick is not None:
                kick.close()
            kick = self._kick = Kick()
            vcpu.open_signal(kick.other_signals)
        store_state(vcpu, state, fpu=cpu.model.has_fpu)
        if state.tsc_offset != self._tsc_offset:
            write_tsc(vcpu, cpu.tsc)
        wanted = self._plan or DebugPlan()
        if self._debug_set != (wanted.addresses, wanted.dr7):
            self._debug_set = wanted.addresses, wanted.dr7
            control = DEBUG_ENABLE | DEBUG_HARDWARE_BREAKPOINTS if wanted.used else 0
            vcpu.set_debug(control, wanted.addresses, wanted.dr7)
        cpu.repeating = False  # a REP under way goes on
        self._stays += 1
        return kick

    def _move_out(self) -> None:
        """Take the state back, and forget what was derived from memory that KVM has changed."""
        cpu = self._cpu
        state = cpu.state
        events = load_state(self._vcpu, state, fpu=cpu.model.has_fpu)
        self._tsc_offset = state.tsc_offset = (read_tsc(self._vcpu) - cpu.clock.now_ns) & _MASK64
        cpu.set_cpl(state.cpl)
        cpu.mmu.flush()
        self._cache.clear()
        if events.nmi_pending:
            cpu.lines.raise_nmi()
        if events.in_delivery:
            self._finish_delivery(events)

    def _finish_delivery(self, events: Events) -> None:
        """An event that KVM has accepted and not delivered reaches its handler by our own means."""
        vector, error_code, external = events.interrupt_vector, None, True
        if events.exception_injected or events.exception_pending:
            error_code = events.exception_code if events.exception_has_code else None
            vector, external = events.exception_vector, False
        elif events.nmi_injected:
            vector = Vector.NMI
        eip = self._cpu.state.eip
        try:
            deliver_event(self._cpu, vector, external=external, error_code=error_code, return_eip=eip)
        except TripleFault as triple:
            self._shut_down = Stop(StopKind.TRIPLE_FAULT, chain=triple.chain)

    # Stops.

    def _judge(self, outcome: Outcome) -> Stop | None:
        """What an end of a stay means: a stop, or None to go on."""
        stop, self._shut_down = self._shut_down, None
        if stop is not None:
            return stop
        if outcome is not ExitReason.SHUTDOWN:
            self._replaying = False
        if isinstance(outcome, DebugExit):
            return self._judge_debug_exit(outcome)
        if outcome is ExitReason.SHUTDOWN:
            return self._judge_shutdown()
        if outcome is ExitReason.HLT:
            return self._judge_halt()
        if outcome is ExitReason.INTERNAL_ERROR:
            self._begin_burst()
        return None

    def _judge_halt(self) -> Stop | None:
        cpu = self._cpu
        cpu.state.halted = 1
        wakes = cpu.state.eflags & IF and (cpu.lines.intr or cpu.clock.next_deadline_ns is not None)
        return None if wakes or cpu.lines.attention else Stop(StopKind.HALTED)

    def _judge_debug_exit(self, debug_exit: DebugExit) -> Stop | None:
        """A debug register of the host was hit, or the guest has trapped while we use them."""
        cpu, state = self._cpu, self._cpu.state
        used = self._plan or DebugPlan()
        watchpoint = used.watched(debug_exit.dr6)
        if watchpoint is not None:
            if watchpoint.cr3 is not None and watchpoint.cr3 != state.cr3:
                return None
            was_write = not watchpoint.on_read
            return Stop(StopKind.WATCHPOINT, linear=watchpoint.address, watchpoint=watchpoint, was_write=was_write)
        linear = (state.segments[CS].base + state.eip) & 0xFFFF_FFFF
        if linear in used.addresses and used.used:
            hit = self._breakpoint_at(linear)
            if hit is not None:
                return Stop(StopKind.BREAKPOINT, linear=linear, breakpoint=hit)
            self._burst_end = cpu.clock.icount + 1  # in another address space, or a MOV to CR0 that is ours to execute
            return None
        return self._deliver_fault(DebugFault(debug_exit.dr6 & 0xE00F), state.eip)

    def _judge_shutdown(self) -> Stop | None:
        """KVM says triple fault: the interpreter meets it again, with all that led to it, if the state has survived."""
        cpu, state = self._cpu, self._cpu.state
        if self._replaying or (state.eip == _RESET_EIP and state.segments[CS].base == _RESET_BASE):
            self._replaying = False
            return Stop(StopKind.TRIPLE_FAULT)
        self._replaying = True
        self._burst_end = cpu.clock.icount + 1
        return None
