"""What `trapgate doctor` prints for hosts that are made up."""

from __future__ import annotations

import argparse
import json

import pytest

from gdbstub import cli_doctor
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
    assert {"host", "BMI2", "FSGSBASE", "shadow stack", "vm.overcommit_memory", "vm.max_map_count", "KVM"} <= bad


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
