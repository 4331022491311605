"""The state block: what emitted code and Python hand to each other, its layout declared once.

R15 points to it while emitted code runs. Offsets are never typed anywhere else.
"""

from __future__ import annotations

from vmm.native import hostmemory
from vmm.native.operands import R15, Memory

BLOCK_BYTES = 2 * 4096
SEGMENT_BYTES = 8
ADDRESS_SPACES = 64
ADDRESS_SPACE_BYTES = 40
REAL_SPACES = 64  # a power of two
REAL_SPACE_BYTES = 16
REAL_SHIFTS = (4, 8)  # a selector is found by the sum of its digits, roughly: many are multiples of something
PORT_STORE = 8
SITES = 128  # a power of two
SITE_BYTES = 16
VECTORS = 32  # of exceptions; a power of two

# Name and size in bytes, in order; each field is aligned to its size.
_FIELDS = (
    ("gpr", 32),  # EAX ECX EDX EBX ESP EBP ESI EDI, in the order of their encodings
    # ES CS SS DS FS GS, eight bytes each: selector, then bits 63:32 of the descriptor (0 for a null selector).
    ("segments", 6 * 8),
    ("segment_bases", 6 * 4),  # in the same order
    # For reads and for writes of each: -1 - limit, so that a sum with an offset within it is negative; 0 where no
    # offset is, or where a lower bound has to be checked too.
    ("segment_bounds", 6 * 16),
    ("interrupt_flag", 4),  # EFLAGS.IF in its place, all other bits 0
    ("system_flags", 4),  # IOPL NT AC ID VIF VIP of EFLAGS in their places
    ("cpl", 4),
    ("cr0", 4),
    ("cr2", 4),
    ("cr3", 4),
    ("cr4", 4),
    ("gdt_base", 4),
    ("gdt_limit", 4),
    ("idt_base", 4),
    ("idt_limit", 4),
    ("inner_stack", 4),  # linear address of ESP0 in the TSS; 0: the TSS has none that can be used
    ("sysenter_cs", 4),
    ("sysenter_esp", 4),
    ("sysenter_eip", 4),
    ("pending", 4),  # PENDING_*: what emitted code must not pass by
    ("shadow", 4),  # what the instruction before a callout holds off: SHADOW_*
    ("routine_eip", 4),  # of the instruction that a routine carries out
    ("routine_next", 4),  # of the one behind it
    ("routine_registers", 12),  # EAX ECX EDX as they were when it began
    ("routine_flags", 8),
    ("routine_status", 4),  # or AX as LAHF and SETO leave it, instead
    ("routine_return", 8),  # host address at which a routine that was called goes on
    ("kernel_space", 16),  # window and dispatch table of CPL 0 of this address space, 0 if not known
    ("user_space", 16),  # the same of CPL 3
    ("interrupt_flag_before", 4),  # IF before the last STI
    ("routine_selector", 4),  # scratch of routines
    ("routine_access", 4),
    ("segments_new", 8),
    ("parked", 4),  # a value that emitted code keeps aside within one instruction
    # Of the software path to memory: size of RAM, or 0 if it is not to be taken; how many more may take it before
    # Python looks; the linear address; the size of the access - 1; and an entry that it has met.
    ("soft_limit", 4),
    ("soft_left", 4),
    ("soft_linear", 4),
    ("soft_last", 4),
    ("soft_entry", 4),
    ("soft_access", 4),  # PF_WRITE and PF_USER of an access that it was not taken to, or DIVIDES
    ("page_flags", 8),  # host addresses of a byte for each page and of one for each doubleword of an entry
    ("entry_uses", 8),
    # Of a string instruction in `narrowstrings`: the guest's registers, and the linear addresses where it began.
    ("string_esi", 4),
    ("string_edi", 4),
    ("string_ecx", 4),
    ("string_source", 4),
    ("string_destination", 4),
    ("target_eip", 4),  # the same of an indirect call's target
    ("ns_per_insn", 8),
    ("resume_budget", 8),  # what was left when IRET set RF: as long as that is so, RF is set
    ("cpuid", 32),  # EAX EBX ECX EDX of leaves 0 and 1
    ("port", 4),  # a port access: which port,
    ("port_access", 4),  # its size in bytes, and PORT_STORE,
    ("port_resume", 4),  # and the offset in the TC at which to go on
    # What reads of one byte at a port give that is polled: -4 times the port, or a number that no such sum makes 0;
    # the value; and what makes a sum with the budget behind the IN negative from when on that is not known.
    ("published_port", 4),
    ("published_value", 4),
    ("published_budget", 8),
    # For some page tables used lately: CR3 in eight bytes, then their kernel_space and user_space; 0 is none.
    ("address_spaces", ADDRESS_SPACES * ADDRESS_SPACE_BYTES),
    # For some code segments of real mode: the selector, and the dispatch table of its code, 0 if there is none.
    ("real_spaces", REAL_SPACES * REAL_SPACE_BYTES),
    ("tsc_at_no_budget", 8),  # what RDTSC would give when the budget is used up
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
    ("fpu_gate_without_ts", 8),  # what they are while CR0.TS is clear
    ("sse_gate_without_ts", 8),
    ("fpu_ip", 4),  # the pointers to the last x87 instruction and operand
    ("fpu_cs", 4),
    ("fpu_dp", 4),
    ("fpu_ds", 4),
    ("fpu_op", 4),
    ("host_mxcsr", 4),  # the control words of the caller in C
    ("host_fcw", 2),
    # An exception that is delivered in the TC: its vector; 4 and an error code, or 0; what CR2 gets;
    ("delivery_vector", 4),
    ("delivery_code_bytes", 4),
    ("delivery_code", 4),
    ("delivery_linear", 4),
    ("delivery_budget", 8),  # what was left of the budget after the last one's instruction was charged;
    ("deliveries", VECTORS * 4),  # how often, by vector, since Python last looked
    ("ram_view", 8),  # host address of the flat view of RAM
    ("ram_limit", 4),  # size of RAM in bytes, or 0 if the view is not to be looked at
    ("walk_access", 4),  # scratch of the page-table walk: PF_WRITE and PF_USER
    ("fault_first", 8),  # from this host address on, `fault_routine` comes first; -1: nowhere
    ("fault_routine", 8),
    # Where emitted code has met exceptions of the guest's: offset of the host instruction, or of where a routine was to
    # go on, 0 for none; guest address; bits 7:0: instructions that it was charged for and that did not retire, but for
    # one, and bits 31:8: what guest ESP is more than R12D; how many more exceptions there may be.
    ("sites", SITES * SITE_BYTES),
    ("site", 4),  # scratch: the offset of one in there
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
assert STATE_BYTES <= BLOCK_BYTES


def field(name: str) -> Memory:
    """The operand for a field of the state block in emitted code."""
    return Memory(8 * SIZES[name], R15, displacement=OFFSETS[name])


def word(name: str, index: int) -> Memory:
    """The operand for the 32-bit word number `index` of a field."""
    return Memory(32, R15, displacement=OFFSETS[name] + 4 * index)


def qword_of(name: str, index: int) -> Memory:
    """The operand for the 64-bit word number `index` of a field."""
    return Memory(64, R15, displacement=OFFSETS[name] + 8 * index)


def gpr(number: int) -> Memory:
    """The operand for the slot of one guest register."""
    return Memory(32, R15, displacement=OFFSETS["gpr"] + 4 * number)


def selector(number: int) -> Memory:
    """The operand for the selector in one segment register."""
    return Memory(32, R15, displacement=OFFSETS["segments"] + SEGMENT_BYTES * number)


def segment_base(number: int) -> Memory:
    """The operand for the base of one segment."""
    return word("segment_bases", number)


def segment_bound(number: int, *, write: bool) -> Memory:
    """The operand for the bound of one segment."""
    return qword_of("segment_bounds", 2 * number + write)


def signed(value: int) -> int:
    """The low 64 bits of `value` as a signed number, as `quads` takes them."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def real_space_at(selector: int) -> int:
    """Index into `quads` of what the state block may know of a code segment of real mode."""
    number = selector
    for shift in REAL_SHIFTS:
        number += number >> shift
    return REAL_SPACES_AT + REAL_SPACE_BYTES // 8 * (number & REAL_SPACES - 1)


class StateBlock:
    """One state block in host memory.

    Attributes:
        data: its bytes.
        words: its 32-bit words, its first being EAX.
        quads: its 64-bit words.
    """

    def __init__(self) -> None:
        self.host = hostmemory.map_anonymous(BLOCK_BYTES)
        self.data = hostmemory.view(self.host, BLOCK_BYTES)
        self.words = self.data.cast("I")
        self.quads = self.data.cast("q")

    def set_cpuid(self, *registers: int) -> None:
        """What CPUID gives for leaves 0 and 1 in EAX, EBX, ECX and EDX."""
        for number, value in enumerate(registers):
            self.words[CPUID + number] = value

    def set_time(self, tsc: int, budget_insns: int, ns_per_insn: int) -> None:
        """Let RDTSC in emitted code give `tsc` before a budget is used, and what it is after each instruction."""
        self.quads[TSC_AT_NO_BUDGET] = signed(tsc + budget_insns * ns_per_insn)
        self.quads[NS_PER_INSN] = ns_per_insn

    def close(self) -> None:
        """Unmap it."""
        self.words.release()
        self.quads.release()
        self.data.release()
        hostmemory.release(self.host, BLOCK_BYTES)


# Indices into `words` and `quads`.
EIP = OFFSETS["eip"] // 4
REASON = OFFSETS["reason"] // 4
DETAIL = OFFSETS["detail"] // 4
FLAGS = OFFSETS["flags"] // 8
TARGET = OFFSETS["target"] // 8
BUDGET = OFFSETS["budget"] // 8
SEGMENTS = OFFSETS["segments"] // 4
SEGMENT_BASES = OFFSETS["segment_bases"] // 4
SEGMENT_BOUNDS = OFFSETS["segment_bounds"] // 8
INTERRUPT_FLAG = OFFSETS["interrupt_flag"] // 4
SYSTEM_FLAGS = OFFSETS["system_flags"] // 4
CPL = OFFSETS["cpl"] // 4
CR0 = OFFSETS["cr0"] // 4
CR3 = OFFSETS["cr3"] // 4
SHADOW = OFFSETS["shadow"] // 4
PENDING = OFFSETS["pending"] // 4
PENDING_INTERRUPT = 1  # something is to be delivered once IF is set
PENDING_OTHER = 2  # a debugger catches INT n, or NMIs are blocked until an IRET
ROUTINE_EIP = OFFSETS["routine_eip"] // 4
ROUTINE_REGISTERS = OFFSETS["routine_registers"] // 4
ROUTINE_STATUS = OFFSETS["routine_status"] // 4
ROUTINE_FLAGS = OFFSETS["routine_flags"] // 8
KERNEL_SPACE = OFFSETS["kernel_space"] // 8
USER_SPACE = OFFSETS["user_space"] // 8
INTERRUPT_FLAG_BEFORE = OFFSETS["interrupt_flag_before"] // 4
RESUME_BUDGET = OFFSETS["resume_budget"] // 8
NO_BUDGET = -1  # of a moment that never comes
CPUID = OFFSETS["cpuid"] // 4
PORT = OFFSETS["port"] // 4
PORT_ACCESS = OFFSETS["port_access"] // 4
PORT_RESUME = OFFSETS["port_resume"] // 4
SOFT_LIMIT = OFFSETS["soft_limit"] // 4
SOFT_LEFT = OFFSETS["soft_left"] // 4
SOFT_LINEAR = OFFSETS["soft_linear"] // 4
PAGE_FLAGS = OFFSETS["page_flags"] // 8
ENTRY_USES = OFFSETS["entry_uses"] // 8
ROUTINE_RETURN = OFFSETS["routine_return"] // 8
PUBLISHED_PORT = OFFSETS["published_port"] // 4
PUBLISHED_VALUE = OFFSETS["published_value"] // 4
PUBLISHED_BUDGET = OFFSETS["published_budget"] // 8
ROUTINE_NEXT = OFFSETS["routine_next"] // 4
CR2 = OFFSETS["cr2"] // 4
SITES_AT = OFFSETS["sites"] // 4
FAULT_FIRST = OFFSETS["fault_first"] // 8
NOWHERE_FIRST = -1
DELIVERIES = OFFSETS["deliveries"] // 4
ADDRESS_SPACES_AT = OFFSETS["address_spaces"] // 8
REAL_SPACES_AT = OFFSETS["real_spaces"] // 8
REAL_CODE = 0x9300  # what `segments` has of CS that was loaded in real mode
NS_PER_INSN = OFFSETS["ns_per_insn"] // 8
TSC_AT_NO_BUDGET = OFFSETS["tsc_at_no_budget"] // 8
WINDOW = OFFSETS["window"] // 8
DISPATCH = OFFSETS["dispatch"] // 8
CALL_STACK = OFFSETS["call_stack"] // 8
SCRATCH9 = OFFSETS["scratch9"] // 8
FAULT_ADDRESS = OFFSETS["fault_address"] // 8
FAULT_RIP = OFFSETS["fault_rip"] // 8
FAULT_ERROR = OFFSETS["fault_error"] // 8
FAULT_TRAP = OFFSETS["fault_trap"] // 8
FAULT_SIGNAL = OFFSETS["fault_signal"] // 8
FPU_LIVE = OFFSETS["fpu_live"] // 8
FPU_PAGE = OFFSETS["fpu_page"] // 8
FPU_GATE = OFFSETS["fpu_gate"] // 8
SSE_GATE = OFFSETS["sse_gate"] // 8
FPU_GATE_WITHOUT_TS = OFFSETS["fpu_gate_without_ts"] // 8
SSE_GATE_WITHOUT_TS = OFFSETS["sse_gate_without_ts"] // 8
