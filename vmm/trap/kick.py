"""An alarm that ends KVM_RUN: a timer of the kernel sends one signal to the thread that runs the guest.

The signal stays blocked in that thread and is opened by KVM only while the guest runs, so it has no handler, none of
Python's code runs for it, and one that comes too early ends the next KVM_RUN at once. No second thread is needed.

Source: timer_create(2) with SIGEV_THREAD_ID; KVM_SET_SIGNAL_MASK in the kernel's documentation of KVM.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from struct import Struct
from typing import Final

KICK_SIGNAL: Final = signal.SIGRTMAX - 2

_SYS_TIMER_CREATE, _SYS_TIMER_SETTIME, _SYS_TIMER_DELETE = 222, 223, 226
_CLOCK_MONOTONIC = 1
_SIGEV_THREAD_ID = 4
_TIMER_ABSTIME = 1
_SIGEVENT = Struct("<QiiI44x")  # value, signal, how to notify, thread
_ITIMERSPEC = Struct("<4q")  # interval, value
_NS_PER_S = 1_000_000_000

# It only starts a timer, so it is not worth handing the GIL over for.
_syscall = ctypes.PyDLL(None, use_errno=True).syscall
_syscall.restype = ctypes.c_long


class Kick:
    """The alarm of the thread that makes it.

    Raises:
        OSError: the kernel has no timer for us.
    """

    def __init__(self) -> None:
        self.thread_id = threading.get_native_id()
        self.other_signals = sum(1 << number - 1 for number in signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        signal.pthread_sigmask(signal.SIG_BLOCK, (KICK_SIGNAL,))
        self.other_signals &= ~(1 << KICK_SIGNAL - 1)
        event = ctypes.create_string_buffer(_SIGEVENT.pack(0, KICK_SIGNAL, _SIGEV_THREAD_ID, self.thread_id), 64)
        timer = ctypes.c_int()
        if _syscall(ctypes.c_long(_SYS_TIMER_CREATE), _CLOCK_MONOTONIC, event, ctypes.byref(timer)):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        self._timer: int | None = timer.value
        self._spec = ctypes.create_string_buffer(_ITIMERSPEC.size)
        self._armed_ns = 0

    def arm(self, at_ns: int) -> None:
        """Let the signal come when `time.monotonic_ns` reaches `at_ns`, and not when it was to come before."""
        if at_ns != self._armed_ns:
            self._armed_ns = at_ns
            _ITIMERSPEC.pack_into(self._spec, 0, 0, 0, at_ns // _NS_PER_S, at_ns % _NS_PER_S)
            _syscall(ctypes.c_long(_SYS_TIMER_SETTIME), self._timer, _TIMER_ABSTIME, self._spec, None)

    def disarm(self) -> None:
        """Let no signal come, and forget one that has."""
        self.arm(0)
        self.drain()

    def drain(self) -> None:
        """Forget a signal that has come; the next `arm` starts the timer, whatever the time."""
        self._armed_ns = 0
        while signal.sigtimedwait((KICK_SIGNAL,), 0) is not None:
            pass

    def close(self) -> None:
        """Give the timer back; in its own thread the signal is left as other threads have it."""
        if self._timer is None:
            return
        _syscall(ctypes.c_long(_SYS_TIMER_DELETE), self._timer)
        self._timer = None
        if threading.get_native_id() == self.thread_id:
            self.drain()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, (KICK_SIGNAL,))
