"""Rows of the x87 FPU: what is computed goes through the port, control and state instructions are here.

Checks, operands, exceptions and the pointers to the last instruction are here; how a result comes about is not known.

Source: SDM Vol. 1, "Programming with the x87 FPU"; Vol. 2A; Vol. 3A, "System Programming for the x87 FPU".
"""

from __future__ import annotations

from iced_x86 import Encoder, Instruction, OpKind

from machine.cpu import Cpu
from machine.faults import device_not_available
from machine.flags import STATUS_MASK, VM
from machine.fpu import compute_ignoring, suppresses_store, tell_error
from machine.fpuenvironment import (
    ENVIRONMENT_BYTES,
    IMAGE_BYTES,
    environment,
    load_environment,
    load_registers,
    registers,
)
from machine.fpustate import FCS, FCW, FDP, FDS, FIP, FLAGS, FOP, FSW, FSW_SUMMARY
from machine.instructions import wide
from machine.instructions.operands import address, is_memory, read, size_bytes, write
from machine.instructions.table import CODE_NAMES, Operation, Row
from machine.state import CR0_EM, CR0_MP, CR0_PE, CR0_TS, CS, EAX, MASK32

_OFF = CR0_EM | CR0_TS
_FSW, _FLAGS = FSW // 2, FLAGS // 4
_FIP, _FCS, _FDP, _FDS, _FOP = FIP // 4, FCS // 4, FDP // 4, FDS // 4, FOP // 4
_ALL_MASKED = 0x3F

ARITHMETIC = frozenset(
    {
        "fadd", "faddp", "fiadd", "fsub", "fsubp", "fisub", "fsubr", "fsubrp", "fisubr", "fmul", "fmulp", "fimul",
        "fdiv", "fdivp", "fidiv", "fdivr", "fdivrp", "fidivr", "fprem", "fprem1", "fabs", "fchs", "frndint", "fscale",
        "fsqrt", "fxtract", "fcom", "fcomp", "fcompp", "fucom", "fucomp", "fucompp", "ficom", "ficomp", "ftst", "fxam",
        "fsin", "fcos", "fsincos", "fptan", "fpatan", "f2xm1", "fyl2x", "fyl2xp1",
    }
)  # fmt: skip
LOADS = frozenset({"fld", "fild", "fbld", "fld1", "fldz", "fldpi", "fldl2e", "fldl2t", "fldlg2", "fldln2", "fxch"})
STORES = frozenset({"fst", "fstp", "fist", "fistp", "fbstp", "fstpnce"})
STACK = frozenset({"ffree", "ffreep", "fincstp", "fdecstp", "fnop"})
SETS_FLAGS = frozenset({"fcomi", "fcomip", "fucomi", "fucomip"})
USES_FLAGS = frozenset({f"fcmov{name}" for name in ("b", "e", "be", "u", "nb", "ne", "nbe", "nu")})
COMPUTED = ARITHMETIC | LOADS | STORES | STACK | SETS_FLAGS | USES_FLAGS
"""The mnemonics that are computed through the port; each updates the pointers to the last instruction."""


def opcode_of(instruction: Instruction) -> int:
    """FOP: eleven bits, three of the escape opcode and the ModRM byte.

    Of two encodings of one address that differ only in a needless SIB byte, it gives the shorter one's.
    """
    encoder = Encoder(32)
    encoder.encode(instruction, 0)
    code = encoder.take_buffer()
    at = next(n for n, byte in enumerate(code) if byte & 0xF8 == 0xD8)
    return (code[at] & 7) << 8 | code[at + 1]


def build_absent(cpu: Cpu, _instruction: Instruction) -> Operation:
    """Any escape opcode on a CPU without FPU: nothing, so that FNINIT and FNSTSW find what software looks for.

    A kernel tells by storing a pattern, executing FNINIT and FNSTSW or FNSTCW, and finding the pattern unchanged; it
    then sets CR0.EM, and from there on each escape raises #NM.
    """
    state = cpu.state

    def escape() -> None:
        if state.cr0 & _OFF:
            raise device_not_available()

    return escape


def build_computed(cpu: Cpu, instruction: Instruction) -> Operation:
    """An instruction that the port computes."""
    name = CODE_NAMES[instruction.code].split("_")[0].lower()
    if instruction.op_count and is_memory(instruction, 0):
        return _build_store(cpu, instruction) if name in STORES else _build_load(cpu, instruction)
    state = cpu.state
    fpu = state.fpu
    compute = cpu.fpu.computation(instruction)
    halves, words, cs = fpu.halves, fpu.words, state.segments[CS]
    here, opcode = instruction.ip32, opcode_of(instruction)
    sets_flags, uses_flags = name in SETS_FLAGS, name in SETS_FLAGS | USES_FLAGS

    def execute() -> None:
        if state.cr0 & _OFF:
            raise device_not_available()
        ignoring = halves[_FSW] & FSW_SUMMARY and tell_error(cpu)
        words[_FIP] = (state.eip + here) & MASK32
        words[_FCS] = cs.selector
        words[_FOP] = opcode
        if uses_flags:
            words[_FLAGS] = state.eflags & STATUS_MASK
        if ignoring:
            compute_ignoring(cpu, compute)
        else:
            compute()
        if sets_flags:
            state.eflags = state.eflags & ~STATUS_MASK | words[_FLAGS] & STATUS_MASK

    return execute


def _build_load(cpu: Cpu, instruction: Instruction) -> Operation:
    state = cpu.state
    fpu = state.fpu
    compute = cpu.fpu.computation(instruction)
    halves, words, cs = fpu.halves, fpu.words, state.segments[CS]
    here, opcode = instruction.ip32, opcode_of(instruction)
    segment, offset = address(cpu, instruction)
    fetch = wide.fetch(cpu, segment, offset, size_bytes(instruction, 0))

    def execute() -> None:
        if state.cr0 & _OFF:
            raise device_not_available()
        ignoring = halves[_FSW] & FSW_SUMMARY and tell_error(cpu)
        words[_FDP] = fetch()
        words[_FDS] = segment.selector
        words[_FIP] = (state.eip + here) & MASK32
        words[_FCS] = cs.selector
        words[_FOP] = opcode
        if ignoring:
            compute_ignoring(cpu, compute)
        else:
            compute()

    return execute


def _build_store(cpu: Cpu, instruction: Instruction) -> Operation:
    """The destination must be writable even where an unmasked exception keeps the result: so do processors."""
    state = cpu.state
    fpu = state.fpu
    compute = cpu.fpu.computation(instruction)
    halves, words, cs = fpu.halves, fpu.words, state.segments[CS]
    here, opcode, size = instruction.ip32, opcode_of(instruction), size_bytes(instruction, 0)
    segment, offset = address(cpu, instruction)
    reserve, put = wide.reserve(cpu, segment, offset, size), wide.put(cpu, segment, size)

    def execute() -> None:
        if state.cr0 & _OFF:
            raise device_not_available()
        ignoring = halves[_FSW] & FSW_SUMMARY and tell_error(cpu)
        at = reserve()
        words[_FDP] = at
        words[_FDS] = segment.selector
        words[_FIP] = (state.eip + here) & MASK32
        words[_FCS] = cs.selector
        words[_FOP] = opcode
        if ignoring:
            suppressed = compute_ignoring(cpu, compute)
        else:
            compute()
            suppressed = bool(halves[_FSW] & FSW_SUMMARY) and suppresses_store(fpu)
        if not suppressed:
            put(at)

    return execute


# Control instructions. Those whose names begin with FN do not wait for pending errors.


def build_wait(cpu: Cpu, _instruction: Instruction) -> Operation:
    """WAIT: #NM if CR0.MP and CR0.TS are both set; then a pending error."""
    state = cpu.state
    halves = state.fpu.halves

    def wait() -> None:
        if state.cr0 & (CR0_MP | CR0_TS) == CR0_MP | CR0_TS:
            raise device_not_available()
        if halves[_FSW] & FSW_SUMMARY:
            tell_error(cpu)

    return wait


def _check(cpu: Cpu) -> None:
    if cpu.state.cr0 & _OFF:
        raise device_not_available()


def _check_waiting(cpu: Cpu) -> None:
    _check(cpu)
    if cpu.state.fpu.fsw & FSW_SUMMARY:
        tell_error(cpu)


def build_fninit(cpu: Cpu, _instruction: Instruction) -> Operation:
    """FNINIT."""

    def initialize() -> None:
        _check(cpu)
        cpu.state.fpu.initialize()
        cpu.fpu_error.settle(cpu.state.fpu)

    return initialize


def build_fnclex(cpu: Cpu, _instruction: Instruction) -> Operation:
    """FNCLEX: exception flags, stack fault, ES and B."""
    fpu = cpu.state.fpu

    def clear() -> None:
        _check(cpu)
        fpu.halves[_FSW] &= 0x7F00
        cpu.fpu_error.settle(fpu)

    return clear


def build_obsolete(cpu: Cpu, _instruction: Instruction) -> Operation:
    """FNENI, FNDISI, FNSETPM: of the 8087 and 80287; they do nothing, and do not wait."""
    return lambda: _check(cpu)


def build_fldcw(cpu: Cpu, instruction: Instruction) -> Operation:
    """FLDCW: may unmask an error that is flagged; the next instruction that waits tells it."""
    source, fpu = read(cpu, instruction, 0), cpu.state.fpu

    def load() -> None:
        _check_waiting(cpu)
        fpu.fcw = source()
        cpu.fpu_error.settle(fpu)

    return load


def build_fnstcw(cpu: Cpu, instruction: Instruction) -> Operation:
    """FNSTCW."""
    put, halves = write(cpu, instruction, 0), cpu.state.fpu.halves

    def store() -> None:
        _check(cpu)
        put(halves[FCW // 2])

    return store


def build_fnstsw(cpu: Cpu, instruction: Instruction) -> Operation:
    """FNSTSW AX or m16."""
    state = cpu.state
    halves = state.fpu.halves
    if instruction.op_kind(0) == OpKind.REGISTER:
        gpr = state.gpr

        def move() -> None:
            _check(cpu)
            gpr[EAX] = gpr[EAX] & 0xFFFF_0000 | halves[_FSW]

        return move
    segment, offset = address(cpu, instruction)

    def store() -> None:
        _check(cpu)
        cpu.mmu.store16(segment, offset(), halves[_FSW])

    return store


def _bits(instruction: Instruction) -> int:
    return 16 if CODE_NAMES[instruction.code].endswith(("M14BYTE", "M94BYTE")) else 32


def _is_protected(cpu: Cpu) -> bool:
    return bool(cpu.state.cr0 & CR0_PE) and not cpu.state.eflags & VM


def build_fnstenv(cpu: Cpu, instruction: Instruction) -> Operation:
    """FNSTENV: masks all exceptions afterwards."""
    bits, fpu = _bits(instruction), cpu.state.fpu
    store = _area_store(cpu, instruction, ENVIRONMENT_BYTES[bits], bits)

    def store_environment() -> None:
        _check(cpu)
        store(environment(fpu, bits, protected=_is_protected(cpu)))
        fpu.fcw |= _ALL_MASKED
        cpu.fpu_error.settle(fpu)

    return store_environment


def build_fldenv(cpu: Cpu, instruction: Instruction) -> Operation:
    """FLDENV."""
    bits, fpu = _bits(instruction), cpu.state.fpu
    load = _area_load(cpu, instruction, ENVIRONMENT_BYTES[bits], bits)

    def load_all() -> None:
        _check_waiting(cpu)
        load_environment(fpu, load(), bits, protected=_is_protected(cpu))
        cpu.fpu_error.settle(fpu)

    return load_all


def build_fnsave(cpu: Cpu, instruction: Instruction) -> Operation:
    """FNSAVE: initializes the FPU afterwards."""
    bits, fpu = _bits(instruction), cpu.state.fpu
    store = _area_store(cpu, instruction, IMAGE_BYTES[bits], bits)

    def save() -> None:
        _check(cpu)
        store(environment(fpu, bits, protected=_is_protected(cpu)) + registers(fpu))
        fpu.initialize()
        cpu.fpu_error.settle(fpu)

    return save


def build_frstor(cpu: Cpu, instruction: Instruction) -> Operation:
    """FRSTOR."""
    bits, fpu = _bits(instruction), cpu.state.fpu
    load = _area_load(cpu, instruction, IMAGE_BYTES[bits], bits)

    def restore() -> None:
        _check_waiting(cpu)
        data = load()
        load_environment(fpu, data, bits, protected=_is_protected(cpu))
        load_registers(fpu, data[ENVIRONMENT_BYTES[bits] :])
        cpu.fpu_error.settle(fpu)

    return restore


def _area_store(cpu: Cpu, instruction: Instruction, size: int, bits: int) -> wide.StoreArea:
    segment, offset = address(cpu, instruction)
    return wide.store_area(cpu, segment, offset, size, bits // 8)


def _area_load(cpu: Cpu, instruction: Instruction, size: int, bits: int) -> wide.LoadArea:
    segment, offset = address(cpu, instruction)
    return wide.load_area(cpu, segment, offset, size, bits // 8)


ROWS = (
    Row("fpu", build_absent),
    Row("wait", build_wait),
)
FPU_ROWS = (
    *(Row(name, build_computed) for name in sorted(COMPUTED)),
    Row("fninit", build_fninit),
    Row("fnclex", build_fnclex),
    Row("fneni", build_obsolete),
    Row("fndisi", build_obsolete),
    Row("fnsetpm", build_obsolete),
    Row("fldcw", build_fldcw),
    Row("fnstcw", build_fnstcw),
    Row("fnstsw", build_fnstsw),
    Row("fnstenv", build_fnstenv),
    Row("fldenv", build_fldenv),
    Row("fnsave", build_fnsave),
    Row("frstor", build_frstor),
)
