"""Runs a flat test program on our CPU, in the surroundings that `tests.oracles.qemu` gives it.

It knows the machine and the chosen engine, a port for output and one to end the run, and no other device.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from machine.alu import build_alu
from machine.clock import Clock
from machine.cpu import Cpu
from machine.debug import DebugControl, FaultLevel, StopKind
from machine.lines import CpuLines, ExitKind, ExitRequest
from machine.memory import MIB, PhysicalMemory
from machine.ports import PortBus
from tests import engine as engines
from tests.oracles.qemu import DEBUGCON_PORT, EXIT_PORT, Mode, QemuRun, rom


@dataclass(slots=True)
class _Output:
    lines: CpuLines
    data: bytearray = field(default_factory=bytearray)

    def load_port(self, port: int, size_bytes: int) -> int:
        return (1 << 8 * size_bytes) - 1 if port == EXIT_PORT else DEBUGCON_PORT

    def store_port(self, port: int, size_bytes: int, value: int) -> None:
        assert size_bytes == 1
        if port == EXIT_PORT:
            self.lines.request_exit(ExitRequest(ExitKind.DEBUG_EXIT, value))
        else:
            self.data.append(value)


@dataclass(frozen=True, slots=True)
class ReferenceRun:
    """The same as a run of QEMU, and what only our CPU can tell.

    Attributes:
        run: output, and the value written to the exit port (None after a triple fault).
        chain: the exceptions of the triple fault.
        icount: instructions retired.
    """

    run: QemuRun
    chain: tuple[FaultLevel, ...]
    icount: int


def build_cpu(memory_mib: int = 8) -> Cpu:
    """A CPU with RAM and no devices."""
    return Cpu(PhysicalMemory(memory_mib * MIB), PortBus(), CpuLines(), Clock(), build_alu())


def run(
    program: bytes, mode: Mode = Mode.PROTECTED, *, memory_mib: int = 8, max_insns: int = 50_000_000
) -> ReferenceRun:
    """Load `program` at the entry address of `mode`, run it from reset, and return what it printed and how it ended.

    Raises:
        AssertionError: it was still running after `max_insns`, or halted for good; what it had printed is in the text.
    """
    cpu = build_cpu(memory_mib)
    output = _Output(cpu.lines)
    for port in (DEBUGCON_PORT, EXIT_PORT):
        cpu.ports.register(port, port, output)
    cpu.memory.map_rom(rom(mode))
    cpu.memory.write(mode.value, program)
    cpu.reset()
    engine = engines.make(cpu, DebugControl())
    engine.enter()
    try:
        while True:
            stop = engine.run(max_insns)
            icount = cpu.clock.icount
            if stop.kind is StopKind.EXIT:
                assert stop.exit_request is not None
                return ReferenceRun(QemuRun(bytes(output.data), stop.exit_request.status), (), icount)
            if stop.kind is StopKind.TRIPLE_FAULT:
                return ReferenceRun(QemuRun(bytes(output.data), None), stop.chain, icount)
            running = stop.kind is StopKind.BUDGET and icount < max_insns
            assert running, f"{stop.kind} after {icount} instructions, printed {bytes(output.data)!r}"
    finally:
        engine.leave()
