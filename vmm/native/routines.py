"""In-TC emulation: routines in the TC that do what system instructions do, without leaving it.

They read descriptor tables, TSS and stacks through the windows, as the CPU does, so nothing of the guest's is cached.
What is not plain (segments that are not flat, descriptors not accessed yet, gates of 16 bits, anything that faults)
ends in a callout with everything as before. They must not know fragments or engines.

A routine finds its argument in R9D, the addresses of its instruction and of the next one in the state block, and in R8
the host address to go on at, unless it goes elsewhere. It saves EAX, ECX, EDX and RFLAGS first, so that whoever handles
a fault of a window can put them back. It keeps nothing on the stack of return addresses, which may be reset any time.

Source: SDM Vol. 2, "POPF", "IRET/IRETD", "INT n", "SYSENTER", "SYSEXIT", "MOV" to a segment register; Vol. 3A, "Segment
Descriptors" and "Interrupt and Exception Handling".
"""

from __future__ import annotations

from machine.flags import AC, ID, IF, IOPL, NT, TF
from machine.memory import PAGE_SHIFT
from machine.state import DS, ES, FS, GS
from vmm.native import farroutines, realroutines
from vmm.native.assembler import Assembler
from vmm.native.crossings import emit_arrival, emit_interrupt, emit_iret, emit_sysenter, emit_sysexit
from vmm.native.delivery import emit_delivery
from vmm.native.faultroutine import emit_fault, emit_soft_fault
from vmm.native.fpuroutines import emit_fpu_routines
from vmm.native.operands import (
    EAX,
    EBX,
    ECX,
    EDX,
    R8,
    R8D,
    R9,
    R9D,
    R15,
    RAX,
    RCX,
    Label,
    Memory,
)  # fmt: skip
from vmm.native.routine import FLAT_DATA, NULLABLE, RPL, SAVED, Routine
from vmm.native.softroutines import emit_soft_routines
from vmm.native.stateblock import ADDRESS_SPACES, OFFSETS, field, qword_of, segment_base, segment_bound, word

# A descriptor of a segment that was accessed and present, of data that grows up, without base, limit, W, D and G.
_ANY_DATA_FIXED = 0x9D00
_ANY_DATA = 0x9100
_WRITABLE_BIT = 0x200
_GRANULAR_BIT = 0x0080_0000

WITH_IMAGE = (
    "popf",
    "popfw",
    "int",
    "iret",
    "real int",
    "real iret",
    "soft fault",
    "deliver",
    "arrive",
)  # behind all others; they keep all of RFLAGS

_DATA_REGISTERS = ((ES, "es"), (DS, "ds"), (FS, "fs"), (GS, "gs"))


def emit_routines(assembler: Assembler, callout: int, refusal: int, fault_exit: int, soft_exit: int) -> dict[str, int]:
    """Emit all; returns their offsets by name.

    Args:
        assembler: where to.
        callout: host address of the exit for a callout.
        refusal: host address of the exit for an interrupt that Python has to deliver.
        fault_exit: that of the exit for a signal.
        soft_exit: that of the exit for what the software path cannot do.
    """
    entries: dict[str, int] = {}

    def begin(name: str, *, saves: bool = True, out: int = callout) -> Routine:
        assembler.align(16)
        entries[name] = len(assembler.code)
        return Routine(assembler, out, has_image=name in WITH_IMAGE, saves=saves)

    soft_failed, page_fault, divide_error, deliver = Label(), Label(), Label(), Label()
    emit_soft_routines(begin, soft_failed)
    for number, name in _DATA_REGISTERS:
        _emit_load(begin(f"load {name}"), number)
        if number not in NULLABLE:
            _emit_load(begin(f"load flat {name}"), number, flat=True)
    emit_sysenter(begin("sysenter"))
    emit_sysexit(begin("sysexit"))
    _emit_load_cr3(begin("load cr3"))
    _emit_cpuid(begin("cpuid"))
    emit_fpu_routines(begin)
    farroutines.emit_far_jump(begin("far jump"))
    farroutines.emit_far_call(begin("far call"))
    farroutines.emit_far_return(begin("far return"))
    realroutines.emit_far_jump(begin("real jump"))
    realroutines.emit_far_call(begin("real call"))
    realroutines.emit_far_return(begin("real return"))
    _emit_popf(begin(WITH_IMAGE[0]))
    _emit_popf(begin("popfw"), narrow=True)
    emit_interrupt(begin("int"))
    emit_iret(begin("iret"))
    realroutines.emit_interrupt(begin("real int"))
    realroutines.emit_interrupt_return(begin("real iret"))
    assembler.align(16)
    assembler.bind(soft_failed)
    emit_soft_fault(begin("soft fault"), soft_exit, page_fault, divide_error)
    assembler.align(16)
    entries["fault"] = len(assembler.code)
    emit_fault(assembler, fault_exit, page_fault, divide_error, deliver)
    emit_delivery(begin("deliver", saves=False), deliver)
    emit_arrival(begin("arrive", out=refusal))
    return entries


def _emit_load(writer: Routine, number: int, *, flat: bool = False) -> None:
    """Load ES, DS, FS or GS with the selector in R9D; `flat`: only with a segment that is."""
    emit = writer.emit
    emit("mov", field("routine_return"), R8)
    done, not_null = Label(), Label()
    if not flat:
        emit("test", R9D, 0xFFFC)
        emit("jne", not_null)
        emit("mov", word("segments", 2 * number), R9D)
        writer.make_unusable(number)
        emit("jmp", done)
        writer.asm.bind(not_null)
    writer.use_kernel_window()
    writer.read_descriptor(R9D)
    if flat:
        writer.need_flat(FLAT_DATA)
    else:
        emit("mov", EAX, EDX)
        emit("and", EAX, _ANY_DATA_FIXED)
        writer.need(EAX, _ANY_DATA)
        emit("mov", R8D, ECX)
    # DPL >= CPL and DPL >= RPL
    writer.dpl(ECX)
    emit("cmp", ECX, field("cpl"))
    writer.unless("ae")
    emit("mov", EAX, R9D)
    emit("and", EAX, RPL)
    emit("cmp", ECX, EAX)
    writer.unless("ae")
    if not flat:
        _emit_base_and_bounds(writer, number)
    emit("mov", word("segments", 2 * number), R9D)
    emit("mov", word("segments", 2 * number + 1), EDX)
    writer.use_own_window()
    writer.asm.bind(done)
    writer.succeed()
    writer.fail()


def _emit_base_and_bounds(writer: Routine, number: int) -> None:
    """Base and bounds of a segment whose descriptor is in R8D and EDX, data that grows up; clobbers EAX and ECX."""
    emit = writer.emit
    emit("mov", EAX, EDX)
    emit("shl", EAX, 16)
    emit("mov", ECX, R8D)
    emit("shr", ECX, 16)
    emit("or", EAX, ECX)
    emit("and", EAX, 0x00FF_FFFF)
    emit("mov", ECX, EDX)
    emit("and", ECX, 0xFF00_0000)
    emit("or", EAX, ECX)
    emit("mov", segment_base(number), EAX)
    emit("mov", EAX, EDX)
    emit("and", EAX, 0x000F_0000)
    emit("mov", ECX, R8D)
    emit("and", ECX, 0xFFFF)
    emit("or", ECX, EAX)
    bytewise, writable = Label(), Label()
    emit("test", EDX, _GRANULAR_BIT)
    emit("je", bytewise)
    emit("shl", ECX, 12)
    emit("or", ECX, 0xFFF)
    writer.asm.bind(bytewise)
    emit("not", RCX)
    emit("mov", segment_bound(number, write=False), RCX)
    emit("test", EDX, _WRITABLE_BIT)
    emit("jne", writable)
    emit("mov", ECX, 0)
    writer.asm.bind(writable)
    emit("mov", segment_bound(number, write=True), RCX)


def _emit_popf(writer: Routine, *, narrow: bool = False) -> None:
    """POPFD, or POPF, with the image in R9D; ESP is the caller's to move."""
    emit = writer.emit
    emit("mov", field("routine_return"), R8)
    if narrow:
        emit("mov", EAX, field("system_flags"))
        emit("and", EAX, ID)
        emit("or", R9D, EAX)
    outer, load = Label(), Label()
    emit("test", R9D, TF | NT | AC)
    writer.unless("e")
    emit("test", field("system_flags"), NT | AC)
    writer.unless("e")
    emit("cmp", field("cpl"), 0)
    emit("jne", outer)
    # CPL 0: IF and IOPL too.
    emit("test", R9D, IF)
    emit("je", load)
    emit("cmp", field("pending"), 0)
    writer.unless("e")
    writer.asm.bind(load)
    writer.load_interrupt_flag(R9D)
    writer.load_system_flags(R9D, IOPL)
    common = Label()
    emit("jmp", common)
    writer.asm.bind(outer)
    # CPL 3: IF stays unless IOPL is 3, which is for the interpreter.
    emit("mov", EAX, field("system_flags"))
    emit("and", EAX, IOPL)
    emit("cmp", EAX, IOPL)
    writer.unless("ne")
    writer.asm.bind(common)
    writer.load_system_flags(R9D, ID)
    writer.load_rflags(R9D)
    writer.succeed()
    writer.fail()


def _emit_cpuid(writer: Routine) -> None:
    """CPUID of leaves 0 and 1."""
    emit = writer.emit
    first = Label()
    emit("mov", field("routine_return"), R8)
    emit("mov", EAX, word("routine_registers", 0))  # AX has the status flags
    for leaf in (1, 0):
        emit("cmp", EAX, leaf)
        if leaf:
            emit("jne", first)
        else:
            writer.unless("e")
        for number, register in enumerate((EAX, EBX, ECX, EDX)):
            source = word("cpuid", 4 * leaf + number)
            if register is EBX:
                emit("mov", EBX, source)
            else:
                emit("mov", R9D, source)
                emit("mov", word("routine_registers", SAVED.index(register)), R9D)
        writer.succeed()
        if leaf:
            writer.asm.bind(first)
    writer.fail()


def _emit_load_cr3(writer: Routine) -> None:
    """MOV CR3 in ring 0 with the value in R9D, if its page tables were used lately; goes on in their space."""
    emit = writer.emit
    emit("mov", EAX, R9D)
    emit("shr", EAX, PAGE_SHIFT)
    emit("and", EAX, ADDRESS_SPACES - 1)
    # Eight bytes five times: CR3, and two spaces of two addresses.
    emit("lea", EAX, Memory(0, EAX, EAX, 4))
    emit("shl", EAX, 3)
    emit("cmp", _slot(0), R9)
    writer.unless("e")
    emit("cmp", _slot(16), 0)
    writer.unless("ne")
    for number, name in ((24, "user_space"), (8, "kernel_space")):
        for half in (0, 1):
            emit("mov", R8, _slot(number + 8 * half))
            emit("mov", qword_of(name, half), R8)
    emit("mov", field("cr3"), R9D)
    emit("mov", R8D, field("routine_next"))
    writer.enter_space("kernel_space")
    writer.go_on()
    writer.fail()


def _slot(offset: int) -> Memory:
    """A field of the address space at offset RAX."""
    return Memory(64, R15, RAX, 1, OFFSETS["address_spaces"] + offset)
