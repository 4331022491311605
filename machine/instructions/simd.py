"""Rows of MMX, SSE and SSE2: what is computed goes through the port, moves of state and cache hints are here.

Checks, operands, numeric exceptions and general-purpose registers are here; how a result comes about is not known.

Source: SDM Vol. 1, "Programming with Intel MMX Technology", "... SSE", "... SSE2" and "Handling SIMD Floating-Point
Exceptions"; Vol. 2, exception tables; Vol. 3A, "Intel MMX Technology System Programming" and "System Programming for
Instruction Set Extensions". The flags of a faulting SSE instruction were measured: with an unmasked exception that is
found before the computation, those that are found after it are not flagged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from iced_x86 import Code, Instruction, OpCodeInfo, OpCodeOperandKind, OpKind, Register, RegisterExt

from machine.cpu import Cpu
from machine.faults import GuestFault, Vector, device_not_available, general_protection, invalid_opcode
from machine.flags import STATUS_MASK
from machine.fpu import Computation, compute_ignoring, tell_error
from machine.fpustate import (
    ENGINE,
    FLAGS,
    FSW,
    FSW_SUMMARY,
    FXSAVE_BYTES,
    GPR,
    MXCSR,
    MXCSR_FLAGS,
    MXCSR_MASKS,
    MXCSR_MASKS_SHIFT,
    MXCSR_WRITABLE,
    REGISTERS_BYTES,
    ST,
    XMM,
)
from machine.instructions import wide
from machine.instructions.moves import build_mov, build_nop
from machine.instructions.operands import (
    Read,
    address,
    address_mask,
    gpr_number,
    is_memory,
    size_bytes,
    string_source,
)
from machine.instructions.table import CODE_NAMES, Operation, Row
from machine.instructions.underflow import OVERFLOW, PRECISION, UNDERFLOW, Underflow, can_underflow
from machine.state import CR0_EM, CR0_TS, CR4_OSFXSR, CR4_OSXMMEXCPT, EDI, MASK32

_OFF: Final = CR0_EM | CR0_TS
_FSW, _MXCSR, _GPR, _FLAGS = FSW // 2, MXCSR // 4, GPR // 4, FLAGS // 4
_BEFORE: Final = 0x07  # invalid, denormal, divide by zero: found before the computation
_FXSAVE_ALIGNMENT: Final = 4

_PACKED = (
    "paddb", "paddw", "paddd", "paddq", "paddsb", "paddsw", "paddusb", "paddusw", "psubb", "psubw", "psubd", "psubq",
    "psubsb", "psubsw", "psubusb", "psubusw", "pmullw", "pmulhw", "pmulhuw", "pmuludq", "pmaddwd", "pavgb", "pavgw",
    "pminub", "pmaxub", "pminsw", "pmaxsw", "psadbw", "pand", "pandn", "por", "pxor", "pcmpeqb", "pcmpeqw", "pcmpeqd",
    "pcmpgtb", "pcmpgtw", "pcmpgtd", "psllw", "pslld", "psllq", "pslldq", "psrlw", "psrld", "psrlq", "psrldq", "psraw",
    "psrad", "packsswb", "packssdw", "packuswb", "punpcklbw", "punpcklwd", "punpckldq", "punpcklqdq", "punpckhbw",
    "punpckhwd", "punpckhdq", "punpckhqdq", "pshufw", "pshufd", "pshufhw", "pshuflw", "pinsrw", "pextrw", "pmovmskb",
)  # fmt: skip
_SINGLE_AND_DOUBLE = (
    *(name + kind for name in ("add", "sub", "mul", "div", "sqrt", "min", "max") for kind in ("ps", "ss", "pd", "sd")),
    *(name + kind for name in ("and", "andn", "or", "xor", "unpckl", "unpckh", "shuf") for kind in ("ps", "pd")),
    *(name + kind for name in ("comi", "ucomi") for kind in ("ss", "sd")),
    "movmskps", "movmskpd", "cmpps", "cmpss", "cmppd", "cmpsd_sse2", "rcpps", "rcpss", "rsqrtps", "rsqrtss",
)  # fmt: skip
_CONVERSIONS = (
    "cvtpi2ps", "cvtpi2pd", "cvtps2pi", "cvttps2pi", "cvtpd2pi", "cvttpd2pi", "cvtsi2ss", "cvtsi2sd", "cvtss2si",
    "cvttss2si", "cvtsd2si", "cvttsd2si", "cvtps2pd", "cvtpd2ps", "cvtss2sd", "cvtsd2ss", "cvtdq2ps", "cvtps2dq",
    "cvttps2dq", "cvtdq2pd", "cvtpd2dq", "cvttpd2dq",
)  # fmt: skip
_MOVES = (
    "movd", "movq", "movq2dq", "movdq2q", "movaps", "movapd", "movups", "movupd", "movdqa", "movdqu", "movss",
    "movsd_sse2", "movlps", "movlpd", "movhps", "movhpd", "movhlps", "movlhps", "movntps", "movntpd", "movntdq",
    "movntq",
)  # fmt: skip
COMPUTED = frozenset((*_PACKED, *_SINGLE_AND_DOUBLE, *_CONVERSIONS, *_MOVES, "emms"))
"""The rows that are computed through the port."""

UNALIGNED = frozenset({"movups", "movupd", "movdqu"})
_XMM_KINDS = frozenset((OpCodeOperandKind.XMM_REG, OpCodeOperandKind.XMM_RM, OpCodeOperandKind.XMM_OR_MEM))
_SETS_FLAGS = frozenset({"comiss", "ucomiss", "comisd", "ucomisd"})


def _unavailable(cpu: Cpu, needed_cr4: int) -> GuestFault:
    """#UD before #NM."""
    state = cpu.state
    if state.cr0 & CR0_EM or ~state.cr4 & needed_cr4:
        return invalid_opcode()
    return device_not_available()


def _registers(instruction: Instruction) -> list[int]:
    """Register operands; of each the number is the same for MMX and XMM as in ModRM."""
    return [
        instruction.op_register(n) for n in range(instruction.op_count) if instruction.op_kind(n) == OpKind.REGISTER
    ]


def _is_mmx(register: int) -> bool:
    return Register.MM0 <= register <= Register.MM7


def _name(instruction: Instruction) -> str:
    return CODE_NAMES[instruction.code].split("_")[0].lower()


def _general_purpose(instruction: Instruction, n: int) -> int:
    """The number of the general-purpose register that operand `n` is; -1 for anything else."""
    if n >= instruction.op_count or instruction.op_kind(n) != OpKind.REGISTER:
        return -1
    register = instruction.op_register(n)
    return gpr_number(register) if RegisterExt.is_gpr32(register) else -1


def build_computed(cpu: Cpu, instruction: Instruction) -> Operation:
    """An instruction that the port computes."""
    state, name = cpu.state, _name(instruction)
    fpu = state.fpu
    compute = cpu.fpu.computation(instruction)
    halves, words, gpr = fpu.halves, fpu.words, state.gpr
    operands = _registers(instruction)
    waits = any(map(_is_mmx, operands)) or name == "emms"
    uses_xmm = not _XMM_KINDS.isdisjoint(OpCodeInfo(instruction.code).op_kinds())
    needed_cr4 = CR4_OSFXSR if uses_xmm else 0
    fetch, reserve, put = _memory_operand(cpu, instruction, name)
    target, source = _general_purpose(instruction, 0), _general_purpose(instruction, 1)
    sets_flags = name in _SETS_FLAGS
    underflow = Underflow(instruction, name) if can_underflow(name) else None

    def execute() -> None:
        if state.cr0 & _OFF or ~state.cr4 & needed_cr4:
            raise _unavailable(cpu, needed_cr4)
        ignoring = waits and halves[_FSW] & FSW_SUMMARY and tell_error(cpu)
        at = fetch() if fetch is not None else reserve() if reserve is not None else 0
        if source >= 0:
            words[_GPR] = gpr[source]
        if ignoring:
            compute_ignoring(cpu, lambda: compute_checked(cpu, compute, underflow))
        elif uses_xmm and words[_MXCSR] & MXCSR_MASKS != MXCSR_MASKS:
            compute_checked(cpu, compute, underflow)
        else:
            compute()
        if put is not None:
            put(at)
        elif target >= 0:
            gpr[target] = words[_GPR]
        elif sets_flags:
            state.eflags = state.eflags & ~STATUS_MASK | words[_FLAGS] & STATUS_MASK

    def execute_plainly() -> None:
        if state.cr0 & _OFF or ~state.cr4 & CR4_OSFXSR:
            raise _unavailable(cpu, CR4_OSFXSR)
        if fetch is not None:
            fetch()
        if words[_MXCSR] & MXCSR_MASKS != MXCSR_MASKS:
            compute_checked(cpu, compute, underflow)
        else:
            compute()

    plain = not waits and reserve is None and target < 0 and source < 0 and not sets_flags
    return execute_plainly if plain else execute


def _memory_operand(
    cpu: Cpu, instruction: Instruction, name: str
) -> tuple[Read | None, Read | None, Callable[[int], None] | None]:
    """Closures that fetch, reserve and put the memory operand; only a first operand is stored to."""
    for n in range(instruction.op_count):
        if is_memory(instruction, n):
            size = size_bytes(instruction, n)
            aligned = size == 16 and name not in UNALIGNED
            segment, offset = address(cpu, instruction)
            if n:
                return wide.fetch(cpu, segment, offset, size, aligned=aligned), None, None
            return None, wide.reserve(cpu, segment, offset, size, aligned=aligned), wide.put(cpu, segment, size)
    return None, None, None


def compute_checked(cpu: Cpu, compute: Computation, underflow: Underflow | None) -> None:
    """Compute with some SSE exception unmasked: all are masked for the host, and the flags looked at afterwards.

    Raises:
        GuestFault: #XM, or #UD without CR4.OSXMMEXCPT; registers are as before, but for the flags in MXCSR.
    """
    fpu = cpu.state.fpu
    words, page = fpu.words, fpu.bytes8
    before = words[_MXCSR]
    unmasked = ~before >> MXCSR_MASKS_SHIFT & MXCSR_FLAGS
    saved = bytes(page[:ENGINE])
    words[_MXCSR] = before & ~MXCSR_FLAGS | MXCSR_MASKS
    compute()
    flags = words[_MXCSR] & MXCSR_FLAGS
    if underflow is not None:
        if unmasked & UNDERFLOW and underflow.is_tiny(page):
            flags |= UNDERFLOW
        if flags & unmasked & (OVERFLOW | UNDERFLOW):
            flags = flags & ~PRECISION | (PRECISION if underflow.is_inexact(saved) else 0)
    raised = flags & unmasked
    if not raised:
        words[_MXCSR] = before | flags
        return
    page[:REGISTERS_BYTES] = saved[:REGISTERS_BYTES]
    words[_MXCSR] = before | (flags & _BEFORE if raised & _BEFORE else flags)
    raise GuestFault(Vector.XM) if cpu.state.cr4 & CR4_OSXMMEXCPT else invalid_opcode()


# State.


def build_ldmxcsr(cpu: Cpu, instruction: Instruction) -> Operation:
    """LDMXCSR: #GP(0) for a reserved bit. Flags that are set raise nothing."""
    state, mmu = cpu.state, cpu.mmu
    segment, offset = address(cpu, instruction)

    def load() -> None:
        if state.cr0 & _OFF or ~state.cr4 & CR4_OSFXSR:
            raise _unavailable(cpu, CR4_OSFXSR)
        value = mmu.load32(segment, offset())
        if value & ~MXCSR_WRITABLE:
            raise general_protection()
        state.fpu.mxcsr = value

    return load


def build_stmxcsr(cpu: Cpu, instruction: Instruction) -> Operation:
    """STMXCSR."""
    state, mmu = cpu.state, cpu.mmu
    segment, offset = address(cpu, instruction)

    def store() -> None:
        if state.cr0 & _OFF or ~state.cr4 & CR4_OSFXSR:
            raise _unavailable(cpu, CR4_OSFXSR)
        mmu.store32(segment, offset(), state.fpu.mxcsr)

    return store


def build_fxsave(cpu: Cpu, instruction: Instruction) -> Operation:
    """FXSAVE: 288 of the area's 512 bytes are written; of a pending error nothing is told.

    Without CR4.OSFXSR the XMM registers and MXCSR are not saved.
    """
    state = cpu.state
    segment, offset = address(cpu, instruction)
    store = wide.store_area(cpu, segment, offset, FXSAVE_BYTES, _FXSAVE_ALIGNMENT, sixteen=True)

    def save() -> None:
        if state.cr0 & _OFF:
            raise device_not_available()
        image = state.fpu.pack()
        store(image[:REGISTERS_BYTES] if state.cr4 & CR4_OSFXSR else image[:MXCSR] + bytes(8) + image[ST:XMM])

    return save


def build_fxrstor(cpu: Cpu, instruction: Instruction) -> Operation:
    """FXRSTOR: #GP(0) for a reserved bit of MXCSR."""
    state = cpu.state
    segment, offset = address(cpu, instruction)
    load = wide.load_area(cpu, segment, offset, FXSAVE_BYTES, _FXSAVE_ALIGNMENT, sixteen=True)

    def restore() -> None:
        if state.cr0 & _OFF:
            raise device_not_available()
        image = load()
        sse = bool(state.cr4 & CR4_OSFXSR)
        if sse and int.from_bytes(image[MXCSR : MXCSR + 4], "little") & ~MXCSR_WRITABLE:
            raise general_protection()
        state.fpu.unpack(image, sse=sse)
        cpu.fpu_error.settle(state.fpu)

    return restore


# Stores that choose their bytes, and cache hints.


def build_maskmov(cpu: Cpu, instruction: Instruction) -> Operation:
    """MASKMOVQ, MASKMOVDQU: the bytes of operand 1 whose sign is set in operand 2, to DS:EDI.

    With no byte chosen memory is not touched. MASKMOVQ makes the x87 registers MMX registers, as every MMX instruction
    does: the port computes a read of one for that.
    """
    state, mmu = cpu.state, cpu.mmu
    fpu, gpr = state.fpu, state.gpr
    is_mmx = _is_mmx(instruction.op1_register)
    needed_cr4 = 0 if is_mmx else CR4_OSFXSR
    size = 8 if is_mmx else 16
    data, mask = (RegisterExt.number(register) for register in (instruction.op1_register, instruction.op2_register))
    segment, low = string_source(cpu, instruction), address_mask(instruction)
    become_mmx = cpu.fpu.computation(_read_mmx()) if is_mmx else None

    def value(number: int) -> bytes:
        return fpu.mmx(number).to_bytes(8, "little") if is_mmx else fpu.xmm(number).to_bytes(16, "little")

    def execute() -> None:
        if state.cr0 & _OFF or ~state.cr4 & needed_cr4:
            raise _unavailable(cpu, needed_cr4)
        ignoring = is_mmx and fpu.fsw & FSW_SUMMARY and tell_error(cpu)
        chosen, source = value(mask), value(data)
        at = gpr[EDI] & low
        if any(byte & 0x80 for byte in chosen):
            linear = wide.linear_address(cpu, segment, at, size, write=True, alignment=8, sixteen=False)
            mmu.check_linear(linear, size, write=True, user=mmu.user)
            for n in range(size):
                if chosen[n] & 0x80:
                    mmu.store_linear((linear + n) & MASK32, 1, source[n], mmu.user)
        if become_mmx is not None:
            if ignoring:
                compute_ignoring(cpu, become_mmx)
            else:
                become_mmx()

    return execute


def _read_mmx() -> Instruction:
    return Instruction.create_reg_reg(Code.MOVD_RM32_MM, Register.EAX, Register.MM0)


def build_clflush(cpu: Cpu, instruction: Instruction) -> Operation:
    """CLFLUSH: there is no cache to see, but the address must be one that could be read."""
    segment, offset = address(cpu, instruction)
    return lambda: cpu.mmu.check(segment, offset(), 1, write=False)


FPU_ROWS = (
    *(Row(name, build_computed) for name in sorted(COMPUTED)),
    Row("ldmxcsr", build_ldmxcsr),
    Row("stmxcsr", build_stmxcsr),
    Row("fxsave", build_fxsave),
    Row("fxrstor", build_fxrstor),
    Row("maskmovq", build_maskmov),
    Row("maskmovdqu", build_maskmov),
    Row("movnti", build_mov),
    Row("clflush", build_clflush),
    *(Row(name, build_nop) for name in ("sfence", "lfence", "mfence")),
    *(Row(f"prefetch{hint}", build_nop) for hint in ("nta", "t0", "t1", "t2")),
)
