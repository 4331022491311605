from __future__ import annotations

import platform

import pytest

from gdbstub import cli_cpu
from gdbstub.cli_options import CPU_NAMES, USAGE_STATUS, build_parser
from machine.cpuid import MODELS, P6_NO_FPU, PENTIUM4
from machine.fpustate import FpuState
from machine.pc import Machine, MachineOptions
from vmm.interp import Interpreter


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
