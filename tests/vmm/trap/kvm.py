"""Where the real /dev/kvm is: what skips a test without it, and bare guests that run on it.

Tests bound the time of the host rather than instructions: on KVM these are not counted.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from machine.debug import Stop, StopKind
from machine.engine import Engine
from tests.vmm.bare import Bare
from vmm.trap.kvm import KvmError, Vm
from vmm.trap.kvm_engine import KvmEngine
from vmm.trap.kvmfacts import look

BUDGET_INSNS = 3_000_000
TIMEOUT_S = 20.0


def _missing() -> str:
    try:
        Vm().close()
    except KvmError as error:
        return str(error)
    return ""


MISSING = _missing()
needs_kvm = pytest.mark.skipif(bool(MISSING), reason=f"no /dev/kvm: {MISSING}")


def lacks(what: str) -> bool:
    """Whether the KVM of this host lacks something: a field of `KvmFacts`."""
    return not MISSING and not getattr(look(), what)


def run(engine: Engine, bare: Bare, *, skip_breakpoint: bool = False) -> Stop:
    """Run until something other than time stops the guest."""
    end_s = time.monotonic() + TIMEOUT_S
    while time.monotonic() < end_s:
        stop = engine.run(bare.clock.icount + BUDGET_INSNS, skip_breakpoint=skip_breakpoint)
        skip_breakpoint = False
        if stop.kind is not StopKind.BUDGET:
            return stop
    raise AssertionError(f"no stop in {TIMEOUT_S:.0f} s")


def finish(bare: Bare) -> Stop:
    """Run the guest to its end, and close it."""
    stop = run(bare.engine, bare)
    bare.close()
    return stop


def count(bare: Bare, name: str) -> int:
    """A statistic of the engine."""
    return int(bare.engine.statistics().get(name, 0))


def open_files() -> int:
    """How many files the process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


__all__ = ["KvmEngine", "count", "finish", "lacks", "needs_kvm", "open_files", "run"]
