"""Control and debug registers, MSRs, EFLAGS and ports: who may touch them, and what a change of them brings with it.

It owns the rules of CPL, IOPL, VME and PVI; the operands of the instructions are not its business.

Source: SDM Vol. 2, "MOV CR", "MOV DR", "LMSW", "CLTS", "RDMSR", "WRMSR", "POPF", "PUSHF", "CLI", "STI", "IN", "OUT";
Vol. 3A, "Control Registers"; Vol. 3B, "Debug Registers" and "8086 Emulation".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from machine.descriptors import IS_32
from machine.faults import DebugFault, general_protection, invalid_opcode
from machine.flags import (
    AC,
    ALWAYS_SET,
    DEFINED_MASK,
    DF,
    ID,
    IF,
    IOPL,
    IOPL_BIT,
    NT,
    RF,
    STATUS_MASK,
    TF,
    VIF,
    VIP,
    VM,
)
from machine.paging import check_pdptes
from machine.segmentation import REAL_ATTRIBUTES
from machine.state import (
    CR0_AM,
    CR0_CD,
    CR0_EM,
    CR0_ET,
    CR0_MP,
    CR0_NE,
    CR0_NW,
    CR0_PE,
    CR0_PG,
    CR0_TS,
    CR0_WP,
    CR4_DE,
    CR4_PAE,
    CR4_PGE,
    CR4_PSE,
    CR4_PVI,
    CR4_VME,
    CS,
    DR6_BD,
    DR6_FIXED,
    DR6_WRITABLE,
    DR7_FIXED,
    DR7_GD,
    DR7_WRITABLE,
    MASK32,
    SEG_AVL,
    SEG_DB,
    SEG_G,
    SHADOW_STI,
)
from machine.tasks import IO_MAP_BASE_32, LIMIT_32

if TYPE_CHECKING:
    from machine.cpu import Cpu

CR0_WRITABLE: Final = CR0_PE | CR0_MP | CR0_EM | CR0_TS | CR0_NE | CR0_WP | CR0_AM | CR0_NW | CR0_CD | CR0_PG
_CR4_TRANSLATION: Final = CR4_PSE | CR4_PAE | CR4_PGE

_FLAGS_16: Final = STATUS_MASK | TF | IF | DF | IOPL | NT
_FLAGS_32: Final = _FLAGS_16 | AC | ID  # POPF never loads RF, VM, VIF and VIP


def check_privilege(cpu: Cpu) -> None:
    """Raise #GP(0) above CPL 0, where virtual-8086 mode is too."""
    if cpu.state.cpl:
        raise general_protection(0)


def read_cr(cpu: Cpu, number: int) -> int:
    """MOV r32, CRn at CPL 0. Raises #UD for a control register that does not exist."""
    state = cpu.state
    if number == 0:
        return state.cr0
    if number == 2:
        return state.cr2
    if number == 3:
        return state.cr3
    if number == 4:
        return state.cr4
    raise invalid_opcode()


def write_cr(cpu: Cpu, number: int, value: int) -> None:
    """MOV CRn, r32 at CPL 0.

    Raises:
        GuestFault: #UD for a control register that does not exist; #GP(0) for a combination of bits that is not
            allowed, a reserved bit of CR4, or a reserved bit in a PDPTE of PAE paging.
    """
    if number == 0:
        _write_cr0(cpu, value)
    elif number == 2:
        cpu.state.cr2 = value
    elif number == 3:
        _write_cr3(cpu, value)
    elif number == 4:
        _write_cr4(cpu, value)
    else:
        raise invalid_opcode()


def check_cr0(value: int) -> None:
    """Raise #GP(0) for a combination of bits that CR0 cannot have."""
    if (value & CR0_PG and not value & CR0_PE) or (value & CR0_NW and not value & CR0_CD):
        raise general_protection(0)


def check_cr4(cpu: Cpu, value: int) -> None:
    """Raise #GP(0) for what CR4 cannot be: a bit that is reserved, or PAE paging with a reserved bit in a PDPTE."""
    state = cpu.state
    if value & ~cpu.model.cr4_mask:
        raise general_protection(0)
    if (state.cr4 ^ value) & _CR4_TRANSLATION and state.cr0 & CR0_PG:
        check_pdptes(cpu.memory, value, state.cr3)


def _write_cr0(cpu: Cpu, value: int) -> None:
    state = cpu.state
    check_cr0(value)
    value = value & CR0_WRITABLE | CR0_ET
    changed = state.cr0 ^ value
    if changed & value & CR0_PG:
        check_pdptes(cpu.memory, state.cr4, state.cr3)
    state.cr0 = value
    if changed & (CR0_PG | CR0_WP):
        cpu.mmu.flush()
    if changed & CR0_PE:
        cs = state.segments[CS]
        # Real mode, and protected mode until its first far jump, run from a CS that looks like ring 0 data.
        cs.load(cs.selector, cs.base, cs.limit, cs.attributes & (SEG_DB | SEG_G | SEG_AVL) | REAL_ATTRIBUTES)
        cpu.set_cpl(0)
    cpu.mmu.update_alignment()


def _write_cr3(cpu: Cpu, value: int) -> None:
    state = cpu.state
    if state.cr0 & CR0_PG:
        check_pdptes(cpu.memory, state.cr4, value)
    state.cr3 = value
    cpu.mmu.flush()


def _write_cr4(cpu: Cpu, value: int) -> None:
    state = cpu.state
    check_cr4(cpu, value)
    changed = state.cr4 ^ value
    state.cr4 = value
    if changed & _CR4_TRANSLATION:
        cpu.mmu.flush()


def load_msw(cpu: Cpu, value: int) -> None:
    """LMSW at CPL 0: PE, MP, EM and TS from `value`; PE is never cleared."""
    low = CR0_PE | CR0_MP | CR0_EM | CR0_TS
    cr0 = cpu.state.cr0
    _write_cr0(cpu, cr0 & ~low | value & low | cr0 & CR0_PE)


def clear_task_switched(cpu: Cpu) -> None:
    """CLTS at CPL 0."""
    cpu.state.cr0 &= ~CR0_TS


def _debug_register(cpu: Cpu, number: int) -> int:
    """The register that `number` means: 4 and 5 stand for 6 and 7 unless CR4.DE forbids them."""
    state = cpu.state
    if number in (4, 5):
        if state.cr4 & CR4_DE:
            raise invalid_opcode()
        number += 2
    check_privilege(cpu)
    if state.dr[7] & DR7_GD:
        raise DebugFault(DR6_BD)
    return number


def read_dr(cpu: Cpu, number: int) -> int:
    """MOV r32, DRn. Raises #UD (DR4, DR5 with CR4.DE), #GP(0) above CPL 0, #DB while DR7.GD is set."""
    return cpu.state.dr[_debug_register(cpu, number)]


def write_dr(cpu: Cpu, number: int, value: int) -> None:
    """MOV DRn, r32: reserved bits keep their fixed values; raises as `read_dr`."""
    number = _debug_register(cpu, number)
    if number == 6:
        value = value & DR6_WRITABLE | DR6_FIXED
    elif number == 7:
        value = value & DR7_WRITABLE | DR7_FIXED
    cpu.state.dr[number] = value


@dataclass(frozen=True, slots=True)
class Msr:
    """A model-specific register.

    Attributes:
        number: ECX.
        name: SDM Vol. 4 without the prefix IA32_.
        read: 64 bits.
        write: takes 64 bits.
    """

    number: int
    name: str
    read: Callable[[Cpu], int]
    write: Callable[[Cpu, int], None]


def _ignore(_cpu: Cpu, _value: int) -> None:
    """A register that takes any value and keeps none."""


def _read_zero(_cpu: Cpu) -> int:
    return 0


def _read_tsc(cpu: Cpu) -> int:
    return cpu.tsc


def _write_tsc(cpu: Cpu, value: int) -> None:
    cpu.state.tsc_offset = (cpu.state.tsc_offset + value - cpu.tsc) & (1 << 64) - 1


def _read_sysenter_cs(cpu: Cpu) -> int:
    return cpu.state.sysenter_cs


def _write_sysenter_cs(cpu: Cpu, value: int) -> None:
    cpu.state.sysenter_cs = value & MASK32


def _read_sysenter_esp(cpu: Cpu) -> int:
    return cpu.state.sysenter_esp


def _write_sysenter_esp(cpu: Cpu, value: int) -> None:
    cpu.state.sysenter_esp = value & MASK32


def _read_sysenter_eip(cpu: Cpu) -> int:
    return cpu.state.sysenter_eip


def _write_sysenter_eip(cpu: Cpu, value: int) -> None:
    cpu.state.sysenter_eip = value & MASK32


MSRS: Final = {
    msr.number: msr
    for msr in (
        Msr(0x00, "P5_MC_ADDR", _read_zero, _ignore),
        Msr(0x01, "P5_MC_TYPE", _read_zero, _ignore),
        Msr(0x10, "TIME_STAMP_COUNTER", _read_tsc, _write_tsc),
        Msr(0x8B, "BIOS_SIGN_ID", _read_zero, _ignore),
        Msr(0x174, "SYSENTER_CS", _read_sysenter_cs, _write_sysenter_cs),
        Msr(0x175, "SYSENTER_ESP", _read_sysenter_esp, _write_sysenter_esp),
        Msr(0x176, "SYSENTER_EIP", _read_sysenter_eip, _write_sysenter_eip),
    )
}
"""Every MSR there is, by number; a debugger lists them from here."""


def _msr(cpu: Cpu, number: int) -> Msr:
    check_privilege(cpu)
    msr = MSRS.get(number)
    if msr is None:
        raise general_protection(0)
    return msr


def read_msr(cpu: Cpu, number: int) -> int:
    """RDMSR: 64 bits. Raises #GP(0) above CPL 0 and for an unknown register."""
    return _msr(cpu, number).read(cpu)


def write_msr(cpu: Cpu, number: int, value: int) -> None:
    """WRMSR of 64 bits; raises as `read_msr`."""
    _msr(cpu, number).write(cpu, value)


def _has_io_privilege(cpu: Cpu) -> bool:
    """CPL is at most IOPL; always in real mode."""
    state = cpu.state
    return state.cpl <= (state.eflags & IOPL) >> IOPL_BIT or not state.cr0 & CR0_PE


def check_io(cpu: Cpu, port: int, size_bytes: int) -> None:
    """Raise #GP(0) unless IOPL, or the I/O bitmap of the TSS, allows an access to `size_bytes` (1, 2, 4) ports."""
    state = cpu.state
    if not state.eflags & VM and _has_io_privilege(cpu):
        return
    tr = state.tr
    if not tr.attributes & IS_32 or tr.limit < LIMIT_32:
        raise general_protection(0)
    load = cpu.mmu.load_system
    at = load(tr.base + IO_MAP_BASE_32, 2) + (port >> 3)
    # Two bytes are read whatever the width: a bitmap needs one more byte behind its last.
    if at + 1 > tr.limit:
        raise general_protection(0)
    if load(tr.base + at, 2) >> (port & 7) & (1 << size_bytes) - 1:
        raise general_protection(0)


def push_flags_image(cpu: Cpu, operand_bytes: int) -> int:
    """What PUSHF or PUSHFD pushes. Raises #GP(0) in virtual-8086 mode below IOPL 3, but for PUSHF with VME."""
    state = cpu.state
    flags = state.eflags
    if flags & VM and flags & IOPL != IOPL:
        if operand_bytes == 4 or not state.cr4 & CR4_VME:
            raise general_protection(0)
        flags = flags & ~IF | IOPL | (IF if flags & VIF else 0)
    if operand_bytes == 2:
        return flags & 0xFFFF
    return flags & ~(VM | RF)


def pop_flags(cpu: Cpu, value: int, operand_bytes: int) -> None:
    """POPF or POPFD of the image `value`.

    Raises:
        GuestFault: #GP(0) in virtual-8086 mode below IOPL 3, but for POPF with VME, which faults if the image sets TF,
            or IF while VIP is set.
    """
    state = cpu.state
    flags = state.eflags
    mask = _FLAGS_16 if operand_bytes == 2 else _FLAGS_32
    if flags & VM:
        mask &= ~IOPL
        if flags & IOPL != IOPL:
            if operand_bytes == 4 or not state.cr4 & CR4_VME:
                raise general_protection(0)
            if value & TF or (value & IF and flags & VIP):
                raise general_protection(0)
            mask &= ~IF
            flags = flags | VIF if value & IF else flags & ~VIF
    elif state.cpl:
        mask &= ~IOPL
        if not _has_io_privilege(cpu):
            mask &= ~IF
    state.eflags = (flags & ~(mask | RF) | value & mask) & DEFINED_MASK | ALWAYS_SET
    cpu.mmu.update_alignment()


def _uses_virtual_if(cpu: Cpu) -> bool:
    """CLI and STI act on VIF instead of IF: VME in virtual-8086 mode, PVI at CPL 3. Raises #GP(0) if on neither."""
    state = cpu.state
    if _has_io_privilege(cpu):
        return False
    if state.cr4 & CR4_VME if state.eflags & VM else state.cr4 & CR4_PVI and state.cpl == 3:
        return True
    raise general_protection(0)


def clear_interrupts(cpu: Cpu) -> None:
    """CLI. Raises #GP(0) without the privilege."""
    cpu.state.eflags &= ~VIF if _uses_virtual_if(cpu) else ~IF


def set_interrupts(cpu: Cpu) -> None:
    """STI: if IF was clear, interrupts wait for one more instruction. Raises #GP(0) without privilege, or for VIP."""
    state = cpu.state
    if _uses_virtual_if(cpu):
        if state.eflags & VIP:
            raise general_protection(0)
        state.eflags |= VIF
        return
    if not state.eflags & IF:
        state.eflags |= IF
        state.shadow = SHADOW_STI
