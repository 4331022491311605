"""What a debugger wants of an engine that runs emitted code: breakpoints end fragments, watched pages are protected.

It must not know when code runs, nor what an exit means.
"""

from __future__ import annotations

from machine.cpu import Cpu
from machine.debug import DebugControl
from machine.memory import PAGE_SHIFT
from machine.state import MASK32
from vmm.debugregisters import DR7_ENABLED, instruction_addresses
from vmm.interp import Interpreter
from vmm.native.adaptation import Culprits
from vmm.native.fragmentstore import FragmentStore
from vmm.native.modes import Mode
from vmm.native.windows import Windows


class WatchedTranslator(Interpreter):
    """The part of `BinaryTranslator` that follows breakpoints, watchpoints and debug registers."""

    careful_dr7 = 0  # pages are protected instead

    _store: FragmentStore
    _windows: Windows

    def __init__(self, cpu: Cpu, debug: DebugControl) -> None:
        super().__init__(cpu, debug)
        self._guarded_until_icount = 0
        self._guarding = False  # what is interpreted has to be checked for breakpoints and watched accesses
        self._register_stops: frozenset[int] = frozenset()  # the instruction breakpoints of DR7
        self._culprits = Culprits()

    @property
    def windows(self) -> Windows:
        """The windows that the guest runs in."""
        return self._windows

    def _stops(self, mode: Mode, eip: int, ram_page: int) -> frozenset[int]:
        """The guest addresses in the page of `eip` that have a breakpoint, by linear or by physical address."""
        page = mode.linear(eip) & ~0xFFF
        stops = {address for address in {*self._breakpoints, *self._register_stops} if address & ~0xFFF == page}
        stops.update(
            page | address & 0xFFF for address in self._physical_breakpoints if address >> PAGE_SHIFT == ram_page
        )
        eips = frozenset(address - mode.code_base & MASK32 for address in stops)
        return eips | self._culprits.adapted(ram_page)

    def _debug_changed(self) -> None:
        """Breakpoints came or went: the fragments of their pages are translated anew."""
        before = {*self._breakpoints}, {*self._physical_breakpoints}
        super()._debug_changed()
        self._store.retranslate(before[0] ^ {*self._breakpoints}, before[1] ^ {*self._physical_breakpoints})

    def _are_registers_new(self) -> bool:
        """Whether DR0 to DR3 and DR7 ask for something else than what is being watched."""
        registers, watched = self._cpu.state.dr, self._watched_registers
        return bool((registers[7] | watched[0]) & DR7_ENABLED) and watched != (registers[7], *registers[:4])

    def _watch(self) -> None:
        """Protect what is watched in the windows: an access is a fault. Fragments stop where DR7 has breakpoints."""
        super()._watch()
        before = self._register_stops
        self._register_stops = instruction_addresses(self._cpu.state.dr)
        self._store.retranslate(before ^ self._register_stops, frozenset())
        self._windows.withhold(self._watched_linear, self._watched_physical)
        self._watching = False
        self._guarded_until_icount = 0
        self._guarding = bool(self._watched_linear or self._watched_physical or self._register_stops)
