"""`bt`: adaptive binary translation. Guest code runs as host code from the translation cache; the rest is interpreted.

It owns the loop around emitted code: entering it with a budget, and what each exit asks for. Instruction boundaries,
events and stops are `Interpreter`'s, so that both engines take every interrupt at the same icount.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from contextlib import ExitStack
from math import inf
from time import perf_counter
from typing import TYPE_CHECKING

from machine.cpu import Cpu
from machine.debug import DebugControl, Stop
from machine.faults import GuestFault, Vector
from machine.flags import IF, RF
from machine.instructions import Effect
from machine.memory import SECOND_HOLDS_CODE
from machine.paging import walk
from machine.state import MASK32, SHADOW_NONE, SHADOW_STI
from vmm.arrivals import ArrivingTranslator
from vmm.native import narrowstrings, stateblock
from vmm.native.alarm import ALARM
from vmm.native.cache import TC_BYTES, Exit, TranslationCache
from vmm.native.faultroutine import LONGEST_ACCESS_BYTES
from vmm.native.faultsites import FaultSites
from vmm.native.fpulive import LiveFpu
from vmm.native.fpupointers import recover
from vmm.native.fragments import Fragment
from vmm.native.fragmentstore import SECOND_HOLDS_FRAGMENTS, FragmentStore
from vmm.native.modes import Mode
from vmm.native.portaccess import PortAccesses
from vmm.native.ramview import RamView
from vmm.native.recovery import leave_fragment
from vmm.native.registers import GuestRegisters
from vmm.native.sharing import Space
from vmm.native.signals import CORE
from vmm.native.softmemory import SoftMemory
from vmm.native.spaces import Spaces
from vmm.native.tally import Stopwatch, Tally
from vmm.native.windows import Refusal

if TYPE_CHECKING:
    from vmm.native.inspection import Translations

MIN_BUDGET_INSNS = 32  # below that, entering the TC costs more than interpreting
# A fault on a page that is watched costs as much as several instructions with all checks. Where a stretch of emitted
# code between two of them is shorter than that, as on the page of the stack, some are interpreted at once.
SHORT_STRETCH_INSNS = 8
GUARDED_INSNS = 48
# Python 3.11 takes as long to look an enumeration's member up as for anything else at a port access.
_FAULT, _CALLOUT, _PORT, _SOFT, _LINK = map(int, (Exit.FAULT, Exit.CALLOUT, Exit.PORT, Exit.SOFT, Exit.LINK))
_HABITS = (Refusal.TRACE, Refusal.DEVICE, Refusal.TABLE, Refusal.VOLATILE)  # who faults so will do it again
_SOFT_HABITS = (Refusal.TABLE, Refusal.VOLATILE)
_PLAIN = (Effect.NEXT, Effect.BRANCH, Effect.REPEAT)  # leaves everything but general registers and flags alone


class BinaryTranslator(ArrivingTranslator):
    """The software VMM: see `machine.engine.Engine`.

    Attributes:
        tally, ports: what they have counted.
        soft_memory: what the software path to memory looks at.
    """

    name = "bt"
    delivers_faults = True  # in emitted code, where nobody wants to know of them

    def __init__(
        self, cpu: Cpu, debug: DebugControl, *, verify: bool = False, beside: BinaryTranslator | None = None
    ) -> None:
        """Prepare.

        Args:
            cpu: what it runs.
            debug: what a debugger wants.
            verify: whether emitted code is proven harmless before it may run.
            beside: an engine that is entered before this one and left after it; they run the CPU in turns, and share
                the windows.
        """
        super().__init__(cpu, debug)
        self._verify = verify
        self._least_budget_insns = MIN_BUDGET_INSNS
        self._beside = beside
        self._is_judging = False  # the instruction at EIP is a callout for what it does, so that is looked at
        self._soft_place: tuple[Fragment, int, int] | None = None  # what is interpreted failed to be one's soft form
        self.tally = Tally()
        self.ports = PortAccesses(cpu)

    def enter(self) -> None:
        """Take over the CPU."""
        cpu, beside = self._cpu, self._beside
        with ExitStack() as undo:
            undo.callback(setattr, self, "_tc", None)
            tc = self._tc = TranslationCache()
            undo.callback(tc.close)
            state = tc.state
            verifier = None
            if self._verify:
                from vmm.native.verifier import Verifier

                verifier = Verifier(tc)
            self._ram_view = RamView(cpu.memory, state)
            undo.callback(self._ram_view.close)
            spaces = self._spaces = Spaces(cpu, state, beside.windows if beside else None)
            self._windows = spaces.windows
            self._sites = FaultSites(state)
            self._fpu = LiveFpu(cpu, state)
            self._store = FragmentStore(cpu, tc, spaces, self._fpu, self._culprits, self.tally, self._stops, verifier)
            if beside is not None:
                self._store.flag, self._cache.flag = SECOND_HOLDS_FRAGMENTS, SECOND_HOLDS_CODE
            state.set_cpuid(*cpu.model.leaf(0), *cpu.model.leaf(1))
            self._registers = GuestRegisters(cpu, state)
            super().enter()
            undo.callback(super().leave)
            self._cache.longest_insns = 1  # callouts come one at a time
            if self._culprits.volatile is not None:
                self._windows.keep_out(self._culprits.volatile)
            spaces.attach()
            undo.callback(spaces.detach)
            self.soft_memory: SoftMemory = SoftMemory(cpu, state, self._windows, beside.soft_memory if beside else None)
            undo.callback(self.soft_memory.close)
            self.soft_memory.attach()
            cpu.memory.write_observers.append(self._store.code_written)
            undo.callback(cpu.memory.write_observers.remove, self._store.code_written)
            self._store.on_give_up.append(self._cache.forget_page)
            self._undo = undo.pop_all()

    def leave(self) -> None:
        """Hand the CPU over."""
        self.flush_translations()
        self._sites.take_deliveries(self._exceptions)
        self._undo.close()

    def statistics(self) -> Mapping[str, int | float | str]:
        """Counters since the start."""
        if self._tc is not None:
            self._sites.take_deliveries(self._exceptions)
        return {
            **super().statistics(),
            "true faults": self._exceptions.get(Vector.PF, 0),
            **self.tally.report(),
            "fragments": len(self._store.index.by_address),
            "invalidations": self._store.invalidations,
            "code pages given up": self._store.given_up,
            "TC bytes used": TC_BYTES - self._tc.free_bytes if self._tc is not None else 0,
            "port accesses": self.ports.count,
            "polling rounds passed over": self.ports.rounds,
            **self._windows.counters,
            **self._culprits.counters,
            **self.soft_memory.counters,
            **self._sites.counters,
        }

    def translations(self) -> Translations:
        """See `Inspectable`."""
        from vmm.native.inspection import Translations

        assert self._tc is not None
        return Translations(self._tc, self._store.index, self.tally, self._store.landings, self._spaces.entry_counts())

    # Running.

    def run(self, until_icount: int, *, skip_breakpoint: bool = False, deliver_caught: bool = False) -> Stop:
        """Execute until the icount is reached or something stops it: see `Engine.run`."""
        longest_s = self._debug.longest_run_s
        CORE.arm()
        self._may_put_off = not skip_breakpoint
        try:
            if longest_s < inf:
                ALARM.start(longest_s, longest_s / 4)
            with Stopwatch(self.tally):
                return super().run(until_icount, skip_breakpoint=skip_breakpoint, deliver_caught=deliver_caught)
        finally:
            if longest_s < inf:
                ALARM.stop()
            CORE.disarm()
            self._may_put_off = False

    def _execute_blocks(self, limit_icount: int) -> Stop | None:
        """Run emitted code while the CPU is in a state that it stands for, and the budget is worth it."""
        if self._are_registers_new():
            self._watch()
        icount = self._cpu.clock.icount
        if limit_icount - icount < self._least_budget_insns or icount < self._guarded_until_icount:
            return self._interpret(limit_icount)
        mode = self._spaces.modes.current()
        if mode is None:
            return self._interpret(min(limit_icount, self._cpu.clock.icount + MIN_BUDGET_INSNS))
        return self._execute_native(limit_icount, mode)

    def _execute_native(self, limit_icount: int, mode: Mode | None) -> Stop | None:
        """Alternate between emitted code and single interpreted instructions until `run` must look at something."""
        cpu, clock, registers = self._cpu, self._cpu.clock, self._registers
        registers.stale = True
        while mode is not None:
            began_icount = clock.icount
            try:
                if not self._run_emitted_code(limit_icount, mode):
                    return None
            except GuestFault as fault:
                self.tally.faults_delivered += 1
                return self._deliver_fault(fault, cpu.state.eip)
            if cpu.state.shadow or cpu.state.eflags & RF or clock.icount >= self._goal_icount:
                return None
            if self._guarding and clock.icount - began_icount < SHORT_STRETCH_INSNS:
                self._guarded_until_icount = clock.icount + GUARDED_INSNS
                return None
            interpret = self._interpret_adapted if self._is_judging else self._interpret
            stop = interpret(min(limit_icount, clock.icount + 1))
            if stop is not None:
                return stop
            ran = self._cache.running
            if self._guarding or ran is None or ran.effect not in _PLAIN:
                registers.stale = True
            self._patience -= 1
            if self._is_interrupted(limit_icount):
                return None
            # What leaves everything but general registers, flags and memory alone cannot have changed more.
            if registers.stale:
                if self._must_attend():
                    return None
                mode = self._spaces.modes.current()
        return None

    def _interpret(self, limit_icount: int) -> Stop | None:
        """Interpret up to the icount, or only one instruction if it has to be checked for what is watched."""
        if not self._guarding:
            return super()._execute_blocks(limit_icount)
        if self._cpu.clock.icount < limit_icount:
            return self._execute_one(check_breakpoints=True)
        return None

    def _interpret_adapted(self, limit_icount: int) -> Stop | None:
        """Interpret an instruction that has been adapted; if it touches nothing that is watched, it may revert."""
        memory, eip = self._cpu.memory, self._cpu.state.eip
        before, has_moved = memory.other_accesses, self.soft_memory.take_moved()
        stop = self._interpret(limit_icount)
        for fragment in self._culprits.executed(eip, touched=has_moved or memory.other_accesses != before):
            self._store.drop_fragment(fragment)
        return stop

    def _is_interrupted(self, limit_icount: int) -> bool:
        """Whether a device, the time or a REP under way wants the boundary after any interpreted instruction."""
        cpu, clock = self._cpu, self._cpu.clock
        return bool(
            (cpu.lines.attention and self._needs_boundary(cpu.state.eflags & IF))
            or clock.icount + self._least_budget_insns > limit_icount
            or clock.deadline_icount < limit_icount
            or cpu.repeating
            or self._patience < 0
            or self._is_late()
        )

    def _is_late(self) -> bool:
        """Whether `run` has to come back, however little was executed."""
        return perf_counter() > self._deadline_s

    def _run_emitted_code(self, limit_icount: int, mode: Mode) -> bool:
        """Run from EIP on in the TC, until an instruction is to be interpreted; it is at EIP then.

        Returns:
            False if something is to be looked at before that instruction.

        Raises:
            GuestFault: the instruction at EIP cannot be fetched.
        """
        tc = self._tc
        assert tc is not None
        self._is_judging, self._soft_place = False, None
        cpu = self._cpu
        state, clock, block = cpu.state, cpu.clock, tc.state
        words, quads = block.words, block.quads
        space = self._spaces.current
        if space is None or self._registers.stale:
            space = self._spaces.select(mode)
            block.set_time(cpu.tsc, limit_icount - clock.icount, clock.ns_per_insn)
            words[stateblock.PENDING] = self._pending()
            self.soft_memory.publish(allowed=not self._guarding and self._culprits.volatile is not None)
            tc.deliver_faults(self.delivers_faults and not self._debug.caught_vectors)
        if self._arriving is not None:
            target: int | None = self._prepare_arrival(self._arriving)
        else:
            target = space.table.get(state.eip) or self._store.find(space, state.eip)
        if target is None:
            return True
        self._registers.hand_over()
        quads[stateblock.BUDGET] = limit_icount - clock.icount
        quads[stateblock.RESUME_BUDGET] = stateblock.NO_BUDGET
        self.ports.forget(block)
        cpu.repeating = False  # a REP under way goes on natively, or is interpreted again
        enter, adopt, tally = tc.enter, self._spaces.adopt, self.tally
        while target is not None:
            quads[stateblock.TARGET] = tc.host + target
            words[stateblock.REASON] = 0
            if self._fpu.used:
                self._fpu.prepare()
            before = perf_counter()
            enter()
            now_s = perf_counter()
            tally.seconds_in_tc += now_s - before
            space = adopt()
            reason = words[stateblock.REASON]
            if self._arriving is not None:
                target = self._arrive(self._arriving)
                if target is not None:
                    continue
                if self._arriving is not None:
                    return False
            if reason == _PORT:
                target = self._access_port(space, limit_icount, now_s)
                if target is None:
                    return False
            elif reason == _FAULT:
                target = self._handle_fault(space, limit_icount)
            elif reason == _CALLOUT:
                self._store.call_out(space, words[stateblock.EIP])
                self._sync(limit_icount, words[stateblock.EIP])
                self._is_judging = self._culprits.has(words[stateblock.EIP])
                return True
            elif reason == _SOFT:
                self._leave_soft(limit_icount)
                return True
            else:
                target = self._follow(space, limit_icount, is_link=reason == _LINK)
        return True

    def _access_port(self, space: Space, limit_icount: int, now_s: float) -> int | None:
        """IN or OUT: the offset at which to go on, or None if a device wants attention or wrote to page tables."""
        tc, cpu = self._tc, self._cpu
        assert tc is not None
        words, quads, clock, lines = tc.state.words, tc.state.quads, cpu.clock, cpu.lines
        drops = self._spaces.drops
        may_poll = self.ports.perform(tc.state, limit_icount - quads[stateblock.BUDGET])
        is_wanted = lines.attention and self._needs_boundary(words[stateblock.INTERRUPT_FLAG])
        is_plain = clock.deadline_icount >= limit_icount and not is_wanted and drops == self._spaces.drops
        if is_plain and self._spaces.current is space and now_s <= self._deadline_s:
            if may_poll:
                quads[stateblock.BUDGET] -= self.ports.poll(tc.state, space, limit_icount)
            return int(words[stateblock.PORT_RESUME])
        self._sync(limit_icount, words[stateblock.ROUTINE_NEXT])
        return None

    def _follow(self, space: Space, limit_icount: int, *, is_link: bool) -> int | None:
        """Emitted code knows no fragment for where it came: the offset of one, or None to interpret there."""
        tc = self._tc
        assert tc is not None
        eip = tc.state.words[stateblock.EIP]
        if not tc.state.quads[stateblock.BUDGET] or self._is_late():
            # Whoever runs on from here may be an interrupt's handler: nothing is fetched, so no A bit is set.
            self._sync(limit_icount, eip)
            return None
        flushes = self._store.flushes
        self.tally.misses += not is_link
        try:
            target = self._store.find(space, eip)
        except GuestFault:
            target = None
        if target is None:
            self._sync(limit_icount, eip)
        elif is_link and flushes == self._store.flushes:
            self._store.chain(tc.state.words[stateblock.DETAIL], target)
        return target

    def _sync(self, limit_icount: int, eip: int) -> None:
        """Bring what emitted code left in the state block back into the CPU's state."""
        tc = self._tc
        assert tc is not None
        state = self._cpu.state
        self._registers.take_back()
        state.eip = eip
        words = tc.state.words
        shadow = words[stateblock.SHADOW]
        if shadow != SHADOW_NONE:
            words[stateblock.SHADOW] = SHADOW_NONE
            if shadow == SHADOW_STI and words[stateblock.INTERRUPT_FLAG_BEFORE]:
                shadow = SHADOW_NONE
        state.shadow = shadow
        if tc.state.quads[stateblock.BUDGET] == tc.state.quads[stateblock.RESUME_BUDGET]:
            state.eflags |= RF  # nothing has retired since an IRET that set it
        self._cpu.clock.icount = limit_icount - tc.state.quads[stateblock.BUDGET]

    def _handle_fault(self, space: Space, limit_icount: int) -> int | None:
        """A host signal in emitted code: the offset in the TC at which to go on, or None if the interpreter has to.

        Raises:
            GuestFault: the instruction at EIP faults, as far as can be told without executing it.
        """
        tc = self._tc
        assert tc is not None
        quads, words = tc.state.quads, tc.state.words
        host = quads[stateblock.FAULT_ADDRESS]
        at = quads[stateblock.FAULT_RIP] - tc.host
        if tc.is_call_stack_guard(host):
            tc.reset_call_stack()
            return int(at)
        write = bool(quads[stateblock.FAULT_ERROR] & 2)
        if tc.is_routine(at):
            return self._leave_routine(space, limit_icount, at, host, write=write)
        fragment = self._store.index.at(at)
        assert fragment is not None, "a fault outside every fragment"
        unit = fragment.unit
        repetition = unit.repetitions.get(at - fragment.start)
        if repetition is not None:
            narrowstrings.recover(repetition, tc.state)
        index = fragment.index_at(at)
        linear = host - space.window.host
        is_access = words[stateblock.FAULT_SIGNAL * 2] == signal.SIGSEGV and 0 <= linear <= MASK32
        can_fill = is_access and not tc.is_budget_guard(host) and not self._is_late()
        drops, can_be_soft = self._spaces.drops, False
        if can_fill:
            filled = self._windows.fill(linear, write=write, insists=not self.soft_memory.is_usable)
            if filled and drops == self._spaces.drops:  # else the page of this code may have made room, unwatched now
                return fragment.start + unit.hosts[index]
            refusal = self._windows.refusal
            if self.soft_memory.is_usable and refusal in _SOFT_HABITS:
                can_be_soft = self._store.can_be_soft(fragment, index)
            if refusal is Refusal.VOLATILE and not can_be_soft and self._windows.fill(linear, write=write):
                return fragment.start + unit.hosts[index]
        self._leave_fragment(fragment, index, limit_icount)
        if index in unit.faulting_in_order:
            is_divide = words[stateblock.FAULT_SIGNAL * 2] == signal.SIGFPE and not quads[stateblock.FAULT_TRAP]
            is_refused = can_fill and self._windows.refusal is Refusal.PAGE_FAULT
            if is_divide or is_refused:
                self._note_fault(fragment, at, index, divides=is_divide)
            if is_divide:
                raise GuestFault(Vector.DE)
            # A fault close to the beginning of a page may be of an access that begins in the page before.
            if is_refused and linear & 0xFFF >= LONGEST_ACCESS_BYTES:
                walk(self._cpu.memory, space.window.paging, linear, write=write, user=space.mode.user)
        is_habit = can_fill and self._windows.refusal in _HABITS
        if is_habit and self._culprits.fault(fragment, self._cpu.state.eip, soft=can_be_soft):
            self._store.drop_fragment(fragment)
        self.tally.fault(is_budget=tc.is_budget_guard(host))
        return None

    def _leave_fragment(self, fragment: Fragment, index: int, limit_icount: int) -> None:
        """Emitted code has been left in instruction number `index` of a fragment, which is to be interpreted."""
        assert self._tc is not None
        self._sync(limit_icount, leave_fragment(fragment, index, self._tc.state))
        if fragment.unit.spans:
            recover(fragment.unit.spans, max(index, 0), self._cpu.state)

    def _deliver_fault(self, fault: GuestFault, eip: int) -> Stop | None:
        place, self._soft_place = self._soft_place, None
        if place is not None and fault.vector in (Vector.PF, Vector.DE):
            self._sites.fault(*place)
        return super()._deliver_fault(fault, eip)

    def _note_fault(self, fragment: Fragment, at: int, index: int, *, divides: bool) -> None:
        """A divide error, or a page that the window refused as the guest's tables do, of an instruction."""
        eip, culprits = self._cpu.state.eip, self._culprits
        is_enough = self._sites.fault(fragment, at, index, culprits.signals(fragment, eip))
        can_pay = is_enough and (divides or self.soft_memory.is_usable)
        if can_pay and self._store.can_be_soft(fragment, index, divides=divides):
            culprits.soften(fragment, eip)
            self._store.drop_fragment(fragment)

    def _leave_soft(self, limit_icount: int) -> None:
        """The software path could not be taken, or is to be looked at: the instruction is interpreted."""
        assert self._tc is not None
        at = self._tc.state.quads[stateblock.ROUTINE_RETURN] - self._tc.host
        fragment = self._store.index.at(at)
        assert fragment is not None, "a soft form outside every fragment"
        index = fragment.index_at(at)
        self._leave_fragment(fragment, index, limit_icount)
        self.tally.call_out(self._cpu, self._cpu.state.eip)
        self._is_judging = self.soft_memory.look()
        if index in fragment.unit.faulting_in_order:
            self._soft_place = fragment, at, index

    def _leave_routine(self, space: Space, limit_icount: int, at: int, host: int, *, write: bool) -> int | None:
        """A routine met a page that its window does not have: back to before its instruction, and try again."""
        tc = self._tc
        assert tc is not None
        words = tc.state.words
        tc.undo_routine(at)
        tc.state.quads[stateblock.BUDGET] += 1
        eip = words[stateblock.ROUTINE_EIP]
        window = self._windows.at(host)
        can_fill = window is not None and not words[stateblock.SHADOW] and not self._is_late()
        if can_fill and self._windows.fill(host & MASK32, write=write, window=window):
            return self._store.find(space, eip)
        self._sync(limit_icount, eip)
        self.tally.fault(is_budget=False)
        return None

    def flush_translations(self) -> None:
        """Start with an empty TC: see `Inspectable`."""
        self._soft_place = None
        self._store.flush()

    def execute_singly(self) -> None:
        """Translate each instruction by itself, and enter even that: see `ExecutesUnits`."""
        self._least_budget_insns = 1
        self._store.translate_singly()
