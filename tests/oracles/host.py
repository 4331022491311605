"""Owns the host CPU as an oracle for tests; must not know what is compared with it."""

from __future__ import annotations

from functools import cache

import pytest

from vmm.hostalu import HostAlu
from vmm.hostcpu import HostCpu, HostCpuError


@cache
def host_cpu() -> HostCpu:
    """The one native executor of this test process.

    Raises:
        HostCpuError: this is no x86-64 Linux.
    """
    return HostCpu()


def require_host_alu() -> HostAlu:
    """The host's CPU as an ALU; skips the test on machines that are no x86-64 Linux."""
    try:
        return HostAlu(host_cpu())
    except HostCpuError as error:
        pytest.skip(str(error))
