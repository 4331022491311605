"""The cache of decoded code: what a block holds, which write drops it, straddlers, other memory than RAM, eviction."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from machine.alu import build_alu
from machine.clock import Clock
from machine.cpu import Cpu
from machine.debug import DebugControl
from machine.faults import GuestFault, PageFault, Vector
from machine.instructions import Effect
from machine.lines import CpuLines
from machine.memory import HOLDS_CODE, PhysicalMemory
from machine.ports import PortBus
from machine.state import CR0_PE, CR0_PG, CS, EAX, EBX, ECX, EDX, MASK32, SEG_DB, SEG_G
from vmm import blocks
from vmm.blocks import MAX_BLOCK_INSTRUCTIONS, Block, BlockCache, is_too_long
from vmm.interp import Interpreter

PAGE = 0x1000
CODE = 0x5000
DIRECTORY, TABLE = 0x1_0000, 0x1_1000
P, RW, US = 1, 2, 4
NOP, INC_EAX, INC_EBX, INC_ECX, INC_EDX, HLT = b"\x90", b"\x40", b"\x43", b"\x41", b"\x42", b"\xf4"
MOV_EAX = bytes.fromhex("b878563412")  # five bytes
JMP_SELF = b"\xeb\xfe"


@dataclass(slots=True)
class Rig:
    """A CPU in flat 32-bit mode, and a cache that watches it."""

    memory: PhysicalMemory = field(default_factory=lambda: PhysicalMemory(4 << 20))
    cpu: Cpu = field(init=False)
    cache: BlockCache = field(init=False)

    def __post_init__(self) -> None:
        self.cpu = Cpu(self.memory, PortBus(), CpuLines(), Clock(), build_alu())
        state = self.cpu.state
        state.cr0 |= CR0_PE
        state.gpr[EDX] = 0
        for number, segment in enumerate(state.segments):
            segment.load(8, 0, MASK32, (0x9B if number == CS else 0x93) | SEG_DB | SEG_G)
        self.cache = BlockCache(self.cpu)
        self.cache.attach()

    def find(self, linear: int = CODE, *, big: bool = True, single: bool = False) -> Block:
        return self.cache.find(linear, big, single=single)[0]

    def is_fetched(self, linear: int = CODE, *, big: bool = True) -> bool:
        """Whether the run loop would find the page without asking."""
        return linear >> 12 in self.cache.fetched[big * 2 + self.cpu.mmu.user]

    def turn_paging_on(self) -> None:
        """Identity, the first 4 MiB."""
        self.memory.store(DIRECTORY, 4, TABLE | P | RW | US)
        for page in range(1024):
            self.map(page << 12, page << 12)
        self.cpu.state.cr3 = DIRECTORY
        self.cpu.state.cr0 |= CR0_PG
        self.cpu.mmu.flush()

    def map(self, linear: int, physical: int, rights: int = P | RW | US) -> None:
        self.memory.store(TABLE + 4 * (linear >> 12), 4, physical | rights)


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.memory.close()


def lengths(block: Block) -> list[int]:
    return [end - start for start, end in zip(block.offsets, block.offsets[1:], strict=False)]


class TestDecoding:
    def test_a_block_goes_on_to_the_first_transfer(self, rig: Rig) -> None:
        rig.memory.write(CODE, NOP + MOV_EAX + INC_EAX + JMP_SELF + NOP)
        block = rig.find()
        assert lengths(block) == [1, 5, 1, 2]
        assert block.effect is Effect.BRANCH
        assert len(block.operations) == 4

    @pytest.mark.parametrize(
        ("code", "effect"),
        [
            ("fb", Effect.SYSTEM),
            ("cf", Effect.SYSTEM_BRANCH),
            ("f3a4", Effect.REPEAT),
            ("f26d", Effect.REPEAT),
            ("c3", Effect.BRANCH),
        ],
    )
    def test_or_to_the_first_instruction_with_an_effect(self, rig: Rig, code: str, effect: Effect) -> None:
        rig.memory.write(CODE, NOP + bytes.fromhex(code) + NOP)
        block = rig.find()
        assert lengths(block) == [1, len(code) // 2]
        assert block.effect is effect

    def test_a_string_instruction_without_rep_goes_on(self, rig: Rig) -> None:
        rig.memory.write(CODE, b"\xa4" + JMP_SELF)
        assert lengths(rig.find()) == [1, 2]

    def test_it_has_a_bounded_number_of_instructions(self, rig: Rig) -> None:
        rig.memory.write(CODE, NOP * 100)
        block = rig.find()
        assert len(block.operations) == MAX_BLOCK_INSTRUCTIONS
        assert block.effect is Effect.NEXT

    def test_it_ends_with_the_page(self, rig: Rig) -> None:
        rig.memory.write(CODE + PAGE - 3, NOP * 10)
        assert lengths(rig.find(CODE + PAGE - 3)) == [1, 1, 1]

    def test_it_ends_before_an_instruction_that_runs_into_the_next_page(self, rig: Rig) -> None:
        rig.memory.write(CODE + PAGE - 3, NOP + MOV_EAX)
        assert lengths(rig.find(CODE + PAGE - 3)) == [1]
        assert lengths(rig.find(CODE + PAGE - 2)) == [5]

    def test_an_undefined_instruction_ends_it_and_raises_when_it_is_reached(self, rig: Rig) -> None:
        rig.memory.write(CODE, NOP + b"\x0f\xff\xc0\x0f\x0a")
        block = rig.find()
        assert len(block.operations) == 3
        assert block.effect is Effect.SYSTEM
        for operation in block.operations[1:]:
            with pytest.raises(GuestFault) as fault:
                operation()
            assert fault.value.vector == Vector.UD

    def test_code_of_16_and_of_32_bits_is_kept_apart(self, rig: Rig) -> None:
        rig.memory.write(CODE, MOV_EAX + JMP_SELF)
        wide, narrow = rig.find(big=True), rig.find(big=False)
        assert lengths(wide) == [5, 2]
        assert lengths(narrow)[0] == 3
        assert rig.find(big=True) is wide
        assert rig.find(big=False) is narrow

    def test_a_single_instruction_is_decoded_alone(self, rig: Rig) -> None:
        rig.memory.write(CODE, NOP * 8 + JMP_SELF)
        single = rig.find(single=True)
        assert len(single.operations) == 1
        assert rig.cache.decoded_insns == 1
        whole = rig.find()
        assert len(whole.operations) == 9
        assert rig.find() is whole
        assert rig.find(single=True) is whole  # a block that is there serves as well

    def test_nothing_is_decoded_twice(self, rig: Rig) -> None:
        rig.memory.write(CODE, NOP + JMP_SELF)
        block = rig.find()
        assert rig.find() is block
        assert (rig.cache.decoded_blocks, rig.cache.decoded_insns) == (1, 2)


class TestInvalidation:
    @pytest.mark.parametrize("single", [False, True])
    @pytest.mark.parametrize("offset", range(-2, 10))
    def test_a_write_drops_code_byte_for_byte(self, rig: Rig, offset: int, single: bool) -> None:
        """Seven bytes of code (five for a single instruction); the write is of one byte."""
        rig.memory.write(CODE + 0x100, MOV_EAX + JMP_SELF)
        block = rig.find(CODE + 0x100, single=single)
        rig.memory.store(CODE + 0x100 + offset, 1, 0x90)
        inside = 0 <= offset < (5 if single else 7)
        assert bool(block.operations) == (not inside)
        assert rig.cache.invalidations == inside
        assert (rig.find(CODE + 0x100, single=single) is block) == (not inside)

    @pytest.mark.parametrize(
        ("first", "length", "drops"), [(-4, 4, False), (-4, 5, True), (6, 4, True), (7, 4, False), (-8, 64, True)]
    )
    def test_of_a_wider_write_any_byte_counts(self, rig: Rig, first: int, length: int, drops: bool) -> None:
        rig.memory.write(CODE + 0x100, MOV_EAX + JMP_SELF)
        block = rig.find(CODE + 0x100)
        rig.memory.write(CODE + 0x100 + first, bytes(length))
        assert bool(block.operations) != drops

    def test_a_write_over_two_pages_drops_both(self, rig: Rig) -> None:
        rig.memory.write(CODE + PAGE - 1, NOP * 3)
        low, high = rig.find(CODE + PAGE - 1), rig.find(CODE + PAGE)
        rig.memory.write(CODE + PAGE - 1, b"\xf4\xf4")
        assert not low.operations
        assert not high.operations

    def test_the_guests_own_stores_count(self, rig: Rig) -> None:
        rig.memory.write(CODE, NOP + JMP_SELF)
        block = rig.find()
        rig.cpu.mmu.store8(rig.cpu.state.segments[3], CODE + 5, 0)
        assert block.operations
        rig.cpu.mmu.store8(rig.cpu.state.segments[3], CODE + 1, 0)
        assert not block.operations

    def test_dropped_code_is_decoded_anew(self, rig: Rig) -> None:
        rig.memory.write(CODE, INC_EAX + JMP_SELF)
        rig.find()
        rig.memory.store(CODE, 1, INC_EBX[0])
        rig.find().operations[0]()
        assert (rig.cpu.state.gpr[EAX], rig.cpu.state.gpr[EBX]) == (0, 1)

    def test_only_blocks_with_changed_bytes_go(self, rig: Rig) -> None:
        rig.memory.write(CODE, JMP_SELF)
        rig.memory.write(CODE + 0x800, JMP_SELF)
        rig.memory.write(CODE + PAGE, JMP_SELF)
        near, far, elsewhere = rig.find(CODE), rig.find(CODE + 0x800), rig.find(CODE + PAGE)
        rig.memory.store(CODE, 1, 0x90)
        assert not near.operations
        assert far.operations
        assert rig.find(CODE + 0x800) is far
        rig.memory.store(CODE, 1, 0x91)
        rig.memory.store(CODE + 0x801, 1, 0x90)
        assert not far.operations
        assert elsewhere.operations
        assert not rig.is_fetched(CODE)
        assert rig.is_fetched(CODE + PAGE)

    def test_the_page_is_flagged_while_it_holds_code(self, rig: Rig) -> None:
        flags = rig.memory.page_flags
        rig.memory.write(CODE, JMP_SELF)
        assert not flags[CODE >> 12] & HOLDS_CODE
        rig.find()
        assert flags[CODE >> 12] & HOLDS_CODE
        rig.memory.store(CODE, 1, 0x90)
        assert not flags[CODE >> 12] & HOLDS_CODE

    def test_a_page_that_is_mapped_twice_goes_under_both_addresses(self, rig: Rig) -> None:
        rig.turn_paging_on()
        rig.map(0x9000, CODE)
        rig.memory.write(CODE, INC_EAX + JMP_SELF)
        assert rig.find(0x9000) is rig.find(CODE)
        rig.memory.store(CODE, 1, INC_EBX[0])
        assert not rig.is_fetched(CODE)
        assert not rig.is_fetched(0x9000)

    def test_clearing_forgets_everything(self, rig: Rig) -> None:
        rig.memory.write(CODE, JMP_SELF)
        rig.memory.write(0xFFFE, MOV_EAX)
        page, loose = rig.find(), rig.find(0xFFFE)
        rig.cache.clear()
        assert not page.operations
        assert rig.find() is not page
        assert rig.find(0xFFFE) is not loose
        assert not rig.cache.fetched[3]

    def test_a_detached_cache_hears_of_nothing(self, rig: Rig) -> None:
        rig.memory.write(CODE, JMP_SELF)
        rig.find()
        rig.cache.detach()
        assert not rig.memory.page_flags[CODE >> 12] & HOLDS_CODE
        rig.memory.write(CODE, NOP)
        rig.cpu.mmu.flush()
        assert rig.cache.invalidations == 0
        rig.cache.attach()
        assert lengths(rig.find())[0] == 1


class TestMapping:
    def test_fetched_goes_by_privilege(self, rig: Rig) -> None:
        rig.memory.write(CODE, JMP_SELF)
        rig.find()
        assert rig.is_fetched()
        assert not rig.is_fetched(big=False)
        rig.cpu.mmu.set_user(True)
        assert not rig.is_fetched()
        rig.find()
        assert rig.is_fetched()

    def test_a_supervisors_page_is_not_for_a_user(self, rig: Rig) -> None:
        rig.turn_paging_on()
        rig.map(CODE, CODE, P)
        rig.memory.write(CODE, JMP_SELF)
        rig.find()
        rig.cpu.mmu.set_user(True)
        with pytest.raises(PageFault) as fault:
            rig.find()
        assert (fault.value.linear, fault.value.error_code) == (CODE, 5)

    def test_a_change_of_the_page_tables_empties_fetched(self, rig: Rig) -> None:
        rig.turn_paging_on()
        rig.memory.write(CODE, INC_EAX + JMP_SELF)
        rig.memory.write(0x9000, INC_EBX + JMP_SELF)
        old = rig.find()
        rig.map(CODE, 0x9000)
        assert not rig.is_fetched()
        new = rig.find()
        assert new is not old
        new.operations[0]()
        assert rig.cpu.state.gpr[EBX] == 1
        rig.map(CODE, CODE)
        assert rig.find() is old  # it was not dropped, only out of sight

    def test_a_page_that_goes_away_faults(self, rig: Rig) -> None:
        rig.turn_paging_on()
        rig.memory.write(CODE, JMP_SELF)
        rig.find()
        rig.map(CODE, CODE, 0)
        with pytest.raises(PageFault) as fault:
            rig.find(CODE)
        assert fault.value.error_code == 0

    def test_a20_moves_what_lies_above_a_mebibyte(self, rig: Rig) -> None:
        rig.memory.write(CODE, INC_EAX + JMP_SELF)
        rig.memory.write(CODE + (1 << 20), INC_EBX + JMP_SELF)
        high = rig.find(CODE + (1 << 20))
        rig.memory.a20_enabled = False
        assert not rig.is_fetched(CODE + (1 << 20))
        low = rig.find(CODE + (1 << 20))
        assert low is not high
        assert low is rig.find(CODE)

    @pytest.mark.parametrize("physical", [False, True])
    def test_withheld_pages_stay_out_of_fetched(self, rig: Rig, physical: bool) -> None:
        rig.turn_paging_on()
        rig.map(0x9000, CODE)
        rig.memory.write(CODE, JMP_SELF)
        rig.find(0x9000)
        pages = frozenset({CODE >> 12 if physical else 9})
        rig.cache.withhold(frozenset() if physical else pages, pages if physical else frozenset())
        assert not rig.is_fetched(0x9000)
        block, withheld = rig.cache.find(0x9000, True)
        assert withheld
        assert block.operations
        assert not rig.is_fetched(0x9000)
        assert rig.cache.find(0x9000, True)[1]  # also the second time
        assert rig.cache.find(CODE, True)[1] == physical
        rig.cache.withhold(frozenset(), frozenset())
        assert not rig.cache.find(0x9000, True)[1]
        assert rig.is_fetched(0x9000)

    def test_the_running_block_is_cut_short_when_a_store_remaps_code(self, rig: Rig) -> None:
        rig.turn_paging_on()
        rig.memory.write(CODE, NOP * 3 + JMP_SELF)
        rig.cache.running = block = rig.find()
        rig.cpu.mmu.flush()  # by a register: no instruction of the block did it
        assert block.operations
        rig.find()
        rig.map(CODE, 0x9000)
        assert not block.operations


class TestStraddlers:
    AT = CODE + PAGE - 2

    def test_each_byte_of_both_pages_counts(self, rig: Rig) -> None:
        rig.memory.write(self.AT, MOV_EAX)
        block = rig.find(self.AT)
        assert lengths(block) == [5]
        assert rig.find(self.AT) is block
        for byte in range(1, 5):
            rig.memory.store(self.AT + byte, 1, 0x99)
            rig.find(self.AT).operations[0]()
            assert rig.cpu.state.gpr[EAX] == int.from_bytes(rig.memory.read(self.AT + 1, 4), "little")

    def test_the_second_page_is_found_by_its_mapping(self, rig: Rig) -> None:
        rig.turn_paging_on()
        rig.memory.write(self.AT, MOV_EAX)
        rig.find(self.AT)
        rig.memory.write(0x9000, b"\x11\x22\x33")
        rig.map(CODE + PAGE, 0x9000)
        rig.find(self.AT).operations[0]()
        assert rig.cpu.state.gpr[EAX] == 0x3322_1178

    def test_a_missing_second_page_faults_each_time(self, rig: Rig) -> None:
        rig.turn_paging_on()
        rig.memory.write(self.AT, MOV_EAX)
        rig.find(self.AT)
        rig.map(CODE + PAGE, CODE + PAGE, 0)
        for _ in range(2):
            with pytest.raises(PageFault) as fault:
                rig.find(self.AT)
            assert fault.value.linear == CODE + PAGE

    def test_a_missing_second_page_is_not_missed_by_what_ends_before_it(self, rig: Rig) -> None:
        rig.turn_paging_on()
        rig.map(CODE + PAGE, CODE + PAGE, 0)
        rig.memory.write(self.AT, JMP_SELF)
        assert lengths(rig.find(self.AT)) == [2]

    def test_a_block_before_it_is_kept(self, rig: Rig) -> None:
        rig.memory.write(self.AT - 1, NOP + MOV_EAX)
        first = rig.find(self.AT - 1)
        rig.find(self.AT)
        assert rig.find(self.AT - 1) is first

    def test_fifteen_bytes_in_all_proportions(self, rig: Rig) -> None:
        for before in range(1, 15):
            at = CODE + PAGE - before
            rig.memory.write(at, b"\x3e" * 10 + MOV_EAX)
            assert lengths(rig.find(at)) == [15]
            rig.memory.write(at, b"\x3e" * 11 + MOV_EAX)
            with pytest.raises(GuestFault) as fault:
                rig.find(at).operations[0]()
            assert fault.value.vector == Vector.GP

    def test_there_is_a_bound_on_how_many_are_kept(self, rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(blocks, "MAX_LOOSE_BLOCKS", 4)
        for value in range(20):
            rig.memory.write(self.AT, b"\xb8" + value.to_bytes(4, "little"))
            rig.find(self.AT).operations[0]()
            assert rig.cpu.state.gpr[EAX] == value
            assert len(rig.cache._loose) <= 4


@dataclass(slots=True)
class Flash:
    """A device whose bytes a test changes behind everybody's back."""

    data: bytearray
    loads: int = 0

    def load(self, offset: int, size_bytes: int) -> int:
        self.loads += 1
        return int.from_bytes(self.data[offset : offset + size_bytes], "little")

    def store(self, offset: int, size_bytes: int, value: int) -> None:
        self.data[offset : offset + size_bytes] = value.to_bytes(size_bytes, "little")


class TestOtherMemory:
    @pytest.fixture
    def flash(self, rig: Rig) -> Iterator[Flash]:
        device = Flash(bytearray(INC_EAX + NOP * (2 * PAGE - 1)))
        rig.memory.map_device(0xE000_0000, 2 * PAGE, device)
        yield device
        assert device.loads

    def test_a_devices_code_is_fetched_each_time(self, rig: Rig, flash: Flash) -> None:
        rig.find(0xE000_0000).operations[0]()
        flash.data[0] = INC_EBX[0]
        rig.find(0xE000_0000).operations[0]()
        assert (rig.cpu.state.gpr[EAX], rig.cpu.state.gpr[EBX]) == (1, 1)
        assert not rig.is_fetched(0xE000_0000)
        assert lengths(rig.find(0xE000_0000)) == [1]

    def test_an_instruction_across_two_pages_of_a_device(self, rig: Rig, flash: Flash) -> None:
        flash.data[PAGE - 2 : PAGE + 3] = MOV_EAX
        rig.find(0xE000_0000 + PAGE - 2).operations[0]()
        assert rig.cpu.state.gpr[EAX] == 0x1234_5678

    def test_nothing_there_reads_as_ones(self, rig: Rig) -> None:
        with pytest.raises(GuestFault) as fault:
            rig.find(0xD000_0000).operations[0]()
        assert fault.value.vector == Vector.UD

    def test_a_rom_is_cached_and_stores_do_nothing_to_it(self, rig: Rig) -> None:
        image = bytearray(0x1_0000)
        image[0x100:0x103] = INC_EAX + JMP_SELF
        rig.memory.map_rom(bytes(image))
        block = rig.find(0xF_0100)
        assert rig.is_fetched(0xF_0100)
        rig.memory.store(0xF_0100, 1, 0x90)
        assert block.operations
        assert rig.find(0xFFFF_0100) is block  # its other place, below 4 GiB

    def test_an_instruction_across_two_pages_of_the_rom_below_four_gibibytes(self, rig: Rig) -> None:
        image = bytearray(0x1_0000)
        image[0xFFE:0x1003] = MOV_EAX
        rig.memory.map_rom(bytes(image))
        rig.find(0xFFFF_0FFE).operations[0]()
        assert rig.cpu.state.gpr[EAX] == 0x1234_5678


class TestEviction:
    def test_everything_goes_when_there_are_too_many_pages(self, rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(blocks, "MAX_PAGES", 4)
        found = []
        for page in range(5):
            rig.memory.write(CODE + page * PAGE, INC_EAX + JMP_SELF)
            found.append(rig.find(CODE + page * PAGE))
        assert [bool(block.operations) for block in found] == [False, False, False, False, True]
        flags = [bool(rig.memory.page_flags[(CODE >> 12) + page] & HOLDS_CODE) for page in range(5)]
        assert flags == [False, False, False, False, True]
        assert [rig.is_fetched(CODE + page * PAGE) for page in range(5)] == flags
        assert rig.find(CODE).operations
        assert found[4].operations

    def test_a_program_that_walks_through_pages_still_runs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(blocks, "MAX_PAGES", 3)
        rig = Rig()
        rig.cache.detach()
        engine = Interpreter(rig.cpu, DebugControl())
        engine.enter()
        for page in range(8):
            rig.memory.write(CODE + page * PAGE, INC_EAX + b"\xe9\xfa\x0f\0\0")  # inc eax; jmp to the next page
        rig.memory.write(CODE + 8 * PAGE, b"\xe9" + (-8 * PAGE - 5 & MASK32).to_bytes(4, "little"))
        rig.cpu.state.eip = CODE
        engine.run(17 * 10)
        assert rig.cpu.state.gpr[EAX] == 80
        assert rig.cpu.state.eip == CODE


class TestRunning:
    """Under the interpreter: code that pulls itself from under its own feet."""

    @pytest.fixture
    def engine(self, rig: Rig) -> Interpreter:
        rig.cache.detach()
        engine = Interpreter(rig.cpu, DebugControl())
        engine.enter()
        rig.turn_paging_on()
        rig.cpu.state.eip = CODE
        return engine

    def test_a_store_to_a_page_table_acts_on_the_next_instruction(self, rig: Rig, engine: Interpreter) -> None:
        entry = TABLE + 4 * (CODE >> 12)
        store = b"\xc7\x05" + entry.to_bytes(4, "little") + (0x9000 | P | RW).to_bytes(4, "little")
        rig.memory.write(CODE, store + INC_EBX * 4)
        rig.memory.write(0x9000 + len(store), INC_ECX + INC_EDX * 3)
        engine.run(4)
        gpr = rig.cpu.state.gpr
        assert (gpr[EBX], gpr[ECX], gpr[EDX]) == (0, 1, 2)
        assert rig.cpu.clock.icount == 4

    def test_and_faults_there_if_nothing_is_mapped(self, rig: Rig, engine: Interpreter) -> None:
        entry = TABLE + 4 * (CODE >> 12)
        store = b"\xc7\x05" + entry.to_bytes(4, "little") + bytes(4)
        rig.memory.write(CODE, store + INC_EBX * 4)
        with pytest.raises(AssertionError):
            assert engine.run(4).chain == ()
        assert rig.cpu.clock.icount == 1
        assert rig.cpu.state.gpr[EBX] == 0

    @pytest.mark.parametrize("distance", range(5))
    def test_a_store_into_the_block_itself(self, rig: Rig, engine: Interpreter, distance: int) -> None:
        """inc ebx becomes inc ecx: before, at and behind the store."""
        target = CODE + 7 + distance
        store = b"\xc6\x05" + target.to_bytes(4, "little") + INC_ECX  # mov byte ptr [target], 41h
        rig.memory.write(CODE, store + INC_EBX * 6)
        engine.run(7)
        assert (rig.cpu.state.gpr[EBX], rig.cpu.state.gpr[ECX]) == (5, 1)
        assert rig.cpu.clock.icount == 7

    def test_a_rep_that_writes_over_its_own_block(self, rig: Rig, engine: Interpreter) -> None:
        rig.memory.write(CODE, b"\xf3\xaa" + INC_EBX * 6)  # rep stosb
        state = rig.cpu.state
        state.gpr[ECX], state.gpr[7], state.gpr[EAX] = 4, CODE + 3, INC_EDX[0]
        engine.run(7)
        assert (state.gpr[EBX], state.gpr[EDX]) == (2, 4)


@pytest.mark.parametrize("big", [True, False])
@pytest.mark.parametrize(
    ("code", "too_long"),
    [
        ("3e" * 14 + "90", False),
        ("3e" * 15 + "90", True),
        ("3e" * 15, True),
        ("3e" * 13 + "0fff", True),
        ("3e" * 12 + "8dc0", False),
        ("3e" * 13 + "8dc0", False),
        ("3e" * 14 + "8dc0", True),
        ("6667" * 5 + "0f0a", False),
        ("f0" * 13 + "01c8", False),
        ("f0" * 14 + "01c8", True),
        ("0f0a", False),
    ],
)
def test_what_is_too_long(code: str, too_long: bool, big: bool) -> None:
    data = bytes.fromhex(code)
    assert is_too_long(data.ljust(30, b"\0"), big) == too_long
    assert is_too_long(data.ljust(15, b"\0")[:15], big) == too_long
