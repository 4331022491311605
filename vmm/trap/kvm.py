"""/dev/kvm: a virtual machine with one virtual CPU, by ioctl, its structures as `struct` declares them.

It knows the kernel's interface and no guest: what the registers mean and what exits ask for is decided above.

Source: Linux, Documentation/virt/kvm/api.rst, and the layouts in <linux/kvm.h> and <asm/kvm.h>.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from enum import IntEnum
from struct import Struct
from typing import Final, NamedTuple

from machine.engine import EngineError
from vmm.trap.kvmcounters import read_counters

DEVICE: Final = "/dev/kvm"
API_VERSION: Final = 12

_WRITE, _READ = 1, 2
_KVMIO = 0xAE


def _io(number: int, direction: int = 0, size_bytes: int = 0) -> int:
    return direction << 30 | size_bytes << 16 | _KVMIO << 8 | number


# Layouts; every one is little-endian without padding of its own.
REGS: Final = Struct("<18Q")  # RAX RBX RCX RDX RSI RDI RSP RBP R8..R15 RIP RFLAGS
SEGMENT: Final = Struct("<QIHBBBBBBBBBx")  # base limit selector type present dpl db s l g avl unusable
TABLE: Final = Struct("<QH6x")  # base limit
SREGS: Final = Struct("<192s32s7Q32s")  # 8 segments, 2 tables, CR0 CR2 CR3 CR4 CR8 EFER APIC_BASE, interrupt bitmap
EVENTS: Final = Struct("<BBBBIBBBBBBBxII4sB26xBQ")
DEBUGREGS: Final = Struct("<6QQ72x")  # DR0..DR3 DR6 DR7 flags
GUEST_DEBUG: Final = Struct("<II8Q")
XSAVE_BYTES: Final = 4096
_MEMORY_REGION = Struct("<IIQQQ")
_CPUID_HEADER = Struct("<II")
_CPUID_ENTRY = Struct("<7I12x")
_MSRS_HEADER = Struct("<II")
_MSR_ENTRY = Struct("<IIQ")
_WORD = Struct("<I")
_QUAD = Struct("<Q")
_DEVICE_ATTR = Struct("<IIQQ")  # flags, group, attribute, address of the value

# Requests.
_GET_API_VERSION = _io(0x00)
_CREATE_VM = _io(0x01)
_CHECK_EXTENSION = _io(0x03)
_GET_VCPU_MMAP_SIZE = _io(0x04)
_CREATE_VCPU = _io(0x41)
_SET_USER_MEMORY_REGION = _io(0x46, _WRITE, _MEMORY_REGION.size)
_SET_TSS_ADDR = _io(0x47)
_SET_IDENTITY_MAP_ADDR = _io(0x48, _WRITE, 8)
_RUN = _io(0x80)
_GET_REGS = _io(0x81, _READ, REGS.size)
_SET_REGS = _io(0x82, _WRITE, REGS.size)
_GET_SREGS = _io(0x83, _READ, SREGS.size)
_SET_SREGS = _io(0x84, _WRITE, SREGS.size)
_INTERRUPT = _io(0x86, _WRITE, 4)
_GET_MSRS = _io(0x88, _WRITE | _READ, _MSRS_HEADER.size)
_SET_MSRS = _io(0x89, _WRITE, _MSRS_HEADER.size)
_SET_SIGNAL_MASK = _io(0x8B, _WRITE, 4)
_SET_CPUID2 = _io(0x90, _WRITE, _CPUID_HEADER.size)
_NMI = _io(0x9A)
_SET_GUEST_DEBUG = _io(0x9B, _WRITE, GUEST_DEBUG.size)
_GET_VCPU_EVENTS = _io(0x9F, _READ, EVENTS.size)
_SET_VCPU_EVENTS = _io(0xA0, _WRITE, EVENTS.size)
_GET_DEBUGREGS = _io(0xA1, _READ, DEBUGREGS.size)
_SET_DEBUGREGS = _io(0xA2, _WRITE, DEBUGREGS.size)
_GET_XSAVE = _io(0xA4, _READ, XSAVE_BYTES)
_SET_XSAVE = _io(0xA5, _WRITE, XSAVE_BYTES)
_SET_DEVICE_ATTR = _io(0xE1, _WRITE, _DEVICE_ATTR.size)
_GET_DEVICE_ATTR = _io(0xE2, _WRITE, _DEVICE_ATTR.size)
_GET_STATS_FD = _io(0xCE)

# What can be asked of KVM_CHECK_EXTENSION.
CAP_USER_MEMORY = 3
CAP_SET_TSS_ADDR = 4
CAP_EXT_CPUID = 7
CAP_SET_GUEST_DEBUG = 23
CAP_SET_IDENTITY_MAP_ADDR = 37
CAP_VCPU_EVENTS = 41
CAP_DEBUGREGS = 50
CAP_XSAVE = 55
CAP_READONLY_MEM = 81
CAP_IMMEDIATE_EXIT = 136
CAP_BINARY_STATS_FD = 203

_NEEDED = {
    CAP_USER_MEMORY: "user memory",
    CAP_EXT_CPUID: "CPUID",
    CAP_SET_GUEST_DEBUG: "guest debugging",
    CAP_VCPU_EVENTS: "events",
    CAP_DEBUGREGS: "debug registers",
    CAP_XSAVE: "the state of XSAVE",
    CAP_READONLY_MEM: "read-only memory",
    CAP_IMMEDIATE_EXIT: "immediate exit",
}

MEMORY_READ_ONLY = 1 << 1

DEBUG_ENABLE = 1 << 0
DEBUG_HARDWARE_BREAKPOINTS = 1 << 17

_FXSAVE_BYTES = 512
_MASK64 = (1 << 64) - 1
_XSAVE_X87, _XSAVE_SSE = 1, 2

EVENT_NMI_PENDING_VALID = 1 << 0
EVENT_SHADOW_VALID = 1 << 2

# Three pages and one that Intel hardware wants for real mode; below the BIOS ROM's copy at 4 GiB, where nothing is.
_TSS_ADDRESS = 0xFEFF_D000
_IDENTITY_MAP_ADDRESS = 0xFEFF_C000


class ExitReason(IntEnum):
    """Why KVM_RUN came back."""

    UNKNOWN = 0
    EXCEPTION = 1
    IO = 2
    HYPERCALL = 3
    DEBUG = 4
    HLT = 5
    MMIO = 6
    IRQ_WINDOW_OPEN = 7
    SHUTDOWN = 8
    FAIL_ENTRY = 9
    INTR = 10
    SET_TPR = 11
    TPR_ACCESS = 12
    NMI = 16
    INTERNAL_ERROR = 17
    SYSTEM_EVENT = 24
    X86_RDMSR = 29
    X86_WRMSR = 30


_TSC_CONTROL_GROUP, _TSC_OFFSET_ATTRIBUTE = 0, 0

# Offsets in the page that is shared with the kernel.
_REQUEST_INTERRUPT_WINDOW = 0
_IMMEDIATE_EXIT = 1
_EXIT_REASON = 8
_READY_FOR_INTERRUPT = 12
_IF_FLAG = 13
_DETAIL = 32
_IO_EXIT = Struct("<BBHIQ")  # direction size port times offset
_MMIO_EXIT = Struct("<Q8sIB")  # address data length is_write
_MMIO_DATA = _DETAIL + 8
_DEBUG_EXIT = Struct("<I4xQQQ")  # exception pc DR6 DR7
_INTERNAL_EXIT = Struct("<II")


class KvmError(EngineError):
    """KVM is not there, not for us, or refuses; one line for the user."""


class IoExit(NamedTuple):
    """IN or OUT: `times` accesses of `size_bytes` at `port`, their data at `offset` of the shared pages."""

    is_out: int
    size_bytes: int
    port: int
    times: int
    offset: int


class DebugExit(NamedTuple):
    """A debug exit: the vector (1 or 3), the linear address, and DR6 and DR7 as they were."""

    vector: int
    linear: int
    dr6: int
    dr7: int


class Events(NamedTuple):
    """KVM_GET_VCPU_EVENTS: what is being delivered, and what is held back."""

    exception_injected: int = 0
    exception_vector: int = 0
    exception_has_code: int = 0
    exception_pending: int = 0
    exception_code: int = 0
    interrupt_injected: int = 0
    interrupt_vector: int = 0
    interrupt_soft: int = 0
    interrupt_shadow: int = 0
    nmi_injected: int = 0
    nmi_pending: int = 0
    nmi_masked: int = 0
    sipi_vector: int = 0
    flags: int = 0
    smi: bytes = bytes(4)
    triple_fault: int = 0
    exception_has_payload: int = 0
    exception_payload: int = 0

    @property
    def in_delivery(self) -> bool:
        """An event has been accepted, and its handler has not been entered."""
        return bool(self.exception_injected or self.exception_pending or self.interrupt_injected or self.nmi_injected)


# KVM_RUN keeps the GIL: the guest runs for a few milliseconds at most, and handing the GIL over costs as much.
_ioctl = ctypes.PyDLL(None, use_errno=True).ioctl
_ioctl.argtypes = ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p
_ioctl.restype = ctypes.c_int


def _call(fd: int, request: int, argument: int | ctypes.Array[ctypes.c_char] | None, what: str) -> int:
    result: int = _ioctl(fd, request, argument)
    if result < 0:
        raise KvmError(f"KVM refuses {what}: {os.strerror(ctypes.get_errno())}")
    return result


class Vm:
    """A virtual machine and its one CPU.

    Raises:
        KvmError: there is no KVM, or it lacks what is needed.
    """

    def __init__(self) -> None:
        self._fds: list[int] = []
        try:
            device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise KvmError(f"{DEVICE} cannot be opened: {error.strerror}") from error
        self._fds.append(device)
        try:
            self._create(device)
        except KvmError:
            self.close()
            raise

    def _create(self, device: int) -> None:
        version = _call(device, _GET_API_VERSION, 0, "to tell its version")
        if version != API_VERSION:
            raise KvmError(f"{DEVICE} speaks version {version} of the interface, not {API_VERSION}")
        self.fd = _call(device, _CREATE_VM, 0, "to create a virtual machine")
        self._fds.append(self.fd)
        lacking = [name for cap, name in _NEEDED.items() if not self.extension(cap)]
        if lacking:
            raise KvmError(f"KVM of this host lacks {', '.join(lacking)}")
        if self.extension(CAP_SET_TSS_ADDR):
            _call(self.fd, _SET_TSS_ADDR, _TSS_ADDRESS, "the address of its TSS")
        if self.extension(CAP_SET_IDENTITY_MAP_ADDR):
            address = ctypes.create_string_buffer(_IDENTITY_MAP_ADDRESS.to_bytes(8, "little"), 8)
            _call(self.fd, _SET_IDENTITY_MAP_ADDR, address, "the address of its identity map")
        size = _call(device, _GET_VCPU_MMAP_SIZE, 0, "to tell the size of its shared pages")
        vcpu = _call(self.fd, _CREATE_VCPU, 0, "to create a CPU")
        self._fds.append(vcpu)
        self.vcpu = Vcpu(vcpu, size)

    @property
    def closed(self) -> bool:
        """Nothing of it is left."""
        return not self._fds

    def close(self) -> None:
        """Give everything back."""
        if len(self._fds) == 3:
            self.vcpu.close()
        for fd in reversed(self._fds):
            os.close(fd)
        self._fds.clear()

    def extension(self, number: int) -> int:
        """What KVM_CHECK_EXTENSION says; 0 for what is not there."""
        return max(0, int(_ioctl(self.fd, _CHECK_EXTENSION, number)))

    def set_memory(self, slot: int, physical: int, size_bytes: int, host: int, *, read_only: bool = False) -> None:
        """Let guest-physical memory be that at the host address `host`; a size of 0 takes the slot away."""
        region = _MEMORY_REGION.pack(slot, MEMORY_READ_ONLY * read_only, physical, size_bytes, host)
        what = f"{size_bytes:#x} bytes of memory at {physical:#x}"
        _call(self.fd, _SET_USER_MEMORY_REGION, ctypes.create_string_buffer(region, len(region)), what)

    def statistics(self) -> dict[str, int]:
        """KVM's own counters for the CPU and the machine, by name; empty if it keeps none. Histograms are left out."""
        if self.closed or not self.extension(CAP_BINARY_STATS_FD):
            return {}
        found: dict[str, int] = {}
        for owner in (self.fd, self.vcpu.fd):
            fd = int(_ioctl(owner, _GET_STATS_FD, 0))
            if fd < 0:
                continue
            try:
                found |= read_counters(fd)
            finally:
                os.close(fd)
        return found


class Vcpu:
    """The CPU: its registers as the kernel's structures, and KVM_RUN.

    Attributes:
        shared: the pages shared with the kernel.
    """

    def __init__(self, fd: int, shared_bytes: int) -> None:
        self.fd = fd
        self._pages = mmap.mmap(fd, shared_bytes)
        self.shared = memoryview(self._pages)
        self._words = self.shared.cast("I")
        self._regs = ctypes.create_string_buffer(REGS.size)
        self._sregs = ctypes.create_string_buffer(SREGS.size)
        self._xsave = ctypes.create_string_buffer(XSAVE_BYTES)
        self._events = ctypes.create_string_buffer(EVENTS.size)
        self._debugregs = ctypes.create_string_buffer(DEBUGREGS.size)

    def close(self) -> None:
        """Unmap the shared pages; the descriptor is the machine's to close."""
        self._words.release()
        self.shared.release()
        self._pages.close()

    # Running.

    def run(self) -> bool:
        """KVM_RUN: the guest runs until there is something to do; False if a signal, or `exit_at_once`, ended it.

        Raises:
            KvmError: it cannot run.
        """
        if _ioctl(self.fd, _RUN, None) >= 0:
            return True
        number = ctypes.get_errno()
        if number in (errno.EINTR, errno.EAGAIN):
            return False
        raise KvmError(f"KVM cannot run the guest: {os.strerror(number)}")

    def complete(self) -> bool:
        """Finish what the last exit has begun (IN, MMIO) without running on; True if that led to another exit."""
        self.shared[_IMMEDIATE_EXIT] = 1
        try:
            return self.run()
        finally:
            self.shared[_IMMEDIATE_EXIT] = 0

    def open_signal(self, mask: int) -> None:
        """While the guest runs, these signals are blocked and no others: bit n - 1 for signal n."""
        data = (8).to_bytes(4, "little") + mask.to_bytes(8, "little")
        _call(self.fd, _SET_SIGNAL_MASK, ctypes.create_string_buffer(data, len(data)), "a signal mask")

    def request_window(self, wanted: bool) -> None:
        """Have KVM_RUN come back as soon as the guest can take an interrupt."""
        self.shared[_REQUEST_INTERRUPT_WINDOW] = wanted

    @property
    def exit_reason(self) -> int:
        """Why it came back: `ExitReason`."""
        return self._words[_EXIT_REASON // 4]

    @property
    def ready_for_interrupt(self) -> bool:
        """Whether the guest can take an interrupt now; as of the last exit."""
        return bool(self.shared[_READY_FOR_INTERRUPT])

    @property
    def interrupts_enabled(self) -> bool:
        """EFLAGS.IF, as of the last exit."""
        return bool(self.shared[_IF_FLAG])

    def io_exit(self) -> IoExit:
        """What an exit for I/O asks for."""
        return IoExit._make(_IO_EXIT.unpack_from(self.shared, _DETAIL))

    def mmio_exit(self) -> tuple[int, bytes, int, bool]:
        """Guest-physical address, data, length in bytes, is it a write."""
        physical, data, length, is_write = _MMIO_EXIT.unpack_from(self.shared, _DETAIL)
        return physical, data[:length], length, bool(is_write)

    def answer_mmio(self, data: bytes) -> None:
        """What the read of an MMIO exit finds."""
        self.shared[_MMIO_DATA : _MMIO_DATA + len(data)] = data

    def debug_exit(self) -> DebugExit:
        """What a debug exit tells."""
        return DebugExit._make(_DEBUG_EXIT.unpack_from(self.shared, _DETAIL))

    def internal_error(self) -> int:
        """The kind of an internal error; 1: an instruction that KVM cannot emulate."""
        kind, _ = _INTERNAL_EXIT.unpack_from(self.shared, _DETAIL)
        return int(kind)

    # Events from outside.

    def interrupt(self, vector: int) -> None:
        """Queue an external interrupt; the guest must be ready for it."""
        buffer = ctypes.create_string_buffer(_WORD.pack(vector), 4)
        _call(self.fd, _INTERRUPT, buffer, f"interrupt {vector:#x}")

    def nmi(self) -> None:
        """Pull NMI."""
        _call(self.fd, _NMI, 0, "an NMI")

    # State.

    def get_regs(self) -> tuple[int, ...]:
        """RAX RBX RCX RDX RSI RDI RSP RBP R8..R15 RIP RFLAGS."""
        _call(self.fd, _GET_REGS, self._regs, "its registers")
        return REGS.unpack(self._regs)

    def set_regs(self, values: tuple[int, ...]) -> None:
        """Write what `get_regs` gives."""
        REGS.pack_into(self._regs, 0, *values)
        _call(self.fd, _SET_REGS, self._regs, "these registers")

    def get_sregs(self) -> bytes:
        """Segments, tables and control registers, as `SREGS`."""
        _call(self.fd, _GET_SREGS, self._sregs, "its system registers")
        return self._sregs.raw

    def set_sregs(self, data: bytes) -> None:
        """Write what `get_sregs` gives."""
        self._sregs.raw = data
        _call(self.fd, _SET_SREGS, self._sregs, "these system registers")

    def get_fpu(self) -> bytes:
        """x87 and SSE registers, 512 bytes as FXSAVE stores them. (KVM_GET_FPU would leave MXCSR out.)"""
        _call(self.fd, _GET_XSAVE, self._xsave, "its FPU")
        return self._xsave.raw[:_FXSAVE_BYTES]

    def set_fpu(self, image: bytes) -> None:
        """Write what `get_fpu` gives."""
        header = (_XSAVE_X87 | _XSAVE_SSE).to_bytes(8, "little")
        self._xsave.raw = (image + header).ljust(XSAVE_BYTES, b"\0")
        _call(self.fd, _SET_XSAVE, self._xsave, "this FPU state")

    def get_events(self) -> Events:
        """What is being delivered or held back."""
        _call(self.fd, _GET_VCPU_EVENTS, self._events, "its events")
        return Events._make(EVENTS.unpack(self._events))

    def set_events(self, events: Events) -> None:
        """Write them."""
        EVENTS.pack_into(self._events, 0, *events)
        _call(self.fd, _SET_VCPU_EVENTS, self._events, "these events")

    def get_debug_registers(self) -> tuple[int, ...]:
        """DR0 to DR3, DR6, DR7."""
        _call(self.fd, _GET_DEBUGREGS, self._debugregs, "its debug registers")
        values: tuple[int, ...] = DEBUGREGS.unpack(self._debugregs)
        return values[:6]

    def set_debug_registers(self, values: tuple[int, ...]) -> None:
        """Write what `get_debug_registers` gives."""
        DEBUGREGS.pack_into(self._debugregs, 0, *values, 0)
        _call(self.fd, _SET_DEBUGREGS, self._debugregs, "these debug registers")

    def get_msrs(self, numbers: tuple[int, ...]) -> tuple[int, ...]:
        """The values of model-specific registers."""
        data = _MSRS_HEADER.pack(len(numbers), 0) + b"".join(_MSR_ENTRY.pack(number, 0, 0) for number in numbers)
        buffer = ctypes.create_string_buffer(data, len(data))
        if _call(self.fd, _GET_MSRS, buffer, "its MSRs") != len(numbers):
            raise KvmError(f"KVM does not know all of the MSRs {', '.join(map(hex, numbers))}")
        raw = buffer.raw[_MSRS_HEADER.size :]
        return tuple(value for _, _, value in _MSR_ENTRY.iter_unpack(raw))

    def set_msrs(self, values: dict[int, int]) -> None:
        """Write model-specific registers."""
        data = _MSRS_HEADER.pack(len(values), 0)
        data += b"".join(_MSR_ENTRY.pack(number, 0, value) for number, value in values.items())
        if _call(self.fd, _SET_MSRS, ctypes.create_string_buffer(data, len(data)), "these MSRs") != len(values):
            raise KvmError(f"KVM does not take all of the MSRs {', '.join(map(hex, values))}")

    def shift_tsc(self, by: int) -> bool:
        """Add to the time-stamp counter, modulo 2**64; False where the kernel is too old to do that (before 5.16).

        Writes of the MSR will not do: KVM takes one that comes close to what is expected for an attempt to synchronize
        several CPUs, and keeps the offset that it has.
        """
        value = ctypes.create_string_buffer(_QUAD.size)
        attribute = _DEVICE_ATTR.pack(0, _TSC_CONTROL_GROUP, _TSC_OFFSET_ATTRIBUTE, ctypes.addressof(value))
        argument = ctypes.create_string_buffer(attribute, len(attribute))
        if _ioctl(self.fd, _GET_DEVICE_ATTR, argument) < 0:
            return False
        value.raw = _QUAD.pack(_QUAD.unpack(value)[0] + by & _MASK64)
        return bool(_ioctl(self.fd, _SET_DEVICE_ATTR, argument) >= 0)

    def set_cpuid(self, leaves: dict[int, tuple[int, int, int, int]]) -> None:
        """What CPUID answers: EAX, EBX, ECX, EDX by leaf."""
        data = _CPUID_HEADER.pack(len(leaves), 0)
        data += b"".join(_CPUID_ENTRY.pack(leaf, 0, 0, *values) for leaf, values in leaves.items())
        _call(self.fd, _SET_CPUID2, ctypes.create_string_buffer(data, len(data)), "this CPUID")

    def set_debug(self, control: int, breakpoints: tuple[int, int, int, int] = (0, 0, 0, 0), dr7: int = 0) -> None:
        """The host's own use of single steps and debug registers: `DEBUG_*`; 0 gives them back to the guest."""
        data = GUEST_DEBUG.pack(control, 0, *breakpoints, 0, 0, 0, dr7)
        _call(self.fd, _SET_GUEST_DEBUG, ctypes.create_string_buffer(data, len(data)), "guest debugging")
