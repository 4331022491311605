"""Interception: which instructions leave guest mode before they are executed, and what EXITINFO1 and 2 say of them.

It owns the checks that stand in front of decoded instructions. It must not know who runs the guest, nor what a VMM does
then. Exceptions that the manual puts before the intercept are raised by the check; all others come later, from the
instruction itself, if the VMM has it executed.

Source: AMD64 APM Vol. 2, "Instruction Intercepts", "IOIO Intercepts", "MSR Intercepts", "Decode Assists".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from iced_x86 import CodeSize, Instruction, Mnemonic, Register

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
    segment_number,
    size_bytes,
)
from machine.state import CR0_MP, CR0_PE, CR0_TS, CR4_TSD, ECX, EDX, MASK32, SS, SegmentRegister
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
        """The rows of the instruction table that may be intercepted, as `TranslationCache.withheld` has them."""
        names = {name for name, simple in _SIMPLE.items() if self.three & simple.bit}
        if self.three & Intercept3.IOIO_PROT:
            names |= {"in", "out", *_STRING_PORTS}
        if self.three & Intercept3.MSR_PROT:
            names |= {"rdmsr", "wrmsr"}
        if self.four & Intercept4.WBINVD:
            names.add("wbinvd")
        if self.four & Intercept4.ICEBP:
            names.add("int1")
        writes = self.cr >> CR_WRITE_SHIFT | bool(self.three & Intercept3.CR0_SEL_WRITE)
        names |= {f"mov_from_cr{number}" for number in range(CR_WRITE_SHIFT) if self.cr >> number & 1}
        names |= {f"mov_to_cr{number}" for number in range(CR_WRITE_SHIFT) if writes >> number & 1}
        if self.cr & 1:
            names.add("smsw")
        if writes & 1:
            names |= {"lmsw", "clts"}
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
        if row is None:
            check = _check_without_row(self.cpu, self._policy, instruction)
        else:
            check = check_of(row.mnemonic, self.cpu, self._policy, instruction)
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
    if row in _STRING_PORTS:
        return _check_string_port(row, cpu, policy, instruction)
    builder = _BUILDERS.get(row)
    return None if builder is None else builder(cpu, policy, instruction)


@dataclass(frozen=True, slots=True)
class _Simple:
    """A row whose exit tells no more than that it comes.

    Attributes:
        bit: of the third vector.
        code: EXITCODE.
        privileged: for CPL 0 alone, which is asked first.
        operand_bytes: of its operand in memory, whose limits are asked first.
        writes: the operand is written to.
        protected_only: #UD in real and virtual-8086 mode, which is asked first.
    """

    bit: int
    code: ExitCode
    privileged: bool = False
    operand_bytes: int = 0
    writes: bool = False
    protected_only: bool = False


_SIMPLE: dict[str, _Simple] = {
    "cpuid": _Simple(Intercept3.CPUID, ExitCode.CPUID),
    "hlt": _Simple(Intercept3.HLT, ExitCode.HLT, privileged=True),
    "invd": _Simple(Intercept3.INVD, ExitCode.INVD, privileged=True),
    "pause": _Simple(Intercept3.PAUSE, ExitCode.PAUSE),
    "rdtsc": _Simple(Intercept3.RDTSC, ExitCode.RDTSC),
    "invlpg": _Simple(Intercept3.INVLPG, ExitCode.INVLPG, privileged=True),
    "int": _Simple(Intercept3.SWINT, ExitCode.SWINT),
    **dict.fromkeys(("pushf", "pushfd"), _Simple(Intercept3.PUSHF, ExitCode.PUSHF)),
    **dict.fromkeys(("popf", "popfd"), _Simple(Intercept3.POPF, ExitCode.POPF)),
    **dict.fromkeys(("iret", "iretd"), _Simple(Intercept3.IRET, ExitCode.IRET)),
    "sidt": _Simple(Intercept3.IDTR_READ, ExitCode.IDTR_READ, operand_bytes=6, writes=True),
    "sgdt": _Simple(Intercept3.GDTR_READ, ExitCode.GDTR_READ, operand_bytes=6, writes=True),
    "lidt": _Simple(Intercept3.IDTR_WRITE, ExitCode.IDTR_WRITE, privileged=True, operand_bytes=6),
    "lgdt": _Simple(Intercept3.GDTR_WRITE, ExitCode.GDTR_WRITE, privileged=True, operand_bytes=6),
    "sldt": _Simple(Intercept3.LDTR_READ, ExitCode.LDTR_READ, operand_bytes=2, writes=True, protected_only=True),
    "str": _Simple(Intercept3.TR_READ, ExitCode.TR_READ, operand_bytes=2, writes=True, protected_only=True),
    "lldt": _Simple(Intercept3.LDTR_WRITE, ExitCode.LDTR_WRITE, privileged=True, operand_bytes=2, protected_only=True),
    "ltr": _Simple(Intercept3.TR_WRITE, ExitCode.TR_WRITE, privileged=True, operand_bytes=2, protected_only=True),
}


def _check_simple(row: str, cpu: Cpu, policy: Policy, instruction: Instruction) -> Check:
    simple = _SIMPLE[row]
    state, mmu, length = cpu.state, cpu.mmu, instruction.len
    vector = instruction.immediate8 if row == "int" else 0
    has_operand = simple.operand_bytes and is_memory(instruction, 0)
    segment, offset = address(cpu, instruction) if row == "invlpg" or has_operand else (state.segments[0], int)

    def check() -> None:
        if not policy.three & simple.bit:
            return
        if simple.protected_only and (not state.cr0 & CR0_PE or state.eflags & VM):
            return  # the instruction raises #UD
        if simple.privileged:
            control.check_privilege(cpu)
        if row == "rdtsc" and state.cr4 & CR4_TSD and state.cpl and state.cr0 & CR0_PE:
            raise general_protection()
        if has_operand and segment is not state.segments[SS]:
            mmu.check_segment(segment, offset(), simple.operand_bytes, write=simple.writes)
        info = segment.base + offset() & MASK32 if row == "invlpg" else vector
        raise Intercepted(simple.code, info, 0, length)

    return check


@dataclass(frozen=True, slots=True)
class _NoRow:
    """An instruction that the guest's CPU lacks, but the hardware has: SVM's own, and RSM outside SMM.

    Attributes:
        vector: name of the intercept vector in the policy.
        bit, code: as of `_Simple`.
        before_exceptions: the intercept comes before the mode and CPL are asked; where those forbid one of the others,
            #UD as of any CPU of the guest's model is what it gets.
    """

    vector: str
    bit: int
    code: ExitCode
    before_exceptions: bool = False


_WITHOUT_ROW: dict[int, _NoRow] = {
    Mnemonic.RSM: _NoRow("three", Intercept3.RSM, ExitCode.RSM, before_exceptions=True),
    Mnemonic.INVLPGA: _NoRow("three", Intercept3.INVLPGA, ExitCode.INVLPGA),
    Mnemonic.VMRUN: _NoRow("four", Intercept4.VMRUN, ExitCode.VMRUN),
    Mnemonic.VMMCALL: _NoRow("four", Intercept4.VMMCALL, ExitCode.VMMCALL, before_exceptions=True),
    Mnemonic.VMLOAD: _NoRow("four", Intercept4.VMLOAD, ExitCode.VMLOAD),
    Mnemonic.VMSAVE: _NoRow("four", Intercept4.VMSAVE, ExitCode.VMSAVE),
    Mnemonic.STGI: _NoRow("four", Intercept4.STGI, ExitCode.STGI),
    Mnemonic.CLGI: _NoRow("four", Intercept4.CLGI, ExitCode.CLGI),
    Mnemonic.SKINIT: _NoRow("four", Intercept4.SKINIT, ExitCode.SKINIT),
}


def _check_without_row(cpu: Cpu, policy: Policy, instruction: Instruction) -> Check | None:
    rule = _WITHOUT_ROW.get(instruction.mnemonic)
    if rule is None:
        return None
    state, length = cpu.state, instruction.len

    def check() -> None:
        if not (policy.three if rule.vector == "three" else policy.four) & rule.bit:
            return
        if not rule.before_exceptions and (state.cpl or not state.cr0 & CR0_PE):
            return  # the instruction raises #UD
        raise Intercepted(rule.code, 0, 0, length)

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
    address_bits = 16 if instruction.code_size == CodeSize.CODE16 else 32

    def check() -> None:
        if policy.three & Intercept3.IOIO_PROT:
            control.check_io(cpu, port(), size)
            if policy.io.intercepts(port(), size):
                raise Intercepted(
                    ExitCode.IOIO, IoInfo(port(), size, is_in, address_bits=address_bits).encode()[0], 0, length
                )

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
        if number == 0:
            control.check_cr0(value)
        elif number == 4:
            control.check_cr4(cpu, value)
        elif number not in (2, 3):
            return  # the instruction raises #UD
        if policy.cr >> (CR_WRITE_SHIFT + number) & 1:
            raise Intercepted(ExitCode.CR0_WRITE + number, info, 0, length)
        changed = (cpu.state.cr0 ^ value) & control.CR0_WRITABLE & ~_SELECTIVE
        if number == 0 and policy.three & Intercept3.CR0_SEL_WRITE and changed:
            raise Intercepted(ExitCode.CR0_SEL_WRITE, info, 0, length)

    return check


def _check_lmsw(cpu: Cpu, policy: Policy, instruction: Instruction) -> Check:
    def check() -> None:  # whatever the value is, so that memory is not read
        control.check_privilege(cpu)
        if policy.cr >> CR_WRITE_SHIFT & 1:
            raise Intercepted(ExitCode.CR0_WRITE, 0, 0, instruction.len)
        if policy.three & Intercept3.CR0_SEL_WRITE:
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
