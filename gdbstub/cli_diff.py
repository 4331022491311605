"""`trapgate diff`: two engines on one image, side by side, to the first difference.

It turns words into a comparison, and how that ended into lines or JSON and a status; comparing is `vmm`'s business.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from contextlib import closing
from time import monotonic

from gdbstub import cli_engine
from gdbstub.cli_engine import UsageError
from gdbstub.cli_machine import machine_options
from gdbstub.cli_options import USAGE_STATUS
from gdbstub.cli_progress import clear_bar, show_bar
from gdbstub.monitor.comparison import as_values, describe
from machine.engine import EngineError
from machine.loaders.errors import ImageError
from machine.memory import MemorySizeError
from machine.pc import Machine
from vmm.hostalu import choose_alu
from vmm.lockstep import LockstepError, Outcome
from vmm.pairs import Pair, PairError, take_engine

DIFFERENT_STATUS = 1
_SIGNAL_STATUS = 128
_REFERENCE = "interp"
_REDRAW_S = 0.1


def run(options: argparse.Namespace) -> int:
    """Carry out `trapgate diff`; returns the exit status."""
    try:
        outcome, engines = _compare(options)
    except (UsageError, ImageError, MemorySizeError, PairError, EngineError, LockstepError, OSError) as error:
        clear_bar()
        sys.stderr.write(f"trapgate: {error}\n")
        return USAGE_STATUS
    except KeyboardInterrupt:
        clear_bar()
        return _SIGNAL_STATUS + signal.SIGINT
    clear_bar()
    if options.json:
        sys.stdout.write(json.dumps(as_values(outcome, engines, 0), indent=2) + "\n")
    else:
        sys.stdout.writelines(f"{line}\n" for line in describe(outcome, engines, 0))
    return DIFFERENT_STATUS if outcome.divergence is not None else 0


def _compare(options: argparse.Namespace) -> tuple[Outcome, tuple[str, str]]:
    factories = cli_engine.make_factories(verify=options.verify_tc)
    known = tuple(factories)
    engines = _engine(options.first, known), _engine(options.second, known)
    insns: int = options.max_insns
    try:
        machine = Machine(machine_options(options), factories, _REFERENCE, choose_alu)
    except ValueError as error:
        raise UsageError(str(error)) from error
    with closing(machine), Pair(machine, engines) as pair:
        comparison = pair.compare(insns, each=options.each)
        drawn_s = 0.0
        while True:
            try:
                progress = next(comparison)
            except StopIteration as end:
                outcome: Outcome = end.value
                return outcome, engines
            if monotonic() - drawn_s > _REDRAW_S:
                drawn_s = monotonic()
                what = f"{progress.icount:,} of {insns:,} instructions"
                show_bar("diff", progress.icount / insns, "looking for the place" if progress.is_searching else what)


def _engine(word: str, known: tuple[str, ...]) -> str:
    name, rest = take_engine(word.split(), known)
    if rest:
        raise PairError(f"there is no engine `{word}`; there is: {', '.join(known)}")
    return name
