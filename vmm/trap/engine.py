"""`trap`: the hardware-style VMM. The guest runs in guest mode under a VMCB; its exits are handled here.

It owns the loop of world switches and what is done for each exit. It must not know how guest mode is run: everything
crosses in the VMCB, and in the registers that SVM leaves to the VMM to carry.

Instruction boundaries, devices and time are `Interpreter`'s, so that a guest does the same here as on other engines.
Source of the shadow paging: K. Adams, O. Agesen, "A Comparison of Software and Hardware Techniques for x86
Virtualization", ASPLOS 2006, sections 2.4 and 4.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from machine.bios.firmware import FIRMWARE_PORT
from machine.cpu import Cpu
from machine.debug import DebugControl, Stop, StopKind
from machine.engine import ExitCount
from machine.faults import DebugFault, GuestFault, PageFault, Vector
from machine.flags import RF, TF
from machine.fpu import FpuFrozen
from machine.interrupts import TripleFault
from machine.memory import PAGE_SHIFT, READ_ONLY
from machine.paging import P, probe, walk
from machine.state import CR4_PAE, EAX, EBX, ECX, EDX, ESP
from vmm.bt import BinaryTranslator
from vmm.debugregisters import DR7_ENABLED
from vmm.native.shadows import HOLDS_SHADOWED_TABLE, Window
from vmm.native.windows import Refusal
from vmm.trap import exitcodes
from vmm.trap.emulated import GuestMode, encode
from vmm.trap.exitcodes import ExitCode
from vmm.trap.exitinfo import (
    IOIO_IN,
    IOIO_PORT_SHIFT,
    IOIO_SIZE_SHIFT,
    IOIO_STRING,
    PF_USER,
    PF_WRITE,
    Event,
    EventType,
)
from vmm.trap.exits import ExitCounters
from vmm.trap.intercepts import CR_WRITE_SHIFT, Intercept3, Intercept4
from vmm.trap.permissions import IoPermissions, MsrPermissions
from vmm.trap.vmcb import NP_ENABLE, V_IGN_TPR, V_IRQ, Vmcb, offset_of
from vmm.trap.vmcbstate import store_state

ALWAYS_INTERCEPTED = (
    Intercept3.INTR | Intercept3.NMI | Intercept3.SMI | Intercept3.INIT | Intercept3.CPUID | Intercept3.INVD
    | Intercept3.HLT | Intercept3.IOIO_PROT | Intercept3.MSR_PROT | Intercept3.TASK_SWITCH | Intercept3.SHUTDOWN
)  # fmt: skip
ALWAYS_INTERCEPTED_4 = Intercept4.VMRUN | Intercept4.WBINVD
_SHADOW_CR = (1 << 0 | 1 << 3 | 1 << 4) * (1 | 1 << CR_WRITE_SHIFT)
_NESTED_CR = 1 << 4 + CR_WRITE_SHIFT
_ASID = 1
# By name what a VMM writes back after it has executed an instruction for the guest; all else is rare.
_WRITTEN_BACK = ("rip", "rflags", "rax", "rsp", "cr0", "cr3", "cr4")
_PLACES = {name: offset_of(name) // 8 for name in _WRITTEN_BACK}
_EVENTINJ = offset_of("eventinj") // 8
_EXITCODE = offset_of("exitcode") // 8
_INTERCEPT3 = offset_of("intercept3") // 4
_V_INTR = offset_of("v_intr") // 8
_WITH_ERROR_CODE = frozenset({Vector.DF, Vector.TS, Vector.NP, Vector.SS, Vector.GP, Vector.PF, Vector.AC})


class VmrunError(RuntimeError):
    """The VMCB that was made here is not valid."""


class TrapEngine(GuestMode):
    """The VMM: see `machine.engine.Engine`.

    Attributes:
        vmcb: its control block.
        exits: all of them so far.
    """

    def __init__(
        self,
        cpu: Cpu,
        debug: DebugControl,
        *,
        nested: bool = False,
        verify: bool = False,
        beside: BinaryTranslator | None = None,
    ) -> None:
        """Prepare.

        Args:
            cpu: what it runs.
            debug: what a debugger wants.
            nested: the guest's tables are walked by the hardware, over nested ones; else they are shadowed.
            verify: whether emitted code is proven harmless before it may run.
            beside: as for `BinaryTranslator`.
        """
        super().__init__(cpu, debug, verify=verify, beside=beside)
        self.nested = nested
        self.vmcb = _make_vmcb(nested=nested)
        self.policy.io = IoPermissions(intercept_all=True)
        self.policy.msr = MsrPermissions(intercept_all=True)
        self._is_current = False  # the VMCB has the guest's registers
        self._table_writes: list[tuple[int, int]] | None = None  # offset in RAM and old value, while one is carried out
        self.exits = ExitCounters()
        self._reason = ""
        self._injected: dict[str, int] = {}
        self._world_switches = 0
        self._prefills = 0
        self._vmrun_ns = 0
        self._handlers: dict[int, Callable[[Vmcb], Stop | None]] = {
            ExitCode.INTR: self._go_on,
            ExitCode.NMI: self._go_on,
            ExitCode.VINTR: self._go_on,
            ExitCode.IOIO: self._access_port_for_guest,
            ExitCode.CPUID: self._identify,
            ExitCode.HLT: self._halt,
            ExitCode.EXCP_PF: self._handle_page_fault,
            ExitCode.NPF: self._access_device,
            ExitCode.TASK_SWITCH: self._switch_task,
            ExitCode.SHUTDOWN: self._shut_down,
            ExitCode.INVALID: self._reject,
        }

    @property
    def name(self) -> str:  # type: ignore[override]
        """What a user types to select it."""
        return "trap nested" if self.nested else "trap"

    def resume(self) -> None:
        """Run the CPU again, by what was derived before `pause`."""
        self._cpu.memory.intercepts_devices = True
        super().resume()
        self._windows.keep_tables(always=not self.nested)
        self._cpu.memory.write_observers.append(self._table_written)

    def pause(self) -> None:
        """Another engine runs the CPU for a while, without intercepts."""
        self._cpu.memory.write_observers.remove(self._table_written)
        self._windows.keep_tables(always=False)
        super().pause()
        self._cpu.memory.intercepts_devices = self._beside is not None

    # What is counted.

    def exit_counts(self) -> Sequence[ExitCount]:
        """See `CountsExits`."""
        return self.exits.rows()

    def exit_sites(self, count: int) -> Sequence[tuple[int, int, int]]:
        """The guest addresses whose exits cost most: address, exits, nanoseconds."""
        return self.exits.sites(count)

    def statistics(self) -> Mapping[str, int | float | str]:
        """Counters since the start; times are of the host, and three clocks: guest, VMM, emulation of hardware."""
        guest_ns = self.tally.seconds_in_tc * 1e9
        total = self.exits.total
        walks = self.walks
        paging: dict[str, int | float | str] = {"prefills of shadow pages": self._prefills}
        if self.nested:
            paging = {
                "nested page walks": walks.walks,
                "nested walk references": walks.references,
                "nested walk references of guest tables alone": walks.references_native,
                "nested walk references with a page-walk cache": walks.references_cached,
            }
        return {
            **super().statistics(),
            "paging": "nested" if self.nested else "shadow",
            "seconds in guest": round(guest_ns / 1e9, 6),
            "seconds in VMM": round(max(0.0, self.tally.seconds_in_run - self._vmrun_ns / 1e9), 6),
            "seconds in emulation of hardware": round((self._vmrun_ns - guest_ns) / 1e9, 6),
            "exits": total,
            **{f"exits {row.reason}": row.count for row in self.exits.rows()},
            "world switches": self._world_switches,
            "injected events": sum(self._injected.values()),
            **{f"injected {kind}": count for kind, count in self._injected.items()},
            "VMCB reads an exit": round(self.vmcb.reads / total, 3) if total else 0,
            "VMCB writes an exit": round(self.vmcb.writes / total, 3) if total else 0,
            **paging,
        }

    # The Engine interface.

    def run(self, until_icount: int, *, skip_breakpoint: bool = False, deliver_caught: bool = False) -> Stop:
        """Execute until the icount is reached or something stops it: see `Engine.run`."""
        self._is_current = False
        return super().run(until_icount, skip_breakpoint=skip_breakpoint, deliver_caught=deliver_caught)

    def step(self, *, deliver_caught: bool = False) -> Stop:
        """Execute one instruction: see `Engine.step`."""
        self._is_current = False
        stop = super().step(deliver_caught=deliver_caught)
        return self._flush_event() or stop

    def _execute(self, until_icount: int, *, skip_breakpoint: bool) -> Stop | None:
        """World switches, until nothing is left that has to be done before devices and interrupts are looked at."""
        clock, state = self._cpu.clock, self._cpu.state
        while True:
            before = clock.icount, state.eip
            stop, again = self._switch(min(until_icount, clock.deadline_icount), skip_breakpoint=skip_breakpoint)
            if stop is not None:
                return self._flush_event() or stop
            if not again and not self.vmcb.views[3][_EVENTINJ]:
                return None
            skip_breakpoint = skip_breakpoint and before == (clock.icount, state.eip)

    def _execute_step(self) -> Stop | None:
        again = True
        stop: Stop | None = None
        while again and stop is None:
            stop, again = self._switch(self._cpu.clock.icount + 1, single=True)
        return self._flush_event() or stop

    def _flush_event(self) -> Stop | None:
        """Let an event that is injected reach its handler, and nothing else be executed."""
        stop: Stop | None = None
        while stop is None and self.vmcb.views[3][_EVENTINJ]:
            stop, _ = self._switch(self._cpu.clock.icount)
        return stop

    def _switch(
        self, timer_icount: int, *, skip_breakpoint: bool = False, single: bool = False
    ) -> tuple[Stop | None, bool]:
        """To the guest and back, and what it came back for.

        Returns:
            What stops it for the debugger; whether the guest has to go on before anything else happens.
        """
        block = self.vmcb
        self._fill(block, single=single)
        began_ns = time.perf_counter_ns()
        stop = self.vmrun(block, timer_icount, skip_breakpoint=skip_breakpoint, single=single)
        left_ns = time.perf_counter_ns()
        self._vmrun_ns += left_ns - began_ns
        self._world_switches += 1
        eip = self._cpu.state.eip
        again = False
        if stop is not None or (single and block.views[3][_EXITCODE] == ExitCode.EXCP_DB):
            self._reason = "debugger"
        else:
            before = self._cpu.clock.icount, eip
            stop = self._handle(block)
            again = before == (self._cpu.clock.icount, self._cpu.state.eip) and self._reason.endswith("hidden")
        took_ns = time.perf_counter_ns() - left_ns
        self.exits.note(self._reason, took_ns, eip)
        return stop, again

    def _fill(self, block: Vmcb, *, single: bool) -> None:
        """Bring the VMCB up to date before the guest is entered: only what has changed."""
        state, lines = self._cpu.state, self._cpu.lines
        if not self._is_current:
            store_state(block, state)
            self._is_current = True
        wanted = int(ALWAYS_INTERCEPTED)
        if not self.nested:
            wanted |= Intercept3.INVLPG
        else:
            wanted |= Intercept3.CR0_SEL_WRITE
        v_intr = V_IGN_TPR
        if lines.intr and not single:
            wanted |= Intercept3.VINTR
            v_intr |= V_IRQ
        if lines.nmi_pending and state.nmi_blocked:
            wanted |= Intercept3.IRET
        words, quads = block.views[2], block.views[3]
        if words[_INTERCEPT3] != wanted:
            block.intercept3 = wanted
        if quads[_V_INTR] != v_intr:
            block.v_intr = v_intr

    # Events for the guest.

    def _inject_event(self, event: Event) -> None:
        self.vmcb.eventinj = event.encode()
        self._injected[event.name] = self._injected.get(event.name, 0) + 1

    def _deliver_external(self, vector: int) -> Stop | None:
        kind = EventType.NMI if vector == Vector.NMI else EventType.INTR
        self._inject_event(Event(vector, kind))
        return None

    def _deliver_fault(self, fault: GuestFault, eip: int) -> Stop | None:
        # Outside guest mode: an instruction that the VMM emulates, or a trap that its task switch has left pending.
        if self.policy.active or isinstance(fault, FpuFrozen):
            return super()._deliver_fault(fault, eip)
        return self._reflect(fault, eip)

    def _reflect(self, fault: GuestFault, eip: int) -> Stop | None:
        """Have the guest meet its own exception, or stop if that is caught."""
        if fault.vector in self._debug.caught_vectors and not self._deliver_caught:
            return super()._deliver_fault(fault, eip)
        self._note_exception(fault)
        state = self._cpu.state
        state.eip = eip if fault.return_eip is None else fault.return_eip
        self._tell_where(fault)
        self._inject_event(Event(fault.vector, EventType.EXCEPTION, fault.error_code))
        return None

    def _tell_where(self, fault: GuestFault) -> None:
        """What injection leaves to the VMM: CR2 and DR6."""
        state = self._cpu.state
        if isinstance(fault, PageFault):
            self.vmcb.cr2 = state.cr2 = fault.linear
        elif isinstance(fault, DebugFault):
            self.vmcb.dr6 = state.dr[6]

    def _go_on_delivering(self, fault: GuestFault) -> Stop | None:
        """The delivery of an event raised an exception: that one is next, or a double fault, or nothing is."""
        delivery = self.delivery
        assert delivery is not None
        try:
            delivery.follow(self._cpu, fault)
        except TripleFault as triple:
            self.shutdown = triple.chain
            return self._shut_down(self.vmcb)
        bits = encode(delivery)
        event = Event.decode(bits)
        assert event is not None
        self._tell_where(fault)  # also where a double fault takes the place of a page fault
        self._inject_event(event)
        return None

    # Exits.

    def _handle(self, block: Vmcb) -> Stop | None:
        code = block.exitcode
        self._reason = exitcodes.name_of(code).removeprefix("VMEXIT_")
        handler = self._handlers.get(code)
        if handler is not None:
            return handler(block)
        vector = exitcodes.exception_vector(code)
        if vector is None or vector in (Vector.BP, Vector.OF):
            return self._emulate(block)
        error_code = block.exitinfo1 if vector in _WITH_ERROR_CODE else None
        return self._reflect(GuestFault(vector, error_code), self._cpu.state.eip)

    def _go_on(self, _block: Vmcb) -> Stop | None:
        """What is pending is looked at before the guest goes on."""
        return None

    def _shut_down(self, _block: Vmcb) -> Stop | None:
        return Stop(StopKind.TRIPLE_FAULT, chain=self.shutdown)

    def _reject(self, _block: Vmcb) -> Stop | None:
        raise VmrunError("VMRUN refuses the control block")

    def _emulate(self, block: Vmcb) -> Stop | None:
        """Execute the guest's next instruction in the VMM's own emulator."""
        stop = self._execute_one(check_breakpoints=False)
        self._write_back(block)
        return stop

    def _write_back(self, block: Vmcb) -> None:
        """Write what the VMM has changed of the guest's registers."""
        state, quads = self._cpu.state, block.views[3]
        values = (state.eip, state.eflags, state.gpr[EAX], state.gpr[ESP], state.cr0, state.cr3, state.cr4)
        for (name, place), value in zip(_PLACES.items(), values, strict=True):
            if quads[place] != value:
                setattr(block, name, value)
        store_state(block, state)

    def _is_plain(self) -> bool:
        """Nothing but the instruction itself has to be minded: no trap, shadow or watched access."""
        state = self._cpu.state
        return not (state.eflags & (TF | RF) or state.shadow or self._guarding or state.dr[7] & DR7_ENABLED)

    def _retire(self, block: Vmcb, next_eip: int) -> None:
        """The guest's instruction is done."""
        cpu = self._cpu
        block.rip = cpu.state.eip = next_eip
        cpu.clock.icount += 1
        cpu.repeating = False

    def _access_port_for_guest(self, block: Vmcb) -> Stop | None:
        info = block.exitinfo1
        port = info >> IOIO_PORT_SHIFT
        is_in = info & IOIO_IN
        self._reason = f"{'IN from' if is_in else 'OUT to'} {port:#06x}"
        if info & IOIO_STRING or port == FIRMWARE_PORT or not self._is_plain():
            return self._emulate(block)
        cpu = self._cpu
        size_bytes = info >> IOIO_SIZE_SHIFT & 7
        mask = (1 << 8 * size_bytes) - 1
        eax = block.rax
        if is_in:
            block.rax = cpu.state.gpr[EAX] = eax & ~mask | cpu.ports.load(port, size_bytes) & mask
        else:
            cpu.ports.store(port, size_bytes, eax & mask)
        self._retire(block, block.exitinfo2)
        return None

    def _identify(self, block: Vmcb) -> Stop | None:
        if not self._is_plain():
            return self._emulate(block)
        cpu = self._cpu
        gpr = cpu.state.gpr
        gpr[EAX], gpr[EBX], gpr[ECX], gpr[EDX] = cpu.model.leaf(block.rax)
        block.rax = gpr[EAX]
        self._retire(block, block.nrip)
        return None

    def _halt(self, block: Vmcb) -> Stop | None:
        if not self._is_plain():
            return self._emulate(block)
        self._cpu.state.halted = 1
        self._retire(block, block.nrip)
        return None

    def _access_device(self, block: Vmcb) -> Stop | None:
        """A nested page fault: nothing but devices and ROM has no nested mapping."""
        info, physical = block.exitinfo1, block.exitinfo2
        self._reason = f"NPF {'write' if info & PF_WRITE else 'read'} {physical & ~0xFFF:#x}"
        return self._emulate(block)

    def _switch_task(self, block: Vmcb) -> Stop | None:
        """Switch tasks for the guest: by its instruction, or by the event whose gate it is."""
        delivery = self.delivery
        if not block.exitintinfo or delivery is None:
            return self._emulate(block)
        fault = delivery.attempt(self._cpu)
        self._write_back(block)
        if fault is not None:
            return self._go_on_delivering(fault)
        self.delivery = None
        return None

    # Shadow paging.

    def _handle_page_fault(self, block: Vmcb) -> Stop | None:
        """A true fault is the guest's own, a hidden one the shadow's, a trace of a write to a shadowed table."""
        error, linear = block.exitinfo1, block.exitinfo2
        write, user = bool(error & PF_WRITE), bool(error & PF_USER)
        window = self.fault_window
        if block.exitintinfo and self.delivery is not None:
            assert self.second is not None
            self._reason = "EXCP_PF true"
            return self._go_on_delivering(self.second)
        if window is not None and self._windows.fill(linear, write=write, window=window):
            self._reason = "EXCP_PF hidden"
            return None
        refusal = Refusal.PAGE_FAULT if window is None else self._windows.refusal
        paging = self._cpu.state if window is None else window.paging
        if refusal is Refusal.PAGE_FAULT:
            try:
                walk(self._cpu.memory, paging, linear, write=write, user=user)
            except PageFault as fault:
                self._reason = "EXCP_PF true"
                return self._reflect(fault, self._cpu.state.eip)
        if refusal in (Refusal.TRACE, Refusal.TABLE) and window is not None:
            return self._write_protected(block, window, linear)
        if refusal is Refusal.SPURIOUS:
            self._reason = "EXCP_PF hidden"
            self.interpret_next = True
            return None
        self._reason = "EXCP_PF device"
        return self._emulate(block)

    def _write_protected(self, block: Vmcb, window: Window, linear: int) -> Stop | None:
        """A write where the shadow allows none: a trace, ROM, or what only the native core protects."""
        memory = self._cpu.memory
        physical = probe(memory, window.paging, linear)
        flags = 0 if physical is None else memory.page_flags[memory.ram_address(physical) >> PAGE_SHIFT]
        if flags & READ_ONLY:
            self._reason = "EXCP_PF ROM"
            return self._emulate(block)
        if not flags & HOLDS_SHADOWED_TABLE:
            self._reason = "EXCP_PF hidden"
            self._windows.fill(linear, write=False, window=window)
            self.interpret_next = True
            return None
        self._reason = "EXCP_PF trace"
        writes = self._table_writes = []
        try:
            stop = self._emulate(block)
        finally:
            self._table_writes = None
        for at, old in writes:
            if not old & P:
                self._prefills += self._windows.prefill(at)
        return stop

    def _table_written(self, at: int, length: int, old: bytes, flags: int) -> None:
        """A store to a page that is watched, by an instruction that a trace has led to."""
        if self._table_writes is not None and flags & HOLDS_SHADOWED_TABLE:
            size = 8 if self._cpu.state.cr4 & CR4_PAE else 4
            for offset in range(-at % size, length, size):
                self._table_writes.append((at + offset, old[offset]))


def _make_vmcb(*, nested: bool) -> Vmcb:
    block = Vmcb()
    block.intercept3 = int(ALWAYS_INTERCEPTED)
    block.intercept4 = int(ALWAYS_INTERCEPTED_4)
    block.intercept_cr = _NESTED_CR if nested else _SHADOW_CR
    block.intercept_exceptions = 0 if nested else 1 << Vector.PF
    block.np_control = NP_ENABLE if nested else 0
    block.guest_asid = _ASID
    return block
