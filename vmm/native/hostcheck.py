"""What the native core needs of this host: facts, gathered in one place, and what each of them means for the user.

It only looks, without root and without touching anything; what is done about a finding is its callers' business.
"""

from __future__ import annotations

import os
import platform
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmm.native.dispatch import TABLE_BYTES
from vmm.native.windows import STRIDE_BYTES, WINDOW_BYTES

_AT_HWCAP2 = 26
_AT_MINSIGSTKSZ = 51
_HWCAP2_FSGSBASE = 2
_GIB = 1 << 30
DEFAULT_MAPS = 65_530  # what Linux allows a process unless told otherwise
_FEW_MAPS = 8_192
# Below that a guest with a few processes has no room for its windows and tables: four of each, the translation caches.
NEEDED_ADDRESS_BYTES: Final = 4 * (STRIDE_BYTES + TABLE_BYTES) + WINDOW_BYTES
_STRICT_OVERCOMMIT = 2


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What was found.

    Attributes:
        machine, system, release: as `uname` says.
        cpu_flags: of /proc/cpuinfo; those that the kernel lets programs use.
        hwcap2: of the auxiliary vector.
        signal_stack_bytes: the least for a signal frame; 0 if the kernel does not say.
        address_space_bytes: RLIMIT_AS; None without a limit.
        maps: vm.max_map_count; 0 if unknown.
        overcommit: vm.overcommit_memory: 0 heuristic, 1 always, 2 strict.
        commit_bytes: in strict mode, what may still be promised to programs.
        shadow_stack: this process runs with a shadow stack, so that RET goes only where CALL came from.
        kvm: `absent`, `forbidden` to this user, or `usable`.
    """

    machine: str = "x86_64"
    system: str = "Linux"
    release: str = ""
    cpu_flags: frozenset[str] = frozenset()
    hwcap2: int = 0
    signal_stack_bytes: int = 0
    address_space_bytes: int | None = None
    maps: int = DEFAULT_MAPS
    overcommit: int = 0
    commit_bytes: int = 0
    shadow_stack: bool = False
    kvm: str = "absent"

    @property
    def is_native(self) -> bool:
        """Linux on x86-64."""
        return self.machine in ("x86_64", "AMD64") and self.system == "Linux"


@dataclass(frozen=True, slots=True)
class Finding:
    """One fact about the host.

    Attributes:
        name: what was looked at.
        ok: it is there, or good enough.
        value: what was found.
        effect: what uses it, or what is done without it.
        stops_bt: without it `bt` cannot run at all.
    """

    name: str
    ok: bool
    value: str
    effect: str
    stops_bt: bool = False


def gather() -> HostFacts:
    """Look at this host."""
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    meminfo = _numbers("/proc/meminfo")
    return HostFacts(
        platform.machine(),
        platform.system(),
        platform.release(),
        _cpu_flags(),
        _auxiliary_value(_AT_HWCAP2),
        _auxiliary_value(_AT_MINSIGSTKSZ),
        None if soft == resource.RLIM_INFINITY else soft,
        _number("/proc/sys/vm/max_map_count"),
        _number("/proc/sys/vm/overcommit_memory"),
        1024 * (meminfo.get("CommitLimit", 0) - meminfo.get("Committed_AS", 0)),
        "shstk"
        in next((line for line in _read("/proc/self/status").splitlines() if "x86_Thread_features:" in line), ""),
        _look_for_kvm(),
    )


def _look_for_kvm() -> str:
    path = Path("/dev/kvm")
    if not path.exists():
        return "absent"
    return "usable" if os.access(path, os.R_OK | os.W_OK) else "forbidden"


def _cpu_flags() -> frozenset[str]:
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _number(path: str) -> int:
    text = _read(path).strip()
    return int(text) if text.isdecimal() else 0


def _numbers(path: str) -> dict[str, int]:
    words = (line.split() for line in _read(path).splitlines())
    return {line[0].rstrip(":"): int(line[1]) for line in words if len(line) > 1 and line[1].isdecimal()}


def _auxiliary_value(kind: int) -> int:
    """A value of the vector that the kernel gives each process; 0 if it does not say."""
    try:
        raw = Path("/proc/self/auxv").read_bytes()
    except OSError:
        return 0
    words = [int.from_bytes(raw[i : i + 8], sys.byteorder) for i in range(0, len(raw), 8)]
    return dict(zip(words[::2], words[1::2], strict=False)).get(kind, 0)


# What the facts mean.


def check_host(facts: HostFacts) -> Finding:
    """Operating system and architecture."""
    effect = (
        "undefined flags can be measured here, and bt can run"
        if facts.is_native
        else "interp only, with the undefined flags of a fixed model; bt needs Linux on x86-64"
    )
    value = f"{facts.system} {facts.release} on {facts.machine}"
    return Finding("host", facts.is_native, value, effect, stops_bt=True)


def check_bmi2(facts: HostFacts) -> Finding:
    """SARX and the like, which leave the flags alone."""
    ok = "bmi2" in facts.cpu_flags
    effect = (
        "bt counts and shifts without touching flags"
        if ok
        else "bt cannot run, and interp does: SARX, SHRX and MULX are needed (Intel since Haswell, AMD since Excavator)"
    )
    return Finding("BMI2", ok, "there" if ok else "not there", effect, stops_bt=True)


def check_fsgsbase(facts: HostFacts) -> Finding:
    """WRGSBASE in user mode: in the CPU, and allowed by the kernel."""
    ok = bool(facts.hwcap2 & _HWCAP2_FSGSBASE)
    value = (
        "usable" if ok else "in the CPU, not enabled by the kernel" if "fsgsbase" in facts.cpu_flags else "not there"
    )
    effect = (
        "bt changes address spaces with WRGSBASE"
        if ok
        else "bt cannot run, and interp does: Linux 5.9 or later is needed, not started with `nofsgsbase`"
    )
    return Finding("FSGSBASE", ok, value, effect, stops_bt=True)


def check_shadow_stack(facts: HostFacts) -> Finding:
    """Control-flow enforcement by the CPU."""
    effect = (
        "bt cannot run, and interp does: its returns go elsewhere than calls came from; unset the tunable "
        "glibc.cpu.x86_shstk"
        if facts.shadow_stack
        else "bt's returns are the host's own"
    )
    value = "in force" if facts.shadow_stack else "not in force"
    return Finding("shadow stack", not facts.shadow_stack, value, effect, stops_bt=True)


def check_signal_stack(facts: HostFacts) -> Finding:
    """How much a signal frame takes, AVX-512 and AMX state included."""
    size_bytes = facts.signal_stack_bytes
    wide = ", ".join(sorted(facts.cpu_flags & {"avx512f", "amx_tile", "avx2"})) or "no AVX"
    value = f"{size_bytes} bytes at least, {wide}" if size_bytes else "unknown"
    return Finding("signal frame", size_bytes > 0, value, "the size of bt's alternate signal stack follows from it")


def check_kvm(facts: HostFacts) -> Finding:
    """/dev/kvm."""
    value = {
        "absent": "no /dev/kvm",
        "forbidden": "/dev/kvm is there, but not for this user",
        "usable": "/dev/kvm can be opened",
    }[facts.kvm]
    effect = {
        "absent": "trap can use its emulated backend only",
        "forbidden": "trap can use its emulated backend only; add the user to the group kvm",
        "usable": "--vmm trap --trap-backend kvm can use it",
    }[facts.kvm]
    return Finding("KVM", facts.kvm == "usable", value, effect)


def check_maps(facts: HostFacts) -> Finding:
    """The limit of mappings a process may have."""
    ok = facts.maps >= DEFAULT_MAPS
    if ok:
        effect = f"room for some {facts.maps // 2000},000 scattered pages of guests in bt's windows"
    elif facts.maps >= _FEW_MAPS:
        effect = f"bt maps fewer pages at a time and fills them again; {DEFAULT_MAPS} is usual (sysctl)"
    else:
        effect = f"bt may find no room for a page and end the run; set vm.max_map_count to {DEFAULT_MAPS}"
    return Finding("vm.max_map_count", ok, str(facts.maps or "unknown"), effect)


def check_overcommit(facts: HostFacts) -> Finding:
    """Whether large sparse reservations are refused."""
    strict = facts.overcommit == _STRICT_OVERCOMMIT
    ok = not strict or facts.commit_bytes >= NEEDED_ADDRESS_BYTES
    mode = {0: "0 (heuristic)", 1: "1 (always)", 2: "2 (strict)"}.get(facts.overcommit, str(facts.overcommit))
    value = f"{mode}, {facts.commit_bytes / _GIB:.1f} GiB left" if strict else mode
    effect = (
        "bt's dispatch tables of 16 GiB can be reserved; only what is touched costs memory"
        if ok
        else "bt cannot run, and interp does: strict accounting counts its sparse tables in full; "
        "set vm.overcommit_memory to 0 or 1"
    )
    return Finding("vm.overcommit_memory", ok, value, effect, stops_bt=True)


def check_address_space(facts: HostFacts) -> Finding:
    """The limit on address space."""
    limit = facts.address_space_bytes
    ok = limit is None or limit >= NEEDED_ADDRESS_BYTES
    value = "unlimited" if limit is None else f"{limit / _GIB:.1f} GiB"
    effect = (
        "bt's windows of 4 GiB and their tables can be reserved"
        if ok
        else f"bt cannot run, and interp does: {NEEDED_ADDRESS_BYTES // _GIB} GiB of addresses are needed (`ulimit -v`)"
    )
    return Finding("address space", ok, value, effect, stops_bt=True)


CHECKS: Final[tuple[Callable[[HostFacts], Finding], ...]] = (
    check_host,
    check_bmi2,
    check_fsgsbase,
    check_shadow_stack,
    check_signal_stack,
    check_address_space,
    check_overcommit,
    check_maps,
    check_kvm,
)


def lack_of_bt(facts: HostFacts) -> str | None:
    """What such a host lacks for `bt` and what helps, as part of a line for the user; None if it lacks nothing."""
    for check in CHECKS:
        finding = check(facts)
        if finding.stops_bt and not finding.ok:
            reason = finding.effect.removeprefix("bt cannot run, and interp does: ")
            return f"{finding.name} is {finding.value}; {reason}"
    return None


def why_not_bt(facts: HostFacts) -> str | None:
    """Why `bt` cannot run on such a host, in one line for the user; None if it can."""
    lack = lack_of_bt(facts)
    return None if lack is None else f"the engine bt cannot run here, and interp can: {lack}"
