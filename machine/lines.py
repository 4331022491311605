"""The wires from the devices to the CPU and to whoever runs it: INTR, NMI, reset, and the end of the run.

It must not know what drives a wire, nor when the CPU looks at it.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass


class ExitKind(enum.Enum):
    """Why a device ended the run."""

    POWER_OFF = "power off"
    DEBUG_EXIT = "debug exit"


@dataclass(frozen=True, slots=True)
class ExitRequest:
    """The end of the run that a device asks for; `status` is the exit status of the process."""

    kind: ExitKind
    status: int


def _nobody_answers() -> int:
    """What an INTA cycle reads from a bus that nobody drives."""
    return 0xFF


class CpuLines:
    """What devices drive and the run loop looks at.

    Attributes:
        intr: the level of INTR; changed with `set_intr` only.
        acknowledge: the INTA cycle: returns the vector. The interrupt controller puts its own function here.
        peek: the vector that `acknowledge` would return, without its effects.
        nmi_pending: an edge on NMI that the CPU has not taken yet.
        reset_requested: a device pulled RESET.
        exit_requested: a device wants the run to end.
        attention: True while any of these needs a look, so that the run loop tests one attribute.
    """

    __slots__ = ("acknowledge", "attention", "exit_requested", "intr", "nmi_pending", "peek", "reset_requested")

    def __init__(self) -> None:
        self.acknowledge: Callable[[], int] = _nobody_answers
        self.peek: Callable[[], int] = _nobody_answers
        self.reset()

    def reset(self) -> None:
        """No line is up; `acknowledge` stays connected."""
        self.intr = False
        self.nmi_pending = False
        self.reset_requested = False
        self.exit_requested: ExitRequest | None = None
        self.attention = False

    def _look(self) -> None:
        self.attention = self.intr or self.nmi_pending or self.reset_requested or self.exit_requested is not None

    def set_intr(self, level: bool) -> None:
        """Drive INTR; the CPU takes it at its next interrupt window while it is still up."""
        self.intr = level
        self._look()

    def raise_nmi(self) -> None:
        """An edge on NMI; one is remembered."""
        self.nmi_pending = True
        self.attention = True

    def take_nmi(self) -> None:
        """The CPU has accepted the NMI."""
        self.nmi_pending = False
        self._look()

    def request_reset(self) -> None:
        """Reset the machine before the next instruction."""
        self.reset_requested = True
        self.attention = True

    def take_reset(self) -> None:
        """The reset was done."""
        self.reset_requested = False
        self._look()

    def request_exit(self, request: ExitRequest) -> None:
        """End the run before the next instruction; the first request counts."""
        if self.exit_requested is None:
            self.exit_requested = request
        self.attention = True

    def take_exit(self) -> ExitRequest | None:
        """The request, handed over to whoever ends the run."""
        request = self.exit_requested
        self.exit_requested = None
        self._look()
        return request

    def snapshot(self) -> dict[str, object]:
        """The levels and what is pending; a request to end the run is no state of the guest."""
        return {"intr": self.intr, "nmi_pending": self.nmi_pending, "reset_requested": self.reset_requested}

    def restore(self, state: dict[str, object]) -> None:
        """Take the lines from `snapshot`.

        Raises:
            ValueError: a field is missing or not a truth value.
        """
        values = [state.get(name) for name in ("intr", "nmi_pending", "reset_requested")]
        levels = [value for value in values if isinstance(value, bool)]
        if len(levels) != 3:
            raise ValueError("a snapshot of the CPU's lines holds intr, nmi_pending and reset_requested")
        self.intr, self.nmi_pending, self.reset_requested = levels
        self.exit_requested = None
        self._look()
