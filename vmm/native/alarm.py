"""The alarm: a timer of the host by which emitted code comes out, whatever it is doing, so that a debugger is heard.

A budget of instructions cannot do that: an instruction may miss the cache, or be a REP over all of memory. It must not
know what is done then, nor how long guest code may run.

The signal's handler, machine code of our own, lets the budget check of the next fragment fail by moving the guard
pointer to where nothing is mapped, and turns a REP under way into an exit, since it can be resumed where it is.

Source: timer_create(2), sigaction(2), the kernel's `struct sigcontext` for x86-64.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from dataclasses import dataclass

from vmm.native import hostmemory
from vmm.native.assembler import Assembler
from vmm.native.operands import EAX, ECX, EDI, R8, RAX, RCX, RDX, Label, dword, qword, word
from vmm.native.signals import CODE_REGION_BYTES, CORE
from vmm.native.stateblock import OFFSETS

SIGNAL = signal.SIGRTMIN + 5
GUARD_BIT = 1 << 13  # set in the guard pointer; without it nothing is mapped there, nor in the page before

_GREGS = 40  # offset of gregs in ucontext_t, eight bytes each, in the order of <sys/ucontext.h>
_UC_R11, _UC_R15, _UC_RIP, _UC_FLAGS = (_GREGS + 8 * n for n in (3, 7, 16, 17))
_SA_SIGINFO, _SA_ONSTACK, _SA_RESTART = 4, 0x0800_0000, 0x1000_0000
_SIGEV_THREAD_ID, _CLOCK_MONOTONIC = 4, 1
# REP is F2h or F3h; an operand-size prefix or a string instruction, A4h to AFh, follows.
_REP, _REP_MASK = 0xF2, 0xFE
_OPERAND_SIZE = 0x66
_STRING, _STRING_MASK = 0xA0, 0xF0

_NS_PER_S = 1_000_000_000


class _SigAction(ctypes.Structure):
    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ulong * 16),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


class _SigEvent(ctypes.Structure):
    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signo", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("thread_id", ctypes.c_int),
        ("padding", ctypes.c_int * 11),
    )


# A signal takes some 2 us: one after another would leave no time for anything else.
SHORTEST_S = 0.0002


class _TimerSpec(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_long) for name in ("interval_s", "interval_ns", "value_s", "value_ns"))


_libc = ctypes.CDLL(None, use_errno=True)
_libc.sigaction.argtypes = [ctypes.c_int, ctypes.POINTER(_SigAction), ctypes.c_void_p]
_libc.timer_create.argtypes = [ctypes.c_int, ctypes.POINTER(_SigEvent), ctypes.POINTER(ctypes.c_void_p)]
_libc.timer_delete.argtypes = [ctypes.c_void_p]
_libc.timer_settime.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(_TimerSpec), ctypes.c_void_p]


class AlarmError(OSError):
    """The host refuses what no host should refuse: a handler for our signal, or to set our own timer."""


@dataclass(slots=True)
class Alarm:
    """The process's timer; it belongs to the thread that started it last.

    A host that has no timer left (RLIMIT_SIGPENDING) leaves us without: then only the budget ends a long stretch.
    """

    _owner: tuple[int, int] = (0, 0)
    _timer: ctypes.c_void_p | None = None
    _is_handled: bool = False

    def start(self, first_s: float, again_s: float) -> None:
        """Go off after so many seconds, and again and again, but never sooner than SHORTEST_S; for this thread."""
        owner = os.getpid(), threading.get_native_id()
        if owner != self._owner:
            self._create(owner)
        self._set(max(again_s, SHORTEST_S), max(first_s, SHORTEST_S))

    def stop(self) -> None:
        """Do not go off any more."""
        self._set(0.0, 0.0)

    def _set(self, interval_s: float, value_s: float) -> None:
        if self._timer is None:
            return
        spec = _TimerSpec(0, int(interval_s * _NS_PER_S), 0, int(value_s * _NS_PER_S))
        if _libc.timer_settime(self._timer, 0, spec, None):
            raise _failed("timer_settime")

    def _create(self, owner: tuple[int, int]) -> None:
        if not self._is_handled:
            self._handle()
        if self._timer is not None and self._owner[0] == owner[0]:
            _libc.timer_delete(self._timer)
        timer = ctypes.c_void_p()
        event = _SigEvent(signo=SIGNAL, notify=_SIGEV_THREAD_ID, thread_id=owner[1])
        self._timer = None if _libc.timer_create(_CLOCK_MONOTONIC, event, timer) else timer
        self._owner = owner

    def _handle(self) -> None:
        """Put the handler in place, for good: a signal that comes late does nothing."""
        code = hostmemory.reserve(4096)
        assembler = Assembler(code)
        _emit_handler(assembler, CORE.region)
        hostmemory.map_code(code, assembler.finish())
        action = _SigAction(handler=code, flags=_SA_SIGINFO | _SA_ONSTACK | _SA_RESTART)
        if _libc.sigaction(SIGNAL, action, None):
            raise _failed("sigaction")
        self._is_handled = True


def _emit_handler(assembler: Assembler, region: int) -> None:
    """handler(edi: signal, rsi: siginfo, rdx: ucontext).

    if RIP is in the region: R11 loses GUARD_BIT; if a REP of a string instruction is there: state = R15;
        state.fault_* = an interruption, at no address; RIP = state.fault_exit
    """
    emit = assembler.emit
    string, done = Label(), Label()
    emit("mov", RAX, qword(RDX, _UC_RIP))
    emit("mov", RCX, region)
    emit("mov", R8, RAX)
    emit("sub", R8, RCX)
    emit("cmp", R8, CODE_REGION_BYTES)
    emit("jae", done)
    emit("and", dword(RDX, _UC_R11), ~GUARD_BIT)
    emit("movzx", ECX, word(RAX))
    emit("mov", EAX, ECX)
    emit("and", EAX, _REP_MASK)
    emit("cmp", EAX, _REP)
    emit("jne", done)
    emit("shr", ECX, 8)
    emit("cmp", ECX, _OPERAND_SIZE)
    emit("je", string)
    emit("and", ECX, _STRING_MASK)
    emit("cmp", ECX, _STRING)
    emit("jne", done)
    assembler.bind(string)
    emit("mov", R8, qword(RDX, _UC_R15))
    for name, offset in (("fault_rip", _UC_RIP), ("flags", _UC_FLAGS)):
        emit("mov", RAX, qword(RDX, offset))
        emit("mov", qword(R8, OFFSETS[name]), RAX)
    emit("mov", qword(R8, OFFSETS["fault_address"]), 0)
    emit("mov", qword(R8, OFFSETS["fault_error"]), 0)
    emit("mov", dword(R8, OFFSETS["fault_signal"]), EDI)
    emit("mov", RAX, qword(R8, OFFSETS["fault_exit"]))
    emit("mov", qword(RDX, _UC_RIP), RAX)
    assembler.bind(done)
    emit("ret")


def _failed(what: str) -> AlarmError:
    number = ctypes.get_errno()
    return AlarmError(number, f"{what}: {os.strerror(number)}")


ALARM = Alarm()
