"""Host signals raised by emitted code: SIGSEGV and its kin become exits; all others go to whoever had them before.

The handler is machine code of our own, one for the process, on an alternate stack. It must not know what a fault means.

Source: signal(7), sigaltstack(2), the kernel's `struct sigcontext` for x86-64.
"""

from __future__ import annotations

import ctypes
import signal
from dataclasses import dataclass, field

from vmm.native import hostmemory
from vmm.native.assembler import Assembler
from vmm.native.operands import (
    EAX,
    EDI,
    EDX,
    R8,
    R10D,
    RAX,
    RCX,
    RDX,
    RSI,
    RSP,
    Label,
    dword,
    qword,
)  # fmt: skip
from vmm.native.stateblock import OFFSETS

CODE_REGION_BYTES = 1 << 30  # every translation cache of the process lies in here
SIGNALS = (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP)

_SYS_RT_SIGACTION = 13
_SYS_RT_SIGRETURN = 15
_SA_SIGINFO, _SA_ONSTACK, _SA_RESTORER = 4, 0x0800_0000, 0x0400_0000
_SIGNAL_SET_BYTES = 8
_AT_MINSIGSTKSZ = 51
_STACK_BYTES = 64 << 10
_PAGE_BYTES = 4096

# Offsets in ucontext_t: uc_mcontext.gregs begins at 40, eight bytes each, in the order of <sys/ucontext.h>.
_GREGS = 40
_UC_R15, _UC_RIP, _UC_FLAGS, _UC_ERROR, _UC_TRAP = (_GREGS + 8 * n for n in (7, 16, 17, 19, 20))
_SI_ADDRESS = 16

_libc = ctypes.CDLL(None, use_errno=True)
_libc.getauxval.restype = ctypes.c_ulong
_libc.getauxval.argtypes = [ctypes.c_ulong]
_libc.syscall.restype = ctypes.c_long


class _KernelAction(ctypes.Structure):
    _fields_ = (
        ("handler", ctypes.c_uint64),
        ("flags", ctypes.c_uint64),
        ("restorer", ctypes.c_uint64),
        ("mask", ctypes.c_uint64),
    )


class _Stack(ctypes.Structure):
    _fields_ = (("host", ctypes.c_uint64), ("flags", ctypes.c_int), ("size_bytes", ctypes.c_size_t))


_libc.sigaltstack.restype = ctypes.c_int
_libc.sigaltstack.argtypes = [ctypes.POINTER(_Stack), ctypes.POINTER(_Stack)]


class SignalError(OSError):
    """The host refused a signal handler or its stack."""


@dataclass(slots=True)
class SignalCore:
    """The process's handler and the region of code that it answers for.

    Attributes:
        region: host address of the reservation in which translation caches are mapped.
        users: how many engines need the handler; the last one to go restores what was there before.
    """

    region: int = 0
    users: int = 0
    _code: int = 0
    _stack: int = 0
    _old_stack: _Stack = field(default_factory=_Stack)
    _old_actions: dict[int, _KernelAction] = field(default_factory=dict)
    _free: list[int] = field(default_factory=list)

    def acquire(self, slot_bytes: int) -> int:
        """Install the handler if need be, and hand out a slot of the region for one translation cache."""
        if not self.region:
            self.region = hostmemory.reserve(CODE_REGION_BYTES, align=CODE_REGION_BYTES)
            self._free = [self.region + at for at in range(0, CODE_REGION_BYTES, slot_bytes)][::-1]
        if not self.users:
            self._install()
        self.users += 1
        if not self._free:
            raise SignalError("all slots for translation caches are taken")
        return self._free.pop()

    def give_back(self, slot: int) -> None:
        """Return a slot, which its user has unmapped; with the last user the former handlers come back."""
        self._free.append(slot)
        self.users -= 1
        if not self.users:
            self._restore()

    def _install(self) -> None:
        size_bytes = max(_STACK_BYTES, 4 * _libc.getauxval(_AT_MINSIGSTKSZ))
        self._stack = hostmemory.map_anonymous(size_bytes)
        stack = _Stack(self._stack, 0, size_bytes)
        if _libc.sigaltstack(ctypes.byref(stack), ctypes.byref(self._old_stack)):
            raise SignalError(ctypes.get_errno(), "sigaltstack failed")
        old = {int(number): _exchange(number, None) for number in SIGNALS}
        self._old_actions = old
        handler, restorer = self._emit({number: action.handler for number, action in old.items()})
        for number in SIGNALS:
            _exchange(number, _KernelAction(handler, _SA_SIGINFO | _SA_ONSTACK | _SA_RESTORER, restorer, 0))

    def _restore(self) -> None:
        for number, action in self._old_actions.items():
            _exchange(number, action)
        _libc.sigaltstack(ctypes.byref(self._old_stack), None)

    def _emit(self, old_handlers: dict[int, int]) -> tuple[int, int]:
        """Write the handler and the restorer; returns their host addresses."""
        mapping = hostmemory.DualMapping(_PAGE_BYTES, "signal-core")
        assembler = Assembler(mapping.host)
        handler = assembler.here
        _emit_handler(assembler, self.region, old_handlers)
        restorer = assembler.here
        assembler.emit("mov", EAX, _SYS_RT_SIGRETURN)
        assembler.emit("syscall")
        code = assembler.finish()
        mapping.data[: len(code)] = code
        return handler, restorer


def _emit_handler(assembler: Assembler, region: int, old_handlers: dict[int, int]) -> None:
    """handler(edi: signal, rsi: siginfo, rdx: ucontext).

    if RIP is in the region: state = R15; state.fault_* = what happened; RIP = state.fault_exit; return
    else: go on in the handler that was there before; with none, restore the default action and fault again.
    """
    emit = assembler.emit
    foreign = Label()
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
    emit("mov", RAX, qword(R8, OFFSETS["fault_exit"]))
    emit("mov", qword(RDX, _UC_RIP), RAX)
    emit("ret")
    assembler.bind(foreign)
    for number, old in old_handlers.items():
        following = Label()
        emit("cmp", EDI, int(number))
        emit("jne", following)
        if old > 1:
            emit("mov", RAX, old)
            emit("jmp", RAX)
        else:
            # rt_sigaction(signal, {SIG_DFL}, NULL, 8): the instruction faults again and the default action follows.
            emit("sub", RSP, 64)
            for slot in range(4):
                emit("mov", qword(RSP, 8 * slot), 0)
            emit("mov", RSI, RSP)
            emit("mov", EDX, 0)
            emit("mov", R10D, _SIGNAL_SET_BYTES)
            emit("mov", EAX, _SYS_RT_SIGACTION)
            emit("syscall")
            emit("add", RSP, 64)
            emit("ret")
        assembler.bind(following)
    emit("ret")


def _exchange(number: int, action: _KernelAction | None) -> _KernelAction:
    old = _KernelAction()
    pointer = ctypes.byref(action) if action is not None else None
    if _libc.syscall(_SYS_RT_SIGACTION, int(number), pointer, ctypes.byref(old), _SIGNAL_SET_BYTES):
        raise SignalError(ctypes.get_errno(), f"rt_sigaction failed for signal {number}")
    return old


CORE = SignalCore()
