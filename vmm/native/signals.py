"""Host signals raised by emitted code: SIGSEGV and its kin become exits; all others go to whoever had them before.

The handler is machine code of our own, one for the process, on an alternate stack, in place only while guest code may
run. It must not know what a fault means.

Source: signal(7), sigaltstack(2), the kernel's `struct sigcontext` for x86-64.
"""

from __future__ import annotations

import ctypes
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from vmm.native import hostmemory
from vmm.native.assembler import Assembler
from vmm.native.operands import (
    EAX,
    EDI,
    R8,
    R9,
    R10D,
    RAX,
    RBX,
    RCX,
    RDI,
    RDX,
    RSI,
    Label,
    dword,
    qword,
)  # fmt: skip
from vmm.native.stateblock import OFFSETS

CODE_REGION_BYTES = 1 << 30  # every translation cache of the process lies in here
SLOT_BYTES = 64 << 20  # the most that one of them takes
SIGNALS = (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP)

_SYS_RT_SIGACTION, _SYS_RT_SIGRETURN, _SYS_SIGALTSTACK = 13, 15, 131
_SYS_GETPID, _SYS_GETTID, _SYS_TGKILL = 39, 186, 234
_SA_SIGINFO, _SA_ONSTACK, _SA_RESTORER = 4, 0x0800_0000, 0x0400_0000
_SIG_DFL, _SIG_IGN = 0, 1
_SIGNAL_SET_BYTES = 8
_AT_MINSIGSTKSZ = 51
_STACK_BYTES = 64 << 10
_PAGE_BYTES = 4096

# Offsets in ucontext_t: uc_mcontext.gregs begins at 40, eight bytes each, in the order of <sys/ucontext.h>.
_GREGS = 40
_UC_R15, _UC_RIP, _UC_FLAGS, _UC_ERROR, _UC_TRAP = (_GREGS + 8 * n for n in (7, 16, 17, 19, 20))
# Offsets in siginfo_t.
_SI_CODE, _SI_ADDRESS = 8, 16

# Our data page: the kernel's `struct sigaction` (handler, flags, restorer, mask: 32 bytes) and `stack_t` (24 bytes).
_ACTION_BYTES = 32
_HANDLER, _FLAGS, _RESTORER = 0, 8, 16
_FORMER_ACTIONS = 0  # one for each signal number below 32: what `arm` replaced
_OUR_ACTION = 32 * _ACTION_BYTES
_FOUND_ACTION = _OUR_ACTION + _ACTION_BYTES  # what `disarm` found in our place
_DEFAULT_ACTION = _FOUND_ACTION + _ACTION_BYTES
_OUR_STACK = _DEFAULT_ACTION + _ACTION_BYTES
_FORMER_STACK = _OUR_STACK + 24
_FOUND_STACK = _FORMER_STACK + 24

_libc = ctypes.CDLL(None, use_errno=True)
_libc.getauxval.restype = ctypes.c_ulong
_libc.getauxval.argtypes = [ctypes.c_ulong]

_Routine = Callable[[], int]


class SignalError(OSError):
    """The host refused a signal handler or its stack, or there is no room for another engine."""


@dataclass(slots=True)
class SignalCore:
    """The process's handler and the region of code that it answers for.

    Between `arm` and `disarm` faults in the region become exits. A fault elsewhere, and a signal that somebody sent,
    goes to the handler that was there before `arm`; so does everything once `disarm` was called, since that handler is
    in place again. What is emitted stays mapped for the life of the process: somebody may have saved our handler's
    address as the former one.

    Attributes:
        region: host address of the reservation in which translation caches are mapped.
    """

    region: int = 0
    _arm: _Routine = field(default=lambda: 0)
    _disarm: _Routine = field(default=lambda: 0)
    _depth: int = 0
    _thread: int = 0
    _free: list[int] = field(default_factory=list)

    def acquire(self) -> int:
        """Hand out SLOT_BYTES of the region for one translation cache.

        Raises:
            SignalError: as many engines as there are slots exist already.
        """
        if not self.region:
            self.region = hostmemory.reserve(CODE_REGION_BYTES, align=CODE_REGION_BYTES)
            self._free = [self.region + at for at in range(0, CODE_REGION_BYTES, SLOT_BYTES)][::-1]
            self._emit()
        if not self._free:
            message = f"all {CODE_REGION_BYTES // SLOT_BYTES} slots for translation caches are taken"
            raise SignalError(message)
        return self._free.pop()

    def give_back(self, slot: int) -> None:
        """Return a slot, which its user has unmapped."""
        self._free.append(slot)

    def arm(self) -> None:
        """Put the handler in place, on a stack of its own, for this thread; calls nest.

        Raises:
            SignalError: guest code runs in another thread already, or the host refuses.
        """
        thread = threading.get_ident()
        if self._depth and self._thread != thread:
            raise SignalError("guest code runs in another thread of this process")
        if not self._depth:
            self._thread = thread
            if self._arm():
                self._disarm()
                raise SignalError("the host refuses our signal handlers")
        self._depth += 1

    def disarm(self) -> None:
        """Undo `arm`: what was there before comes back, except where somebody has put something else meanwhile."""
        self._depth -= 1
        if not self._depth:
            self._disarm()

    def _emit(self) -> None:
        """Write the handler, and the routines that put it in place and take it away."""
        data = hostmemory.map_anonymous(_PAGE_BYTES)
        code = hostmemory.reserve(_PAGE_BYTES)
        assembler = Assembler(code)
        handler = assembler.here
        _emit_handler(assembler, self.region, data)
        restorer = assembler.here
        assembler.emit("mov", EAX, _SYS_RT_SIGRETURN)
        assembler.emit("syscall")
        arm = assembler.here
        _emit_arm(assembler, data)
        disarm = assembler.here
        _emit_disarm(assembler, data)
        hostmemory.map_code(code, assembler.finish())

        stack_bytes = max(_STACK_BYTES, 4 * int(_libc.getauxval(_AT_MINSIGSTKSZ))) + _PAGE_BYTES - 1 & -_PAGE_BYTES
        guarded = hostmemory.reserve(_PAGE_BYTES + stack_bytes)
        stack = hostmemory.map_anonymous(stack_bytes, host=guarded + _PAGE_BYTES)
        words = hostmemory.view(data, _PAGE_BYTES).cast("Q")
        words[(_OUR_ACTION + _HANDLER) // 8] = handler
        words[(_OUR_ACTION + _FLAGS) // 8] = _SA_SIGINFO | _SA_ONSTACK | _SA_RESTORER
        words[(_OUR_ACTION + _RESTORER) // 8] = restorer
        words[_OUR_STACK // 8] = stack
        words[_OUR_STACK // 8 + 2] = stack_bytes
        self._arm = ctypes.PYFUNCTYPE(ctypes.c_long)(arm)
        self._disarm = ctypes.PYFUNCTYPE(ctypes.c_long)(disarm)


def _emit_handler(assembler: Assembler, region: int, data: int) -> None:
    """handler(edi: signal, rsi: siginfo, rdx: ucontext).

    if the CPU raised it and RIP is in the region: state = R15; state.fault_* = what happened;
        RIP = RIP < state.fault_first ? state.fault_exit : state.fault_routine
    else: go on in the former handler; SIG_DFL: restore it and send the signal once more, to arrive when we return;
        SIG_IGN: nothing, but a fault cannot be ignored and counts as SIG_DFL.
    """
    emit = assembler.emit
    foreign, default, stub = Label(), Label(), Label()
    # What a process sends has a code of 0 or less; it may come at any time, so also while emitted code runs.
    emit("cmp", dword(RSI, _SI_CODE), 0)
    emit("jle", foreign)
    emit("mov", RAX, qword(RDX, _UC_RIP))
    emit("mov", RCX, region)
    emit("sub", RAX, RCX)
    emit("cmp", RAX, CODE_REGION_BYTES)
    emit("jae", foreign)
    emit("mov", R8, qword(RDX, _UC_R15))
    for name, source, offset in (
        ("fault_rip", RDX, _UC_RIP),
        ("fault_address", RSI, _SI_ADDRESS),
        ("flags", RDX, _UC_FLAGS),
        ("fault_error", RDX, _UC_ERROR),
        ("fault_trap", RDX, _UC_TRAP),
    ):
        emit("mov", RAX, qword(source, offset))
        emit("mov", qword(R8, OFFSETS[name]), RAX)
    emit("mov", dword(R8, OFFSETS["fault_signal"]), EDI)
    emit("mov", RAX, qword(RDX, _UC_RIP))
    emit("cmp", RAX, qword(R8, OFFSETS["fault_first"]))
    emit("mov", RAX, qword(R8, OFFSETS["fault_exit"]))
    emit("jb", stub)
    emit("mov", RAX, qword(R8, OFFSETS["fault_routine"]))
    assembler.bind(stub)
    emit("mov", qword(RDX, _UC_RIP), RAX)
    emit("ret")
    assembler.bind(foreign)
    emit("mov", EAX, EDI)
    emit("shl", RAX, _ACTION_BYTES.bit_length() - 1)
    emit("mov", RCX, data + _FORMER_ACTIONS + _HANDLER)
    emit("add", RAX, RCX)
    emit("mov", RAX, qword(RAX))
    emit("cmp", RAX, _SIG_IGN)
    emit("jb", default)
    following = Label()
    emit("je", following)
    emit("jmp", RAX)
    assembler.bind(following)
    emit("cmp", dword(RSI, _SI_CODE), 0)
    emit("jg", default)
    emit("ret")
    assembler.bind(default)
    emit("mov", R9, RDI)
    _emit_sigaction(assembler, None, data + _DEFAULT_ACTION, 0)
    emit("mov", EAX, _SYS_GETTID)
    emit("syscall")
    emit("mov", RSI, RAX)
    emit("mov", EAX, _SYS_GETPID)
    emit("syscall")
    emit("mov", RDI, RAX)
    emit("mov", RDX, R9)
    emit("mov", EAX, _SYS_TGKILL)
    emit("syscall")
    emit("ret")


def _emit_arm(assembler: Assembler, data: int) -> None:
    """Exchange former and our actions, for each signal and for the alternate stack; returns 0 if nothing failed."""
    emit = assembler.emit
    emit("push", RBX)
    emit("mov", RBX, 0)
    for number in SIGNALS:
        _emit_sigaction(assembler, number, data + _OUR_ACTION, _former(data, number))
        emit("or", RBX, RAX)
    _emit_sigaltstack(assembler, data + _OUR_STACK, data + _FORMER_STACK)
    emit("or", RAX, RBX)
    emit("pop", RBX)
    emit("ret")


def _emit_disarm(assembler: Assembler, data: int) -> None:
    """Put the former action back, for each signal, unless what it replaces is not ours; the same for the stack."""
    emit = assembler.emit
    emit("push", RBX)
    emit("mov", RBX, data)
    for number in SIGNALS:
        following = Label()
        _emit_sigaction(assembler, number, _former(data, number), data + _FOUND_ACTION)
        emit("mov", RAX, qword(RBX, _FOUND_ACTION + _HANDLER))
        emit("cmp", RAX, qword(RBX, _OUR_ACTION + _HANDLER))
        emit("je", following)
        _emit_sigaction(assembler, number, data + _FOUND_ACTION, 0)
        assembler.bind(following)
        # Should somebody put our handler back later, it has nobody to pass a signal on to.
        emit("mov", qword(RBX, _former(0, number) + _HANDLER), _SIG_DFL)
    following = Label()
    _emit_sigaltstack(assembler, data + _FORMER_STACK, data + _FOUND_STACK)
    emit("mov", RAX, qword(RBX, _FOUND_STACK))
    emit("cmp", RAX, qword(RBX, _OUR_STACK))
    emit("je", following)
    _emit_sigaltstack(assembler, data + _FOUND_STACK, 0)
    assembler.bind(following)
    emit("mov", EAX, 0)
    emit("pop", RBX)
    emit("ret")


def _former(data: int, number: int) -> int:
    return data + _FORMER_ACTIONS + _ACTION_BYTES * number


def _emit_sigaction(assembler: Assembler, number: int | None, action: int, former: int) -> None:
    """rt_sigaction(number, action, former, 8); with None the number is in EDI. Clobbers RCX and R11."""
    emit = assembler.emit
    if number is not None:
        emit("mov", EDI, int(number))
    emit("mov", RSI, action)
    emit("mov", RDX, former)
    emit("mov", R10D, _SIGNAL_SET_BYTES)
    emit("mov", EAX, _SYS_RT_SIGACTION)
    emit("syscall")


def _emit_sigaltstack(assembler: Assembler, stack: int, former: int) -> None:
    """sigaltstack(stack, former)."""
    assembler.emit("mov", RDI, stack)
    assembler.emit("mov", RSI, former)
    assembler.emit("mov", EAX, _SYS_SIGALTSTACK)
    assembler.emit("syscall")


CORE = SignalCore()
