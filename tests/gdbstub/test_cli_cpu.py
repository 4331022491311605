from __future__ import annotations

import platform

import pytest

from gdbstub import cli_cpu
from gdbstub.cli_options import CPU_NAMES, USAGE_STATUS, build_parser
from machine.cpuid import MODELS, P6_NO_FPU, PENTIUM4
from machine.fpustate import FpuState
from machine.inputs import Input
from machine.loaders.image import LoadOptions
from machine.pc import Machine, MachineOptions
from vmm.interp import Interpreter
from vmm.native.hostfpu import HostFpu


def test_the_command_line_knows_every_model() -> None:
    assert set(CPU_NAMES) == set(MODELS)
    for name in CPU_NAMES:
        assert build_parser().parse_args(["run", "--cpu", name]).cpu == name


def test_an_unknown_model_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        build_parser().parse_args(["run", "-cpu", "486"])
    assert refused.value.code == USAGE_STATUS
    assert "there is: p6-nofpu, pentium4" in capsys.readouterr().err


def test_a_model_with_fpu_comes_with_what_computes_it() -> None:
    model, make_fpu = cli_cpu.choose("pentium4")
    assert model is PENTIUM4
    assert make_fpu is not None
    assert make_fpu(FpuState()).present
    assert cli_cpu.choose("p6-nofpu") == (P6_NO_FPU, None)
    assert cli_cpu.choose(None)[0] is PENTIUM4


def test_elsewhere_there_is_no_fpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert cli_cpu.choose(None) == (P6_NO_FPU, None)
    with pytest.raises(ValueError, match="--cpu pentium4: its FPU is this host's own"):
        cli_cpu.choose("pentium4")


def test_a_machine_cannot_have_an_fpu_that_nothing_computes() -> None:
    with pytest.raises(ValueError, match="nothing computes"):
        Machine(MachineOptions(image=b"\xf4", model=PENTIUM4), {"interp": lambda pc: Interpreter(pc.cpu, pc.debug)}, "")


def test_a_debuggers_write_of_fpu_registers_is_replayed() -> None:
    """FADD ST(0), ST(0) for ever; the stack is loaded from outside."""
    recorded: list[Input] = []

    def build(replay: tuple[Input, ...] = ()) -> Machine:
        options = MachineOptions(
            image=b"\xdc\xc0\xeb\xfc",
            model=PENTIUM4,
            make_fpu=HostFpu,
            loading=LoadOptions(load_address=0x10_0000, ram_bytes=2 << 20),
            replay=replay,
            record=lambda entry: recorded.append(entry) if entry is not None else None,
        )
        return Machine(options, {"interp": lambda pc: Interpreter(pc.cpu, pc.debug)}, "interp")

    first = build()
    first.engine.run(100)
    first.cpu.state.fpu.set_st(0, 0x3FFF_8000_0000_0000_0000)
    first.cpu.state.fpu.mxcsr = 0x1FA0
    first.note_register_write()
    first.engine.run(200)
    second = build(tuple(recorded))
    second.engine.run(200)
    assert second.cpu.state.pack() == first.cpu.state.pack()
    assert first.cpu.state.fpu.st(0) == 0x3FFF_8000_0000_0000_0000 + (50 << 64)
    first.close()
    second.close()
