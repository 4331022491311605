"""Virtual time: a count of retired instructions, and the queue of what is due when.

It must not know the host's clock, nor who counts the instructions, nor what the callbacks do.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

NEVER_ICOUNT = 1 << 62
"""`Clock.deadline_icount` while nothing is due: past any count that a run reaches, and still a signed 64-bit number."""

_COMPACT_AT_EVENTS = 64
_LAST = 1 << 62  # in the order of an event: after all others of its time


class Event:
    """One callback due at a virtual time; made by `Clock.schedule`, of no use on its own."""

    __slots__ = ("at_ns", "callback", "order")

    def __init__(self, at_ns: int, order: int, callback: Callable[[], None]) -> None:
        self.at_ns = at_ns
        self.order = order
        self.callback: Callable[[], None] | None = callback

    @property
    def pending(self) -> bool:
        """True until the event ran or was cancelled."""
        return self.callback is not None

    def __lt__(self, other: Event) -> bool:
        if self.at_ns != other.at_ns:
            return self.at_ns < other.at_ns
        return self.order < other.order


class Clock:
    """Virtual nanoseconds since reset: `icount * ns_per_insn + idle_ns`.

    `icount` is a plain attribute that the engine writes: before each access that a device can see, so that `now_ns` is
    exact there, and at the latest when it looks at `deadline_icount`. Events of the same time run in the order in which
    they were scheduled, so a run is a function of the instructions alone.

    Attributes:
        icount: instructions retired since reset.
        idle_ns: nanoseconds that passed in HLT, when no instruction retires.
        deadline_icount: the first `icount` at which the earliest event is due, `NEVER_ICOUNT` without one; to be read
            only.
        on_change: called after `deadline_icount` became smaller, for an engine whose budget is not compared with it
            at every exit.
    """

    __slots__ = (
        "_cancelled",
        "_heap",
        "_next_order",
        "deadline_icount",
        "icount",
        "idle_ns",
        "ns_per_insn",
        "on_change",
    )

    def __init__(self, ns_per_insn: int = 1) -> None:
        if ns_per_insn < 1:
            raise ValueError(f"an instruction takes at least one nanosecond, not {ns_per_insn}")
        self.ns_per_insn = ns_per_insn
        self.on_change: Callable[[], None] | None = None
        self._heap: list[Event] = []
        self.reset()

    def reset(self) -> None:
        """Go back to instruction 0 and forget every event; who wants one must schedule it anew."""
        for event in self._heap:
            event.callback = None
        self._heap.clear()
        self.icount = 0
        self.idle_ns = 0
        self.deadline_icount = NEVER_ICOUNT
        self._next_order = 0
        self._cancelled = 0

    @property
    def now_ns(self) -> int:
        """Virtual nanoseconds since reset."""
        return self.icount * self.ns_per_insn + self.idle_ns

    @property
    def next_deadline_ns(self) -> int | None:
        """The time of the earliest event, or None."""
        return self._heap[0].at_ns if self._heap else None

    def schedule(self, at_ns: int, callback: Callable[[], None], *, last: bool = False) -> Event:
        """Have `callback` called by `run_due` once `now_ns` reaches `at_ns`; a time in the past is due at once.

        Args:
            at_ns: when.
            callback: what.
            last: behind all other events of that time, also those that are scheduled later.
        """
        order = self._next_order
        self._next_order = order + 1
        return self._enter(Event(at_ns, order | _LAST if last else order, callback))

    def resume(self, saved: list[int] | None, callback: Callable[[], None]) -> Event | None:
        """Put an event back that `save_event` described, in its old place among those of the same time."""
        if saved is None:
            return None
        at_ns, order = saved
        return self._enter(Event(at_ns, order, callback))

    @staticmethod
    def save_event(event: Event | None) -> list[int] | None:
        """Describe a pending event for a snapshot as [at_ns, order]; None for one that is not pending."""
        return [event.at_ns, event.order] if event is not None and event.pending else None

    def _enter(self, event: Event) -> Event:
        heapq.heappush(self._heap, event)
        if self._heap[0] is event:
            before = self.deadline_icount
            self._aim()
            if self.on_change is not None and self.deadline_icount < before:
                self.on_change()
        return event

    def cancel(self, event: Event | None) -> None:
        """Take an event back; nothing happens for None, or for one that ran or was cancelled before."""
        if event is None or event.callback is None:
            return
        event.callback = None
        self._cancelled += 1
        if self._heap[0] is event:
            self._aim()
        elif self._cancelled > _COMPACT_AT_EVENTS and self._cancelled * 2 > len(self._heap):
            # A guest that reprograms a far timer again and again must not fill the heap with dead entries.
            self._heap = [other for other in self._heap if other.callback is not None]
            heapq.heapify(self._heap)
            self._cancelled = 0

    def _aim(self) -> None:
        """Drop cancelled events from the front and recompute `deadline_icount`."""
        heap = self._heap
        while heap and heap[0].callback is None:
            heapq.heappop(heap)
            self._cancelled -= 1
        if heap:
            self.deadline_icount = min(NEVER_ICOUNT, -((self.idle_ns - heap[0].at_ns) // self.ns_per_insn))
        else:
            self.deadline_icount = NEVER_ICOUNT

    def run_due(self) -> None:
        """Call back every event that is due at `now_ns`, also those that the callbacks add."""
        heap = self._heap
        while heap and heap[0].at_ns <= self.now_ns:
            event = heapq.heappop(heap)
            callback = event.callback
            if callback is None:
                self._cancelled -= 1
                continue
            event.callback = None
            callback()
            heap = self._heap
        self._aim()

    def skip_to_next(self) -> bool:
        """Let time pass, as in HLT, until the earliest event is due; its callback is left to `run_due`.

        Returns:
            False if there is no event: no device will ever wake this CPU.
        """
        if not self._heap:
            return False
        self.idle_ns += max(0, self._heap[0].at_ns - self.now_ns)
        self._aim()
        return True

    def snapshot(self) -> dict[str, object]:
        """The counters; the events belong to the devices, which save and resume their own."""
        return {
            "icount": self.icount,
            "idle_ns": self.idle_ns,
            "ns_per_insn": self.ns_per_insn,
            "next_order": self._next_order,
        }

    def restore(self, state: dict[str, object]) -> None:
        """Take the counters from `snapshot` and forget every event; to be called before the devices' own `restore`.

        Raises:
            ValueError: a field is missing or not an integer.
        """
        fields = ("icount", "idle_ns", "ns_per_insn", "next_order")
        values = [state.get(name) for name in fields]
        numbers = [value for value in values if isinstance(value, int)]
        if len(numbers) != len(fields):
            raise ValueError("a clock's snapshot holds " + ", ".join(fields))
        self.reset()
        self.icount, self.idle_ns, self.ns_per_insn, self._next_order = numbers
