"""One routine of in-TC emulation in the making: how each begins and ends, and what several of them have in common.

It must not know which instruction a routine is for.
"""

from __future__ import annotations

from machine.flags import DF, IF, STATUS_MASK
from machine.state import FS, GS
from vmm.native.assembler import Assembler
from vmm.native.operands import (
    AL,
    EAX,
    ECX,
    EDX,
    R8,
    R8D,
    R9,
    R9D,
    R10,
    R13,
    R14,
    RAX,
    Label,
    Memory,
    Register,
    address,
)  # fmt: skip
from vmm.native.stateblock import field, qword_of, segment_base, segment_bound, word

# Descriptors of flat segments that were accessed, G, D and P set, base 0, limit FFFFFh: bits 31:0, and bits 63:32
# without DPL and AVL.
FLAT_LOW = 0x0000_FFFF
FLAT_DATA = 0x00CF_9300
FLAT_CODE = 0x00CF_9B00
CONFORMING = 0x0C00  # both bits: of code
DPL = 0x6000
DPL_BIT = 13
AVL = 0x0010_0000
RPL = 3
_TI = 4
RFLAGS = STATUS_MASK | DF  # flags of the guest that live in the host's RFLAGS
HOST_FLAGS = 2 | IF  # the rest of RFLAGS while emitted code runs

_LAHF_MASK = 0xD5
_OF_BIT = 11

NULLABLE = (FS, GS)
SAVED = (EAX, ECX, EDX)


def linear(register: Register, offset: int = 0, bits: int = 32) -> Memory:
    """Guest memory, in whatever window GS points to."""
    return Memory(bits, register, displacement=offset, gs=True)


def rflags_of(status: int, rflags: int) -> int:
    """RFLAGS from what LAHF and SETO left in AX, and DF, which routines leave alone, from RFLAGS as they are."""
    return rflags & DF | HOST_FLAGS | status >> 8 & _LAHF_MASK | (status & 1) << _OF_BIT


class Routine:
    """Emits one routine: its beginning, its ends, and what several of them have in common."""

    def __init__(self, assembler: Assembler, callout: int, *, has_image: bool, saves: bool = True) -> None:
        """Emit the beginning.

        Args:
            assembler: where to.
            callout: host address of the exit for a callout.
            has_image: all of RFLAGS is kept aside, for a routine that pushes or loads them; else the status flags
                alone, by LAHF, SETO and back, which take a fraction of PUSHFQ's and POPFQ's time; AX is lost.
            saves: False: whoever jumps here has saved the same already.
        """
        self.asm = assembler
        self.emit = assembler.emit
        self.failed = Label()
        self._callout = callout
        self._has_image = has_image
        if not saves:
            return
        for number, register in enumerate(SAVED):
            self.emit("mov", word("routine_registers", number), register)
        if has_image:
            self.emit("pushfq")
            self.emit("pop", field("routine_flags"))
        else:
            self.emit("lahf")
            self.emit("seto", AL)
            self.emit("mov", field("routine_status"), EAX)

    def load_saved(self) -> None:
        """EAX, ECX, EDX and RFLAGS as they were."""
        if self._has_image:
            # As LAHF and SETO would have left them; POPFQ takes several times as long, and DF is what it is to be.
            self.emit("mov", EAX, word("routine_flags", 0))
            self.emit("mov", ECX, EAX)
            self.emit("and", EAX, _LAHF_MASK)
            self.emit("shl", EAX, 8)
            self.emit("shr", ECX, _OF_BIT)
            self.emit("and", ECX, 1)
            self.emit("or", EAX, ECX)
        else:
            self.emit("mov", EAX, field("routine_status"))
        self.emit("add", AL, 0x7F)  # overflows from 1 alone
        self.emit("sahf")
        for number, register in enumerate(SAVED):
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
        """GS = the supervisor's window of this address space; tables and inner stacks are read with its rights.

        At CPL 0 it is that already; WRGSBASE takes longer than most routines without it.
        """
        used = Label()
        self.emit("cmp", field("cpl"), 0)
        self.emit("je", used)
        self.emit("mov", RAX, qword_of("kernel_space", 0))
        self.emit("test", RAX, RAX)
        self.unless("ne")
        self.emit("wrgsbase", RAX)
        self.asm.bind(used)

    def use_own_window(self) -> None:
        """GS = the current window, after `use_kernel_window`."""
        used = Label()
        self.emit("cmp", field("cpl"), 0)
        self.emit("je", used)
        self.emit("mov", RAX, field("window"))
        self.emit("wrgsbase", RAX)
        self.asm.bind(used)

    def find_gate(self, bytes_log2: int) -> None:
        """R9D = where the entry of the vector in R9D is, in an IDT of such entries; fails beyond its limit."""
        self.emit("shl", R9D, bytes_log2)
        self.emit("lea", ECX, Memory(0, R9D, displacement=(1 << bytes_log2) - 1))
        self.emit("cmp", ECX, field("idt_limit"))
        self.unless("be")
        self.emit("add", R9D, field("idt_base"))

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
        self.emit("mov", ECX, linear(EAX))
        self.emit("mov", EDX, linear(EAX, 4))

    def need_flat(self, kind: int) -> None:
        """Fail unless ECX, EDX are the descriptor of a flat segment of a kind; clobbers ECX and leaves EDX."""
        self.need(ECX, FLAT_LOW)
        self.emit("mov", ECX, EDX)
        self.emit("and", ECX, 0xFFFF_FFFF & ~(DPL | AVL))
        self.need(ECX, kind)

    def dpl(self, destination: Register) -> None:
        """Let `destination` be DPL of the descriptor in EDX."""
        self.emit("mov", destination, EDX)
        self.emit("shr", destination, DPL_BIT)
        self.emit("and", destination, 3)

    def enter_space(self, name: str, *, is_used: bool = False) -> None:
        """Make a space current that is known to exist: GS if it is not that yet, R14, and what an exit would say."""
        self.emit("mov", RAX, qword_of(name, 0))
        if not is_used:
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
        self.emit("and", destination, RFLAGS)
        self.emit("or", destination, field("interrupt_flag"))
        self.emit("or", destination, field("system_flags"))
        self.emit("or", destination, 2)

    def make_unusable(self, number: int) -> None:
        """What a null selector leaves in a data segment register, but for the selector."""
        self.emit("mov", word("segments", 2 * number + 1), 0)
        self.emit("mov", segment_base(number), 0)
        for write in (False, True):
            self.emit("mov", segment_bound(number, write=write), 0)

    def load_interrupt_flag(self, image: Register | Memory) -> None:
        """IF = that of an image of EFLAGS; EAX is lost."""
        self.emit("mov", EAX, image)
        self.emit("and", EAX, IF)
        self.emit("mov", field("interrupt_flag"), EAX)

    def load_rflags(self, image: Register | Memory) -> None:
        """DF, and the status flags that `load_saved` loads, = those of an image of EFLAGS; EAX is lost."""
        up, done = Label(), Label()
        self.emit("test", image, DF)
        self.emit("je", up)
        self.emit("std")
        self.emit("jmp", done)
        self.asm.bind(up)
        self.emit("cld")
        self.asm.bind(done)
        self.emit("mov", EAX, image)
        self.emit("mov", word("routine_flags", 0), EAX)

    def load_system_flags(self, image: Register | Memory, mask: int) -> None:
        """Load some of IOPL, ID and their like from an image of EFLAGS; EAX is lost."""
        self.emit("mov", EAX, image)
        self.emit("and", EAX, mask)
        self.emit("and", field("system_flags"), 0xFFFF_FFFF & ~mask)
        self.emit("or", field("system_flags"), EAX)

    def probe(self, base: Register, first: int, last: int) -> None:
        """Fault here if the stack cannot be written to, at `last` first, as a push from the top down would."""
        self.emit("or", linear(base, last), 0)
        self.emit("or", linear(base, first), 0)


_INVERSE = {
    "e": "ne", "ne": "e", "b": "ae", "ae": "b", "be": "a", "a": "be", "s": "ns",
}  # fmt: skip
