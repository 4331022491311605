"""Instructions that keep faulting are translated anew without the fault, and back: `bt` against `interp`."""

from __future__ import annotations

import pytest

from machine.state import CR4_PAE, CR4_PSE, EBX, EDI, EDX
from tests.oracles.assembler import assemble
from tests.vmm.bare import PAGE_DIRECTORY, PAGE_TABLE, Bare, map_low_memory, set_page
from tests.vmm.twins import Twins
from vmm.native.adaptation import INSTRUCTION_FAULTS, INSTRUCTION_INNOCENT, SOFT_FAULTS

PAGE = 0x30_0000  # a linear page whose entry the guests change
ENTRY = PAGE_TABLE + 4 * (PAGE >> 12)
STEPS = (2000, 333)


def large_and_small(bare: Bare) -> None:
    """4 to 8 MiB once more as a large page."""
    map_low_memory(bare)
    bare.state.cr4 = CR4_PSE
    bare.memory.store(PAGE_DIRECTORY + 4, 4, 0x87)


def recursive(bare: Bare) -> None:
    """The tables at the end of the address space."""
    map_low_memory(bare)
    bare.memory.store(PAGE_DIRECTORY + 4 * 1023, 4, PAGE_DIRECTORY | 3)


def pae(bare: Bare) -> None:
    """2 MiB of small pages, whose table is at 123000h, then 2 MiB as a large page."""
    memory = bare.memory
    map_low_memory(bare)
    memory.store(0x12_0000, 4, 0x12_1001)
    memory.store(0x12_1000, 4, 0x12_3007)
    memory.store(0x12_1008, 4, 0x20_0087)
    for page in range(512):
        memory.store(0x12_3000 + 8 * page, 4, page << 12 | 7)
    bare.state.cr3, bare.state.cr4 = 0x12_0000, CR4_PAE
    bare.cpu.mmu.flush()


# What faults again and again, and a guest in which it does.
HABITS = {
    "data beside code": ("inc dword ptr [0x1800]", map_low_memory),
    "data beside code, no paging": ("add [0x1800], ecx", lambda _bare: None),
    "pushed beside code": ("push ecx\nlea esp, [esp + 4]", lambda bare: bare.state.gpr.__setitem__(4, 0x1C00)),
    "across into code": ("mov [0x1ffe], ecx", map_low_memory),
    "not present": (f"mov [{ENTRY:#x}], edx", map_low_memory),
    "present": (f"xor dword ptr [{ENTRY:#x}], 0x1000\nadd ebx, [{PAGE:#x}]", map_low_memory),
    "rights": (f"xor dword ptr [{ENTRY:#x}], 6\nadd ebx, [{PAGE:#x}]", map_low_memory),
    "a directory": (f"xor dword ptr [{PAGE_DIRECTORY + 4:#x}], 0x200\nadd ebx, [0x450000]", large_and_small),
    "a large page": (f"xor dword ptr [{PAGE_DIRECTORY + 4:#x}], 0x40\nadd ebx, [0x450000]", large_and_small),
    "recursive": (f"xor dword ptr [0xffc00000 + {PAGE >> 10:#x}], 0x1000\nadd ebx, [{PAGE:#x}]", recursive),
    "PAE": ("xor dword ptr [0x123280], 0x1000\nadd ebx, [0x50000]", pae),
    "the screen": ("mov [0xb8000], ecx\nadd ebx, [0xb8000]", map_low_memory),
    "nothing": ("add ebx, [0x40000000]", lambda _bare: None),
}


def count(twins: Twins, *names: str) -> int:
    """The sum of some statistics of `bt`."""
    return sum(twins.count(name) for name in names)


@pytest.mark.parametrize("habit", HABITS)
def test_a_habit_is_noticed(habit: str) -> None:
    source, prepare = HABITS[habit]
    with Twins(f"1: inc ecx\n{source}\njmp 1b", prepare) as twins:
        twins.run(6000, STEPS)
        faults = count(twins, "trace faults", "device faults")
        assert count(twins, "adaptations", "soft forms") in (1, 2)
        assert SOFT_FAULTS <= faults <= 3 * INSTRUCTION_FAULTS
        assert count(twins, "translation units") < 20
        assert count(twins, "dispatch misses") < 20
        assert count(twins, "instructions decoded") < 100  # by the interpreter, for callouts


def test_an_innocent_instruction_gets_its_plain_form_back() -> None:
    with Twins("mov esi, 0x1800\n1: inc ecx\nmov [esi], edx\njmp 1b", map_low_memory) as twins:
        for turn in range(1, 4):
            twins.run(3 * (INSTRUCTION_FAULTS + 200), STEPS)
            assert (count(twins, "adaptations"), count(twins, "reversions")) == (turn, turn - 1)
            twins.each(lambda bare: bare.state.gpr.__setitem__(6, 0x5_0000))
            twins.run(3 * (INSTRUCTION_INNOCENT + 40), STEPS)
            assert count(twins, "reversions") == turn
            callouts = count(twins, "callouts")
            twins.run(6000, STEPS)
            assert count(twins, "callouts") == callouts
            twins.each(lambda bare: bare.state.gpr.__setitem__(6, 0x1800))


def test_an_instruction_that_leaves_its_device_gets_its_plain_form_back() -> None:
    with Twins("mov esi, 0xb8000\n1: inc ecx\nmov [esi], edx\njmp 1b", map_low_memory) as twins:
        twins.run(3 * 4000, STEPS)
        assert (count(twins, "adaptations"), count(twins, "reversions")) == (1, 0)
        assert count(twins, "device faults") <= 2 * INSTRUCTION_FAULTS
        twins.each(lambda bare: bare.state.gpr.__setitem__(6, 0x5_0000))
        twins.run(3 * 200, STEPS)
        callouts = count(twins, "callouts")
        twins.run(6000, STEPS)
        assert (count(twins, "adaptations"), count(twins, "reversions")) == (1, 1)
        assert count(twins, "callouts") == callouts


class Doorbell:
    """A device that interrupts when a certain value is stored."""

    def __init__(self, bare: Bare) -> None:
        self._lines = bare.lines

    def load(self, offset: int, size_bytes: int) -> int:
        return offset & (1 << 8 * size_bytes) - 1

    def store(self, _offset: int, _size_bytes: int, value: int) -> None:
        if value == 398:
            self._lines.set_intr(True)


@pytest.mark.parametrize("enable", ["sti", "popfd"])
def test_an_interrupt_that_comes_while_disabled_is_taken_when_emitted_code_enables_it(enable: str) -> None:
    source = f"""
        pushfd
        or dword ptr [esp], 0x200
        1: inc ecx
        mov [0xb8000], ecx
        cmp ecx, 400
        jb 1b
        add ebx, ecx
        {enable}
        nop
        1: inc edx
        jmp 1b
    """

    def prepare(bare: Bare) -> None:
        bare.memory.map_device(0xB_8000, 4096, Doorbell(bare))

    with Twins(source, prepare) as twins:
        before = twins.reference.state.gpr[EDX]
        stop = twins.run(4000)
        assert stop is not None
        assert twins.reference.state.halted
        assert twins.reference.state.gpr[EBX] == 400
        assert twins.reference.state.gpr[EDX] == before
        assert count(twins, "callouts of mov") > 300


def test_a_shared_copy_routine_is_called_out_for_no_longer_than_that_pays() -> None:
    """Of 64 copies one goes to the screen; while others write beside code, which says nothing about the routine."""
    source = """
        1: mov esi, 0x50000
        inc edx
        mov edi, 0x60000
        test edx, 63
        jnz 2f
        mov edi, 0xb8000
        2: call 3f
        mov [0x1800], edx
        jmp 1b
        3: movsb
        ret
    """
    with Twins(source, map_low_memory) as twins:
        twins.run(9 * 64 * 40, (20_000, 3333))
        assert count(twins, "callouts of movsb") < 500
        assert count(twins, "device faults") > 20


@pytest.mark.parametrize(
    ("instruction", "adaptations", "callouts"),
    [("mov eax, 0x11111111", 1, "mov"), ("mov esp, 0x11111111", 1, "mov"), ("add eax, 0x11111111", 2, "add")],
)
def test_code_that_is_patched_before_each_execution_is_not_translated_each_time(
    instruction: str, adaptations: int, callouts: str
) -> None:
    """The operand of a MOV is read where it stands; others are interpreted."""
    source = f"""
        1: inc ecx
        mov [2f + 1], ecx
        jmp 2f
        2: {instruction}
        add ebx, eax
        lea edx, [edx + ebx]
        jmp 1b
    """
    with Twins(source, map_low_memory) as twins:
        twins.run(7 * 500, STEPS)
        assert count(twins, "translation units") < 40
        assert count(twins, "adaptations to written code") == adaptations
        assert 400 < count(twins, f"callouts of {callouts}") < 500


def test_the_opcode_before_an_operand_that_is_read_where_it_stands_changes() -> None:
    """MOV EAX becomes MOV EBX, an ADD, and MOV again, while its operand is written all the time."""
    source = """
        1: inc ecx
        mov [2f + 1], ecx
        mov edi, ecx
        shr edi, 6
        and edi, 3
        mov al, [3f + edi]
        mov [2f], al
        jmp 2f
        2: mov eax, 0x11111111
        add edx, eax
        xor edx, ebx
        jmp 1b
        3: .byte 0xb8, 0xbb, 0x05, 0xb8
    """
    with Twins(source, map_low_memory) as twins:
        twins.run(12 * 600, STEPS)
        assert count(twins, "adaptations to written code") >= 1
        assert count(twins, "translation units") < 200


def test_patched_code_that_settles_down_runs_natively_again() -> None:
    """The patch is of another instruction each time: of other length, of a branch, and of what cannot be decoded."""
    source = """
        mov edi, 0
        1: inc ecx
        test edi, edi
        jnz 2f
        mov eax, ecx
        and eax, 3
        mov eax, [5f + eax * 4]
        mov [3f], eax
        2: jmp 3f
        nop
        3: .skip 4, 0x90
        add ebx, ecx
        jmp 1b
        5: .byte 0x90, 0x90, 0x90, 0x90
        .byte 0x83, 0xc2, 0x05, 0x90
        .byte 0xeb, 0x01, 0xff, 0x42
        .byte 0xb2, 0x07, 0xf7, 0xd2
    """
    with Twins(source, map_low_memory) as twins:
        twins.run(6000, STEPS)
        assert count(twins, "adaptations to written code") >= 1
        twins.each(lambda bare: bare.state.gpr.__setitem__(EDI, 1))
        twins.run(6000, STEPS)
        callouts = count(twins, "callouts")
        twins.run(6000, STEPS)
        assert count(twins, "callouts") == callouts


def test_a_table_that_is_changed_throughout_costs_no_more_than_some_faults() -> None:
    """The pages of a table are mapped, then each entry is changed: `bt` lets go of the table, and runs the loop."""

    def prepare(bare: Bare) -> None:
        map_low_memory(bare)
        bare.memory.store(PAGE_DIRECTORY + 4, 4, 0x13_0007)
        for page in range(1024):
            bare.memory.store(0x13_0000 + 4 * page, 4, page << 12 | 7)

    source = """
        2: mov edi, 0x400000
        1: add ebx, [edi]
        add edi, 0x1000
        cmp edi, 0x410000
        jb 1b
        mov esi, 0x130000
        1: xor dword ptr [esi], 2
        add esi, 4
        cmp esi, 0x131000
        jb 1b
        inc edx
        jmp 2b
    """
    with Twins(source, prepare) as twins:
        twins.run(25_000, (5000,))
        assert count(twins, "page tables given up") == 6
        assert count(twins, "trace faults", "callouts") < 200


def test_code_that_writes_itself() -> None:
    """The patched instruction is in the TU of the patcher, in the page of the patcher, and across two pages."""
    source = """
        mov esi, 0x1ffe
        1: inc ecx
        mov [2f + 1], ecx
        2: mov eax, 0x11111111
        add ebx, eax
        mov [3f + 2], cl
        jmp 3f
        nop
        3: lea edx, [edx + 1]
        mov [esi + 1], ecx
        call esi
        jmp 1b
    """

    def prepare(bare: Bare) -> None:
        map_low_memory(bare)
        bare.memory.write(0x1FFE, assemble("mov edi, 0\nadd ebx, edi\nret", origin=0x1FFE))

    with Twins(source, prepare) as twins:
        twins.run(5000, (700, 100))
        assert twins.reference.state.gpr[EDI] > 100


def test_code_on_two_aliases_of_a_page_is_written_through_both() -> None:
    source = f"""
        mov esi, 0x50000
        mov edi, {PAGE:#x}
        1: inc ecx
        call esi
        mov [edi + 1], ecx
        call edi
        mov [esi + 1], edx
        jmp 1b
    """

    def prepare(bare: Bare) -> None:
        map_low_memory(bare)
        set_page(bare, PAGE, 0x5_0007)
        bare.memory.write(0x5_0000, assemble("mov eax, 5\nadd ebx, eax\nlea edx, [eax + ecx]\nret"))

    with Twins(source, prepare) as twins:
        twins.run(5000, (700, 100))
        assert twins.reference.state.gpr[EBX] > 1000
        assert twins.count("adaptations") == 2
        assert twins.count("adaptations to written code") == 2


def test_an_adapted_instruction_is_replaced_by_another() -> None:
    """The code at the address of an adapted instruction changes: what is there now is what runs."""
    with Twins("1: inc ecx\nmov [0x1800], ecx\nadd ebx, ecx\njmp 1b", map_low_memory) as twins:
        twins.run(2000, STEPS)
        assert twins.count("adaptations") == 1
        code = assemble("1: inc ecx\nlea edx, [ecx * 2 + edx]\nsub ebx, ecx\njmp 1b", origin=0x1000)
        twins.each(lambda bare: bare.memory.write(0x1000, code))
        twins.run(2000, STEPS)


def test_a_debugger_and_a_device_write_to_pages_that_are_mapped() -> None:
    with Twins(f"1: inc ecx\nadd ebx, [{PAGE:#x}]\nmov [0x1800], ebx\njmp 1b", map_low_memory) as twins:
        for turn in range(8):
            twins.run(400, (400,))
            twins.each(lambda bare, value=turn: bare.memory.write(PAGE, bytes([value]) * 8))  # type: ignore[misc]
            twins.each(lambda bare, value=turn: bare.memory.write(0x1800, bytes([value]) * 8))  # type: ignore[misc]
            twins.each(lambda bare, value=turn: set_page(bare, PAGE, 0x5_0007 + 0x1000 * value))  # type: ignore[misc]
