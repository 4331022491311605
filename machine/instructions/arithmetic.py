"""Rows of arithmetic, logic, shifts, multiplication, bit and decimal instructions.

Operands are fetched and results stored here; values and flags come from the pure functions of `machine.alu`. Flags
change last, after a store that may fault.
"""

from __future__ import annotations

from collections.abc import Callable

from iced_x86 import Instruction, OpKind, RegisterExt

from machine.alu import Binary
from machine.cpu import Cpu
from machine.flags import AF, CF, OF, PF, SF, ZF
from machine.instructions.operands import (
    address,
    address_mask,
    gpr_number,
    is_immediate,
    is_memory,
    modify_of,
    read,
    read_register,
    size_bytes,
    store_of,
    write,
    write_register,
)
from machine.instructions.table import Build, Operation, Row
from machine.state import EAX, EDX, MASK32

Pure = Callable[[int, int], tuple[int, int]]


def _update(cpu: Cpu, instruction: Instruction, change: Pure) -> Operation:
    """Operand 0 = change(operand 0, EFLAGS), which gives the new flags too."""
    state = cpu.state
    if not is_memory(instruction, 0):
        register = instruction.op_register(0)
        if RegisterExt.size(register) == 4:
            gpr, n = state.gpr, gpr_number(register)

            def update32() -> None:
                gpr[n], state.eflags = change(gpr[n], state.eflags)

            return update32
        get, put = read_register(state, register), write_register(state, register)

        def update_register() -> None:
            result, flags = change(get(), state.eflags)
            put(result)
            state.eflags = flags

        return update_register
    segment, offset = address(cpu, instruction)
    size = size_bytes(instruction, 0)
    modify, store = modify_of(cpu, size), store_of(cpu, size)

    def update_memory() -> None:
        at = offset()
        result, flags = change(modify(segment, at), state.eflags)
        store(segment, at, result)
        state.eflags = flags

    return update_memory


def build_unary(name: str) -> Build:
    """INC DEC NEG NOT BSWAP."""

    def build(cpu: Cpu, instruction: Instruction) -> Operation:
        return _update(cpu, instruction, cpu.alu.unary[name][8 * size_bytes(instruction, 0)])

    return build


def _combine(cpu: Cpu, instruction: Instruction, compute: Binary) -> Operation:
    """Operand 0 = compute(operand 0, operand 1, EFLAGS), with the flags; special cases for what programs do most."""
    state, gpr = cpu.state, cpu.state.gpr
    size, source = size_bytes(instruction, 0), read(cpu, instruction, 1)
    constant = source() if is_immediate(instruction, 1) else None
    if is_memory(instruction, 0):
        segment, offset = address(cpu, instruction)
        modify, store = modify_of(cpu, size), store_of(cpu, size)
        if constant is not None:
            value = constant

            def constant_to_memory() -> None:
                at = offset()
                result, flags = compute(modify(segment, at), value, state.eflags)
                store(segment, at, result)
                state.eflags = flags

            return constant_to_memory

        def to_memory() -> None:
            at = offset()
            result, flags = compute(modify(segment, at), source(), state.eflags)
            store(segment, at, result)
            state.eflags = flags

        return to_memory
    if size < 4:
        get, put = read(cpu, instruction, 0), write(cpu, instruction, 0)

        def small_registers() -> None:
            result, flags = compute(get(), source(), state.eflags)
            put(result)
            state.eflags = flags

        return small_registers
    d = gpr_number(instruction.op_register(0))
    if constant is not None:
        value = constant

        def constant32() -> None:
            gpr[d], state.eflags = compute(gpr[d], value, state.eflags)

        return constant32
    if is_memory(instruction, 1):
        segment, offset = address(cpu, instruction)
        load32 = cpu.mmu.load32

        def memory32() -> None:
            gpr[d], state.eflags = compute(gpr[d], load32(segment, offset()), state.eflags)

        return memory32
    if size_bytes(instruction, 1) == 4:
        s = gpr_number(instruction.op_register(1))

        def registers32() -> None:
            gpr[d], state.eflags = compute(gpr[d], gpr[s], state.eflags)

        return registers32

    def by_cl() -> None:
        gpr[d], state.eflags = compute(gpr[d], source(), state.eflags)

    return by_cl


def build_binary(name: str) -> Build:
    """ADD OR ADC SBB AND SUB XOR, and ROL ROR RCL RCR SHL SAL SHR SAR by 1, CL or an immediate.

    The count of the latter is masked by the operation.
    """

    def build(cpu: Cpu, instruction: Instruction) -> Operation:
        return _combine(cpu, instruction, cpu.alu.binary[name][8 * size_bytes(instruction, 0)])

    return build


def build_compare(name: str) -> Build:
    """CMP, TEST: only the flags change."""

    def build(cpu: Cpu, instruction: Instruction) -> Operation:
        compute = cpu.alu.binary[name][8 * size_bytes(instruction, 0)]
        state, gpr = cpu.state, cpu.state.gpr
        a, b = read(cpu, instruction, 0), read(cpu, instruction, 1)
        if is_immediate(instruction, 1):
            value = b()
            if not is_memory(instruction, 0) and size_bytes(instruction, 0) == 4:
                n = gpr_number(instruction.op_register(0))

                def compare_immediate() -> None:
                    state.eflags = compute(gpr[n], value, state.eflags)[1]

                return compare_immediate

            def compare_value() -> None:
                state.eflags = compute(a(), value, state.eflags)[1]

            return compare_value

        def compare() -> None:
            state.eflags = compute(a(), b(), state.eflags)[1]

        return compare

    return build


def build_double_shift(name: str) -> Build:
    """SHLD, SHRD."""

    def build(cpu: Cpu, instruction: Instruction) -> Operation:
        compute = cpu.alu.ternary[name][8 * size_bytes(instruction, 0)]
        filler, count = read(cpu, instruction, 1), read(cpu, instruction, 2)
        return _update(cpu, instruction, lambda a, eflags: compute(a, filler(), count(), eflags))

    return build


# Multiplication and division.


def _accumulator(cpu: Cpu, size: int) -> tuple[Callable[[], int], Callable[[int], None]]:
    """Read and write the double-width accumulator: AX, DX:AX or EDX:EAX."""
    gpr = cpu.state.gpr

    def read8() -> int:
        return gpr[EAX] & 0xFFFF

    def write8(value: int) -> None:
        gpr[EAX] = gpr[EAX] & 0xFFFF_0000 | value

    def read16() -> int:
        return (gpr[EDX] & 0xFFFF) << 16 | gpr[EAX] & 0xFFFF

    def write16(value: int) -> None:
        gpr[EAX] = gpr[EAX] & 0xFFFF_0000 | value & 0xFFFF
        gpr[EDX] = gpr[EDX] & 0xFFFF_0000 | value >> 16

    def read32() -> int:
        return gpr[EDX] << 32 | gpr[EAX]

    def write32(value: int) -> None:
        gpr[EAX], gpr[EDX] = value & MASK32, value >> 32

    return {1: (read8, write8), 2: (read16, write16), 4: (read32, write32)}[size]


def _multiply(cpu: Cpu, instruction: Instruction, name: str) -> Operation:
    size = size_bytes(instruction, 0)
    compute, source, state = cpu.alu.binary[name][8 * size], read(cpu, instruction, 0), cpu.state
    gpr, mask = state.gpr, (1 << 8 * size) - 1
    put = _accumulator(cpu, size)[1]

    def multiply() -> None:
        result, flags = compute(gpr[EAX] & mask, source(), state.eflags)
        put(result)
        state.eflags = flags

    return multiply


def build_mul(cpu: Cpu, instruction: Instruction) -> Operation:
    """MUL."""
    return _multiply(cpu, instruction, "mul")


def build_imul(cpu: Cpu, instruction: Instruction) -> Operation:
    """IMUL with one, two or three operands."""
    if instruction.op_count == 1:
        return _multiply(cpu, instruction, "imul")
    compute, state = cpu.alu.binary["imul2"][8 * size_bytes(instruction, 0)], cpu.state
    a = read(cpu, instruction, instruction.op_count - 2)
    b = read(cpu, instruction, instruction.op_count - 1)
    put = write(cpu, instruction, 0)

    def multiply() -> None:
        result, flags = compute(a(), b(), state.eflags)
        put(result)
        state.eflags = flags

    return multiply


def build_divide(name: str) -> Build:
    """DIV, IDIV; #DE leaves everything as it was."""

    def build(cpu: Cpu, instruction: Instruction) -> Operation:
        size = size_bytes(instruction, 0)
        compute, source, state = cpu.alu.binary[name][8 * size], read(cpu, instruction, 0), cpu.state
        get, put = _accumulator(cpu, size)

        def divide() -> None:
            result, flags = compute(get(), source(), state.eflags)
            put(result)
            state.eflags = flags

        return divide

    return build


def build_widen(width: int) -> Build:
    """CBW (AL to AX, width 8), CWDE (AX to EAX, width 16): the lower `width` bits, sign-extended to twice as many."""
    sign, mask = 1 << (width - 1), (1 << width) - 1
    wide_mask = (1 << 2 * width) - 1

    def build(cpu: Cpu, _instruction: Instruction) -> Operation:
        gpr = cpu.state.gpr

        def widen() -> None:
            gpr[EAX] = gpr[EAX] & ~wide_mask | ((gpr[EAX] & mask ^ sign) - sign & wide_mask)

        return widen

    return build


def build_sign(width: int) -> Build:
    """CWD (AX into DX, width 16), CDQ (EAX into EDX, width 32): `width` copies of the accumulator's sign."""
    mask = (1 << width) - 1

    def build(cpu: Cpu, _instruction: Instruction) -> Operation:
        gpr = cpu.state.gpr

        def spread() -> None:
            gpr[EDX] = gpr[EDX] & ~mask | (mask if gpr[EAX] >> (width - 1) & 1 else 0)

        return spread

    return build


# Bits.


def build_bit(name: str) -> Build:
    """BT BTS BTR BTC; with a register index and memory, the index reaches beyond the operand."""

    def build(cpu: Cpu, instruction: Instruction) -> Operation:
        size = size_bytes(instruction, 0)
        compute, state = cpu.alu.binary[name][8 * size], cpu.state
        index = read(cpu, instruction, 1)
        if not is_memory(instruction, 0) and name != "bt":
            return _update(cpu, instruction, lambda a, eflags: compute(a, index(), eflags))
        if not is_memory(instruction, 0):
            value = read(cpu, instruction, 0)

            def test_register() -> None:
                state.eflags = compute(value(), index(), state.eflags)[1]

            return test_register
        segment, offset = address(cpu, instruction)
        reaches = instruction.op_kind(1) == OpKind.REGISTER
        bits = 8 * size
        sign, mask = 1 << (bits - 1), address_mask(instruction)
        modify, store, load = modify_of(cpu, size), store_of(cpu, size), cpu.mmu.load

        def at(bit: int) -> int:
            # The index is signed: floor division finds the operand-sized word that holds the bit.
            return (offset() + ((bit ^ sign) - sign) // bits * size) & mask if reaches else offset()

        def test() -> None:
            bit = index()
            state.eflags = compute(load(segment, at(bit), size), bit, state.eflags)[1]

        def change() -> None:
            bit = index()
            where = at(bit)
            result, flags = compute(modify(segment, where), bit, state.eflags)
            store(segment, where, result)
            state.eflags = flags

        return test if name == "bt" else change

    return build


def build_scan(name: str) -> Build:
    """BSF, BSR."""

    def build(cpu: Cpu, instruction: Instruction) -> Operation:
        compute, state = cpu.alu.binary[name][8 * size_bytes(instruction, 0)], cpu.state
        old, source, put = read(cpu, instruction, 0), read(cpu, instruction, 1), write(cpu, instruction, 0)

        def scan() -> None:
            result, flags = compute(old(), source(), state.eflags)
            put(result)
            state.eflags = flags

        return scan

    return build


# Operations on AX: decimal arithmetic, LAHF and SAHF.


def build_on_ax(name: str) -> Build:
    """AAA AAS DAA DAS LAHF SAHF."""

    def build(cpu: Cpu, _instruction: Instruction) -> Operation:
        compute, state, gpr = cpu.alu.unary[name][16], cpu.state, cpu.state.gpr

        def adjust() -> None:
            result, state.eflags = compute(gpr[EAX] & 0xFFFF, state.eflags)
            gpr[EAX] = gpr[EAX] & 0xFFFF_0000 | result

        return adjust

    return build


def build_decimal_base(name: str) -> Build:
    """AAM AAD with the base as an immediate."""

    def build(cpu: Cpu, instruction: Instruction) -> Operation:
        compute, state, gpr = cpu.alu.binary[name][16], cpu.state, cpu.state.gpr
        base = instruction.immediate8

        def adjust() -> None:
            result, state.eflags = compute(gpr[EAX] & 0xFFFF, base, state.eflags)
            gpr[EAX] = gpr[EAX] & 0xFFFF_0000 | result

        return adjust

    return build


def build_salc(cpu: Cpu, _instruction: Instruction) -> Operation:
    """SALC: AL = CF ? FFh : 0."""
    gpr, state = cpu.state.gpr, cpu.state

    def set_al() -> None:
        gpr[EAX] = gpr[EAX] & 0xFFFF_FF00 | (0xFF if state.eflags & CF else 0)

    return set_al


_STATUS = CF | PF | AF | ZF | SF | OF

ROWS = (
    *(Row(name, build_binary(name)) for name in ("add", "adc", "sub", "sbb")),
    *(Row(name, build_binary(name), undefined=AF) for name in ("and", "or", "xor")),
    Row("cmp", build_compare("cmp")),
    Row("test", build_compare("test"), undefined=AF),
    *(Row(name, build_unary(name)) for name in ("inc", "dec", "neg", "not", "bswap")),
    *(Row(name, build_binary(name), undefined=OF) for name in ("rol", "ror", "rcl", "rcr")),
    *(Row(name, build_binary(name.replace("sal", "shl")), undefined=AF | OF | CF) for name in ("shl", "sal", "shr")),
    Row("sar", build_binary("sar"), undefined=AF | OF),
    *(Row(name, build_double_shift(name), undefined=_STATUS) for name in ("shld", "shrd")),
    Row("mul", build_mul, undefined=SF | ZF | AF | PF),
    Row("imul", build_imul, undefined=SF | ZF | AF | PF),
    *(Row(name, build_divide(name), undefined=_STATUS) for name in ("div", "idiv")),
    Row("cbw", build_widen(8)),
    Row("cwde", build_widen(16)),
    Row("cwd", build_sign(16)),
    Row("cdq", build_sign(32)),
    *(Row(name, build_bit(name), undefined=OF | SF | AF | PF) for name in ("bt", "bts", "btr", "btc")),
    *(Row(name, build_scan(name), undefined=CF | OF | SF | AF | PF) for name in ("bsf", "bsr")),
    *(Row(name, build_on_ax(name), undefined=OF | SF | ZF | PF) for name in ("aaa", "aas")),
    *(Row(name, build_on_ax(name), undefined=OF) for name in ("daa", "das")),
    *(Row(name, build_on_ax(name)) for name in ("lahf", "sahf")),
    *(Row(name, build_decimal_base(name), undefined=OF | AF | CF) for name in ("aam", "aad")),
    Row("salc", build_salc),
)
