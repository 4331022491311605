"""Thresholds and hysteresis, without any code."""

from __future__ import annotations

from vmm.native.adaptation import (
    INSTRUCTION_EXECUTIONS,
    INSTRUCTION_EXECUTIONS_MOST,
    INSTRUCTION_FAULTS,
    INSTRUCTION_INNOCENT,
    TABLE_WRITES,
    TABLE_WRITES_MOST,
    Culprits,
    TableWrites,
)
from vmm.native.fragments import Fragment
from vmm.native.modes import Mode

EIP = 0x1_2345


def fragment(ram_page: int = 7, *eips: int) -> Fragment:
    return Fragment(Mode(user=False), 0x1_2340, ram_page, 0, 16, [0, 8], list(eips or (0x1_2340, EIP)), 1)


def adapt(culprits: Culprits, *, by_device: bool = True) -> int:
    """How many faults it takes."""
    faults = 1
    while not culprits.fault(fragment(), EIP, by_device=by_device):
        faults += 1
    return faults


def limit_of(writes: TableWrites, table: int) -> int:
    limit = 1
    while not writes.is_enough(table, limit):
        limit += 1
    return limit


def table_with(changed: int) -> memoryview:
    return memoryview(b"\1\0\0\0" * changed + bytes(4096 - 4 * changed))


class TestTableWrites:
    def test_the_limit_doubles_up_to_a_bound_where_letting_go_does_not_pay(self) -> None:
        writes = TableWrites()
        expected = TABLE_WRITES
        for _ in range(10):
            assert limit_of(writes, 0x1000) == expected
            writes.let_go(0x1000, bytes(4096))
            writes.take_back(0x1000, table_with(expected // 2))
            expected = min(2 * expected, TABLE_WRITES_MOST)
        assert expected == TABLE_WRITES_MOST

    def test_it_is_low_again_when_that_has_paid(self) -> None:
        writes = TableWrites()
        for _ in range(3):
            writes.let_go(0x1000, bytes(4096))
            writes.take_back(0x1000, table_with(0))
        assert limit_of(writes, 0x1000) == 8 * TABLE_WRITES
        writes.let_go(0x1000, bytes(4096))
        writes.take_back(0x1000, table_with(8 * TABLE_WRITES + 1))
        assert limit_of(writes, 0x1000) == TABLE_WRITES

    def test_each_table_has_its_own(self) -> None:
        writes = TableWrites()
        writes.let_go(0x1000, bytes(4096))
        writes.take_back(0x1000, table_with(0))
        writes.take_back(0x2000, table_with(0))
        assert (limit_of(writes, 0x1000), limit_of(writes, 0x2000)) == (2 * TABLE_WRITES, TABLE_WRITES)
        writes.clear()
        assert limit_of(writes, 0x1000) == TABLE_WRITES


class TestCulprits:
    def test_an_instruction_is_adapted_after_some_faults(self) -> None:
        culprits = Culprits()
        assert adapt(culprits) == INSTRUCTION_FAULTS
        assert culprits.adapted(7) == {EIP}
        assert culprits.adapted(8) == frozenset()
        assert culprits.fault(fragment(), EIP)  # another fragment that has it
        assert culprits.counters == {"adaptations": 1, "reversions": 0}

    def test_the_same_address_in_another_page_of_ram_is_another_instruction(self) -> None:
        culprits = Culprits()
        adapt(culprits)
        assert not culprits.fault(fragment(8), EIP)

    def test_it_reverts_and_what_has_it_is_to_be_dropped(self) -> None:
        culprits = Culprits()
        adapt(culprits)
        others = [fragment(7, 0x1_2340), fragment(8)]
        found = [fragment(), fragment(7, EIP)]
        for each in (*others, *found):
            culprits.translated(each)
        for _ in range(INSTRUCTION_EXECUTIONS - 1):
            assert culprits.executed(EIP) == []
            assert culprits.executed(EIP + 1) == []
        assert culprits.executed(EIP) == found
        assert culprits.adapted(7) == frozenset()
        assert culprits.executed(EIP) == []
        assert culprits.counters == {"adaptations": 1, "reversions": 1}

    def test_one_fault_is_enough_then_and_it_is_tried_less_often(self) -> None:
        culprits = Culprits()
        adapt(culprits)
        expected = INSTRUCTION_EXECUTIONS
        while True:
            culprits.translated(fragment())
            executions = 1
            while not culprits.executed(EIP):
                executions += 1
            assert executions == expected
            assert adapt(culprits) == 1
            if expected >= 1 << 15:
                break
            expected *= 4
        assert expected < INSTRUCTION_EXECUTIONS_MOST

    def test_a_trace_is_over_when_nothing_watched_is_written_to(self) -> None:
        culprits = Culprits()
        for _ in range(3):
            assert adapt(culprits, by_device=False) == INSTRUCTION_FAULTS
            culprits.translated(fragment())
            for turn in range(200):
                if turn % INSTRUCTION_INNOCENT == 0:
                    culprits.traced_writes += 1
                assert not culprits.executed(EIP)
            culprits.traced_writes += 1
            innocent = 0
            while not culprits.executed(EIP):
                innocent += 1
            assert innocent == INSTRUCTION_INNOCENT

    def test_an_empty_cache_leaves_nothing_to_drop(self) -> None:
        culprits = Culprits()
        adapt(culprits)
        culprits.translated(fragment())
        culprits.forget_fragments()
        assert not any(culprits.executed(EIP) for _ in range(INSTRUCTION_EXECUTIONS))
        assert culprits.counters["reversions"] == 1
        assert adapt(culprits) == 1

    def test_their_number_is_bounded(self) -> None:
        culprits = Culprits()
        for number in range(10_000):
            culprits.fault(fragment(number >> 4), number)
        assert sum(map(len, culprits._by_page.values())) < 5000
