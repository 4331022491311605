"""Thresholds and hysteresis, without any code."""

from __future__ import annotations

import pytest

from vmm.native.adaptation import (
    ADAPTATION_WEIGHT,
    INSTRUCTION_FAULTS,
    INSTRUCTION_FAULTS_MOST,
    INSTRUCTION_INNOCENT,
    INSTRUCTION_WRITES,
    REWRITTEN_INNOCENT,
    SOFT_FAULTS,
    SOFT_INNOCENT,
    TABLE_WRITES,
    TABLE_WRITES_MOST,
    Culprits,
    TableWrites,
)
from vmm.native.fragments import Fragment
from vmm.native.modes import Mode
from vmm.native.unit import Unit

EIP = 0x1_2345


def fragment(ram_page: int = 7, *eips: int) -> Fragment:
    return placed(Mode(user=False), ram_page, 16, eips or (0x1_2340, EIP))


def placed(mode: Mode, ram_page: int, guest_bytes: int, eips: tuple[int, ...]) -> Fragment:
    """The fragment of some instructions that nothing is asked about but where they are."""
    unit = Unit(eips[0], b"", (0, 8)[: len(eips)], eips, eips[0] + guest_bytes, 1, (), {})
    return Fragment(mode, unit, ram_page, 0, guest_bytes)


def adapt(culprits: Culprits) -> int:
    """How many faults it takes."""
    faults = 1
    while not culprits.fault(fragment(), EIP):
        faults += 1
    return faults


def revert(culprits: Culprits) -> None:
    """Execute it until it has its plain form back, with nothing touched."""
    while culprits.has(EIP):
        culprits.executed(EIP, touched=False)


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
        assert culprits.has(EIP)
        assert not culprits.has(EIP + 1)
        assert culprits.fault(fragment(), EIP)  # another fragment that has it
        assert culprits.counters["adaptations"] == 1

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
        for _ in range(INSTRUCTION_INNOCENT - 1):
            assert culprits.executed(EIP, touched=False) == []
            assert culprits.executed(EIP + 1, touched=False) == []
        assert culprits.executed(EIP, touched=False) == found
        assert culprits.adapted(7) == frozenset()
        assert not culprits.has(EIP)
        assert culprits.executed(EIP, touched=False) == []
        assert culprits.counters["reversions"] == 1

    @pytest.mark.parametrize(("every", "stays"), [(1, True), (2, True), (3, True), (4, False), (50, False)])
    def test_the_share_of_executions_that_touch_something_decides(self, every: int, stays: bool) -> None:
        culprits = Culprits()
        adapt(culprits)
        for turn in range(5000):
            culprits.executed(EIP, touched=turn % every == 0)
        assert culprits.has(EIP) is stays

    def test_more_faults_are_put_up_with_where_it_did_not_pay(self) -> None:
        culprits = Culprits()
        expected = INSTRUCTION_FAULTS
        for _ in range(12):
            assert adapt(culprits) == expected
            revert(culprits)
            expected = min(2 * expected, INSTRUCTION_FAULTS_MOST)
        assert expected == INSTRUCTION_FAULTS_MOST
        adapt(culprits)
        for _ in range(ADAPTATION_WEIGHT):
            culprits.executed(EIP, touched=True)
        revert(culprits)
        assert adapt(culprits) == INSTRUCTION_FAULTS

    def test_an_instruction_that_is_written_to_is_adapted_and_its_bytes_are_followed(self) -> None:
        culprits = Culprits()
        for _ in range(3):
            for _ in range(INSTRUCTION_WRITES):
                assert not culprits.has(EIP)
                culprits.write(fragment(), 0x349, 0x34A)
            assert culprits.adapted(7) == {EIP}
            assert culprits.is_written(7, EIP)
            assert not culprits.is_written(7, EIP - 5)
            assert not culprits.is_written(8, EIP)
            executions = 0
            while culprits.has(EIP):
                if executions < 20 and executions % 3 == 0:
                    culprits.note_write(7, 0x34F, 0x350)
                culprits.note_write(7, 0x350, 0x1000)
                culprits.note_write(7, 0, 0x345)
                culprits.note_write(8, 0, 0x1000)
                culprits.executed(EIP, touched=False)
                executions += 1
            assert executions == 20 + REWRITTEN_INNOCENT - 1
            assert not culprits.is_written(7, EIP)  # and it paid, so that as few stores are enough the next time

    def test_more_stores_are_put_up_with_where_it_did_not_pay(self) -> None:
        culprits = Culprits()
        for expected in (INSTRUCTION_WRITES, 2 * INSTRUCTION_WRITES, 4 * INSTRUCTION_WRITES):
            writes = 0
            while not culprits.has(EIP):
                culprits.write(fragment(), 0x348, 0x34C)
                writes += 1
            assert writes == expected
            revert(culprits)

    def test_of_five_bytes_the_last_four_are_read_first(self) -> None:
        culprits = Culprits()
        short = placed(Mode(user=False), 7, 5, (EIP,))
        for _ in range(INSTRUCTION_WRITES):
            assert culprits.loaded(7) == frozenset()
            culprits.write(short, 0x346, 0x34A)
        assert culprits.loaded(7) == {EIP}
        assert not culprits.has(EIP)
        assert not culprits.is_written(7, EIP)
        assert culprits.note_write(7, 0x346, 0x34A)
        for _ in range(INSTRUCTION_WRITES):
            assert not culprits.has(EIP)
            culprits.write(short, 0x346, 0x34A)  # it was no MOV, and something depended on the operand
        assert culprits.has(EIP)
        assert culprits.is_written(7, EIP)
        assert culprits.loaded(7) == frozenset()
        revert(culprits)
        assert not culprits.note_write(7, 0x346, 0x34A)
        for _ in range(2 * INSTRUCTION_WRITES):  # this time the opcode is written to, too
            culprits.write(short, 0x345, 0x34A)
        assert culprits.has(EIP)

    def test_code_whose_base_is_no_page(self) -> None:
        culprits = Culprits()
        real = placed(Mode(user=False, code_base=0x7_1230), 0x71, 4, (0x10, 0x12))
        for _ in range(INSTRUCTION_WRITES):
            culprits.write(real, 0x243, 0x244)
        assert culprits.adapted(0x71) == {0x12}
        assert not culprits.note_write(0x71, 0x12, 0x14)
        assert culprits.note_write(0x71, 0x242, 0x243)

    def test_a_soft_form_takes_fewer_faults_and_is_judged_by_looks_in_a_row(self) -> None:
        culprits = Culprits()
        expected = SOFT_FAULTS
        for turn in range(3):
            faults = 1
            while not culprits.fault(fragment(), EIP, soft=True):
                faults += 1
            assert faults == expected
            assert culprits.soft(7) == {EIP}
            assert culprits.soft(8) == culprits.adapted(7) == frozenset()
            found = fragment()
            culprits.translated(found)
            if turn == 0:  # it has been of use, so that as few faults are enough again
                for look in range(100):
                    assert culprits.executed(EIP, touched=look % SOFT_INNOCENT == 0) == []
            else:
                expected *= 2
            looks = 1
            while not (dropped := culprits.executed(EIP, touched=False)):
                looks += 1
            assert dropped == [found]
            assert looks <= SOFT_INNOCENT
            assert culprits.soft(7) == frozenset()
        assert culprits.counters["soft forms"] == culprits.counters["reversions"] == 3

    def test_an_instruction_with_a_soft_form_may_have_to_be_called_out_all_the_same(self) -> None:
        culprits = Culprits()
        for _ in range(SOFT_FAULTS):
            culprits.fault(fragment(), EIP, soft=True)
        assert adapt(culprits) == INSTRUCTION_FAULTS
        assert culprits.soft(7) == culprits.adapted(7) == {EIP}
        revert(culprits)
        assert culprits.soft(7) == culprits.adapted(7) == frozenset()
        assert not culprits.has(EIP)

    def test_an_empty_cache_leaves_nothing_to_drop(self) -> None:
        culprits = Culprits()
        adapt(culprits)
        culprits.translated(fragment())
        culprits.forget_fragments()
        assert not any(culprits.executed(EIP, touched=False) for _ in range(INSTRUCTION_INNOCENT))
        assert culprits.counters["reversions"] == 1

    def test_their_number_is_bounded(self) -> None:
        culprits = Culprits()
        for number in range(10_000):
            culprits.fault(fragment(number >> 4), number)
        assert sum(map(len, culprits._by_page.values())) < 5000
