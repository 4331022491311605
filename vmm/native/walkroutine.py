"""The page-table walk in emitted code: `machine.paging.walk`, as far as it changes nothing in memory.

It reads the guest's tables in the flat view of RAM, by the control registers in the state block. What its outcome is
good for is the business of the routine that it is emitted into.

Source: SDM Vol. 3A, "Paging" and "Page-Fault Exceptions".
"""

from __future__ import annotations

from machine.faults import PF_PRESENT, PF_RESERVED, PF_USER, PF_WRITE
from machine.memory import HOLE_FIRST, HOLE_LAST
from machine.paging import (
    ACCESSED,
    DIRTY,
    LARGE_PAE_RESERVED,
    LARGE_RESERVED,
    PAE_RESERVED,
    PDPTE_RESERVED,
    PS,
    RW,
    US,
    P,
)
from machine.state import CR0_PG, CR0_WP, CR4_PAE, CR4_PSE, MASK32
from vmm.native.assembler import Assembler
from vmm.native.operands import EAX, ECX, EDX, R8D, R9, R9D, RAX, Label, Memory
from vmm.native.stateblock import field

# Where a table is, by CR3 or an entry, and where the table of PDPTEs is, by CR3.
FRAME = 0xFFFF_F000
FRAME_OF_PDPTES = 0xFFFF_FFE0


def emit_walk(assembler: Assembler, *, faulted: Label, unusual: Label, asks_bits: bool = True) -> None:
    """Translate the linear address in R8D for an access whose bits PF_WRITE and PF_USER are in EDX.

    Nothing is written to guest memory. Where `walk` would set an A or D bit, or read an entry that is not in RAM, the
    outcome is `unusual`: Python walks.

    It falls through with the physical address in EAX, which may lie outside RAM. At `faulted` EDX is the error code
    of #PF. R8D is kept; EAX, ECX, EDX, R9 and the host's flags are lost, and the field `walk_access`.

    Args:
        assembler: where to.
        faulted: where to go with a page fault of the guest's; bound by the caller, further on.
        unusual: where to go with what Python has to see to; bound by the caller, further on.
        asks_bits: False: A and D bits may be clear, since nothing is accessed.
    """
    _Walk(assembler, faulted, unusual, asks_bits=asks_bits).write()


class _Walk:
    """R9 is the view of RAM, EAX an entry, its address or the result, ECX the rights of all levels, EDX the leaf."""

    def __init__(self, assembler: Assembler, faulted: Label, unusual: Label, *, asks_bits: bool) -> None:
        self.asm = assembler
        self.emit = assembler.emit
        self.faulted = faulted
        self.unusual = unusual
        self.asks_bits = asks_bits
        self.absent, self.forbidden, self.reserved = Label(), Label(), Label()
        self.judge, self.done = Label(), Label()

    def write(self) -> None:
        """All of it."""
        emit = self.emit
        extended, page = Label(), Label()
        emit("mov", field("walk_access"), EDX)
        emit("mov", EAX, R8D)
        emit("test", field("cr0"), CR0_PG)
        emit("je", self.done)
        emit("mov", R9, field("ram_view"))
        emit("test", field("cr4"), CR4_PAE)
        emit("jne", extended)
        # 32-bit paging.
        emit("shr", EAX, 22)
        emit("mov", ECX, field("cr3"))
        emit("and", ECX, FRAME)
        emit("lea", EAX, Memory(0, ECX, EAX, 4))
        self._load()
        self._take_large(22, LARGE_RESERVED)
        self._index(10, 0xFFC)
        self._load()
        emit("jmp", page)
        self.asm.bind(extended)
        self._extended()
        self.asm.bind(page)
        emit("and", ECX, EAX)
        emit("mov", EDX, EAX)
        emit("and", EAX, FRAME)
        self._offset(0xFFF)
        self.asm.bind(self.judge)
        self._judge()
        for label, bits in ((self.absent, 0), (self.forbidden, PF_PRESENT), (self.reserved, PF_PRESENT | PF_RESERVED)):
            self.asm.bind(label)
            emit("mov", EDX, field("walk_access"))
            if bits:
                emit("or", EDX, bits)
            emit("jmp", self.faulted)
        self.asm.bind(self.done)

    def _extended(self) -> None:
        """PAE: down to the PTE in EAX, with the rights of the PDE in ECX; PDPTEs have none."""
        emit = self.emit
        emit("shr", EAX, 27)
        emit("and", EAX, 3 << 3)
        emit("mov", ECX, field("cr3"))
        emit("and", ECX, FRAME_OF_PDPTES)
        emit("or", EAX, ECX)
        self._load_wide(PDPTE_RESERVED)
        self._index(18, 0xFF8)
        self._load_wide(PAE_RESERVED)
        self._take_large(21, LARGE_PAE_RESERVED)
        self._index(9, 0xFF8)
        self._load_wide(PAE_RESERVED)

    def _load(self) -> None:
        """EAX = the entry at physical address EAX, which is present."""
        self._check_address()
        self.emit("mov", EAX, Memory(32, R9, RAX))
        self.emit("test", EAX, P)
        self.emit("je", self.absent)

    def _load_wide(self, reserved: int) -> None:
        """EAX = the lower half of the entry of 64 bits at EAX, which is present and leads to below 4 GiB."""
        emit = self.emit
        self._check_address()
        emit("mov", EDX, Memory(32, R9, RAX, displacement=4))
        emit("mov", EAX, Memory(32, R9, RAX))
        emit("test", EAX, P)
        emit("je", self.absent)
        emit("test", EDX, reserved >> 32)
        emit("jne", self.reserved)
        if reserved & MASK32:
            emit("test", EAX, reserved & MASK32)
            emit("jne", self.reserved)
        emit("test", EDX, EDX)
        emit("jne", self.unusual)

    def _check_address(self) -> None:
        """EAX is an address of RAM outside the PC hole; EDX is lost."""
        emit = self.emit
        emit("lea", EDX, Memory(0, EAX, displacement=-HOLE_FIRST))
        emit("cmp", EDX, HOLE_LAST + 1 - HOLE_FIRST)
        emit("jb", self.unusual)
        emit("cmp", EAX, field("ram_limit"))
        emit("jae", self.unusual)

    def _index(self, shift: int, mask: int) -> None:
        """EAX = the address of the entry for R8D in the table that entry EAX leads to; EDX is lost."""
        emit = self.emit
        emit("and", EAX, FRAME)
        emit("mov", EDX, R8D)
        emit("shr", EDX, shift)
        emit("and", EDX, mask)
        emit("or", EAX, EDX)

    def _take_large(self, bits: int, reserved: int) -> None:
        """ECX = the entry of a page directory in EAX; it falls through unless that maps a page of 2**bits bytes."""
        emit, table = self.emit, Label()
        emit("mov", ECX, EAX)
        emit("test", EAX, PS)
        emit("je", table)
        if bits == 22:
            emit("test", field("cr4"), CR4_PSE)
            emit("je", table)
        emit("test", EAX, reserved)
        emit("jne", self.reserved)
        emit("mov", EDX, EAX)
        emit("and", EAX, MASK32 & -1 << bits)
        self._offset((1 << bits) - 1)
        emit("jmp", self.judge)
        self.asm.bind(table)

    def _offset(self, mask: int) -> None:
        """Add the offset in the page to the frame in EAX; R9 is lost."""
        self.emit("mov", R9D, R8D)
        self.emit("and", R9D, mask)
        self.emit("or", EAX, R9D)

    def _judge(self) -> None:
        """Whether the rights in ECX and the leaf in EDX allow the access, and have A and D set."""
        emit = self.emit
        supervisor, writable, read = Label(), Label(), Label()
        access = field("walk_access")
        emit("test", access, PF_USER)
        emit("je", supervisor)
        emit("test", ECX, US)
        emit("je", self.forbidden)
        self.asm.bind(supervisor)
        emit("test", access, PF_WRITE)
        emit("je", read)
        emit("test", ECX, RW)
        emit("jne", writable)
        emit("test", access, PF_USER)
        emit("jne", self.forbidden)
        emit("test", field("cr0"), CR0_WP)
        emit("jne", self.forbidden)
        self.asm.bind(writable)
        if self.asks_bits:
            emit("test", EDX, DIRTY)
            emit("je", self.unusual)
        self.asm.bind(read)
        if self.asks_bits:
            emit("test", ECX, ACCESSED)
            emit("je", self.unusual)
        emit("jmp", self.done)
