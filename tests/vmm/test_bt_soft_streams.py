"""The software path to memory, with changes of tables and accesses at random."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from machine.faults import Vector
from machine.state import CR0_WP, CR4_PSE
from tests.oracles.assembler import assemble
from tests.vmm.bare import PAGE_DIRECTORY, PAGE_TABLE, STACK_TOP, Bare, map_low_memory, set_handler, set_page
from tests.vmm.soft import ACCESSES, FRAMES, OTHER_DIRECTORY, PAE_ENTRY, PAE_TABLES, PAGE, map_with_pae
from tests.vmm.test_bt_memory import Port
from tests.vmm.twins import Twins

CODE = 0x1_0000
SLOT_BYTES = 48
_ENTRIES = tuple(
    frame | bits
    for frame in (*FRAMES, PAGE_TABLE, PAGE_DIRECTORY, 0xB_8000, 0x50_0000)
    for bits in (7, 3, 1, 0x67, 0x27, 0x21, 0)
)
_PLACES = tuple(
    page + offset
    for page in (PAGE, PAGE + 0x1000, PAGE + 0x2000, PAGE + 0x40_0000, PAGE + 0x40_1000, 0x5_0000)
    for offset in (0xC00, 0xC04, 0xC08, 0xFFE)
)
_TABLES = (PAGE_TABLE, 0xFFC0_0000, 0x40_0000 + PAGE_TABLE)
_OPERATIONS = st.one_of(
    st.builds(lambda access, place: f"mov esi, {place:#x}\n{access}",
              st.sampled_from(ACCESSES[:-1]), st.sampled_from(_PLACES)),
    st.builds(lambda table, number, entry: f"mov dword ptr [{table + 0xC00 + 4 * number:#x}], {entry:#x}",
              st.sampled_from(_TABLES), st.integers(0, 3), st.sampled_from(_ENTRIES)),
    st.builds(lambda table, number, bits: f"xor dword ptr [{table + 0xC00 + 4 * number:#x}], {bits:#x}",
              st.sampled_from(_TABLES), st.integers(0, 3), st.sampled_from((1, 2, 0x1000, 0x20, 0x40, 0x1001))),
    st.builds(lambda entry: f"mov dword ptr [{PAGE_DIRECTORY + 4:#x}], {entry:#x}",
              st.sampled_from((PAGE_TABLE | 7, PAGE_TABLE | 0x25, 0x87, 0xE7, 0xC5, 0))),
    st.just(f"and dword ptr [{PAGE_DIRECTORY:#x}], ~0x20"),
    st.just(f"mov eax, cr0\nxor eax, {CR0_WP:#x}\nmov cr0, eax"),
    st.just(f"mov eax, cr3\nxor eax, {PAGE_DIRECTORY ^ OTHER_DIRECTORY:#x}\nmov cr3, eax"),
    st.just(f"mov esi, {PAGE + 0xD00:#x}\ncall esi"),
    st.just("mov eax, ecx\nout 0x50, al"),
)  # fmt: skip

# The same with PAE, where entries have an upper half.
_PAE_OPERATIONS = st.one_of(
    st.builds(lambda access, place: f"mov esi, {place:#x}\n{access}",
              st.sampled_from(ACCESSES[:-1]), st.sampled_from([each & ~0x40_0000 for each in _PLACES])),
    st.builds(lambda number, entry: f"mov dword ptr [{PAE_ENTRY + 8 * number:#x}], {entry:#x}",
              st.integers(0, 3), st.sampled_from(_ENTRIES)),
    st.builds(lambda number, bits: f"xor dword ptr [{PAE_ENTRY + 4 * number:#x}], {bits:#x}",
              st.integers(0, 7), st.sampled_from((1, 2, 0x10, 0x1000, 0x20, 0x40))),
    st.builds(lambda entry: f"mov dword ptr [{PAE_TABLES + 0x1008:#x}], {entry:#x}",
              st.sampled_from((PAE_TABLES + 0x3000 | 7, PAE_TABLES + 0x3000 | 0x25, 0x2000E7, 0xE7, 0x20E7, 0))),
    st.builds(lambda value: f"mov dword ptr [{PAE_TABLES + 0x100C:#x}], {value}", st.sampled_from((0, 1, 0x8000_0000))),
    st.just(f"mov eax, cr0\nxor eax, {CR0_WP:#x}\nmov cr0, eax"),
    st.just("mov eax, cr3\nmov cr3, eax"),
    st.just(f"mov esi, {PAGE + 0xD00:#x}\ncall esi"),
)  # fmt: skip


def random_guest(operations: list[str]) -> tuple[bytes, bytes]:
    """The code of the operations, over and over; and a page-fault handler that goes on with the next one, at EDI."""
    at, parts = CODE, []
    for number, operation in enumerate(operations):
        following = CODE + SLOT_BYTES * ((number + 1) % len(operations))
        source = (
            f"mov edi, {following:#x}\nmov esp, {STACK_TOP:#x}\ninc ecx\n{operation}\nmov edi, {following:#x}\njmp edi"
        )
        parts.append(assemble(source, origin=at).ljust(SLOT_BYTES, b"\xf4"))
        at += SLOT_BYTES
    return b"".join(parts), assemble("add esp, 4\nmov [esp], edi\nadd ebx, 13\niretd")


@pytest.mark.usefixtures("hasty")
class TestRandomStreams:
    @settings(max_examples=12, deadline=None)
    @given(operations=st.lists(_OPERATIONS, min_size=3, max_size=30))
    def test_tables_are_changed_and_pages_accessed_at_random(self, operations: list[str]) -> None:
        code, handler = random_guest(operations)

        def prepare(bare: Bare) -> None:
            map_low_memory(bare)
            memory = bare.memory
            bare.state.cr4 = CR4_PSE
            for directory in (PAGE_DIRECTORY, OTHER_DIRECTORY):
                memory.store(directory, 4, PAGE_TABLE | 7)
                memory.store(directory + 4, 4, 0x87)
                memory.store(directory + 4 * 1023, 4, directory | 3)
            for number, frame in enumerate(FRAMES):
                memory.write(frame + 0xD00, assemble(f"add ebx, {number}\nret"))
                set_page(bare, PAGE + 0x1000 * number, frame | 7)
            memory.write(CODE, code)
            set_handler(bare, Vector.PF, handler)
            bare.ports.register(0x50, 0x50, Port(lambda value: set_page(bare, PAGE, FRAMES[value & 3] | 7)))
            bare.state.eip = CODE

        with Twins("hlt", prepare) as twins:
            twins.run(len(operations) * 6 * 60, (701, 97))

    @settings(max_examples=12, deadline=None)
    @given(operations=st.lists(_PAE_OPERATIONS, min_size=3, max_size=30))
    def test_the_same_with_pae(self, operations: list[str]) -> None:
        code, handler = random_guest(operations)

        def prepare(bare: Bare) -> None:
            map_with_pae(bare)
            memory = bare.memory
            for number, frame in enumerate(FRAMES):
                memory.write(frame + 0xD00, assemble(f"add ebx, {number}\nret"))
                memory.store(PAE_ENTRY + 8 * number, 4, frame | 7)
            memory.write(CODE, code)
            set_handler(bare, Vector.PF, handler)
            bare.state.eip = CODE

        with Twins("hlt", prepare) as twins:
            twins.run(len(operations) * 6 * 60, (701, 97))
