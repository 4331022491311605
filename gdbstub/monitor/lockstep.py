"""The monitor command that compares two engines from where the guest stands.

It works on copies: the guest is neither run nor changed. What is compared and how is `vmm`'s business.
"""

from __future__ import annotations

from collections.abc import Iterator
from time import monotonic
from typing import TYPE_CHECKING

from gdbstub.monitor.command import Command, parse_number, usage_error
from gdbstub.monitor.comparison import describe
from gdbstub.target import TargetError
from machine.engine import EngineError
from vmm.lockstep import LockstepError
from vmm.pairs import Pair, PairError, take_engine

if TYPE_CHECKING:
    from gdbstub.guest import GuestTarget

DEFAULT_INSNS = 1_000_000
_EACH = "each"
_PROGRESS_S = 2.0


def run_lockstep(guest: GuestTarget, words: list[str]) -> Iterator[str]:
    """`lockstep A B [N] [each]`."""
    machine = guest.machine
    try:
        first, rest = take_engine(words, machine.engine_names)
        second, rest = take_engine(rest, machine.engine_names)
        each = rest[-1:] == [_EACH]
        numbers = rest[:-1] if each else rest
        if len(numbers) > 1:
            raise usage_error("lockstep")
        insns = parse_number(guest, numbers[0], "number of instructions") if numbers else DEFAULT_INSNS
        if insns < 1:
            raise TargetError("The number of instructions is 1 or more.")
        with Pair(machine, (first, second), in_slices=True) as pair:
            yield f"{first} and {second} from icount {pair.begin_icount:,}, {insns:,} instructions, on copies\n"
            comparison = pair.compare(insns, each=each)
            shown_s = monotonic()
            while True:
                try:
                    progress = next(comparison)
                except StopIteration as end:
                    yield from (f"{line}\n" for line in describe(end.value, (first, second), pair.begin_icount))
                    return
                text = ""
                if monotonic() - shown_s > _PROGRESS_S:
                    shown_s = monotonic()
                    text = "looking for the instruction\n" if progress.is_searching else f"  {progress.icount:,}\n"
                yield text
    except (PairError, EngineError, OSError) as error:
        text = f"{error}."
        raise TargetError(text[0].upper() + text[1:]) from error
    except LockstepError as error:
        raise TargetError(f"They cannot be compared further: {error}.") from error


COMMANDS = (
    Command(
        "lockstep",
        "A B [N] [each]",
        "run two engines side by side from here, on copies, to the first difference",
        run_lockstep,
        details="A and B are engines as `monitor vmm` names them (trap nested may be written trap-nested), N the\n"
        "number of instructions, 1,000,000 if it is left out. Registers, flags, memory, devices, time and output are\n"
        "compared at irregular icounts, or with `each` after every instruction, which is a thousand times slower.\n"
        "The first instruction after which they differ is shown with what differs. The guest itself is not moved.\n"
        "Ctrl-C ends it. trap kvm cannot take part: KVM does not count the guest's instructions.",
    ),
)
