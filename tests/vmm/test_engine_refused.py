"""An engine that the host has no room for: whatever it refuses, and when, the engine of before runs on."""

from __future__ import annotations

import ctypes
import errno
import gc
from contextlib import suppress
from pathlib import Path

import pytest

from guests import images
from machine.engine import EngineError
from machine.pc import Machine
from tests import engine
from tests.system.runs import MIB, booted
from vmm.interp import Interpreter
from vmm.native import hostmemory

TINY = images.path("tiny-stepper")
LAST = 3000


class Host:
    """The host's mmap, which refuses one call after the engine of a machine has handed over."""

    def __init__(self, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.refused_call = 0
        self.calls_left = -1
        self._mmap, self._leave = hostmemory._mmap, machine.engine.leave
        monkeypatch.setattr(hostmemory, "_mmap", self.map)
        monkeypatch.setattr(machine.engine, "leave", self.leave)

    def leave(self) -> None:
        self._leave()
        self.calls_left = self.refused_call

    def map(self, *arguments: int) -> int:
        self.calls_left -= 1
        if self.calls_left == 0:
            ctypes.set_errno(errno.ENOMEM)
            return hostmemory._MAP_FAILED
        got: int = self._mmap(*arguments)
        return got


def holdings(machine: Machine) -> tuple[object, ...]:
    """What an engine takes from the machine and from the host."""
    gc.collect()
    memory, cpu = machine.memory, machine.cpu
    size_kib = int(Path("/proc/self/status").read_text().partition("VmSize:")[2].split()[0])
    lists = memory.write_observers, memory.flag_observers, memory.map_observers, cpu.mmu.flush_observers
    observers = [len(each) for each in (*lists, machine.debug.on_change)]
    files = len(list(Path("/proc/self/fd").iterdir()))
    return observers, memory.intercepts_devices, files, size_kib >> 20


@pytest.mark.parametrize("wanted", [name for name in engine.factories() if name != "interp"])
@pytest.mark.parametrize("running", ["interp", "bt"])
def test_the_one_of_before_runs_on(monkeypatch: pytest.MonkeyPatch, running: str, wanted: str) -> None:
    if running == wanted:
        running = "trap"
    with booted(TINY, ram_bytes=16 * MIB, ns_per_insn=1000, engine="interp") as plain:
        plain.run_to(LAST)
        expected = plain.state()
    with booted(TINY, ram_bytes=16 * MIB, ns_per_insn=1000, engine=running) as run:
        machine = run.machine
        run.run_to(100)
        machine.select_engine(wanted)  # some things are made once in a process
        machine.select_engine(running)
        before = holdings(machine)
        host = Host(machine, monkeypatch)
        for refused in range(100):
            host.refused_call = refused + 1
            with suppress(EngineError):
                machine.select_engine(wanted)
                host.calls_left = -1
                break
            assert machine.engine.name == running
            assert holdings(machine) == before
            run.run_to(run.icount + 20)
        assert refused >= 5
        assert machine.engine.name == wanted
        run.run_to(LAST)
        assert run.state() == expected


class Refusing(Interpreter):
    """An engine that finds out late that it cannot run."""

    def enter(self) -> None:
        raise EngineError("not on this host")


def test_one_that_says_itself_that_it_cannot_run() -> None:
    with booted(TINY, ram_bytes=16 * MIB, ns_per_insn=1000, engine="bt") as run:
        machine = run.machine
        machine._factories["refusing"] = lambda machine: Refusing(machine.cpu, machine.debug)
        run.run_to(100)
        with pytest.raises(EngineError, match=r"^not on this host$"):
            machine.select_engine("refusing")
        assert machine.engine.name == "bt"
        run.run_to(200)
