"""The monitor command about an engine that chooses between two others: which runs, since when and why, at what prices.

It reads what was counted, and may set the prices; it must not know how the choice is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from gdbstub.monitor.command import Command
from gdbstub.target import TargetError
from vmm.phases import Chooser, Cost, Phase
from vmm.prices import PARTS, Part

if TYPE_CHECKING:
    from gdbstub.guest import GuestTarget

_PHASES_SHOWN = 20
_KINDS_SHOWN = 3


@runtime_checkable
class Chooses(Protocol):
    """An engine that has others run the guest, in turns."""

    chooser: Chooser
    part: Part

    def spent(self) -> dict[str, Cost]:
        """By engine, all that has been counted so far."""

    def cost_of_stretch(self) -> Cost:
        """What has been counted since the last judgement."""

    def price_as(self, part: Part) -> None:
        """Price exits as on this processor from now on."""

    @property
    def switches_cycles(self) -> float:
        """What all switches are priced at."""

    @property
    def switch_ns(self) -> float:
        """What one took."""


def show(guest: GuestTarget, words: list[str]) -> Iterator[str]:
    """`hybrid [PROCESSOR]`."""
    engine = guest.machine.engine
    if not isinstance(engine, Chooses):
        raise TargetError(f"The engine `{engine.name}` makes no choices; `monitor vmm hybrid` selects one that does.")
    if words:
        engine.price_as(_find(" ".join(words)))
    yield from _show_now(engine)
    yield from _show_spent(engine)
    yield from _show_phases(engine.chooser)


def _find(name: str) -> Part:
    parts = [part for part in PARTS if part.name.lower() == name.lower()]
    if not parts:
        names = ", ".join(part.name for part in PARTS)
        raise TargetError(f"What an exit costs on a `{name}` is not known; there are: {names}.")
    return parts[0]


def _show_now(engine: Chooses) -> Iterator[str]:
    chooser, phase = engine.chooser, engine.chooser.phase
    insns = phase.cost.insns + engine.cost_of_stretch().insns
    what = "is tried" if phase.is_trial else "runs the guest"
    yield f"{chooser.engine} {what}, for {insns:,} instructions now: {phase.why}.\n"
    took = f"; each took {engine.switch_ns / 1000:,.0f} us here, and is priced as an exit" if chooser.switches else ""
    yield f"{chooser.switches:,} {'switch' if chooser.switches == 1 else 'switches'} so far{took}.\n"


def _show_spent(engine: Chooses) -> Iterator[str]:
    yield f"overhead in cycles of a {engine.part.name}, by published costs; a model, no measurement of this host:\n"
    yield f"  {'':8} {'instructions':>16} {'cycles':>16} {'for a million':>16}\n"
    for name, cost in engine.spent().items():
        yield f"  {name:8} {cost.insns:16,} {cost.total_cycles:16,.0f} {cost.rate:16,.0f}\n"
    yield f"  {'switches':8} {'':16} {engine.switches_cycles:16,.0f}\n"


def _show_phases(chooser: Chooser) -> Iterator[str]:
    phases = list(chooser.phases)[-_PHASES_SHOWN:]
    yield "phases, with cycles and events for a million instructions:\n"
    yield f"  {'from':>14} {'instructions':>14} {'engine':10} {'cycles':>13} {'the other':>13}  events\n"
    for phase in phases:
        engine = f"{phase.engine}, trial" if phase.is_trial else phase.engine
        other = "not known" if phase.other_rate is None else f"{phase.other_rate:,.0f}"
        yield (
            f"  {phase.first_icount:14,} {phase.cost.insns:14,} {engine:10} {phase.cost.rate:13,.0f} {other:>13}"
            f"  {_events(phase)}\n{'':17}{phase.why}\n"
        )


def _events(phase: Phase) -> str:
    cycles, rates = phase.cost.cycles, phase.cost.count_rates
    kinds = sorted(cycles, key=lambda kind: -cycles[kind])[:_KINDS_SHOWN]
    texts = (f"{kind} {rates[kind]:,.0f}" for kind in kinds)
    return ", ".join(texts) or "none"


COMMANDS = (
    Command(
        "hybrid",
        "[PROCESSOR]",
        "which engine hybrid has chosen, when and why, and what it takes each to cost",
        show,
        changes=True,
        bare=True,
        details="hybrid counts what bt does besides executing (callouts, faults, translation) and what trap is left\n"
        "for, and prices both by what was published for a software VMM and for the exits of a PROCESSOR: "
        + ", ".join(part.name for part in PARTS)
        + ".\nNaming one prices exits as it from now on. Seconds play no part: trap's CPU is emulated, and the same "
        "run\nmakes the same choices. When something else begins, the other engine is tried for a while.",
    ),
)
