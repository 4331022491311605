"""Interception: which instructions leave guest mode before they are executed, and what EXITINFO1 and 2 say of them.

It owns the checks that stand in front of decoded instructions. It must not know who runs the guest, nor what a VMM does
then. Exceptions that the manual puts before the intercept are raised by the check; all others come later, from the
instruction itself, if the VMM has it executed.

Source: AMD64 APM Vol. 2, "Instruction Intercepts", "IOIO Intercepts", "MSR Intercepts", "Decode Assists".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from iced_x86 import Instruction, Register

from machine import control
from machine.cpu import Cpu
from machine.faults import GuestFault, general_protection
from machine.flags import VM
from machine.instructions import Effect, Operation, lookup
from machine.instructions.operands import (
    address,
    address_mask,
    gpr_number,
    is_memory,
    read,
    read_word,
    segment_number,
    size_bytes,
)
from machine.state import CR0_CD, CR0_MP, CR0_NW, CR0_PE, CR0_PG, CR0_TS, CR4_TSD, ECX, EDX, MASK32, SegmentRegister
from vmm.blocks import BlockCache
from vmm.trap.exitcodes import ExitCode
from vmm.trap.exitinfo import IoInfo, RegisterAccessInfo
from vmm.trap.intercepts import CR_WRITE_SHIFT, Intercept3, Intercept4
from vmm.trap.permissions import IoPermissions, MsrPermissions

_SELECTIVE = CR0_TS | CR0_MP
_STRING_PORTS = {"insb": 1, "insw": 2, "insd": 4, "outsb": 1, "outsw": 2, "outsd": 4}

Check = Callable[[], None]


class Intercepted(GuestFault):
    """The guest is to be left before this instruction, which has changed nothing: as a fault would be raised.

    Attributes:
        code: EXITCODE.
        info1, info2: EXITINFO1 and EXITINFO2; of IOIO the second one follows from where the instruction is.
        length: of the instruction in bytes, 0 if the exit is not about one.
    """

    __slots__ = ("code", "info1", "info2", "length")

    def __init__(self, code: int, info1: int = 0, info2: int = 0, length: int = 0) -> None:
        super().__init__(0)
        self.code = code
        self.info1 = info1
        self.info2 = info2
        self.length = length

    def __str__(self) -> str:
        return f"exit {self.code:#x}"


@dataclass(slots=True)
class Policy:
    """The intercepts of a VMCB, as the checks read them.

    Attributes:
        active: the guest is in guest mode: nothing is intercepted from what the VMM executes for it.
        cr, dr, exceptions, three, four: the vectors of the control area.
        io, msr: the permission maps.
    """

    active: bool = False
    cr: int = 0
    dr: int = 0
    exceptions: int = 0
    three: int = 0
    four: int = 0
    io: IoPermissions = field(default_factory=IoPermissions)
    msr: MsrPermissions = field(default_factory=MsrPermissions)

    def take(self, vectors: tuple[int, ...]) -> None:
        """Read the vectors in the order of the control area."""
        self.cr, self.dr, self.exceptions, self.three, self.four = vectors

    def rows(self) -> frozenset[str]:
        """The rows of the instruction table that may be intercepted."""
        names = {name for name, (bit, _, _) in _SIMPLE.items() if self.three & bit}
        names |= {name for name, (bit, _, _) in _TABLES.items() if self.three & bit}
        if self.three & Intercept3.IOIO_PROT:
            names |= {"in", "out", *_STRING_PORTS}
        if self.three & Intercept3.MSR_PROT:
            names |= {"rdmsr", "wrmsr"}
        if self.four & Intercept4.WBINVD:
            names.add("wbinvd")
        if self.four & Intercept4.ICEBP:
            names.add("int1")
        if self.cr & (1 << CR_WRITE_SHIFT) - 1:
            names |= {"mov_from_cr", "smsw"}
        if self.cr >> CR_WRITE_SHIFT or self.three & Intercept3.CR0_SEL_WRITE:
            names |= {"mov_to_cr", "lmsw", "clts"}
        if self.dr:
            names |= {"mov_from_dr", "mov_to_dr"}
        return frozenset(names)


class InterceptingCache(BlockCache):
    """Decoded blocks in which instructions that may be intercepted are checked first."""

    def __init__(self, cpu: Cpu, policy: Policy) -> None:
        super().__init__(cpu)
        self._policy = policy

    def _build(self, instruction: Instruction) -> tuple[Operation, Effect]:
        operation, effect = super()._build(instruction)
        row = lookup(instruction.code, self.cpu.model.instructions)
        check = None if row is None else check_of(row.mnemonic, self.cpu, self._policy, instruction)
        if check is None:
            return operation, effect
        policy = self._policy

        def checked() -> None:
            if policy.active:
                check()
            operation()

        return checked, effect


def check_of(row: str, cpu: Cpu, policy: Policy, instruction: Instruction) -> Check | None:
    """What raises `Intercepted` if the policy says so; None for an instruction that is never intercepted."""
    if row in _SIMPLE:
        return _check_simple(row, cpu, policy, instruction)
    if row in _TABLES:
        return _check_table(row, cpu, policy, instruction)
    if row in _STRING_PORTS:
        return _check_string_port(row, cpu, policy, instruction)
    builder = _BUILDERS.get(row)
    return None if builder is None else builder(cpu, policy, instruction)


# Bit of the third vector, exit code, whether CPL is asked first.
_SIMPLE: dict[str, tuple[int, ExitCode, bool]] = {
    "cpuid": (Intercept3.CPUID, ExitCode.CPUID, False),
    "hlt": (Intercept3.HLT, ExitCode.HLT, True),
    "invd": (Intercept3.INVD, ExitCode.INVD, True),
    "pause": (Intercept3.PAUSE, ExitCode.PAUSE, False),
    "rdtsc": (Intercept3.RDTSC, ExitCode.RDTSC, False),
    "invlpg": (Intercept3.INVLPG, ExitCode.INVLPG, True),
    "int": (Intercept3.SWINT, ExitCode.SWINT, False),
    **dict.fromkeys(("pushf", "pushfd"), (Intercept3.PUSHF, ExitCode.PUSHF, False)),
    **dict.fromkeys(("popf", "popfd"), (Intercept3.POPF, ExitCode.POPF, False)),
    **dict.fromkeys(("iret", "iretd"), (Intercept3.IRET, ExitCode.IRET, False)),
}
# Of descriptor tables: bit, exit code, whether the instruction writes the register, which CPL 0 alone may.
_TABLES: dict[str, tuple[int, ExitCode, bool]] = {
    "sidt": (Intercept3.IDTR_READ, ExitCode.IDTR_READ, False),
    "sgdt": (Intercept3.GDTR_READ, ExitCode.GDTR_READ, False),
    "sldt": (Intercept3.LDTR_READ, ExitCode.LDTR_READ, False),
    "str": (Intercept3.TR_READ, ExitCode.TR_READ, False),
    "lidt": (Intercept3.IDTR_WRITE, ExitCode.IDTR_WRITE, True),
    "lgdt": (Intercept3.GDTR_WRITE, ExitCode.GDTR_WRITE, True),
    "lldt": (Intercept3.LDTR_WRITE, ExitCode.LDTR_WRITE, True),
    "ltr": (Intercept3.TR_WRITE, ExitCode.TR_WRITE, True),
}
_PROTECTED_MODE_ONLY = frozenset({"sldt", "str", "lldt", "ltr"})


def _check_simple(row: str, cpu: Cpu, policy: Policy, instruction: Instruction) -> Check:
    bit, code, privileged = _SIMPLE[row]
    state, length = cpu.state, instruction.len
    vector = instruction.immediate8 if row == "int" else 0
    segment, offset = address(cpu, instruction) if row == "invlpg" else (state.segments[0], int)

    def check() -> None:
        if not policy.three & bit:
            return
        if privileged:
            control.check_privilege(cpu)
        if row == "rdtsc" and state.cr4 & CR4_TSD and state.cpl and state.cr0 & CR0_PE:
            raise general_protection()
        info = segment.base + offset() & MASK32 if row == "invlpg" else vector
        raise Intercepted(code, info, 0, length)

    return check


def _check_table(row: str, cpu: Cpu, policy: Policy, instruction: Instruction) -> Check:
    bit, code, privileged = _TABLES[row]
    state, length = cpu.state, instruction.len

    def check() -> None:
        if not policy.three & bit:
            return
        if row in _PROTECTED_MODE_ONLY and (not state.cr0 & CR0_PE or state.eflags & VM):
            return  # the instruction raises #UD
        if privileged:
            control.check_privilege(cpu)
        raise Intercepted(code, 0, 0, length)

    return check


def _check_wbinvd(cpu: Cpu, policy: Policy, instruction: Instruction) -> Check:
    def check() -> None:
        if policy.four & Intercept4.WBINVD:
            control.check_privilege(cpu)
            raise Intercepted(ExitCode.WBINVD, 0, 0, instruction.len)

    return check


def _check_int1(_cpu: Cpu, policy: Policy, instruction: Instruction) -> Check:
    def check() -> None:
        if policy.four & Intercept4.ICEBP:
            raise Intercepted(ExitCode.ICEBP, 0, 0, instruction.len)

    return check


def _check_port(cpu: Cpu, policy: Policy, instruction: Instruction, *, is_in: bool) -> Check:
    size = size_bytes(instruction, 0 if is_in else 1)
    port, length = read(cpu, instruction, 1 if is_in else 0), instruction.len

    def check() -> None:
        if policy.three & Intercept3.IOIO_PROT:
            control.check_io(cpu, port(), size)
            if policy.io.intercepts(port(), size):
                raise Intercepted(ExitCode.IOIO, IoInfo(port(), size, is_in).encode()[0], 0, length)

    return check


def _check_in(cpu: Cpu, policy: Policy, instruction: Instruction) -> Check:
    return _check_port(cpu, policy, instruction, is_in=True)


def _check_out(cpu: Cpu, policy: Policy, instruction: Instruction) -> Check:
    return _check_port(cpu, policy, instruction, is_in=False)


def _check_string_port(row: str, cpu: Cpu, policy: Policy, instruction: Instruction) -> Check:
    size, is_in, mask = _STRING_PORTS[row], row.startswith("ins"), address_mask(instruction)
    gpr, length, rep = cpu.state.gpr, instruction.len, instruction.has_rep_prefix or instruction.has_repne_prefix
    segment = segment_number(Register.ES if is_in else instruction.memory_segment)
    info = IoInfo(0, size, is_in, True, rep, 32 if mask == MASK32 else 16, SegmentRegister(segment))

    def check() -> None:
        if not policy.three & Intercept3.IOIO_PROT or (rep and not gpr[ECX] & mask):
            return
        port = gpr[EDX] & 0xFFFF
        control.check_io(cpu, port, size)
        if policy.io.intercepts(port, size):
            raise Intercepted(ExitCode.IOIO, info.encode()[0] | port << 16, 0, length)

    return check


def _check_msr(cpu: Cpu, policy: Policy, instruction: Instruction, *, write: bool) -> Check:
    gpr, length = cpu.state.gpr, instruction.len

    def check() -> None:
        if policy.three & Intercept3.MSR_PROT:
            control.check_privilege(cpu)
            if policy.msr.intercepts(gpr[ECX], write=write):
                raise Intercepted(ExitCode.MSR, int(write), 0, length)

    return check


def _check_rdmsr(cpu: Cpu, policy: Policy, instruction: Instruction) -> Check:
    return _check_msr(cpu, policy, instruction, write=False)


def _check_wrmsr(cpu: Cpu, policy: Policy, instruction: Instruction) -> Check:
    return _check_msr(cpu, policy, instruction, write=True)


def _check_mov_from_cr(cpu: Cpu, policy: Policy, instruction: Instruction) -> Check:
    number = instruction.op1_register - Register.CR0
    info, length = RegisterAccessInfo(gpr_number(instruction.op0_register)).encode()[0], instruction.len

    def check() -> None:
        if policy.cr >> number & 1:
            control.check_privilege(cpu)
            control.read_cr(cpu, number)  # #UD if there is none
            raise Intercepted(ExitCode.CR0_READ + number, info, 0, length)

    return check


def _check_smsw(_cpu: Cpu, policy: Policy, instruction: Instruction) -> Check:
    def check() -> None:
        if policy.cr & 1:
            raise Intercepted(ExitCode.CR0_READ, 0, 0, instruction.len)

    return check


def _check_mov_to_cr(cpu: Cpu, policy: Policy, instruction: Instruction) -> Check:
    number, source = instruction.op0_register - Register.CR0, read(cpu, instruction, 1)
    info, length = RegisterAccessInfo(gpr_number(instruction.op1_register)).encode()[0], instruction.len

    def check() -> None:
        control.check_privilege(cpu)
        value = source()
        if number == 0 and ((value & CR0_PG and not value & CR0_PE) or (value & CR0_NW and not value & CR0_CD)):
            return  # the instruction raises #GP
        if number == 4 and value & ~cpu.model.cr4_mask:
            return
        if number in (0, 2, 3, 4):
            _check_cr_write(cpu, policy, number, value, info, length)

    return check


def _check_cr_write(cpu: Cpu, policy: Policy, number: int, value: int, info: int, length: int) -> None:
    if policy.cr >> (CR_WRITE_SHIFT + number) & 1:
        raise Intercepted(ExitCode.CR0_WRITE + number, info, 0, length)
    changed = (cpu.state.cr0 ^ value) & control.CR0_WRITABLE & ~_SELECTIVE
    if number == 0 and policy.three & Intercept3.CR0_SEL_WRITE and changed:
        raise Intercepted(ExitCode.CR0_SEL_WRITE, info, 0, length)


def _check_lmsw(cpu: Cpu, policy: Policy, instruction: Instruction) -> Check:
    source, is_in_memory = read_word(cpu, instruction, 0), is_memory(instruction, 0)

    def check() -> None:
        control.check_privilege(cpu)
        if policy.cr >> CR_WRITE_SHIFT & 1:  # before memory is read
            raise Intercepted(ExitCode.CR0_WRITE, 0, 0, instruction.len)
        if policy.three & Intercept3.CR0_SEL_WRITE and not is_in_memory:
            cr0 = cpu.state.cr0
            _check_cr_write(cpu, policy, 0, cr0 & ~0xF | source() & 0xF | cr0 & CR0_PE, 0, instruction.len)
        elif policy.three & Intercept3.CR0_SEL_WRITE:
            raise Intercepted(ExitCode.CR0_SEL_WRITE, 0, 0, instruction.len)

    return check


def _check_clts(cpu: Cpu, policy: Policy, instruction: Instruction) -> Check:
    def check() -> None:
        if policy.cr >> CR_WRITE_SHIFT & 1:
            control.check_privilege(cpu)
            raise Intercepted(ExitCode.CR0_WRITE, 0, 0, instruction.len)

    return check


def _check_dr(cpu: Cpu, policy: Policy, instruction: Instruction, *, write: bool) -> Check:
    n = 0 if write else 1
    number = instruction.op_register(n) - Register.DR0
    info = RegisterAccessInfo(gpr_number(instruction.op_register(1 - n)), control=False).encode()[0]
    bit = 1 << number + (CR_WRITE_SHIFT if write else 0)
    code = (ExitCode.DR0_WRITE if write else ExitCode.DR0_READ) + number

    def check() -> None:
        if policy.dr & bit:
            control.read_dr(cpu, number)  # #UD, #GP, #DB
            raise Intercepted(code, info, 0, instruction.len)

    return check


def _check_mov_from_dr(cpu: Cpu, policy: Policy, instruction: Instruction) -> Check:
    return _check_dr(cpu, policy, instruction, write=False)


def _check_mov_to_dr(cpu: Cpu, policy: Policy, instruction: Instruction) -> Check:
    return _check_dr(cpu, policy, instruction, write=True)


_BUILDERS: dict[str, Callable[[Cpu, Policy, Instruction], Check]] = {
    "wbinvd": _check_wbinvd,
    "int1": _check_int1,
    "in": _check_in,
    "out": _check_out,
    "rdmsr": _check_rdmsr,
    "wrmsr": _check_wrmsr,
    "mov_from_cr": _check_mov_from_cr,
    "mov_to_cr": _check_mov_to_cr,
    "smsw": _check_smsw,
    "lmsw": _check_lmsw,
    "clts": _check_clts,
    "mov_from_dr": _check_mov_from_dr,
    "mov_to_dr": _check_mov_to_dr,
}
