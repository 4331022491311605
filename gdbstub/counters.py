"""Statistics for readers: in groups for people, with names in snake case for programs.

It must not know who counts; a name that no group claims is shown all the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

Value = int | float | str

CALLOUTS = "callouts of "
_ROWS_SHOWN = 12
# Heading, and how the names begin that belong under it; the first that fits has it.
_GROUPS: Sequence[tuple[str, tuple[str, ...]]] = (
    ("run", ("engine", "icount", "virtual", "resets", "undefined", "cpu", "FPU")),
    ("choice", ("running", "switches", "priced", "estimated", "instructions in bt", "instructions in trap")),
    ("time", ("seconds",)),
    ("translation", ("translation", "guest bytes", "host bytes", "fragments", "TC", "invalidations", "retranslations")),
    ("control flow", ("chains", "dispatch")),
    ("callouts", ("callouts",)),
    (
        "faults and adaptation",
        (
            *("hidden", "true", "trace", "device", "fault", "budget", "page", "windows", "adapt", "soft", "volatile"),
            *("reversions", "code"),
        ),
    ),
    ("exits", ("exits", "world", "injected", "VMCB", "paging", "prefills", "nested")),
    ("events", ("interrupts", "exceptions")),
    ("interpreted code", ("blocks", "instructions")),
)
_OTHERS = "others"


def snake_case(name: str) -> str:
    """`exceptions #GP` as `exceptions_gp`: stable, since names are."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def for_programs(statistics: Mapping[str, Value]) -> dict[str, Value]:
    """The same values under names in snake case."""
    return {snake_case(name): value for name, value in statistics.items()}


def for_people(statistics: Mapping[str, Value]) -> Iterator[str]:
    """Lines in groups; of the callouts by instruction the most frequent."""
    groups: dict[str, list[tuple[str, Value]]] = {heading: [] for heading in (*dict(_GROUPS), _OTHERS)}
    for name, value in statistics.items():
        groups[next((heading for heading, starts in _GROUPS if name.startswith(starts)), _OTHERS)].append((name, value))
    for heading, members in groups.items():
        if not members:
            continue
        yield f"{heading}:\n"
        rows = [member for member in members if member[0].startswith(CALLOUTS)]
        rest = rows[_ROWS_SHOWN:]
        for name, value in members:
            if (name, value) not in rest:
                yield f"  {name:28} {_show(value)}\n"
        if rest:
            yield f"  {'of others':28} {_show(sum(value for _, value in rest if isinstance(value, int)))}\n"


def _show(value: Value) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.6g}" if isinstance(value, float) else value
