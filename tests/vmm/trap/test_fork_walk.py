"""One fork and wait, exit by exit, as section 4.3 of Adams and Agesen's paper walks through it.

The guest is `fork`: the parent forks, the child writes to one page and exits, the parent waits and writes to that page,
too. What one more of them adds to the exits does not depend on how many there are: the guest and its icounts are exact.
"""

from __future__ import annotations

import pytest

from gdbstub.cli_engine import make_factories
from guests import images
from tools.bench_paper_run import run

_FORKS = 16
_PAGES = 16  # the working set: after so many the same page comes again
# The kernel's PTE writes to tables in use: fork takes the right to write from the two pages that the parent has (its
# stack, and the page that it wrote to last); each of the three faults gives a page to who wrote to it.
_PROTECTED, _FAULTS = 2, 3
# The page of the child's table was the table of a child before, and is still shadowed when REP STOS zeroes it.
_RECYCLED = 2


def exits_of_one(engine: str) -> dict[str, float]:
    """By reason, from the difference between two runs that are both warm."""
    words = f"hz=19 forkwait={_PAGES} forkwait={_PAGES} forkwait={_PAGES + _FORKS}"
    _, fewer, more = run(make_factories(verify=True), engine, images.path("fork"), words)
    return {reason: (count - fewer.exits.get(reason, 0)) / _FORKS for reason, count in more.exits.items()}


def test_under_shadow_paging() -> None:
    exits = exits_of_one("trap")
    # fork flushes what became read-only; to the child at the parent's wait; back at the child's exit.
    assert exits.pop("CR3_WRITE") == 3
    # The child's write copies a page; the parent's two pages are its own again at its first write to each.
    assert exits.pop("EXCP_PF true") == _FAULTS
    assert exits.pop("INVLPG") == _FAULTS
    assert exits.pop("EXCP_PF trace") == _PROTECTED + _FAULTS + _RECYCLED
    # The shadow has to learn the child's pages, and what the CR3 loads and traces have made it forget.
    assert 5 <= exits.pop("EXCP_PF hidden") <= 20
    # Three system calls by INT 80h, three IRETs, the copying itself: no exit. The host's timer interrupts at times.
    assert exits.pop("INTR", 0) < 0.5
    assert not any(exits.values()), exits


@pytest.mark.parametrize("reason", ["CR3_WRITE", "INVLPG", "EXCP_PF true", "EXCP_PF trace", "EXCP_PF hidden", "NPF"])
def test_under_nested_paging_none_of_it_is_an_exit(reason: str, nested: dict[str, float]) -> None:
    assert nested.get(reason, 0) == 0
    assert sum(nested.values()) < 0.5


@pytest.fixture(scope="module")
def nested() -> dict[str, float]:
    return exits_of_one("trap nested")
