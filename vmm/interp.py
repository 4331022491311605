"""`interp`: the reference CPU. It runs pre-decoded blocks and orders events exactly as the SDM does.

It owns the order of events at instruction boundaries, the count of instructions, and stops; what instructions do is in
`machine.instructions`, decoding and keeping blocks in `vmm.blocks`.

Source: SDM Vol. 3A, table "Priority Among Concurrent Events", and chapter "Debug" for TF, RF and DR0 to DR7.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from math import inf
from time import perf_counter

from machine.cpu import Cpu
from machine.debug import CodeBreakpoint, DebugControl, FaultLevel, Stop, StopKind
from machine.faults import DebugFault, GuestFault, PageFault, SoftwareInterrupt, Vector, general_protection
from machine.flags import IF, RF, TF
from machine.fpu import FpuFrozen
from machine.instructions import Effect, Operation
from machine.interrupts import TripleFault, deliver_event, raise_exception, software_interrupt
from machine.memory import PAGE_SHIFT
from machine.state import CS, DR6_BS, MASK32, SEG_DB, SHADOW_MOV_SS, SHADOW_NONE
from vmm.blocks import Block, BlockCache
from vmm.debugregisters import DR7_ENABLED, data_hits, instruction_hits, watch_data, watch_pages

# How many events (deliveries, waits in HLT, chunks of a REP) one `run` handles before it returns though its icount is
# not reached: a guest may go on for ever without retiring an instruction, and must not keep the debugger out.
PATIENCE_EVENTS = 256

_BUDGET = Stop(StopKind.BUDGET)
_STEP = Stop(StopKind.STEP)
_NOTHING: list[Operation] = []
# Python 3.11 looks an enumeration's member up through its class each time, which costs as much as an instruction.
_NEXT, _BRANCH, _SYSTEM, _REPEAT = Effect.NEXT, Effect.BRANCH, Effect.SYSTEM, Effect.REPEAT


class Interpreter:
    """The reference engine: see `machine.engine.Engine`."""

    name = "interp"
    careful_dr7 = DR7_ENABLED  # bits of DR7 that have every instruction executed with all checks around it
    stops_short = True  # `run` makes use of `DebugControl.slack_insns`

    def __init__(self, cpu: Cpu, debug: DebugControl) -> None:
        self._cpu = cpu
        self._debug = debug
        self._cache = BlockCache(cpu)
        self._patience = 0
        self._deadline_s = inf
        self._deliver_caught = False
        self._breakpoints: dict[int, list[CodeBreakpoint]] = {}
        self._physical_breakpoints: dict[int, list[CodeBreakpoint]] = {}
        self._watching = False
        self._touched: Stop | None = None
        self._debug_hits = 0
        self._watched_registers: tuple[int, ...] = ()
        # Pages that are watched, linear and physical, by number; True: reads, too.
        self._watched_linear: dict[int, bool] = {}
        self._watched_physical: dict[int, bool] = {}
        self._interrupts = 0
        self._delivered = False  # an interrupt, whose handler may have another one taken before anything is executed
        self._exceptions: dict[int, int] = {}

    # The Engine interface.

    def enter(self) -> None:
        """Take over the CPU."""
        self._cache.attach()
        self.resume()

    def leave(self) -> None:
        """Hand the CPU over."""
        self.pause()
        self._cache.detach()

    def resume(self) -> None:
        """Run the CPU again, by what was derived before `pause`."""
        self._debug.on_change.append(self._debug_changed)
        self._debug_changed()

    def pause(self) -> None:
        """Another engine runs the CPU for a while: what is derived is kept, and kept right."""
        self._debug.on_change.remove(self._debug_changed)
        self._cpu.mmu.set_watch(frozenset(), None)

    def statistics(self) -> Mapping[str, int | float | str]:
        """Counters since the start."""
        cache = self._cache
        counters: dict[str, int | float | str] = {
            "blocks decoded": cache.decoded_blocks,
            "instructions decoded": cache.decoded_insns,
            "invalidations": cache.invalidations,
            "interrupts": self._interrupts,
        }
        for vector, count in sorted(self._exceptions.items()):
            name = Vector(vector).name if vector in Vector._value2member_map_ else str(vector)
            counters[f"exceptions #{name}"] = count
        return counters

    def run(self, until_icount: int, *, skip_breakpoint: bool = False, deliver_caught: bool = False) -> Stop:
        """Execute until the icount is reached or something stops it: see `Engine.run`."""
        self._patience = PATIENCE_EVENTS
        self._deliver_caught = deliver_caught
        self._cpu.single_iterations = False
        self._deadline_s = perf_counter() + self._debug.longest_run_s
        clock = self._cpu.clock
        self._goal_icount = self._debug.goal(clock.icount, until_icount) if self.stops_short else until_icount
        while clock.icount < self._goal_icount and self._patience >= 0:
            self._delivered = False
            stop = self._attend()
            if stop is None and not (self._delivered and self._cpu.lines.attention):
                stop = self._execute(until_icount, skip_breakpoint=skip_breakpoint)
                skip_breakpoint = False
            if stop is not None:
                return stop
            if perf_counter() > self._deadline_s:
                break
        return _BUDGET

    def step(self, *, deliver_caught: bool = False) -> Stop:
        """Execute one instruction: see `Engine.step`."""
        self._patience = PATIENCE_EVENTS
        self._deliver_caught = deliver_caught
        state = self._cpu.state
        was_halted = state.halted
        deliveries = self._interrupts
        stop = self._attend(stepping=True)
        if stop is not None:
            return stop
        if self._interrupts != deliveries or was_halted:
            return _BUDGET if state.halted else _STEP
        self._cpu.single_iterations = True
        return self._execute_step() or _STEP

    # Instruction boundaries.

    def _attend(self, *, stepping: bool = False) -> Stop | None:
        """Handle all that comes before the next instruction: device requests, due events, interrupts, HLT."""
        cpu = self._cpu
        state, lines, clock = cpu.state, cpu.lines, cpu.clock
        deliver = not stepping or self._debug.step_interrupts
        while True:
            if clock.icount >= clock.deadline_icount:
                clock.run_due()
            if lines.attention:
                if lines.exit_requested:
                    return Stop(StopKind.EXIT, exit_request=lines.take_exit())
                if lines.reset_requested:
                    lines.take_reset()
                    return Stop(StopKind.RESET)
            # A trap of the instruction before comes ahead of NMI and INTR.
            if cpu.pending_debug and state.shadow != SHADOW_MOV_SS:
                hits, cpu.pending_debug = cpu.pending_debug, 0
                return self._deliver_fault(DebugFault(hits), state.eip)
            if lines.attention:
                if deliver and lines.nmi_pending and not state.nmi_blocked and state.shadow != SHADOW_MOV_SS:
                    return self._accept_nmi()
                if lines.intr and state.eflags & IF and not state.shadow and not cpu.repeating:
                    if not deliver:
                        state.halted = 0  # the wake-up is seen, the delivery waits
                    else:
                        return self._accept_interrupt()
            if not state.halted:
                return None
            self._patience -= 1
            if self._patience < 0:
                return _BUDGET
            if not state.eflags & IF or not clock.skip_to_next():
                return Stop(StopKind.HALTED)

    def _accept_nmi(self) -> Stop | None:
        state = self._cpu.state
        self._cpu.lines.take_nmi()
        state.nmi_blocked = 1
        self._begin_delivery()
        return self._deliver_external(Vector.NMI)

    def _accept_interrupt(self) -> Stop | None:
        cpu, debug = self._cpu, self._debug
        state, lines = cpu.state, cpu.lines
        if debug.catch_interrupts and not self._deliver_caught:
            level = FaultLevel(lines.peek(), None, None, state.segments[CS].selector, state.eip, external=True)
            return Stop(StopKind.CATCH, level=level)
        self._begin_delivery()
        return self._deliver_external(lines.acknowledge())

    def _deliver_external(self, vector: int) -> Stop | None:
        """An interrupt or NMI that was accepted enters its handler."""
        cpu, self._delivered = self._cpu, True
        try:
            deliver_event(cpu, vector, external=True, error_code=None, return_eip=cpu.state.eip)
        except TripleFault as triple:
            return Stop(StopKind.TRIPLE_FAULT, chain=triple.chain)
        return None

    def _begin_delivery(self) -> None:
        self._cpu.state.halted = 0
        self._cpu.repeating = False  # an NMI does not wait for the end of a REP, and what comes behind it need not
        self._deliver_caught = False
        self._interrupts += 1
        self._patience -= 1

    def _deliver_fault(self, fault: GuestFault, eip: int) -> Stop | None:
        """Deliver an exception that returns to `eip`, or stop before that if it is caught."""
        cpu = self._cpu
        if isinstance(fault, FpuFrozen):
            cpu.state.eip, cpu.state.halted = eip, 1
            return None
        if fault.return_eip is not None:
            eip = fault.return_eip
        cr2 = fault.linear if isinstance(fault, PageFault) else None
        if fault.vector in self._debug.caught_vectors and not self._deliver_caught:
            cpu.state.eip = eip
            cs = cpu.state.segments[CS].selector
            return Stop(StopKind.CATCH, level=FaultLevel(fault.vector, fault.error_code, cr2, cs, eip))
        self._deliver_caught = False
        self._patience -= 1
        self._exceptions[fault.vector] = self._exceptions.get(fault.vector, 0) + 1
        cpu.repeating = False
        try:
            raise_exception(cpu, fault, eip)
        except TripleFault as triple:
            cpu.state.eip = eip
            return Stop(StopKind.TRIPLE_FAULT, chain=triple.chain)
        return None

    def _deliver_software(self, event: SoftwareInterrupt, eip: int, next_eip: int) -> Stop | None:
        """INT n, INT3, INTO, INT1: it retires when the handler is entered."""
        cpu, debug = self._cpu, self._debug
        caught = debug.catch_software if event.by_int_n else event.vector in debug.caught_vectors
        if caught and not self._deliver_caught:
            cpu.state.eip = eip
            cs = cpu.state.segments[CS].selector
            return Stop(StopKind.CATCH, level=FaultLevel(event.vector, None, None, cs, eip))
        self._deliver_caught = False
        self._patience -= 1
        try:
            software_interrupt(cpu, event.vector, next_eip, by_int_n=event.by_int_n)
        except GuestFault as fault:
            return self._deliver_fault(fault, eip)
        cpu.clock.icount += 1
        return None

    # Execution.

    def _execute(self, until_icount: int, *, skip_breakpoint: bool) -> Stop | None:
        """Execute until the icount, the next event of a device, or what `run` must look at: the state says how."""
        state, clock = self._cpu.state, self._cpu.clock
        is_careful = state.eflags & (TF | RF) or state.shadow or state.dr[7] & self.careful_dr7 or self._watching
        if is_careful or skip_breakpoint:
            return self._execute_one(check_breakpoints=not skip_breakpoint)
        return self._execute_blocks(min(until_icount, clock.deadline_icount))

    def _execute_step(self) -> Stop | None:
        """Execute one instruction for `step`."""
        return self._execute_one(check_breakpoints=False)

    def _execute_blocks(self, limit_icount: int) -> Stop | None:
        """Run blocks until the icount is reached, or something happens that `run` must look at."""
        cpu, cache = self._cpu, self._cache
        state, clock = cpu.state, cpu.clock
        cs = state.segments[CS]
        # Only an instruction that ends the loop can change CS, CPL or the mode.
        # Code of a segment of 4 GiB wraps round at its end, as its data does.
        base, code_end = cs.base, cs.limit + 1 if cs.limit != MASK32 else 1 << 33
        big = bool(cs.attributes & SEG_DB)
        fetched = cache.fetched[big * 2 + cpu.mmu.user]
        icount = clock.icount
        while icount < limit_icount:
            eip = state.eip
            linear = (base + eip) & MASK32
            try:
                block = fetched[linear >> 12][linear & 0xFFF]
                operations = block.operations
            except KeyError:
                operations = _NOTHING
            if not operations:
                if icount > clock.icount and perf_counter() > self._deadline_s:
                    break  # code that is always new takes thirty times as long
                clock.icount = icount
                if eip >= code_end:
                    return self._deliver_fault(general_protection(), eip)
                try:
                    block, withheld = cache.find(linear, big)
                except GuestFault as fault:
                    return self._deliver_fault(fault, eip)
                operations = block.operations
                room = self._insns_to_breakpoint(linear, block) if withheld else len(operations)
                if not room:
                    return self._execute_one(check_breakpoints=True)
                room = min(room, limit_icount - icount)
            else:
                room = limit_icount - icount
            offsets, effect = block.offsets, block.effect
            count = len(operations)
            if eip + offsets[-1] > code_end:
                room = min(room, sum(eip + end <= code_end for end in offsets[1:]))
                if not room:
                    clock.icount = icount
                    return self._deliver_fault(general_protection(), eip)
            plain = effect is _NEXT or effect is _BRANCH
            if not plain and room >= count:
                # The last instruction may look at the time, so it must be right by then.
                clock.icount = icount + count - 1
            cache.running = block
            done = 0
            try:
                for operation in operations if room >= count else islice(operations, room):
                    operation()
                    done += 1
            except GuestFault as fault:
                clock.icount = icount + done
                return self._deliver_fault(fault, (eip + offsets[done]) & MASK32)
            except SoftwareInterrupt as event:
                clock.icount = icount + done
                return self._deliver_software(event, (eip + offsets[done]) & MASK32, (eip + offsets[done + 1]) & MASK32)
            icount += done
            if done < count:
                state.eip = (eip + offsets[done]) & MASK32
            elif effect is _BRANCH:
                pass
            elif effect is _NEXT:
                state.eip = (eip + offsets[-1]) & MASK32
            elif effect is _REPEAT:
                cpu.repeating = state.eip == (eip + offsets[-2]) & MASK32
                if cpu.repeating:
                    icount -= 1
                    self._patience -= 1
                break  # INS and OUTS may have woken a device
            else:
                if effect is _SYSTEM:
                    state.eip = (eip + offsets[-1]) & MASK32
                break
        clock.icount = icount
        return None

    def _execute_one(self, *, check_breakpoints: bool) -> Stop | None:
        """Execute one instruction with everything that can stop or trap around it."""
        cpu, cache = self._cpu, self._cache
        state, clock = cpu.state, cpu.clock
        cs = state.segments[CS]
        eip = state.eip
        linear = (cs.base + eip) & MASK32
        if check_breakpoints:
            hit = self._breakpoint_at(linear)
            if hit is not None:
                return Stop(StopKind.BREAKPOINT, linear=linear, breakpoint=hit)
        flags, shadow = state.eflags, state.shadow
        if state.dr[7] & DR7_ENABLED:
            if self._watched_registers != (state.dr[7], *state.dr[:4]):
                self._watch()
            hits = 0 if flags & RF else instruction_hits(state.dr, linear)
            if hits:
                return self._deliver_fault(DebugFault(hits), eip)
        if eip > cs.limit:
            return self._deliver_fault(general_protection(), eip)
        try:
            block, _ = cache.find(linear, bool(cs.attributes & SEG_DB), single=True)
        except GuestFault as fault:
            return self._deliver_fault(fault, eip)
        end = block.offsets[1]
        if eip + end > cs.limit + 1 and cs.limit != MASK32:
            return self._deliver_fault(general_protection(), eip)
        effect = block.effect if len(block.operations) == 1 else _NEXT
        self._touched, self._debug_hits = None, 0
        single = cpu.single_iterations
        cpu.single_iterations = single or bool(flags & TF)
        cpu.last_iteration = False
        state.shadow = SHADOW_NONE
        state.eflags = flags & ~RF
        cache.running = block
        try:
            block.operations[0]()
        except GuestFault as fault:
            if fault.return_eip is None:
                state.eflags, state.shadow = flags, shadow
            return self._deliver_fault(fault, eip)
        except SoftwareInterrupt as event:
            return self._deliver_software(event, eip, (eip + end) & MASK32)
        finally:
            cpu.single_iterations = single
            cpu.last_iteration = False
            cache.running = None
        if effect is _NEXT or effect is _SYSTEM:
            state.eip = (eip + end) & MASK32
        cpu.repeating = effect is _REPEAT and state.eip == eip
        if cpu.repeating:
            self._patience -= 1
            state.eflags |= flags & RF
        else:
            clock.icount += 1
        return self._trap(bool(flags & TF), shadow)

    def _trap(self, single_step: bool, shadow_before: int) -> Stop | None:
        """After an instruction: #DB for TF, data breakpoints and task switches; then the debugger's watchpoints."""
        cpu = self._cpu
        state = cpu.state
        hits = self._debug_hits | cpu.pending_debug
        if single_step:
            hits |= DR6_BS
        stop = None
        if hits and state.shadow == SHADOW_MOV_SS and shadow_before != SHADOW_MOV_SS:
            # Held until after the next instruction; the single-step trap itself is lost.
            cpu.pending_debug = hits & ~DR6_BS
        elif hits:
            cpu.pending_debug = 0
            stop = self._deliver_fault(DebugFault(hits), state.eip)
        return stop or self._touched

    # Breakpoints and watchpoints.

    def _debug_changed(self) -> None:
        """Sort the debugger's wishes by what the run loop asks."""
        debug = self._debug
        self._breakpoints, self._physical_breakpoints = {}, {}
        for breakpoint_ in debug.breakpoints:
            table = self._physical_breakpoints if breakpoint_.physical else self._breakpoints
            table.setdefault(breakpoint_.address, []).append(breakpoint_)
        self._cache.withhold(
            frozenset(address >> PAGE_SHIFT for address in self._breakpoints),
            frozenset(address >> PAGE_SHIFT for address in self._physical_breakpoints),
        )
        self._watch()

    def _watch(self) -> None:
        """Have the MMU report the pages that watchpoints, or enabled data breakpoints of DR7, are on."""
        debug, state = self._debug, self._cpu.state
        watchpoints = debug.watchpoints
        self._watching = bool(watchpoints)
        self._watched_registers = (state.dr[7], *state.dr[:4])
        linear: dict[int, bool] = {}
        physical: dict[int, bool] = {}
        for watchpoint in watchpoints:
            watch_pages(
                physical if watchpoint.physical else linear,
                watchpoint.address,
                watchpoint.length,
                reads=watchpoint.on_read,
            )
        watch_data(linear, state.dr)
        self._watched_linear, self._watched_physical = linear, physical
        observer = self._accessed if linear or physical else None
        self._cpu.mmu.set_watch(frozenset(linear), observer, everything=bool(physical))

    def _breakpoint_at(self, linear: int) -> CodeBreakpoint | None:
        state = self._cpu.state
        candidates = self._breakpoints.get(linear, ())
        if self._physical_breakpoints:
            physical = self._cpu.mmu.probe(linear)
            if physical is not None:
                candidates = [*candidates, *self._physical_breakpoints.get(physical, ())]
        for candidate in candidates:
            if candidate.cr3 is None or candidate.cr3 == state.cr3:
                return candidate
        return None

    def _insns_to_breakpoint(self, linear: int, block: Block) -> int:
        """How many instructions of a block at `linear` come before the first breakpoint in it."""
        for number in range(len(block.operations)):
            address = (linear + block.offsets[number]) & MASK32
            wanted = address in self._breakpoints or self._physical_breakpoints
            if wanted and self._breakpoint_at(address) is not None:
                return number
        return len(block.operations)

    def _accessed(self, linear: int, physical: int, size_bytes: int, write: bool) -> None:
        """A data access to a watched page."""
        hits = data_hits(self._cpu.state.dr, linear, size_bytes, write=write)
        if hits:
            self._debug_hits |= hits
            self._cpu.last_iteration = True
        if self._touched is not None:
            return
        for watchpoint in self._debug.watchpoints:
            address = physical if watchpoint.physical else linear
            touches = address < watchpoint.address + watchpoint.length and watchpoint.address < address + size_bytes
            wanted = watchpoint.on_write if write else watchpoint.on_read
            if touches and wanted and (watchpoint.cr3 is None or watchpoint.cr3 == self._cpu.state.cr3):
                where = max(address, watchpoint.address)
                self._cpu.last_iteration = True
                self._touched = Stop(StopKind.WATCHPOINT, linear=where, watchpoint=watchpoint, was_write=write)
                return
