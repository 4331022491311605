"""`bt`: adaptive binary translation. Guest code runs as host code from the translation cache; the rest is interpreted.

It owns the loop around emitted code: entering it with a budget, and what each exit asks for. Instruction boundaries,
events and stops are `Interpreter`'s, so that both engines take every interrupt at the same icount.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from machine.cpu import Cpu
from machine.debug import DebugControl, Stop
from machine.faults import GuestFault
from machine.flags import DF, IF, RF, STATUS_MASK, TF
from machine.memory import PAGE_SHIFT
from machine.state import CR0_PE, CS, DS, ES, MASK32, SEG_CODE, SEG_DB, SEG_READ_WRITE, SS
from vmm.interp import DR7_ENABLED, Interpreter
from vmm.native import stateblock
from vmm.native.cache import Exit, TranslationCache
from vmm.native.dispatch import DispatchTable
from vmm.native.fpulive import LiveFpu
from vmm.native.fpupointers import recover
from vmm.native.fragments import Fragment, FragmentIndex
from vmm.native.signals import CORE
from vmm.native.translator import translate
from vmm.native.windows import Windows

if TYPE_CHECKING:
    from vmm.native.verifier import Verifier

HOLDS_FRAGMENTS = 0x20  # page flag: emitted code stands for bytes of this page of RAM
MIN_BUDGET_INSNS = 32  # below that, entering the TC costs more than interpreting
_TC_RESERVE_BYTES = 64 << 10
_GUEST_FLAGS = STATUS_MASK | DF
_HOST_FLAGS = 2 | IF


class BinaryTranslator(Interpreter):
    """The software VMM: see `machine.engine.Engine`."""

    name = "bt"

    def __init__(self, cpu: Cpu, debug: DebugControl, *, verify: bool = False) -> None:
        """Prepare.

        Args:
            cpu: what it runs.
            debug: what a debugger wants.
            verify: whether emitted code is proven harmless before it may run.
        """
        super().__init__(cpu, debug)
        self._verify = verify
        self._verifier: Verifier | None = None
        self._tc: TranslationCache | None = None
        self._fragments = FragmentIndex()
        self._landings: dict[int, dict[int, int]] = {}  # by page of RAM, then by guest address
        self._ram_page = 0
        self._flushes = 0
        self._counters: dict[str, int] = {}
        self._seconds_in_tc = 0.0
        self._seconds_in_translator = 0.0

    def enter(self) -> None:
        """Take over the CPU."""
        self._tc = TranslationCache()  # first, for it may fail
        if self._verify:
            from vmm.native.verifier import Verifier

            self._verifier = Verifier(self._tc)
        super().enter()
        self._fpu = LiveFpu(self._cpu, self._tc.state)
        self._windows = Windows(self._cpu)
        self._windows.attach()
        self._tables: dict[int, DispatchTable] = {}
        self._cpu.memory.write_observers.append(self._code_written)
        self._windows.on_drop.append(self._page_dropped)

    def leave(self) -> None:
        """Hand the CPU over."""
        self._cpu.memory.write_observers.remove(self._code_written)
        self._drop_everything()
        self._windows.detach()
        for table in self._tables.values():
            table.close()
        if self._tc is not None:
            self._tc.close()
            self._tc = None
        super().leave()

    def statistics(self) -> Mapping[str, int | float | str]:
        """Counters since the start."""
        return {
            **super().statistics(),
            **self._counters,
            **self._windows.counters,
            "seconds in TC": round(self._seconds_in_tc, 6),
            "seconds in translator": round(self._seconds_in_translator, 6),
        }

    def _count(self, name: str) -> None:
        self._counters[name] = self._counters.get(name, 0) + 1

    # Running.

    def run(self, until_icount: int, *, skip_breakpoint: bool = False, deliver_caught: bool = False) -> Stop:
        """Execute until the icount is reached or something stops it: see `Engine.run`."""
        CORE.arm()
        try:
            return super().run(until_icount, skip_breakpoint=skip_breakpoint, deliver_caught=deliver_caught)
        finally:
            CORE.disarm()

    def _execute_blocks(self, limit_icount: int) -> Stop | None:
        """Run emitted code while the CPU is in a state that it stands for, and the budget is worth it."""
        if limit_icount - self._cpu.clock.icount < MIN_BUDGET_INSNS:
            return super()._execute_blocks(limit_icount)
        if not self._is_flat():
            return super()._execute_blocks(min(limit_icount, self._cpu.clock.icount + MIN_BUDGET_INSNS))
        return self._execute_native(limit_icount)

    def _is_flat(self) -> bool:
        """32-bit protected-mode code, and CS SS DS ES with base 0 and limit 4 GiB."""
        state = self._cpu.state
        if not state.cr0 & CR0_PE:
            return False
        cs = state.segments[CS]
        readable = SEG_CODE | SEG_READ_WRITE
        if cs.base or cs.limit != MASK32 or not cs.attributes & SEG_DB or cs.attributes & readable != readable:
            return False
        for number in (SS, DS, ES):
            segment = state.segments[number]
            if segment.base or segment.write_low or segment.write_high != MASK32:
                return False
        return bool(state.segments[SS].attributes & SEG_DB) and not self._cpu.mmu.aligned_only

    def _execute_native(self, limit_icount: int) -> Stop | None:
        """Alternate between emitted code and single interpreted instructions until `run` must look at something."""
        cpu, clock = self._cpu, self._cpu.clock
        while True:
            try:
                self._run_emitted_code(limit_icount)
            except GuestFault as fault:
                return self._deliver_fault(fault, cpu.state.eip)
            stop = super()._execute_blocks(min(limit_icount, clock.icount + 1))
            if stop is not None or self._must_attend(limit_icount):
                return stop

    def _must_attend(self, limit_icount: int) -> bool:
        """Whether the instruction just interpreted left something for the boundary, or for another way to execute."""
        cpu = self._cpu
        state, clock = cpu.state, cpu.clock
        self._patience -= 1
        return bool(
            cpu.lines.attention
            or clock.icount + MIN_BUDGET_INSNS > limit_icount
            or clock.deadline_icount < limit_icount
            or state.eflags & (TF | RF)
            or state.shadow
            or state.halted
            or cpu.pending_debug
            or cpu.repeating
            or state.dr[7] & DR7_ENABLED
            or self._patience < 0
            or not self._is_flat()
        )

    def _run_emitted_code(self, limit_icount: int) -> None:
        """Run from EIP on in the TC, until an instruction is to be interpreted; it is at EIP then.

        Raises:
            GuestFault: the instruction at EIP cannot be fetched.
        """
        tc = self._tc
        assert tc is not None
        cpu = self._cpu
        state, clock, block = cpu.state, cpu.clock, tc.state
        words, quads = block.words, block.quads
        window = self._windows.select()
        table = self._table(window.host)
        target = table.get(state.eip) or self._find(state.eip)
        if target is None:
            return
        for number, value in enumerate(state.gpr):
            words[number] = value
        quads[stateblock.FLAGS] = state.eflags & _GUEST_FLAGS | _HOST_FLAGS
        quads[stateblock.BUDGET] = limit_icount - clock.icount
        quads[stateblock.WINDOW] = window.host
        quads[stateblock.DISPATCH] = table.host
        cpu.repeating = False  # a REP under way goes on natively, or is interpreted again
        while target is not None:
            quads[stateblock.TARGET] = tc.host + target
            words[stateblock.REASON] = 0
            if self._fpu.used:
                self._fpu.prepare()
                for number, segment in enumerate(state.segments):
                    words[stateblock.SEGMENTS + 2 * number] = segment.selector
            before = time.perf_counter()
            tc.enter()
            self._seconds_in_tc += time.perf_counter() - before
            reason = words[stateblock.REASON]
            if reason == Exit.FAULT:
                target = self._handle_fault(limit_icount)
            elif reason == Exit.CALLOUT:
                self._count("callouts")
                self._sync(limit_icount, words[stateblock.EIP])
                return
            else:
                target = self._follow(limit_icount, is_link=reason == Exit.LINK)

    def _follow(self, limit_icount: int, *, is_link: bool) -> int | None:
        """Emitted code knows no fragment for where it came: the offset of one, or None to interpret there."""
        tc = self._tc
        assert tc is not None
        eip = tc.state.words[stateblock.EIP]
        if not tc.state.quads[stateblock.BUDGET]:
            # Whoever runs on from here may be an interrupt's handler: nothing is fetched, so no A bit is set.
            self._sync(limit_icount, eip)
            return None
        flushes = self._flushes
        self._count("chains" if is_link else "dispatch misses")
        try:
            target = self._find(eip)
        except GuestFault:
            target = None
        if target is None:
            self._sync(limit_icount, eip)
        elif is_link and flushes == self._flushes:
            at = tc.state.words[stateblock.DETAIL]
            if self._verifier is not None:
                self._verifier.check_link(at, target)
            tc.point(at, target)
        return target

    def _sync(self, limit_icount: int, eip: int) -> None:
        """Bring what emitted code left in the state block back into the CPU's state."""
        tc = self._tc
        assert tc is not None
        state, block = self._cpu.state, tc.state
        state.gpr[:] = block.words[0:8].tolist()
        state.eflags = state.eflags & ~_GUEST_FLAGS | block.quads[stateblock.FLAGS] & _GUEST_FLAGS
        state.eip = eip
        self._cpu.clock.icount = limit_icount - block.quads[stateblock.BUDGET]

    def _handle_fault(self, limit_icount: int) -> int | None:
        """A host signal in emitted code: the offset in the TC at which to go on, or None if the interpreter has to."""
        tc = self._tc
        assert tc is not None
        quads, words = tc.state.quads, tc.state.words
        host = quads[stateblock.FAULT_ADDRESS]
        if tc.is_call_stack_guard(host):
            tc.reset_call_stack()
            offset: int = quads[stateblock.FAULT_RIP] - tc.host
            return offset
        fragment = self._fragments.at(quads[stateblock.FAULT_RIP] - tc.host)
        assert fragment is not None, "a fault outside every fragment"
        index = fragment.index_at(quads[stateblock.FAULT_RIP] - tc.host)
        linear = host - self._windows.current.host
        write = bool(quads[stateblock.FAULT_ERROR] & 2)
        is_access = words[stateblock.OFFSETS["fault_signal"] // 4] == 11 and 0 <= linear <= MASK32
        if is_access and not tc.is_budget_guard(host) and self._windows.fill(linear, write=write):
            return fragment.hosts[index]
        retired = max(index, 0)
        quads[stateblock.BUDGET] += fragment.charged - retired
        self._sync(limit_icount, fragment.eips[retired])
        if fragment.spans:
            recover(fragment.spans, retired, self._cpu.state)
        self._count("budget exits" if tc.is_budget_guard(host) else "faults interpreted")
        return None

    # Fragments.

    def _table(self, host: int) -> DispatchTable:
        table = self._tables.get(host)
        if table is None:
            table = self._tables[host] = DispatchTable()
        return table

    def _find(self, eip: int) -> int | None:
        """The offset of the fragment for a guest address, translated if need be; None if it is not in RAM.

        Raises:
            PageFault: the address cannot be fetched.
        """
        tc, cpu = self._tc, self._cpu
        assert tc is not None
        physical = cpu.mmu.translate(eip, write=False, user=cpu.mmu.user)
        at = cpu.memory.ram_address(physical)
        if at < 0:
            return None
        self._ram_page = ram_page = at >> PAGE_SHIFT
        fragment = self._fragments.by_address.get((ram_page, eip))
        if fragment is None:
            fragment = self._translate(eip, at)
        self._windows.fill(eip, write=False)
        offset = self._landings.get(ram_page, {}).get(eip, fragment.start)
        self._table(self._windows.current.host).set(eip, offset)
        return fragment.start

    def _translate(self, eip: int, at: int) -> Fragment:
        tc, memory = self._tc, self._cpu.memory
        assert tc is not None
        before = time.perf_counter()
        if tc.free_bytes < _TC_RESERVE_BYTES:
            self._drop_everything()
        ram_page = at >> PAGE_SHIFT
        unit = translate(
            tc,
            eip,
            bytes(memory.ram8[at : (ram_page + 1) << PAGE_SHIFT]),
            self._stops(eip, ram_page),
            self._cpu.model.instructions,
        )
        if unit.floating:
            self._fpu.used = True
        if self._verifier is not None:
            self._verifier.check_unit(unit)
        start = tc.place(unit.code)
        fragment = Fragment(
            eip,
            ram_page,
            start,
            max(1, (unit.end_eip - eip) & MASK32),
            [start + offset for offset in unit.hosts],
            list(unit.eips),
            unit.charged,
            start + len(unit.code),
            unit.spans,
        )
        self._fragments.add(fragment)
        for offset, landing_eip in unit.landings:
            if landing_eip >> PAGE_SHIFT == eip >> PAGE_SHIFT:
                self._landings.setdefault(ram_page, {})[landing_eip] = start + offset
        if not memory.page_flags[ram_page] & HOLDS_FRAGMENTS:
            memory.flag_page(ram_page, HOLDS_FRAGMENTS)
        self._count("translation units")
        self._seconds_in_translator += time.perf_counter() - before
        return fragment

    def _stops(self, eip: int, ram_page: int) -> frozenset[int]:
        """The guest addresses in the page of `eip` that have a breakpoint, by linear or by physical address."""
        page = eip & ~0xFFF
        stops = {address for address in self._breakpoints if address & ~0xFFF == page}
        stops.update(
            page | address & 0xFFF for address in self._physical_breakpoints if address >> PAGE_SHIFT == ram_page
        )
        return frozenset(stops)

    def _debug_changed(self) -> None:
        """Breakpoints came or went: the fragments of their pages are translated anew."""
        before = {*self._breakpoints}, {*self._physical_breakpoints}
        super()._debug_changed()
        linear = {address >> PAGE_SHIFT for address in before[0] ^ {*self._breakpoints}}
        physical = {address >> PAGE_SHIFT for address in before[1] ^ {*self._physical_breakpoints}}
        for ram_page, fragments in list(self._fragments.pages.items()):
            if ram_page in physical or any(fragment.eip >> PAGE_SHIFT in linear for fragment in fragments):
                self._drop_page(ram_page)

    def _code_written(self, at: int, length: int, _old: bytes, flags: int) -> None:
        """A store to a page with fragments: if it hits translated bytes, the page's fragments go."""
        if not flags & HOLDS_FRAGMENTS:
            return
        for ram_page in range(at >> PAGE_SHIFT, (at + length - 1 >> PAGE_SHIFT) + 1):
            covered = self._fragments.covered.get(ram_page)
            base = ram_page << PAGE_SHIFT
            if covered is not None and any(covered[max(0, at - base) : min(4096, at + length - base)]):
                self._drop_page(ram_page)

    def _drop_page(self, ram_page: int) -> None:
        """Forget a page's fragments; whoever still jumps to one comes out with its guest address."""
        tc = self._tc
        assert tc is not None
        self._count("invalidations")
        for fragment in self._fragments.drop_page(ram_page):
            self._divert(fragment)
        self._landings.pop(ram_page, None)
        self._cpu.memory.page_flags[ram_page] &= ~HOLDS_FRAGMENTS

    def _divert(self, fragment: Fragment) -> None:
        """Overwrite the head of a dropped fragment with a jump to the miss stub: all chains to it end there."""
        tc = self._tc
        assert tc is not None
        head = b"\x41\xb8" + fragment.eip.to_bytes(4, "little")  # mov r8d, eip
        jump = (tc.exits[Exit.MISS] - (fragment.start + len(head) + 5)).to_bytes(4, "little", signed=True)
        if self._verifier is not None:
            self._verifier.check_head(fragment.start, head + b"\xe9" + jump)
        tc.data[fragment.start : fragment.start + len(head) + 5] = head + b"\xe9" + jump

    def _page_dropped(self, host: int, page: int) -> None:
        """A page of a window is mapped no more: its addresses are looked up anew."""
        table = self._tables.get(host)
        if table is not None:
            table.clear_page(page)

    def _drop_everything(self) -> None:
        """Start with an empty TC."""
        self._flushes += 1
        for ram_page in list(self._fragments.pages):
            self._cpu.memory.page_flags[ram_page] &= ~HOLDS_FRAGMENTS
        self._fragments.clear()
        self._landings.clear()
        for table in self._tables.values():
            table.clear()
        if self._tc is not None:
            self._fpu.forget()
            self._tc.clear()
            if self._verifier is not None:
                self._verifier.clear()
            self._tc.reset_call_stack()
