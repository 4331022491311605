"""Statistics in groups and in snake case."""

from __future__ import annotations

import pytest

from gdbstub.counters import Value, for_people, for_programs, snake_case


@pytest.mark.parametrize(
    ("name", "snake"),
    [
        ("icount", "icount"), ("virtual ns in HLT", "virtual_ns_in_hlt"), ("exceptions #GP", "exceptions_gp"),
        ("callouts of rep movsb", "callouts_of_rep_movsb"), ("TC bytes used", "tc_bytes_used"),
    ],
)  # fmt: skip
def test_names_for_programs(name: str, snake: str) -> None:
    assert snake_case(name) == snake
    assert for_programs({name: 5}) == {snake: 5}


def test_groups_for_people() -> None:
    statistics: dict[str, Value] = {"engine": "bt", "zork": 7, "icount": 12345, "seconds in TC": 1.5, "chains made": 3}
    assert "".join(for_people(statistics)) == (
        "run:\n"
        "  engine                       bt\n"
        "  icount                       12,345\n"
        "time:\n"
        "  seconds in TC                1.5\n"
        "control flow:\n"
        "  chains made                  3\n"
        "others:\n"
        "  zork                         7\n"
    )


def test_rare_callouts_are_summed_up() -> None:
    statistics = {"callouts": 210, **{f"callouts of row{n}": n for n in range(20, 0, -1)}}
    lines = list(for_people(statistics))
    assert lines[:3] == ["callouts:\n", f"  {'callouts':28} 210\n", f"  {'callouts of row20':28} 20\n"]
    assert len(lines) == 2 + 12 + 1
    assert lines[-1] == f"  {'of others':28} {sum(range(1, 9))}\n"
