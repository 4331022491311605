"""Entries whose pages are kept out of the windows, without any windows."""

from __future__ import annotations

from vmm.native.volatility import (
    CALM_TOUCHES,
    CALM_TOUCHES_MOST,
    VOLATILE_CHANGES,
    VOLATILE_INSNS,
    VolatileEntries,
)

TABLE, INDEX = 0x5000, 17


def changes(entries: VolatileEntries, distance_insns: int, most: int = 1000, begin: int = 0) -> int:
    """How many changes at that distance it takes until the page is kept out; `most` if it is not."""
    for number in range(1, most):
        if entries.change(TABLE, INDEX, begin + number * distance_insns):
            return number
    return most


def touches(entries: VolatileEntries) -> int:
    """How many touches in a row bring the page back."""
    number = 1
    while entries.touch(TABLE, INDEX, 7):
        number += 1
    return number


def test_close_changes_in_a_row_keep_a_page_out() -> None:
    entries = VolatileEntries()
    assert changes(entries, VOLATILE_INSNS - 1) == 1 + VOLATILE_CHANGES  # the first one is close to none
    assert entries.kept_out(TABLE) == {INDEX}
    assert entries.kept_out(TABLE + 0x1000) == set()
    assert entries.counters == {"volatile pages": 1, "volatile pages calmed": 0}


def test_changes_that_are_far_apart_do_not() -> None:
    assert changes(VolatileEntries(), VOLATILE_INSNS) == 1000


def test_a_pause_begins_the_row_anew() -> None:
    entries = VolatileEntries()
    for row in range(20):
        begin = row * 10 * VOLATILE_INSNS
        assert changes(entries, 10, VOLATILE_CHANGES, begin) == VOLATILE_CHANGES
    assert entries.kept_out(TABLE) == set()


def test_a_change_that_two_windows_tell_of_counts_once() -> None:
    entries = VolatileEntries()
    for number in range(VOLATILE_CHANGES):
        assert not entries.change(TABLE, INDEX, 10 + number)
        assert not entries.change(TABLE, INDEX, 10 + number)
    entries.change(TABLE, INDEX, 100)
    assert entries.change(TABLE, INDEX, 100)


def test_touches_without_a_change_bring_it_back_and_ever_more_of_them() -> None:
    entries = VolatileEntries()
    expected, begin = CALM_TOUCHES, 0
    for _ in range(10):
        begin += 10 * VOLATILE_INSNS
        changes(entries, 10, begin=begin)
        for number in range(100):
            assert entries.touch(TABLE, INDEX, number & 1)
        entries.touch(TABLE, INDEX, 0)
        assert touches(entries) == expected + 1  # the first one shows a new value
        assert entries.kept_out(TABLE) == set()
        assert not entries.touch(TABLE, INDEX, 7)
        expected = min(2 * expected, CALM_TOUCHES_MOST)
    assert expected == CALM_TOUCHES_MOST


def test_a_page_that_has_to_be_mapped_stays_mapped_for_long() -> None:
    entries = VolatileEntries()
    changes(entries, 10)
    entries.insist(TABLE, INDEX)
    assert entries.kept_out(TABLE) == set()
    assert changes(entries, 10, begin=1000) > 10 * VOLATILE_CHANGES


def test_their_number_is_bounded() -> None:
    entries = VolatileEntries()
    for table in range(5000):
        entries.change(table << 12, 0, table)
    assert len(entries._tables) < 2000
