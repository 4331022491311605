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

from machine.flags import AC, DF, ID, IF, IOPL, NT, RF, STATUS_MASK, TF, VIF, VIP, VM
from machine.memory import PAGE_SHIFT
from machine.state import CS, DS, ES, FS, GS, SS
from vmm.native.assembler import Assembler
from vmm.native.operands import (
    EAX,
    EBX,
    ECX,
    EDX,
    R8,
    R8D,
    R9,
    R9D,
    R10,
    R12D,
    R13,
    R14,
    R15,
    RAX,
    RCX,
    Label,
    Memory,
    Register,
    address,
)  # fmt: skip
from vmm.native.stateblock import ADDRESS_SPACES, OFFSETS, field, qword_of, segment_base, segment_bound, word

# Descriptors of flat segments that were accessed, G, D and P set, base 0, limit FFFFFh: bits 31:0, and bits 63:32
# without DPL and AVL.
_FLAT_LOW = 0x0000_FFFF
_FLAT_DATA = 0x00CF_9300
_FLAT_CODE = 0x00CF_9B00
_DPL = 0x6000
_DPL_BIT = 13
_AVL = 0x0010_0000
# The same of data that grows up, without base, limit, W, D and G.
_ANY_DATA_FIXED = 0x9D00
_ANY_DATA = 0x9100
_WRITABLE_BIT = 0x200
_GRANULAR_BIT = 0x0080_0000
_RPL = 3
_TI = 4
_GATE_FIXED = 0x9F00 & ~0x0100  # P, S and type without the bit that tells trap from interrupt gates
_GATE_32 = 0x8E00
_TRAP_GATE_BIT = 0x0100
_RFLAGS = STATUS_MASK | DF
_HOST_FLAGS = 2 | IF
_LOADED = TF | NT | VM | VIF | VIP | AC  # a popped image with any of these is for the interpreter

_DATA_REGISTERS = ((ES, "es"), (DS, "ds"), (FS, "fs"), (GS, "gs"))
_NULLABLE = (FS, GS)
_SAVED = (EAX, ECX, EDX)


def _linear(register: Register, offset: int = 0, bits: int = 32) -> Memory:
    """Guest memory, in whatever window GS points to."""
    return Memory(bits, register, displacement=offset, gs=True)


class _Writer:
    """Emits one routine: its beginning, its ends, and what several of them have in common."""

    def __init__(self, assembler: Assembler, callout: int) -> None:
        self.asm = assembler
        self.emit = assembler.emit
        self.failed = Label()
        self._callout = callout
        for number, register in enumerate(_SAVED):
            self.emit("mov", word("routine_registers", number), register)
        self.emit("pushfq")
        self.emit("pop", field("routine_flags"))

    def load_saved(self) -> None:
        """EAX, ECX, EDX and RFLAGS as they were."""
        self.emit("push", field("routine_flags"))
        self.emit("popfq")
        for number, register in enumerate(_SAVED):
            self.emit("mov", register, word("routine_registers", number))

    def fail(self) -> None:
        """The end for what is not plain: a callout of the instruction, which was charged for and did not retire."""
        self.asm.bind(self.failed)
        self.load_saved()
        self.emit("mov", R8, field("window"))
        self.emit("wrgsbase", R8)
        self.emit("lea", R10, address(R10, 1))
        self.emit("mov", R8D, field("routine_eip"))
        self.asm.jump_to("jmp", self._callout)

    def succeed(self) -> None:
        """The end of a routine that goes on where it was left for."""
        self.load_saved()
        self.emit("mov", field("shadow"), 0)
        self.emit("jmp", field("routine_return"))

    def go_on(self) -> None:
        """The end of a routine that goes on at the guest address in R8D, in the space that was made current."""
        self.load_saved()
        self.emit("mov", field("shadow"), 0)
        self.emit("mov", R9D, Memory(32, R14, R8, 4))
        self.emit("lea", R9, address(R13, index=R9))
        self.emit("jmp", R9)

    def unless(self, condition: str) -> None:
        """Fail unless the flags of the host say `condition`."""
        self.emit(f"j{_INVERSE[condition]}", self.failed)

    def need(self, operand: Register | Memory, value: int) -> None:
        """Fail unless the operand is `value`."""
        self.emit("cmp", operand, value)
        self.unless("e")

    def use_kernel_window(self) -> None:
        """GS = the supervisor's window of this address space; tables and inner stacks are read with its rights."""
        self.emit("mov", RAX, qword_of("kernel_space", 0))
        self.emit("test", RAX, RAX)
        self.unless("ne")
        self.emit("wrgsbase", RAX)

    def read_descriptor(self, selector: Register) -> None:
        """ECX, EDX = the descriptor in the GDT; EAX is its address. Fails for null, the LDT, and beyond the limit."""
        self.emit("test", selector, 0xFFFC)
        self.unless("ne")
        self.emit("test", selector, _TI)
        self.unless("e")
        self.emit("mov", EAX, selector)
        self.emit("and", EAX, 0xFFF8)
        self.emit("lea", ECX, Memory(0, EAX, displacement=7))
        self.emit("cmp", ECX, field("gdt_limit"))
        self.unless("be")
        self.emit("add", EAX, field("gdt_base"))
        self.emit("mov", ECX, _linear(EAX))
        self.emit("mov", EDX, _linear(EAX, 4))

    def need_flat(self, kind: int) -> None:
        """Fail unless ECX, EDX are the descriptor of a flat segment of a kind; clobbers ECX and leaves EDX."""
        self.need(ECX, _FLAT_LOW)
        self.emit("mov", ECX, EDX)
        self.emit("and", ECX, 0xFFFF_FFFF & ~(_DPL | _AVL))
        self.need(ECX, kind)

    def dpl(self, destination: Register) -> None:
        """Let `destination` be DPL of the descriptor in EDX."""
        self.emit("mov", destination, EDX)
        self.emit("shr", destination, _DPL_BIT)
        self.emit("and", destination, 3)

    def enter_space(self, name: str) -> None:
        """Make a space current that is known to exist: GS, R14 and what an exit would say."""
        self.emit("mov", RAX, qword_of(name, 0))
        self.emit("wrgsbase", RAX)
        self.emit("mov", field("window"), RAX)
        self.emit("mov", R14, qword_of(name, 1))
        self.emit("mov", field("dispatch"), R14)

    def need_space(self, name: str) -> None:
        """Fail unless emitted code knows a space."""
        self.emit("cmp", qword_of(name, 1), 0)
        self.unless("ne")

    def flags_image(self, destination: Register) -> None:
        """Let `destination` be EFLAGS as they were when the routine began; VM, RF and TF are clear in the TC."""
        self.emit("mov", destination, word("routine_flags", 0))
        self.emit("and", destination, _RFLAGS)
        self.emit("or", destination, field("interrupt_flag"))
        self.emit("or", destination, field("system_flags"))
        self.emit("or", destination, 2)

    def probe(self, base: Register, first: int, last: int) -> None:
        """Fault here if the stack cannot be written to, at `last` first, as a push from the top down would."""
        self.emit("or", _linear(base, last), 0)
        self.emit("or", _linear(base, first), 0)


_INVERSE = {
    "e": "ne", "ne": "e", "b": "ae", "ae": "b", "be": "a", "a": "be",
}  # fmt: skip


def emit_routines(assembler: Assembler, callout: int) -> dict[str, int]:
    """Emit all; returns their offsets by name.

    Args:
        assembler: where to.
        callout: host address of the exit for a callout.
    """
    entries: dict[str, int] = {}

    def begin(name: str) -> _Writer:
        assembler.align(16)
        entries[name] = len(assembler.code)
        return _Writer(assembler, callout)

    for number, name in _DATA_REGISTERS:
        _emit_load(begin(f"load {name}"), number)
        if number not in _NULLABLE:
            _emit_load(begin(f"load flat {name}"), number, flat=True)
    _emit_popf(begin("popf"))
    _emit_popf(begin("popfw"), narrow=True)
    _emit_interrupt(begin("int"))
    _emit_iret(begin("iret"))
    _emit_sysenter(begin("sysenter"))
    _emit_sysexit(begin("sysexit"))
    _emit_load_cr3(begin("load cr3"))
    _emit_cpuid(begin("cpuid"))
    return entries


def _emit_load(writer: _Writer, number: int, *, flat: bool = False) -> None:
    """Load ES, DS, FS or GS with the selector in R9D; `flat`: only with a segment that is."""
    emit = writer.emit
    emit("mov", field("routine_return"), R8)
    done, not_null = Label(), Label()
    if not flat:
        emit("test", R9D, 0xFFFC)
        emit("jne", not_null)
        emit("mov", word("segments", 2 * number), R9D)
        _emit_unusable(writer, number)
        emit("jmp", done)
        writer.asm.bind(not_null)
    writer.use_kernel_window()
    writer.read_descriptor(R9D)
    if flat:
        writer.need_flat(_FLAT_DATA)
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
    emit("and", EAX, _RPL)
    emit("cmp", ECX, EAX)
    writer.unless("ae")
    if not flat:
        _emit_base_and_bounds(writer, number)
    emit("mov", word("segments", 2 * number), R9D)
    emit("mov", word("segments", 2 * number + 1), EDX)
    emit("mov", RAX, field("window"))
    emit("wrgsbase", RAX)
    writer.asm.bind(done)
    writer.succeed()
    writer.fail()


def _emit_unusable(writer: _Writer, number: int) -> None:
    """What a null selector leaves in a data segment register, but for the selector."""
    writer.emit("mov", word("segments", 2 * number + 1), 0)
    writer.emit("mov", segment_base(number), 0)
    for write in (False, True):
        writer.emit("mov", segment_bound(number, write=write), 0)


def _emit_base_and_bounds(writer: _Writer, number: int) -> None:
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


def _emit_popf(writer: _Writer, *, narrow: bool = False) -> None:
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
    emit("mov", EAX, R9D)
    emit("and", EAX, IF)
    emit("mov", field("interrupt_flag"), EAX)
    emit("mov", EAX, R9D)
    emit("and", EAX, IOPL)
    emit("and", field("system_flags"), 0xFFFF_FFFF & ~IOPL)
    emit("or", field("system_flags"), EAX)
    common = Label()
    emit("jmp", common)
    writer.asm.bind(outer)
    # CPL 3: IF stays unless IOPL is 3, which is for the interpreter.
    emit("mov", EAX, field("system_flags"))
    emit("and", EAX, IOPL)
    emit("cmp", EAX, IOPL)
    writer.unless("ne")
    writer.asm.bind(common)
    emit("mov", EAX, R9D)
    emit("and", EAX, ID)
    emit("and", field("system_flags"), 0xFFFF_FFFF & ~ID)
    emit("or", field("system_flags"), EAX)
    emit("and", R9D, _RFLAGS)
    emit("or", R9D, _HOST_FLAGS)
    emit("mov", word("routine_flags", 0), R9D)
    writer.succeed()
    writer.fail()


def _emit_interrupt(writer: _Writer) -> None:
    """INT n with the vector in R9D, through an interrupt or trap gate of 32 bits to flat code of ring 0."""
    emit = writer.emit
    inner, pushed = Label(), Label()
    emit("cmp", field("pending"), 0)
    writer.unless("e")
    emit("test", field("system_flags"), VIF | VIP)
    writer.unless("e")
    writer.need_space("kernel_space")
    writer.use_kernel_window()
    emit("shl", R9D, 3)
    emit("lea", ECX, Memory(0, R9D, displacement=7))
    emit("cmp", ECX, field("idt_limit"))
    writer.unless("be")
    emit("add", R9D, field("idt_base"))
    emit("mov", R8D, _linear(R9D))
    emit("mov", EDX, _linear(R9D, 4))
    emit("mov", EAX, EDX)
    emit("and", EAX, _GATE_FIXED)
    writer.need(EAX, _GATE_32)
    writer.dpl(EAX)
    emit("cmp", EAX, field("cpl"))
    writer.unless("ae")
    emit("mov", field("routine_access"), EDX)  # the gate, for its type
    emit("mov", R9D, R8D)
    emit("shr", R9D, 16)  # the selector
    emit("and", EDX, 0xFFFF_0000)
    emit("and", R8D, 0xFFFF)
    emit("or", R8D, EDX)  # the handler
    writer.read_descriptor(R9D)
    writer.need_flat(_FLAT_CODE)
    emit("test", EDX, _DPL)
    writer.unless("e")
    emit("mov", field("routine_selector"), EDX)
    emit("cmp", field("cpl"), 0)
    emit("jne", inner)
    # The same ring: three doublewords on the same stack.
    writer.probe(R12D, -12, -4)
    writer.flags_image(EAX)
    emit("mov", _linear(R12D, -4), EAX)
    emit("mov", EAX, word("segments", 2 * CS))
    emit("mov", _linear(R12D, -8), EAX)
    emit("mov", EAX, field("routine_next"))
    emit("mov", _linear(R12D, -12), EAX)
    emit("lea", R12D, Memory(0, R12D, displacement=-12))
    emit("jmp", pushed)
    writer.asm.bind(inner)
    _emit_inner_frame(writer)
    writer.asm.bind(pushed)
    emit("and", R9D, 0xFFFF & ~_RPL)
    emit("mov", word("segments", 2 * CS), R9D)
    emit("mov", EDX, field("routine_selector"))
    emit("mov", word("segments", 2 * CS + 1), EDX)
    emit("and", field("system_flags"), 0xFFFF_FFFF & ~NT)
    trap = Label()
    emit("test", field("routine_access"), _TRAP_GATE_BIT)
    emit("jne", trap)
    emit("mov", field("interrupt_flag"), 0)
    writer.asm.bind(trap)
    emit("mov", field("cpl"), 0)
    writer.enter_space("kernel_space")
    writer.go_on()
    writer.fail()


def _emit_inner_frame(writer: _Writer) -> None:
    """The stack of ring 0 from the TSS, and five doublewords on it; keeps R8D and R9D."""
    emit = writer.emit
    emit("mov", EAX, field("inner_stack"))
    emit("test", EAX, EAX)
    writer.unless("ne")
    emit("mov", word("segments_new", 0), R9D)
    emit("movzx", R9D, _linear(EAX, 4, 16))
    emit("mov", EAX, _linear(EAX))
    emit("mov", word("segments_new", 1), EAX)
    emit("test", R9D, _RPL)
    writer.unless("e")
    writer.read_descriptor(R9D)
    writer.need_flat(_FLAT_DATA)
    emit("test", EDX, _DPL)
    writer.unless("e")
    emit("mov", EAX, word("segments_new", 1))
    writer.probe(EAX, -20, -4)
    emit("mov", ECX, word("segments", 2 * SS))
    emit("mov", _linear(EAX, -4), ECX)
    emit("mov", _linear(EAX, -8), R12D)
    writer.flags_image(ECX)
    emit("mov", _linear(EAX, -12), ECX)
    emit("mov", ECX, word("segments", 2 * CS))
    emit("mov", _linear(EAX, -16), ECX)
    emit("mov", ECX, field("routine_next"))
    emit("mov", _linear(EAX, -20), ECX)
    emit("mov", word("segments", 2 * SS), R9D)
    emit("mov", word("segments", 2 * SS + 1), EDX)
    emit("lea", R12D, Memory(0, EAX, displacement=-20))
    emit("mov", R9D, word("segments_new", 0))


def _emit_iret(writer: _Writer) -> None:
    """IRETD to flat code of the same ring, or from ring 0 to ring 3."""
    emit = writer.emit
    outer, flags_known = Label(), Label()
    emit("mov", R8D, _linear(R12D))
    emit("movzx", R9D, _linear(R12D, 4, 16))
    emit("mov", EAX, _linear(R12D, 8))
    emit("test", EAX, _LOADED)
    writer.unless("e")
    emit("test", field("system_flags"), NT | VIF | VIP | AC)
    writer.unless("e")
    emit("cmp", field("pending"), 0)
    writer.unless("e")
    emit("mov", word("segments_new", 0), EAX)
    emit("mov", ECX, field("system_flags"))
    emit("and", ECX, IOPL)
    emit("cmp", ECX, IOPL)
    writer.unless("ne")  # at CPL 3 that loads IF
    writer.use_kernel_window()
    writer.read_descriptor(R9D)
    writer.need_flat(_FLAT_CODE)
    writer.dpl(ECX)
    emit("mov", EAX, R9D)
    emit("and", EAX, _RPL)
    emit("cmp", ECX, EAX)
    writer.unless("e")
    emit("cmp", EAX, field("cpl"))
    emit("jne", outer)
    emit("mov", word("segments", 2 * CS), R9D)
    emit("mov", word("segments", 2 * CS + 1), EDX)
    emit("lea", R12D, Memory(0, R12D, displacement=12))
    emit("mov", RAX, field("window"))
    emit("wrgsbase", RAX)
    emit("jmp", flags_known)
    writer.asm.bind(outer)
    # CPL is 0 here: a lower RPL than CPL fails, and 3 has no other.
    writer.need(EAX, 3)
    emit("cmp", field("cpl"), 0)
    writer.unless("e")
    writer.need_space("user_space")
    emit("mov", field("routine_selector"), R9D)
    emit("mov", field("routine_access"), EDX)
    # What ring 3 may not use becomes null: FS and GS can be, the others are for the interpreter.
    for number in (ES, DS):
        emit("mov", EAX, word("segments", 2 * number + 1))
        emit("and", EAX, _DPL)
        writer.need(EAX, _DPL)
    emit("movzx", R9D, _linear(R12D, 16, 16))
    emit("mov", EAX, R9D)
    emit("and", EAX, _RPL)
    writer.need(EAX, 3)
    writer.read_descriptor(R9D)
    writer.need_flat(_FLAT_DATA)
    emit("mov", EAX, EDX)
    emit("and", EAX, _DPL)
    writer.need(EAX, _DPL)
    emit("mov", R12D, _linear(R12D, 12))
    emit("mov", word("segments", 2 * SS), R9D)
    emit("mov", word("segments", 2 * SS + 1), EDX)
    for name in (0, 1):
        emit("mov", EAX, field(("routine_selector", "routine_access")[name]))
        emit("mov", word("segments", 2 * CS + name), EAX)
    for number in _NULLABLE:
        kept = Label()
        emit("mov", EAX, word("segments", 2 * number + 1))
        emit("and", EAX, _DPL)
        emit("cmp", EAX, _DPL)
        emit("je", kept)
        emit("mov", word("segments", 2 * number), 0)
        _emit_unusable(writer, number)
        writer.asm.bind(kept)
    # CPL was 0: IF and IOPL are loaded as well.
    emit("mov", field("cpl"), 3)
    writer.enter_space("user_space")
    _emit_load_flags(writer, with_iopl=True)
    writer.go_on()
    writer.asm.bind(flags_known)
    inner = Label()
    emit("cmp", field("cpl"), 0)
    emit("jne", inner)
    _emit_load_flags(writer, with_iopl=True)
    writer.go_on()
    writer.asm.bind(inner)
    _emit_load_flags(writer, with_iopl=False)
    writer.go_on()
    writer.fail()


def _emit_load_flags(writer: _Writer, *, with_iopl: bool) -> None:
    """EFLAGS = the image kept aside; without IOPL also without IF, for IOPL is below 3 there."""
    emit = writer.emit
    image = word("segments_new", 0)
    plain = Label()
    emit("test", image, RF)
    emit("je", plain)
    emit("mov", field("resume_budget"), R10)
    writer.asm.bind(plain)
    if with_iopl:
        emit("mov", EAX, image)
        emit("and", EAX, IF)
        emit("mov", field("interrupt_flag"), EAX)
    kept = ID | (IOPL if with_iopl else 0)
    emit("mov", EAX, image)
    emit("and", EAX, kept)
    emit("and", field("system_flags"), 0xFFFF_FFFF & ~kept)
    emit("or", field("system_flags"), EAX)
    emit("mov", EAX, image)
    emit("and", EAX, _RFLAGS)
    emit("or", EAX, _HOST_FLAGS)
    emit("mov", word("routine_flags", 0), EAX)


def _emit_sysenter(writer: _Writer) -> None:
    """SYSENTER: segments are flat by definition."""
    emit = writer.emit
    emit("mov", EAX, field("sysenter_cs"))
    emit("and", EAX, 0xFFFC)
    writer.unless("ne")
    writer.need_space("kernel_space")
    _emit_fixed_segments(writer, code=0, stack=8, level=0)
    emit("mov", field("interrupt_flag"), 0)
    emit("mov", field("cpl"), 0)
    emit("mov", R12D, field("sysenter_esp"))
    emit("mov", R8D, field("sysenter_eip"))
    writer.enter_space("kernel_space")
    writer.go_on()
    writer.fail()


def _emit_sysexit(writer: _Writer) -> None:
    """SYSEXIT from ring 0: to EDX with the stack in ECX."""
    emit = writer.emit
    emit("test", field("system_flags"), AC)
    writer.unless("e")
    emit("mov", EAX, field("sysenter_cs"))
    emit("and", EAX, 0xFFFC)
    writer.unless("ne")
    writer.need_space("user_space")
    _emit_fixed_segments(writer, code=16 | 3, stack=24 | 3, level=3)
    emit("mov", field("cpl"), 3)
    emit("mov", R12D, ECX)
    emit("mov", R8D, EDX)
    writer.enter_space("user_space")
    writer.go_on()
    writer.fail()


def _emit_fixed_segments(writer: _Writer, *, code: int, stack: int, level: int) -> None:
    """CS and SS from the base selector in EAX, with the attributes that SYSENTER and SYSEXIT give them."""
    emit = writer.emit
    for number, offset, access in ((CS, code, _FLAT_CODE), (SS, stack, _FLAT_DATA)):
        emit("lea", R9D, Memory(0, EAX, displacement=offset))
        emit("and", R9D, 0xFFFF)
        emit("mov", word("segments", 2 * number), R9D)
        emit("mov", word("segments", 2 * number + 1), access | level << _DPL_BIT)


def _emit_cpuid(writer: _Writer) -> None:
    """CPUID of leaves 0 and 1."""
    emit = writer.emit
    first = Label()
    emit("mov", field("routine_return"), R8)
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
                emit("mov", word("routine_registers", _SAVED.index(register)), R9D)
        writer.succeed()
        if leaf:
            writer.asm.bind(first)
    writer.fail()


def _emit_load_cr3(writer: _Writer) -> None:
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
