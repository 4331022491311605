"""What the /dev/kvm of this host can do, found out by running a few instructions on it.

KVM may be software inside a virtual machine of its own, without what a 32-bit guest or a debugger needs; its list of
extensions does not tell.
"""

from __future__ import annotations

import ctypes
import mmap
import time
from dataclasses import dataclass
from functools import cache

from machine.cpuid import FEATURE_CMOV, FEATURE_PSE, FEATURE_TSC
from machine.flags import VM
from machine.segmentation import V86_ATTRIBUTES
from machine.state import (
    CR0_ET,
    CR0_PE,
    CR0_PG,
    CS,
    ECX,
    MASK32,
    SEG_ACCESSED,
    SEG_CODE,
    SEG_DB,
    SEG_G,
    SEG_PRESENT,
    SEG_READ_WRITE,
    SEG_S,
    CpuState,
)
from vmm.trap.kvm import DEBUG_ENABLE, DEBUG_HARDWARE_BREAKPOINTS, ExitReason, KvmError, Vm
from vmm.trap.kvmstate import store_state, write_tsc

_MEMORY_BYTES = 0x1_0000
_CODE, _DIRECTORY, _TABLE, _DATA = 0x1000, 0x2000, 0x3000, 0x4000
_LOOPS = 10_000
_USUAL_ATTRIBUTES = SEG_PRESENT | SEG_S | SEG_READ_WRITE | SEG_ACCESSED | SEG_DB | SEG_G

_LOOP = b"\x49\x75\xfd\xf4"  # 1: dec ecx; jnz 1b; hlt
_STORE = b"\xa3" + _DATA.to_bytes(4, "little") + b"\xf4"  # mov [data], eax; hlt
_FLOAT = b"\xdb\xe3\xd9\xe8\xf4"  # fninit; fld1; hlt
_RFLAGS = 17
_CPUID = b"\xb8\x01\x00\x00\x00\x0f\xa2\x89\x15" + _DATA.to_bytes(4, "little") + b"\xf4"  # mov [data], edx of leaf 1
_FEATURES = (FEATURE_PSE | FEATURE_TSC | FEATURE_CMOV).to_bytes(4, "little")
_RDTSC = b"\x0f\x31\x89\x15" + _DATA.to_bytes(4, "little") + b"\xf4"  # rdtsc; mov [data], edx
_TSC = (1 << 60).to_bytes(8, "little")
_NOP = b"\x90\xf4"


@dataclass(frozen=True, slots=True)
class KvmFacts:
    """What was found.

    Attributes:
        paging: 32-bit code runs with paging on.
        virtual_8086: EFLAGS.VM can be set.
        code_breakpoints, data_breakpoints: the host's use of DR0 to DR3 stops the guest.
        fpu: x87 instructions run.
        cpuid: CPUID answers what it was told to; else the host's features show through.
        tsc: RDTSC counts from where it was told to; else it is the host's.
        insns_per_s: how fast a loop of two instructions runs, its start included.
    """

    paging: bool
    virtual_8086: bool
    code_breakpoints: bool
    data_breakpoints: bool
    fpu: bool
    cpuid: bool
    tsc: bool
    insns_per_s: float

    def describe(self) -> str:
        """What it lacks, and its speed, in one line."""
        lacking = [
            name
            for name, there in (
                ("32-bit paging", self.paging),
                ("virtual-8086 mode", self.virtual_8086),
                ("code breakpoints", self.code_breakpoints),
                ("data breakpoints", self.data_breakpoints),
                ("x87", self.fpu),
                ("a CPUID of our choice", self.cpuid),
                ("a TSC of our choice", self.tsc),
            )
            if not there
        ]
        speed = f"{self.insns_per_s / 1e6:.3g} million instructions a second in a short loop"
        return f"lacks {', '.join(lacking)}; {speed}" if lacking else f"complete; {speed}"


@cache
def look() -> KvmFacts:
    """Find out, once in the life of the process; some milliseconds, or 30 where KVM is software.

    Raises:
        KvmError: there is no KVM, or it refuses.
    """
    with mmap.mmap(-1, _MEMORY_BYTES) as memory:
        paging = _run(memory, _NOP, paging=True) is ExitReason.HLT
        speed_ns = time.perf_counter_ns()
        _run(memory, _LOOP, paging=paging)
        speed_ns = time.perf_counter_ns() - speed_ns
        return KvmFacts(
            paging=paging,
            virtual_8086=_keeps_virtual_8086(),
            code_breakpoints=_run(memory, _NOP, paging=paging, dr0=_CODE + 1, dr7=2) is ExitReason.DEBUG,
            data_breakpoints=_run(memory, _STORE, paging=paging, dr0=_DATA, dr7=2 | 0xD << 16) is ExitReason.DEBUG,
            fpu=_run(memory, _FLOAT, paging=paging) is ExitReason.HLT,
            cpuid=_run(memory, _CPUID, paging=paging) is ExitReason.HLT and memory[_DATA : _DATA + 4] == _FEATURES,
            tsc=_run(memory, _RDTSC, paging=paging) is ExitReason.HLT and memory[_DATA + 2 : _DATA + 4] == _TSC[6:],
            insns_per_s=2 * _LOOPS * 1e9 / speed_ns,
        )


def _keeps_virtual_8086() -> bool:
    state = CpuState()
    state.cr0 = CR0_PE | CR0_ET
    state.eflags |= VM
    state.cpl = 3
    for segment in state.segments:
        segment.load(0, 0, 0xFFFF, V86_ATTRIBUTES)
    vm = Vm()
    try:
        store_state(vm.vcpu, state, fpu=False)
        return bool(vm.vcpu.get_regs()[_RFLAGS] & VM)
    except KvmError:
        return False
    finally:
        vm.close()


def _run(memory: mmap.mmap, code: bytes, *, paging: bool, dr0: int = 0, dr7: int = 0) -> ExitReason:
    """Why a guest of this code came out first; UNKNOWN if KVM does not even enter it."""
    memory[:] = bytes(_MEMORY_BYTES)
    memory[_CODE : _CODE + len(code)] = code
    memory[_DIRECTORY : _DIRECTORY + 4] = (_TABLE | 7).to_bytes(4, "little")
    pages = b"".join((page << 12 | 7).to_bytes(4, "little") for page in range(_MEMORY_BYTES >> 12))
    memory[_TABLE : _TABLE + len(pages)] = pages
    state = CpuState()
    state.cr0 = CR0_PE | CR0_ET | CR0_PG * paging
    state.cr3 = _DIRECTORY
    for number, segment in enumerate(state.segments):
        segment.load(8 + 8 * (number != CS), 0, MASK32, _USUAL_ATTRIBUTES | SEG_CODE * (number == CS))
    state.eip = _CODE
    state.gpr[ECX] = _LOOPS
    vm = Vm()
    try:
        vm.set_memory(0, 0, _MEMORY_BYTES, ctypes.addressof(ctypes.c_char.from_buffer(memory)))
        vm.vcpu.set_cpuid({0: (1, 0, 0, 0), 1: (0x600, 0, 0, int.from_bytes(_FEATURES, "little"))})
        store_state(vm.vcpu, state, fpu=False)
        write_tsc(vm.vcpu, int.from_bytes(_TSC, "little"))
        if dr7:
            vm.vcpu.set_debug(DEBUG_ENABLE | DEBUG_HARDWARE_BREAKPOINTS, (dr0, 0, 0, 0), dr7)
        vm.vcpu.run()
        return ExitReason(vm.vcpu.exit_reason)
    except KvmError:
        return ExitReason.UNKNOWN
    finally:
        vm.close()
