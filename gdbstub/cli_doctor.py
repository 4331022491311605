"""`trapgate doctor`: what this host offers to a virtual machine monitor, and what happens without it.

It only looks; nothing is installed, changed or started but gdb's `--version`.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import asdict

from gdbstub import cli_cpu
from gdbstub.cli_gdb import find_gdb
from gdbstub.cli_options import DEFAULT_ENGINE, FALLBACK_ENGINE
from vmm.native import hostcheck
from vmm.native.hostcheck import Finding, HostFacts


def run(options: argparse.Namespace) -> int:
    """Carry out `trapgate doctor`; the exit status is 0 whatever is found, since `interp` runs anywhere."""
    findings = find_all(hostcheck.gather())
    if options.json:
        sys.stdout.write(json.dumps([asdict(finding) for finding in findings], indent=2) + "\n")
        return 0
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        mark = "ok" if finding.ok else "--"
        sys.stdout.write(f"{mark}  {finding.name:{width}}  {finding.value}\n{'':{width + 6}}{finding.effect}\n")
    return 0


def find_all(facts: HostFacts) -> list[Finding]:
    """Everything that is worth knowing of a host with these facts, and of the programs on it."""
    host, *native = (check(facts) for check in hostcheck.CHECKS)
    ours = check_engine(facts), check_python(), host, check_undefined_flags(), check_fpu()
    return [*ours, *native, check_gdb(), check_lldb()]


def check_engine(facts: HostFacts) -> Finding:
    """What runs a guest here unless the user says otherwise."""
    lack = hostcheck.lack_of_bt(facts)
    if lack is None:
        return Finding("engine", True, DEFAULT_ENGINE, "what runs a guest unless --vmm names another")
    return Finding("engine", False, FALLBACK_ENGINE, f"instead of the faster {DEFAULT_ENGINE}: {lack}")


def check_python() -> Finding:
    """The interpreter."""
    version = platform.python_version()
    return Finding(
        "python", sys.version_info >= (3, 11), f"{platform.python_implementation()} {version}", "3.11 or later"
    )


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
