"""Translation of system instructions: short ones in place, longer ones by the routines of in-TC emulation.

What has no emitter here, or not in this mode, is a callout. It must not know how the routines work.
"""

from __future__ import annotations

from iced_x86 import Code, Instruction, Mnemonic, OpKind, Register, RegisterExt

from machine.flags import IF
from machine.state import CS, DS, ES, FS, GS, SHADOW_STI, SS
from vmm.native import guest, segmented
from vmm.native.cache import GUEST_ESP
from vmm.native.operands import AL, DX, EAX, ECX, EDX, R8, R8D, R8W, R9, R9D, R9W, R10, R11, R15, RDX, Memory, address
from vmm.native.operands import Register as HostRegister
from vmm.native.stateblock import OFFSETS, PORT_STORE, field
from vmm.native.unit import Draft

_NAMES = {ES: "es", DS: "ds", FS: "fs", GS: "gs"}
_CONTROL_REGISTERS = {Register.CR0: "cr0", Register.CR2: "cr2", Register.CR3: "cr3", Register.CR4: "cr4"}


def emit_mov_from_segment(draft: Draft, instruction: Instruction) -> bool:
    """MOV r/m, Sreg: 16 bits into memory; a 32-bit register is zero-extended."""
    selector = guest.selector(instruction.op1_register)
    emit = draft.asm.emit
    if instruction.op0_kind == OpKind.REGISTER:
        destination = guest.register(instruction.op0_register)
        if RegisterExt.size(instruction.op0_register) == 4:
            emit("mov", destination, selector)
        else:
            emit("mov", R8D, selector)
            emit("mov", HostRegister(destination.number, 16), R8W)
        return True
    operand = segmented.operand(draft, instruction, 2)
    if operand is None:
        return False
    emit("mov", R9D, selector)
    emit("mov", operand, R9W)
    return True


def emit_mov_to_segment(draft: Draft, instruction: Instruction) -> bool:
    """MOV Sreg, r/m16: by a routine; a load of SS is a callout."""
    number = guest.segment_number(instruction.op0_register)
    if number in (CS, SS):
        return False
    emit = draft.asm.emit
    if instruction.op1_kind == OpKind.REGISTER:
        source = guest.register(instruction.op1_register)
        emit("movzx", R9D, HostRegister(source.number, 16))
    else:
        operand = segmented.operand(draft, instruction, 2)
        if operand is None:
            return False
        emit("movzx", R9D, operand)
    draft.call_routine(_load_of(draft, number), instruction.ip32, instruction.next_ip32)
    return True


def _load_of(draft: Draft, number: int) -> str:
    """The routine that loads a data segment register: what is flat in this mode has to stay so."""
    return f"load flat {_NAMES[number]}" if draft.mode.is_flat(number) else f"load {_NAMES[number]}"


def emit_pop_segment(draft: Draft, instruction: Instruction) -> bool:
    """POP Sreg with a 32-bit operand; POP SS is a callout."""
    number = guest.segment_number(instruction.op0_register)
    if number in (CS, SS) or instruction.stack_pointer_increment != 4:
        return False
    emit = draft.asm.emit
    emit("mov", R9D, Memory(32, GUEST_ESP, gs=True))
    emit("movzx", R9D, R9W)
    draft.call_routine(_load_of(draft, number), instruction.ip32, instruction.next_ip32)
    emit("lea", GUEST_ESP, address(GUEST_ESP, 4))
    return True


def emit_pushfd(draft: Draft, _instruction: Instruction) -> bool:
    """PUSHFD."""
    emit_flags_image(draft, R8D)
    draft.push(R8D)
    return True


def emit_flags_image(draft: Draft, destination: HostRegister) -> None:
    """Let `destination` be what PUSHFD pushes; R8 and R9 are lost.

    RFLAGS has IF set, whatever the guest's IF is; the sums are of disjoint bits, so LEA is an OR.
    """
    emit = draft.asm.emit
    emit("pushfq")
    emit("pop", R8)
    emit("mov", R9D, field("interrupt_flag"))
    emit("lea", R8D, address(R8, -IF, index=R9))
    emit("mov", R9D, field("system_flags"))
    emit("lea", destination, address(R8, index=R9))


def emit_popfd(draft: Draft, instruction: Instruction) -> bool:
    """POPFD."""
    emit = draft.asm.emit
    emit("mov", R9D, Memory(32, GUEST_ESP, gs=True))
    draft.call_routine("popf", instruction.ip32, instruction.next_ip32)
    emit("lea", GUEST_ESP, address(GUEST_ESP, 4))
    return True


def emit_cli(draft: Draft, _instruction: Instruction) -> bool:
    """CLI in ring 0."""
    if draft.mode.user:
        return False
    draft.asm.emit("mov", field("interrupt_flag"), 0)
    return True


def emit_sti(draft: Draft, instruction: Instruction) -> bool:
    """STI in ring 0; a callout if something waits for it."""
    if draft.mode.user or draft.in_shadow:
        return False
    emit = draft.asm.emit
    emit("mov", R9D, ECX)
    emit("mov", ECX, field("pending"))
    nothing_pending = draft.asm.jump_if_ecx_is_zero()
    emit("mov", ECX, R9D)
    draft.callout_early(instruction.ip32)
    draft.asm.bind_rel8(nothing_pending)
    emit("mov", ECX, R9D)
    emit("mov", R8D, field("interrupt_flag"))
    emit("mov", field("interrupt_flag_before"), R8D)
    emit("mov", field("interrupt_flag"), IF)
    draft.hold_off(SHADOW_STI)
    return True


def emit_int(draft: Draft, instruction: Instruction) -> bool:
    """INT n."""
    if instruction.code != Code.INT_IMM8:
        return False
    draft.asm.emit("mov", R9D, instruction.immediate8)
    draft.go_to_routine("int", instruction.ip32, instruction.next_ip32)
    return True


def emit_iretd(draft: Draft, instruction: Instruction) -> bool:
    """IRETD."""
    draft.go_to_routine("iret", instruction.ip32, instruction.next_ip32)
    return True


def emit_sysenter(draft: Draft, instruction: Instruction) -> bool:
    """SYSENTER."""
    draft.go_to_routine("sysenter", instruction.ip32, instruction.next_ip32)
    return True


def emit_sysexit(draft: Draft, instruction: Instruction) -> bool:
    """SYSEXIT in ring 0."""
    if draft.mode.user:
        return False
    draft.go_to_routine("sysexit", instruction.ip32, instruction.next_ip32)
    return True


def emit_mov_from_cr(draft: Draft, instruction: Instruction) -> bool:
    """MOV r32, CRn in ring 0."""
    name = _CONTROL_REGISTERS.get(instruction.op1_register)
    if draft.mode.user or name is None:
        return False
    draft.asm.emit("mov", guest.register(instruction.op0_register), field(name))
    return True


def emit_invlpg(draft: Draft, _instruction: Instruction) -> bool:
    """INVLPG in ring 0: windows never hold anything stale."""
    return not draft.mode.user


def emit_rdtsc(draft: Draft, _instruction: Instruction) -> bool:
    """RDTSC in ring 0, where CR4.TSD does not matter: EDX:EAX = the TSC when no budget is left - what is left now."""
    if draft.mode.user:
        return False
    emit = draft.asm.emit
    draft.budget_here(RDX)
    emit("mulx", R9, R8, field("ns_per_insn"))
    emit("not", R8)
    emit("mov", R9, field("tsc_at_no_budget"))
    emit("lea", R8, address(R8, 1, index=R9))
    emit("mov", EAX, R8D)
    emit("mov", EDX, 32)
    emit("shrx", RDX, R8, RDX)
    return True


def emit_clts(draft: Draft, instruction: Instruction) -> bool:
    """CLTS in ring 0."""
    if draft.mode.user:
        return False
    draft.call_routine("clts", instruction.ip32, instruction.next_ip32)
    return True


def emit_mov_to_cr(draft: Draft, instruction: Instruction) -> bool:
    """MOV CR3, r32 in ring 0, and CR0 if only TS changes: other bits and registers change the mode."""
    number = instruction.op0_register - Register.CR0
    if draft.mode.user or number not in (0, 3):
        return False
    draft.asm.emit("mov", R9D, guest.register(instruction.op1_register))
    if number == 0:
        draft.call_routine("load cr0", instruction.ip32, instruction.next_ip32)
        return True
    draft.go_to_routine("load cr3", instruction.ip32, instruction.next_ip32)
    draft.is_complete = True
    return True


def emit_port_access(draft: Draft, instruction: Instruction) -> bool:
    """IN, OUT in flat ring 0: an exit that needs no state but EAX and the time; services of our BIOS want all of it."""
    if draft.mode.user or draft.in_shadow or not draft.mode.is_flat(CS):
        return False
    is_store = instruction.mnemonic == Mnemonic.OUT
    port, data = (0, 1) if is_store else (1, 0)
    size_bytes = RegisterExt.size(instruction.op_register(data))
    emit, asm = draft.asm.emit, draft.asm
    if instruction.op_kind(port) == OpKind.REGISTER:
        emit("movzx", R8D, DX)
    else:
        emit("mov", R8D, instruction.immediate8)
    can_be_published = size_bytes == 1 and not is_store
    if can_be_published:
        # ECX = four times the difference of the ports, less one if the value may be another by now.
        emit("mov", R9, field("published_budget"))
        emit("lea", R9, address(R10, index=R9))
        emit("sarx", R9, R9, R11)
        emit("mov", field("parked"), ECX)
        emit("mov", ECX, field("published_port"))
        emit("lea", ECX, Memory(0, ECX, R8D, 4))
        emit("lea", ECX, Memory(0, ECX, R9D, 1))
        known = asm.jump_if_ecx_is_zero()
        emit("mov", ECX, field("parked"))
    emit("mov", field("port"), R8D)
    emit("mov", field("port_access"), size_bytes | (PORT_STORE if is_store else 0))
    draft.leave_for_port(instruction.ip32, instruction.next_ip32)
    if can_be_published:
        asm.bind_rel8(known)
        emit("mov", ECX, field("parked"))
        emit("mov", AL, Memory(8, R15, displacement=OFFSETS["published_value"]))
    return True


def emit_cpuid(draft: Draft, instruction: Instruction) -> bool:
    """CPUID, which no ring is denied."""
    draft.call_routine("cpuid", instruction.ip32, instruction.next_ip32)
    return True
