"""The machine as a debuggee: `Target` over a PC and the engine that runs it.

It owns what a stop means to a debugger and how the guest goes on after one; packets and sockets are unknown here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from time import perf_counter
from typing import TYPE_CHECKING

from gdbstub import guest_memory, guest_registers, guest_stops, guest_tables
from gdbstub.guest_breakpoints import REASONS, BreakpointTable
from gdbstub.stint import STINT_LIMIT_S
from gdbstub.target import (
    Breakpoint,
    BreakpointKind,
    Description,
    MemoryRegion,
    Resume,
    ResumeMode,
    Signal,
    StintEnd,
    StopEvent,
    StopReason,
    TargetError,
    Thread,
    Verdict,
)
from machine import flags
from machine.debug import STINT_SLACK_INSNS, FaultLevel, Stop, StopKind
from machine.loaders.errors import ImageError
from machine.state import CR0_PE, CR0_PG

if TYPE_CHECKING:
    from machine.pc import Machine

TRIPLE_FAULT_STATUS = 3
# A paced guest runs in short pieces, so that it does not sleep far ahead of the host in one.
PACED_BUDGET_INSNS = 200
_PAUSED = Resume(ResumeMode.CONTINUE)
_REGION_SCAN_PAGES = 4096


class GuestTarget:
    """One PC as gdb's target.

    Attributes:
        machine: the PC.
        breakpoints: what stops it by address.
        caught_vectors, catch_interrupts: what the user wants to see before delivery.
        physical: gdb's memory packets mean physical addresses.
        until_icount: an instruction count to stop at, once; None for none.
        default_engine: the engine that runs a guest for which none is named, for people to read.
        end_icount: an instruction count at which the run ends with status 0; None for none.
        unseen_text: why the guest has ended, if no debugger was there to be told.
        pace: a clock of the host in seconds that time in HLT waits for; None lets it pass at once.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.breakpoints = BreakpointTable(machine.debug)
        self.caught_vectors: frozenset[int] = frozenset()
        self.catch_interrupts = False
        self.physical = False
        self.until_icount: int | None = None
        self.default_engine = ""
        self.end_icount: int | None = None
        self.unseen_text = ""
        self.pace: Callable[[], float] | None = None
        self._pace_origin: tuple[float, int] = (0.0, 0)
        self._passed_signals: frozenset[int] = frozenset()
        self._attached = False
        self._dead = False
        self._resume = _PAUSED
        self._range_steps_done = 0
        # Where the last reported stop was: icount and linear PC. A breakpoint there does not stop again.
        self._stopped_at: tuple[int, int] | None = None
        self._skip_breakpoint = False
        self._pending: FaultLevel | None = None
        self._deliver_caught = False
        self._shutdown: tuple[FaultLevel, ...] | None = None
        machine.debug.step_interrupts = False
        machine.debug.longest_run_s = STINT_LIMIT_S
        machine.debug.slack_insns = STINT_SLACK_INSNS

    # What never changes.

    @property
    def description(self) -> Description:
        """See `Target`."""
        return guest_registers.DESCRIPTION

    def threads(self) -> Sequence[Thread]:
        """The one CPU, and in which mode it is."""
        return (Thread(1, "CPU 1", self._describe_cpu()),)

    def _describe_cpu(self) -> str:
        state = self.machine.cpu.state
        words = []
        if not state.cr0 & CR0_PE:
            words.append("real mode")
        elif state.eflags & flags.VM:
            words.append("virtual-8086 mode")
        else:
            words.append(f"protected mode, ring {state.cpl}")
        if state.cr0 & CR0_PG:
            words.append("paging")
        if self._shutdown is not None:
            words.append("shut down")
        elif state.halted:
            words.append("halted")
        return ", ".join(words)

    # Registers.

    def read_registers(self, thread_id: int) -> Sequence[int | None]:  # noqa: ARG002 - there is one CPU
        """See `Target`."""
        return guest_registers.read_all(self.machine.cpu)

    def read_register(self, thread_id: int, number: int) -> int | None:  # noqa: ARG002
        """See `Target`."""
        return guest_registers.read(self.machine.cpu, number)

    def write_register(self, thread_id: int, number: int, value: int) -> None:  # noqa: ARG002
        """See `Target`."""
        self.check_recordable()
        guest_registers.write(self.machine.cpu, number, value)
        self.machine.note_register_write()

    # Memory.

    def read_memory(self, address: int, length: int) -> bytes:
        """See `Target`."""
        machine = self.machine
        if self.physical:
            return guest_memory.read_physical(machine.memory, address, length)
        return guest_memory.read_linear(machine.memory, machine.cpu.state, address, length)

    def write_memory(self, address: int, data: bytes) -> None:
        """See `Target`."""
        self.check_recordable()
        machine = self.machine
        if self.physical:
            pieces = guest_memory.write_physical(machine.memory, address, data)
        else:
            pieces = guest_memory.write_linear(machine.memory, machine.cpu.state, address, data)
        for physical, piece in pieces:
            machine.note_memory_write(physical, piece)

    def check_recordable(self) -> None:
        """Refuse a change of the guest that `--record` could not repeat.

        Raises:
            TargetError: the guest stands in the midst of a REP, where virtual time does not tell two places apart.
        """
        if not self.machine.can_record:
            raise TargetError(
                "The guest stands in the midst of a REP, where --record cannot tell when it changes. Step to its end."
            )

    def memory_map(self) -> Sequence[MemoryRegion]:
        """All of linear memory, since paging may map any of it; breakpoints need no ROM told apart."""
        return (MemoryRegion(0, guest_memory.LINEAR_END),)

    def region_at(self, address: int) -> MemoryRegion | None:
        """The run of pages with equal rights from the page of `address` on, or the hole up to the next page."""
        if not 0 <= address < guest_memory.LINEAR_END:
            return None
        machine = self.machine
        start = address & ~0xFFF
        for looked, mapping in enumerate(guest_memory.mappings(machine.memory, machine.cpu.state, start)):
            if mapping is not None and mapping.start > start:
                return MemoryRegion(start, mapping.start - start, permissions="")
            if mapping is not None:
                permissions = "rwx" if mapping.writable else "rx"
                return MemoryRegion(start, mapping.end - start, permissions=permissions)
            if looked >= _REGION_SCAN_PAGES // 256:
                break
        return MemoryRegion(start, guest_memory.LINEAR_END - start, permissions="")

    # Breakpoints.

    def insert_breakpoint(self, breakpoint: Breakpoint) -> None:  # noqa: A002 - as in the protocol
        """See `Target`."""
        self.breakpoints.insert(breakpoint)

    def remove_breakpoint(self, kind: BreakpointKind, address: int, length: int) -> None:
        """See `Target`."""
        self.breakpoints.remove(kind, address, length)

    def pass_signals(self, signals: frozenset[int]) -> None:
        """See `Target`."""
        self._passed_signals = signals
        self.update_catches()

    def update_catches(self) -> None:
        """Tell the engine what to stop at before delivery: what the user catches, less what passes without a stop."""
        passed = self._passed_signals
        vectors = frozenset(v for v in self.caught_vectors if guest_stops.signal_of_vector(v) not in passed)
        interrupts = self.catch_interrupts and guest_stops.INTERRUPT_SIGNAL not in passed
        debug = self.machine.debug
        if (vectors, interrupts) != (debug.caught_vectors, debug.catch_interrupts):
            debug.set_catches(vectors, interrupts=interrupts)

    # Running.

    def resume(self, actions: Sequence[Resume]) -> None:
        """See `Target`."""
        action = next((action for action in actions if action.thread_id in (None, 1)), None)
        if action is None:
            raise TargetError("The only thread, CPU 1, was not told how to go on.")
        if self._dead:
            raise TargetError("The guest has ended; restart it with `run` or `monitor reset`.")
        self._resume = action
        self._range_steps_done = 0
        if self.pace is not None:
            self._pace_origin = (self.pace(), self.machine.clock.idle_ns)
        here = self._here() == self._stopped_at
        self._skip_breakpoint = here
        pending, self._pending = self._pending, None
        self._deliver_caught = (
            here
            and pending is not None
            and (guest_stops.must_deliver(pending) or action.signal == guest_stops.signal_of(pending))
        )
        if self._shutdown is not None and self._attached and action.signal == 0:
            self._shutdown = None  # the user has mended what was wrong, or wants to see it again

    def run(self, budget_insns: int) -> StopEvent | StintEnd:
        """See `Target`."""
        if self._dead:
            raise TargetError("The guest has ended.")
        if self._shutdown is not None:
            return self._leave_shutdown()
        if self.end_icount is not None:
            budget_insns = min(budget_insns, self.end_icount - self.machine.clock.icount)
            if budget_insns <= 0:
                return self._exited(0, f"The guest has executed {self.end_icount} instructions, as --max-insns says.\n")
        self.breakpoints.apply()
        if self._resume.mode is not ResumeMode.CONTINUE:
            return self._step(budget_insns)
        if self.pace is None:
            return self._continue(budget_insns)
        return self._continue_paced(self.pace, budget_insns)

    def interrupt(self) -> StopEvent:
        """See `Target`."""
        return self._stopped(StopEvent(StopReason.SIGNAL, Signal.INT))

    def _here(self) -> tuple[int, int]:
        return self.machine.clock.icount, guest_registers.linear_pc(self.machine.cpu)

    def _stopped(self, event: StopEvent) -> StopEvent:
        self._stopped_at = self._here()
        return event

    def _leave_shutdown(self) -> StopEvent | StintEnd:
        """The CPU is shut down: without a debugger that ends the run, with one the machine is reset."""
        chain, self._shutdown = self._shutdown, None
        if not self._attached:
            return self._exited(TRIPLE_FAULT_STATUS, guest_stops.describe_chain(chain or ()))
        self.machine.reset()
        self._skip_breakpoint = self._deliver_caught = False
        if self._resume.mode is ResumeMode.CONTINUE:
            return StintEnd.BUDGET
        return self._stopped(StopEvent(StopReason.STEP))

    def _continue(self, budget_insns: int) -> StopEvent | StintEnd:
        clock, engine = self.machine.clock, self.machine.engine
        limit = clock.icount + budget_insns
        end_s = perf_counter() + STINT_LIMIT_S
        while True:
            until = limit if self.until_icount is None else min(limit, self.until_icount)
            skip, deliver = self._skip_breakpoint, self._deliver_caught
            self._skip_breakpoint = self._deliver_caught = False
            stop = engine.run(until, skip_breakpoint=skip, deliver_caught=deliver)
            verdict = self._judge(stop)
            if isinstance(verdict, StopEvent):
                return verdict
            if stop.kind is StopKind.HALTED:
                return StintEnd.IDLE
            if stop.kind is StopKind.BUDGET:
                return StintEnd.BUDGET
            if perf_counter() > end_s:
                verdict = Verdict.GO_ON_AND_YIELD  # a breakpoint that is met all the time and never wants to stop
            if self._skip_breakpoint:
                # A code breakpoint that did not want to stop: its instruction is executed in any case.
                limit = clock.icount + 1 if verdict is Verdict.GO_ON_AND_YIELD else max(limit, clock.icount + 1)
            elif verdict is Verdict.GO_ON_AND_YIELD or clock.icount >= limit:
                return StintEnd.BUDGET

    def _continue_paced(self, now_s: Callable[[], float], budget_insns: int) -> StopEvent | StintEnd:
        """As `_continue`, but IDLE while the guest has slept for longer than the host's clock has gone on."""
        clock = self.machine.clock
        since_s, idle_ns = self._pace_origin
        limit = clock.icount + budget_insns
        while clock.idle_ns - idle_ns <= (now_s() - since_s) * 1e9:
            outcome = self._continue(min(PACED_BUDGET_INSNS, limit - clock.icount))
            if outcome is not StintEnd.BUDGET or clock.icount >= limit:
                return outcome
        return StintEnd.IDLE

    def _step(self, budget_insns: int) -> StopEvent | StintEnd:
        machine, action = self.machine, self._resume
        ranged = action.mode is ResumeMode.RANGE_STEP
        for _ in range(max(1, budget_insns)):
            here = Verdict.GO_ON
            if ranged and self._range_steps_done and not machine.cpu.state.halted:
                judged = self._judge_code(guest_registers.linear_pc(machine.cpu))
                if isinstance(judged, StopEvent):
                    return judged
                here = judged
            deliver, self._deliver_caught = self._deliver_caught, False
            stop = self._step_engine(deliver_caught=deliver)
            verdict = self._judge(stop)
            if isinstance(verdict, StopEvent):
                return verdict
            if stop.kind is StopKind.HALTED:
                return self._halted_for_ever()
            if stop.kind is StopKind.BUDGET:
                return StintEnd.BUDGET
            if machine.cpu.state.halted:
                continue  # HLT was executed; the step is done when something has woken the CPU
            self._range_steps_done += 1
            if not ranged or not action.range_start <= machine.cpu.state.eip < action.range_end:
                return self._stopped(StopEvent(StopReason.STEP))
            if here is Verdict.GO_ON_AND_YIELD or verdict is Verdict.GO_ON_AND_YIELD:
                return StintEnd.BUDGET
        return StintEnd.BUDGET

    def _halted_for_ever(self) -> StopEvent | StintEnd:
        """A step in HLT that no event will end: with IF set, outside input still can; without, only the user's NMI."""
        if self.machine.cpu.state.eflags & flags.IF:
            return StintEnd.IDLE
        text = "The CPU is halted with interrupts off: only an NMI (`monitor nmi`) or a reset can wake it.\n"
        return self._stopped(StopEvent(StopReason.STEP, text=text))

    def _step_engine(self, *, deliver_caught: bool) -> Stop:
        """One step; an interrupt that the user has seen coming and lets happen does, with `step_interrupts` or not."""
        debug = self.machine.debug
        before = debug.step_interrupts
        debug.step_interrupts = before or deliver_caught
        try:
            return self.machine.engine.step(deliver_caught=deliver_caught)
        finally:
            debug.step_interrupts = before

    # What a stop of the engine means.

    def _judge(self, stop: Stop) -> StopEvent | Verdict:
        """The event for gdb, or how to go on."""
        machine = self.machine
        if self.until_icount is not None and machine.clock.icount >= self.until_icount and stop.kind is StopKind.BUDGET:
            reached, self.until_icount = self.until_icount, None
            return self._stopped(StopEvent(StopReason.SIGNAL, text=f"Instruction count {reached} is reached.\n"))
        if stop.kind is StopKind.BREAKPOINT:
            return self._judge_code(stop.linear)
        if stop.kind is StopKind.WATCHPOINT:
            return self._judge_data(stop)
        if stop.kind is StopKind.CATCH and stop.level is not None:
            self._pending = stop.level
            text = guest_stops.describe_catch(stop.level)
            return self._stopped(StopEvent(StopReason.SIGNAL, guest_stops.signal_of(stop.level), text=text))
        if stop.kind is StopKind.TRIPLE_FAULT:
            text = guest_stops.describe_chain(stop.chain)
            if not self._attached:
                return self._exited(TRIPLE_FAULT_STATUS, text)
            self._shutdown = stop.chain
            return self._stopped(StopEvent(StopReason.SIGNAL, guest_stops.TRIPLE_FAULT_SIGNAL, text=text))
        if stop.kind is StopKind.EXIT and stop.exit_request is not None:
            request = stop.exit_request
            return self._exited(
                request.status, f"The guest has ended: {request.kind.value}.\n" if self._attached else ""
            )
        if stop.kind is StopKind.RESET:
            machine.reset()
        return Verdict.GO_ON

    def _exited(self, status: int, text: str) -> StopEvent:
        self._dead = True
        if not self._attached:
            self.unseen_text = text
        return self._stopped(StopEvent(StopReason.EXITED, status=status, text=text))

    def _judge_code(self, linear: int) -> StopEvent | Verdict:
        """Ask all breakpoints at `linear`; one that wants to stop is enough."""
        machine = self.machine
        yield_wanted = False
        for breakpoint_ in self.breakpoints.code_at(linear):
            verdict = breakpoint_.check() if breakpoint_.check else Verdict.STOP
            if verdict is Verdict.STOP:
                return self._stopped(self._code_event(breakpoint_, linear))
            yield_wanted = yield_wanted or verdict is Verdict.GO_ON_AND_YIELD
        state = machine.cpu.state
        own = self.breakpoints.own_code_at(linear, machine.cpu.mmu.probe(linear), state.cr3)
        if own:
            for each in own:
                each.hits += 1
            text = "".join(f"Monitor breakpoint {each.number}: {each.describe()}.\n" for each in own)
            return self._stopped(StopEvent(StopReason.SIGNAL, text=text))
        self._skip_breakpoint = True
        return Verdict.GO_ON_AND_YIELD if yield_wanted else Verdict.GO_ON

    def _code_event(self, breakpoint_: Breakpoint, linear: int) -> StopEvent:
        state = self.machine.cpu.state
        if linear == state.eip:
            return StopEvent(REASONS[breakpoint_.kind])
        # gdb looks for the breakpoint at EIP and, told swbreak, would go on without a word when none is there.
        where = f"CS:EIP {state.segments[1].selector:04x}:{state.eip:08x}"
        return StopEvent(StopReason.SIGNAL, text=f"Breakpoint at linear {linear:#010x}, {where}.\n")

    def _judge_data(self, stop: Stop) -> StopEvent | Verdict:
        if stop.watchpoint is None:
            return Verdict.GO_ON
        yield_wanted = False
        client, own = self.breakpoints.data_like(stop.watchpoint)
        for breakpoint_ in client:
            verdict = breakpoint_.check() if breakpoint_.check else Verdict.STOP
            if verdict is Verdict.STOP:
                return self._stopped(StopEvent(REASONS[breakpoint_.kind], address=stop.linear))
            yield_wanted = yield_wanted or verdict is Verdict.GO_ON_AND_YIELD
        if own:
            for each in own:
                each.hits += 1
            access = "write to" if stop.was_write else "read of"
            text = "".join(
                f"Monitor breakpoint {each.number}: {access} {stop.linear:#010x}, {each.describe()}.\n" for each in own
            )
            return self._stopped(StopEvent(StopReason.SIGNAL, text=text))
        return Verdict.GO_ON_AND_YIELD if yield_wanted else Verdict.GO_ON

    # Life and death.

    def attach(self) -> None:
        """See `Target`."""
        self._attached = True

    def detach(self) -> None:
        """See `Target`."""
        self._attached = False
        self.breakpoints.clear()
        self.breakpoints.apply()
        self.caught_vectors = frozenset()
        self.catch_interrupts = False
        self._passed_signals = frozenset()
        self.update_catches()
        self.until_icount = None
        self.physical = False

    def restart(self) -> StopEvent:
        """See `Target`."""
        try:
            self.machine.restart()
        except ImageError as error:
            raise TargetError(f"The image cannot be loaded again: {error}") from error
        return self.forget_past()

    def forget_past(self) -> StopEvent:
        """The machine was reset or restarted: nothing of before counts; it stands at its first instruction."""
        self._dead = False
        self.unseen_text = ""
        self._shutdown = None
        self._pending = None
        return self._stopped(StopEvent(StopReason.SIGNAL))

    def kill(self) -> None:
        """See `Target`."""
        self._dead = True

    # What the user asks for by name.

    def monitor(self, command: str, *, read_only: bool) -> Iterator[str]:
        """See `Target`."""
        from gdbstub import monitor

        machine = self.machine
        with closing(monitor.run(self, command, read_only=read_only)) as output:
            for text in output:
                parts = machine.memory, machine.engine
                yield text
                # What another client has done between two pieces: the command still looks at what is gone.
                if parts != (machine.memory, machine.engine):
                    raise TargetError("The guest was restarted meanwhile, or another engine selected.")

    def exec_file(self) -> str | None:
        """The image, if it is a file with symbols for gdb."""
        path = self.machine.symbol_file
        return None if path is None else str(path)

    def os_tables(self) -> Mapping[str, str]:
        """See `Target`."""
        return {name: table.description for name, table in guest_tables.TABLES.items()}

    def os_rows(self, table: str) -> Sequence[Mapping[str, str]]:
        """See `Target`."""
        return guest_tables.rows(self, table)
