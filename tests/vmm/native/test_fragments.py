"""What is known of fragments: found by guest address, by page, and by where their code is."""

from __future__ import annotations

from vmm.native.fragments import Fragment, FragmentIndex
from vmm.native.modes import Mode
from vmm.native.unit import Unit

KERNEL = Mode(user=False)


def fragment(eip: int, ram_page: int, start: int, *, guest_bytes: int = 8, insns: int = 3) -> Fragment:
    hosts = tuple(18 + 10 * number for number in range(insns))
    eips = tuple(eip + 2 * number for number in range(insns))
    unit = Unit(eip, bytes(100), hosts, eips, eip + guest_bytes, insns, (), {})
    return Fragment(KERNEL, unit, ram_page, start, guest_bytes)


class TestFragment:
    def test_code_belongs_to_an_instruction(self) -> None:
        made = fragment(0x1000, 1, 200)
        assert [made.index_at(200 + offset) for offset in (0, 17, 18, 27, 28, 37, 38, 99)] == [-1, -1, 0, 0, 1, 1, 2, 2]


class TestIndex:
    def test_by_address_in_its_page_of_ram(self) -> None:
        index = FragmentIndex()
        first, alias, second = fragment(0x1000, 1, 100), fragment(0x5000, 1, 200), fragment(0x1000, 9, 300)
        for each in (first, alias, second):
            index.add(each)
        assert index.by_address == {(KERNEL, 1, 0x1000): first, (KERNEL, 1, 0x5000): alias, (KERNEL, 9, 0x1000): second}
        assert index.pages == {1: [first, alias], 9: [second]}

    def test_by_place_in_the_cache(self) -> None:
        index = FragmentIndex()
        assert index.at(0) is None
        first, second = fragment(0x1000, 1, 100), fragment(0x1008, 1, 208)
        index.add(first)
        index.add(second)
        assert [index.at(offset) for offset in (99, 100, 199, 200, 207, 208, 307, 308)] == [
            None, first, first, None, None, second, second, None,
        ]  # fmt: skip

    def test_covered_bytes_are_those_of_all_its_fragments(self) -> None:
        index = FragmentIndex()
        index.add(fragment(0x1010, 1, 100, guest_bytes=4))
        index.add(fragment(0x7012, 1, 200, guest_bytes=4))
        index.add(fragment(0x1FFE, 1, 300, guest_bytes=2))
        covered = index.covered[1]
        assert [at for at in range(4096) if covered[at]] == [0x10, 0x11, 0x12, 0x13, 0x14, 0x15, 0xFFE, 0xFFF]
        assert len(covered) == 4096

    def test_a_dropped_page_is_found_by_place_alone(self) -> None:
        index = FragmentIndex()
        first, second = fragment(0x1000, 1, 100), fragment(0x2000, 2, 200)
        index.add(first)
        index.add(second)
        assert index.drop_page(1) == [first]
        assert index.by_address == {(KERNEL, 2, 0x2000): second}
        assert 1 not in index.pages
        assert 1 not in index.covered
        assert index.at(100) is first
        assert index.drop_page(1) == []
        again = fragment(0x1000, 1, 300)
        index.add(again)
        assert index.by_address[KERNEL, 1, 0x1000] is again
        assert index.at(100) is first

    def test_fragments_with_changed_bytes_are_found(self) -> None:
        index = FragmentIndex()
        first, second = fragment(0x1000, 1, 100), fragment(0x1800, 1, 200)
        index.add(first)
        index.add(second)
        end = 0x800 + second.guest_bytes
        assert index.overlapping(1, 0x7F0, 0x801) == [second]
        assert index.overlapping(1, end - 1, end) == [second]
        assert index.overlapping(1, end, 0x1000) == index.overlapping(1, 0x7F0, 0x800) == []
        assert index.overlapping(1, 0, 0x1000) == [first, second]
        assert index.drop(second)
        assert index.cover_anew(1)
        assert index.overlapping(1, 0x800, end) == []
        assert index.drop(first)
        assert not index.cover_anew(1)
        assert index.overlapping(2, 0, 0x1000) == []

    def test_operands_that_are_read_where_they_stand_may_change(self) -> None:
        index = FragmentIndex()
        made = fragment(0x1000, 1, 100, guest_bytes=16)
        made.loads = (1, 10)
        index.add(made)
        found = [at for at in range(20) if index.overlapping(1, at, at + 1)]
        assert found == [0, *range(5, 10), 14, 15]
        assert index.overlapping(1, 1, 5) == []
        assert index.overlapping(1, 1, 6) == [made]
        index.add(fragment(0x1002, 1, 200, guest_bytes=2))
        assert [each.start for each in index.overlapping(1, 1, 5)] == [200]
        index.cover_anew(1)
        assert [at for at in range(20) if index.covered[1][at]] == [0, 2, 3, *range(5, 10), 14, 15]

    def test_nothing_is_found_after_clear(self) -> None:
        index = FragmentIndex()
        index.add(fragment(0x1000, 1, 100))
        index.clear()
        assert index.at(100) is None
        assert not index.by_address
        assert not index.pages
        assert not index.covered
        later = fragment(0x3000, 3, 50)
        index.add(later)
        assert index.at(60) is later
        assert index.at(160) is None
