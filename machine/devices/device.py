"""What every device offers: reset, power-on, snapshots, a description for people; and a timer that a snapshot holds.

It must not know any particular device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar

from machine.clock import Clock, Event

Line = Callable[[bool], None]
"""An interrupt line, or any other wire: called with the level to drive."""


def unconnected(level: bool) -> None:
    """A wire that leads nowhere."""


class Timer:
    """One event of a device that can be armed, moved and disarmed, and that a snapshot can hold."""

    __slots__ = ("_callback", "_clock", "_event")

    def __init__(self, clock: Clock, callback: Callable[[], None]) -> None:
        self._clock = clock
        self._callback = callback
        self._event: Event | None = None

    @property
    def armed(self) -> bool:
        """True while the callback is due at some time."""
        return self._event is not None and self._event.pending

    @property
    def due_ns(self) -> int | None:
        """When that is; None if it is not armed."""
        return self._event.at_ns if self._event is not None and self._event.pending else None

    def arm(self, at_ns: int) -> None:
        """Have the callback called at `at_ns`, and not when it was due before."""
        event = self._event
        if event is not None and event.pending:
            if event.at_ns == at_ns:
                return
            self._clock.cancel(event)
        self._event = self._clock.schedule(at_ns, self._callback)

    def disarm(self) -> None:
        """Do not call; nothing happens if nothing was due."""
        self._clock.cancel(self._event)
        self._event = None

    def snapshot(self) -> list[int]:
        """[at_ns, order] of the pending event, or an empty list."""
        return Clock.save_event(self._event) or []

    def restore(self, saved: list[int]) -> None:
        """Arm as `snapshot` says; the clock was restored before."""
        self._clock.cancel(self._event)
        self._event = self._clock.resume(saved or None, self._callback)


class Device:
    """Base of the devices: state is what the attributes in `_saved` hold.

    Such an attribute is an int, bool, bytes, bytearray, memoryview of bytes, a list of ints, a `Timer`, or another
    `Device`; the snapshot has plain values for them (a bytearray as bytes, a timer as a list, a device as a dict).
    """

    _saved: ClassVar[tuple[str, ...]] = ()

    def reset(self) -> None:
        """Do what the RESET pin of the chip does."""

    def power_on(self) -> None:
        """Take the state that the chip has when power comes; as `reset` for all that have no battery."""
        self.reset()

    def describe(self) -> str:
        """The state in lines for people, as a monitor command shows it; without the last newline."""
        return type(self).__name__

    def timers(self) -> Iterator[tuple[str, int]]:
        """The armed timers, also those of devices in this one: name, and when each is due in virtual nanoseconds."""
        for name in self._saved:
            value = getattr(self, name)
            if isinstance(value, Timer) and value.due_ns is not None:
                yield name, value.due_ns
            elif isinstance(value, Device):
                yield from ((f"{name}.{inner}", due_ns) for inner, due_ns in value.timers())

    def snapshot(self) -> dict[str, object]:
        """The whole state as plain values that share nothing with the device."""
        state: dict[str, object] = {}
        for name in self._saved:
            value = getattr(self, name)
            if isinstance(value, Device | Timer):
                state[name] = value.snapshot()
            elif isinstance(value, bytearray | memoryview):
                state[name] = bytes(value)
            elif isinstance(value, list):
                state[name] = list(value)
            else:
                state[name] = value
        return state

    def restore(self, state: dict[str, object]) -> None:
        """Take the state from `snapshot` of a device with the same wiring and options.

        Raises:
            ValueError: a field is missing, is too many, or has another type.
        """
        if set(state) != set(self._saved):
            raise ValueError(
                f"a snapshot of {type(self).__name__} holds {', '.join(self._saved)}, not {', '.join(state)}"
            )
        for name in self._saved:
            self._take(name, state[name])

    def _take(self, name: str, value: object) -> None:
        current = getattr(self, name)
        match current, value:
            case (Device(), dict()) | (Timer(), list()):
                current.restore(value)
            case (bytearray() | memoryview(), bytes()) | (list(), list()):
                current[:] = value
            case (int() | bytes() | str(), _) if type(value) is type(current):
                setattr(self, name, value)
            case _:
                raise ValueError(f"{type(self).__name__}.{name} cannot be taken from {type(value).__name__}")
