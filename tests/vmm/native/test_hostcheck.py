"""What hosts of all kinds are told: facts go in, findings come out; and this host's own facts are what others say."""

from __future__ import annotations

import os
import platform
import resource
from dataclasses import replace
from pathlib import Path

import pytest

from vmm.native import hostcheck
from vmm.native.hostcheck import CHECKS, NEEDED_ADDRESS_BYTES, Finding, HostFacts, gather, why_not_bt

GOOD = HostFacts(cpu_flags=frozenset({"bmi2", "fsgsbase", "avx2"}), hwcap2=2, signal_stack_bytes=2048, kvm="usable")


def finding(facts: HostFacts, name: str) -> Finding:
    (found,) = (found for found in (check(facts) for check in CHECKS) if found.name == name)
    return found


def test_a_good_host_lacks_nothing() -> None:
    assert all(check(GOOD).ok for check in CHECKS)
    assert why_not_bt(GOOD) is None


@pytest.mark.parametrize(
    ("lack", "name", "words"),
    [
        ({"machine": "aarch64"}, "host", "Linux on x86-64"),
        ({"system": "Darwin"}, "host", "Linux on x86-64"),
        ({"cpu_flags": frozenset({"fsgsbase"})}, "BMI2", "Haswell"),
        ({"hwcap2": 0}, "FSGSBASE", "Linux 5.9"),
        ({"hwcap2": 1}, "FSGSBASE", "nofsgsbase"),
        ({"shadow_stack": True}, "shadow stack", "x86_shstk"),
        ({"address_space_bytes": NEEDED_ADDRESS_BYTES - 1}, "address space", "ulimit -v"),
        ({"overcommit": 2, "commit_bytes": 1 << 30}, "vm.overcommit_memory", "0 or 1"),
    ],
)
def test_what_bt_cannot_do_without(lack: dict[str, object], name: str, words: str) -> None:
    facts = replace(GOOD, **lack)  # type: ignore[arg-type]
    found = finding(facts, name)
    assert (found.ok, found.stops_bt) == (False, True)
    assert words in found.effect
    reason = why_not_bt(facts)
    assert reason is not None
    assert name in reason
    assert found.value in reason
    assert "interp" in reason
    assert "\n" not in reason


@pytest.mark.parametrize(
    ("lack", "name", "words"),
    [
        ({"maps": 30_000}, "vm.max_map_count", "fewer pages"),
        ({"maps": 1000}, "vm.max_map_count", "end the run"),
        ({"maps": 0}, "vm.max_map_count", "end the run"),
        ({"kvm": "absent"}, "KVM", "emulated backend only"),
        ({"kvm": "forbidden"}, "KVM", "group kvm"),
        ({"signal_stack_bytes": 0}, "signal frame", "signal stack"),
    ],
)
def test_what_bt_can_do_without(lack: dict[str, object], name: str, words: str) -> None:
    facts = replace(GOOD, **lack)  # type: ignore[arg-type]
    found = finding(facts, name)
    assert (found.ok, found.stops_bt) == (False, False)
    assert words in found.effect
    assert why_not_bt(facts) is None


@pytest.mark.parametrize(
    ("fact", "name", "value"),
    [
        ({"address_space_bytes": NEEDED_ADDRESS_BYTES}, "address space", f"{NEEDED_ADDRESS_BYTES / (1 << 30):.1f} GiB"),
        ({"overcommit": 1}, "vm.overcommit_memory", "1 (always)"),
        ({"overcommit": 2, "commit_bytes": 1 << 50}, "vm.overcommit_memory", "2 (strict), 1048576.0 GiB left"),
        ({"cpu_flags": frozenset({"bmi2", "amx_tile", "avx512f"})}, "signal frame",
         "2048 bytes at least, amx_tile, avx512f"),
        ({"maps": 200_000}, "vm.max_map_count", "200000"),
    ],
)  # fmt: skip
def test_what_is_enough(fact: dict[str, object], name: str, value: str) -> None:
    found = finding(replace(GOOD, **fact), name)  # type: ignore[arg-type]
    assert (found.ok, found.value) == (True, value)


def test_a_cpu_that_the_kernel_holds_back_is_told_from_one_that_lacks_it() -> None:
    assert "kernel" in finding(replace(GOOD, hwcap2=0), "FSGSBASE").value
    assert finding(replace(GOOD, hwcap2=0, cpu_flags=frozenset()), "FSGSBASE").value == "not there"


def test_the_facts_of_this_host() -> None:
    facts = gather()
    assert (facts.machine, facts.system) == (platform.machine(), platform.system())
    assert facts.maps == int(Path("/proc/sys/vm/max_map_count").read_text())
    assert facts.signal_stack_bytes == os.sysconf("SC_MINSIGSTKSZ")
    assert (facts.kvm != "absent") == Path("/dev/kvm").exists()
    assert "fpu" in facts.cpu_flags


def test_a_limit_on_addresses_is_seen() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (1 << 44, hard))
        assert gather().address_space_bytes == 1 << 44
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_what_cannot_be_read_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object, **_keywords: object) -> str:
        raise PermissionError

    monkeypatch.setattr(Path, "read_text", refuse)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    facts = gather()
    assert (facts.cpu_flags, facts.hwcap2, facts.maps) == (frozenset(), 0, 0)
    assert not hostcheck.check_bmi2(facts).ok
