"""The translation cache (TC): an append-only buffer of emitted code, its fixed stubs, and the way in.

It must not know guest instructions; fragments are placed into it by whoever translates.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import ExitStack
from enum import IntEnum

from vmm.native import fpulive, hostmemory, stateblock
from vmm.native.alarm import GUARD_BIT
from vmm.native.assembler import Assembler
from vmm.native.operands import (
    EAX,
    EBP,
    EBX,
    ECX,
    EDI,
    EDX,
    ESI,
    R8,
    R8D,
    R9,
    R9D,
    R10,
    R11,
    R12,
    R12D,
    R13,
    R14,
    R15,
    RAX,
    RBP,
    RBX,
    RSP,
)  # fmt: skip
from vmm.native.routine import SAVED, rflags_of
from vmm.native.routines import WITH_IMAGE, emit_routines
from vmm.native.signals import CORE, SLOT_BYTES
from vmm.native.stateblock import StateBlock, field, gpr

TC_BYTES = SLOT_BYTES
CALL_STACK_BYTES = 64 << 10
_STUBS_BYTES = 32768
_FILL = 0xCC

# Where the guest's registers live while emitted code runs, in the order of their encodings: ESP alone is moved.
GUEST_REGISTERS = (EAX, ECX, EDX, EBX, R12D, EBP, ESI, EDI)
GUEST_ESP = R12D
# R8 and R9 are scratch; R10 counts instructions down; R11 points GUARD_BIAS above a page below which nothing is mapped.
GUARD_BIAS = 63
_CALLEE_SAVED = (RBP, RBX, R12, R13, R14, R15)


class Exit(IntEnum):
    """Why emitted code came back to Python."""

    MISS = 1  # R8D: the guest address that has no fragment
    LINK = 2  # the same, and R9D: the offset of the rel32 that can be pointed at the fragment
    CALLOUT = 3  # R8D: the address of an instruction to be interpreted
    FAULT = 4  # a signal: see the fault fields
    PORT = 5  # a port access: see the port fields
    SOFT = 6  # the software path cannot be taken to `soft_linear`, or has been taken often enough
    REFUSAL = 7  # an interrupt from outside that the routine for it does not deliver


class TranslationCache:
    """The memory of one engine's translations.

    Attributes:
        state: the state block.
        host: address of offset 0 as the CPU sees it.
        position: offset of the next free byte.
        guard: host address of the page whose lower neighbour faults: the budget check.
        exits: offsets of the ways out.
        routines: offsets of the routines of in-TC emulation.
        stubs_bytes: length of the stubs, from offset 0 on.
        way_in: offset of the stub that `enter` calls.
        withheld: rows of the instruction table for which no code is emitted; those of MOV to and from control
            registers with the register's number.
        longest_unit_insns: so many instructions, at most, become one translation unit; None: as many as may.
    """

    def __init__(self) -> None:
        with ExitStack() as undo:
            self.state = StateBlock()
            undo.callback(self.state.close)
            self.host = CORE.acquire()
            undo.callback(CORE.give_back, self.host)
            self._code = hostmemory.DualMapping(TC_BYTES, "translation-cache", host=self.host)
            undo.callback(self._code.close)
            self.data = self._code.data
            # The alarm's bit of the guard pointer is set; with it cleared, too, two pages without a mapping are there.
            self._guards = hostmemory.reserve(2 * GUARD_BIT, align=2 * GUARD_BIT)
            undo.callback(hostmemory.release, self._guards, 2 * GUARD_BIT)
            self.guard = self._guards + GUARD_BIT + 4096
            hostmemory.map_anonymous(4096, host=self.guard)
            self._stacks = hostmemory.reserve(CALL_STACK_BYTES + 2 * 4096)
            undo.callback(hostmemory.release, self._stacks, CALL_STACK_BYTES + 2 * 4096)
            hostmemory.map_anonymous(CALL_STACK_BYTES, host=self._stacks + 4096)
            self.position = 0
            self.exits: dict[Exit, int] = {}
            self.routines: dict[str, int] = {}
            self.stubs_bytes = self.way_in = 0
            self.withheld: frozenset[str] = frozenset()
            self.longest_unit_insns: int | None = None
            enter = self._emit_stubs()
            self.enter: Callable[[], None] = ctypes.PYFUNCTYPE(None)(enter)
            self.reset_call_stack()
            self._undo = undo.pop_all()

    def close(self) -> None:
        """Give everything back; no emitted code may be running."""
        self._undo.close()

    def reset_call_stack(self) -> None:
        """Forget the return addresses of guest calls: they are hints, and a guard page was hit."""
        self.state.quads[stateblock.CALL_STACK] = self._stacks + 4096 + CALL_STACK_BYTES - 64

    def is_call_stack_guard(self, host: int) -> bool:
        """Whether a fault address is just outside the stack of guest calls."""
        return self._stacks <= host < self._stacks + CALL_STACK_BYTES + 2 * 4096

    def is_routine(self, offset: int) -> bool:
        """Whether code at `offset` belongs to the routines of in-TC emulation."""
        return self._routines_at <= offset < _STUBS_BYTES

    def is_arrival(self, offset: int) -> bool:
        """Whether code at `offset` belongs to the routine that delivers an interrupt from outside."""
        return offset in self._arrival

    def undo_routine(self, offset: int) -> None:
        """Put back the registers and flags with which the routine began whose code is at `offset`."""
        words, quads = self.state.words, self.state.quads
        for number in range(len(SAVED)):
            words[number] = words[stateblock.ROUTINE_REGISTERS + number]
        if offset < self.routines[WITH_IMAGE[0]]:  # it keeps the status flags alone
            quads[stateblock.FLAGS] = rflags_of(words[stateblock.ROUTINE_STATUS], quads[stateblock.FLAGS])
        else:
            quads[stateblock.FLAGS] = quads[stateblock.ROUTINE_FLAGS]

    def is_budget_guard(self, host: int) -> bool:
        """Whether a fault address says that the budget is used up."""
        return self._guards <= host < self.guard

    def deliver_faults(self, wanted: bool) -> None:
        """Whether exceptions of the guest's at known sites go to their handlers without an exit."""
        self.state.quads[stateblock.FAULT_FIRST] = self.host + _STUBS_BYTES if wanted else stateblock.NOWHERE_FIRST

    @property
    def free_bytes(self) -> int:
        """Room for more code."""
        return TC_BYTES - self.position

    def assembler(self, align: int = 16) -> Assembler:
        """An assembler for code at the next free position."""
        self.position = (self.position + align - 1) & -align
        return Assembler(self.host + self.position)

    def place(self, code: bytes) -> int:
        """Append code, for which there is room; returns its offset."""
        assert len(code) <= self.free_bytes
        at = self.position
        self.data[at : at + len(code)] = code
        self.position = at + len(code)
        return at

    def point(self, at: int, target: int) -> None:
        """Let the rel32 at offset `at` reach offset `target`."""
        self.data[at : at + 4] = (target - (at + 4)).to_bytes(4, "little", signed=True)

    def clear(self) -> None:
        """Drop everything but the stubs."""
        self.data[_STUBS_BYTES : self.position] = bytes([_FILL]) * (self.position - _STUBS_BYTES)
        words = stateblock.SITES * stateblock.SITE_BYTES // 4
        self.state.words[stateblock.SITES_AT : stateblock.SITES_AT + words] = memoryview(bytes(4 * words)).cast("I")
        self.position = _STUBS_BYTES

    def _emit_stubs(self) -> int:
        """Offset 0: the miss stub, to which empty dispatch entries lead. Then the other exits and the way in."""
        assembler = Assembler(self.host)
        emit = assembler.emit
        exit_offsets: dict[Exit, int] = {}
        common: list[int] = []
        for reason in Exit:
            exit_offsets[reason] = len(assembler.code)
            if reason in (Exit.MISS, Exit.LINK, Exit.CALLOUT):
                emit("mov", field("eip"), R8D)
            elif reason is Exit.FAULT:
                emit("mov", field("scratch8"), R8)
                emit("mov", field("scratch9"), R9)
            if reason is Exit.LINK:
                emit("mov", field("detail"), R9D)
            emit("mov", field("reason"), int(reason))
            common.append(assembler.jump_to("jmp", self.host))
        exit_at = len(assembler.code)
        for at in common:
            assembler.code[at : at + 4] = (exit_at - (at + 4)).to_bytes(4, "little", signed=True)
        _emit_exit(assembler)
        assembler.align(16)
        enter = assembler.here
        _emit_enter(assembler, self.state.host, self.host, self.guard + GUARD_BIAS)
        assembler.align(16)
        self._routines_at = len(assembler.code)
        ways_out = (Exit.CALLOUT, Exit.REFUSAL, Exit.FAULT, Exit.SOFT)
        callout, refusal, fault, soft = (self.host + exit_offsets[reason] for reason in ways_out)
        self.routines = emit_routines(assembler, callout, refusal, fault, soft)
        self._arrival = range(self.routines["arrive"], len(assembler.code))
        code = assembler.finish()
        assert len(code) <= _STUBS_BYTES
        self.place(code)
        self.stubs_bytes, self.way_in = len(code), enter - self.host
        self.position = _STUBS_BYTES
        self.exits = exit_offsets
        quads = self.state.quads
        quads[stateblock.OFFSETS["fault_exit"] // 8] = self.host + exit_offsets[Exit.FAULT]
        quads[stateblock.OFFSETS["fault_routine"] // 8] = self.host + self.routines["fault"]
        self.deliver_faults(False)
        return enter


def _emit_exit(assembler: Assembler) -> None:
    """Save the guest's registers, flags and budget; return to the caller in C with DF clear, as the ABI wants it."""
    emit = assembler.emit
    for number, register in enumerate(GUEST_REGISTERS):
        emit("mov", gpr(number), register)
    emit("mov", field("call_stack"), RSP)
    emit("mov", RSP, field("host_rsp"))
    emit("pushfq")
    emit("pop", field("flags"))
    emit("cld")
    emit("mov", field("budget"), R10)
    fpulive.emit_save(assembler)
    for register in reversed(_CALLEE_SAVED):
        emit("pop", register)
    emit("ret")


def _emit_enter(assembler: Assembler, state: int, host: int, guard: int) -> None:
    """Load the guest's registers, flags, window and budget; go to state.target."""
    emit = assembler.emit
    for register in _CALLEE_SAVED:
        emit("push", register)
    emit("mov", R15, state)
    emit("mov", field("host_rsp"), RSP)
    fpulive.emit_load(assembler)
    emit("mov", RAX, field("window"))
    emit("wrgsbase", RAX)
    emit("mov", R14, field("dispatch"))
    emit("mov", R13, host)
    emit("mov", R11, guard)
    emit("mov", R10, field("budget"))
    emit("push", field("flags"))
    emit("popfq")
    emit("mov", RSP, field("call_stack"))
    for number, register in enumerate(GUEST_REGISTERS):
        emit("mov", register, gpr(number))
    emit("mov", R8, field("scratch8"))
    emit("mov", R9, field("scratch9"))
    emit("jmp", field("target"))
