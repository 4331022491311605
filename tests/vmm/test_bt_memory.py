"""`bt` against `interp` where memory changes under running code: tables, CR3, WP, U/S, A and D bits, A20, DMA.

The same under `trap`.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from machine.faults import Vector
from machine.state import CR0_PG, CR4_PAE, CR4_PSE, CS, EBX, ECX, EDX, MASK32, SEG_DB, SEG_G
from tests.oracles.assembler import assemble
from tests.vmm.bare import PAGE_DIRECTORY, PAGE_TABLE, Bare, map_low_memory, set_handler, set_page
from tests.vmm.twins import Twins

pytestmark = pytest.mark.usefixtures("native_core")

STEPS = (100, 33)
WINDOW = 0x30_0000  # a linear page whose entry the guests change
ENTRY = PAGE_TABLE + 4 * (WINDOW >> 12)
ACCESSED_DIRTY = 0x60


def skip_handler(bytes_: int) -> bytes:
    """A page-fault handler that goes on behind the instruction, and counts in EBX."""
    return assemble(f"add esp, 4\nadd dword ptr [esp], {bytes_}\ninc ebx\niretd")


class TestTables:
    @pytest.mark.parametrize("invlpg", ["", f"invlpg [{WINDOW:#x}]"])
    def test_a_page_moves_to_and_fro(self, invlpg: str) -> None:
        source = f"""
            1: inc ecx
            mov eax, ecx
            and eax, 1
            shl eax, 12
            add eax, 0x50007
            mov [{ENTRY:#x}], eax
            {invlpg}
            add [{WINDOW:#x}], ecx
            mov edx, [{WINDOW:#x}]
            xor ebx, edx
            jmp 1b
        """
        with Twins(source, map_low_memory) as twins:
            twins.run(3000, STEPS)
            assert twins.reference.memory.load(0x5_0000, 4) != twins.reference.memory.load(0x5_1000, 4)

    def test_code_moves_to_and_fro(self) -> None:
        def prepare(bare: Bare) -> None:
            map_low_memory(bare)
            bare.memory.write(0x5_0000, assemble("add ebx, 3\ncall 1f\nret\n1: inc edx\nret", origin=WINDOW))
            bare.memory.write(0x5_1000, assemble("sub ebx, 1\nnop\nxor edx, ebx\nret", origin=WINDOW))

        source = f"""
            mov esi, {WINDOW:#x}
            1: inc ecx
            mov eax, ecx
            and eax, 1
            shl eax, 12
            add eax, 0x50007
            mov [{ENTRY:#x}], eax
            call esi
            call esi
            jmp 1b
        """
        with Twins(source, prepare) as twins:
            twins.run(3000, STEPS)
            assert twins.reference.state.gpr[EBX] > 100

    def test_code_that_moves_itself(self) -> None:
        """The next instruction comes from the new page, at the same address."""

        def prepare(bare: Bare) -> None:
            map_low_memory(bare)
            set_page(bare, WINDOW, 0x5_0007)
            for page, (work, other) in enumerate((("inc ebx", 0x5_1007), ("dec edx", 0x5_0007))):
                code = f"1: mov dword ptr [{ENTRY:#x}], {other:#x}\n{work}\ninc ecx\njmp 1b"
                bare.memory.write(0x5_0000 + 0x1000 * page, assemble(code, origin=WINDOW))

        with Twins(f"mov esi, {WINDOW:#x}\njmp esi", prepare) as twins:
            twins.run(3000, STEPS)
            gpr = twins.reference.state.gpr
            assert gpr[EBX] > 300
            assert -gpr[EDX] & MASK32 > 300

    def test_code_moves_itself_whose_page_made_room_for_others(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """All of its window is given up while it runs, and with that the watch on its entry."""
        monkeypatch.setattr("vmm.native.windows.MAX_MAPPINGS", 0)
        table, other_directory, code_at = 0x10_8000, 0x10_9000, 0x40_0000

        def prepare(bare: Bare) -> None:
            map_low_memory(bare)
            bare.memory.store(PAGE_DIRECTORY + 4, 4, table | 7)
            bare.memory.store(table, 4, 0x5_0007)
            bare.memory.write(other_directory, bare.memory.read(PAGE_DIRECTORY, 4096))
            touches = "\n".join(f"add eax, [{0x6_0000 + 0x4000 * n:#x}]" for n in range(12))
            for page, (work, other) in enumerate((("inc ebx", 0x5_1007), ("dec edx", 0x5_0007))):
                switch = f"mov eax, cr3\nxor eax, {PAGE_DIRECTORY ^ other_directory:#x}\nmov cr3, eax"
                move = f"mov dword ptr [{table:#x}], {other:#x}"
                code = f"1: {switch}\n{touches}\n{move}\n{work}\ninc ecx\njmp 1b"
                bare.memory.write(0x5_0000 + 0x1000 * page, assemble(code, origin=code_at))

        with Twins(f"mov esi, {code_at:#x}\njmp esi", prepare) as twins:
            twins.run(6000, STEPS)
            gpr = twins.reference.state.gpr
            assert gpr[EBX] > 100
            assert -gpr[EDX] & MASK32 > 100
            assert twins.count("windows evicted") > 10

    def test_a_device_moves_the_code_that_writes_to_it(self) -> None:
        """As DMA into a page table does: the next instruction comes from the new page."""

        class Mover:
            def __init__(self, bare: Bare) -> None:
                self.bare = bare
                bare.ports.register(0x50, 0x50, self)

            def load_port(self, _port: int, _size_bytes: int) -> int:
                return 0

            def store_port(self, _port: int, _size_bytes: int, value: int) -> None:
                self.bare.memory.store(ENTRY, 4, 0x5_0007 | (value & 1) << 12)

        def prepare(bare: Bare) -> None:
            map_low_memory(bare)
            set_page(bare, WINDOW, 0x5_0007)
            for page, work in enumerate(("inc ebx", "dec edx")):
                code = f"1: inc ecx\nmov eax, ecx\nshr eax, 3\nout 0x50, al\n{work}\nnop\njmp 1b"
                bare.memory.write(0x5_0000 + 0x1000 * page, assemble(code, origin=WINDOW))
            Mover(bare)

        with Twins(f"mov esi, {WINDOW:#x}\njmp esi", prepare) as twins:
            twins.run(3000, STEPS)
            gpr = twins.reference.state.gpr
            assert gpr[EBX] > 100
            assert -gpr[EDX] & MASK32 > 100

    def test_pages_on_demand(self) -> None:
        """The handler maps what is missing, and unmaps something else: 4 pages for 16."""

        def prepare(bare: Bare) -> None:
            map_low_memory(bare)
            for page in range(16):
                set_page(bare, WINDOW + 0x1000 * page, 0)
            handler = f"""
                push eax
                push edi
                mov edi, [0x60000]
                mov dword ptr [{ENTRY:#x} + edi * 4], 0
                mov eax, cr2
                shr eax, 12
                sub eax, {WINDOW >> 12:#x}
                mov [0x60000], eax
                shl eax, 12
                and eax, 0x3000
                add eax, 0x50003
                mov edi, [0x60000]
                mov [{ENTRY:#x} + edi * 4], eax
                inc ebx
                pop edi
                pop eax
                add esp, 4
                iretd
            """
            set_handler(bare, Vector.PF, assemble(handler))

        source = f"1: inc ecx\nimul edx, ecx, 12345\nand edx, 0xffff\nadd [{WINDOW:#x} + edx], ecx\nadc edi, 0\njmp 1b"
        with Twins(source, prepare) as twins:
            twins.run(6000, STEPS)
            assert twins.reference.state.gpr[EBX] > 100

    def test_a_table_seen_through_itself(self) -> None:
        """A recursive directory entry: tables are written at addresses that they map themselves."""

        def prepare(bare: Bare) -> None:
            map_low_memory(bare)
            bare.memory.store(PAGE_DIRECTORY + 4 * 1023, 4, PAGE_DIRECTORY | 3 | ACCESSED_DIRTY)
            bare.memory.store(PAGE_DIRECTORY, 4, PAGE_TABLE | 7 | ACCESSED_DIRTY)

        source = f"""
            1: inc ecx
            mov eax, [0xffc00000 + {WINDOW >> 10:#x}]
            xor eax, 0x1000
            mov [0xffc00000 + {WINDOW >> 10:#x}], eax
            add [{WINDOW:#x}], ecx
            mov edx, [0xfffff000]
            add edx, [0xffc00000]
            jmp 1b
        """
        with Twins(source, prepare) as twins:
            twins.run(3000, STEPS)

    @pytest.mark.parametrize("access", ["mov edx, [{0}]", "mov [{0}], edx", "inc dword ptr [{0}]", "call {0}", "nop"])
    def test_accessed_and_dirty(self, access: str) -> None:
        """Cleared over and over in page and directory, and looked at after one access: it is compared with `interp`."""

        def prepare(bare: Bare) -> None:
            map_low_memory(bare)
            bare.memory.write(0x5_0000, b"\x43\xc3")
            set_page(bare, WINDOW, 0x5_0007)

        source = f"""
            mov esi, {WINDOW:#x}
            1: inc ecx
            and dword ptr [{ENTRY:#x}], {~ACCESSED_DIRTY & MASK32:#x}
            test ecx, 3
            jnz 2f
            and dword ptr [{PAGE_DIRECTORY:#x}], {~ACCESSED_DIRTY & MASK32:#x}
            2: {access.format("esi")}
            mov eax, [{ENTRY:#x}]
            mov edx, [{PAGE_DIRECTORY:#x}]
            mov ebp, ecx
            and ebp, 0xff
            mov [0x60000 + ebp * 8], eax
            mov [0x60004 + ebp * 8], edx
            jmp 1b
        """
        with Twins(source, prepare) as twins:
            twins.run(3000, STEPS)
            log = twins.reference.memory.load(0x6_0008, 4) & ACCESSED_DIRTY
            assert log == (0 if access == "nop" else 0x20 if "call" in access or access[4] == "e" else 0x60)


class TestRights:
    def test_write_protect_comes_and_goes(self) -> None:
        def prepare(bare: Bare) -> None:
            map_low_memory(bare)
            set_page(bare, WINDOW, 0x5_0005)
            set_handler(bare, Vector.PF, skip_handler(6))

        source = f"""
            1: inc ecx
            mov eax, cr0
            xor eax, 0x10000
            mov cr0, eax
            add [{WINDOW:#x}], ecx
            mov [{WINDOW:#x} + 4], ecx
            mov edx, [{WINDOW:#x}]
            jmp 1b
        """
        with Twins(source, prepare) as twins:
            twins.run(2000, STEPS)
            assert 50 < twins.reference.state.gpr[EBX] < twins.reference.state.gpr[ECX] * 2 - 50

    def test_a_user_sees_what_the_kernel_lets_it_see(self) -> None:
        """The handler, in ring 0, turns U/S and R/W on one after the other; the user's page goes back with INT."""

        def prepare(bare: Bare) -> None:
            user_mode(bare)
            bare.memory.write(0x8_0000, assemble(f"""
                1: inc ecx
                mov eax, [{WINDOW:#x}]
                add [{WINDOW:#x}], ecx
                int 0x30
                jmp 1b
            """, origin=0x8_0000))  # fmt: skip
            set_page(bare, WINDOW, 0x5_0001)
            handler = f"""
                push eax
                mov eax, [esp + 4]
                add [0x60000], eax
                test dword ptr [{ENTRY:#x}], 4
                jz 1f
                or dword ptr [{ENTRY:#x}], 2
                1: or dword ptr [{ENTRY:#x}], 4
                inc ebx
                pop eax
                add esp, 4
                iretd
            """
            set_handler(bare, Vector.PF, assemble(handler))
            gate_for_users(bare, 0x30, f"mov dword ptr [{ENTRY:#x}], 0x50001\nadd dword ptr [{WINDOW:#x}], 7\niretd")

        with Twins("hlt", prepare) as twins:
            twins.run(4000, STEPS)
            assert twins.reference.state.gpr[EBX] >= twins.reference.state.gpr[ECX] * 2 - 2 > 100

    def test_user_and_kernel_keep_apart(self) -> None:
        """A page that only the kernel sees, touched from both sides in turn."""

        def prepare(bare: Bare) -> None:
            user_mode(bare)
            code = f"1: inc ecx\nmov eax, [{WINDOW:#x}]\nmov [0x81000], ecx\nint 0x30\njmp 1b"
            bare.memory.write(0x8_0000, assemble(code, origin=0x8_0000))
            set_page(bare, WINDOW, 0x5_0003)
            set_handler(bare, Vector.PF, skip_handler(5))
            gate_for_users(bare, 0x30, f"add [{WINDOW:#x}], ecx\nmov edx, [0x81000]\niretd")

        with Twins("hlt", prepare) as twins:
            twins.run(3000, STEPS)
            assert twins.reference.state.gpr[EBX] == twins.reference.state.gpr[ECX] > 100


def user_mode(bare: Bare) -> None:
    """Run at CPL 3 from 80000h on, with a stack there; what is below 1 MiB but that is the kernel's."""
    map_low_memory(bare)
    for page in range(0x70):
        set_page(bare, page << 12, page << 12 | 3)
    memory, state = bare.memory, bare.state
    memory.write(0xA000 + 0x18, bytes.fromhex("ffff000000fbcf00 ffff000000f3cf00"))
    state.gdtr.limit = 0x27
    memory.store(0x6_8004, 4, 0x7_0000)
    memory.store(0x6_8008, 4, 0x10)
    state.tr.load(0x30, 0x6_8000, 0x67, 0x8B)
    for number, segment in enumerate(state.segments):
        selector, kind = (0x1B, 0xFB) if number == CS else (0x23, 0xF3)
        segment.load(selector, 0, MASK32, kind | SEG_DB | SEG_G)
    bare.cpu.set_cpl(3)
    state.eip, state.gpr[4] = 0x8_0000, 0x9_0000


def gate_for_users(bare: Bare, vector: int, source: str) -> None:
    """An interrupt gate of DPL 3."""
    set_handler(bare, vector, assemble(source))
    at = 0x9000 + 8 * vector + 4
    bare.memory.store(at, 4, bare.memory.load(at, 4) | 0x6000)


class TestAddressSpaces:
    @pytest.mark.parametrize("count", [2, 5])
    @pytest.mark.parametrize(("windows", "mappings"), [(16, 24_000), (2, 24_000), (3, 6), (1, 4)])
    def test_switches(self, count: int, windows: int, mappings: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Address spaces that share all but one page of data and one of code."""
        monkeypatch.setattr("vmm.native.windows.MAX_WINDOWS", windows)
        monkeypatch.setattr("vmm.native.windows.MAX_MAPPINGS", mappings)

        def prepare(bare: Bare) -> None:
            map_low_memory(bare)
            for space in range(count):
                directory, table = 0x18_0000 + 0x2000 * space, 0x18_1000 + 0x2000 * space
                bare.memory.write(table, bare.memory.read(PAGE_TABLE, 4096))
                bare.memory.store(directory, 4, table | 7)
                bare.memory.store(table + 4 * (WINDOW >> 12), 4, 0x5_0007 + 0x1000 * space)
                bare.memory.store(table + 4 * (WINDOW >> 12) + 4, 4, 0x6_0007 + 0x1000 * space)
                code = assemble(f"add ebx, {space}\nadd [{WINDOW + 0xFFE:#x}], ebx\nret", origin=WINDOW + 0x1800)
                bare.memory.write(0x6_0800 + 0x1000 * space, code)

        source = f"""
            mov esi, {WINDOW + 0x1800:#x}
            1: inc ecx
            mov eax, ecx
            xor edx, edx
            mov edi, {count}
            div edi
            shl edx, 13
            add edx, 0x180000
            mov cr3, edx
            add [{WINDOW:#x}], ecx
            call esi
            jmp 1b
        """
        with Twins(source, prepare) as twins:
            twins.run(4000, STEPS)
            words = {twins.reference.memory.load(0x5_0000 + 0x1000 * space, 4) for space in range(count)}
            assert len(words) == count

    def test_paging_goes_off_and_on(self) -> None:
        def prepare(bare: Bare) -> None:
            map_low_memory(bare)
            set_page(bare, WINDOW, 0x5_0007)

        source = f"1: inc ecx\nmov eax, cr0\nxor eax, {CR0_PG:#x}\nmov cr0, eax\nadd [{WINDOW:#x}], ecx\njmp 1b"
        with Twins(source, prepare) as twins:
            twins.run(2000, STEPS)
            assert twins.reference.memory.load(0x5_0000, 4) != twins.reference.memory.load(WINDOW, 4) != 0

    def test_large_pages(self) -> None:
        """The directory entry of a large page is changed under it, also between large and small."""

        def prepare(bare: Bare) -> None:
            map_low_memory(bare)
            bare.state.cr4 = CR4_PSE
            bare.memory.store(PAGE_DIRECTORY + 4, 4, 0x87)
            bare.memory.store(0x12_0000 + 4 * 0x55, 4, 0x5_6007)

        source = f"""
            1: inc ecx
            add [0x455000], ecx
            mov edx, [0x45602c]
            mov dword ptr [{PAGE_DIRECTORY + 4:#x}], 0x120007
            add [0x455004], ecx
            mov dword ptr [{PAGE_DIRECTORY + 4:#x}], 0x87
            jmp 1b
        """
        with Twins(source, prepare) as twins:
            twins.run(2000, STEPS)
            assert twins.reference.memory.load(0x5_5000, 4) == twins.reference.memory.load(0x5_6004, 4) != 0

    def test_pae(self) -> None:
        def prepare(bare: Bare) -> None:
            memory = bare.memory
            memory.store(0x12_0000, 4, 0x12_1001)
            for half in range(2):
                memory.store(0x12_1000 + 8 * half, 4, 0x20_0087 * half | 0x87)
            memory.store(0x12_1000 + 16, 4, 0x12_2007)
            memory.store(0x12_2000, 4, 0x5_0007)
            bare.state.cr3, bare.state.cr4 = 0x12_0000, CR4_PAE
            bare.state.cr0 |= CR0_PG
            bare.cpu.mmu.flush()
            set_handler(bare, Vector.PF, skip_handler(6))

        source = """
            1: inc ecx
            mov [0x400000], ecx
            xor dword ptr [0x122000], 0x1000
            xor dword ptr [0x122004], 0x1000
            add edx, [0x400000]
            xor dword ptr [0x122004], 0x1000
            add edx, [0x400000]
            jmp 1b
        """
        with Twins(source, prepare) as twins:
            twins.run(2000, STEPS)
            assert twins.reference.state.gpr[EBX] > 100  # bit 44 of an address is reserved


class Port:
    """Does something when it is written to."""

    def __init__(self, action: Callable[[int], None]) -> None:
        self.action = action

    def load_port(self, _port: int, _size_bytes: int) -> int:
        return 0

    def store_port(self, _port: int, _size_bytes: int, value: int) -> None:
        self.action(value)


class TestFromOutside:
    def test_a20(self) -> None:
        def prepare(bare: Bare) -> None:
            def gate(value: int) -> None:
                bare.memory.a20_enabled = bool(value & 1)

            bare.ports.register(0x92, 0x92, Port(gate))
            bare.memory.write(0x10_5000, b"\x43\x90\x90\xc3")  # inc ebx; nop; nop; ret
            bare.memory.write(0x5000, b"\x83\xc2\x02\xc3")  # add edx, 2; ret

        source = """
            mov esi, 0x105000
            1: inc ecx
            mov eax, ecx
            out 0x92, al
            add [0x106000], ecx
            call esi
            mov edi, [0x6000]
            jmp 1b
        """
        with Twins(source, prepare) as twins:
            twins.run(2000, STEPS)
            gpr = twins.reference.state.gpr
            assert gpr[EBX] >= 100
            assert gpr[EDX] >= 200

    def test_a_device_writes_to_data_code_and_tables(self) -> None:
        def prepare(bare: Bare) -> None:
            map_low_memory(bare)
            bare.memory.write(0x5000, b"\xb8\x00\x00\x00\x00\xc3")  # mov eax, 0; ret

            def transfer(value: int) -> None:
                bare.memory.write(0x5001, bytes([value]))
                bare.memory.write(0x6000, bytes([value]) * 8)
                set_page(bare, WINDOW, 0x5_0007 + (value & 3) * 0x1000)

            bare.ports.register(0x50, 0x50, Port(transfer))

        source = f"""
            mov esi, 0x5000
            1: inc ecx
            mov eax, ecx
            out 0x50, al
            call esi
            add [{WINDOW:#x}], eax
            add ebx, [0x6004]
            jmp 1b
        """
        with Twins(source, prepare) as twins:
            twins.run(2000, STEPS)

    def test_a_debugger_changes_registers_and_memory_between_runs(self) -> None:
        with Twins(f"1: inc ecx\nadd [{WINDOW:#x}], ecx\nmov edx, [{WINDOW:#x}]\njmp 1b", map_low_memory) as twins:
            for turn in range(10):
                twins.run(40 + turn)
                twins.each(lambda bare: bare.state.gpr.__setitem__(ECX, bare.state.gpr[ECX] * 3))
                twins.each(lambda bare: bare.memory.store(WINDOW, 4, 5))
                twins.each(lambda bare: bare.memory.store(PAGE_DIRECTORY, 4, PAGE_TABLE | 7))
                twins.each(lambda bare: set_page(bare, WINDOW, 0x5_0007 if bare.state.gpr[ECX] & 1 else 0x5_1007))


class TestBitStrings:
    """A bit in memory by an index in a register, which reaches 256 MiB to either side, and around 4 GiB."""

    SOURCE = """
        mov ebp, 0x51000
        1: inc ecx
        imul eax, ecx, 0x9e3779b1
        sar eax, 15
        {name} [ebp + 4], eax
        setc dl
        adc ebx, 0
        mov esi, esp
        {name} [0x51000], esp
        {name} [ebp + ecx * 4 - 0x100], ecx
        adc ebx, edx
        jmp 1b
    """

    @pytest.mark.parametrize("name", ["bt", "bts", "btr", "btc"])
    def test_bits_anywhere_in_memory(self, name: str) -> None:
        def prepare(bare: Bare) -> None:
            map_low_memory(bare)
            bare.memory.write(0x4_0000, bytes(range(256)) * 0x200)

        with Twins(self.SOURCE.format(name=name), prepare) as twins:
            twins.run(2000, STEPS)
            assert twins.reference.state.gpr[EBX] > 50
            assert twins.count(f"callouts of {name}") < 20

    @pytest.mark.parametrize("name", ["bt", "bts"])
    @pytest.mark.parametrize("rights", [0, 5])
    def test_faults_leave_the_flags_alone(self, name: str, rights: int) -> None:
        """Not present, or read-only with CR0.WP: the handler finds CF as it was, and the error code of a write."""

        def prepare(bare: Bare) -> None:
            map_low_memory(bare)
            set_page(bare, WINDOW, 0x5_0000 | rights)
            bare.memory.write(0x5_0000, bytes(range(7, 256)))
            handler = "pop eax\nadd edi, eax\nadd dword ptr [esp], 4\nmov eax, [esp + 8]\nxor edi, eax\niretd"
            set_handler(bare, Vector.PF, assemble(handler))

        source = f"""
            mov eax, cr0
            or eax, 0x10000
            mov cr0, eax
            mov ebp, {WINDOW - 0x100:#x}
            1: inc ecx
            imul edx, ecx, 37
            and edx, 0xfff
            bt ecx, 3
            {name} [ebp], edx
            adc ebx, 0
            jmp 1b
        """
        with Twins(source, prepare) as twins:
            twins.run(3000, STEPS)
            assert twins.reference.state.gpr[EBX] > 50
