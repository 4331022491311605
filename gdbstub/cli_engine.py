"""Which engine the command line gives the guest, and with whose undefined flags; what falls back, and what is refused.

It must not know how engines work: only what each needs of the host, and how it is made.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from gdbstub.cli_options import DEFAULT_ENGINE, FALLBACK_ENGINE, HOST_FLAGS
from machine.alu import Alu
from machine.engine import Engine, EngineError
from machine.pc import EngineFactory, Machine
from machine.undefined import PROFILES
from vmm.hostalu import choose_alu
from vmm.interp import Interpreter


class UsageError(Exception):
    """The command line asks for what cannot be; the text is for the user."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What runs the guest.

    Attributes:
        name: the engine.
        default: the engine that a command line without --vmm would get.
        factories: all engines, by name.
        alu: makes arithmetic for what is interpreted, once something is.
    """

    name: str
    default: str
    factories: dict[str, EngineFactory]
    alu: Callable[[], Alu]


def choose(options: argparse.Namespace, say: Callable[[str], None]) -> Choice:
    """The engine that the options name, or the default: bt, and where that cannot be, interp with a line that says why.

    Raises:
        UsageError: there is no such engine or model of undefined flags, or they do not go together.
    """
    model: str = options.undefined_flags
    if model not in (HOST_FLAGS, *PROFILES):
        names = ", ".join((HOST_FLAGS, *PROFILES))
        raise UsageError(f"--undefined-flags {model}: there is no such model; there are: {names}")
    alu = partial(choose_alu, model)
    foreign = None if _are_the_hosts(model) else model
    factories = make_factories(verify=options.verify_tc, foreign_flags=foreign)
    wanted = _named_engine(options)
    if wanted not in (None, FALLBACK_ENGINE):
        if foreign is not None:
            raise UsageError(_why_not_these_flags(foreign))
        return Choice(wanted, DEFAULT_ENGINE, factories, alu)
    lack = _lack_of_bt(foreign) if wanted is None else None
    default = DEFAULT_ENGINE if lack is None else FALLBACK_ENGINE
    if lack is not None:
        say(f"trapgate: {FALLBACK_ENGINE} runs the guest, instead of {DEFAULT_ENGINE}: {lack}")
    return Choice(wanted or default, default, factories, alu)


def make_factories(*, verify: bool, foreign_flags: str | None = None) -> dict[str, EngineFactory]:
    """The engines by name.

    Args:
        verify: what the native core emits is proven harmless before it may run.
        foreign_flags: the model of --undefined-flags if that is not this host's CPU, which then may execute nothing.
    """

    def refuse_foreign_flags() -> None:
        if foreign_flags is not None:
            raise EngineError(_why_not_these_flags(foreign_flags))

    def need_native_core() -> None:
        from vmm.native import hostcheck

        refuse_foreign_flags()
        lack = hostcheck.why_not_bt(hostcheck.gather())
        if lack is not None:
            raise EngineError(lack)

    def make_bt(machine: Machine) -> Engine:
        from vmm.bt import BinaryTranslator

        need_native_core()
        return BinaryTranslator(machine.cpu, machine.debug, verify=verify)

    def make_trap(machine: Machine, *, nested: bool = False) -> Engine:
        from vmm.trap.engine import TrapEngine

        need_native_core()
        return TrapEngine(machine.cpu, machine.debug, nested=nested, verify=verify)

    def make_hybrid(machine: Machine) -> Engine:
        from vmm.hybrid import HybridEngine

        need_native_core()
        return HybridEngine(machine.cpu, machine.debug, verify=verify)

    def make_kvm(machine: Machine) -> Engine:
        from vmm.trap.kvm_engine import KvmEngine

        refuse_foreign_flags()
        return KvmEngine(machine.cpu, machine.debug)

    return {
        "bt": make_bt,
        "trap": make_trap,
        "trap nested": partial(make_trap, nested=True),
        "trap kvm": make_kvm,
        "hybrid": make_hybrid,
        "interp": lambda machine: Interpreter(machine.cpu, machine.debug),
    }


def _are_the_hosts(model: str) -> bool:
    """Whether emitted code, which runs on this host's CPU, leaves the flags that this model does."""
    if model == HOST_FLAGS:
        return True
    host = choose_alu().profile
    return not host.unprobed and host.rules == PROFILES[model].rules


def _lack_of_bt(foreign_flags: str | None) -> str | None:
    """Why bt cannot run the guest, in the words of the one line that says so; None if it can."""
    if foreign_flags is not None:
        return f"--undefined-flags {foreign_flags} are not those of this host's CPU"
    from vmm.native import hostcheck

    return hostcheck.lack_of_bt(hostcheck.gather())


def _why_not_these_flags(model: str) -> str:
    return f"--undefined-flags {model} are not those of this host's CPU; only the engine {FALLBACK_ENGINE} has others"


def _named_engine(options: argparse.Namespace) -> str | None:
    """The engine that --vmm, --trap-backend and --paging name together; None if they name none."""
    if options.vmm != "trap":
        for name in ("trap_backend", "paging"):
            if getattr(options, name):
                raise UsageError(f"--{name.replace('_', '-')} is for --vmm trap")
        engine: str | None = options.vmm
        return None if engine is None else engine.replace("-", " ")
    if options.trap_backend == "kvm":
        if options.paging:
            raise UsageError("--paging is for the emulated backend of --vmm trap; KVM has its own way")
        return "trap kvm"
    return "trap nested" if options.paging == "nested" else "trap"
