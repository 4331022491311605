"""`trapgate doctor`: what this host offers to a virtual machine monitor, and what happens without it.

It only looks; nothing is installed, changed or started but gdb's `--version`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from gdbstub import cli_cpu
from gdbstub.cli_gdb import find_gdb

_AT_HWCAP2 = 26
_AT_MINSIGSTKSZ = 51
_HWCAP2_FSGSBASE = 2
_GIB = 1 << 30
_NEEDED_MAPS = 65530
_NEEDED_ADDRESS_SPACE_BYTES = 64 * _GIB


@dataclass(frozen=True, slots=True)
class Finding:
    """One fact about the host.

    Attributes:
        name: what was looked at.
        ok: it is there, or good enough.
        value: what was found.
        effect: what uses it, or what is done without it.
    """

    name: str
    ok: bool
    value: str
    effect: str


def run(options: argparse.Namespace) -> int:
    """Carry out `trapgate doctor`; the exit status is 0 whatever is found, since `interp` runs anywhere."""
    findings = [find() for find in CHECKS]
    if options.json:
        sys.stdout.write(json.dumps([asdict(finding) for finding in findings], indent=2) + "\n")
        return 0
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        mark = "ok" if finding.ok else "--"
        sys.stdout.write(f"{mark}  {finding.name:{width}}  {finding.value}\n{'':{width + 6}}{finding.effect}\n")
    return 0


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


def _auxiliary_value(kind: int) -> int:
    """A value of the vector that the kernel gives each process; 0 if it does not say."""
    try:
        raw = Path("/proc/self/auxv").read_bytes()
    except OSError:
        return 0
    words = [int.from_bytes(raw[i : i + 8], sys.byteorder) for i in range(0, len(raw), 8)]
    return dict(zip(words[::2], words[1::2], strict=False)).get(kind, 0)


def check_python() -> Finding:
    """The interpreter."""
    version = platform.python_version()
    return Finding(
        "python", sys.version_info >= (3, 11), f"{platform.python_implementation()} {version}", "3.11 or later"
    )


def check_host() -> Finding:
    """Operating system and architecture."""
    machine, system = platform.machine(), platform.system()
    ok = machine == "x86_64" and system == "Linux"
    effect = (
        "undefined flags can be measured here, and native engines could run"
        if ok
        else "interp only, with the undefined flags of a fixed model; native engines need Linux on x86-64"
    )
    return Finding("host", ok, f"{system} {platform.release()} on {machine}", effect)


def check_undefined_flags() -> Finding:
    """Whether the flags that the SDM leaves undefined can be taken from this CPU."""
    from vmm.hostalu import choose_alu

    profile = choose_alu().profile
    ok = not profile.unprobed and not profile.host_operations
    effect = "the guest sees them so; --undefined-flags MODEL makes runs the same on another host"
    return Finding("undefined flags", ok, profile.describe(), effect)


def check_fpu() -> Finding:
    """Whether a guest can have an FPU."""
    ok = cli_cpu.computes_floating_point()
    effect = (
        f"it computes the guest's x87, MMX, SSE and SSE2; --cpu MODEL, default {cli_cpu.default_model()}"
        if ok
        else f"guests have no FPU (--cpu {cli_cpu.WITHOUT_FPU}): floating point is computed by the host's, on x86-64"
    )
    return Finding("FPU", ok, "this host's own" if ok else "none that can be used", effect)


def check_fsgsbase() -> Finding:
    """WRGSBASE in user mode."""
    ok = "fsgsbase" in _cpu_flags() and bool(_auxiliary_value(_AT_HWCAP2) & _HWCAP2_FSGSBASE)
    effect = (
        "native engines change windows with WRGSBASE" if ok else "native engines would need a system call per window"
    )
    return Finding("FSGSBASE", ok, "usable" if ok else "not usable", effect)


def check_bmi2() -> Finding:
    """SARX and the like, which leave the flags alone."""
    ok = "bmi2" in _cpu_flags()
    effect = "native engines count without touching flags" if ok else "native engines would save flags to count"
    return Finding("BMI2", ok, "there" if ok else "not there", effect)


def check_signal_stack() -> Finding:
    """How much a signal frame takes, AVX-512 and AMX state included."""
    size_bytes = _auxiliary_value(_AT_MINSIGSTKSZ)
    wide = sorted(flag for flag in _cpu_flags() if flag in ("avx512f", "amx_tile", "avx2"))
    value = f"{size_bytes} bytes at least, {', '.join(wide) or 'no AVX'}" if size_bytes else "unknown"
    return Finding("signal frame", size_bytes > 0, value, "the size of a native engine's alternate signal stack")


def check_kvm() -> Finding:
    """/dev/kvm."""
    path = Path("/dev/kvm")
    if not path.exists():
        return Finding("KVM", False, "no /dev/kvm", "trap can use its emulated backend only")
    ok = os.access(path, os.R_OK | os.W_OK)
    value = "/dev/kvm can be opened" if ok else "/dev/kvm is there, but not for this user"
    effect = "trap could use it" if ok else "trap can use its emulated backend only; add the user to the group kvm"
    return Finding("KVM", ok, value, effect)


def check_maps() -> Finding:
    """The limit of mappings a process may have."""
    text = _read("/proc/sys/vm/max_map_count").strip()
    ok = text.isdecimal() and int(text) >= _NEEDED_MAPS
    effect = "room for some 32,000 scattered pages in windows" if ok else "native engines evict windows earlier"
    return Finding("vm.max_map_count", ok, text or "unknown", effect)


def check_address_space() -> Finding:
    """The limit on address space."""
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    ok = soft == resource.RLIM_INFINITY or soft >= _NEEDED_ADDRESS_SPACE_BYTES
    value = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft / _GIB:.1f} GiB"
    effect = "windows of 4 GiB can be reserved" if ok else "native engines need windows of 4 GiB: raise `ulimit -v`"
    return Finding("address space", ok, value, effect)


def check_gdb() -> Finding:
    """Stock gdb."""
    path = find_gdb()
    if path is None:
        return Finding(
            "gdb", False, "not found", "`trapgate run` serves any gdb; `trapgate gdb` needs one (apt install gdb)"
        )
    version = _version(path)
    return Finding("gdb", True, f"{version} at {path}", "`trapgate gdb` starts it")


def check_lldb() -> Finding:
    """Lldb."""
    path = shutil.which("lldb")
    if path is None:
        return Finding("lldb", False, "not found", "only gdb can be used; lldb connects with `gdb-remote HOST:PORT`")
    return Finding("lldb", True, f"{_version(path)} at {path}", "connects with `gdb-remote HOST:PORT`")


def _version(path: str) -> str:
    try:
        text = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return "a version that it does not tell"
    match = re.search(r"\d+(\.\d+)+", text)
    return match[0] if match else "unknown version"


CHECKS: tuple[Callable[[], Finding], ...] = (
    check_python,
    check_host,
    check_undefined_flags,
    check_fpu,
    check_fsgsbase,
    check_bmi2,
    check_signal_stack,
    check_kvm,
    check_maps,
    check_address_space,
    check_gdb,
    check_lldb,
)
