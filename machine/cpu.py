"""One CPU: its state, the memory and port accesses it can make, and the small operations that instructions share.

It knows how single parts of an instruction behave; the order of instructions, time and stops are the engine's business.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

from machine.alu import Alu
from machine.clock import Clock
from machine.cpuid import P6_NO_FPU
from machine.fpu import FpuErrorLines, FpuPort, NoFpu
from machine.lines import CpuLines
from machine.memory import PhysicalMemory
from machine.mmu import Mmu
from machine.ports import PortBus
from machine.state import ESP, MASK32, SEG_DB, SS, CpuState

# Told of a task switch before anything of it is done, once the descriptor of the new TSS is found good: its selector,
# whether it is by IRET, whether by JMP, the error code that will be pushed, and the EFLAGS that will be saved. It may
# raise GuestFault instead of returning.
TaskSwitchObserver = Callable[[int, bool, bool, int | None, int], None]

# Arithmetic, or what makes it when it is needed first: to measure a host's takes milliseconds.
AluSource = Alu | Callable[[], Alu]


class Cpu:
    """What the semantics of an instruction get to work with.

    Attributes:
        state: the registers.
        mmu: memory accesses by segment or linear address.
        memory: physical memory.
        ports: the I/O address space.
        lines: INTR, NMI, reset.
        clock: icount and TSC.
        model: what CPUID says, and which instructions there are. A model with an FPU needs `fpu`; both are set
            before the first instruction is decoded.
        fpu: computes floating point for the model that has it.
        fpu_error: FERR# and IGNNE#.
        single_iterations: a string instruction with REP returns after one iteration (TF, or a debugger's step).
        last_iteration: it returns after this one, which has touched what a debugger or DR7 watches, or changed the
            instruction itself or what is mapped there.
        repeating: EIP is at a string instruction with REP that has iterations left: interrupts wait for its end, so
            that the icount alone says where they came.
        before_task_switch: see `TaskSwitchObserver`.
        pending_debug: DR6 bits of a debug trap to be taken at the next boundary (T bit of a TSS; held off by MOV SS).
    """

    def __init__(self, memory: PhysicalMemory, ports: PortBus, lines: CpuLines, clock: Clock, alu: AluSource) -> None:
        self.state = CpuState()
        self._stack = self.state.segments[SS]
        self.memory = memory
        self.mmu = Mmu(self.state, memory)
        self.ports = ports
        self.lines = lines
        self.clock = clock
        self._alu_source = alu
        self.model = P6_NO_FPU
        self.fpu: FpuPort = NoFpu()
        self.fpu_error = FpuErrorLines()
        self.single_iterations = False
        self.last_iteration = False
        self.pending_debug = 0
        self.repeating = False
        self.before_task_switch: TaskSwitchObserver | None = None

    @cached_property
    def alu(self) -> Alu:
        """Arithmetic, with the undefined flags of the model that was chosen."""
        source = self._alu_source
        return source if isinstance(source, Alu) else source()

    def reset(self) -> None:
        """RESET: registers to their power-up values, every cached translation gone."""
        self.state.reset()
        self.fpu_error.reset()
        self.pending_debug = 0
        self.repeating = False
        self.mmu.set_user(False)
        self.mmu.flush()

    def set_cpl(self, level: int) -> None:
        """Change the privilege level, and with it the rights of every access from now on."""
        self.state.cpl = level
        self.mmu.set_user(level == 3)

    @property
    def tsc(self) -> int:
        """The time-stamp counter: virtual nanoseconds, plus what WRMSR added, modulo 2**64."""
        return (self.clock.now_ns + self.state.tsc_offset) & 0xFFFF_FFFF_FFFF_FFFF

    @property
    def stack_mask(self) -> int:
        """The bits of ESP that address the stack: 32, or 16 if SS.B is clear."""
        return MASK32 if self.state.segments[SS].attributes & SEG_DB else 0xFFFF

    def set_esp(self, value: int) -> None:
        """Write ESP, or SP only if the stack is a 16-bit one."""
        gpr = self.state.gpr
        if self.state.segments[SS].attributes & SEG_DB:
            gpr[ESP] = value & MASK32
        else:
            gpr[ESP] = gpr[ESP] & 0xFFFF_0000 | value & 0xFFFF

    def push(self, value: int, size_bytes: int) -> None:
        """Push 2 or 4 bytes; ESP changes only if the write does not fault."""
        gpr, stack = self.state.gpr, self._stack
        if stack.attributes & SEG_DB:
            offset = (gpr[ESP] - size_bytes) & MASK32
            if size_bytes == 4:
                self.mmu.store32(stack, offset, value)
            else:
                self.mmu.store16(stack, offset, value)
            gpr[ESP] = offset
        else:
            offset = (gpr[ESP] - size_bytes) & 0xFFFF
            (self.mmu.store32 if size_bytes == 4 else self.mmu.store16)(stack, offset, value)
            gpr[ESP] = gpr[ESP] & 0xFFFF_0000 | offset

    def pop(self, size_bytes: int) -> int:
        """Pop 2 or 4 bytes."""
        gpr, stack = self.state.gpr, self._stack
        if stack.attributes & SEG_DB:
            offset = gpr[ESP]
            value = self.mmu.load32(stack, offset) if size_bytes == 4 else self.mmu.load16(stack, offset)
            gpr[ESP] = (offset + size_bytes) & MASK32
        else:
            offset = gpr[ESP] & 0xFFFF
            value = self.mmu.load32(stack, offset) if size_bytes == 4 else self.mmu.load16(stack, offset)
            gpr[ESP] = gpr[ESP] & 0xFFFF_0000 | (offset + size_bytes) & 0xFFFF
        return value
