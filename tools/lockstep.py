"""Run two engines on one image in lockstep: `python -m tools.lockstep IMAGE [--append TEXT] [--insns N] ...`.

It prints where and how they part, or what each engine counted. The comparison itself is `vmm.lockstep`'s.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from machine.loaders.image import LoadOptions
from machine.pc import EngineFactory, MachineOptions
from vmm import lockstep
from vmm.bt import BinaryTranslator
from vmm.hostalu import choose_alu
from vmm.interp import Interpreter

ENGINES: dict[str, EngineFactory] = {
    "interp": lambda machine: Interpreter(machine.cpu, machine.debug),
    "bt": lambda machine: BinaryTranslator(machine.cpu, machine.debug),
}


def main() -> int:
    """Compare; 0 if all was equal, 1 if not."""
    parser = argparse.ArgumentParser(prog="tools.lockstep", description=__doc__.splitlines()[0])
    parser.add_argument("image", type=Path)
    parser.add_argument("--append", default="", help="the image's command line")
    parser.add_argument("--memory", type=int, default=8, metavar="MIB")
    parser.add_argument("--insns", type=int, default=1_000_000, metavar="N", help="how far to run")
    parser.add_argument(
        "--longest", type=int, default=20_000, metavar="N", help="the longest way between two comparisons"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ns-per-insn", type=int, default=1)
    parser.add_argument("--engines", nargs=2, choices=ENGINES, default=("interp", "bt"))
    parser.add_argument("--coarse", action="store_true", help="do not search for the first difference")
    arguments = parser.parse_args()
    loading = LoadOptions(ram_bytes=arguments.memory << 20, command_line=arguments.append)
    options = MachineOptions(image=arguments.image, loading=loading, ns_per_insn=arguments.ns_per_insn)
    alu = choose_alu()

    def make() -> tuple[lockstep.Side, lockstep.Side]:
        first, second = (lockstep.machine_side(options, ENGINES[name], alu) for name in arguments.engines)
        return first, second

    icounts = lockstep.random_icounts(arguments.insns, arguments.seed, arguments.longest)
    outcome = lockstep.run(make, icounts, locate=not arguments.coarse)
    sys.stdout.write(outcome.output.decode("latin-1"))
    print()
    for name, seconds, statistics in zip(arguments.engines, outcome.seconds, outcome.statistics, strict=True):
        print(f"{name}: {seconds:.3f} s, {json.dumps(statistics)}")
    print(f"icount {outcome.icount}, {len(icounts)} comparisons, stop {outcome.stop}")
    print(outcome.divergence or "no difference")
    return 1 if outcome.divergence else 0


if __name__ == "__main__":
    sys.exit(main())
