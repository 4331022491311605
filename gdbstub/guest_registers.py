"""The guest's registers as gdb sees them: features, types, and how each one is read and written.

It knows the CPU's state and what a debugger may put there; packets and numbers on the wire are unknown here.

Source: gdb's documentation, "i386 Features" and "Enum Target Types"; SDM Vol. 3A, "System Architecture Overview".
"""

from __future__ import annotations

from gdbstub import guest_fpu, guest_segments
from gdbstub.guest_access import Access
from gdbstub.target import Description, Feature, Field, FlagsType, Register, TargetError
from machine import control, flags
from machine.cpu import Cpu
from machine.faults import GuestFault
from machine.state import CR0_PE, DR6_FIXED, DR6_WRITABLE, DR7_FIXED, DR7_WRITABLE, MASK32, SegmentRegister

_TSC_MSR = 0x10
_GPR = ("eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi")
_GDB_SEGMENTS = ("cs", "ss", "ds", "es", "fs", "gs")


def _bits(*names_and_bits: tuple[str, int]) -> tuple[Field, ...]:
    return tuple(Field(name, bit, bit) for name, bit in names_and_bits)


EFLAGS_TYPE = FlagsType(
    "i386_eflags",
    4,
    (
        *_bits(("CF", 0), ("", 1), ("PF", 2), ("AF", 4), ("ZF", 6), ("SF", 7), ("TF", 8), ("IF", 9), ("DF", 10)),
        *_bits(("OF", 11)),
        Field("IOPL", flags.IOPL_BIT, flags.IOPL_BIT + 1),
        *_bits(("NT", 14), ("RF", 16), ("VM", 17), ("AC", 18), ("VIF", 19), ("VIP", 20), ("ID", 21)),
    ),
)
CR0_TYPE = FlagsType(
    "cr0_flags",
    4,
    _bits(
        ("PE", 0), ("MP", 1), ("EM", 2), ("TS", 3), ("ET", 4), ("NE", 5), ("WP", 16), ("AM", 18), ("NW", 29),
        ("CD", 30), ("PG", 31),
    ),
)  # fmt: skip
CR4_TYPE = FlagsType(
    "cr4_flags",
    4,
    _bits(
        ("VME", 0), ("PVI", 1), ("TSD", 2), ("DE", 3), ("PSE", 4), ("PAE", 5), ("MCE", 6), ("PGE", 7), ("PCE", 8),
        ("OSFXSR", 9), ("OSXMMEXCPT", 10),
    ),
)  # fmt: skip
DR6_TYPE = FlagsType(
    "dr6_flags", 4, _bits(("B0", 0), ("B1", 1), ("B2", 2), ("B3", 3), ("BD", 13), ("BS", 14), ("BT", 15))
)
DR7_TYPE = FlagsType(
    "dr7_flags",
    4,
    (
        *_bits(("L0", 0), ("G0", 1), ("L1", 2), ("G1", 3), ("L2", 4), ("G2", 5), ("L3", 6), ("G3", 7), ("LE", 8)),
        *_bits(("GE", 9), ("GD", 13)),
        *(
            field
            for n in range(4)
            for field in (Field(f"RW{n}", 16 + 4 * n, 17 + 4 * n), Field(f"LEN{n}", 18 + 4 * n, 19 + 4 * n))
        ),
    ),
)
ATTRIBUTES_TYPE = FlagsType(
    "segment_attributes",
    2,
    (
        Field("TYPE", 0, 3),
        Field("S", 4, 4),
        Field("DPL", 5, 6),
        *_bits(("P", 7), ("AVL", 8), ("DB", 10), ("G", 11)),
    ),
)


def read(cpu: Cpu, number: int) -> int | None:
    """The value of register `number`, unsigned; None if this CPU has none (no FPU)."""
    return _ACCESSES[number].read(cpu)


def read_all(cpu: Cpu) -> list[int | None]:
    """The values of all registers, in the order of the description."""
    return [access.read(cpu) for access in _ACCESSES]


def write(cpu: Cpu, number: int, value: int) -> None:
    """Set a register.

    Raises:
        TargetError: it cannot be written, or `value` is not valid in it; nothing has changed.
    """
    access = _ACCESSES[number]
    name = access.register.name
    if not 0 <= value < 1 << access.register.bits:
        raise TargetError(f"{name} has {access.register.bits} bits; {value:#x} does not fit.")
    if access.write is None:
        if access.read(cpu) == value:
            return
        raise TargetError(f"{name} can only be read.")
    access.write(cpu, value)


def linear_pc(cpu: Cpu) -> int:
    """The linear address of the next instruction: CS base + EIP."""
    return (cpu.state.segments[SegmentRegister.CS].base + cpu.state.eip) & MASK32


def _system(name: str, type_: str = "uint32", bits: int = 32) -> Register:
    return Register(name, bits, type_, group="system", save_restore=False)


def _gpr(number: int, name: str) -> Access:
    def store(cpu: Cpu, value: int) -> None:
        cpu.state.gpr[number] = value

    type_ = "data_ptr" if name in ("esp", "ebp") else "int32"
    return Access(Register(name, type=type_), lambda cpu: cpu.state.gpr[number], store)


def _write_eflags(cpu: Cpu, value: int) -> None:
    state = cpu.state
    if (value ^ state.eflags) & flags.VM:
        raise TargetError("EFLAGS.VM changes what all segment registers mean; only the guest can change it (IRET).")
    state.eflags = value & flags.DEFINED_MASK | flags.ALWAYS_SET
    cpu.mmu.update_alignment()


def _control_register(number: int, type_: str) -> Access:
    def store(cpu: Cpu, value: int) -> None:
        if number == 0 and (value ^ cpu.state.cr0) & CR0_PE and cpu.state.eflags & flags.VM:
            raise TargetError("CR0.PE cannot change in virtual-8086 mode.")
        try:
            control.write_cr(cpu, number, value)
        except GuestFault as fault:
            message = f"CR{number} cannot have the value {value:#x}: writing it raises {fault} in the guest."
            raise TargetError(message) from fault

    return Access(_system(f"cr{number}", type_), lambda cpu: control.read_cr(cpu, number), store)


def _debug_register(number: int) -> Access:
    def store(cpu: Cpu, value: int) -> None:
        if number == 6:
            value = value & DR6_WRITABLE | DR6_FIXED
        elif number == 7:
            value = value & DR7_WRITABLE | DR7_FIXED
        cpu.state.dr[number] = value

    type_ = {6: "dr6_flags", 7: "dr7_flags"}.get(number, "data_ptr")
    return Access(_system(f"dr{number}", type_), lambda cpu: cpu.state.dr[number], store)


def _table_register(name: str) -> tuple[Access, Access]:
    def set_base(cpu: Cpu, value: int) -> None:
        getattr(cpu.state, name).base = value

    def set_limit(cpu: Cpu, value: int) -> None:
        getattr(cpu.state, name).limit = value

    def base(cpu: Cpu) -> int:
        value: int = getattr(cpu.state, name).base
        return value

    def limit(cpu: Cpu) -> int:
        value: int = getattr(cpu.state, name).limit
        return value

    return (
        Access(_system(f"{name}_base", "data_ptr"), base, set_base),
        Access(_system(f"{name}_limit", "uint16", 16), limit, set_limit),
    )


def _selector(name: str) -> Access:
    index = SegmentRegister[name.upper()]
    return Access(
        Register(name),
        lambda cpu: cpu.state.segments[index].selector,
        lambda cpu, value: guest_segments.load_selector(cpu, index, value),
    )


def _hidden(name: str) -> tuple[Access, ...]:
    """Base, limit and attributes of a segment register, LDTR or TR."""

    def part(attribute: str, type_: str, bits: int) -> Access:
        def load(cpu: Cpu) -> int:
            value: int = getattr(guest_segments.find(cpu.state, name), attribute)
            return value

        def store(cpu: Cpu, value: int) -> None:
            guest_segments.set_hidden(cpu, name, attribute, value)

        suffix = "attr" if attribute == "attributes" else attribute
        return Access(_system(f"{name}_{suffix}", type_, bits), load, store)

    return part("base", "data_ptr", 32), part("limit", "uint32", 32), part("attributes", "segment_attributes", 16)


def _system_selector(name: str) -> Access:
    return Access(
        _system(name, "uint16", 16),
        lambda cpu: guest_segments.find(cpu.state, name).selector,
        lambda cpu, value: guest_segments.load_system_selector(cpu, name, value),
    )


def _write_eip(cpu: Cpu, value: int) -> None:
    """The guest goes on at another place: what the CPU was in the middle of (HLT, a REP) is over."""
    if value != cpu.state.eip:
        cpu.state.halted = 0
        cpu.repeating = False
    cpu.state.eip = value


def _ignore(_cpu: Cpu, _value: int) -> None:
    """Time goes on, whatever gdb wants to have back.

    After a call of a guest function gdb for i386 writes back every register, whatever `save_restore` says.
    """


def _write_linear_pc(cpu: Cpu, value: int) -> None:
    _write_eip(cpu, (value - cpu.state.segments[SegmentRegister.CS].base) & MASK32)


def _msr(msr: control.Msr) -> Access:
    write_msr = _ignore if msr.number == _TSC_MSR else msr.write
    return Access(_system(f"ia32_{msr.name.lower()}", "uint64", 64), msr.read, write_msr)


_CORE: tuple[Access, ...] = (
    *(_gpr(number, name) for number, name in enumerate(_GPR)),
    Access(Register("eip", type="code_ptr"), lambda cpu: cpu.state.eip, _write_eip),
    Access(Register("eflags", type="i386_eflags"), lambda cpu: cpu.state.eflags, _write_eflags),
    *(_selector(name) for name in _GDB_SEGMENTS),
    *guest_fpu.X87,
)
_SEGMENTS: tuple[Access, ...] = (
    *(access for name in _GDB_SEGMENTS for access in _hidden(name)),
    *(access for name in ("ldtr", "tr") for access in (_system_selector(name), *_hidden(name))),
    *_table_register("gdtr"),
    *_table_register("idtr"),
)
_CONTROL: tuple[Access, ...] = (
    _control_register(0, "cr0_flags"),
    _control_register(2, "data_ptr"),
    _control_register(3, "uint32"),
    _control_register(4, "cr4_flags"),
    Access(_system("cpl"), lambda cpu: cpu.state.cpl),
)
_DEBUG: tuple[Access, ...] = tuple(_debug_register(number) for number in (0, 1, 2, 3, 6, 7))
_MSRS: tuple[Access, ...] = tuple(_msr(msr) for msr in control.MSRS.values())
_MACHINE: tuple[Access, ...] = (
    Access(_system("icount", "uint64", 64), lambda cpu: cpu.clock.icount, _ignore),
    Access(_system("pc_linear", "code_ptr"), linear_pc, _write_linear_pc),
)
_ACCESSES: tuple[Access, ...] = (*_CORE, *guest_fpu.SSE, *_SEGMENTS, *_CONTROL, *_DEBUG, *_MSRS, *_MACHINE)


def _registers(accesses: tuple[Access, ...]) -> tuple[Register, ...]:
    return tuple(access.register for access in accesses)


DESCRIPTION = Description(
    (
        Feature("org.gnu.gdb.i386.core", _registers(_CORE), (EFLAGS_TYPE,)),
        Feature("org.gnu.gdb.i386.sse", _registers(guest_fpu.SSE), guest_fpu.SSE_TYPES),
        Feature("org.trapgate.i386.segments", _registers(_SEGMENTS), (ATTRIBUTES_TYPE,)),
        Feature("org.trapgate.i386.control", _registers(_CONTROL), (CR0_TYPE, CR4_TYPE)),
        Feature("org.trapgate.i386.debug", _registers(_DEBUG), (DR6_TYPE, DR7_TYPE)),
        Feature("org.trapgate.i386.msr", _registers(_MSRS)),
        Feature("org.trapgate.machine", _registers(_MACHINE)),
    )
)
"""All registers of the guest. It has no architecture element: with one, `set architecture i8086` would not work."""
