"""Windows as the shadow of page tables: what is mapped, with which rights, and what a store to a table does to it."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from machine.alu import build_alu
from machine.clock import Clock
from machine.cpu import Cpu
from machine.lines import CpuLines
from machine.memory import HOLDS_CODE, HOLDS_TABLE, PhysicalMemory
from machine.paging import ACCESSED, DIRTY, PS, RW, US, P
from machine.ports import PortBus
from machine.state import CR0_PE, CR0_PG, CR0_WP, CR4_PAE, CR4_PSE
from vmm.native import hostmemory, windows
from vmm.native.adaptation import TABLE_WRITES
from vmm.native.shadows import MappingLedger
from vmm.native.windows import (
    FILLS_KEPT,
    GUARD_BYTES,
    HOLDS_SHADOWED_TABLE,
    STRIDE_BYTES,
    WINDOW_BYTES,
    WINDOW_MAPPINGS,
    Refusal,
    Windows,
    WindowsError,
)

DIRECTORY, TABLE = 0x1_0000, 0x1_1000
OTHER_DIRECTORY, OTHER_TABLE = 0x1_2000, 0x1_3000
PAE_POINTERS, PAE_DIRECTORY, PAE_TABLE = 0x1_4000, 0x1_5000, 0x1_6000
PAGE = 0x2_0000  # a page of RAM that is mapped, with its number in its first bytes
FLAG = 0x80
ALL = PAGE | P | RW | US | ACCESSED | DIRTY


class Subject:
    """Windows over a CPU with paging: linear page N of TABLE is wherever a test puts it."""

    def __init__(self) -> None:
        self.memory = PhysicalMemory(2 << 20)
        self.cpu = Cpu(self.memory, PortBus(), CpuLines(), Clock(), build_alu())
        self.state = self.cpu.state
        self.state.cr0 |= CR0_PE | CR0_PG
        self.state.cr3 = DIRECTORY
        self.memory.store(DIRECTORY, 4, TABLE | P | RW | US | ACCESSED)
        self.memory.store(OTHER_DIRECTORY, 4, OTHER_TABLE | P | RW | US | ACCESSED)
        for page in range(16):
            self.memory.store(PAGE + page * 4096, 4, page)
        self.windows = Windows(self.cpu)
        self.windows.attach()
        self.dropped: list[tuple[int, int]] = []
        self.windows.on_drop.append(lambda host, page: self.dropped.append((host, page)))

    def close(self) -> None:
        self.windows.detach()
        self.memory.close()

    def map(self, page: int, physical: int, rights: int = RW | US, *, table: int = TABLE) -> None:
        self.memory.store(table + 4 * page, 4, physical | rights | P)

    def entry(self, page: int, *, table: int = TABLE) -> int:
        return self.memory.load(table + 4 * page, 4)

    def fill(self, linear: int, *, write: bool = False) -> bool:
        self.windows.select()
        return self.windows.fill(linear, write=write)

    def rights(self, linear: int) -> str:
        """What the host says of the page in the current window: `---`, `r--` or `rw-`."""
        return rights_at(self.windows.current.host + linear)

    def value(self, linear: int) -> int:
        return ctypes.c_uint32.from_address(self.windows.current.host + linear).value


def mappings_of(subject: Subject) -> int:
    """How many host mappings the reservations of its windows are made of."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    bounds = [[int(text, 16) for text in line.split()[0].split("-")] for line in lines]
    starts = [window.host - GUARD_BYTES for window in subject.windows._windows.values()]
    return sum(low < start + STRIDE_BYTES and start < high for start in starts for low, high in bounds)


def assert_nothing_is_known(subject: Subject) -> None:
    shadows = subject.windows._shadows
    assert not shadows._by_frame
    assert not shadows._by_table
    assert not shadows._by_upper
    assert not shadows._table_uses
    assert not any(window.regions for window in subject.windows._windows.values())
    assert MappingLedger.used == WINDOW_MAPPINGS * len(subject.windows._windows)


def rights_at(host: int) -> str:
    for line in Path("/proc/self/maps").read_text().splitlines():
        bounds, rights = line.split()[:2]
        first, end = (int(text, 16) for text in bounds.split("-"))
        if first <= host < end:
            return rights[:3]
    return "nothing"


@pytest.fixture
def subject() -> Iterator[Subject]:
    made = Subject()
    yield made
    made.close()


class TestFill:
    def test_a_page_appears_where_the_guest_has_it(self, subject: Subject) -> None:
        subject.map(5, PAGE + 0x3000, RW | US | DIRTY)
        assert subject.fill(0x5123)
        assert subject.value(0x5000) == 3
        assert subject.rights(0x5000) == "rw-"
        assert subject.rights(0x4000) == subject.rights(0x6000) == "---"
        assert not subject.windows.current.host % WINDOW_BYTES

    def test_it_reserves_space_on_both_sides(self, subject: Subject) -> None:
        host = subject.windows.current.host
        assert rights_at(host - 1) == rights_at(host + WINDOW_BYTES) == "---"
        assert STRIDE_BYTES == 3 * WINDOW_BYTES

    def test_reading_leaves_d_clear_and_the_page_read_only(self, subject: Subject) -> None:
        subject.map(5, PAGE)
        assert subject.fill(0x5000)
        assert subject.entry(5) & (ACCESSED | DIRTY) == ACCESSED
        assert subject.rights(0x5000) == "r--"
        assert subject.fill(0x5000, write=True)
        assert subject.entry(5) & DIRTY
        assert subject.rights(0x5000) == "rw-"
        assert subject.dropped == []

    def test_a_region_that_is_asked_for_in_vain_is_not_watched(self, subject: Subject) -> None:
        assert not subject.fill(0x7000)
        subject.map(5, 0xB_8000)
        assert not subject.fill(0x5000)
        assert_nothing_is_known(subject)

    def test_a_fault_of_the_guests_own_changes_nothing(self, subject: Subject) -> None:
        subject.map(5, PAGE, US)
        subject.state.cpl = 3
        assert not subject.fill(0x5000, write=True)
        assert subject.entry(5) & (ACCESSED | DIRTY) == 0
        assert not subject.fill(0x7000)
        assert subject.rights(0x5000) == subject.rights(0x7000) == "---"

    @pytest.mark.parametrize(
        ("rights", "user", "protect", "reads", "writes"),
        [
            (RW | US, True, False, True, True),
            (US, True, False, True, False),
            (RW, True, False, False, False),
            (RW, False, True, True, True),
            (0, False, True, True, False),
            (0, False, False, True, True),
            (US, False, True, True, False),
            (US, False, False, True, True),
        ],
    )
    def test_rights(
        self, subject: Subject, *, rights: int, user: bool, protect: bool, reads: bool, writes: bool
    ) -> None:
        subject.map(5, PAGE, rights | DIRTY)
        subject.state.cpl = 3 if user else 0
        subject.state.cr0 |= CR0_WP if protect else 0
        assert subject.fill(0x5000) is reads
        assert subject.rights(0x5000) == ("rw-" if writes else "r--" if reads else "---")
        assert subject.fill(0x5000, write=True) is False

    def test_each_privilege_and_wp_has_a_window(self, subject: Subject) -> None:
        hosts = set()
        for cpl, protect in ((0, 0), (0, CR0_WP), (3, 0)):
            subject.state.cpl, subject.state.cr0 = cpl, CR0_PE | CR0_PG | protect
            hosts.add(subject.windows.select().host)
        assert len(hosts) == 3
        subject.state.cr0 |= CR0_WP  # means nothing to a user
        assert subject.windows.select().host in hosts

    def test_what_is_no_ram_is_left_to_the_interpreter(self, subject: Subject) -> None:
        subject.map(5, 0xA_0000)
        subject.map(6, 0x4000_0000)
        assert not subject.fill(0x5000)
        assert not subject.fill(0x6000, write=True)
        assert subject.rights(0x5000) == "---"

    def test_rom_is_readable_only(self, subject: Subject) -> None:
        subject.memory.map_rom(b"\x5a" * 0x1_0000)
        subject.map(5, 0xF_0000, RW | US | DIRTY)
        assert subject.fill(0x5000)
        assert subject.value(0x5000) == 0x5A5A5A5A
        assert subject.rights(0x5000) == "r--"
        assert not subject.fill(0x5000, write=True)

    def test_a_watched_page_is_readable_only_also_when_the_flag_comes_later(self, subject: Subject) -> None:
        for page in (5, 6):
            subject.map(page, PAGE + 0x1000 * page, RW | DIRTY)
        subject.memory.flag_page(PAGE + 0x5000 >> 12, FLAG)
        assert subject.fill(0x5000)
        assert subject.fill(0x6000)
        assert (subject.rights(0x5000), subject.rights(0x6000)) == ("r--", "rw-")
        subject.memory.flag_page(PAGE + 0x6000 >> 12, FLAG)
        assert subject.rights(0x6000) == "r--"
        assert not subject.fill(0x6000, write=True)
        subject.memory.page_flags[PAGE + 0x6000 >> 12] = 0
        assert subject.fill(0x6000, write=True)
        assert subject.rights(0x6000) == "rw-"

    def test_a_flag_protects_every_alias(self, subject: Subject) -> None:
        for page in (5, 6):
            subject.map(page, PAGE, RW | US | DIRTY)
            assert subject.fill(page << 12)
        kernel = subject.windows.current
        subject.state.cpl = 3
        assert subject.fill(0x5000)
        subject.memory.flag_page(PAGE >> 12, FLAG)
        assert subject.rights(0x5000) == "r--"
        assert rights_at(kernel.host + 0x5000) == rights_at(kernel.host + 0x6000) == "r--"

    def test_a_page_that_is_mapped_and_faults_again_is_not_ours_to_mend(self, subject: Subject) -> None:
        subject.map(5, PAGE, RW | DIRTY)
        assert subject.fill(0x5000)
        assert not subject.fill(0x5000)
        assert not subject.fill(0x5000, write=True)

    def test_a_large_page_is_mapped_at_once_but_for_what_is_watched(self, subject: Subject) -> None:
        subject.state.cr4 = CR4_PSE
        subject.memory.store(DIRECTORY + 4, 4, P | RW | PS | DIRTY)
        subject.memory.flag_page(PAGE + 0x5000 >> 12, FLAG)
        assert subject.fill(0x40_0000 + PAGE + 0x2000)
        assert [subject.value(0x40_0000 + PAGE + 0x1000 * page) for page in range(16)] == list(range(16))
        rights = [subject.rights(0x40_0000 + PAGE + 0x1000 * page) for page in range(3, 8)]
        assert rights == ["rw-", "rw-", "r--", "rw-", "rw-"]
        assert subject.rights(0x40_0000 + 0x9_F000) == subject.rights(0x5F_F000) == "rw-"
        assert subject.rights(0x40_0000 + 0xA_0000) == subject.rights(0x40_0000 + 0xF_F000) == "---"
        assert subject.rights(0x60_0000) == subject.rights(0x3F_F000) == "---"
        assert not subject.fill(0x40_0000 + PAGE + 0x5000, write=True)
        refusals = [subject.windows.refusal]
        assert not subject.fill(0x40_0000 + 0xB_8000)
        assert [*refusals, subject.windows.refusal] == [Refusal.TRACE, Refusal.DEVICE]
        assert not subject.fill(0x60_0000)

    def test_a_large_page_becomes_writable_with_its_first_write(self, subject: Subject) -> None:
        subject.state.cr4 = CR4_PSE
        subject.memory.store(DIRECTORY + 4, 4, P | RW | PS)
        subject.memory.flag_page(PAGE + 0x5000 >> 12, FLAG)
        pages = range(0x40_0000 + PAGE + 0x3000, 0x40_0000 + PAGE + 0x8000, 4096)
        assert subject.fill(pages[0])
        assert subject.memory.load(DIRECTORY + 4, 4) & (ACCESSED | DIRTY) == ACCESSED
        assert {subject.rights(page) for page in pages} == {"r--"}
        assert not subject.fill(pages[2], write=True)
        assert not subject.memory.load(DIRECTORY + 4, 4) & DIRTY
        assert subject.fill(pages[0], write=True)
        assert subject.memory.load(DIRECTORY + 4, 4) & DIRTY
        assert [subject.rights(page) for page in pages] == ["rw-", "rw-", "r--", "rw-", "rw-"]
        subject.memory.page_flags[PAGE + 0x5000 >> 12] = 0
        assert subject.fill(pages[2], write=True)
        assert subject.rights(pages[2]) == "rw-"
        subject.memory.store(DIRECTORY + 4, 4, P | RW | PS | ACCESSED)
        assert {subject.rights(page) for page in pages} == {"---"}

    def test_rom_in_a_large_page_is_readable(self, subject: Subject) -> None:
        subject.memory.map_rom(b"\x5a" * 0x1_0000)
        subject.state.cr4 = CR4_PSE
        subject.memory.store(DIRECTORY + 4, 4, P | RW | PS | DIRTY)
        assert subject.fill(0x40_0000)
        assert subject.rights(0x40_0000 + 0xF_0000) == "r--"
        assert subject.rights(0x40_0000 + 0xE_F000) == "---"
        assert subject.value(0x40_0000 + 0xF_0000) == 0x5A5A5A5A

    def test_what_the_guest_has_touched_is_mapped_around(self, subject: Subject) -> None:
        """Beside page 18 of 16 to 23: nothing that an A or D bit would have to be set for."""
        for page, bits in (
            (16, ACCESSED | RW | DIRTY), (17, RW), (18, ACCESSED), (19, ACCESSED | RW), (20, ACCESSED | DIRTY),
            (21, ACCESSED | RW | DIRTY), (24, ACCESSED | RW | DIRTY),
        ):  # fmt: skip
            subject.map(page, PAGE + 0x1000 * (page * 5 % 16), bits)
        subject.map(22, 0xB_8000, ACCESSED | RW | DIRTY)
        subject.map(23, PAGE + 0x1000 * (23 * 5 % 16), ACCESSED | RW | DIRTY)
        subject.memory.flag_page(PAGE + 0x1000 * (21 * 5 % 16) >> 12, FLAG)
        subject.state.cr0 |= CR0_WP
        before = subject.memory.read(TABLE, 4096)
        assert subject.fill(0x1_2000)
        rights = [subject.rights(page << 12) for page in range(15, 25)]
        assert rights == ["---", "rw-", "---", "r--", "r--", "r--", "r--", "---", "rw-", "---"]
        assert all(subject.value(page << 12) == page * 5 % 16 for page in (16, 18, 19, 20, 21, 23))
        assert subject.memory.read(TABLE, 4096) == before
        assert subject.windows.counters["hidden faults"] == 1

    def test_a_page_that_was_never_touched_brings_no_others(self, subject: Subject) -> None:
        for page in range(16, 24):
            subject.map(page, PAGE + 0x1000 * (page & 15), 0 if page == 18 else ACCESSED)
        assert subject.fill(0x1_2000)
        assert [subject.rights(page << 12) for page in range(16, 24)] == ["---"] * 2 + ["r--"] + ["---"] * 5

    def test_a_page_that_comes_and_goes_brings_no_others(self, subject: Subject) -> None:
        subject.windows.keep_tables()
        for page in (5, 6, 30):
            subject.map(page, PAGE + 0x1000 * page, RW | ACCESSED | DIRTY)
        subject.fill(30 << 12)
        for _ in range(2):
            subject.map(5, PAGE, RW | ACCESSED | DIRTY)
            subject.fill(0x5000)
            subject.map(5, 0)
        assert subject.rights(0x6000) == "rw-"
        subject.map(6, 0)
        subject.map(6, PAGE + 0x6000, RW | ACCESSED | DIRTY)
        subject.map(5, PAGE, RW | ACCESSED | DIRTY)
        subject.fill(0x5000)
        assert (subject.rights(0x5000), subject.rights(0x6000)) == ("rw-", "---")

    def test_a_page_that_moves_is_mapped_where_it_is_now_without_a_fault(self, subject: Subject) -> None:
        subject.map(5, PAGE, RW | ACCESSED | DIRTY)
        subject.fill(0x5000)
        faults = subject.windows.counters["hidden faults"]
        for number, (rights, expected) in enumerate(
            [(RW | ACCESSED | DIRTY, "rw-"), (ACCESSED | DIRTY, "rw-"), (RW | ACCESSED, "r--"), (RW | ACCESSED, "r--")]
        ):
            subject.map(5, PAGE + 0x1000 * (number + 1), rights)
            assert (subject.rights(0x5000), subject.value(0x5000)) == (expected, number + 1)
            assert len(subject.dropped) == number + 1
        assert subject.windows.counters["hidden faults"] == faults
        subject.map(5, PAGE + 0x7000, RW | DIRTY)
        assert subject.rights(0x5000) == "---"

    def test_one_that_was_gone_comes_back_without_a_fault_if_it_was_touched(self, subject: Subject) -> None:
        for page in (5, 6):
            subject.map(page, PAGE, RW | ACCESSED | DIRTY)
        subject.fill(0x5000)
        subject.map(6, 0)
        subject.map(5, 0)
        subject.map(5, PAGE + 0x1000, RW)
        assert subject.rights(0x5000) == "---"
        subject.map(5, PAGE + 0x2000, RW | ACCESSED | DIRTY)
        assert (subject.rights(0x5000), subject.value(0x5000)) == ("rw-", 2)
        subject.map(7, PAGE, RW | ACCESSED | DIRTY)
        assert subject.rights(0x7000) == "---"
        subject.memory.flag_page((PAGE >> 12) + 3, HOLDS_CODE)
        subject.map(5, PAGE + 0x3000, RW | ACCESSED | DIRTY)
        assert (subject.rights(0x5000), subject.value(0x5000)) == ("r--", 3)
        subject.memory.flag_page((PAGE >> 12) + 2, HOLDS_CODE)
        subject.map(5, 0xB_8000, RW | ACCESSED | DIRTY)
        assert subject.rights(0x5000) == "---"

    def test_a_user_gets_nothing_of_the_supervisors_back(self, subject: Subject) -> None:
        subject.state.cpl = 3
        for page in (5, 6):
            subject.map(page, PAGE, RW | US | ACCESSED | DIRTY)
            subject.fill(page << 12)
            subject.map(page, PAGE + 0x1000, RW | ACCESSED | DIRTY)
            assert subject.rights(page << 12) == "---"
            subject.map(page, PAGE + 0x1000, US | ACCESSED | DIRTY)
            assert subject.rights(page << 12) == "r--"

    @pytest.mark.parametrize("touched", [0, 3, 40, 99])
    def test_a_run_is_mapped_at_once(self, subject: Subject, touched: int) -> None:
        bits = ACCESSED | DIRTY | RW
        for page in range(100):
            subject.map(300 + page, 0x10_0000 + 0x1000 * page, bits)
        subject.map(299, 0x10_0000 - 0x1000, bits)  # not RAM
        subject.map(400, 0x10_0000 + 0x1000 * 100, bits & ~DIRTY)
        assert subject.fill(300 + touched << 12)
        assert {subject.rights(300 + page << 12) for page in range(100)} == {"rw-"}
        assert subject.rights(299 << 12) == subject.rights(400 << 12) == "---"
        assert subject.windows.counters["pages mapped"] == 100
        assert mappings_of(subject) == 3

    def test_a_run_ends_where_a_page_is_watched_or_mapped(self, subject: Subject) -> None:
        for page in range(64):
            subject.map(300 + page, 0x10_0000 + 0x1000 * page, ACCESSED | DIRTY | RW)
        subject.memory.flag_page((0x10_0000 >> 12) + 10, FLAG)
        assert subject.fill(340 << 12)
        assert [subject.rights(300 + page << 12) for page in (9, 10, 11, 63)] == ["---", "---", "rw-", "rw-"]
        assert subject.fill(310 << 12)
        assert subject.rights(310 << 12) == "r--"
        assert subject.fill(300 << 12)
        assert [subject.rights(300 + page << 12) for page in (0, 9, 10, 11)] == ["rw-", "rw-", "r--", "rw-"]
        assert mappings_of(subject) == 5

    def test_another_user_bit_ends_a_run(self, subject: Subject) -> None:
        for page in range(64):
            bits = ACCESSED | DIRTY | RW | (US if page < 20 else 0)
            subject.map(300 + page, 0x10_0000 + 0x1000 * page, bits)
        subject.state.cpl = 3
        assert subject.fill(301 << 12)
        assert [subject.rights(300 + page << 12) for page in (0, 19, 20)] == ["rw-", "rw-", "---"]

    def test_without_paging_linear_is_physical(self, subject: Subject) -> None:
        subject.state.cr0 = CR0_PE
        assert subject.fill(PAGE + 0x4000, write=True)
        assert subject.value(PAGE + 0x4000) == 4
        assert subject.rights(0x9_F000) == subject.rights(0x10_0000) == subject.rights(0x1F_F000) == "rw-"
        assert subject.rights(0xA_0000) == subject.rights(0xF_F000) == subject.rights(0x20_0000) == "---"
        assert not subject.fill(0x20_0000)
        assert subject.windows.refusal is Refusal.DEVICE


class TestOtherWindows:
    def test_a_window_is_found_by_what_it_shows(self, subject: Subject) -> None:
        kernel = subject.windows.select()
        subject.state.cpl = 3
        user = subject.windows.select()
        assert subject.windows.lookup(DIRECTORY, user=False) is kernel
        assert subject.windows.lookup(DIRECTORY, user=True) is user
        assert subject.windows.lookup(OTHER_DIRECTORY, user=True) is None
        subject.state.cr0 |= CR0_WP
        assert subject.windows.lookup(DIRECTORY, user=False) is None

    def test_a_window_is_found_by_a_host_address(self, subject: Subject) -> None:
        host = subject.windows.current.host
        assert subject.windows.at(host) is subject.windows.at(host + WINDOW_BYTES - 1) is subject.windows.current
        assert subject.windows.at(host - 1) is None
        assert subject.windows.at(host + WINDOW_BYTES) is None
        subject.windows.drop_all()
        assert subject.windows.at(host) in (None, subject.windows.current)

    def test_another_window_than_the_current_one_is_filled_by_its_own_rules(self, subject: Subject) -> None:
        subject.map(5, PAGE + 0x1000, RW)
        subject.map(5, PAGE + 0x2000, RW | US, table=OTHER_TABLE)
        kernel = subject.windows.select()
        subject.state.cr3, subject.state.cpl = OTHER_DIRECTORY, 3
        user = subject.windows.select()
        assert subject.windows.fill(0x5000, write=True, window=kernel)
        assert ctypes.c_uint32.from_address(kernel.host + 0x5000).value == 1
        assert rights_at(user.host + 0x5000) == "---"
        assert subject.windows.current is user
        subject.state.cr3, subject.state.cpl = DIRECTORY, 0
        subject.windows.select()
        assert subject.windows.fill(0x5000, write=False, window=user)
        assert ctypes.c_uint32.from_address(user.host + 0x5000).value == 2


class TestTables:
    def test_a_page_table_is_never_writable_in_a_window(self, subject: Subject) -> None:
        subject.map(5, TABLE, RW | DIRTY)
        subject.map(6, PAGE, RW | DIRTY)
        subject.map(7, DIRECTORY, RW | DIRTY)
        for page in (5, 6, 7):
            assert subject.fill(page << 12)
        assert [subject.rights(page << 12) for page in (5, 6, 7)] == ["r--", "rw-", "r--"]
        assert not subject.fill(0x5000, write=True)

    def test_nor_one_that_only_maps_itself(self, subject: Subject) -> None:
        subject.map(5, TABLE, RW | DIRTY | ACCESSED)
        assert subject.fill(0x5000)
        assert subject.rights(0x5000) == "r--"

    def test_nor_by_a_write(self, subject: Subject) -> None:
        subject.map(5, TABLE, RW | DIRTY | ACCESSED)
        assert not subject.fill(0x5000, write=True)
        assert subject.rights(0x5000) == "---"

    @pytest.mark.parametrize(
        "value",
        [
            0,
            PAGE + 0x1000 | P | RW | US | DIRTY,
            PAGE | P | RW | US | DIRTY,
            0xB_8000 | P | RW | US | ACCESSED | DIRTY,
        ],
        ids=["not present", "elsewhere", "a cleared", "a device"],
    )
    def test_a_changed_entry_drops_its_page_at_once(self, subject: Subject, value: int) -> None:
        subject.map(5, PAGE, ALL)
        subject.map(6, PAGE, ALL)
        subject.fill(0x5000)
        subject.fill(0x6000)
        subject.memory.store(TABLE + 20, 4, value)
        assert (subject.rights(0x5000), subject.rights(0x6000)) == ("---", "rw-")
        assert subject.dropped == [(subject.windows.current.host, 5)]

    @pytest.mark.parametrize("value", [ALL & ~DIRTY, ALL & ~RW, ALL & ~DIRTY & ~US], ids=["d", "rw", "d and us"])
    def test_a_lost_right_to_write_leaves_the_page_readable(self, subject: Subject, value: int) -> None:
        subject.state.cr0 |= CR0_WP
        subject.map(5, PAGE, ALL)
        subject.fill(0x5000, write=True)
        subject.memory.store(TABLE + 20, 4, value)
        assert subject.rights(0x5000) == "r--"
        assert subject.dropped == []
        assert subject.fill(0x5000, write=True) is bool(value & RW)
        assert bool(subject.entry(5) & DIRTY) is bool(value & RW or value & DIRTY)
        subject.state.cpl = 3
        subject.memory.store(TABLE + 20, 4, ALL)
        subject.fill(0x5000)
        assert subject.rights(0x5000) == "rw-"
        subject.memory.store(TABLE + 20, 4, ALL & ~US)
        assert subject.rights(0x5000) == "---"

    def test_without_wp_a_kernel_loses_nothing_with_rw(self, subject: Subject) -> None:
        subject.map(5, PAGE, ALL)
        subject.fill(0x5000, write=True)
        subject.memory.store(TABLE + 20, 4, ALL & ~RW)
        assert subject.rights(0x5000) == "rw-"

    @pytest.mark.parametrize("bits", [0x200, 0x18, 0x100, 0xE00], ids=["free", "cache", "global", "all free"])
    def test_bits_without_meaning_here_drop_nothing(self, subject: Subject, bits: int) -> None:
        subject.map(5, PAGE, ALL)
        subject.fill(0x5000)
        subject.memory.store(TABLE + 20, 4, ALL | bits)
        subject.memory.store(DIRECTORY, 4, subject.memory.load(DIRECTORY, 4) | bits | DIRTY)
        assert subject.rights(0x5000) == "rw-"
        assert subject.dropped == []

    def test_many_stores_in_a_row_let_go_of_a_table(self, subject: Subject) -> None:
        for page in range(64):
            subject.map(page, PAGE + 0x1000 * (page & 7), RW | US)
        flags = subject.memory.page_flags
        for turn in range(3):
            subject.fill(0x5000)
            subject.state.cpl = 3
            subject.fill(0x5000)
            subject.state.cpl = 0
            stores = 0
            while flags[TABLE >> 12]:
                subject.map(20 + stores, PAGE if subject.entry(20 + stores) & 0x1000 else PAGE + 0x1000, RW | US)
                stores += 1
            assert stores == TABLE_WRITES << turn
            assert subject.rights(0x5000) == "---"
        assert not flags[DIRECTORY >> 12]
        assert subject.windows.counters["page tables given up"] == 3

    def test_a_touched_page_begins_the_row_anew(self, subject: Subject) -> None:
        for page in range(64):
            subject.map(page, PAGE, RW | US)
        for page in range(5, 64):
            subject.fill(page << 12)
            subject.map(page - 1, PAGE + 0x1000)
        assert subject.memory.page_flags[TABLE >> 12]
        assert subject.windows.counters["page tables given up"] == 0

    def test_the_cpus_own_bits_are_no_stores(self, subject: Subject) -> None:
        for page in range(64):
            subject.map(page, PAGE + 0x1000 * (page & 7), RW | US)
        subject.fill(0x5000)
        for page in range(64):
            subject.cpu.mmu.translate(page << 12, write=True, user=False)
        assert subject.rights(0x5000) == "r--"

    @pytest.mark.parametrize("value", [ACCESSED | DIRTY, 0], ids=["granted", "the same"])
    def test_a_and_d_set_drop_nothing(self, subject: Subject, value: int) -> None:
        subject.map(5, PAGE, RW)
        subject.fill(0x5000)
        subject.memory.store(TABLE + 20, 4, subject.entry(5) | value)
        assert subject.rights(0x5000) == "r--"
        assert subject.dropped == []

    @pytest.mark.parametrize(("offset", "data"), [(20, b"\0"), (18, b"\0\0\0"), (20, b"\1\xff"), (23, b"\xff")])
    def test_a_part_of_an_entry_is_enough(self, subject: Subject, offset: int, data: bytes) -> None:
        subject.map(5, PAGE, RW)
        subject.fill(0x5000)
        subject.memory.write(TABLE + offset, data)
        assert subject.rights(0x5000) == "---"

    @pytest.mark.parametrize("offset", [16, 24])
    def test_a_neighbour_is_not(self, subject: Subject, offset: int) -> None:
        subject.map(5, PAGE, RW)
        subject.fill(0x5000)
        subject.memory.write(TABLE + offset, b"\xff\xff\xff\xff")
        assert subject.rights(0x5000) == "r--"

    def test_a_directory_entry_drops_all_below_it_in_every_window(self, subject: Subject) -> None:
        for page in (5, 36):
            subject.map(page, PAGE, RW | US)
        subject.fill(0x5000)
        kernel = subject.windows.current
        subject.state.cpl = 3
        subject.fill(0x2_4000)
        subject.memory.store(DIRECTORY, 4, 0)
        assert subject.rights(0x2_4000) == rights_at(kernel.host + 0x5000) == "---"
        assert sorted(subject.dropped) == sorted([(kernel.host, 5), (subject.windows.current.host, 36)])

    def test_a_table_is_watched_while_something_came_from_it(self, subject: Subject) -> None:
        subject.map(5, PAGE)
        subject.fill(0x5000)
        flags = subject.memory.page_flags
        assert flags[TABLE >> 12] & flags[DIRECTORY >> 12] & HOLDS_SHADOWED_TABLE
        subject.memory.store(TABLE + 20, 4, 0)
        assert flags[TABLE >> 12] & flags[DIRECTORY >> 12] & HOLDS_SHADOWED_TABLE, "it may well come back"
        subject.memory.store(DIRECTORY, 4, 0)
        assert not (flags[TABLE >> 12] | flags[DIRECTORY >> 12]) & HOLDS_SHADOWED_TABLE
        subject.memory.store(DIRECTORY, 4, TABLE | P | RW | US | ACCESSED)
        subject.map(5, PAGE)
        subject.fill(0x5000)
        subject.memory.store(TABLE + 20, 4, 0)
        assert subject.rights(0x5000) == "---"

    def test_nothing_is_kept_of_what_is_gone(self, subject: Subject) -> None:
        for _ in range(3):
            for page in range(8):
                subject.map(page, PAGE + 0x1000 * page, RW | US)
                subject.fill(page << 12, write=True)
            subject.memory.store(DIRECTORY, 4, 0)
            subject.memory.store(DIRECTORY, 4, TABLE | P | RW | US)
        assert_nothing_is_known(subject)

    def test_a_recursive_entry_is_used_twice_on_one_way(self, subject: Subject) -> None:
        subject.memory.store(DIRECTORY + 4 * 1023, 4, DIRECTORY | P | RW)
        assert subject.fill(0xFFFF_F000)
        assert subject.rights(0xFFFF_F000) == "r--"
        subject.memory.store(DIRECTORY + 4 * 1023, 4, 0)
        assert subject.rights(0xFFFF_F000) == "---"
        assert_nothing_is_known(subject)

    def test_pae_entries_are_eight_bytes(self, subject: Subject) -> None:
        self.use_pae(subject)
        assert subject.fill(0x5000)
        for half in (0, 4):
            assert subject.value(0x5000) == 2
            entry = PAE_TABLE + 40 + half
            value = subject.memory.load(entry, 4)
            subject.memory.store(entry, 4, value ^ 0x4000_0000)
            assert subject.rights(0x5000) == "---"
            subject.memory.store(entry, 4, value)

    def test_no_bit_of_the_upper_half_of_an_entry_is_a_or_d(self, subject: Subject) -> None:
        self.use_pae(subject)
        assert subject.fill(0x5000)
        subject.memory.store(PAE_TABLE + 44, 4, ACCESSED)  # bit 37, which is reserved
        assert subject.rights(0x5000) == "---"
        assert not subject.fill(0x5000)

    def test_the_width_of_an_entry_is_that_of_its_window(self, subject: Subject) -> None:
        self.use_pae(subject)
        subject.fill(0x5000)
        pae = subject.windows.current
        subject.state.cr3, subject.state.cr4 = DIRECTORY, 0
        subject.map(5, PAGE)
        subject.fill(0x5000)
        subject.memory.store(PAE_TABLE + 44, 4, 1)
        assert rights_at(pae.host + 0x5000) == "---"
        subject.state.cr4 = CR4_PAE
        subject.memory.store(TABLE + 20, 4, 0)
        assert subject.rights(0x5000) == "---"

    def test_a_bit_that_is_reserved_in_a_pointer_entry_is_no_a_bit(self, subject: Subject) -> None:
        self.use_pae(subject)
        subject.fill(0x5000)
        subject.memory.store(PAE_POINTERS, 4, PAE_DIRECTORY | P | ACCESSED)
        assert subject.rights(0x5000) == "---"
        assert not subject.fill(0x5000)

    @staticmethod
    def use_pae(subject: Subject) -> None:
        subject.state.cr3, subject.state.cr4 = PAE_POINTERS, CR4_PAE
        subject.memory.store(PAE_POINTERS, 4, PAE_DIRECTORY | P)
        subject.memory.store(PAE_DIRECTORY, 4, PAE_TABLE | P | RW | US)
        subject.memory.store(PAE_TABLE + 40, 4, PAGE + 0x2000 | P | RW | US)

    def test_the_interpreters_own_flag_does_not_matter(self, subject: Subject) -> None:
        subject.map(5, PAGE, RW | DIRTY)
        subject.cpu.mmu.translate(0x5000, write=True, user=False)
        assert subject.memory.page_flags[TABLE >> 12] == HOLDS_TABLE
        subject.fill(0x5000)
        subject.cpu.mmu.flush()
        subject.memory.store(TABLE + 20, 4, 0)
        assert subject.rights(0x5000) == "---"


class TestManyWindows:
    def test_the_one_that_was_not_used_for_longest_goes(
        self, subject: Subject, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(windows, "MAX_WINDOWS", 3)
        hosts = {}
        for number in range(3):
            subject.state.cr3 = DIRECTORY + 0x1_0000 * number
            hosts[number] = subject.windows.select().host
        subject.state.cr3 = DIRECTORY
        subject.windows.select()
        subject.map(5, PAGE)
        subject.fill(0x5000)
        subject.state.cr3 = DIRECTORY + 0x3_0000
        assert subject.windows.select().host == hosts[1]
        assert subject.windows.counters["windows evicted"] == 1
        subject.state.cr3 = DIRECTORY
        subject.windows.select()
        assert subject.rights(0x5000) == "r--"

    def test_an_evicted_window_is_empty_and_dropped_page_by_page(
        self, subject: Subject, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(windows, "MAX_WINDOWS", 1)
        subject.map(5, PAGE)
        subject.fill(0x5000)
        host = subject.windows.current.host
        subject.state.cr3 = OTHER_DIRECTORY
        assert subject.windows.select().host == host
        assert subject.rights(0x5000) == "---"
        assert subject.dropped == [(host, 5)]
        assert not subject.memory.page_flags[TABLE >> 12] & HOLDS_SHADOWED_TABLE

    def test_a_full_ledger_empties_other_windows_before_the_current_one(
        self, subject: Subject, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(windows, "MAX_MAPPINGS", 0)
        for page in range(0, 16 * 8, 8):
            subject.map(page, PAGE)
            subject.map(page, PAGE, table=OTHER_TABLE)
        for page in range(FILLS_KEPT):
            subject.fill(page << 15)
        first = subject.windows.current
        subject.state.cr3 = OTHER_DIRECTORY
        for number in range(FILLS_KEPT):
            assert subject.fill(number << 15)
            assert not first.regions
            assert rights_at(first.host) == "---"
            assert [subject.rights(page << 15) for page in range(number + 1)] == ["r--"] * (number + 1)
        assert subject.fill(FILLS_KEPT << 15)
        assert [subject.rights(page << 15) for page in range(9)] == ["---"] * FILLS_KEPT + ["r--"]
        assert subject.windows.counters["windows evicted"] == 2

    def test_two_windows_that_one_instruction_needs_do_not_empty_each_other(
        self, subject: Subject, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(windows, "MAX_MAPPINGS", 0)
        kernel = subject.windows.select()
        subject.state.cpl = 3
        user = subject.windows.select()
        for page in (5, 6):
            subject.map(page << 4, PAGE, RW | US)
            assert subject.windows.fill(page << 16, write=False, window=kernel)
            assert subject.windows.fill(page << 16, write=False, window=user)
        assert {rights_at(window.host + (page << 16)) for window in (kernel, user) for page in (5, 6)} == {"r--"}

    def test_the_ledger_knows_the_host_mappings(self, subject: Subject) -> None:
        """At least as many as there are, and not many more, whatever is mapped, protected and dropped."""
        chance = random.Random(5)
        most = 0
        for _ in range(400):
            page = chance.randrange(64)
            choice = chance.randrange(6)
            if choice == 0:
                subject.map(page, PAGE + 0x1000 * chance.randrange(16), RW | chance.choice([0, ACCESSED, DIRTY, 0x60]))
            elif choice == 1:
                subject.memory.flag_page((PAGE >> 12) + chance.randrange(16), FLAG)
            elif choice == 2:
                subject.memory.page_flags[(PAGE >> 12) + chance.randrange(16)] = 0
            elif choice == 3:
                for number in range(8):
                    subject.map(page + number, PAGE + 0x1000 * number, RW | ACCESSED | DIRTY)
            else:
                subject.fill(page << 12, write=choice == 4)
            mappings = mappings_of(subject)
            assert mappings <= MappingLedger.used <= mappings + 8
            most = max(most, mappings)
        assert most > 20

    def test_a_host_that_has_no_room_gets_other_pages_back(
        self, subject: Subject, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        subject.map(5, PAGE)
        subject.map(5, PAGE, table=OTHER_TABLE)
        subject.fill(0x5000)
        first = subject.windows.current
        subject.state.cr3 = OTHER_DIRECTORY
        really, calls = hostmemory.map_file, []

        def refuse_once(host: int, length: int, fd: int, offset: int, *, writable: bool) -> None:
            calls.append(host)
            if len(calls) == 1:
                raise hostmemory.HostMemoryError(12, "no room")
            really(host, length, fd, offset, writable=writable)

        monkeypatch.setattr(hostmemory, "map_file", refuse_once)
        assert subject.fill(0x5000)
        assert not first.regions
        assert subject.rights(0x5000) == "r--"

        def refuse(*_arguments: object, **_options: object) -> None:
            raise hostmemory.HostMemoryError(12, "no room")

        monkeypatch.setattr(hostmemory, "map_file", refuse)
        subject.map(6, PAGE, table=OTHER_TABLE)
        with pytest.raises(WindowsError, match="no room"):
            subject.fill(0x6000)

    @pytest.mark.parametrize("what", ["protect", "unmap"])
    def test_a_host_that_cannot_split_a_mapping_loses_the_window(
        self, subject: Subject, monkeypatch: pytest.MonkeyPatch, what: str
    ) -> None:
        """What must go is gone, also if only everything can go."""
        for page in (5, 6, 7):
            subject.map(page, PAGE + 0x1000 * page, ALL & 0xFFF)
        subject.fill(0x6000)
        really = getattr(hostmemory, what)

        def refuse(host: int, length: int, **options: bool) -> None:
            if length < 1 << 22:
                raise hostmemory.HostMemoryError(12, "no room")
            really(host, length, **options)

        monkeypatch.setattr(hostmemory, what, refuse)
        if what == "protect":
            subject.memory.flag_page(PAGE + 0x6000 >> 12, FLAG)
        else:
            subject.memory.store(TABLE + 24, 4, 0)
        assert [subject.rights(page << 12) for page in (5, 6, 7)] == ["---"] * 3
        assert {page for _, page in subject.dropped} == {5, 6, 7}
        monkeypatch.undo()
        assert subject.fill(0x5000)

    def test_a_large_page_of_which_half_was_refused_is_mapped_anew(
        self, subject: Subject, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        subject.map(5, PAGE, table=OTHER_TABLE)
        subject.state.cr3 = OTHER_DIRECTORY
        subject.fill(0x5000)
        other = subject.windows.current
        subject.state.cr3, subject.state.cr4 = DIRECTORY, CR4_PSE
        subject.memory.store(DIRECTORY + 4, 4, P | RW | PS | DIRTY)
        really, calls = hostmemory.map_file, []

        def refuse_second(host: int, length: int, fd: int, offset: int, *, writable: bool) -> None:
            calls.append(host)
            if len(calls) == 2:
                raise hostmemory.HostMemoryError(12, "no room")
            really(host, length, fd, offset, writable=writable)

        monkeypatch.setattr(hostmemory, "map_file", refuse_second)
        assert subject.fill(0x40_0000)
        assert len(calls) == 4
        assert not other.regions
        assert subject.rights(0x40_0000) == subject.rights(0x5F_F000) == "rw-"

    def test_a20_drops_everything(self, subject: Subject) -> None:
        subject.map(5, PAGE)
        subject.map(6, 0x10_0000 + PAGE + 0x1000)
        subject.memory.store(0x10_0000 + PAGE + 0x1000, 4, 77)
        subject.fill(0x5000)
        subject.fill(0x6000)
        assert subject.value(0x6000) == 77
        subject.memory.a20_enabled = False
        assert subject.rights(0x5000) == subject.rights(0x6000) == "---"
        assert {page for _, page in subject.dropped} == {5, 6}
        assert subject.fill(0x6000)
        assert subject.value(0x6000) == 1


def test_nothing_of_it_stays_behind() -> None:
    def reserved() -> int:
        total = 0
        for line in Path("/proc/self/maps").read_text().splitlines():
            first, end = (int(text, 16) for text in line.split()[0].split("-"))
            total += end - first
        return total

    before = 0
    for turn in range(4):
        subject = Subject()
        for directory in range(5):
            subject.state.cr3 = DIRECTORY + 0x1_0000 * directory
            subject.windows.select()
        subject.map(5, PAGE)
        subject.state.cr3 = DIRECTORY
        subject.fill(0x5000)
        flags = subject.memory.page_flags
        subject.close()
        assert not any(flags)
        assert subject.memory.write_observers == [subject.cpu.mmu._table_written]
        if not turn:
            before = reserved()
    assert reserved() - before < STRIDE_BYTES
