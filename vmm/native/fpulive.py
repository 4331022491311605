"""The guest's x87, MMX and SSE registers in the host's: when they are loaded, and how they are swapped.

They are the host's while emitted code runs, and in the `FpuState` whenever Python does; without floating-point code in
the translation cache nothing is ever swapped. It must not know what the instructions do.

Two pointers in the state block are the gates of the fragments that use x87 and MMX, and SSE: they lead to memory while
CR0 and CR4 allow the instructions, else to an address where nothing is.

Source: SDM Vol. 3A, "Task Switched", "Emulation" (CR0), "OSFXSR" (CR4); the System V ABI for x86-64 about control
words and the x87 stack at calls.
"""

from __future__ import annotations

import ctypes

from machine.cpu import Cpu
from machine.fpustate import FCS, FDP, FDS, FIP, FOP
from machine.state import CR0_EM, CR0_TS, CR4_OSFXSR
from vmm.native import stateblock
from vmm.native.assembler import Assembler
from vmm.native.operands import ECX, RAX, Label, Memory, dword
from vmm.native.stateblock import StateBlock, field

_NOWHERE = 0  # no process has anything mapped there
_POINTERS = (("fpu_ip", FIP), ("fpu_cs", FCS), ("fpu_dp", FDP), ("fpu_ds", FDS), ("fpu_op", FOP))


class LiveFpu:
    """Decides before each entry whether the registers are loaded.

    Attributes:
        used: there is floating-point code in the translation cache.
    """

    def __init__(self, cpu: Cpu, block: StateBlock) -> None:
        self._cpu = cpu
        self._block = block
        self._allowed: tuple[int, int, bool] | None = None
        self._gate = _NOWHERE
        self.used = False
        page = cpu.state.fpu.page
        block.quads[stateblock.FPU_PAGE] = ctypes.addressof(ctypes.c_char.from_buffer(page))

    def prepare(self) -> None:
        """Set the gates, and whether to swap, by what the CPU allows now."""
        state = self._cpu.state
        cr0 = self._block.words[stateblock.CR0]  # of which emitted code may have changed TS, while `state` is as before
        # While FERR# is up, instructions that clear the error have to lower it: the interpreter does.
        allowed = cr0 & (CR0_EM | CR0_TS), state.cr4 & CR4_OSFXSR, self._cpu.fpu_error.ferr
        quads = self._block.quads
        # Emitted code opens and closes the gates as it changes TS, which the interpreter may have changed back.
        if allowed == self._allowed and quads[stateblock.FPU_GATE] == self._gate:
            return
        self._allowed = allowed
        # With TS they are loaded all the same: emitted code may clear it, and open the gates.
        is_live = not allowed[0] & CR0_EM and not allowed[2]
        quads[stateblock.FPU_LIVE] = is_live
        gate = self._block.host if is_live else _NOWHERE
        sse_gate = gate if allowed[1] else _NOWHERE
        quads[stateblock.FPU_GATE_WITHOUT_TS], quads[stateblock.SSE_GATE_WITHOUT_TS] = gate, sse_gate
        is_switched = bool(allowed[0] & CR0_TS)
        self._gate = quads[stateblock.FPU_GATE] = _NOWHERE if is_switched else gate
        quads[stateblock.SSE_GATE] = _NOWHERE if is_switched else sse_gate

    def forget(self) -> None:
        """The translation cache is empty: nothing is swapped until there is floating-point code again."""
        self.used = False
        self._allowed = None
        quads = self._block.quads
        quads[stateblock.FPU_LIVE] = 0
        quads[stateblock.FPU_GATE_WITHOUT_TS] = quads[stateblock.SSE_GATE_WITHOUT_TS] = _NOWHERE


def emit_load(assembler: Assembler) -> None:
    """If state.fpu_live: keep the host's control words and load the guest's registers. RAX, RCX and flags change."""
    emit, around = assembler.emit, Label()
    emit("cmp", field("fpu_live"), 0)
    emit("je", around)
    emit("stmxcsr", field("host_mxcsr"))
    emit("fnstcw", field("host_fcw"))
    emit("mov", RAX, field("fpu_page"))
    emit("fxrstor", Memory(0, RAX))
    for name, at in _POINTERS:
        emit("mov", ECX, dword(RAX, at))
        emit("mov", field(name), ECX)
    assembler.bind(around)


def emit_save(assembler: Assembler) -> None:
    """If state.fpu_live: store the guest's registers; the host's control words, x87 stack empty. As `emit_load`."""
    emit, around = assembler.emit, Label()
    emit("cmp", field("fpu_live"), 0)
    emit("je", around)
    emit("mov", RAX, field("fpu_page"))
    emit("fxsave", Memory(0, RAX))
    emit("fninit")
    emit("fldcw", field("host_fcw"))
    emit("ldmxcsr", field("host_mxcsr"))
    for name, at in _POINTERS:
        emit("mov", ECX, field(name))
        emit("mov", dword(RAX, at), ECX)
    assembler.bind(around)
