"""The one guest behind all sessions: who controls it, whether it runs, how it ended.

It must not know packets or sockets; time comes through a function.
"""

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from gdbstub.register_layout import RegisterLayout
from gdbstub.stint import STINT_LIMIT_S, StintBudget
from gdbstub.target import Resume, ResumeMode, Signal, StintEnd, StopEvent, StopReason, Target, TargetError


class EndKind(enum.Enum):
    """How the guest came to its end."""

    EXITED = enum.auto()  # by itself, with a status
    KILLED = enum.auto()  # by a debugger
    QUIT = enum.auto()  # a monitor command ended the whole program


@dataclass(frozen=True, slots=True)
class End:
    """The end of the guest, and the exit status that goes with it."""

    kind: EndKind
    status: int = 0


class Controller(Protocol):
    """The session that controls the guest, as far as the debuggee calls it."""

    def stopped(self, event: StopEvent) -> None:
        """Take notice of a stop (or the exit) of the guest that this session has resumed."""


_RUN_FREELY = (Resume(ResumeMode.CONTINUE),)


class Debuggee:
    """A target, and what all sessions share about it.

    At most one session controls the guest: the first that asks while nobody does. The others may look.
    """

    def __init__(self, target: Target, now_s: Callable[[], float]) -> None:
        """Take over a guest that has not started; `now_s` is a monotonic clock in seconds."""
        self.target = target
        self.layout = RegisterLayout(target.description)
        self.now_s = now_s
        self.running = False
        self.end: End | None = None
        self.last_stop = StopEvent(StopReason.SIGNAL)
        self.stint_deadline_s = 0.0
        self._controller: Controller | None = None
        self._budget = StintBudget()

    @property
    def controlled(self) -> bool:
        """Whether a session controls the guest."""
        return self._controller is not None

    def start(self) -> None:
        """Let a guest go that nobody debugs."""
        if not self.running and self.end is None:
            self.target.resume(_RUN_FREELY)
            self.running = True

    def claim(self, controller: Controller) -> bool:
        """Give control to a session and stop the guest for it; False if another one has it."""
        if self._controller is not None:
            return self._controller is controller
        self._controller = controller
        self.target.attach()
        if self.running:
            self.target.interrupt()
            self.running = False
            # As QEMU does: a stop by attaching looks like a breakpoint, not like a Ctrl-C that nobody typed.
            self.last_stop = StopEvent(StopReason.SIGNAL, Signal.TRAP, self.target.threads()[0].id)
        return True

    def release(self, controller: Controller, *, resume: bool) -> None:
        """Take control from a session; the guest runs on if it ran or if `resume` says so, else it stays stopped."""
        if self._controller is not controller:
            return
        self._controller = None
        was_running = self.running
        if was_running:
            self.target.interrupt()
            self.running = False
        self.target.detach()
        if was_running or resume:
            self.start()

    def resume(self, actions: tuple[Resume, ...]) -> None:
        """Let the guest go on for its controller."""
        self.target.resume(actions)
        self.running = True

    def interrupt(self) -> None:
        """Stop the guest now, if it runs, and tell its controller."""
        if self.running:
            self._stop(self.target.interrupt())

    def stint(self) -> StintEnd:
        """Run the guest for a few milliseconds; IDLE if there is no hurry to call again."""
        begun_s = self.now_s()
        self.stint_deadline_s = begun_s + STINT_LIMIT_S
        try:
            outcome = self.target.run(self._budget.insns)
        except TargetError as error:
            outcome = StopEvent(StopReason.SIGNAL, Signal.ABRT, self.target.threads()[0].id, text=f"{error}\n")
        if isinstance(outcome, StopEvent):
            self._stop(outcome)
            return StintEnd.IDLE
        if outcome is StintEnd.BUDGET:
            self._budget.note(self.now_s() - begun_s)
        return outcome

    def restart(self) -> None:
        """Load the image again and stop before the first instruction."""
        self.last_stop = self.target.restart()
        self.running = False
        self.end = None

    def kill(self) -> None:
        """End the guest for a debugger."""
        if self.end is None:
            self.target.kill()
            self.running = False
            self.end = End(EndKind.KILLED)

    def quit(self, status: int) -> None:
        """End the whole program."""
        self.running = False
        self.end = End(EndKind.QUIT, status)

    def _stop(self, event: StopEvent) -> None:
        self.running = False
        self.last_stop = event
        if event.reason is StopReason.EXITED:
            self.end = End(EndKind.EXITED, event.status)
        if self._controller is not None:
            self._controller.stopped(event)
