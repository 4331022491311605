"""Which engine a command line gets: the default, what falls back to the interpreter, and what is refused."""

from __future__ import annotations

import argparse
from dataclasses import replace

import pytest

from gdbstub import cli_engine
from gdbstub.cli_engine import UsageError, choose
from gdbstub.cli_options import build_parser
from gdbstub.guest import GuestTarget
from gdbstub.target import TargetError
from machine.alu import Alu, build_alu
from machine.loaders.image import LoadOptions
from machine.pc import Machine, MachineOptions
from machine.undefined import AMD_ZEN5, INTEL_P6, SPOTS
from tests.gdbstub.pc import CODE, say
from vmm.native import hostcheck
from vmm.native.hostcheck import HostFacts

GOOD = HostFacts(cpu_flags=frozenset({"bmi2"}), hwcap2=2)
POOR = HostFacts(cpu_flags=frozenset(), hwcap2=2)
ALUS = {"host": build_alu(), "amd-zen5": build_alu(AMD_ZEN5), "intel-p6": build_alu(INTEL_P6)}


@pytest.fixture(autouse=True)
def good_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """One with all that bt needs, and the undefined flags of a Zen 5."""
    monkeypatch.setattr(hostcheck, "gather", lambda: GOOD)
    monkeypatch.setattr(cli_engine, "choose_alu", fake_alu)


def fake_alu(model: str = "host") -> Alu:
    return ALUS[model]


def parse(*words: str) -> argparse.Namespace:
    return build_parser().parse_args(["run", *words])


def chosen(*words: str) -> tuple[str, str, list[str]]:
    """The engine, the default, and what is said."""
    said: list[str] = []
    choice = choose(parse(*words), said.append)
    return choice.name, choice.default, said


def test_the_default_is_bt() -> None:
    assert chosen() == ("bt", "bt", [])
    assert chosen("--vmm", "interp") == ("interp", "bt", [])
    assert chosen("--undefined-flags", "host") == ("bt", "bt", [])


def test_where_bt_cannot_run_the_default_is_interp_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hostcheck, "gather", lambda: POOR)
    name, default, said = chosen()
    assert (name, default) == ("interp", "interp")
    (line,) = said
    assert line.startswith("trapgate: interp runs the guest, instead of bt: BMI2 is not there; SARX, SHRX and MULX are")
    # Who names an engine gets it, or is refused when it is made.
    assert chosen("--vmm", "interp")[::2] == ("interp", [])
    assert chosen("--vmm", "bt")[::2] == ("bt", [])


def test_the_backends_of_trap() -> None:
    assert chosen("--vmm", "trap") == ("trap", "bt", [])
    assert chosen("--vmm", "trap", "--trap-backend", "emulated", "--paging", "shadow")[0] == "trap"
    assert chosen("--vmm", "trap", "--paging", "nested")[0] == "trap nested"
    assert chosen("--vmm", "trap-nested")[0] == "trap nested"
    assert chosen("--vmm", "trap-kvm")[0] == "trap kvm"
    assert chosen("--vmm", "trap", "--trap-backend", "kvm")[0] == "trap kvm"
    assert chosen("--vmm", "hybrid") == ("hybrid", "bt", [])
    for words in (["--paging", "nested"], ["--vmm", "hybrid", "--paging", "nested"], ["--trap-backend", "emulated"]):
        with pytest.raises(UsageError, match="is for --vmm trap"):
            chosen(*words)
    with pytest.raises(UsageError, match="KVM has its own way"):
        chosen("--vmm", "trap", "--trap-backend", "kvm", "--paging", "nested")


def test_other_flags_than_the_hosts_need_interp() -> None:
    line = "trapgate: interp runs the guest, instead of bt: --undefined-flags intel-p6 are not those of this host's CPU"
    assert chosen("--undefined-flags", "intel-p6") == ("interp", "interp", [line])
    assert chosen("--undefined-flags", "intel-p6", "--vmm", "interp")[::2] == ("interp", [])
    assert chosen("--undefined-flags", "amd-zen5") == ("bt", "bt", [])
    for engine in (["bt"], ["trap"], ["hybrid"], ["trap", "--trap-backend", "kvm"]):
        with pytest.raises(UsageError, match="only the engine interp has others"):
            chosen("--undefined-flags", "intel-p6", "--vmm", *engine)


def test_a_host_that_cannot_be_measured_has_no_flags_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = build_alu(replace(AMD_ZEN5, unprobed=tuple(SPOTS)))
    monkeypatch.setitem(ALUS, "host", unknown)
    assert chosen("--undefined-flags", "amd-zen5")[0] == "interp"
    assert chosen()[0] == "bt"


def test_the_monitor_says_which_is_the_default_and_refuses_the_others_flags() -> None:
    choice = choose(parse("--undefined-flags", "intel-p6"), lambda _line: None)
    options = MachineOptions(image=b"\x90\xf4", loading=LoadOptions(ram_bytes=4 << 20, load_address=CODE))
    machine = Machine(options, choice.factories, choice.name, choice.alu)
    try:
        target = GuestTarget(machine)
        target.default_engine = choice.default
        assert say(target, "vmm") == "  bt\n  trap\n  trap nested\n  trap kvm\n  hybrid\n* interp (the default)\n"
        for name in ("bt", "trap", "trap nested", "trap kvm", "hybrid"):
            with pytest.raises(TargetError, match="--undefined-flags intel-p6 are not those of this host's CPU"):
                say(target, f"vmm {name}")
        assert machine.engine.name == "interp"
    finally:
        machine.close()
