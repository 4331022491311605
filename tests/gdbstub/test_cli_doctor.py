"""What `trapgate doctor` prints for hosts that are made up, and what `bt` does on them."""

from __future__ import annotations

import argparse
import json

import pytest

from gdbstub import cli, cli_doctor
from gdbstub.cli_engine import make_factories
from gdbstub.guest import GuestTarget
from gdbstub.target import TargetError
from machine.loaders.image import LoadOptions
from machine.pc import Machine, MachineOptions
from tests.gdbstub.pc import CODE, say
from vmm.native import hostcheck
from vmm.native.hostcheck import HostFacts

POOR = HostFacts(machine="aarch64", system="Linux", kvm="forbidden", maps=100, shadow_stack=True, overcommit=2)


@pytest.fixture
def poor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hostcheck, "gather", lambda: POOR)


@pytest.mark.usefixtures("poor")
def test_every_finding_has_a_mark_a_value_and_an_effect(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli_doctor.run(argparse.Namespace(json=False)) == 0
    lines = capsys.readouterr().out.splitlines()
    findings = cli_doctor.find_all(POOR)
    assert len(lines) == 2 * len(findings)
    for finding, first, second in zip(findings, lines[::2], lines[1::2], strict=True):
        assert first.startswith("ok  " if finding.ok else "--  ")
        assert finding.name in first
        assert first.endswith(finding.value)
        assert second.strip() == finding.effect
    bad = {finding.name for finding in findings if not finding.ok}
    assert {
        "engine",
        "host",
        "BMI2",
        "FSGSBASE",
        "shadow stack",
        "vm.overcommit_memory",
        "vm.max_map_count",
        "KVM",
    } <= bad


@pytest.mark.usefixtures("poor")
def test_the_same_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli_doctor.run(argparse.Namespace(json=True)) == 0
    facts = {fact["name"]: fact for fact in json.loads(capsys.readouterr().out)}
    assert facts["host"]["value"] == "Linux  on aarch64"
    assert facts["address space"] == {
        "name": "address space",
        "ok": True,
        "value": "unlimited",
        "effect": facts["address space"]["effect"],
        "stops_bt": True,
    }


@pytest.mark.usefixtures("poor")
def test_bt_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "--vmm", "bt", "--gdb", "none"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("trapgate: the engine bt cannot run here")
    assert "Linux  on aarch64" in said


def test_the_monitor_keeps_the_engine_when_bt_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    options = MachineOptions(image=b"\x90\xf4", loading=LoadOptions(ram_bytes=4 << 20, load_address=CODE))
    machine = Machine(options, make_factories(verify=False), "interp")
    try:
        target = GuestTarget(machine)
        with monkeypatch.context() as patch:
            patch.setattr(hostcheck, "gather", lambda: POOR)
            with pytest.raises(TargetError, match="cannot run here"):
                say(target, "vmm bt")
        assert machine.engine.name == "interp"
        assert "* bt" in say(target, "vmm bt")
    finally:
        machine.close()
