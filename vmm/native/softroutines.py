"""The software path to guest memory: routines in the TC that walk the guest's page tables for one access.

Each finds a linear address in R9D, in R8 the host address to go on at, and in the state block how long the access is;
it leaves the offset in RAM in R9D, and the guest's registers and flags alone. They cache nothing, so nothing of theirs
can be stale. What is not plain goes to `faultroutine` with everything as before, the address in `soft_linear`: a true
page fault, an address that is not in RAM, an access that straddles two pages, an A bit of an upper entry that is to be
set, a write to a page that somebody watches. Of such writes only one goes on: to an entry in a page table that nothing
depends on. Two more routines find a divisor in R9D, and go there before a division that faults for it. They must not
know which instruction they are for.

Source: SDM Vol. 3A, "32-Bit Paging", "PAE Paging" and "Accessed and Dirty Flags".
"""

from __future__ import annotations

from collections.abc import Callable

from machine.faults import PF_USER, PF_WRITE
from machine.memory import HOLDS_TABLE, HOLE_FIRST, HOLE_LAST, PAGE_SHIFT
from machine.paging import ACCESSED, DIRTY, LARGE_PAE_RESERVED, LARGE_RESERVED, PDPTE_RESERVED, PS, RW, US, P
from machine.state import CR0_WP, CR4_PAE, CR4_PSE, MASK32
from vmm.native.operands import EAX, ECX, EDX, R8, R8D, R9D, RAX, RCX, RDX, Label, Memory, Register
from vmm.native.routine import Routine
from vmm.native.shadows import HOLDS_SHADOWED_TABLE
from vmm.native.stateblock import field
from vmm.native.walkroutine import FRAME, FRAME_OF_PDPTES

DIVIDES = 1 << 31  # in `soft_access`: no access, but a divide error
_NOT_TABLE = 0xFF & ~(HOLDS_TABLE | HOLDS_SHADOWED_TABLE)


def name_of(*, user: bool, write: bool) -> str:
    """The routine for accesses of a user or supervisor that read, or write also."""
    return f"soft {'user' if user else 'supervisor'} {'write' if write else 'read'}"


def emit_soft_routines(begin: Callable[[str], Routine], leave: Label) -> None:
    """Emit all; `begin` begins one by name.

    What they cannot do goes to `leave`, bound by the caller, further on, with the kind of access in `soft_access`.
    """
    for user in (False, True):
        for write in (False, True):
            _Walk(begin(name_of(user=user, write=write)), leave, user=user, write=write).emit_all()
    for name, condition in (("divide", "jae"), ("divide signed", "je")):
        _emit_division(begin(name), leave, condition)


def _emit_division(routine: Routine, leave: Label, condition: str) -> None:
    """EDX:EAX is to be divided by R9D: `jae` leaves if the quotient of DIV is too large, `je` if the divisor is 0."""
    emit = routine.emit
    emit("mov", field("routine_return"), R8)
    if condition == "je":
        emit("test", R9D, R9D)
    else:
        emit("cmp", EDX, R9D)
    emit(condition, routine.failed)
    routine.load_saved()
    emit("jmp", field("routine_return"))
    routine.asm.bind(routine.failed)
    emit("mov", field("soft_access"), DIVIDES)
    routine.load_saved()
    emit("jmp", leave)


class _Walk:
    """R9D is the linear address, RDX the view of RAM, R8 the flags of pages."""

    def __init__(self, routine: Routine, leave: Label, *, user: bool, write: bool) -> None:
        self.routine = routine
        self.asm = routine.asm
        self.emit = routine.emit
        self.unless = routine.unless
        self.leave = leave
        self.user = user
        self.write = write

    def emit_all(self) -> None:
        """The routine behind its beginning."""
        emit = self.emit
        judge, done = Label(), Label()
        emit("mov", field("routine_return"), R8)
        emit("sub", field("soft_left"), 1)
        emit("js", self.routine.failed)
        # Does it end in its page?
        emit("mov", EAX, R9D)
        emit("and", EAX, 0xFFF)
        emit("add", EAX, field("soft_last"))
        emit("cmp", EAX, 0xFFF)
        self.unless("be")
        emit("mov", RDX, field("ram_view"))
        self._walk_upper(judge)
        self.asm.bind(judge)
        self._judge()
        # EAX = the frame, ECX = the address
        emit("and", EAX, FRAME)
        emit("mov", ECX, R9D)
        emit("and", ECX, 0xFFF)
        emit("or", ECX, EAX)
        self._need_ram(EAX)
        if self.write:
            self._need_unwatched(done)
        self.asm.bind(done)
        emit("mov", R9D, ECX)
        self.routine.load_saved()
        emit("jmp", field("routine_return"))
        self.asm.bind(self.routine.failed)
        emit("mov", field("soft_linear"), R9D)
        emit("mov", field("soft_access"), (PF_WRITE if self.write else 0) | (PF_USER if self.user else 0))
        self.routine.load_saved()
        emit("jmp", self.leave)

    def _walk_upper(self, judge: Label) -> None:
        """EAX = the entry that maps the page, ECX = its address in RAM, `soft_entry` = the rights above it.

        Of an entry of 64 bits that is the lower half; the upper one is 0. Of a large page EAX is made an entry of the
        small one in it, and A and D, which are set, stay in EAX.
        """
        emit = self.emit
        extended, small, small_extended, present = Label(), Label(), Label(), Label()
        emit("mov", ECX, field("cr3"))
        emit("and", ECX, FRAME)
        self._need_ram(ECX)
        emit("test", field("cr4"), CR4_PAE)
        emit("jne", extended)
        emit("mov", EAX, R9D)
        emit("shr", EAX, 22)
        emit("lea", ECX, Memory(0, ECX, EAX, 4))
        self._walk_directory(small, judge, 22, LARGE_RESERVED)
        self.asm.bind(small)
        self._index(10, 0xFFC)
        emit("mov", EAX, Memory(32, RDX, RCX))
        emit("jmp", present)
        self.asm.bind(extended)
        emit("mov", ECX, field("cr3"))
        emit("and", ECX, FRAME_OF_PDPTES)
        emit("mov", EAX, R9D)
        emit("shr", EAX, 27)
        emit("and", EAX, 3 << 3)
        emit("or", ECX, EAX)
        self._need_low()
        emit("mov", ECX, Memory(32, RDX, RCX))
        emit("test", ECX, P)
        self.unless("ne")
        emit("test", ECX, PDPTE_RESERVED & MASK32)
        self.unless("e")
        self._index(18, 0xFF8)
        self._need_low()
        self._walk_directory(small_extended, judge, 21, LARGE_PAE_RESERVED)
        self.asm.bind(small_extended)
        self._index(9, 0xFF8)
        self._need_low()
        emit("mov", EAX, Memory(32, RDX, RCX))
        self.asm.bind(present)
        emit("test", EAX, P)
        self.unless("ne")

    def _walk_directory(self, small: Label, judge: Label, bits: int, reserved: int) -> None:
        """ECX = the entry of a page directory at ECX; to `judge` if it maps a large page of 2**bits bytes."""
        emit = self.emit
        frame = MASK32 & -1 << bits
        emit("mov", ECX, Memory(32, RDX, RCX))
        emit("mov", field("soft_entry"), ECX)
        emit("mov", EAX, ECX)
        emit("and", EAX, P | ACCESSED)
        emit("cmp", EAX, P | ACCESSED)
        self.unless("e")
        emit("test", ECX, PS)
        emit("je", small)
        if bits == 22:
            emit("test", field("cr4"), CR4_PSE)
            emit("je", small)
        emit("test", ECX, reserved)
        self.unless("e")
        if self.write:
            emit("test", ECX, DIRTY)
            self.unless("ne")
        emit("mov", EAX, R9D)
        emit("and", EAX, FRAME & ~frame)
        emit("and", ECX, frame | 0xFFF)
        emit("or", EAX, ECX)
        emit("jmp", judge)

    def _index(self, shift: int, mask: int) -> None:
        """ECX = the address of the entry for R9D in the table that entry ECX leads to; EAX is lost."""
        emit = self.emit
        emit("and", ECX, FRAME)
        self._need_ram(ECX)
        emit("mov", EAX, R9D)
        emit("shr", EAX, shift)
        emit("and", EAX, mask)
        emit("or", ECX, EAX)

    def _need_low(self) -> None:
        """Leave unless the upper half of the entry of 64 bits at ECX is 0."""
        self.emit("cmp", Memory(32, RDX, RCX, displacement=4), 0)
        self.unless("e")

    def _judge(self) -> None:
        """Leave unless the rights allow the access; set A and D in the entry."""
        emit = self.emit
        above = field("soft_entry")
        if self.user:
            for right in (US, RW) if self.write else (US,):
                emit("test", EAX, right)
                self.unless("ne")
                emit("test", above, right)
                self.unless("ne")
        elif self.write:
            forbidden, allowed = Label(), Label()
            emit("test", EAX, RW)
            emit("je", forbidden)
            emit("test", above, RW)
            emit("jne", allowed)
            self.asm.bind(forbidden)
            emit("test", field("cr0"), CR0_WP)
            self.unless("e")
            self.asm.bind(allowed)
        touched, untouched = Label(), Label()
        emit("test", EAX, ACCESSED)
        if self.write:
            emit("je", untouched)
            emit("test", EAX, DIRTY)
        emit("jne", touched)
        self.asm.bind(untouched)
        # No translation depends on these bits being clear, but who watches the page otherwise has to be told.
        emit("mov", EAX, ECX)
        emit("mov", R8, field("page_flags"))
        emit("shr", EAX, PAGE_SHIFT)
        emit("test", Memory(8, R8, RAX), _NOT_TABLE)
        self.unless("e")
        emit("mov", EAX, Memory(32, RDX, RCX))
        emit("or", EAX, ACCESSED | DIRTY if self.write else ACCESSED)
        emit("mov", Memory(32, RDX, RCX), EAX)
        self.asm.bind(touched)

    def _need_ram(self, frame: Register) -> None:
        """Leave unless the address of a page is in RAM, and not in the PC hole; R8 is lost."""
        emit = self.emit
        emit("lea", R8D, Memory(0, frame, displacement=-HOLE_FIRST))
        emit("cmp", R8D, HOLE_LAST + 1 - HOLE_FIRST)
        self.unless("ae")
        emit("cmp", frame, field("soft_limit"))
        self.unless("b")

    def _need_unwatched(self, done: Label) -> None:
        """Leave if somebody watches the page of RAM in EAX, but for an entry at ECX that nothing depends on."""
        emit = self.emit
        emit("mov", R8, field("page_flags"))
        emit("shr", EAX, PAGE_SHIFT)
        emit("movzx", EAX, Memory(8, R8, RAX))
        emit("test", EAX, EAX)
        emit("je", done)
        emit("test", EAX, _NOT_TABLE)
        self.unless("e")
        # It may not reach beyond one doubleword.
        emit("mov", EAX, ECX)
        emit("and", EAX, 3)
        emit("add", EAX, field("soft_last"))
        emit("cmp", EAX, 3)
        self.unless("be")
        emit("mov", EAX, ECX)
        emit("shr", EAX, 2)
        emit("mov", RDX, field("entry_uses"))
        emit("cmp", Memory(8, RDX, RAX), 0)
        self.unless("e")
