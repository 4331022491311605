"""The state block: what emitted code and Python hand to each other, its layout declared once.

R15 points to it while emitted code runs. Offsets are never typed anywhere else.
"""

from __future__ import annotations

from vmm.native import hostmemory
from vmm.native.operands import R15, Memory

PAGE_BYTES = 4096
SEGMENT_BYTES = 8

# Name and size in bytes, in order; each field is aligned to its size.
_FIELDS = (
    ("gpr", 32),  # EAX ECX EDX EBX ESP EBP ESI EDI, in the order of their encodings
    # ES CS SS DS FS GS, eight bytes each: selector, then bits 63:32 of the descriptor (0 for a null selector).
    ("segments", 6 * 8),
    ("eip", 4),  # of the next guest instruction, at an exit that names it
    ("reason", 4),  # why emitted code was left: `Exit`
    ("detail", 4),  # what belongs to the reason
    ("flags", 8),  # RFLAGS: status flags and DF of the guest, in and out
    ("target", 8),  # host address at which to enter
    ("budget", 8),  # instructions that may still retire, signed; below zero: stop
    ("window", 8),  # host address of the current window
    ("dispatch", 8),  # host address of the current dispatch table
    ("scratch8", 8),  # R8 and R9 at a fault, so that the same host instruction can be tried again
    ("scratch9", 8),
    ("call_stack", 8),  # RSP of the stack that guest calls use
    ("host_rsp", 8),  # RSP of the caller in C
    ("fault_address", 8),  # siginfo.si_addr
    ("fault_rip", 8),
    ("fault_error", 8),  # page-fault error code of the host CPU
    ("fault_trap", 8),  # trap number of the host CPU
    ("fault_signal", 8),
    ("fpu_live", 8),  # not 0: the guest's FPU registers are loaded while emitted code runs
    ("fpu_page", 8),  # host address of the page of `machine.fpustate`
    ("fpu_gate", 8),  # host addresses from which x87 and MMX, and SSE, read one doubleword: they fault if not allowed
    ("sse_gate", 8),
    ("fpu_ip", 4),  # the pointers to the last x87 instruction and operand
    ("fpu_cs", 4),
    ("fpu_dp", 4),
    ("fpu_ds", 4),
    ("fpu_op", 4),
    ("host_mxcsr", 4),  # the control words of the caller in C
    ("host_fcw", 2),
    ("fault_exit", 8),  # host address to which the signal handler diverts a fault of emitted code
)

OFFSETS: dict[str, int] = {}
SIZES: dict[str, int] = dict(_FIELDS)
_next = 0
for _name, _size in _FIELDS:
    _align = min(_size, 8)
    _next = (_next + _align - 1) & -_align
    OFFSETS[_name] = _next
    _next += _size
STATE_BYTES = _next


def field(name: str) -> Memory:
    """The operand for a field of the state block in emitted code."""
    return Memory(8 * SIZES[name], R15, displacement=OFFSETS[name])


def gpr(number: int) -> Memory:
    """The operand for the slot of one guest register."""
    return Memory(32, R15, displacement=OFFSETS["gpr"] + 4 * number)


def selector(number: int) -> Memory:
    """The operand for the selector in one segment register."""
    return Memory(32, R15, displacement=OFFSETS["segments"] + SEGMENT_BYTES * number)


class StateBlock:
    """One state block in host memory.

    Attributes:
        words: its 32-bit words, its first being EAX.
        quads: its 64-bit words.
    """

    def __init__(self) -> None:
        self.host = hostmemory.map_anonymous(PAGE_BYTES)
        data = hostmemory.view(self.host, PAGE_BYTES)
        self.words = data.cast("I")
        self.quads = data.cast("q")

    def close(self) -> None:
        """Unmap it."""
        self.words.release()
        self.quads.release()
        hostmemory.release(self.host, PAGE_BYTES)


# Indices into `words` and `quads`.
EIP = OFFSETS["eip"] // 4
REASON = OFFSETS["reason"] // 4
DETAIL = OFFSETS["detail"] // 4
FLAGS = OFFSETS["flags"] // 8
TARGET = OFFSETS["target"] // 8
BUDGET = OFFSETS["budget"] // 8
WINDOW = OFFSETS["window"] // 8
SEGMENTS = OFFSETS["segments"] // 4
DISPATCH = OFFSETS["dispatch"] // 8
CALL_STACK = OFFSETS["call_stack"] // 8
FAULT_ADDRESS = OFFSETS["fault_address"] // 8
FAULT_RIP = OFFSETS["fault_rip"] // 8
FAULT_ERROR = OFFSETS["fault_error"] // 8
FAULT_TRAP = OFFSETS["fault_trap"] // 8
FAULT_SIGNAL = OFFSETS["fault_signal"] // 8
FPU_LIVE = OFFSETS["fpu_live"] // 8
FPU_PAGE = OFFSETS["fpu_page"] // 8
FPU_GATE = OFFSETS["fpu_gate"] // 8
SSE_GATE = OFFSETS["sse_gate"] // 8
