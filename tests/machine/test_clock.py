"""The virtual clock: exact times, order among equals, deadlines as instruction counts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from machine.clock import NEVER_ICOUNT, Clock, Event


def recorder(log: list[str], name: str) -> Callable[[], None]:
    return lambda: log.append(name)


def nothing() -> None:
    pass


def test_now_is_instructions_and_idle_time() -> None:
    clock = Clock(ns_per_insn=3)
    clock.icount = 7
    clock.idle_ns = 2
    assert clock.now_ns == 23


def test_an_instruction_takes_time() -> None:
    with pytest.raises(ValueError, match="at least one nanosecond"):
        Clock(ns_per_insn=0)


@pytest.mark.parametrize(
    ("ns_per_insn", "idle_ns", "at_ns", "icount"),
    [(1, 0, 10, 10), (3, 0, 9, 3), (3, 0, 10, 4), (3, 1, 10, 3), (3, 2, 10, 3), (3, 20, 10, -3), (7, 0, 0, 0)],
)
def test_deadline_is_the_first_icount_at_which_the_event_is_due(
    ns_per_insn: int, idle_ns: int, at_ns: int, icount: int
) -> None:
    clock = Clock(ns_per_insn)
    clock.idle_ns = idle_ns
    clock.schedule(at_ns, nothing)
    assert clock.deadline_icount == icount
    clock.icount = icount
    assert clock.now_ns >= at_ns
    clock.icount = icount - 1
    assert clock.now_ns < at_ns


def test_no_event_no_deadline() -> None:
    clock = Clock()
    assert clock.deadline_icount == NEVER_ICOUNT
    assert clock.next_deadline_ns is None
    assert not clock.skip_to_next()
    assert clock.now_ns == 0


def test_events_run_in_time_order_and_equals_in_the_order_of_scheduling() -> None:
    clock = Clock()
    log: list[str] = []
    for at_ns, name in ((20, "c"), (10, "a"), (20, "d"), (10, "b"), (30, "e")):
        clock.schedule(at_ns, recorder(log, name))
    clock.icount = 20
    clock.run_due()
    assert "".join(log) == "abcd"
    assert clock.deadline_icount == 30


def test_not_a_nanosecond_early() -> None:
    clock = Clock()
    log: list[str] = []
    clock.schedule(10, recorder(log, "x"))
    clock.icount = 9
    clock.run_due()
    assert log == []
    clock.icount = 10
    clock.run_due()
    assert log == ["x"]


def test_a_callback_may_schedule_what_is_due_at_once() -> None:
    clock = Clock()
    log: list[str] = []

    def first() -> None:
        log.append("first")
        clock.schedule(clock.now_ns, recorder(log, "second"))
        clock.schedule(clock.now_ns + 5, recorder(log, "later"))

    clock.schedule(1, first)
    clock.icount = 1
    clock.run_due()
    assert log == ["first", "second"]
    assert clock.deadline_icount == 6


def test_cancelled_events_do_not_run_and_are_no_deadline() -> None:
    clock = Clock()
    log: list[str] = []
    early = clock.schedule(5, recorder(log, "early"))
    late = clock.schedule(9, recorder(log, "late"))
    clock.cancel(early)
    assert not early.pending
    assert clock.deadline_icount == 9
    clock.cancel(late)
    assert clock.deadline_icount == NEVER_ICOUNT
    clock.cancel(late)
    clock.cancel(None)
    clock.icount = 100
    clock.run_due()
    assert log == []


def test_a_callback_may_cancel_its_neighbour() -> None:
    clock = Clock()
    log: list[str] = []
    victims: list[Event] = []
    clock.schedule(1, lambda: clock.cancel(victims[0]))
    victims.append(clock.schedule(1, recorder(log, "victim")))
    clock.icount = 1
    clock.run_due()
    assert log == []
    assert clock.deadline_icount == NEVER_ICOUNT


def test_rearming_a_far_event_for_ever_does_not_grow_the_heap() -> None:
    clock = Clock()
    clock.schedule(1, nothing)
    event = clock.schedule(1000, nothing)
    for n in range(10_000):
        clock.cancel(event)
        event = clock.schedule(2000 + n, nothing)
    assert len(clock._heap) < 200
    assert clock.deadline_icount == 1
    clock.icount = 20_000
    clock.run_due()
    assert not event.pending


def test_order_survives_the_clearing_away_of_cancelled_events() -> None:
    clock = Clock()
    log: list[str] = []
    events = [clock.schedule((n * 7919) % 1000, recorder(log, str((n * 7919) % 1000))) for n in range(1000)]
    for n, event in enumerate(events):
        if n % 10:
            clock.cancel(event)
    assert len(clock._heap) <= 300
    clock.icount = 1000
    clock.run_due()
    assert log == sorted(log, key=int)
    assert len(log) == 100


def test_skip_lands_on_the_nanosecond_of_the_event() -> None:
    clock = Clock(ns_per_insn=3)
    clock.icount = 5
    clock.schedule(1000, nothing)
    assert clock.skip_to_next()
    assert clock.now_ns == 1000
    assert clock.icount == 5
    assert clock.deadline_icount == 5


def test_skip_does_not_turn_time_back() -> None:
    clock = Clock()
    clock.icount = 50
    clock.schedule(10, nothing)
    assert clock.skip_to_next()
    assert clock.now_ns == 50


def test_on_change_tells_of_nearer_deadlines_only() -> None:
    clock = Clock()
    seen: list[int] = []
    clock.on_change = lambda: seen.append(clock.deadline_icount)
    event = clock.schedule(100, nothing)
    clock.schedule(200, nothing)
    clock.schedule(50, nothing)
    clock.cancel(event)
    assert seen == [100, 50]


def test_reset_forgets_everything() -> None:
    clock = Clock()
    clock.icount, clock.idle_ns = 5, 6
    event = clock.schedule(100, nothing)
    clock.reset()
    assert (clock.now_ns, clock.deadline_icount, event.pending) == (0, NEVER_ICOUNT, False)
    assert clock.next_deadline_ns is None


def test_snapshot_and_resume_keep_the_order_of_equals() -> None:
    log: list[str] = []
    clock = Clock()
    first = clock.schedule(10, recorder(log, "first"))
    second = clock.schedule(10, recorder(log, "second"))
    state = clock.snapshot()
    saved = [Clock.save_event(event) for event in (second, first)]

    other = Clock()
    other.schedule(3, recorder(log, "forgotten"))
    other.restore(state)
    for record, name in zip(saved, ("second", "first"), strict=True):
        other.resume(record, recorder(log, name))
    other.schedule(10, recorder(log, "third"))
    other.icount = 10
    other.run_due()
    assert log == ["first", "second", "third"]
    assert other.resume(None, nothing) is None
    assert Clock.save_event(None) is None


@pytest.mark.parametrize("state", [{}, {"icount": "1", "idle_ns": 0, "ns_per_insn": 1, "next_order": 0}])
def test_restore_refuses_what_is_no_snapshot(state: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="snapshot"):
        Clock().restore(state)


@given(st.lists(st.tuples(st.sampled_from("scra"), st.integers(0, 50)), max_size=60), st.integers(1, 5))
def test_like_a_list_that_is_searched_each_time(actions: list[tuple[str, int]], ns_per_insn: int) -> None:
    """Schedule, cancel, run, advance in any order: the same as the plainest queue one can think of."""
    clock = Clock(ns_per_insn)
    log: list[str] = []
    expected: list[str] = []
    plain: list[tuple[int, int]] = []
    events: dict[int, Event] = {}
    for number, (action, argument) in enumerate(actions):
        if action == "s":
            events[number] = clock.schedule(argument * 3, recorder(log, str(number)))
            plain.append((argument * 3, number))
        elif action == "c" and plain:
            victim = plain.pop(argument % len(plain))
            clock.cancel(events[victim[1]])
        elif action == "r":
            clock.run_due()
            due = sorted(entry for entry in plain if entry[0] <= clock.now_ns)
            expected += [str(number) for _, number in due]
            plain = [entry for entry in plain if entry not in due]
        else:
            clock.icount += argument
        assert log == expected
        assert clock.next_deadline_ns == (min(plain)[0] if plain else None)
        if plain:
            assert clock.deadline_icount * ns_per_insn >= min(plain)[0] > (clock.deadline_icount - 1) * ns_per_insn
