"""A kernel of Debian's finds the FPU of the Pentium 4 model, sets it up, and goes on to where it needs it."""

from __future__ import annotations

from machine.cpuid import PENTIUM4
from machine.devices.board import BoardOptions
from machine.loaders.image import LoadOptions
from machine.pc import Machine, MachineOptions
from machine.state import CR0_EM, CR0_TS, CR4_OSFXSR
from tests.system.debian import gnumach
from vmm.interp import Interpreter
from vmm.native.hostfpu import HostFpu

# It has found it after 3.83 million instructions (measured).
_BOUND_INSNS = 6_000_000


def test_gnumach_sets_the_fpu_up() -> None:
    serial = bytearray()
    options = MachineOptions(
        image=gnumach(),
        model=PENTIUM4,
        make_fpu=HostFpu,
        loading=LoadOptions(command_line="console=com0"),
        board=BoardOptions(serial=(serial.extend, None)),
    )
    machine = Machine(options, {"interp": lambda machine: Interpreter(machine.cpu, machine.debug)}, "interp")
    try:
        cpu = machine.cpu
        while machine.clock.icount < _BOUND_INSNS and not cpu.state.cr4 & CR4_OSFXSR:
            machine.engine.run(min(machine.clock.icount + 100_000, _BOUND_INSNS))
        assert cpu.state.cr4 & CR4_OSFXSR, "it knows FXSAVE"
        machine.engine.run(machine.clock.icount + 100_000)
        assert cpu.state.cr0 & (CR0_EM | CR0_TS) == CR0_TS, "an FPU is there, and nobody has used it yet"
        assert b"No FPU" not in serial
    finally:
        machine.close()
