"""Decoded guest code: runs of instructions inside one page of RAM, kept until a store touches their bytes.

It fetches and decodes; executing blocks and delivering the faults that a fetch raises is the interpreter's business.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from iced_x86 import Decoder, DecoderError, DecoderOptions, Instruction

from machine.cpu import Cpu
from machine.faults import general_protection, invalid_opcode
from machine.instructions import Effect, Operation, lookup
from machine.memory import HOLDS_CODE, PAGE_SHIFT
from machine.state import MASK32

MAX_INSTRUCTION_BYTES = 15
MAX_BLOCK_INSTRUCTIONS = 32
_SINGLE_BYTES = 2 * MAX_INSTRUCTION_BYTES  # enough to tell an instruction that is too long from one that is cut off
MAX_PAGES = 4096
MAX_LOOSE_BLOCKS = 4096

# The opcodes of later processors that share bytes with instructions of this one are off: TZCNT is BSF with a prefix
# here, ENDBR and the MPX opcodes are reserved NOPs.
OPTIONS = (
    DecoderOptions.FORCE_RESERVED_NOP
    | DecoderOptions.NO_MPFX_0FBC
    | DecoderOptions.NO_MPFX_0FBD
    | DecoderOptions.NO_WBNOINVD
)
LOCK = 0xF0
PREFIXES = frozenset(b"\x26\x2e\x36\x3e\x64\x65\x66\x67\xf0\xf2\xf3")


@dataclass(slots=True)
class Block:
    """Consecutive instructions.

    Attributes:
        operations: one for each instruction; emptied when the bytes change, which also ends an execution under way.
        offsets: where each instruction starts, from the first one; last, the length of all.
        effect: of the last instruction; the others are `Effect.NEXT`.
        kept: the operations of a block whose execution had to end, though its bytes are the same.
    """

    operations: list[Operation] = field(default_factory=list)
    offsets: list[int] = field(default_factory=lambda: [0])
    effect: Effect = Effect.NEXT
    kept: list[Operation] = field(default_factory=list)


@dataclass(slots=True)
class CodePage:
    """The blocks that start in one page of RAM, and those of one instruction: by CS.D, then by offset in the page."""

    ram_page: int
    blocks: tuple[dict[int, Block], dict[int, Block]] = field(default_factory=lambda: ({}, {}))
    singles: tuple[dict[int, Block], dict[int, Block]] = field(default_factory=lambda: ({}, {}))
    covered: bytearray = field(default_factory=lambda: bytearray(4096))


class BlockCache:
    """Every block of one CPU.

    Attributes:
        fetched: for each of (CS.D, user): linear page number to the blocks of the page that is mapped there now.
            Withheld pages stay out, so that whoever looks there must ask `find`.
        withheld_linear, withheld_physical: page numbers with breakpoints.
        longest_insns: how many instructions a block has at most.
        flag: what a page of RAM with decoded code has in `page_flags`.
        running: the block under execution, or the last one: cut short if a store changes the mapping under it.
    """

    def __init__(self, cpu: Cpu) -> None:
        self.cpu = cpu
        self.fetched: tuple[dict[int, dict[int, Block]], ...] = ({}, {}, {}, {})
        self.withheld_linear: frozenset[int] = frozenset()
        self.withheld_physical: frozenset[int] = frozenset()
        self.longest_insns = MAX_BLOCK_INSTRUCTIONS
        self.flag = HOLDS_CODE
        self.running: Block | None = None
        self.decoded_blocks = 0
        self.decoded_insns = 0
        self.invalidations = 0
        self._pages: dict[int, CodePage] = {}
        # By user: the page of RAM that a linear page is mapped to now, and whether it is withheld.
        self._mapped: tuple[dict[int, tuple[CodePage, bool]], ...] = ({}, {})
        self._loose: dict[tuple[bytes, bool], Block] = {}

    def attach(self) -> None:
        """Start to watch memory for changes of code and mappings."""
        self.cpu.memory.write_observers.append(self._written)
        self.cpu.mmu.flush_observers.append(self._remapped)

    def detach(self) -> None:
        """Forget everything and stop watching."""
        self.cpu.memory.write_observers.remove(self._written)
        self.cpu.mmu.flush_observers.remove(self._remapped)
        self.clear()

    def clear(self) -> None:
        """Forget every block."""
        for page in list(self._pages.values()):
            self._drop(page)
        self._loose.clear()
        self._remapped(by_store=True)

    def withhold(self, linear: frozenset[int], physical: frozenset[int]) -> None:
        """Keep these pages out of `fetched`."""
        self.withheld_linear, self.withheld_physical = linear, physical
        self._remapped(by_store=False)

    def find(self, linear: int, big: bool, *, single: bool = False) -> tuple[Block, bool]:
        """The block at a linear address, decoded if need be, and whether its page is withheld.

        Args:
            linear: address of the first instruction.
            big: CS.D.
            single: one instruction is enough; the block may have more.

        Raises:
            PageFault: the first byte, or a later one of the first instruction, cannot be fetched.
        """
        memory, mmu = self.cpu.memory, self.cpu.mmu
        mapping = self._mapped[mmu.user].get(linear >> PAGE_SHIFT)
        if mapping is None:
            physical = mmu.translate(linear, write=False, user=mmu.user)
            withheld = linear >> PAGE_SHIFT in self.withheld_linear or physical >> PAGE_SHIFT in self.withheld_physical
            ram_address = memory.ram_address(physical)
            if ram_address < 0:
                return self._loose_block(linear, physical, big), withheld
            page = self._pages.get(ram_address >> PAGE_SHIFT) or self._new_page(ram_address >> PAGE_SHIFT)
            self._mapped[mmu.user][linear >> PAGE_SHIFT] = page, withheld
        else:
            page, withheld = mapping
        blocks = page.blocks[big]
        if not withheld:
            self.fetched[big * 2 + mmu.user][linear >> PAGE_SHIFT] = blocks
        offset = linear & 0xFFF
        block = blocks.get(offset)
        if block is not None and block.kept:
            block.operations[:] = block.kept
            block.kept.clear()
        if single and (block is None or not block.operations):
            blocks = page.singles[big]
            block = blocks.get(offset)
        if block is None or not block.operations:
            base = page.ram_page << PAGE_SHIFT
            end = min(offset + _SINGLE_BYTES, 4096) if single else 4096
            data = bytes(memory.ram8[base + offset : base + end])
            block = self._decode(data, big, cut=True, limit=1 if single else self.longest_insns)
            if not block.operations:
                return self._loose_block(linear, base + offset, big), withheld
            blocks[offset] = block
            length = block.offsets[-1]
            page.covered[offset : offset + length] = b"\1" * length
        return block, withheld

    def _new_page(self, ram_page: int) -> CodePage:
        if len(self._pages) >= MAX_PAGES:
            self.clear()
        page = self._pages[ram_page] = CodePage(ram_page)
        self.cpu.memory.flag_page(ram_page, self.flag)
        return page

    def _loose_block(self, linear: int, physical: int, big: bool) -> Block:
        """One instruction that straddles two pages or lies outside RAM: fetched each time, found by its bytes."""
        mmu, memory = self.cpu.mmu, self.cpu.memory
        room = 4096 - (linear & 0xFFF)
        data = memory.read(physical, min(room, MAX_INSTRUCTION_BYTES))
        block = self._loose.get((data, big))
        if block is None and len(data) < MAX_INSTRUCTION_BYTES:
            block = self._decode(data, big, cut=True, limit=1)
            if not block.operations:
                second = mmu.translate((linear + room) & MASK32, write=False, user=mmu.user)
                data += memory.read(second, MAX_INSTRUCTION_BYTES - len(data))
                block = self._loose.get((data, big))
        if block is None or not block.operations:
            block = self._decode(data, big, cut=False, limit=1)
        if len(self._loose) >= MAX_LOOSE_BLOCKS:
            self._loose.clear()
        self._loose[data, big] = block
        return block

    def _decode(self, data: bytes, big: bool, *, cut: bool, limit: int = MAX_BLOCK_INSTRUCTIONS) -> Block:
        """Decode up to `limit` instructions; `cut`: more bytes may follow `data`, so stop before an incomplete one."""
        block = Block()
        decoder = Decoder(32 if big else 16, data, OPTIONS, 0)
        while decoder.can_decode and len(block.operations) < limit and block.effect is Effect.NEXT:
            instruction = decoder.decode()
            operation: Operation
            if instruction.is_invalid:
                if cut and decoder.last_error == DecoderError.NO_MORE_BYTES:
                    break
                too_long = is_too_long(data[block.offsets[-1] :], big)
                operation = _raise_too_long if too_long else _raise_undefined
                block.effect = Effect.SYSTEM
            else:
                operation, block.effect = self._build(instruction)
            block.operations.append(operation)
            block.offsets.append(block.offsets[-1] + max(1, instruction.len))
        self.decoded_blocks += 1
        self.decoded_insns += len(block.operations)
        return block

    def _build(self, instruction: Instruction) -> tuple[Operation, Effect]:
        row = lookup(instruction.code, self.cpu.model.instructions)
        if row is None:
            return _raise_undefined, Effect.SYSTEM
        effect = row.effect
        if row.string and (instruction.has_rep_prefix or instruction.has_repne_prefix):
            effect = Effect.REPEAT
        return row.build(self.cpu, instruction), effect

    def _written(self, at: int, length: int, _old: bytes, flags: int) -> None:
        if not flags & self.flag:
            return
        for ram_page in range(at >> PAGE_SHIFT, (at + length - 1 >> PAGE_SHIFT) + 1):
            page = self._pages.get(ram_page)
            if page is None:
                continue
            base = ram_page << PAGE_SHIFT
            first, end = max(0, at - base), min(4096, at + length - base)
            if any(page.covered[first:end]):
                self.invalidations += 1
                self._drop_blocks(page, first, end)

    def forget_page(self, ram_page: int) -> None:
        """Forget all blocks of a page of RAM: stores to it need not be told of any more."""
        page = self._pages.get(ram_page)
        if page is not None:
            self._drop(page)

    def _drop_blocks(self, page: CodePage, first: int, end: int) -> None:
        """Forget the blocks with bytes from offset `first` to before `end` of a page, and a page without any."""
        page.covered = bytearray(4096)
        is_empty = True
        for blocks in (*page.blocks, *page.singles):
            for offset, block in list(blocks.items()):
                length = block.offsets[-1]
                if offset < end and first < offset + length:
                    if block is self.running:
                        self.cpu.last_iteration = True
                    block.operations.clear()
                    block.kept.clear()
                    del blocks[offset]
                else:
                    page.covered[offset : offset + length] = b"\1" * length
                    is_empty = False
        if is_empty:
            self._drop(page)

    def _drop(self, page: CodePage) -> None:
        for blocks in (*page.blocks, *page.singles):
            for block in blocks.values():
                block.operations.clear()
                block.kept.clear()
            blocks.clear()
        for mapped in self._mapped:
            for linear_page in [key for key, (mapped_page, _) in mapped.items() if mapped_page is page]:
                del mapped[linear_page]
                for fetched in self.fetched:
                    fetched.pop(linear_page, None)
        del self._pages[page.ram_page]
        self.cpu.memory.page_flags[page.ram_page] &= ~self.flag

    def _remapped(self, by_store: bool) -> None:
        for fetched in self.fetched:
            fetched.clear()
        for mapped in self._mapped:
            mapped.clear()
        if by_store and self.running is not None:
            # The rest of the block under execution may lie elsewhere now. Emptying the list ends it, and a REP has to
            # be fetched again for its next iteration.
            self.cpu.last_iteration = True
            if self.running.operations:
                self.running.kept = self.running.operations[:]
            self.running.operations.clear()


def is_too_long(data: bytes, big: bool) -> bool:
    """Whether the instruction that `data` starts with needs more than 15 bytes: #GP(0), not #UD.

    Args:
        data: up to the end of what is known; if that cuts the instruction off, at least 15 bytes.
        big: CS.D.
    """
    count = 0
    while count < len(data) and data[count] in PREFIXES:
        count += 1
    if count >= MAX_INSTRUCTION_BYTES:
        return True
    # The decoder itself gives up after 15 bytes. Without redundant prefixes, and without a LOCK that may be illegal, it
    # tells how long the rest is; a prefix counts once, wherever it stands.
    needed = bytes(prefix for prefix in dict.fromkeys(data[:count]) if prefix != LOCK)
    decoder = Decoder(32 if big else 16, needed + data[count:], OPTIONS, 0)
    decoder.decode()
    if decoder.last_error == DecoderError.NO_MORE_BYTES:
        return len(data) >= MAX_INSTRUCTION_BYTES
    return decoder.position + count - len(needed) > MAX_INSTRUCTION_BYTES


def _raise_undefined() -> None:
    raise invalid_opcode()


def _raise_too_long() -> None:
    raise general_protection()
